"""Starts what was claimed, and keeps count of what runs.

Owns the running attempts: slots per executor, the asyncio task of each, how to stop one. The journal asks it what it
can take, hands it claimed rows and tells it what was written; a slot is free again only then. The narrow seam to
another engine: give it an id that is ready, and it calls `runner.run`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Literal

from .backends.base import Claimed, Demand, Finish, TurnResult
from .context import CarriedContexts
from .executors import Executor
from .journal import Journal
from .registry import TaskRegistry
from .runner import Attempt, Runner

logger = logging.getLogger("taskflow")


@dataclass(slots=True, eq=False)
class Running:
    attempt: Attempt
    kind: str
    job: asyncio.Task[None] | None = None
    """None once the function has ended and its finish is on the way to the disk."""

    def stop(self, by: Literal["operator", "shutdown"], *, interrupt: bool) -> None:
        """Tells the function that it should stop and, with `interrupt`, cancels what awaits it."""
        if self.job is None or self.attempt.closing:  # what is being closed must not be left half open
            return
        self.attempt.stopped_by = by
        self.attempt.context.cancelled = True
        if interrupt:  # not before its first step: a coroutine that never began could not say how it ended
            asyncio.get_running_loop().call_soon(self._interrupt)

    def _interrupt(self) -> None:
        if self.job is not None and not self.attempt.closing:
            self.job.cancel()


class Dispatcher:
    def __init__(
        self,
        registry: TaskRegistry,
        executors: Mapping[str, Executor],
        runner: Runner,
        journal: Journal,
        carried: CarriedContexts,
    ) -> None:
        self._carried = carried
        self._registry = registry
        self._executors = executors
        self._runner = runner
        self._journal = journal
        self._running: dict[str, Running] = {}
        self._used: Counter[str] = Counter()
        self._claiming = False

    # -- what the journal asks and tells

    def demand(self, finishes: Sequence[Finish]) -> Demand | None:
        """Free slots, or None when there are none or no more tasks are to be started."""
        if not self._claiming:
            return None
        freed = Counter(self._running[finish.task.task_id].kind for finish in finishes)
        slots = {kind: executor.slots - self._used[kind] + freed[kind] for kind, executor in self._executors.items()}
        if not any(free > 0 for free in slots.values()):
            return None
        return Demand(self._registry.executors, slots)

    def held(self) -> frozenset[str]:
        return frozenset(self._running)

    def turned(self, finishes: Sequence[Finish], result: TurnResult) -> None:
        """One turn is committed: its finishes leave their slots, its claims start."""
        for finish in finishes:
            self._release(finish, lost=finish.task.task_id in result.refused)
        for task_id in result.stopping:
            self.cancel(task_id)
        for task in result.claimed:
            self._begin(task)

    # -- running

    def start(self) -> None:
        for executor in self._executors.values():
            executor.start()
        self._claiming = True

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def slots(self) -> int:
        return sum(executor.slots for executor in self._executors.values())

    @property
    def claiming(self) -> bool:
        return self._claiming

    def cancel(self, task_id: str) -> bool:
        """Asks a running attempt to stop: a coroutine is cancelled, a thread is told. False when it is not here."""
        running = self._running.get(task_id)
        if running is None or running.job is None:
            return False
        running.stop("operator", interrupt=running.kind != "thread")
        return True

    async def drain(self, deadline: float) -> None:
        """Starts nothing more and waits for what runs until the monotonic `deadline`; the rest is interrupted."""
        self._claiming = False
        await self._settled(deadline)
        for running in self._running.values():
            running.stop("shutdown", interrupt=True)
        if jobs := self._jobs():
            logger.warning("%d tasks were still running at the end of the shutdown time: interrupted", len(jobs))
            await asyncio.wait(jobs, timeout=1.0)
        for executor in self._executors.values():
            executor.close()

    async def wait_closed(self) -> None:
        """After `drain`: returns when no worker process is left."""
        for executor in self._executors.values():
            await executor.wait_closed()

    async def _settled(self, deadline: float) -> None:
        while self._running and monotonic() < deadline:
            if jobs := self._jobs():
                await asyncio.wait(jobs, timeout=max(0.0, deadline - monotonic()))
            else:
                await asyncio.sleep(0.01)  # all have ended, their finishes are on the way to the disk

    def _jobs(self) -> list[asyncio.Task[None]]:
        return [running.job for running in self._running.values() if running.job is not None]

    def _begin(self, task: Claimed) -> None:
        kind = self._registry.executors.get(task.name, task.executor)
        running = Running(self._runner.attempt(task), kind)
        self._running[task.task_id] = running
        self._used[kind] += 1
        context = self._carried.of(task.task_id)
        running.job = asyncio.get_running_loop().create_task(self._work(running), name=task.task_id, context=context)

    async def _work(self, running: Running) -> None:
        finish = await self._runner.run(running.attempt)
        running.job = None
        self._journal.finish(finish)

    def _release(self, finish: Finish, *, lost: bool) -> None:
        if finish.status.terminal or lost:
            self._carried.forget(finish.task.task_id)
        running = self._running.pop(finish.task.task_id, None)
        if running is not None:
            self._used[running.kind] -= 1
        if lost:
            logger.warning("task %s: its lease was lost, its result is refused", finish.task.task_id)
