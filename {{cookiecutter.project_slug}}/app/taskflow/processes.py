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
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from time import monotonic
from typing import Any, NamedTuple

from . import codec
from .context import TaskContext
from .errors import TaskflowError, WorkerError, WorkerLost
from .executors import Call
from .models import ExecutorKind
from .process_worker import Began, Progressed, Raised, Request, Returned, Said, work
from .registry import TaskFunction, where

START_TIME = 120.0
"""Seconds in which a worker must have imported the task's module. A task's own timeout counts from there."""
BURIAL_TIME = 1.0
"""Seconds that a worker which closed its pipe has to end by itself."""
WORKER_NAME = "taskflow-worker"

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
        job, reply = await self._ask(self._idle.pop() if self._idle else self._hire(), request, call)
        if isinstance(reply, Lost) and not job.began.done():
            # it may have died while it waited: a new worker runs what the old one never began
            job, reply = await self._ask(self._hire(), request, call)
        match reply:
            case Returned(text):
                return None if text is None else codec.decode(text)
            case Raised():
                raise rebuilt(reply) from WorkerTraceback(reply.trace)
            case Lost(exit_code):
                raise WorkerLost(exit_code, began=job.began.done())

    def close(self) -> None:
        """Ends the workers: idle ones have `shutdown_timeout` seconds to leave, others are killed."""
        atexit.unregister(self._abandon)
        for worker in self._workers:
            worker.dismiss() if worker in self._idle else worker.kill()
        self._idle.clear()

    async def wait_closed(self) -> None:
        while any(worker.alive for worker in self._workers):
            await asyncio.sleep(0.01)
        self._workers.clear()

    async def _ask(self, worker: Worker, request: Request, call: Call) -> tuple[Job, Reply]:
        loop = asyncio.get_running_loop()
        job = Job(request, call.context, loop, loop.create_future(), loop.create_future())
        worker.take(job)
        try:
            await self._begun(job, call)
            reply = await job.reply
        except BaseException:
            worker.kill()
            raise
        if not isinstance(reply, Lost):
            self._idle.append(worker)
        return job, reply

    async def _begun(self, job: Job, call: Call) -> None:
        """Returns when the function begins, or never will. Until then the task's own time does not run."""
        if call.limit is not None:
            call.limit.reschedule(None)
        try:
            async with asyncio.timeout(START_TIME):
                await asyncio.wait((job.began, job.reply), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise TaskflowError(f"its worker process was not ready after {START_TIME:g} s") from None
        if call.limit is not None:
            call.limit.reschedule(job.loop.time() + (call.definition.config.timeout or 0.0))

    def _hire(self) -> Worker:
        self._workers = [worker for worker in self._workers if worker.alive]
        if not self._workers:
            atexit.register(self._abandon)
        worker = Worker(self._shutdown_timeout)
        self._workers.append(worker)
        return worker

    def _abandon(self) -> None:
        """At the exit of an interpreter that did not close this executor: multiprocessing would wait for the workers."""
        for worker in self._workers:
            worker.kill()
