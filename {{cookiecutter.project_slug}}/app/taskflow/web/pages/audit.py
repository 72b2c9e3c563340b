"""The audit: who did what, when, to what, and why. Append-only: nothing here changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import AfterValidator

from ...models import AuditFilter, EventKind, TaskEvent
from .. import csv, records, views
from ..api import without_nul
from ..html import HEADERS
from .desk import Desk
from .queues import difference

PAGE_SIZE = 50
MOST_EXPORTED = 10_000
EXPORT_BATCH = 500
COLUMNS = ("entry_id", "timestamp", "actor", "action", "task_id", "detail")

Text = Annotated[str, Query(max_length=200), AfterValidator(without_nul)]
Before = Annotated[int | None, Query(ge=0, lt=2**63)]


def add_routes(router: APIRouter, desk: Desk) -> None:
    store = desk.store

    @router.get("/dashboard/audit")
    @desk.live
    async def audit(
        request: Request, before: Before = None, actor: Text = "", action: Text = "", about: Text = "", since: Text = ""
    ) -> Response:
        now = desk.now()
        asked = {"actor": actor.strip(), "action": action.strip(), "about": about.strip(), "since": since.strip()}
        found = await store.audit(before, PAGE_SIZE + 1, filter_of(asked, now))
        acts = facts(found[:PAGE_SIZE])
        older = acts[-1].event.seq if len(found) > PAGE_SIZE else None
        return desk.renderer.page(
            request,
            "audit.html",
            now=now,
            acts=acts,
            older=older,
            newest=before is None,
            asked={name: value for name, value in asked.items() if value},
        )

    @router.get("/dashboard/audit.csv")
    async def export(before: Before = None) -> Response:
        async def lines() -> object:
            yield csv.line(COLUMNS)
            place, left = before, MOST_EXPORTED
            while left > 0 and (found := await store.audit(place, min(left, EXPORT_BATCH))):
                for event in found:
                    yield csv.line(csv_cells(event))
                place, left = found[-1].seq, left - len(found)

        headers = HEADERS | {"Content-Disposition": 'attachment; filename="audit.csv"'}
        return StreamingResponse(lines(), headers=headers, media_type="text/csv; charset=utf-8")  # type: ignore[arg-type]


def filter_of(asked: Mapping[str, str], now: datetime) -> AuditFilter:
    """Raises HTTPException 422."""
    kinds = records.kinds_of(asked["action"].replace(" ", "_")) if asked["action"] else ()
    try:
        since = views.parse_moment(asked["since"], now) if asked["since"] else None
    except ValueError as error:
        raise HTTPException(422, f"since={error}") from None
    return AuditFilter(asked["actor"] or None, kinds, asked["about"] or None, since)


def csv_cells(event: TaskEvent) -> Sequence[str]:
    row = records.audit_row(event) | {"detail": event.detail}
    return [row[column] or "" for column in COLUMNS]


@dataclass(frozen=True, slots=True)
class Act:
    event: TaskEvent
    action: str
    subject: str
    """What it was done to, in words; "" where that is a task, which is a link."""
    detail: str
    """What it changed, from what to what, and its numbers."""
    why: str


def facts(events: Sequence[TaskEvent]) -> list[Act]:
    return [act(event) for event in events]


def act(event: TaskEvent) -> Act:
    action = records.ACTIONS.get(event.kind, event.kind).replace("_", " ")
    about = dict(records.detail_object(event.detail))
    after = about.get("after")
    why = about.pop("reason", None) or about.pop("note", None) or (after or {}).get("reason")
    if event.kind == EventKind.DISMISSED:
        why = about.pop("message", "")
    kind, colon, name = event.task_id.partition(":")
    subject = f"{kind} {name}" if colon else f"queue {about['queue']}" if about.get("queue") else ""
    words = difference(about.get("before"), after) if after else views.facts_words(about)
    return Act(event, action, subject, words, str(why or ""))
