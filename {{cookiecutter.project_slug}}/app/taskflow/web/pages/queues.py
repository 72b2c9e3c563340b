"""Queues: how full, how busy, held back or not, and an operator's hands on their limits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response

from ...errors import QueueNotFound
from ...history import Bar
from ...models import Count, EventKind, QueueState, TaskEvent, TaskStatus
from .. import charts
from ..auth import actor_of
from ..html import form_of
from ..records import detail_object
from .desk import Desk

HISTORY = 200
"""Newest acts of people among which a queue's changes are looked for."""
MOST_CHANGES = 20
LARGEST_LIMIT = 2**31 - 1
EDITS = frozenset({EventKind.UPDATE_QUEUE, EventKind.PAUSE_QUEUE, EventKind.RESUME_QUEUE})


def add_routes(router: APIRouter, desk: Desk) -> None:
    store = desk.store

    @router.get("/dashboard/queues")
    @desk.live
    async def queues(request: Request, name: Annotated[str, Query(max_length=512)] = "") -> Response:
        states, counts, history = await asyncio.gather(store.queues(), store.counts(), store.histories("queue"))
        oldest = await store.oldest([state.name for state in states if state.pending])
        rows = facts(states, counts, history, oldest)
        if not name:
            return desk.renderer.page(request, "queues.html", now=desk.now(), queues=rows)
        row = next((row for row in rows if row.state.name == name), None)
        if row is None:
            raise QueueNotFound(name)
        changes = changes_of(name, await store.audit(None, HISTORY))
        return desk.renderer.page(request, "queue.html", now=desk.now(), row=row, changes=changes)

    @router.post("/dashboard/queues/edit")
    async def edit(request: Request) -> Response:
        form = await form_of(request)
        limits = {name: limit_of(name, form.get(name, "")) for name in ("concurrency", "max_size")}
        name = form.get("name", "")
        await store.edit_queue(name, limits, actor_of(request), form.get("note", "").strip() or None)
        return desk.go_to(request, "/queues", name=name)

    @router.post("/dashboard/queues/pause")
    async def pause(request: Request) -> Response:
        form = await form_of(request)
        await store.pause_queue(form.get("name", ""), actor_of(request), form.get("reason", "").strip() or None)
        return desk.go_to(request, "/queues")

    @router.post("/dashboard/queues/resume")
    async def resume(request: Request) -> Response:
        form = await form_of(request)
        await store.resume_queue(form.get("name", ""), actor_of(request))
        return desk.go_to(request, "/queues")


def limit_of(name: str, text: str) -> int | None:
    """What was typed into a limit's field; nothing is no limit. Raises HTTPException 422."""
    text = text.strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and 1 <= int(text) <= LARGEST_LIMIT):
        raise HTTPException(422, f"{name}={text[:20]!r}: must be a whole number from 1 on, or nothing for no limit")
    return int(text)


@dataclass(frozen=True, slots=True)
class QueueRow:
    state: QueueState
    delayed: int
    failed: int
    """Of those that have ended."""
    ended: int
    spark: str
    """Of what ended in the last hour."""
    oldest: datetime | None
    """Since when the one that waits longest could have started."""

    @property
    def busy(self) -> float:
        """Between 0 and 1: how much of its concurrency runs; 0 where there is no limit."""
        return min(1.0, self.state.running / self.state.concurrency) if self.state.concurrency else 0.0


def facts(
    states: Iterable[QueueState],
    counts: Sequence[Count],
    history: Mapping[str, Sequence[Bar]],
    oldest: Mapping[str, datetime],
) -> list[QueueRow]:
    return [
        queue_row(state, [count for count in counts if count.queue == state.name], history, oldest) for state in states
    ]


def queue_row(
    state: QueueState,
    counts: Sequence[Count],
    history: Mapping[str, Sequence[Bar]],
    oldest: Mapping[str, datetime],
) -> QueueRow:
    ended = sum(count.n for count in counts if count.status in (TaskStatus.SUCCESS, TaskStatus.FAILED))
    failed = sum(count.n for count in counts if count.status is TaskStatus.FAILED)
    done = [float(bar.sums.ended) for bar in history.get(state.name, ())]
    spark = charts.sparkline(done, width=80, height=20)
    return QueueRow(state, sum(count.delayed for count in counts), failed, ended, spark, oldest.get(state.name))


@dataclass(frozen=True, slots=True)
class Change:
    event: TaskEvent
    words: str
    """What it changed, from what to what."""
    note: str


def changes_of(name: str, events: Iterable[TaskEvent]) -> list[Change]:
    """What people did to that queue, newest first, among these events."""
    found = []
    for event in events:
        if event.kind in EDITS and (about := detail_object(event.detail)).get("queue") == name:
            words = difference(about.get("before"), about.get("after"))
            found.append(Change(event, words, str(about.get("note") or "")))
    return found[:MOST_CHANGES]


def difference(before: object, after: object) -> str:
    """`concurrency 5 → 20`, for each column that was set."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return ""
    if "paused" in after:  # which some stores keep as a number
        before, after = ({**facts, "paused": bool(facts.get("paused"))} for facts in (before, after))
    return ", ".join(
        f"{column.replace('_', ' ')} {limit_words(before.get(column))} → {limit_words(value)}"
        for column, value in after.items()
        if column != "reason" and before.get(column) != value
    )


def limit_words(value: object) -> str:
    match value:
        case None:
            return "no limit"
        case bool():
            return "yes" if value else "no"
        case _:
            return str(value)
