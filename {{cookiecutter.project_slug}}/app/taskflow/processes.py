"""The process executor: user code in worker processes that are started when needed, kept, and killed when it must end.

Owns the workers from their start to their end; the runner calls `run`, the dispatcher `close`. The invariant: a worker
serves one call at a time, and one that was cancelled, timed out or died is never used again. Arguments and
results cross as the codec's text; nothing that was stored is ever unpickled.

Workers are spawned, never forked: a fork would copy locks of other threads and connections of the event loop. Each one
has a thread here that starts it, speaks with it and buries it. It has to be one thread from start to end, because Linux
takes the end of the thread that started a process for the death of its parent.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, fields
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from time import monotonic, sleep
from typing import Any, NamedTuple

from . import codec
from .context import TaskContext
from .dependencies import where
from .errors import TaskflowError, WorkerError, WorkerLost
from .executors import Call
from .loops import until
from .models import ExecutorKind
from .process_worker import Began, Progressed, Raised, Request, Returned, Said, hold_signals, work
from .registry import TaskFunction
from .telemetry import current_traceparent

START_TIME = 120.0
"""Seconds in which a worker must have imported the task's module. A task's own timeout counts from there."""
BURIAL_TIME = 1.0
"""Seconds that a worker which closed its pipe has to end by itself."""
WORKER_NAME = "taskflow-worker"

logger = logging.getLogger("taskflow")

SPAWN = multiprocessing.get_context("spawn")
_numbers = itertools.count(1)


class Lost(NamedTuple):
    """What came instead of a reply: the worker ended."""

    exit_code: int | None


Reply = Returned | Raised | Lost


class ProcessExecutor:
    kind: ExecutorKind = "process"

    def __init__(self, slots: int | None = None, shutdown_timeout: float = 30.0) -> None:
        self.slots = slots or os.cpu_count() or 1
        self._shutdown_timeout = shutdown_timeout
        self._idle: list[Worker] = []
        self._workers: list[Worker] = []

    def start(self) -> None: ...

    async def run(self, call: Call) -> Any:
        """The function's result. Raises what it raised, with the worker's traceback as the cause; WorkerLost when its
        worker died; WorkerError for an exception that could not be brought here."""
        request = request_of(call)
        kept = self._idle.pop() if self._idle else None
        reply, began = await self._ask(kept or self._hire(), request, call)
        if isinstance(reply, Lost) and kept and not began:  # died while it was idle: a new one runs what it did not
            reply, began = await self._ask(self._hire(), request, call)
        if isinstance(reply, Lost):
            raise WorkerLost(reply.exit_code, began=began)
        return value_of(reply, call.context)

    def close(self) -> None:
        """Ends the workers: idle ones have `shutdown_timeout` seconds to leave, others are killed."""
        atexit.unregister(self._abandon)
        for worker in self._workers:
            worker.dismiss() if worker in self._idle else worker.kill()
        self._idle.clear()

    async def wait_closed(self, deadline: float) -> None:
        await until(self._all_buried, deadline)
        self._abandon()
        await until(self._all_buried, monotonic() + BURIAL_TIME)
        self._workers.clear()

    def _all_buried(self) -> bool:
        return not any(worker.alive for worker in self._workers)

    async def _ask(self, worker: Worker, request: Request, call: Call) -> tuple[Reply, bool]:
        """What came of the request, and whether the function began."""
        loop = asyncio.get_running_loop()
        job = Job(request, call.context, loop, loop.create_future(), loop.create_future())
        worker.take(job)
        try:
            began = await self._begun(job, call)
            reply = await job.reply
        except BaseException:
            worker.kill()
            raise
        if not isinstance(reply, Lost):
            self._idle.append(worker)
        return reply, began

    async def _begun(self, job: Job, call: Call) -> bool:
        """Whether the function began. Until then the task's own time does not run."""
        call.hold()
        try:
            async with asyncio.timeout(START_TIME):
                began = await job.began
        except TimeoutError:
            raise TaskflowError(f"its worker process was not ready after {START_TIME:g} s") from None
        call.begin()
        return began

    def _hire(self) -> Worker:
        self._workers = [worker for worker in self._workers if worker.alive]
        if not self._workers:
            atexit.register(self._abandon)
        worker = Worker(self._shutdown_timeout)
        self._workers.append(worker)
        return worker

    def _abandon(self) -> None:
        """At the exit of an interpreter that did not close this: multiprocessing would wait for the workers."""
        for worker in self._workers:
            worker.kill()


