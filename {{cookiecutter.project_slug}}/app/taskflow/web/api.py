"""The JSON API: what tasks there are, what became of them, and how this process is.

Owns the routes of contract section 4 that answer in JSON. It asks the store and shows what `records.py` makes of the
answers; errors are left to the app's handlers. No route answers 500 for bad input or for a backend that is away.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from ..errors import TaskNotFound
from ..models import Cursor, TaskFilter, TaskRecord, TaskStatus, utc_now
from . import prometheus, records, shapes
from .auth import actor_of
from .records import Json
from .route import ApiRoute
from .site import Site
from .views import parse_moment

TASK_ID = re.compile(r"[0-9A-Za-z_.:-]{1,128}")
QUALITY = re.compile(r";\s*q=([01](?:\.\d*)?)")
MOST_LOG_LINES = 10_000
"""Log lines that a single record carries; `/logs?after=` pages through all."""


def parse_tag(text: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not key or not colon:
        raise ValueError(f"{text!r}: expected key:value")
    return key, value


def without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain NUL")
    return text


Text = Annotated[str, Field(max_length=512), AfterValidator(without_nul)]
Moment = Annotated[
    datetime | None,
    BeforeValidator(lambda text: parse_moment(text, utc_now()) if isinstance(text, str) else text),
    Field(json_schema_extra={"type": "string", "examples": ["2026-01-01T00:00:00Z", "24h"]}),
]


class ListQuery(BaseModel, extra="forbid"):
    """The query of `GET ""`: every filter that is given must hold."""

    limit: int = Field(50, ge=1, le=500)
    before: Text | None = Field(None, description="the cursor in the `Link` header of the page before")
    status: list[TaskStatus] = Field(default=[], max_length=20)
    func_name: Text | None = None
    queue: Text | None = None
    tag: list[Text] = Field(default=[], max_length=20, description="key:value")
    source: Literal["manual", "scheduled"] | None = None
    since: Moment = Field(None, description="ISO 8601, or <N>m, <N>h, <N>d ago")
    until: Moment = Field(None, description="ISO 8601, or <N>m, <N>h, <N>d ago")
    q: Text | None = Field(None, description="part of the name, of the error or of a tag, or the start of the id")

    def filter(self) -> TaskFilter:
        """Raises ValueError for a tag that is not key:value."""
        return TaskFilter(
            statuses=tuple(dict.fromkeys(self.status)),
            func_name=self.func_name,
            queue=self.queue,
            source=self.source,
            tags=tuple(parse_tag(tag) for tag in self.tag),
            since=self.since,
            until=self.until,
            text=self.q or None,
        )

    def cursor(self) -> Cursor | None:
        """Raises ValueError."""
        return None if self.before is None else Cursor.parse(self.before)


def checked_id(text: str) -> str:
    """Raises TaskNotFound for what no task's id can be."""
    if not TASK_ID.fullmatch(text):
        raise TaskNotFound(text)
    return text


