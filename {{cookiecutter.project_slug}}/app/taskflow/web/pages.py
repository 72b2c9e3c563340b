"""The dashboard's pages: an overview, the list of tasks, one task.

Owns their routes and what each page needs to know; `views.py` and `charts.py` turn it into words and points, templates
into HTML. A page asks the same store as the API. What changes is told by the stream; a page then asks for itself and
the browser keeps what is the same, so that there is one way to make every part of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import RedirectResponse, Response

from ..housekeeping import LEASE_SECONDS
from ..models import Count, Cursor, LogEntry, TaskFilter, TaskRecord, TaskStatus, utc_now
from . import charts, records, views
from .api import checked_id
from .auth import actor_of
from .html import HEADERS, PREFERENCES, THEMES, Preferences, Renderer, form_of, page_route
from .login import own_page
from .site import Site
from .stream import Feed

PAGE_SIZE = 50
NEWEST = 10
"""Tasks that the overview lists."""
SAMPLE = 240
"""Newest tasks that the overview draws."""
FAILURES = 50
"""Newest failures that the overview groups."""
MOST_PROBLEMS = 5
MOST_FUNCTIONS = 8
MOST_LOG_LINES = 500
"""Log lines that a page shows at once; the rest follows line by line, or from the API."""
A_YEAR = 365 * 86_400


def pages_router(site: Site, feed: Feed, renderer: Renderer) -> APIRouter:
    router = APIRouter(route_class=page_route(renderer), include_in_schema=False)
    store = site.manager.store

    @router.get("/dashboard")
    async def overview(request: Request) -> Response:
        seq = await feed.head()
        counts, newest, failed, instances = await asyncio.gather(
            store.counts(),
            store.page(TaskFilter(), None, SAMPLE),
            store.page(TaskFilter(statuses=(TaskStatus.FAILED, TaskStatus.INTERRUPTED)), None, FAILURES),
            store.instances(),
        )
        now = utc_now()
        alive = [item for item in instances if now - item.heartbeat < timedelta(seconds=LEASE_SECONDS)]
        return renderer.page(
            request,
            "overview.html",
            seq=seq,
            now=now,
            unready=site.manager.unready(),
            instances=alive,
            slots=sum(item.slots for item in alive),
            tiles=tiles(counts),
            running=sum(count.n for count in counts if count.status is TaskStatus.RUNNING),
            ended=sum(count.n for count in counts if count.status.terminal),
            activity=charts.activity(newest.tasks, now, width=720, height=96, bars=48),
            tasks=newest.tasks[:NEWEST],
            knows=store.knows,
            problems=views.problems(failed.tasks, MOST_PROBLEMS),
            failures=len(failed.tasks),
            functions=functions(counts)[:MOST_FUNCTIONS],
        )

    @router.get("/dashboard/tasks")
    async def task_list(
        request: Request, q: Annotated[str, Query()] = "", before: Annotated[str | None, Query()] = None
    ) -> Response:
        now = utc_now()
        search, cursor = views.parse_search(q, now), cursor_of(before)
        seq = await feed.head()
        counts, page = await asyncio.gather(store.counts(), store.page(search.filter(now), cursor, PAGE_SIZE))
        return renderer.page(
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

    @router.get("/dashboard/tasks/{task_id}")
    async def task_page(request: Request, task_id: str) -> Response:
        seq = await feed.head()
        task = await store.get(checked_id(task_id))
        events, logs = await asyncio.gather(store.events(task_id), store.logs(task_id, 0, MOST_LOG_LINES))
        now = utc_now()
        return renderer.page(
            request,
            "task.html",
            seq=seq,
            now=now,
            task=task,
            known=store.knows(task.func_name),
            waterfall=charts.waterfall(events, now, width=600),
            events=events[::-1],
            actors=any(event.actor for event in events),
            event_words=views.EVENT_WORDS,
            logs=log_lines(logs, None),
            log_end=log_end(logs, 0, None),
            error_type=views.error_type(task.stacktrace),
            frames=views.own_frames(task.stacktrace, f"{Path.cwd()}/"),
            result=shown_result(site, task),
            arguments=records.arguments(store, task) if site.display_func_args else None,
        )

    @router.get("/dashboard/tasks/{task_id}/log")
    async def more_log(
        request: Request,
        task_id: str,
        after: Annotated[int, Query(ge=0, lt=2**63)] = 0,
        attempt: Annotated[int | None, Query(ge=0, lt=2**31)] = None,
    ) -> Response:
        """Lines after those that a page shows, and where the next ones start."""
        task = await store.get(checked_id(task_id))
        logs = await store.logs(task_id, after, MOST_LOG_LINES)
        if not logs and not task.status.terminal:
            return Response(status_code=204, headers=HEADERS)
        end = log_end(logs, after, attempt)
        return renderer.page(request, "log.html", task=task, logs=log_lines(logs, attempt), log_end=end)

    @router.post("/dashboard/tasks/{task_id}/cancel")
    async def cancel(request: Request, task_id: str) -> Response:
        task = await store.cancel(checked_id(task_id), actor_of(request))
        return seen(f"{site.base(request)}/dashboard/tasks/{task.task_id}")

    @router.post("/dashboard/tasks/{task_id}/retry")
    async def retry(request: Request, task_id: str) -> Response:
        task = await store.retry(checked_id(task_id), actor_of(request))
        return seen(f"{site.base(request)}/dashboard/tasks/{task.task_id}")

    @router.post("/dashboard/view")
    async def choose_view(request: Request) -> Response:
        """Keeps what a person chose, for browsers without JavaScript; with it, `app.js` writes the same cookie."""
        form = await form_of(request)
        old = Preferences.of(request)
        theme = form.get("theme", old.theme)
        new = Preferences(
            theme if theme in THEMES else old.theme, form.get("keys", "on" if old.keys else "off") != "off"
        )
        base = site.base(request)
        response = seen(own_page(base, form.get("next", "")))
        response.set_cookie(PREFERENCES, str(new), max_age=A_YEAR, path=base, samesite="lax")
        return response

    @router.get("/dashboard/{rest:path}")
    async def nothing_here(rest: str) -> Response:
        raise HTTPException(404, "There is no such page.")

    return router


def seen(address: str) -> Response:
    return RedirectResponse(address, 303, HEADERS)


def cursor_of(before: str | None) -> Cursor | None:
    """Raises HTTPException 422."""
    if before is None:
        return None
    try:
        if "\0" in before:
            raise ValueError("before: must not contain NUL")
        return Cursor.parse(before)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


def shown_result(site: Site, task: TaskRecord) -> str | None:
    if task.result is None:
        return None
    try:
        return views.pretty(records.plain(site.manager.store.returned(task)))
    except records.UNREADABLE:
        return "(the stored result cannot be read)"


# -- what the overview adds up


@dataclass(frozen=True, slots=True)
class Tile:
    status: TaskStatus
    n: int
    delayed: int


def tiles(counts: Iterable[Count]) -> list[Tile]:
    n: Counter[TaskStatus] = Counter()
    delayed: Counter[TaskStatus] = Counter()
    for count in counts:
        n[count.status] += count.n
        delayed[count.status] += count.delayed
    return [Tile(status, n[status], delayed[status]) for status in TaskStatus]


@dataclass(frozen=True, slots=True)
class FunctionRow:
    name: str
    total: int
    by_status: Counter[TaskStatus]
    mean_seconds: float | None
    parts: Sequence[charts.Part]


def functions(counts: Iterable[Count]) -> list[FunctionRow]:
    """Task functions with what became of their tasks, the most used first."""
    by_name: dict[str, list[Count]] = {}
    for count in counts:
        by_name.setdefault(count.name, []).append(count)
    rows = [function_row(name, found) for name, found in by_name.items()]
    return sorted(rows, key=lambda row: (-row.total, row.name))


def function_row(name: str, counts: Sequence[Count]) -> FunctionRow:
    by_status: Counter[TaskStatus] = Counter()
    for count in counts:
        by_status[count.status] += count.n
    ended = [count for count in counts if count.status in (TaskStatus.SUCCESS, TaskStatus.FAILED)]
    n = sum(count.n for count in ended)
    mean = sum(count.seconds for count in ended) / n if n else None
    return FunctionRow(name, by_status.total(), by_status, mean, charts.stacked(by_status, 100.0, smallest=2.0))


# -- the list's chips


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


# -- a task's log


@dataclass(frozen=True, slots=True)
class LogLine:
    entry: LogEntry
    opens: int | None
    """The attempt, from 1, whose first line this is; None inside an attempt, and where there is but one."""


@dataclass(frozen=True, slots=True)
class LogEnd:
    """Where a page's log ends: the last line's number and attempt."""

    seq: int
    attempt: int | None


def log_lines(logs: Sequence[LogEntry], attempt: int | None) -> list[LogLine]:
    """`attempt` is that of the line before these."""
    lines = []
    for entry in logs:
        fresh = entry.attempt != attempt and (attempt is not None or entry.attempt > 0)
        lines.append(LogLine(entry, entry.attempt + 1 if fresh else None))
        attempt = entry.attempt
    return lines


def log_end(logs: Sequence[LogEntry], after: int, attempt: int | None) -> LogEnd:
    return LogEnd(logs[-1].seq, logs[-1].attempt) if logs else LogEnd(after, attempt)
