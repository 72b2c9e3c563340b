"""What charts remember: how many tasks started and how they ended, how long they waited and ran, per bucket of time.

Owns the sums and their arithmetic. Each instance adds up what it did itself, in buckets of ten seconds, minutes and
hours, and stores them as rows of its own, absolute: writing one again changes nothing, nobody adds in the store, and
readers sum over the instances. Rows are bounded by names and time, whatever the load. Durability never depends on it: a
crash takes the seconds since the last writing.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from .backends.base import Finish, GaugeRow, TurnResult
from .models import EPOCH, EventKind, TaskStatus, from_micros, to_micros

Kind = Literal["all", "queue", "name", "version", "lost"]
Series = tuple[Kind, str]
KEPT: Mapping[int, timedelta] = {10: timedelta(hours=2), 60: timedelta(hours=48), 3_600: timedelta(days=60)}
"""Seconds of a bucket -> how long it is kept."""
BOUNDS = tuple(factor * 10.0**power for power in range(-3, 5) for factor in (1, 2, 5))
"""Seconds; what lasted longer is in one bucket more."""
MOST_SERIES = 500
"""Names, and queues, with sums of their own; more are added to OTHERS."""
OTHERS = "(other)"
RESCUED = "rescued"
"""Tasks: what the sums of a lost process count."""
WHOLE: Series = ("all", "")


def bucket_of(seconds: float) -> int:
    return bisect_left(BOUNDS, seconds)


def quantile(histogram: Mapping[int, int], share: float) -> float | None:
    """Seconds that so much of it did not exceed, between the bounds of its bucket in proportion."""
    total = sum(histogram.values())
    if not total:
        return None
    wanted, before = share * total, 0
    for bucket in sorted(histogram):
        n = histogram[bucket]
        if before + n >= wanted:
            low = BOUNDS[bucket - 1] if bucket else 0.0
            high = BOUNDS[bucket] if bucket < len(BOUNDS) else BOUNDS[-1] * 2
            return low + (high - low) * (wanted - before) / n
        before += n
    return BOUNDS[-1]


@dataclass(slots=True)
class Sums:
    """Of one bucket and series."""

    counts: Counter[str] = field(default_factory=Counter)
    """`started`, `retried`, and the statuses in which tasks ended."""
    wait: Counter[int] = field(default_factory=Counter)
    run: Counter[int] = field(default_factory=Counter)
    run_seconds: float = 0.0
    wait_seconds: float = 0.0
    levels: dict[str, float] = field(default_factory=dict)
    """What was there when somebody looked: `pending`, `delayed`, `running`, `slots`, `oldest` in seconds."""

    def add(self, other: Sums) -> None:
        self.counts.update(other.counts)
        self.wait.update(other.wait)
        self.run.update(other.run)
        self.run_seconds += other.run_seconds
        self.wait_seconds += other.wait_seconds
        for name, value in other.levels.items():  # of the store, not of an instance: they do not add up
            self.levels[name] = max(value, self.levels.get(name, 0.0))

    @property
    def ended(self) -> int:
        return sum(self.counts[status] for status in TaskStatus if status.terminal)

    def dumps(self) -> str:
        parts: dict[str, Any] = {"c": self.counts, "w": self.wait, "r": self.run, "l": self.levels}
        parts |= {"ws": round(self.wait_seconds, 3), "rs": round(self.run_seconds, 3)}
        return json.dumps({name: part for name, part in parts.items() if part}, separators=(",", ":"))


def loads(text: str) -> Sums:
    """A row that cannot be read counts nothing."""
    try:
        parts = json.loads(text)
        return Sums(
            Counter({str(name): int(n) for name, n in parts.get("c", {}).items()}),
            Counter({int(bucket): int(n) for bucket, n in parts.get("w", {}).items()}),
            Counter({int(bucket): int(n) for bucket, n in parts.get("r", {}).items()}),
            float(parts.get("rs", 0.0)),
            float(parts.get("ws", 0.0)),
            {str(name): float(value) for name, value in parts.get("l", {}).items()},
        )
    except (ValueError, TypeError, AttributeError):
        return Sums()


class Book:
    """What this instance adds up. `turned` is a listener of the journal, `rows` is what is to be stored.

    Every task goes through `turned`, so it adds to one sum only, of its queue and name in the present ten seconds; to
    what else that belongs is seen to when they are over, or when somebody asks.
    """

    def __init__(self) -> None:
        self._fresh: dict[tuple[str, str], Sums] = {}
        """(queue, name) -> what has happened since `_settle`, all in one of the smallest buckets."""
        self._ends = EPOCH
        """When that bucket is over."""
        self._open: dict[int, tuple[int, dict[Series, Sums]]] = {}
        """Seconds of a bucket -> when the present one began, and its sums."""
        self._changed: dict[tuple[int, int, Series], Sums] = {}
        self._names: dict[Kind, set[str]] = {"queue": set(), "name": set()}
        self._totals: dict[tuple[str, str], Sums] = {}
        self.levels: Mapping[Series, Mapping[str, float]] = {}
        """What there was at the last look."""

    @property
    def totals(self) -> Mapping[tuple[str, str], Sums]:
        """(queue, name) -> all since the process began."""
        self._settle()
        return self._totals

    def turned(self, finishes: Sequence[Finish], result: TurnResult) -> None:
        refused = result.refused
        for finish in finishes:
            if finish.kind != EventKind.RETURNED and (not refused or finish.task.attempt_id not in refused):
                task, at = finish.task, finish.at
                sums = self._sums(task.queue, task.name, at)
                ran = max(0.0, (at - task.started_at).total_seconds())
                outcome = "retried" if finish.run_at is not None else finish.status.value
                sums.counts[outcome] += 1
                sums.run[bisect_left(BOUNDS, ran)] += 1
                sums.run_seconds += ran
        for task in result.claimed:
            started_at = task.started_at
            sums = self._sums(task.queue, task.name, started_at)
            waited = max(0.0, (started_at - (task.due_at or task.created_at)).total_seconds())
            sums.counts["started"] += 1
            sums.wait[bisect_left(BOUNDS, waited)] += 1
            sums.wait_seconds += waited

    def began(self, now: datetime, version: str, what: str) -> None:
        """A process of that version started."""
        self._note(now, ("version", version), what, 1)

    def lost(self, now: datetime, process: str, rescued: int) -> None:
        """Another process went without a word, and this one saw to what it had left."""
        self._note(now, ("lost", process), RESCUED, rescued)

    def _note(self, now: datetime, series: Series, what: str, n: int) -> None:
        self._roll(now)
        for sums in self._at([series]):
            sums.counts[what] += n

    def sampled(self, now: datetime, levels: Mapping[Series, Mapping[str, float]]) -> None:
        self._roll(now)
        self.levels = levels
        for series, found in levels.items():
            for sums in self._at([series]):
                sums.levels.update(found)

    def rows(self) -> list[GaugeRow]:
        """What has changed since the last time."""
        self._settle()
        changed, self._changed = self._changed, {}
        return [
            GaugeRow(size, start * 1_000_000, *series, sums.dumps()) for (size, start, series), sums in changed.items()
        ]

    def _sums(self, queue: str, name: str, moment: datetime) -> Sums:
        if moment >= self._ends:
            self._roll(moment)
        pair = (queue, name)
        found = self._fresh.get(pair)
        if found is None:
            found = self._fresh[pair] = Sums()
        return found

    def _roll(self, moment: datetime) -> None:
        """Goes on to the buckets that a moment falls into. What comes late counts in the present ones."""
        self._settle()
        second = to_micros(moment) // 1_000_000
        for size in KEPT:
            start = second - second % size
            known = self._open.get(size)
            if known is None or start > known[0]:
                self._open[size] = (start, {})
        smallest = min(KEPT)
        self._ends = max(self._ends, from_micros((self._open[smallest][0] + smallest) * 1_000_000))

    def _settle(self) -> None:
        fresh, self._fresh = self._fresh, {}
        for (queue, name), sums in fresh.items():
            for other in self._at([WHOLE, self._known("queue", queue), self._known("name", name)]):
                other.add(sums)
            pair = (queue, name)
            if pair not in self._totals and len(self._totals) >= MOST_SERIES:
                pair = (OTHERS, OTHERS)
            self._totals.setdefault(pair, Sums()).add(sums)

    def _known(self, kind: Kind, name: str) -> Series:
        names = self._names[kind]
        if name not in names:
            if len(names) >= MOST_SERIES:
                return kind, OTHERS
            names.add(name)
        return kind, name

    def _at(self, series: Iterable[Series]) -> list[Sums]:
        """The sums of the present buckets of every size."""
        found = []
        for size, (start, sums) in self._open.items():
            for one in series:
                known = sums.get(one)
                if known is None:
                    known = sums[one] = Sums()
                self._changed[size, start, one] = known
                found.append(known)
        return found


# -- reading


class Span(NamedTuple):
    """A part of the past that a chart shows."""

    name: str
    size: int
    """Seconds of a stored bucket."""
    buckets: int
    """Of them in one bar."""
    bars: int

    @property
    def step(self) -> timedelta:
        return timedelta(seconds=self.size * self.buckets)

    def start(self, now: datetime) -> datetime:
        """Of its first bar; bars begin at multiples of their length, so that they do not creep."""
        step = self.size * self.buckets
        end = to_micros(now) // 1_000_000 // step * step + step
        return from_micros((end - step * self.bars) * 1_000_000)


SPANS: Mapping[str, Span] = {
    "1h": Span("1h", 60, 1, 60),
    "24h": Span("24h", 60, 20, 72),
    "7d": Span("7d", 3_600, 2, 84),
}


@dataclass(frozen=True, slots=True)
class Bar:
    at: datetime
    sums: Sums


def bars(span: Span, start: datetime, rows: Iterable[GaugeRow]) -> list[Bar]:
    """The rows of one series, of all instances, as bars without gaps."""
    first, step = to_micros(start), int(span.step.total_seconds()) * 1_000_000
    found = [Sums() for _ in range(span.bars)]
    for row in rows:
        place = (row.at - first) // step
        if 0 <= place < span.bars:
            found[place].add(loads(row.sums))
    return [Bar(start + number * span.step, sums) for number, sums in enumerate(found)]


def by_series(rows: Iterable[GaugeRow]) -> dict[str, Sums]:
    found: dict[str, Sums] = {}
    for row in rows:
        found.setdefault(row.series, Sums()).add(loads(row.sums))
    return found


class Lost(NamedTuple):
    at: datetime
    """The minute in which it was noticed."""
    process: str
    version: str
    instance_id: str
    rescued: int


def lost(rows: Iterable[GaugeRow]) -> list[Lost]:
    """From rows of the kind "lost". Who saw to one process with others adds its share."""
    found: dict[str, Lost] = {}
    for row in rows:
        process, _, rest = row.series.partition(" ")
        version, _, instance_id = rest.rpartition(" ")
        known, n = found.get(row.series), loads(row.sums).counts[RESCUED]
        if known is None:
            found[row.series] = Lost(from_micros(row.at), process, version, instance_id, n)
        else:
            found[row.series] = known._replace(at=min(known.at, from_micros(row.at)), rescued=known.rescued + n)
    return list(found.values())
