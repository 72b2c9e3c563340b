"""`background_tasks.add_task(...)`: tasks that a request brings, accepted before its response starts.

Owns the request's side. A dependency turns the request's own `BackgroundTasks` object into a `ManagedBackgroundTasks`
and puts it on FastAPI's stack of what is left after the route returned and before the first byte of the response; there
it waits for the commit. A route that raises drops its tasks, as FastAPI drops plain ones.

A websocket has no such moment: its tasks are accepted as they are added, and what it sends waits until they are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from datetime import datetime
from types import TracebackType
from typing import Any

from fastapi import BackgroundTasks, WebSocket
from starlette.requests import HTTPConnection
from starlette.types import Message

from .backends.base import Draft
from .errors import BackendUnavailable, TaskflowError
from .options import AddOptions
from .store import TaskStore

LEFT_AFTER_THE_ROUTE = "fastapi_function_astack"
"""Where FastAPI keeps the stack of a request's dependencies with `scope="function"`. One that yields costs each request
three times as much as being put there."""


UNSAID = (None,) * 7
"""The options of most calls."""


class ManagedBackgroundTasks(BackgroundTasks):
    """FastAPI's `BackgroundTasks`, whose `add_task` returns the id of a task that is stored, retried and shown.

    Made by the dependency only: it changes the class of the object that FastAPI made for the request, so that every
    way of asking for it gets the same one.
    """

    _store: TaskStore
    _loop: asyncio.AbstractEventLoop
    _traceparent: str | None
    _drafts: list[Draft] | None
    """What waits for the route's end; None once it has come."""
    _started: set[Future[None]]
    """What was not to wait, and is not known to be durable yet."""
    _talks: bool
    """True where there is no response for which tasks could wait: a websocket."""

    def add_task(  # type: ignore[override]
        self,
        func: Callable[..., Any],
        *args: Any,
        idempotency_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        eager: bool | None = None,
        priority: int | None = None,
        queue: str | None = None,
        delay_seconds: float | None = None,
        run_at: datetime | None = None,
        **kwargs: Any,
    ) -> str:
        """The id of a task that will be durable before the response starts.

        Raises TaskArgumentError when an argument cannot be stored or does not fit its annotation, QueueFullError when
        the queue has no place. An eager task is accepted and started now, while the route still runs.
        """
        if self._drafts is None:
            raise TaskflowError("add_task() after the response has started: use `await task_manager.enqueue(...)`")
        options = AddOptions(idempotency_key, tags, priority, queue, delay_seconds, run_at, self._traceparent)
        said_here = (eager, idempotency_key, tags, priority, queue, delay_seconds, run_at)
        if said_here != UNSAID and (theirs := self._store.parameters_named_as_options(func)):
            said = {**options._asdict(), "eager": eager}
            kwargs |= {name: said[name] for name in theirs if said[name] is not None}
            options = options._replace(**dict.fromkeys({*theirs} - {"eager"}))
            eager = None if "eager" in theirs else eager
        draft = self._store.draft(func, args, kwargs, options)
        if (refusal := self._store.refusal(draft, self._drafts)) is not None:
            self._keep(draft._replace(rejected_by=refusal.limit), self._drafts)
            raise refusal
        if eager if eager is not None else self._store.is_eager(func):
            self._start(draft)
        else:
            self._keep(draft, self._drafts)
        return draft.task_id

    def _keep(self, draft: Draft, drafts: list[Draft]) -> None:
        if self._talks:
            self._start(draft)
        else:
            drafts.append(draft)

    def _start(self, draft: Draft) -> None:
        started = asyncio.run_coroutine_threadsafe(self._store.accept([draft]), self._loop)
        self._started.add(started)
        started.add_done_callback(self._durable)

    def _durable(self, started: Future[None]) -> None:
        if not started.cancelled() and started.exception() is None:
            self._started.discard(started)

    async def settled(self) -> None:
        """Returns when all that was started is durable. Raises the first error of what could not be."""
        while started := tuple(self._started):
            waits = asyncio.gather(*map(asyncio.wrap_future, started), return_exceptions=True)
            outcomes = await asyncio.shield(waits)  # a sender that gives up takes no task back
            self._started.difference_update(started)
            for error in outcomes:
                if error is not None:
                    raise error

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        """The route has returned, or raised."""
        drafts, self._drafts = self._drafts or [], None
        if error is None:
            if self._started:
                await self.settled()
            if drafts:
                await self._store.accept(drafts)
            return
        self._store.forget(drafts)
        if refused := [draft for draft in drafts if draft.rejected_by is not None]:
            with contextlib.suppress(BackendUnavailable):  # the route's own error is the one to tell
                await self._store.accept(refused)


def speaks_when_durable(socket: WebSocket, settled: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """What the route sends may hold the id of any task that it added before."""
    send = socket.send

    async def send_after(message: Message) -> None:
        await settled()
        await send(message)

    socket.send = send_after  # type: ignore[method-assign]


def request_dependency(store: TaskStore) -> Callable[..., Any]:
    """The dependency that manages a request's tasks and returns them: for routers, and for `Depends(...)`."""

    async def get_tasks(connection: HTTPConnection, background_tasks: BackgroundTasks) -> ManagedBackgroundTasks:
        if isinstance(background_tasks, ManagedBackgroundTasks):
            if background_tasks._store is store:
                return background_tasks
            background_tasks = BackgroundTasks()  # the request's own is another task manager's
        background_tasks.__class__ = ManagedBackgroundTasks
        assert isinstance(background_tasks, ManagedBackgroundTasks)
        tasks = background_tasks
        tasks._store = store
        tasks._loop = asyncio.get_running_loop()
        tasks._traceparent = connection.headers.get("traceparent")
        tasks._drafts = []
        tasks._started = set()
        tasks._talks = isinstance(connection, WebSocket)
        if isinstance(connection, WebSocket):
            speaks_when_durable(connection, tasks.settled)
        connection.scope[LEFT_AFTER_THE_ROUTE].push_async_exit(tasks)
        return tasks

    return get_tasks
