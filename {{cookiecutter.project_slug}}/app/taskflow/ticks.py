"""When a schedule is due: intervals, cron expressions, time zones, and what becomes of ticks that were missed.

Owns the calendar; the scheduler asks it. Pure: everything follows from the schedule and the times it is given, so that
every instance computes the same ticks and none drifts.

A cron expression is read in its zone. One that names certain hours is a list of local times, of which each fires once:
as RFC 5545 (3.3.5) has it, a time that the clocks show twice is the first of the two, and a time that they skip is read
as if they had not been moved yet, so that 02:30 becomes 03:30 of the same day. One that runs in every hour follows real
time instead: both passes of a repeated hour, and nothing for an hour that does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Literal, Protocol, get_args
from zoneinfo import ZoneInfo

from croniter import croniter  # type: ignore[import-untyped]

from .errors import BadSchedule
from .models import EPOCH, from_micros, to_micros

Misfire = Literal["skip", "once", "all"]
"""What becomes of ticks that were missed: none of them, the newest, or the newest MISFIRE_CAP is made up for."""

GRACE = timedelta(seconds=1)
"""A tick that is no older than this is on time."""
MISFIRE_CAP = 100
SHORTEST_INTERVAL = 0.01
LONGEST_INTERVAL = 10 * 366 * 86_400.0
"""Seconds."""
MOST_ON_TIME = round(GRACE.total_seconds() / SHORTEST_INTERVAL) + 1
MOST_COUNTED = 200
"""Missed ticks of a cron expression that are counted, one by one; those of an interval are computed."""

SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)
"""No zone moves its clocks twice within a day, or by more than a day."""
ALL_HOURS = ["*"]
BY_CHANCE = re.compile(r"(?i)[hr](\(.*)?(/.*)?")
"""Fields that croniter would fill with a random or a hashed number: instances could not agree on them."""


@dataclass(frozen=True, slots=True)
class Ticks:
    """The newest ticks of a stretch of time, oldest first, and how many there are in all of it."""

    newest: tuple[datetime, ...]
    total: int


class Trigger(Protocol):
    """When a schedule is due. Ticks are UTC; every question is about those later than `after`."""

    @property
    def text(self) -> str:
        """As people read it."""

    def next_tick(self, after: datetime) -> datetime: ...

    def ticks(self, after: datetime, until: datetime, most: int) -> Ticks:
        """The newest `most` up to and including `until`. The cost does not grow with the stretch."""


@dataclass(frozen=True, slots=True)
class Every:
    """Multiples of an interval since the epoch: the same for every instance, whenever it was started."""

    micros: int

    @classmethod
    def of(cls, every: float | timedelta) -> Every:
        """Raises BadSchedule."""
        seconds: object = every.total_seconds() if isinstance(every, timedelta) else every
        if not isinstance(seconds, int | float) or isinstance(seconds, bool):
            raise BadSchedule("every", every, "must be seconds or a timedelta")
        if not SHORTEST_INTERVAL <= seconds <= LONGEST_INTERVAL:
            raise BadSchedule("every", every, f"must be between {SHORTEST_INTERVAL} seconds and ten years")
        return cls(round(seconds * 1_000_000))

    @property
    def text(self) -> str:
        return f"every {self.micros / 1_000_000:.6f}".rstrip("0").rstrip(".") + " s"

    def next_tick(self, after: datetime) -> datetime:
        return from_micros((to_micros(after) // self.micros + 1) * self.micros)

    def ticks(self, after: datetime, until: datetime, most: int) -> Ticks:
        first, last = to_micros(after) // self.micros + 1, to_micros(until) // self.micros
        numbers = range(max(first, last - most + 1), last + 1)
        return Ticks(tuple(from_micros(number * self.micros) for number in numbers), max(0, last - first + 1))


@dataclass(frozen=True, slots=True)
class Shift:
    """A change of a zone's clocks, from one offset to another."""

    at: datetime
    before: timedelta
    after: timedelta

    @property
    def length(self) -> timedelta:
        """How far the clocks went forward; negative when they went back."""
        return self.after - self.before

    def covers(self, moment: datetime) -> bool:
        """Whether the clocks, had they not been moved, would show a skipped time now; or show one again."""
        return self.at <= moment < self.at + abs(self.length)

    @property
    def end(self) -> datetime:
        """The local time just before which the skipped or the repeated times end."""
        return wall(self.at, max(self.before, self.after)) - SECOND


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron expression of five fields, or of six with the seconds last, in a time zone."""

    text: str
    timezone: str = "UTC"
    _zone: ZoneInfo = field(init=False, repr=False, compare=False)
    _fields: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises BadSchedule."""
        object.__setattr__(self, "_zone", zone_of(self.timezone))
        object.__setattr__(self, "_fields", parsed(self.text))

    def next_tick(self, after: datetime) -> datetime:
        return self._next_in_real_time(after) if self._fields.expanded[1] == ALL_HOURS else self._next_nominal(after)

    def ticks(self, after: datetime, until: datetime, most: int) -> Ticks:
        total = self._count(after, until, most + MOST_COUNTED)
        if total > most:
            after = self._start_of_newest(after, until, most)
        return Ticks(tuple(self._between(after, until)), total)

    def _between(self, after: datetime, until: datetime) -> Iterator[datetime]:
        while (after := self.next_tick(after)) <= until:
            yield after

    def _count(self, after: datetime, until: datetime, most: int) -> int:
        return sum(1 for _ in islice(self._between(after, until), most))

    def _start_of_newest(self, after: datetime, until: datetime, most: int) -> datetime:
        """A time after which there are exactly `most` ticks: two ticks are a second apart or more."""
        low, high = after, until
        while high - low > SECOND:
            middle = low + (high - low) / 2
            low, high = (middle, high) if self._count(middle, until, most + 1) > most else (low, middle)
        return high

    # -- in every hour: real time

    def _next_in_real_time(self, after: datetime) -> datetime:
        """The next instant at which the clocks show a time of the expression."""
        start = since = after
        while True:
            offset = offset_of(self._zone, since)
            found = utc(self._next_wall(wall(start, offset)), offset)
            shift = first_shift(self._zone, since, found)
            if shift is None:
                return found
            start, since = shift - SECOND, shift  # from here on the clocks show other times

    # -- at certain hours: local times, each once

    def _next_nominal(self, after: datetime) -> datetime:
        here = wall(after, offset_of(self._zone, after))
        shift = last_shift(self._zone, after)
        starts = [here]
        if shift is not None and shift.covers(after):
            # Clocks that went forward: what they skipped is still to come. Back: what they repeat is over.
            starts = [here, here - shift.length] if shift.length > timedelta(0) else [shift.end]
        found = min(self._instant_after(start, after) for start in starts)
        gap = last_shift(self._zone, found)
        if gap is not None and gap.length > timedelta(0) and gap.covers(found):
            # It may be a skipped time, and then one that the clocks do show can come before it.
            found = min(found, self._instant_after(max(here, gap.end), after))
        return found

    def _instant_after(self, local: datetime, after: datetime) -> datetime:
        while True:
            local = self._next_wall(local)
            # Without fold, Python reads a repeated time as the first and a skipped one with the offset before the gap.
            instant = local.replace(tzinfo=self._zone).astimezone(UTC)
            if instant > after:
                return instant

    def _next_wall(self, local: datetime) -> datetime:
        """The next local time of the expression, on clocks that are never moved."""
        walk = copy(self._fields)  # it remembers where it is, and may be asked from several threads
        found: datetime = walk.get_next(datetime, start_time=local.replace(microsecond=0))
        return found


