"""The list of tasks: what matches a search, newest first."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from ...errors import TaskNotFound, TaskStateError
from ...models import RETRYABLE, Count, TaskStatus
from ...store import Act, TaskStore
from .. import views
from ..auth import actor_of
from ..html import fields_of
from ..saved import saved_views
from .bulk import act_of
from .desk import Desk, cursor_of

PAGE_SIZE = 50


def add_routes(router: APIRouter, desk: Desk) -> None:
    store = desk.store

    @router.get("/dashboard/tasks")
    @desk.live
    async def task_list(
        request: Request, q: Annotated[str, Query()] = "", before: Annotated[str | None, Query()] = None
    ) -> Response:
        now = desk.now()
        search, cursor = views.parse_search(q, now), cursor_of(before)
        counts, page = await asyncio.gather(store.counts(), store.page(search.filter(now), cursor, PAGE_SIZE))
        return desk.renderer.page(
            request,
            "tasks.html",
            now=now,
            search=search,
            typed=q,
            saved=saved_views(request),
            chips=chips(search, counts),
            tasks=page.tasks,
            older=page.older,
            newest=before is None,
            any_tasks=any(count.n for count in counts),
            knows=store.knows,
            acts=() if search.problems else acts(search),
        )

    @router.post("/dashboard/tasks/act")
    async def act(request: Request) -> Response:
        """What was ticked."""
        fields = await fields_of(request)
        form, ids = dict(fields), [value for name, value in fields if name == "id"]
        what, actor = act_of(form.get("act", "")), actor_of(request)
        if what is Act.RETRY:
            await store.retry_many(ids, actor)
        else:
            await asyncio.gather(*(one_of_many(store, what, task_id, actor) for task_id in ids))
        return desk.go_to(request, "/tasks", **({"q": form["q"]} if form.get("q") else {}))


async def one_of_many(store: TaskStore, act: Act, task_id: str, actor: str) -> None:
    """Those whose state does not allow it, or that are gone, stay as they are."""
    with contextlib.suppress(TaskNotFound, TaskStateError):
        if act is Act.CANCEL:
            await store.cancel(task_id, actor)
        elif act is Act.DISMISS:
            await store.dismiss(task_id, "ticked in the list of tasks", actor)
        else:
            await store.restore(task_id, actor)


def acts(search: views.Search) -> tuple[Act, ...]:
    """What can be done to tasks of the statuses that are searched for."""
    if search.dismissed:
        return (Act.RETRY, Act.RESTORE)
    live = {TaskStatus.PENDING, TaskStatus.RUNNING}
    found = set(search.statuses) or ({TaskStatus.FAILED} if search.group else set(TaskStatus))
    offered = {Act.RETRY: RETRYABLE, Act.CANCEL: live, Act.DISMISS: {TaskStatus.FAILED}}
    return tuple(act for act, statuses in offered.items() if found & statuses)


@dataclass(frozen=True, slots=True)
class Chip:
    status: TaskStatus
    n: int | None
    """None where the search asks for more than counts can tell."""
    chosen: bool
    query: str


def chips(search: views.Search, counts: Iterable[Count]) -> list[Chip]:
    n: Counter[TaskStatus] = Counter()
    for count in counts:
        if search.name in (None, count.name) and search.queue in (None, count.queue):
            n[count.status] += count.n
    by_counts = views.Search(search.statuses, search.name, search.queue)
    countable = replace(search, problems=()) == by_counts
    return [
        Chip(status, n[status] if countable else None, status in search.statuses, str(search.toggled(status)))
        for status in TaskStatus
    ]
