"""Your tasks: functions that run after the response, survive restarts and are retried when they fail.

Call them from a route with `background_tasks.add_task(send_email, address=...)`, from anywhere else with
`await task_manager.enqueue(send_email, address=...)`.
"""

from typing import Any

from app.settings import secret, settings
from app.taskflow import TaskManager, task_log

task_manager = TaskManager(
    snapshot_db=settings.url,
    snapshot_interval=30.0,
    encrypt_args_key=secret(settings.encryption_key),
    encrypted_since=settings.encrypted_since,
    retention_days=settings.retention_days,
    cluster=settings.cluster,
)


@task_manager.task(retries=3, delay=1.0, backoff=2.0)
def send_email(address: str) -> None:
    """A failed attempt is tried again after 1, 2 and 4 seconds."""
    task_log(f"sending to {address}")


@task_manager.task(retries=5, delay=0.5, backoff=2.0)
async def process_webhook(payload: dict[str, Any]) -> int:
    """What a task returns is stored with it."""
    task_log("received", keys=sorted(payload))
    return len(payload)


@task_manager.schedule(cron="0 3 * * *", timezone="Europe/London")
def send_digest() -> None:
    """Every night at three by London's clocks, once for all instances."""
    task_log("sending the digest")