def next_tick(cron: str, timezone: str, after: datetime) -> datetime:
    """The first tick of a cron schedule later than `after`, in UTC. Raises BadSchedule."""
    if after.tzinfo is None:
        raise BadSchedule("after", after, "needs a time zone, e.g. datetime.now(UTC)")
    return Cron(cron, timezone).next_tick(after)


def make_trigger(every: float | timedelta | None, cron: str | None, timezone: str) -> Trigger:
    """Raises BadSchedule naming the value and the rule that it breaks."""
    if (every is None) == (cron is None):
        raise BadSchedule("every, cron", (every, cron), "give exactly one of them")
    zone_of(timezone)
    return Cron(cron, timezone) if cron is not None else Every.of(every or 0)


def checked_misfire(misfire: str) -> Misfire:
    """Raises BadSchedule."""
    for known in get_args(Misfire):
        if misfire == known:
            return known  # type: ignore[no-any-return]
    raise BadSchedule("misfire", misfire, f"must be one of {', '.join(map(repr, get_args(Misfire)))}")


# -- which ticks to fire


@dataclass(frozen=True, slots=True)
class Due:
    """What a schedule owes at one moment."""

    ticks: tuple[datetime, ...] = ()
    """To fire, oldest first."""
    missed: int = 0
    """Ticks that are not made up for; of a cron expression counted up to MOST_COUNTED."""
    handled: datetime | None = None
    """The newest tick that has come; None when none has."""