class Worker:
    """One process, and the thread of this one that starts it, speaks with it and buries it."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._owner = os.getpid()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._doomed = False
        self._process: SpawnProcess | None = None
        name = f"{WORKER_NAME}-{next(_numbers)}"
        self._thread = threading.Thread(target=self._live, args=(name,), name=name, daemon=True)
        self._thread.start()

    # -- from the event loop

    @property
    def alive(self) -> bool:
        """Until its process is buried."""
        return self._thread.is_alive()

    def take(self, job: Job) -> None:
        self._jobs.put(job)

    def dismiss(self) -> None:
        """Lets it leave by itself."""
        self._jobs.put(None)

    def kill(self) -> None:
        """Ends it now, and what its task started. Its slot is free at once."""
        if os.getpid() != self._owner:  # in a process that was forked from ours, whose workers they are not
            return
        with self._guard:
            self._doomed = True
            if self._process is not None:
                kill_group(self._process)
        self.dismiss()

    # -- its thread

    def _live(self, name: str) -> None:
        if sys.platform != "win32":
            resource_tracker.ensure_running()  # else the first start does, which lets signals through again
        hold_signals()  # a Ctrl-C must not end the new process in the middle of its imports
        job = self._jobs.get()
        try:
            with self._started(name) as pipe:
                while job is not None:
                    job.settle(converse(pipe, job))
                    job = None  # an idle worker must not keep the last result alive
                    job = self._jobs.get()
        except (EOFError, OSError) as error:
            if self._process is None:
                logger.error("a worker process could not be started: %s", error)
        finally:
            exit_code = self._buried(self._patience if job is None else BURIAL_TIME)
            if job is not None:
                job.settle(Lost(exit_code))

    def _started(self, name: str) -> Connection:
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=work, args=(theirs, os.getpid()), name=name, daemon=False)
        with theirs:
            process.start()
        with self._guard:
            self._process = process
            if self._doomed:
                kill_group(process)
        return ours

    def _buried(self, patience: float) -> int | None:
        """The exit code, after at most `patience` seconds; None where it cannot be known."""
        process = self._process
        if process is None:
            return None
        wait([process.sentinel], patience)
        with self._guard:
            self._process = None
            kill_group(process)  # before it is reaped, while its number cannot be another's
        process.join()
        deadline = monotonic() + BURIAL_TIME
        while (exit_code := process.exitcode) is None and monotonic() < deadline:
            sleep(0.001)  # another thread that starts a process is just reaping it
        if exit_code is not None:
            process.close()
        return exit_code


@dataclass(slots=True, eq=False)
class Job:
    request: Request
    context: TaskContext
    loop: asyncio.AbstractEventLoop
    began: asyncio.Future[bool]
    reply: asyncio.Future[Reply]

    def begin(self) -> None:
        self._soon(self.began, True)

    def settle(self, reply: Reply) -> None:
        self._soon(self.began, False)
        self._soon(self.reply, reply)

    def _soon(self, future: asyncio.Future[Any], value: object) -> None:
        with suppress(RuntimeError):  # the event loop is closed: nobody waits for results any more
            self.loop.call_soon_threadsafe(settle, future, value)


def settle(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def converse(pipe: Connection, job: Job) -> Returned | Raised:
    """One call from request to reply. Raises EOFError or OSError when the worker is gone."""
    pipe.send(job.request)
    while True:
        match pipe.recv():
            case Began():
                job.begin()
            case Said(level, message, extra):
                job.context.sink.log(job.context, level, message, json.loads(extra))
            case Progressed(value):
                job.context.sink.progress(job.context, value)
            case Returned() | Raised() as reply:
                return reply


def request_of(call: Call) -> Request:
    definition, function = call.definition, call.definition.function
    context = {field.name: getattr(call.context, field.name) for field in fields(TaskContext) if field.name != "sink"}
    context["tags"] = dict(call.context.tags)
    return Request(
        function.__module__,
        function.__qualname__,
        layers(function),
        definition.name,
        call.arguments,
        context,
        current_traceparent(),
    )


def layers(function: TaskFunction) -> int:
    """How many decorators lie on top of the task in its module. Raises TaskflowError when it is not there at all."""
    found = getattr(sys.modules.get(function.__module__), function.__qualname__, None)
    for depth in itertools.count():
        if found is function:
            return depth
        if found is None:
            break
        found = getattr(found, "__wrapped__", None)
    raise TaskflowError(
        f"{where(function)} is not what that name stands for in its module: a worker process could not find it"
    )


def value_of(reply: Returned | Raised, context: TaskContext) -> Any:
    """What the function returned. Raises what it raised, with the worker's traceback as the cause."""
    if isinstance(reply, Raised):
        raise rebuilt(reply) from WorkerTraceback(reply.trace)
    return None if reply.result is None else result_of(reply.result, context)


def result_of(text: str, context: TaskContext) -> Any:
    """What the worker encoded; None, with a word in the task's log, for what does not come back: the task succeeded."""
    try:
        return codec.decode(text)
    except (ValueError, TypeError, ArithmeticError) as error:
        context.sink.log(context, "warning", f"the result was not stored: {error}", {})
        return None


def rebuilt(reply: Raised) -> BaseException:
    """The exception that the worker sent; a stand-in where it cannot be had here."""
    if reply.pickled is not None:
        try:
            error = pickle.loads(reply.pickled)
        except BaseException:  # noqa: BLE001 - user code: __reduce__, __init__
            error = None
        if isinstance(error, BaseException):
            return error
    return WorkerError(reply.kind, reply.text)


class WorkerTraceback(Exception):
    """The traceback of an exception that came out of a worker process."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(f"in a worker process\n{text.rstrip()}")


def kill_group(process: SpawnProcess) -> None:
    if sys.platform != "win32":
        with suppress(OSError):  # it has no group of its own yet, or nobody is left in it
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
            return
    process.kill()


def refuse_in_starting_worker() -> None:
    """Raises TaskflowError where a worker process imports a main module that starts its service right away."""
    me = multiprocessing.current_process()
    if me.name.startswith(WORKER_NAME) and multiprocessing.parent_process() is None:
        raise TaskflowError(
            "a worker process imports the main module again, and that starts the service: "
            'put what starts it below `if __name__ == "__main__":`'
        )
