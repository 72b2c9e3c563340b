"""The list of tasks: what matches a search, newest first."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from ...models import Count, TaskStatus
from .. import views
from .desk import Desk, cursor_of

PAGE_SIZE = 50


def add_routes(router: APIRouter, desk: Desk) -> None:
    store = desk.store

    @router.get("/dashboard/tasks")
    async def task_list(
        request: Request, q: Annotated[str, Query()] = "", before: Annotated[str | None, Query()] = None
    ) -> Response:
        now = desk.now()
        search, cursor = views.parse_search(q, now), cursor_of(before)
        seq = await desk.feed.head()
        counts, page = await asyncio.gather(store.counts(), store.page(search.filter(now), cursor, PAGE_SIZE))
        return desk.renderer.page(
            request,
            "tasks.html",
            seq=seq,
            now=now,
            search=search,
            typed=q,
            chips=chips(search, counts),
            tasks=page.tasks,
            older=page.older,
            newest=before is None,
            any_tasks=any(count.n for count in counts),
            knows=store.knows,
        )


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
    countable = not (search.words or search.tags or search.source or search.since or search.until)
    return [
        Chip(status, n[status] if countable else None, status in search.statuses, str(search.toggled(status)))
        for status in TaskStatus
    ]