def api_router(site: Site) -> APIRouter:
    router = APIRouter(route_class=ApiRoute, default_response_class=Json, responses=shapes.REFUSALS)
    manager, store = site.manager, site.manager.store

    async def whole(task: TaskRecord) -> dict[str, Any]:
        shown = records.task_record(store, task, await store.logs(task.task_id, 0, MOST_LOG_LINES), site.redaction)
        return shown | records.arguments(store, task, site.redaction) if site.display_func_args else shown

    @router.get("", response_model=list[shapes.ShownTask], summary="Tasks, newest first")
    async def list_tasks(request: Request, query: Annotated[ListQuery, Query()]) -> Response:
        try:
            where, before = query.filter(), query.cursor()
        except ValueError as error:
            raise invalid_query(str(error)) from None
        page = await store.page(where, before, query.limit)
        rows = [records.task_row(store, task, site.redaction) for task in page.tasks]
        if site.display_func_args:
            most = records.LONGEST_LISTED
            calls = await store.with_arguments(page.tasks, most + 1)
            rows = [
                row | records.arguments(store, task, site.redaction, most)
                for row, task in zip(rows, calls, strict=True)
            ]
        return Json(rows, headers={"Link": next_link(site.base(request), request, page.older)} if page.older else None)

    @router.get(
        "/metrics",
        response_model=shapes.ShownMetrics,
        summary="Numbers over all stored tasks",
        responses={
            200: {"content": {"text/plain": {}}, "description": "Prometheus's text format where it is asked for"}
        },
    )
    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        if wants_text(accept):
            text, media_type = prometheus.exposition(manager, await prometheus.facts_of(manager), accept)
            return Response(text, headers={"Cache-Control": "no-store"}, media_type=media_type)
        return Json(records.metrics_json(await store.metrics()))

    @router.get("/health", response_model=shapes.ShownHealth, summary="Whether this process works")
    async def health() -> Response:
        return Json({"status": "ok"})

    @router.get("/ready", response_model=shapes.ShownHealth, summary="Whether this process should get traffic")
    async def ready() -> Response:
        reason = manager.unready()
        if reason is None:
            return Json({"status": "ready"})
        return Json({"detail": reason}, 503, {"Retry-After": "2"})

    @router.get("/instances", response_model=list[shapes.ShownInstance], summary="Processes that serve these tasks")
    async def instances() -> Response:
        return Json([records.instance_row(instance) for instance in await store.instances()])

    @router.get("/{task_id}", response_model=shapes.ShownTaskRecord, summary="One task", responses=shapes.UNKNOWN)
    async def show(task_id: str) -> Response:
        return Json(await whole(await store.get(checked_id(task_id))))

    @router.get(
        "/{task_id}/events",
        response_model=list[shapes.ShownEvent],
        summary="What happened to a task",
        responses=shapes.UNKNOWN,
    )
    async def events(task_id: str) -> Response:
        return Json([records.shown(shapes.ShownEvent, event) for event in await store.events(checked_id(task_id))])

    @router.get(
        "/{task_id}/logs",
        response_model=list[shapes.ShownLogLine],
        summary="What a task logged",
        responses=shapes.UNKNOWN,
    )
    async def logs(task_id: str, after: Annotated[int, Query(ge=0, lt=2**63)] = 0) -> Response:
        lines = await store.logs(checked_id(task_id), after)
        return Json([records.shown(shapes.ShownLogLine, line, site.redaction) for line in lines])

    @router.post(
        "/{task_id}/cancel",
        response_model=shapes.ShownCommand,
        summary="Stop a task, or keep it from starting",
        responses=shapes.COMMANDS,
    )
    async def cancel(request: Request, task_id: str) -> Response:
        task = await store.cancel(checked_id(task_id), actor_of(request))
        return Json({"task_id": task.task_id, "task": await whole(task)})

    @router.post(
        "/{task_id}/retry",
        response_model=shapes.ShownCommand,
        summary="Run a task again that did not succeed",
        responses=shapes.COMMANDS | shapes.GONE,
    )
    async def retry(request: Request, task_id: str) -> Response:
        task = await store.retry(checked_id(task_id), actor_of(request))
        return Json({"task_id": task.task_id, "task": await whole(task)})

    return router


def invalid_query(message: str) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": ("query",), "msg": message, "input": None}])


def next_link(base: str, request: Request, place: Cursor | str, parameter: str = "before") -> str:
    """The same question, continued at `place`. Without scheme and host: only the client knows the outer ones."""
    asked = [(key, value) for key, value in request.query_params.multi_items() if key != parameter]
    return f'<{base}?{urlencode([*asked, (parameter, str(place))])}>; rel="next"'


def wants_text(accept: str) -> bool:
    """Whether plain text is asked for rather than JSON, as Prometheus does; of equals the first counts."""
    for part in sorted(accept.lower().split(","), key=quality, reverse=True):
        kind = part.partition(";")[0].strip()
        if quality(part) > 0 and kind in ("text/plain", "text/*", "application/openmetrics-text"):
            return True
        if kind in ("application/json", "application/*", "*/*"):
            return False
    return False


def quality(part: str) -> float:
    found = QUALITY.search(part)
    return float(found[1]) if found else 1.0
