"""The process executor on a Dask cluster: where `executor="process"` runs once `cluster=` names a scheduler.

Owns the client, and the way of one attempt's call to the cluster and back. The invariant: a call begins once. Dask runs
what a dead worker had begun again; here the scheduler is asked first, and says that somebody had. What crosses is what
crosses to a worker process (`process_worker.py`): the codec's text; nothing that was stored is unpickled. Dask is
looked up when it is needed, because few projects have it.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from time import monotonic
from typing import Any

from .context import TaskContext, current
from .errors import TaskDefinitionError, WorkerLost
from .executors import Call
from .loops import until
from .models import ExecutorKind
from .process_worker import Began, Raised, Request, Returned, answer
from .processes import request_of, value_of
from .registry import TaskRegistry

logger = logging.getLogger("taskflow")

DEFAULT_CALLS = 64
"""At once; the cluster lines up what it has no room for."""
CONNECT_TIMEOUT, CONNECT_PAUSE = 5.0, 1.0
LAST_WORDS = 2.0
"""Seconds that log lines have which set out before the result."""
LOOK_INTERVAL = 0.25
"""Seconds after which a call on the cluster notices that nobody waits for it any more."""
LOST = "lost"
BEGIN = "taskflow_begin"


def dask() -> Any:
    """Raises TaskDefinitionError where it is not installed."""
    try:
        return import_module("distributed")
    except ModuleNotFoundError as error:
        raise TaskDefinitionError("cluster: the package `distributed` is not installed: uv add distributed") from error


@dataclass(slots=True, eq=False)
class Job:
    """A call that is away, and what was heard of it."""

    context: TaskContext
    began: asyncio.Event = field(default_factory=asyncio.Event)
    words: int = 0
    """Log lines and progress."""

    def said(self, words: int) -> bool:
        """Whether as many were heard as were sent."""
        return self.words >= words


class ClusterExecutor:
    kind: ExecutorKind = "process"

    def __init__(self, address: str, slots: int | None = None) -> None:
        """`address`: of the scheduler. Raises TaskDefinitionError."""
        dask()
        self.slots = slots or DEFAULT_CALLS
        self._address = address
        self._client: Any = None
        self._connecting = asyncio.Lock()
        self._topic = f"taskflow-{uuid.uuid4()}"
        self._jobs: dict[str, Job] = {}
        self._away = False

    def start(self) -> None:
        self._client, self._connecting = None, asyncio.Lock()

    async def run(self, call: Call) -> Any:
        """The function's result. Raises what it raised, and WorkerLost when the cluster lost it once it had begun;
        until then it waits, as long as the cluster is away."""
        key = f"{call.context.task_id}-{call.context.attempt}"
        job = self._jobs[key] = Job(call.context)
        call.hold()
        try:
            reply = await self._reply(request_of(call), key, job, call)
        finally:
            del self._jobs[key]
        if reply is None:
            raise WorkerLost(None, began=True)
        return value_of(reply, call.context)

    async def _reply(self, request: Request, key: str, job: Job, call: Call) -> Returned | Raised | None:
        while True:
            client = await self._connected()
            future = client.submit(perform, tuple(request), self._topic, key, key=key, pure=False, retries=0)
            timer = asyncio.create_task(self._time(job, call))
            try:
                kind, words, *parts = await future
            except asyncio.CancelledError:
                with suppress(Exception):
                    await asyncio.shield(client.cancel([future]))
                raise
            except Exception as error:
                if job.began.is_set():
                    raise WorkerLost(None, began=True) from error
                await self._let_go(client, error)
                continue
            finally:
                timer.cancel()
                future.release()
            await until(partial(job.said, words), monotonic() + LAST_WORDS)
            return Returned(*parts) if kind == "returned" else Raised(*parts) if kind == "raised" else None

    async def _time(self, job: Job, call: Call) -> None:
        await job.began.wait()
        call.begin()

    async def _connected(self) -> Any:
        """A client; tried until there is one."""
        async with self._connecting:
            while self._client is None:
                try:
                    client = await dask().Client(
                        self._address, asynchronous=True, set_as_default=False, timeout=CONNECT_TIMEOUT
                    )
                    client.subscribe_topic(self._topic, self._hear)
                    await client.register_plugin(begin_once(), name=BEGIN)
                    self._client, self._away = client, False
                except (OSError, TimeoutError) as error:
                    self._report(error)
                    await asyncio.sleep(CONNECT_PAUSE)
            return self._client

    async def _let_go(self, client: Any, error: Exception) -> None:
        self._report(error)
        if self._client is client:
            self._client = None
            with suppress(Exception):
                await client.close(timeout=1)
        await asyncio.sleep(CONNECT_PAUSE)

    def _report(self, error: Exception) -> None:
        if not self._away:  # once an outage
            logger.error("the cluster %s is away (%s): its tasks wait", self._address, error)
        self._away = True

    def _hear(self, event: tuple[float, Any]) -> None:
        key, kind, *parts = event[1]
        job = self._jobs.get(key)
        match kind, parts:
            case _ if job is None:
                return
            case "Began", _:
                job.began.set()
            case "Said", (level, message, extra):
                job.words += 1
                job.context.sink.log(job.context, level, message, json.loads(extra))
            case "Progressed", (value,):
                job.words += 1
                job.context.sink.progress(job.context, value)

    def close(self) -> None: ...

    async def wait_closed(self, deadline: float) -> None:
        client, self._client = self._client, None
        if client is not None:
            with suppress(Exception):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + 2):
                    await client.close(timeout=1)


# -- on the cluster


REGISTRY = TaskRegistry()
"""Of a worker of the cluster: the tasks that it was asked for."""


def begin_once() -> Any:
    """What the scheduler is asked before a call begins. A class of a function crosses with its code, so that the
    scheduler needs none of ours."""
    name = BEGIN

    class BeginOnce(dask().SchedulerPlugin):  # type: ignore[misc]
        idempotent = True  # the first one stays, whoever comes later

        def __init__(self) -> None:
            self.begun: set[str] = set()

        async def start(self, scheduler: Any) -> None:
            self.scheduler = scheduler
            scheduler.handlers[name] = self.begin

        def begin(self, key: str, topic: str) -> bool:
            """Whether nobody has begun it; whoever waits for it is told that it begins."""
            if key in self.begun:
                return False
            self.begun.add(key)
            self.scheduler.log_event(topic, [key, "Began"])
            return True

        def transition(self, key: str, start: str, finish: str, *_: Any, **__: Any) -> None:
            if finish == "forgotten":
                self.begun.discard(key)

    return BeginOnce()


def perform(request: tuple[Any, ...], topic: str, key: str) -> tuple[Any, ...]:
    """What a worker of the cluster does: "returned" or "raised", with how many words it sent and what came of it; LOST
    where another one had begun."""
    worker = dask().get_worker()
    if not import_module("distributed.utils").sync(worker.loop, getattr(worker.scheduler, BEGIN), key=key, topic=topic):
        return (LOST, 0)
    said = Said(worker, topic, key)
    try:
        reply = contextvars.copy_context().run(answer, Request(*request), said, REGISTRY)
    finally:
        said.ended.set()
    return ("returned" if isinstance(reply, Returned) else "raised", said.words, *reply)


class Said:
    """Takes what a call says, as the pipe of a worker process does, and sends it as the cluster's events."""

    def __init__(self, worker: Any, topic: str, key: str) -> None:
        self._worker, self._topic, self._key = worker, topic, key
        self.ended = threading.Event()
        self.words = 0

    def send(self, message: Any) -> None:
        if isinstance(message, Began):
            threading.Thread(target=self._watch, args=(current.get(),), daemon=True).start()
            return
        self.words += 1
        parts = [dict(part) if isinstance(part, Mapping) else part for part in message]
        self._worker.log_event(self._topic, [self._key, type(message).__name__, *parts])

    def _watch(self, context: TaskContext) -> None:
        """A call that was cancelled, or timed out, is told so; nothing can end it."""
        while not self.ended.wait(LOOK_INTERVAL):
            known = self._worker.state.tasks.get(self._key)
            if known is None or known.state in ("cancelled", "released", "forgotten"):
                context.cancelled = True
                return
