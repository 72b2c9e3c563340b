"""How to test a schedule: on a clock that the test moves.

In your tests use the `task_manager` of `app.tasks`, started by the fixture `client`, and the names of your schedules.
"""

import asyncio
from datetime import UTC, datetime

from app.taskflow import TaskManager
from app.taskflow.testing import advance, next_ticks

EVENING = datetime(2026, 3, 28, 18, tzinfo=UTC)
DAY = 86_400.0


def test_a_nightly_job_runs_once_a_night() -> None:
    manager = TaskManager()
    nights: list[datetime] = []

    @manager.schedule(cron="0 3 * * *", timezone="Europe/London")
    async def tidy_up() -> None:
        nights.append(manager.clock())

    async def three_days() -> None:
        async with manager.lifespan():
            await advance(manager, 3 * DAY)

    manager.clock.freeze(EVENING)
    expected = next_ticks(manager, "tidy_up", 3)
    assert expected[0] == datetime(2026, 3, 29, 2, tzinfo=UTC)  # three o'clock of the first day of summer time
    asyncio.run(three_days())
    assert nights == expected
