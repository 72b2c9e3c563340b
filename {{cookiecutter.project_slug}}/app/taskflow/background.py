"""`background_tasks.add_task(...)`: tasks that a request brings, accepted before its response starts.

Owns the request's side. A dependency with `scope="function"` turns the request's own `BackgroundTasks` object into a
`ManagedBackgroundTasks`; FastAPI resumes it after the route returned and before the first byte of the response, and
there it waits for the commit. A route that raises drops its tasks, as FastAPI drops plain ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from datetime import datetime
from typing import Any

from fastapi import BackgroundTasks, Depends
from starlette.requests import HTTPConnection

from .backends.base import Draft
from .errors import BackendUnavailable, TaskflowError
from .store import AddOptions, TaskStore


class ManagedBackgroundTasks(BackgroundTasks):
    """FastAPI's `BackgroundTasks`, whose `add_task` returns the id of a task that is stored, retried and shown.

    Made by the dependency only: it changes the class of the object that FastAPI made for the request, so that every
    way of asking for it gets the same one.
    """

    _store: TaskStore
    _loop: asyncio.AbstractEventLoop
    _traceparent: str | None
    _drafts: list[Draft] | None
    _started: list[Future[None]]

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
        draft = self._store.draft(func, args, kwargs, options)
        if (refusal := self._store.refusal(draft, self._drafts)) is not None:
            self._drafts.append(draft._replace(rejected_by=refusal.limit))
            raise refusal
        if eager if eager is not None else self._store.is_eager(func):
            self._started.append(asyncio.run_coroutine_threadsafe(self._store.accept([draft]), self._loop))
        else:
            self._drafts.append(draft)
        return draft.task_id


def request_dependencies(store: TaskStore) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The dependency that accepts a request's tasks, and one that returns them: for routers, and for `Depends(...)`."""

    async def accept_tasks(
        request: HTTPConnection, background_tasks: BackgroundTasks
    ) -> AsyncIterator[ManagedBackgroundTasks]:
        background_tasks.__class__ = ManagedBackgroundTasks
        assert isinstance(background_tasks, ManagedBackgroundTasks)
        tasks = background_tasks
        tasks._store = store
        tasks._loop = asyncio.get_running_loop()
        tasks._traceparent = request.headers.get("traceparent")
        tasks._started = []
        drafts: list[Draft] = []
        tasks._drafts = drafts
        try:
            yield tasks
        except BaseException:
            tasks._drafts = None
            if refused := [draft for draft in drafts if draft.rejected_by is not None]:
                with contextlib.suppress(BackendUnavailable):  # the route's own error is the one to tell
                    await store.accept(refused)
            raise
        tasks._drafts = None
        for started in tasks._started:
            await asyncio.wrap_future(started)
        if drafts:
            await store.accept(drafts)

    async def get_tasks(tasks: Any = Depends(accept_tasks, scope="function")) -> ManagedBackgroundTasks:
        assert isinstance(tasks, ManagedBackgroundTasks)
        return tasks

    return accept_tasks, get_tasks
