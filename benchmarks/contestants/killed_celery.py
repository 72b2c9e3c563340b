"""Celery under `killed.py`: on RabbitMQ where there is one, otherwise on Redis."""

from __future__ import annotations

import os

from celery import Celery  # type: ignore[import-untyped, unused-ignore]

from .killed_job import JOBS, REDELIVERY, run_plainly

RABBIT = os.environ.get("KILLED_RABBIT")

app = Celery("killed", broker=RABBIT or os.environ["KILLED_REDIS"])
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    worker_cancel_long_running_tasks_on_connection_loss=True,
    broker_connection_retry_on_startup=True,
)
if RABBIT:
    app.conf.update(task_default_queue_type="quorum", broker_transport_options={"confirm_publish": True})
else:
    # Every 10 s and not every 100: a timeout this short asks for it.
    app.conf.broker_transport_options = {"visibility_timeout": REDELIVERY, "unacked_restore_throttle": 1}
job = app.task(name="job")(run_plainly)


if __name__ == "__main__":
    for number in range(JOBS):
        job.delay(number)
