"""For the team's own tests: run what waits, without sleeping.

Owns nothing; it works on a started `TaskManager`. Time is the manager's own clock: `manager.clock.freeze()`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from .manager import TaskManager
from .models import TaskStatus


async def drain(manager: TaskManager, timeout: float = 10.0) -> None:
    """Returns when nothing runs and nothing waits to start now; retry waits and delayed tasks stay where they are.

    Raises TimeoutError, naming how many tasks are left, after `timeout` seconds.
    """
    try:
        async with asyncio.timeout(timeout):
            while await unfinished(manager):
                manager.journal.wake()
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise TimeoutError(f"after {timeout:g} s {await unfinished(manager)} tasks still run or wait") from None


async def unfinished(manager: TaskManager) -> int:
    """Tasks that run or wait to start now."""
    due = await manager.store.due()
    counts = await manager.store.counts()
    live = (TaskStatus.PENDING, TaskStatus.RUNNING)
    return due + sum(count.n - count.delayed for count in counts if count.status in live)


@contextmanager
def instant_retries(manager: TaskManager) -> Iterator[None]:
    """Retries and `RetryLater` wait no time inside this block."""
    manager.runner.retries_wait = False
    try:
        yield
    finally:
        manager.runner.retries_wait = True


async def advance(manager: TaskManager, seconds: float) -> None:
    """Moves the frozen clock and runs what becomes due."""
    manager.clock.advance(seconds)
    manager.journal.wake()
    await drain(manager)
