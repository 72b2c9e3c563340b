"""A nightly job: at three in London whatever the season, never twice at a time, made up for once after an outage."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends

from app.taskflow import TaskManager, task_log

task_manager = TaskManager()  # yours is in app/tasks.py


def get_stale_ids() -> Iterator[list[int]]:
    yield [3, 1, 4]


@task_manager.schedule(
    cron="0 3 * * *",
    timezone="Europe/London",
    overlap=False,  # a night that takes longer than a day skips the next
    misfire="once",  # down for a week: one run, not seven
    retries=2,
    delay=600,
    timeout=3600,
)
def clean_up(stale: Annotated[list[int], Depends(get_stale_ids)]) -> int:
    task_log("cleaning up", ids=stale)
    return len(stale)