def due_ticks(trigger: Trigger, after: datetime, now: datetime, misfire: Misfire) -> Due:
    """The ticks of (after, now] that are to be fired. Those that are on time always are."""
    first = trigger.next_tick(after)
    if first > now:
        return Due()
    found = trigger.ticks(after, now, MOST_ON_TIME)
    ticks = found.newest
    if first < now - GRACE:
        match misfire:
            case "skip":
                ticks = tuple(tick for tick in ticks if tick >= now - GRACE)
            case "once":
                ticks = ticks[-1:]
            case "all":
                ticks = ticks[-MISFIRE_CAP:]
    return Due(ticks, found.total - len(ticks), found.newest[-1])


# -- cron expressions and zones


def parsed(text: str) -> Any:
    """croniter's reading of an expression. Raises BadSchedule for one that is wrong, left to chance, or never due."""
    if not isinstance(text, str):
        raise BadSchedule("cron", text, "must be a string of five fields")
    fields = text.split()
    if len(fields) == 7:
        raise BadSchedule("cron", text, "a year is not supported, because a schedule must always have a next tick")
    if any(BY_CHANCE.fullmatch(name) for name in fields):
        raise BadSchedule("cron", text, "H and R stand for numbers on which instances could not agree; write numbers")
    try:
        found = croniter(text, EPOCH.replace(tzinfo=None))
        found.get_next(datetime)
    except (ValueError, LookupError) as error:
        raise BadSchedule("cron", text, f"is not a cron expression that is ever due ({error})") from error
    return found


def zone_of(name: str) -> ZoneInfo:
    """Raises BadSchedule for a name that is no time zone."""
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError, TypeError, AttributeError) as error:
        raise BadSchedule("timezone", name, "is no IANA time zone, such as 'Europe/London'") from error


def offset_of(zone: ZoneInfo, moment: datetime) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta(0)


def wall(moment: datetime, offset: timedelta) -> datetime:
    """What clocks show, as a time without zone."""
    return moment.astimezone(UTC).replace(tzinfo=None) + offset


def utc(local: datetime, offset: timedelta) -> datetime:
    return (local - offset).replace(tzinfo=UTC)


def last_shift(zone: ZoneInfo, moment: datetime) -> Shift | None:
    """How the clocks were moved within the day before that moment."""
    before, after = offset_of(zone, moment - DAY), offset_of(zone, moment)
    return None if before == after else Shift(find_shift(zone, moment - DAY, moment), before, after)


def first_shift(zone: ZoneInfo, after: datetime, until: datetime) -> datetime | None:
    """When the clocks are moved first in (after, until]."""
    offset = offset_of(zone, after)
    while after < until:
        next_day = min(after + DAY, until)
        if offset_of(zone, next_day) != offset:
            return find_shift(zone, after, next_day)
        after = next_day
    return None


def find_shift(zone: ZoneInfo, early: datetime, late: datetime) -> datetime:
    """The second in (early, late] at which the offset changes: it does once."""
    offset = offset_of(zone, early)
    early, late = early.replace(microsecond=0), late.replace(microsecond=0)
    while late - early > SECOND:
        middle = (early + (late - early) / 2).replace(microsecond=0)
        early, late = (middle, late) if offset_of(zone, middle) == offset else (early, middle)
    return late
