"""Where user code runs: on the event loop, in a thread, or in a process.

Owns the workers and the way a call gets to them and comes back. An executor returns what the function returned and
raises what it raised; it decides nothing about the task.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .models import ExecutorKind

DEFAULT_ASYNC_SLOTS = 500
DEFAULT_THREADS = 40
"""As many as Starlette gives to plain `def` routes."""


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
        jobs = self._jobs
        while (job := jobs.get()) is not None:
            result, error = job.run()
            try:
                job.loop.call_soon_threadsafe(self._deliver, job.done, result, error)
            except RuntimeError:  # the event loop is closed: nobody waits for this result any more
                return
            if job.abandoned:
                return
            del job, result, error  # an idle thread must not keep the last result alive

    def _deliver(self, done: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        if done.done():  # its task was cancelled meanwhile
            return
        self._idle += 1
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)


@dataclass(slots=True, eq=False)
class Job:
    call: Call
    context: contextvars.Context
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Any]
    abandoned: bool = False
    """Its task was cancelled: the result is dropped."""

    def run(self) -> tuple[Any, BaseException | None]:
        try:
            return self.context.run(self.call.function, *self.call.args, **self.call.kwargs), None
        except StopIteration as error:  # a future cannot carry it
            failure = RuntimeError("the task raised StopIteration")
            failure.__cause__ = error
            return None, failure
        except BaseException as error:  # noqa: BLE001 - user code: SystemExit in a thread is that task's failure
            return None, error
