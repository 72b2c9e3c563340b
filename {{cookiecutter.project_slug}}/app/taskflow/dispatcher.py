"""Starts what was claimed, and keeps count of what runs.

Owns the running attempts: slots per executor, the asyncio task of each, how to stop one. The journal asks it what it
can take, hands it claimed rows and tells it what was written; a slot is free again only then. The narrow seam to
another engine: give it an id that is ready, and it calls `runner.run`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Literal, Protocol

from .backends.base import AttemptId, Claimed, Demand, Finish, TurnResult
from .context import CarriedContexts
from .executors import Executor, ThreadExecutor
from .journal import Journal
from .loops import until
from .models import TaskConfig
from .registry import TaskDefinition, TaskRegistry
from .runner import Attempt, Interrupted, Runner, stopped
from .threads import Job

logger = logging.getLogger("taskflow")

LAST_WORDS = 1.0
"""Seconds that interrupted tasks have to say how they ended."""


@dataclass(slots=True, eq=False)
class Running:
    attempt: Attempt
    kind: str
    cancel: Callable[[], object] | None = None
    """Ends it before its time; None once it has ended and its finish is on the way to the disk."""

    def stop(self, by: Literal["operator", "shutdown"], *, interrupt: bool) -> None:
        """Tells the function that it should stop and, with `interrupt`, cancels what awaits it: once for an operator,
        however often he asks, because it may be cleaning up, and once more for the shutdown."""
        if self.cancel is None or self.attempt.closing:  # what is being closed must not be left half open
            return
        if by == "operator" and self.attempt.stopped_by is not None:
            return
        self.attempt.stopped_by = self.attempt.stopped_by or by
        self.attempt.context.cancelled = True
        if interrupt:  # not before its first step: a coroutine that never began could not say how it ended
            asyncio.get_running_loop().call_soon(self._interrupt)

    def _interrupt(self) -> None:
        if self.cancel is not None and not self.attempt.closing:
            self.cancel()


class Delivery(Protocol):
    """Another engine that says when this instance is to take a task, and is told of those that became ready. It lives
    as long as the task manager is started."""

    def start(self) -> None: ...

    async def stop(self) -> None: ...

    def allows(self, *, full: bool) -> Mapping[str, int]:
        """How many tasks of which queues this instance may claim in the turn that is about to begin. `full`: an
        executor has no slot free."""

    def turned(self, finishes: Sequence[Finish], result: TurnResult) -> None:
        """One turn is committed."""


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
        self._running: dict[AttemptId, Running] = {}
        self._used: Counter[str] = Counter()
        self._claiming = False
        self._retired = False
        self._lease_holds: Callable[[], bool] = lambda: False
        self.delivery: Delivery | None = None
        """None: this instance takes whatever it has slots for."""

    # -- what the journal asks and tells

    def demand(self, finishes: Sequence[Finish]) -> Demand | None:
        """Free slots, or None when there are none or no more tasks are to be started."""
        if not (self._claiming and self._lease_holds()):
            return None
        ending = (self._running.get(finish.task.attempt_id) for finish in finishes)
        freed = Counter(running.kind for running in ending if running is not None)
        slots = {kind: executor.slots - self._used[kind] + freed[kind] for kind, executor in self._executors.items()}
        if not any(free > 0 for free in slots.values()):
            return None
        full = not all(free > 0 for free in slots.values())
        return Demand(self._registry.executors, slots, self.delivery.allows(full=full) if self.delivery else None)

    def held(self) -> frozenset[AttemptId]:
        return frozenset(self._running)

    def turned(self, finishes: Sequence[Finish], result: TurnResult) -> None:
        """One turn is committed: its finishes leave their slots, its claims start."""
        for finish in finishes:
            self._release(finish, lost=finish.task.attempt_id in result.refused)
        for attempt_id in result.stopping:
            self.cancel(attempt_id)
        for task in result.claimed:
            can_begin = self._claiming or self._registry.is_here(task.task_id)
            self._begin(task) if can_begin else self._give_back(task)
        if result.unknown and self._registry.find(result.unknown):
            self._journal.wake()
        if self.delivery is not None:
            self.delivery.turned(finishes, result)

    # -- running

    def start(self, lease_holds: Callable[[], bool] = lambda: True) -> None:
        """From now on it may claim, while its instance's lease holds."""
        self._lease_holds = lease_holds
        for executor in self._executors.values():
            executor.start()
        self._claiming, self._retired = True, False

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def busy(self) -> Mapping[str, tuple[int, int]]:
        """Executor -> calls under way, and how many it takes at once."""
        return {kind: (self._used[kind], executor.slots) for kind, executor in self._executors.items()}

    @property
    def slots(self) -> int:
        return sum(executor.slots for executor in self._executors.values())

    @property
    def claiming(self) -> bool:
        return self._claiming

    @property
    def retired(self) -> bool:
        """Whether it claimed once, and never will again."""
        return self._retired

    def cancel(self, attempt_id: AttemptId) -> bool:
        """Asks a running attempt to stop: a coroutine is cancelled, a thread is told. False when it is not here."""
        running = self._running.get(attempt_id)
        if running is None or running.cancel is None:
            return False
        running.stop("operator", interrupt=running.kind != "thread")
        return True

    def retire(self) -> None:
        """Claims nothing more. What the turn under way still claims is given back."""
        self._claiming, self._retired = False, True

    async def drain(self, deadline: float) -> None:
        """Waits for what runs until the monotonic `deadline`; the rest is interrupted."""
        self.retire()
        await until(lambda: not self._running, deadline)  # nor before what has ended is on the disk
        if unfinished := self._unfinished():
            logger.warning("%d tasks were still running at the end of the shutdown time: interrupted", len(unfinished))
        for running in unfinished:
            running.stop("shutdown", interrupt=True)
        await until(lambda: not self._unfinished(), monotonic() + LAST_WORDS)
        for running in self._unfinished():  # a coroutine that swallows its cancellation
            self._ended(running, self._runner.ended(running.attempt, TaskConfig(), Interrupted()))
        for executor in self._executors.values():
            executor.close()

    async def wait_closed(self, deadline: float) -> None:
        """After `drain`: returns when no worker process is left; those that are at the deadline are killed."""
        for executor in self._executors.values():
            await executor.wait_closed(deadline)

    def _unfinished(self) -> list[Running]:
        return [running for running in self._running.values() if running.cancel is not None]

    def _begin(self, task: Claimed) -> None:
        definition = self._registry.for_task(task.task_id, task.name)
        kind = task.executor if definition is None else definition.executor
        running = self._enter(task, kind)
        try:
            self._launch(running, definition)
        except Exception as error:  # noqa: BLE001 - the net under user code: a task factory of its own, say
            self._ended(running, self._runner.broken(running.attempt, error))

    def _give_back(self, task: Claimed) -> None:
        running = self._enter(task, task.executor)
        self._ended(running, self._runner.given_back(running.attempt))

    def _enter(self, task: Claimed, kind: str) -> Running:
        running = self._running[task.attempt_id] = Running(self._runner.attempt(task), kind)
        self._used[kind] += 1
        return running

    def _launch(self, running: Running, definition: TaskDefinition | None) -> None:
        task = running.attempt.task
        context, loop = self._carried.of(task.task_id), asyncio.get_running_loop()
        executor = self._executors.get(running.kind)
        if (due := self._registry.due(task.task_id)) > monotonic():
            running.cancel = loop.create_task(self._work_later(running, due), context=context).cancel
        elif definition is not None and definition.needs_only_a_thread and isinstance(executor, ThreadExecutor):
            self._hand_over(running, definition, executor, context, loop)
        else:
            running.cancel = loop.create_task(self._work(running), name=task.task_id, context=context).cancel

    async def _work_later(self, running: Running, due: float) -> None:
        try:
            await asyncio.sleep(due - monotonic())
        except asyncio.CancelledError:
            outcome = stopped(running.attempt) or Interrupted()
            self._ended(running, self._runner.ended(running.attempt, TaskConfig(), outcome))
        else:
            await self._work(running)

    async def _work(self, running: Running) -> None:
        try:
            finish = await self._runner.run(running.attempt)
        except BaseException as error:  # noqa: BLE001 - a GeneratorExit out of a future closes the runner's coroutine
            finish = self._runner.broken(running.attempt, error)
        self._ended(running, finish)

    def _hand_over(
        self,
        running: Running,
        definition: TaskDefinition,
        executor: ThreadExecutor,
        context: Context,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """The whole attempt to a thread: the event loop hears of it again when it has ended."""
        attempt = running.attempt

        def deliver(job: Job) -> None:
            self._ended(running, job.result if job.error is None else self._runner.broken(attempt, job.error))

        def give_up() -> None:
            executor.abandon(job)
            self._ended(running, self._runner.ended(attempt, definition.config, stopped(attempt) or Interrupted()))

        job = executor.submit(partial(self._runner.run_here, attempt, definition, loop), context, deliver, loop)
        running.cancel = give_up

    def _ended(self, running: Running, finish: Finish) -> None:
        running.cancel = None
        self._journal.finish(finish)

    def _release(self, finish: Finish, *, lost: bool) -> None:
        if finish.status.terminal and not lost:  # what is lost to another attempt may be one of this process
            self._carried.forget(finish.task.task_id)
        self._registry.forget(finish.task.task_id)
        running = self._running.pop(finish.task.attempt_id, None)
        if running is not None:
            self._used[running.kind] -= 1
        if lost:
            logger.warning("task %s: its lease was lost, its result is refused", finish.task.task_id)
