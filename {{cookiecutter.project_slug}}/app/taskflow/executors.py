"""Where user code runs: on the event loop, in a thread, or in a process.

Owns the workers and the way a call gets to them and comes back. An executor returns what the function returned and
raises what it raised; it decides nothing about the task.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .models import ExecutorKind

DEFAULT_ASYNC_SLOTS = 1_000
DEFAULT_THREADS = 100
"""Threads start when they are needed; they mostly wait for somebody else's server."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a task function, ready to run."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Executor(Protocol):
    kind: ExecutorKind
    slots: int
    """How many calls may run at once."""

    def start(self) -> None: ...

    async def run(self, call: Call) -> Any:
        """The function's result. Raises what it raised; CancelledError when the awaiting task is cancelled."""

    def close(self) -> None:
        """Lets go of the workers. Whatever still runs in a thread is abandoned to the end of the process."""


class AsyncExecutor:
    kind: ExecutorKind = "async"

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots or DEFAULT_ASYNC_SLOTS

    def start(self) -> None: ...

    async def run(self, call: Call) -> Any:
        return await call.function(*call.args, **call.kwargs)

    def close(self) -> None: ...


class ThreadExecutor:
    """A pool of daemon threads, started as they are needed.

    Not `concurrent.futures`: its threads are joined at the interpreter's exit, so one task that hangs would keep the
    process from ever ending.
    """

    kind: ExecutorKind = "thread"

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots or DEFAULT_THREADS
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ended: deque[Job] = deque()
        self._told = False
        self._idle = 0
        self._threads = 0

    def start(self) -> None: ...

    async def run(self, call: Call) -> Any:
        loop = asyncio.get_running_loop()
        job = Job(call, contextvars.copy_context(), loop, loop.create_future())
        if self._idle:
            self._idle -= 1
        elif self._threads < self.slots:
            self._threads += 1
            threading.Thread(target=self._work, name=f"taskflow-thread-{self._threads}", daemon=True).start()
        self._jobs.put(job)
        try:
            return await job.done
        except asyncio.CancelledError:
            job.abandoned = True
            self._threads -= 1  # its slot is free again: the thread that is stuck in it ends after this call
            raise

    def close(self) -> None:
        for _ in range(self._threads):
            self._jobs.put(None)
        self._jobs = queue.SimpleQueue()
        self._idle = self._threads = 0

    def _work(self) -> None:
        jobs, ended = self._jobs, self._ended
        while (job := jobs.get()) is not None:
            job.run()
            ended.append(job)
            if not self._told:  # one wake-up of the event loop collects all that ended meanwhile
                self._told = True
                try:
                    job.loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the event loop is closed: nobody waits for results any more
                    return
            if job.abandoned:
                return
            del job  # an idle thread must not keep the last result alive

    def _deliver(self) -> None:
        self._told = False
        while self._ended:
            job = self._ended.popleft()
            if not job.done.done():  # else its task was cancelled meanwhile
                self._idle += 1
                job.settle()


@dataclass(slots=True, eq=False)
class Job:
    call: Call
    context: contextvars.Context
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Any]
    abandoned: bool = False
    """Its task was cancelled: the result is dropped."""

    result: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.context.run(self.call.function, *self.call.args, **self.call.kwargs)
        except StopIteration as error:  # a future cannot carry it
            self.error = RuntimeError("the task raised StopIteration")
            self.error.__cause__ = error
        except BaseException as error:  # noqa: BLE001 - user code: SystemExit in a thread is that task's failure
            self.error = error

    def settle(self) -> None:
        if self.error is None:
            self.done.set_result(self.result)
        else:
            self.done.set_exception(self.error)
