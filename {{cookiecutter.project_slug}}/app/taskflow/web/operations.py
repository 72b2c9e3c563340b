"""The JSON API's second half: what operators do to many tasks and to queues, and the record of who did it.

Owns the routes of contract section 4 that are about no single task. Included before `api.py`, whose `/{task_id}` would
take their addresses. It asks the store; errors are left to the app's handlers.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Body, HTTPException, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from ..models import AuditFilter
from . import records, shapes
from .api import Moment, Text, invalid_query, next_link
from .auth import actor_of
from .records import Json
from .route import ApiRoute
from .site import Site

MOST_IDS = 1_000
"""Tasks that one bulk retry may name; for more there is /retry-failed."""
MOST_NUMBER = 2**31 - 1
WINDOW = re.compile(r"([0-9]{1,6})([hd])")
WINDOW_UNITS = {"h": "hours", "d": "days"}
HISTORY_UNITS = {"min": "minutes", "hour": "hours", "day": "days"}

Limit = Annotated[int, Field(strict=True, ge=1, le=MOST_NUMBER)]
TaskId = Annotated[Text, Field(max_length=128)]


class BulkRetry(BaseModel, extra="forbid"):
    task_ids: list[TaskId] = Field(max_length=MOST_IDS, description="one that is named twice counts once")


class QueueEdit(BaseModel, extra="forbid"):
    """What is absent stays as it is; null is no limit."""

    concurrency: Limit | None = None
    max_size: Limit | None = None

    def changes(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}


class Pause(BaseModel, extra="forbid"):
    reason: Text | None = None


class AuditQuery(BaseModel, extra="forbid"):
    limit: int = Field(50, ge=1, le=500)
    before: int | None = Field(None, ge=0, lt=2**63, description="an `entry_id`: the page continues below it")
    actor: Text | None = None
    action: Text | None = Field(None, description="such as retry, pause_queue or login")
    task_id: Text | None = Field(None, description="of a task, or words of whatever else it was done to")
    since: Moment = Field(None, description="ISO 8601, or <N>m, <N>h, <N>d ago")
    until: Moment = Field(None, description="ISO 8601, or <N>m, <N>h, <N>d ago")

    def filter(self) -> AuditFilter:
        kinds = records.kinds_of(self.action) if self.action else ()
        return AuditFilter(self.actor or None, kinds, self.task_id or None, self.since, self.until)


def window_start(since: str, now: datetime) -> datetime | None:
    """The beginning of `<N>h` or `<N>d`; None for `all`. Raises HTTPException 400."""
    if since == "all":
        return None
    try:
        if found := WINDOW.fullmatch(since):
            return now - timedelta(**{WINDOW_UNITS[found[2]]: int(found[1])})
    except OverflowError:
        pass
    raise HTTPException(400, f"since={since[:40]!r}: expected <N>h, <N>d or all")


def history_end(value: int, unit: str, now: datetime) -> datetime:
    """Raises RequestValidationError for a time before the calendar begins."""
    try:
        return now - timedelta(**{HISTORY_UNITS[unit]: value})
    except OverflowError:
        raise invalid_query(f"{value} {unit} ago: there is no such time") from None


def operations_router(site: Site) -> APIRouter:
    router = APIRouter(route_class=ApiRoute, default_response_class=Json, responses=shapes.REFUSALS)
    add_history_routes(router, site)
    add_queue_routes(router, site)
    add_instance_routes(router, site)
    return router


def add_history_routes(router: APIRouter, site: Site) -> None:
    manager, store = site.manager, site.manager.store

    @router.post("/bulk-retry", response_model=shapes.ShownBulkRetry, summary="Run many tasks again")
    async def bulk_retry(request: Request, asked: BulkRetry) -> Response:
        return Json(records.retried(await store.retry_many(asked.task_ids, actor_of(request))))

    @router.post(
        "/retry-failed",
        response_model=shapes.ShownBulkRetry,
        summary="Run again what failed",
        responses={400: {"model": shapes.ShownProblem, "description": "A window that is not understood"}},
    )
    async def retry_failed(
        request: Request,
        since: Annotated[str, Query(description="tasks added in the last <N>h or <N>d, or all")] = "6h",
        func_name: Annotated[Text | None, Query()] = None,
    ) -> Response:
        start = window_start(since, manager.clock())
        return Json(records.retried(await store.retry_failed(start, func_name or None, actor_of(request))))

    @router.delete("/history", response_model=shapes.ShownDeletion, summary="Delete tasks that ended long ago")
    async def delete_history(
        request: Request,
        value: Annotated[int, Query(ge=1, le=MOST_NUMBER, description="how many units ago they ended, or earlier")],
        unit: Annotated[Literal["min", "hour", "day"], Query()],
    ) -> Response:
        before = history_end(value, unit, manager.clock())
        return Json({"deleted": await store.delete_history(before, actor_of(request))})

    @router.get("/audit", response_model=list[shapes.ShownAuditEntry], summary="What people did, newest first")
    async def audit(request: Request, query: Annotated[AuditQuery, Query()]) -> Response:
        found = await store.audit(query.before, query.limit + 1, query.filter())
        rows = [records.audit_row(event) for event in found[: query.limit]]
        if len(found) == len(rows):
            return Json(rows)
        return Json(rows, headers={"Link": next_link(f"{site.base(request)}/audit", request, rows[-1]["entry_id"])})


def add_queue_routes(router: APIRouter, site: Site) -> None:
    """A name may hold slashes: `{name:any}` takes all up to the last `/pause` or `/resume`, and a queue that is itself
    called so is reached by saying it twice."""
    store = site.manager.store

    @router.get("/queues", response_model=list[shapes.ShownQueue], summary="Queues, by name")
    async def queues() -> Response:
        return Json([records.shown(shapes.ShownQueue, state) for state in await store.queues()])

    @router.patch(
        "/queues/{name:any}", response_model=shapes.ShownQueue, summary="Change limits", responses=shapes.UNKNOWN
    )
    async def edit(request: Request, name: str, change: QueueEdit) -> Response:
        return Json(records.shown(shapes.ShownQueue, await store.edit_queue(name, change.changes(), actor_of(request))))

    @router.post(
        "/queues/{name:any}/pause",
        response_model=shapes.ShownQueue,
        summary="Start nothing more of a queue",
        responses=shapes.UNKNOWN,
    )
    async def pause(request: Request, name: str, why: Annotated[Pause | None, Body()] = None) -> Response:
        reason = why.reason if why else None
        return Json(records.shown(shapes.ShownQueue, await store.pause_queue(name, actor_of(request), reason)))

    @router.post(
        "/queues/{name:any}/resume",
        response_model=shapes.ShownQueue,
        summary="Start a queue's tasks again",
        responses=shapes.UNKNOWN,
    )
    async def resume(request: Request, name: str) -> Response:
        return Json(records.shown(shapes.ShownQueue, await store.resume_queue(name, actor_of(request))))


def add_instance_routes(router: APIRouter, site: Site) -> None:
    store = site.manager.store

    @router.post(
        "/instances/{instance_id}/drain",
        response_model=shapes.ShownInstance,
        summary="Have a process start no more tasks",
        responses=shapes.UNKNOWN,
    )
    async def drain(request: Request, instance_id: str) -> Response:
        return Json(records.instance_row(await store.drain_instance(instance_id, actor_of(request))))
