"""For the team's own tests: run what waits, pass time, ask a schedule for its ticks; all without sleeping.

Owns nothing; it works on a started `TaskManager`. Time is the manager's own clock: `manager.clock.freeze()`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from time import monotonic

from .manager import TaskManager
from .models import TaskStatus


async def drain(manager: TaskManager, timeout: float = 10.0) -> None:
    """Returns when nothing runs, nothing waits to start now, no schedule is due and observers have heard of it all;
    retry waits and delayed tasks stay where they are.

    Raises TimeoutError, naming how many tasks are left, after `timeout` seconds.
    """
    try:
        async with asyncio.timeout(timeout):
            while await unfinished(manager):
                manager.scheduler.wake()
                manager.journal.wake()
                await asyncio.sleep(0.005)
            await manager.journal.flush(monotonic() + timeout)  # its listeners hear of a turn after it is committed
            await manager.observers.delivered()
    except TimeoutError:
        left = await unfinished(manager)
        why = f"{left} tasks still run or wait" if left else "an observer has not heard of all"
        raise TimeoutError(f"after {timeout:g} s {why}") from None


async def unfinished(manager: TaskManager) -> int:
    """Tasks that run or wait to start now, and schedules that are due."""
    behind = int(manager.scheduler.behind)
    due = await manager.store.due()
    counts = await manager.store.counts()
    live = (TaskStatus.PENDING, TaskStatus.RUNNING)
    return behind + due + sum(count.n - count.delayed for count in counts if count.status in live)


@contextmanager
def instant_retries(manager: TaskManager) -> Iterator[None]:
    """Retries and `RetryLater` wait no time inside this block."""
    manager.runner.retries_wait = False
    try:
        yield
    finally:
        manager.runner.retries_wait = True


async def advance(manager: TaskManager, seconds: float) -> None:
    """Passes time on the frozen clock: runs each tick of a schedule at its time, and at the end what else became due.

    A leap, as after a downtime, is `manager.clock.advance(seconds)` and `drain`: then `misfire` decides.
    """
    manager.clock.advance(0)  # refuses a clock that is not frozen
    await drain(manager)
    end = manager.clock() + timedelta(seconds=seconds)
    while (tick := manager.scheduler.next_look) is not None and tick <= end:
        manager.clock.freeze(max(tick, manager.clock()))
        await drain(manager)
    manager.clock.freeze(end)
    manager.journal.wake()
    await drain(manager)


def next_ticks(manager: TaskManager, name: str, n: int = 1) -> list[datetime]:
    """The times at which a schedule is due next, by the manager's clock, in UTC. Raises ScheduleNotFound."""
    trigger = manager.schedules.named(name).trigger
    ticks = [manager.clock()]
    for _ in range(n):
        ticks.append(trigger.next_tick(ticks[-1]))
    return ticks[1:]
