"""The overview: is it healthy, and if not, where do I click?"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...models import Count, InstanceRecord, TaskFilter, TaskRecord, TaskStatus
from .. import charts, views
from .desk import Desk
from .workers import is_alive

NEWEST = 10
"""Tasks that are listed."""
SAMPLE = 240
"""Newest tasks that are drawn."""
FAILURES = 50
"""Newest failures that are grouped."""
MOST_PROBLEMS = 5
MOST_FUNCTIONS = 8


def add_routes(router: APIRouter, desk: Desk) -> None:
    store = desk.store

    @router.get("/dashboard")
    async def overview(request: Request) -> Response:
        seq = await desk.feed.head()
        counts, newest, failed, instances = await asyncio.gather(
            store.counts(),
            store.page(TaskFilter(), None, SAMPLE),
            store.page(TaskFilter(statuses=(TaskStatus.FAILED, TaskStatus.INTERRUPTED)), None, FAILURES),
            store.instances(),
        )
        now = desk.now()
        shown = facts(counts, newest.tasks, failed.tasks, instances, now)
        unready = desk.site.manager.unready()
        return desk.renderer.page(
            request, "overview.html", seq=seq, now=now, unready=unready, knows=store.knows, **shown
        )


def facts(
    counts: Sequence[Count],
    newest: Sequence[TaskRecord],
    failed: Sequence[TaskRecord],
    instances: Sequence[InstanceRecord],
    now: datetime,
) -> dict[str, Any]:
    alive = [item for item in instances if is_alive(item, now)]
    return {
        "instances": alive,
        "slots": sum(item.slots for item in alive),
        "tiles": tiles(counts),
        "running": sum(count.n for count in counts if count.status is TaskStatus.RUNNING),
        "ended": sum(count.n for count in counts if count.status.terminal),
        "activity": charts.activity(newest, now, width=720, height=96, bars=48),
        "tasks": newest[:NEWEST],
        "problems": views.problems(failed, MOST_PROBLEMS),
        "failures": len(failed),
        "functions": functions(counts)[:MOST_FUNCTIONS],
    }


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
