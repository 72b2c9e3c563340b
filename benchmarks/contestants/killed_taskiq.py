"""taskiq under `killed.py`: on RabbitMQ where there is one, otherwise on Redis streams."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from taskiq_aio_pika import AioPikaBroker  # type: ignore[import-not-found, unused-ignore]
from taskiq_redis import RedisStreamBroker  # type: ignore[import-not-found, unused-ignore]

from .killed_job import CONCURRENCY, JOBS, REDELIVERY, run


def make_broker() -> Any:
    if url := os.environ.get("KILLED_RABBIT"):
        return AioPikaBroker(url, qos=CONCURRENCY)
    return RedisStreamBroker(
        os.environ["KILLED_REDIS"],
        idle_timeout=REDELIVERY * 1_000,
        unacknowledged_lock_timeout=REDELIVERY,
        xread_count=1,
    )


broker = make_broker()
job = broker.task(task_name="job")(run)


async def add() -> None:
    await broker.startup()
    for number in range(JOBS):
        await job.kiq(number)
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(add())
