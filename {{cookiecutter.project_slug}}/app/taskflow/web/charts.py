"""Points of the charts: where each bar is, before anybody draws it.

Owns the arithmetic; `charts.html` draws what it returns as SVG, coloured by status. Pure: the present moment is an
argument. Widths and places are in units of the drawing, whole or with one decimal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from ..deploys import Deploy
from ..history import Bar, Sums
from ..models import EventKind, TaskEvent, TaskStatus

ENDS: Mapping[str, str] = {
    EventKind.SUCCEEDED: "success",
    EventKind.RETRYING: "failed",
    EventKind.FAILED: "failed",
    EventKind.CANCELLED: "cancelled",
    EventKind.INTERRUPTED: "interrupted",
    EventKind.RESCUED: "interrupted",
    EventKind.RETURNED: "pending",
}
"""Events that end an attempt, and the status whose colour its bar has."""
WAITS_AGAIN = frozenset({EventKind.RETRYING, EventKind.RESCUED, EventKind.RETURNED})
STACK = (
    TaskStatus.SUCCESS,
    TaskStatus.RUNNING,
    TaskStatus.PENDING,
    TaskStatus.CANCELLED,
    TaskStatus.REJECTED,
    TaskStatus.INTERRUPTED,
    TaskStatus.FAILED,
)
"""From the bottom of a bar to its top: what needs attention sits at the edge."""


@dataclass(frozen=True, slots=True)
class Part:
    """A coloured piece of a bar: `at` and `size` along the bar."""

    kind: str
    at: float
    size: float
    n: int


def stacked(counts: Mapping[TaskStatus, int], length: float, *, smallest: float = 0.0) -> list[Part]:
    """Pieces that fill `length` in proportion. Whatever there is at all is at least `smallest` long."""
    there = [(status, counts[status]) for status in STACK if counts.get(status)]
    total = sum(n for _, n in there)
    if not total:
        return []
    sizes = [max(smallest, length * n / total) for _, n in there]
    scale = length / sum(sizes)
    parts: list[Part] = []
    at = 0.0
    for (status, n), size in zip(there, sizes, strict=True):
        parts.append(Part(status, round(at, 1), round(size * scale, 1), n))
        at += size * scale
    return parts


# -- what was done lately


@dataclass(frozen=True, slots=True)
class Column:
    at: datetime
    x: float
    width: float
    parts: Sequence[Part]
    """`at` is the distance of a part's upper edge from the top of the drawing."""
    sums: Sums


