"""One task: what happened, attempt by attempt, with its log, its error, its arguments and its result."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response

from ...failures import error_type, own_frames
from ...models import LogEntry, TaskRecord
from .. import charts, records, views
from ..api import checked_id
from ..auth import actor_of
from ..html import HEADERS, form_of, is_refresh
from ..redaction import DEFAULT, Redaction
from ..site import Site
from .desk import Desk

MOST_LOG_LINES = 500
"""Log lines that a page shows at once, the newest; earlier ones are had from the API."""
MOST_READ = 10_000
"""Log lines that are read to find the newest; later ones follow as if they were logged now."""
LEVELS = ("debug", "info", "warning", "error", "critical")
Level = Annotated[str, Query(pattern=f"^({'|'.join(LEVELS)})?$")]


def add_routes(router: APIRouter, desk: Desk) -> None:
    store, site = desk.store, desk.site

    @router.get("/dashboard/tasks/{task_id}")
    @desk.live
    async def task_page(request: Request, task_id: str, level: Level = "") -> Response:
        task = await store.get(checked_id(task_id))
        most = 1 if is_refresh(request) else MOST_READ  # a page that is refreshed keeps the log that it has
        events, logs = await asyncio.gather(store.events(task_id), store.logs(task_id, 0, most))
        end = log_end(logs, 0, None)
        now, why = desk.now(), await store.why(task)
        return desk.renderer.page(
            request,
            "task.html",
            why=why,
            now=now,
            task=task,
            known=store.knows(task.func_name),
            waterfall=charts.waterfall(events, now, width=600),
            events=events[::-1],
            actors=any(event.actor for event in events),
            event_words=views.EVENT_WORDS,
            logs=log_lines(logs, None, site.redaction, level),
            log_end=end,
            log_ended=task.status.terminal and not await store.logs(task_id, end.seq, 1),
            logged=len(logs),
            level=level,
            levels=LEVELS,
            error_type=error_type(task.stacktrace),
            frames=own_frames(task.stacktrace, f"{Path.cwd()}/"),
            result=shown_result(site, task),
            arguments=records.arguments(store, task, site.redaction) if site.display_func_args else None,
        )

    @router.get("/dashboard/tasks/{task_id}/log")
    async def more_log(
        request: Request,
        task_id: str,
        after: Annotated[int, Query(ge=0, lt=2**63)] = 0,
        attempt: Annotated[int | None, Query(ge=0, lt=2**31)] = None,
        level: Level = "",
    ) -> Response:
        """Lines after those that a page shows, and where the next ones start."""
        task = await store.get(checked_id(task_id))
        logs = await store.logs(task_id, after, MOST_LOG_LINES)
        if not logs and not task.status.terminal:
            return Response(status_code=204, headers=HEADERS)
        end = log_end(logs, after, attempt)
        return desk.renderer.page(
            request,
            "log.html",
            task=task,
            logs=log_lines(logs, attempt, site.redaction, level),
            log_end=end,
            log_ended=task.status.terminal and not await store.logs(task_id, end.seq, 1),
            level=level,
        )

    @router.post("/dashboard/tasks/{task_id}/cancel")
    async def cancel(request: Request, task_id: str) -> Response:
        task = await store.cancel(checked_id(task_id), actor_of(request))
        return desk.go_to(request, f"/tasks/{task.task_id}")

    @router.post("/dashboard/tasks/{task_id}/retry")
    async def retry(request: Request, task_id: str) -> Response:
        task = await store.retry(checked_id(task_id), actor_of(request))
        return desk.go_to(request, f"/tasks/{task.task_id}")

    @router.post("/dashboard/tasks/{task_id}/dismiss")
    async def dismiss(request: Request, task_id: str) -> Response:
        reason = (await form_of(request)).get("reason", "").strip()
        if not reason:
            raise HTTPException(422, "reason: say why, to dismiss it")
        task = await store.dismiss(checked_id(task_id), reason, actor_of(request))
        return desk.go_to(request, f"/tasks/{task.task_id}")

    @router.post("/dashboard/tasks/{task_id}/restore")
    async def restore(request: Request, task_id: str) -> Response:
        task = await store.restore(checked_id(task_id), actor_of(request))
        return desk.go_to(request, f"/tasks/{task.task_id}")


def shown_result(site: Site, task: TaskRecord) -> str | None:
    if task.result is None:
        return None
    try:
        return views.pretty(records.plain(site.manager.store.returned(task), site.redaction))
    except records.UNREADABLE:
        return "(the stored result cannot be read)"


@dataclass(frozen=True, slots=True)
class LogLine:
    entry: LogEntry
    opens: int | None
    """The attempt, from 1, whose first line this is; None inside an attempt, and where there is but one."""
    extra: Mapping[str, Any]
    """What it says besides, without what is secret."""


@dataclass(frozen=True, slots=True)
class LogEnd:
    """Where a page's log ends: the last line's number and attempt."""

    seq: int
    attempt: int | None


def log_lines(
    logs: Sequence[LogEntry], attempt: int | None, redaction: Redaction = DEFAULT, level: str = ""
) -> list[LogLine]:
    """The newest of a level and above it; of a level of one's own always. `attempt` is that of the line before."""
    below = LEVELS[: LEVELS.index(level)] if level else ()
    found = [entry for entry in logs if entry.level.lower() not in below]
    if len(found) > MOST_LOG_LINES:
        attempt = found[-MOST_LOG_LINES - 1].attempt
    lines = []
    for entry in found[-MOST_LOG_LINES:]:
        fresh = entry.attempt != attempt and (attempt is not None or entry.attempt > 0)
        extra = records.plain(entry.extra, redaction)
        lines.append(LogLine(entry, entry.attempt + 1 if fresh else None, extra))
        attempt = entry.attempt
    return lines


def log_end(logs: Sequence[LogEntry], after: int, attempt: int | None) -> LogEnd:
    return LogEnd(logs[-1].seq, logs[-1].attempt) if logs else LogEnd(after, attempt)
