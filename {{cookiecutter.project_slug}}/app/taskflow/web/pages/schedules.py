"""Schedules: what ran, what runs next, and what it is held back by; and the one-offs that wait for their moment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response

from ...models import Cursor, ScheduledOnce, ScheduleState, TaskFilter, TaskRecord
from ...ticks import Trigger
from .. import records, views
from ..auth import actor_of
from ..html import form_of
from ..redaction import DEFAULT, Redaction
from .desk import Desk, cursor_of

PAGE_SIZE = 25
"""Schedules; each has a read of its own for its runs."""
RUNS = 20
ONE_OFFS = 50

Text = Annotated[str, Query(max_length=512)]


def add_routes(router: APIRouter, desk: Desk) -> None:
    add_schedules(router, desk)
    add_one_offs(router, desk)


def add_schedules(router: APIRouter, desk: Desk) -> None:
    schedules = desk.site.manager.schedules

    @router.get("/dashboard/schedules")
    @desk.live
    async def show(request: Request, after: Text = "") -> Response:
        states = [state for state in await schedules.states() if state.name > after]
        page = states[:PAGE_SIZE]
        runs = await asyncio.gather(*(runs_of(desk, state.name) for state in page))
        triggers = [schedules.named(state.name).trigger if state.name in schedules else None for state in page]
        rows = [row_of(*each) for each in zip(page, runs, triggers, strict=True)]
        more = page[-1].name if len(states) > len(page) else None
        return desk.renderer.page(
            request, "schedules.html", now=desk.now(), rows=rows, more=more, after=after, tab="schedules"
        )

    @router.post("/dashboard/schedules/run")
    async def run(request: Request) -> Response:
        form = await form_of(request)
        state = await schedules.run(form.get("name", ""), actor_of(request))
        return desk.go_to(request, f"/tasks/{state.last_task_id}")

    @router.post("/dashboard/schedules/pause")
    async def pause(request: Request) -> Response:
        form = await form_of(request)
        await schedules.pause(form.get("name", ""), actor_of(request), form.get("reason", "").strip() or None)
        return desk.go_to(request, "/schedules")

    @router.post("/dashboard/schedules/resume")
    async def resume(request: Request) -> Response:
        form = await form_of(request)
        await schedules.resume(form.get("name", ""), actor_of(request))
        return desk.go_to(request, "/schedules")


def add_one_offs(router: APIRouter, desk: Desk) -> None:
    schedules, store = desk.site.manager.schedules, desk.store

    @router.get("/dashboard/schedules/once")
    @desk.live
    async def show(request: Request, after: Annotated[str | None, Query()] = None) -> Response:
        cursor = cursor_of(after)
        found = await schedules.one_offs(
            after=(cursor.created_at, cursor.task_id) if cursor else None, limit=ONE_OFFS + 1
        )
        page: Sequence[ScheduledOnce] = found[:ONE_OFFS]
        if desk.site.display_func_args:
            page = await store.with_calls(page)
        more = Cursor(page[-1].fire_at, page[-1].task_id) if len(found) > len(page) else None
        return desk.renderer.page(
            request,
            "once.html",
            now=desk.now(),
            waiting=[(item, call_words(item, store.parameters(item.func_name), desk.site.redaction)) for item in page],
            more=more,
            after=after,
            shows_arguments=desk.site.display_func_args,
            tab="once",
        )

    @router.post("/dashboard/schedules/once/cancel")
    async def cancel(request: Request) -> Response:
        key = (await form_of(request)).get("run_key", "")
        if not await schedules.cancel_once(key, actor_of(request)):
            raise HTTPException(404, f"nothing waits under the run_key {key[:80]!r}")
        return desk.go_to(request, "/schedules/once")

    @router.post("/dashboard/schedules/once/move")
    async def move(request: Request) -> Response:
        form = await form_of(request)
        key, moment = form.get("run_key", ""), form.get("run_at", "").strip()
        try:
            run_at = views.parse_time(moment)
        except ValueError as error:
            raise HTTPException(422, f"run_at={error}") from None
        if not await schedules.move_once(key, run_at, actor_of(request)):
            raise HTTPException(404, f"nothing waits under the run_key {key[:80]!r}")
        return desk.go_to(request, "/schedules/once")


async def runs_of(desk: Desk, name: str) -> Sequence[TaskRecord]:
    """Its newest tasks, the oldest of them first."""
    return (await desk.store.page(TaskFilter(schedule=name), None, RUNS)).tasks[::-1]


@dataclass(frozen=True, slots=True)
class Dot:
    task: TaskRecord
    gap: bool
    """Whether ticks before it made no task."""


@dataclass(frozen=True, slots=True)
class Row:
    state: ScheduleState
    known: bool
    """Whether this process's code has it."""
    words: str
    dots: Sequence[Dot]


def row_of(state: ScheduleState, runs: Sequence[TaskRecord], trigger: Trigger | None) -> Row:
    words = views.trigger_words(state.trigger)
    gaps = [False, *(missed(before, after, trigger) for before, after in pairwise(runs))]
    return Row(state, trigger is not None, words, [Dot(*pair) for pair in zip(runs, gaps, strict=False)])


def missed(before: TaskRecord, after: TaskRecord, trigger: Trigger | None) -> bool:
    """Whether the schedule was due between two of its runs. One that was run by hand is no tick, and hides none."""
    if trigger is None:
        return False
    due: datetime = trigger.next_tick(before.run_at)
    return due < after.run_at and trigger.next_tick(due) <= after.run_at


def call_words(item: ScheduledOnce, parameters: Sequence[str] = (), redaction: Redaction = DEFAULT) -> str:
    """Its arguments, as they would be written."""
    args = redaction.call(parameters, records.plain(item.args, redaction))
    said = [views.compact(value) for value in args]
    said += [f"{name}={views.compact(value)}" for name, value in records.plain(item.kwargs, redaction).items()]
    return ", ".join(said)