@dataclass(frozen=True, slots=True)
class Throughput:
    columns: Sequence[Column]
    """Those in which anything ended."""
    first: datetime
    last: datetime
    step: float
    """Seconds of one bar."""
    peak: int
    """The most tasks that ended in one bar."""
    totals: Mapping[TaskStatus, int]
    marks: Sequence[Mark]


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a version of the application began."""

    x: float
    deploy: Deploy


def throughput(
    bars: Sequence[Bar], step: float, deploys: Sequence[Deploy] = (), *, width: float, height: float
) -> Throughput | None:
    """How tasks ended, bar by bar; None where none did."""
    outcomes = [outcomes_of(bar.sums) for bar in bars]
    peak = max((counter.total() for counter in outcomes), default=0)
    if not peak:
        return None
    slot = width / len(bars)
    columns = [
        Column(
            bar.at,
            round(place * slot, 1),
            round(slot * 0.8, 1),
            upright(counter, height * counter.total() / peak, height),
            bar.sums,
        )
        for place, (bar, counter) in enumerate(zip(bars, outcomes, strict=True))
        if counter.total()
    ]
    totals = sum(outcomes, Counter())
    return Throughput(
        columns=columns,
        first=bars[0].at,
        last=bars[-1].at + timedelta(seconds=step),
        step=step,
        peak=peak,
        totals={status: totals[status] for status in TaskStatus if totals[status]},
        marks=[Mark(round((deploy.at - bars[0].at).total_seconds() / step * slot, 1), deploy) for deploy in deploys],
    )


def outcomes_of(sums: Sums) -> Counter[TaskStatus]:
    return Counter({status: n for status in TaskStatus if status.terminal and (n := sums.counts[status])})


def upright(counts: Mapping[TaskStatus, int], tall: float, height: float) -> list[Part]:
    """The pieces of a bar that stands on the ground of a drawing `height` high."""
    tall = max(tall, 2.0)
    return [
        Part(part.kind, round(height - part.at - part.size, 1), part.size, part.n)
        for part in stacked(counts, tall, smallest=min(2.0, tall / 4))
    ]


def sparkline(values: Sequence[float], *, width: float, height: float) -> str:
    """The points of a polyline; "" where there is nothing to see."""
    peak = max(values, default=0.0)
    if peak <= 0 or len(values) < 2:
        return ""
    step = width / (len(values) - 1)
    heights = (height - 1 - value / peak * (height - 2) for value in values)
    return " ".join(f"{place * step:.1f},{y:.1f}" for place, y in enumerate(heights))


# -- one task's attempts


@dataclass(frozen=True, slots=True)
class Span:
    """One attempt: waiting, then running. Places are in units of the drawing, times in seconds."""

    attempt: int
    """From 1."""
    wait_x: float
    wait_width: float
    run_x: float
    run_width: float
    wait: float
    run: float
    kind: str
    """Whose colour the bar has: a status."""
    outcome: str
    """The event that ended it, or "running" or "waiting"."""
    detail: str
    instance: str


@dataclass(frozen=True, slots=True)
class Waterfall:
    spans: Sequence[Span]
    first: datetime
    seconds: float


@dataclass(slots=True)
class Open:
    """An attempt while its events are read."""

    attempt: int
    waits_from: datetime
    started: datetime | None = None
    ended: datetime | None = None
    outcome: str = ""
    detail: str = ""
    instance: str = ""


def waterfall(events: Sequence[TaskEvent], now: datetime, *, width: float) -> Waterfall | None:
    """One line per attempt, from the task's history; None before anything happened."""
    attempts = list(read_attempts(events))
    if not attempts:
        return None
    first = attempts[0].waits_from
    last = max(attempt.ended or now for attempt in attempts)
    total = max((last - first).total_seconds(), 0.001)
    return Waterfall([span(attempt, first, now, width / total, width) for attempt in attempts], first, total)


def read_attempts(events: Sequence[TaskEvent]) -> Sequence[Open]:
    attempts: list[Open] = []
    waits_from: datetime | None = None
    for event in events:
        current = attempts[-1] if attempts else None
        if event.kind in (EventKind.ACCEPTED, EventKind.REQUEUED):
            waits_from = event.time
        elif event.kind == EventKind.STARTED:
            attempt = len(attempts) + 1 if event.attempt is None else event.attempt + 1
            attempts.append(Open(attempt, waits_from or event.time, started=event.time, instance=event.instance or ""))
            waits_from = None
        elif event.kind in ENDS and current is not None and current.ended is None:
            current.ended, current.outcome, current.detail = event.time, event.kind, event.detail or ""
            waits_from = event.time if event.kind in WAITS_AGAIN else None
        elif event.kind == EventKind.CANCELLED:
            waits_from = None
    if waits_from is not None:
        attempts.append(Open(attempts[-1].attempt + 1 if attempts else 1, waits_from))
    return attempts


def span(attempt: Open, first: datetime, now: datetime, scale: float, width: float) -> Span:
    started = attempt.started or now
    ended = (attempt.ended or now) if attempt.started else now
    wait = max(0.0, (started - attempt.waits_from).total_seconds())
    run = max(0.0, (ended - started).total_seconds())
    wait_x = (attempt.waits_from - first).total_seconds() * scale
    run_width = max(3.0, run * scale) if attempt.started else 0.0
    run_x = min(wait_x + wait * scale, width - run_width)
    kind = ENDS.get(attempt.outcome, "running" if attempt.started else "pending")
    return Span(
        attempt=attempt.attempt,
        wait_x=round(wait_x, 1),
        wait_width=round(max(0.0, run_x - wait_x) if attempt.started else wait * scale, 1),
        run_x=round(run_x, 1),
        run_width=round(run_width, 1),
        wait=wait,
        run=run,
        kind=kind,
        outcome=attempt.outcome or ("running" if attempt.started else "waiting"),
        detail=attempt.detail,
        instance=attempt.instance,
    )
