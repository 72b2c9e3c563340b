"""Where user code runs: on the event loop, in a thread, or in a process.

Owns the workers and the way a call gets to them and comes back. An executor returns what the function returned and
raises what it raised; it decides nothing about the task.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar

from .context import TaskContext
from .errors import TaskArgumentError, UnreadableCall
from .models import ExecutorKind
from .registry import TaskDefinition

DEFAULT_ASYNC_SLOTS = 1_000
DEFAULT_THREADS = 100
"""Threads start when they are needed; they mostly wait for somebody else's server."""


E = TypeVar("E", bound=BaseException)

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Call(NamedTuple):
    """One call of a task function: what to run, with the arguments as they are stored."""

    definition: TaskDefinition
    arguments: str
    context: TaskContext
    injected: Mapping[str, Any] = NOTHING
    """Keyword arguments that are not stored: what the function's dependencies resolved to for this attempt."""
    limit: asyncio.Timeout | None = None
    """Its timeout, already running: an executor that has to start a worker first stops it until the function begins."""

    def bound(self) -> Callable[[], Any]:
        """The function with its arguments, decoded and checked. Raises UnreadableCall."""
        try:
            args, kwargs = self.definition.decode(self.arguments)
            if self.definition.dependencies is not None:
                args, kwargs = self.definition.dependencies.joined(args, kwargs, self.injected)
        except (ValueError, TypeError, ArithmeticError, RecursionError, TaskArgumentError) as error:
            raise UnreadableCall(self.definition.name, error) from error
        return functools.partial(self.definition.function, *args, **kwargs)


class Executor(Protocol):
    kind: ExecutorKind
    slots: int
    """How many calls may run at once."""

    def start(self) -> None: ...

    async def run(self, call: Call) -> Any:
        """The function's result. Raises what it raised; CancelledError when the awaiting task is cancelled."""

    def close(self) -> None:
        """Lets go of the workers. Whatever still runs in a thread is abandoned to the end of the process."""

    async def wait_closed(self) -> None:
        """After `close`: returns when every worker that can be ended has ended."""


class AsyncExecutor:
    kind: ExecutorKind = "async"

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots or DEFAULT_ASYNC_SLOTS

    def start(self) -> None: ...

    async def run(self, call: Call) -> Any:
        return await call.bound()()

    def close(self) -> None: ...

    async def wait_closed(self) -> None: ...


class ThreadExecutor:
    """Runs each call in a daemon thread.

    Not `concurrent.futures`: its threads are joined at the interpreter's exit, so one task that hangs would keep the
    process from ever ending.
    """

    kind: ExecutorKind = "thread"

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots or DEFAULT_THREADS
        self._crew: Crew | None = None

    def start(self) -> None: ...

    async def run(self, call: Call) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        job = self.submit(call.bound(), contextvars.copy_context(), lambda job: job.settle(done), loop)
        try:
            return await done
        except asyncio.CancelledError:
            self.abandon(job)
            raise

    def submit(
        self,
        function: Callable[[], Any],
        context: contextvars.Context,
        deliver: Callable[[Job], None],
        loop: asyncio.AbstractEventLoop,
    ) -> Job:
        """Has a thread call the function in that context; `deliver` gets the job, on the event loop, once it ended."""
        if self._crew is None or self._crew.loop is not loop:
            self.close()
            self._crew = Crew(loop, self.slots)
        job = Job(function, context, deliver)
        self._crew.take(job)
        return job

    def abandon(self, job: Job) -> None:
        """What the job still brings is dropped, and its slot is free at once."""
        if not job.delivered:
            job.abandoned = True
            if self._crew is not None:
                self._crew.replace_one()

    def close(self) -> None:
        if self._crew is not None:
            self._crew.dismiss()
            self._crew = None

    async def wait_closed(self) -> None: ...


class Crew:
    """The threads that work for one event loop, started as they are needed.

    Only the event loop counts them; what a thread brings back after the loop has gone is nobody's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int) -> None:
        self.loop = loop
        self._most = most
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ended: deque[Job] = deque()
        self._told = False
        self._idle = 0
        self._threads = 0
        self._dismissed = False

    def take(self, job: Job) -> None:
        if self._idle:
            self._idle -= 1
        elif self._threads < self._most:
            self._threads += 1
            threading.Thread(target=self._work, name=f"taskflow-thread-{self._threads}", daemon=True).start()
        self._jobs.put(job)

    def replace_one(self) -> None:
        """A thread hangs in a job that nobody waits for: another one will serve its slot."""
        self._threads -= 1

    def dismiss(self) -> None:
        self._dismissed = True
        for _ in range(self._threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            self._ended.append(job)
            if not self._told:  # one wake-up of the event loop collects all that ended meanwhile
                self._told = True
                try:
                    self.loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the event loop is closed: nobody waits for results any more
                    return
            if self._dismissed:
                return
            del job  # an idle thread must not keep the last result alive

    def _deliver(self) -> None:
        self._told = False
        while self._ended:
            job = self._ended.popleft()
            if not job.abandoned:
                self._idle += 1
                job.delivered = True
                job.deliver(job)
            elif not self._dismissed:
                self._jobs.put(None)  # the thread that ran it is one more than are counted


@dataclass(slots=True, eq=False)
class Job:
    """One call on its way through a thread."""

    function: Callable[[], Any]
    context: contextvars.Context
    deliver: Callable[[Job], None]
    """Called on the event loop when the job has ended; must not raise."""
    abandoned: bool = False
    """Nobody waits for it: the result is dropped, and a function that has not begun never does."""
    delivered: bool = False
    result: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        if self.abandoned:
            return
        try:
            self.result = self.context.run(self.function)
        except BaseException as error:  # noqa: BLE001 - user code: SystemExit in a thread is that task's failure
            self.error = error

    def settle(self, done: asyncio.Future[Any]) -> None:
        if done.cancelled():
            return
        if self.error is None:
            done.set_result(self.result)
        else:
            done.set_exception(carried(self.error))


def carried(error: BaseException) -> BaseException:
    """The error in a form that futures and coroutines can carry: they use two of them for purposes of their own."""
    if not is_a(error, StopIteration) and not is_a(error, GeneratorExit):
        return error
    wrapped = RuntimeError(f"the task raised {type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped


def is_a(error: BaseException, kind: type[E]) -> TypeGuard[E]:
    """As an `except` clause sees it: asks the type only, because an error of user code may lie or raise."""
    return issubclass(type(error), kind)
