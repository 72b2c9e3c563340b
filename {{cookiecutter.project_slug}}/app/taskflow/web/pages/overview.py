"""The overview: is it healthy, and if not, where do I click?"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from ...deploys import Change, Deploy
from ...history import SPANS, Bar, Span, Sums, quantile
from ...models import Count, InstanceRecord, TaskFilter, TaskStatus
from .. import charts
from .desk import Desk

NEWEST = 10
"""Tasks that are listed."""
MOST_PROBLEMS = 6
MOST_FUNCTIONS = 8
MOST_CHANGES = 6
MOST_MARKS = 12
COMPARED_EVERY = 30.0
"""Seconds for which a comparison of before and after is not made again: it reads an hour of every name's sums."""
WIDTH, HEIGHT = 720, 96

SpanName = Annotated[str, Query(pattern="^(1h|24h|7d)$")]


def add_routes(router: APIRouter, desk: Desk) -> None:
    store = desk.store
    compared = Remembered(store.changed_since, COMPARED_EVERY)

    @router.get("/dashboard")
    @desk.live
    async def overview(request: Request, span: SpanName = "1h") -> Response:
        counts, newest, groups, instances, queues = await asyncio.gather(
            store.counts(),
            store.page(TaskFilter(), None, NEWEST),
            store.error_groups(limit=MOST_PROBLEMS),
            store.instances(),
            store.queues(),
        )
        history, names, deploys = await asyncio.gather(
            store.history(SPANS[span]), store.lately("name"), store.deploys(SPANS[span])
        )
        now = desk.now()
        last = deploys[-1] if deploys else None
        oldest = await store.oldest(sorted({count.queue for count in counts if count.n > count.delayed}))
        return desk.renderer.page(
            request,
            "overview.html",
            now=now,
            unready=desk.site.manager.unready(),
            knows=store.knows,
            tasks=newest.tasks,
            groups=groups,
            paused=[queue for queue in queues if queue.paused],
            span=span,
            spans=tuple(SPANS),
            deploy=last,
            changes=(await compared(last))[:MOST_CHANGES] if last is not None else (),
            **facts(counts, instances, history, names, oldest, SPANS[span], now, deploys[-MOST_MARKS:]),
        )


class Remembered:
    """What was found of the last deploy, for everybody who looks at it."""

    def __init__(self, find: Callable[[Deploy], Awaitable[Sequence[Change]]], seconds: float) -> None:
        self._find, self._seconds = find, seconds
        self._known: tuple[Deploy, float, Sequence[Change]] | None = None

    async def __call__(self, deploy: Deploy) -> Sequence[Change]:
        if self._known is None or self._known[0] != deploy or monotonic() - self._known[1] > self._seconds:
            self._known = (deploy, monotonic(), await self._find(deploy))
        return self._known[2]


def facts(
    counts: Sequence[Count],
    instances: Sequence[InstanceRecord],
    history: Sequence[Bar],
    names: Mapping[str, Sums],
    oldest: Mapping[str, datetime],
    span: Span,
    now: datetime,
    deploys: Sequence[Deploy] = (),
) -> dict[str, Any]:
    alive = [item for item in instances if item.alive(now)]
    total = Sums()
    for bar in history:
        total.add(bar.sums)
    return {
        "instances": alive,
        "slots": sum(item.slots for item in alive),
        "tiles": tiles(counts),
        "running": sum(count.n for count in counts if count.status is TaskStatus.RUNNING),
        "oldest": min(oldest.values(), default=None),
        "ended": sum(count.n for count in counts if count.status.terminal),
        "chart": charts.throughput(history, span.step.total_seconds(), deploys, width=WIDTH, height=HEIGHT),
        "p95_wait": quantile(total.wait, 0.95),
        "p95_run": quantile(total.run, 0.95),
        "functions": functions(counts, names)[:MOST_FUNCTIONS],
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
    p95: float | None
    """Seconds that 95 % of its attempts of this hour and the last did not exceed."""
    parts: Sequence[charts.Part]


def functions(counts: Iterable[Count], names: Mapping[str, Sums]) -> list[FunctionRow]:
    """Task functions with what became of their tasks, the slowest of late first, then the most used."""
    by_name: dict[str, list[Count]] = {}
    for count in counts:
        by_name.setdefault(count.name, []).append(count)
    rows = [function_row(name, found, names.get(name)) for name, found in by_name.items()]
    return sorted(rows, key=lambda row: (-(row.p95 or 0.0), -row.total, row.name))


def function_row(name: str, counts: Sequence[Count], lately: Sums | None) -> FunctionRow:
    by_status: Counter[TaskStatus] = Counter()
    for count in counts:
        by_status[count.status] += count.n
    p95 = quantile(lately.run, 0.95) if lately else None
    return FunctionRow(name, by_status.total(), by_status, p95, charts.stacked(by_status, 100.0, smallest=2.0))
