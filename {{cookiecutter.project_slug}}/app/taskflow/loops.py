"""The one lifecycle of every background loop: start, run for ever, survive its own errors, stop.

Owns nothing but the asyncio task. A body is one round; what it raises is logged and the next round comes after a
jittered pause that grows while rounds keep failing. Whoever started a loop stops it: a cancellation that nobody asked
for, from a driver say, is one more error.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from time import monotonic

logger = logging.getLogger("taskflow")

SHORTEST_PAUSE = 0.05
LONGEST_PAUSE = 1.0
"""Seconds between rounds while they fail."""


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failed rounds in a row: exponential, capped, full jitter above the shortest."""
    ceiling = min(LONGEST_PAUSE, SHORTEST_PAUSE * 2 ** min(failures, 10))
    return random.uniform(SHORTEST_PAUSE, ceiling)


class Throttle:
    """Lets something happen once in so many seconds at most."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last = float("-inf")

    def permits(self) -> bool:
        now = monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class Loop:
    def __init__(self, name: str, body: Callable[[], Awaitable[None]]) -> None:
        self.name = name
        self._body = body
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"taskflow-{self.name}")

    async def stop(self) -> None:
        """Ends the loop in the middle of its round; a body that must finish something says so with a shield."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        failures = 0
        while not is_cancelled():  # a driver may make an error of its own of a cancellation, and a body get over that
            try:
                await self._body()
                failures = 0
            except (Exception, asyncio.CancelledError):
                if is_cancelled():
                    raise
                failures += 1
                logger.exception("%s: a round failed, the loop goes on", self.name)
                await asyncio.sleep(pause_after(failures))


def is_cancelled() -> bool:
    """Whether somebody cancelled the running asyncio task: a CancelledError alone does not tell."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def until(holds: Callable[[], bool], deadline: float) -> None:
    """Returns when it holds, at the latest at the monotonic `deadline`."""
    while not holds() and monotonic() < deadline:
        await asyncio.sleep(0.01)
