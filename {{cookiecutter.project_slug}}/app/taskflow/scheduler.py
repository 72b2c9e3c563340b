"""Fires what is due: one loop that sleeps until the next tick of any schedule.

Owns when each schedule is looked at next. The manager starts it once this instance is known and stops it before the
drain; processes that only accept tasks declare their schedules and fire nothing. The invariant: memory moves on only
after the database has. A tick is due until its commit is confirmed, here or by another instance, so neither an outage
nor an error can lose it; what became late meanwhile is the misfire policy's to decide, from the stored last tick.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from heapq import heapify, heappop, heappush

from .backends.base import DeclaredSchedule, DeclareSchedules, Fire, Firing, Mark
from .errors import BackendUnavailable
from .journal import Journal
from .loops import Loop, pause_after
from .schedules import Schedule, Schedules
from .ticks import Due, Every, Trigger, due_ticks, next_tick

__all__ = ["PeriodicScheduler", "next_tick"]

logger = logging.getLogger("taskflow")

LONGEST_SLEEP = 1.0
"""Seconds after which the clock is looked at again: it may have been moved."""
MOST_AT_ONCE = 1_000
"""Ticks that one command fires, or a few more."""
STARTUP_WINDOW = timedelta(minutes=1)
"""Instances that start within this time run a cron schedule's `run_on_startup` once; of an interval, within one."""
SKEW = timedelta(minutes=1)
"""A stored last tick that lies further ahead was written by a clock that was wrong: it says nothing about now."""
BROKEN_PAUSE = timedelta(minutes=1)
"""After which a schedule that cannot be fired is tried again."""


@dataclass(slots=True)
class Entry:
    """What is remembered of one schedule between its ticks."""

    schedule: Schedule
    last_tick: datetime
    """As it was stored when we last heard of it."""
    start: datetime
    """Ticks after this are open: the last tick, or where a clock that went back began anew."""

    def begin(self, now: datetime) -> datetime:
        """Opens the ticks after the last one. Returns the next."""
        self.start = self.last_tick if self.last_tick <= now + SKEW else now
        return self.schedule.trigger.next_tick(self.start)


class PeriodicScheduler:
    def __init__(self, schedules: Schedules, journal: Journal, *, clock: Callable[[], datetime]) -> None:
        self._schedules = schedules
        self._journal = journal
        self._clock = clock
        self._loop = Loop("scheduler", self._round)
        self._fires = True
        self._introduced = asyncio.Event()
        self._wake = asyncio.Event()
        self._entries: dict[str, Entry] = {}
        self._order: list[tuple[datetime, str]] = []
        """A heap of (when to look at it, name), of every entry but those that are being fired."""
        self._firing = False
        self._seen: datetime | None = None
        """The clock at the last look."""
        self._failures = 0
        self.declared = asyncio.Event()
        """Set once the database knows this process's schedules."""

    # -- lifecycle

    def start(self, introduced: asyncio.Event, *, fires: bool) -> None:
        """Begins after `introduced`: what an unknown instance fires and runs could not be rescued."""
        self._fires, self._introduced = fires, introduced
        self._wake, self.declared = asyncio.Event(), asyncio.Event()
        self._entries, self._order, self._seen, self._failures, self._firing = {}, [], None, 0, False
        self._loop.start()

    async def stop(self) -> None:
        await self._loop.stop()

    def wake(self) -> None:
        """Looks at the clock now. From the event loop's thread."""
        self._wake.set()

    # -- for tests of schedules

    @property
    def next_look(self) -> datetime | None:
        """When something may be due next; None when nothing will be."""
        return self._order[0][0] if self._order and self._fires else None

    @property
    def behind(self) -> bool:
        """Whether a schedule is not known to the database yet, or is due and its firing is not settled."""
        if self._firing or self._unknown():
            return True
        return self.next_look is not None and self.next_look <= self._clock()

    # -- the loop

    async def _round(self) -> None:
        await self._introduced.wait()
        try:
            await self._declare()
            await self._until_due()
            if self._fires:
                await self._fire_due()
        except BackendUnavailable:
            self._failures += 1
            await asyncio.sleep(pause_after(self._failures))
        else:
            self._failures = 0

    async def _declare(self) -> None:
        if unknown := self._unknown():
            answer = await self._journal.obey(DeclareSchedules([self._declaration(schedule) for schedule in unknown]))
            for schedule in unknown:
                self._remember(schedule, answer.marks[schedule.name])
        self.declared.set()

    def _unknown(self) -> Sequence[Schedule]:
        return [schedule for schedule in self._schedules if schedule.name not in self._entries]

    def _declaration(self, schedule: Schedule) -> DeclaredSchedule:
        declared = self._schedules.declaration(schedule)
        if not (self._fires and schedule.plan.run_on_startup):
            return declared
        return replace(
            declared, at_startup=self._schedules.draft(schedule), startup_window=startup_window(schedule.trigger)
        )

    def _remember(self, schedule: Schedule, mark: Mark) -> None:
        self._entries[schedule.name] = entry = Entry(schedule, mark.last_tick, mark.last_tick)
        self._learn(entry, mark)

    def _learn(self, entry: Entry, mark: Mark) -> None:
        """What the database says of a schedule decides when it is looked at next. A paused one is looked at with each
        of its ticks: it may have been resumed elsewhere."""
        entry.last_tick = mark.last_tick
        self._look_again(entry, self._next_look(entry, paused=mark.paused))

    def _next_look(self, entry: Entry, *, paused: bool = False) -> datetime:
        """One schedule that is broken must not keep the others from being fired."""
        now = self._clock()
        try:
            tick = entry.begin(now)
            return max(tick, entry.schedule.trigger.next_tick(now)) if paused else tick
        except Exception:
            logger.exception("schedule %s: its next tick cannot be told; it is tried again", entry.schedule.name)
            return now + BROKEN_PAUSE

    def _look_again(self, entry: Entry, at: datetime) -> None:
        heappush(self._order, (at, entry.schedule.name))

    async def _until_due(self) -> None:
        self._look_at_the_clock()
        seconds = LONGEST_SLEEP
        if self.next_look is not None:
            seconds = min(seconds, (self.next_look - self._clock()).total_seconds())
        if seconds > 0:
            try:
                async with asyncio.timeout(seconds):
                    await self._wake.wait()
            except TimeoutError:
                pass
        self._wake.clear()
        self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        """A clock that was put back makes every memory of a next look too late."""
        now = self._clock()
        if self._seen is not None and now < self._seen:
            self._order = [(self._next_look(entry), name) for name, entry in self._entries.items()]
            heapify(self._order)
        self._seen = now

    # -- firing

    async def _fire_due(self) -> None:
        while firings := self._collect():
            self._firing = True
            try:
                answer = await self._journal.obey(Fire(firings))
            except BaseException:
                for firing in firings:  # still due: the next try asks again what is owed by then
                    self._look_again(self._entries[firing.schedule], firing.until)
                raise
            else:
                for firing in firings:
                    self._settle(firing, answer.marks.get(firing.schedule))
            finally:
                self._firing = False

    def _collect(self) -> Sequence[Firing]:
        """What some of the schedules owe that are to be looked at now."""
        now = self._clock()
        firings: list[Firing] = []
        ticks = 0
        while self._order and self._order[0][0] <= now and ticks < MOST_AT_ONCE:
            entry = self._entries[heappop(self._order)[1]]
            if (firing := self._owed(entry)) is not None:
                firings.append(firing)
                ticks += max(1, len(firing.drafts))
        return firings

    def _owed(self, entry: Entry) -> Firing | None:
        """What to fire of one schedule; when there is nothing, or it is broken, it is looked at again later."""
        trigger, now = entry.schedule.trigger, self._clock()
        try:
            due = due_ticks(trigger, entry.start, now, entry.schedule.plan.misfire)
            if due.handled is not None:
                return self._owing(entry, due, due.handled)
            self._look_again(entry, trigger.next_tick(entry.start))
        except Exception:
            logger.exception("schedule %s cannot be fired; it is tried again", entry.schedule.name)
            self._look_again(entry, now + BROKEN_PAUSE)
        return None

    def _owing(self, entry: Entry, due: Due, handled: datetime) -> Firing:
        schedule, plan = entry.schedule, entry.schedule.plan
        return Firing(
            schedule=schedule.name,
            since=entry.last_tick,
            until=handled,
            next_tick=plan.trigger.next_tick(handled),
            drafts=[self._schedules.draft(schedule, tick) for tick in due.ticks],
            overlap=plan.overlap,
            missed=missed_words(due.missed, entry.start, handled, plan.misfire) if due.missed else None,
        )

    def _settle(self, firing: Firing, mark: Mark | None) -> None:
        entry = self._entries[firing.schedule]
        if mark is None:
            del self._entries[firing.schedule]  # its row is gone: it is declared again
            return
        self._learn(entry, mark)
        if firing.missed is not None and mark.last_tick == firing.until:
            logger.warning("schedule %s: %s", firing.schedule, firing.missed)


def startup_window(trigger: Trigger) -> timedelta:
    return timedelta(microseconds=trigger.micros) if isinstance(trigger, Every) else STARTUP_WINDOW


def missed_words(missed: int, start: datetime, end: datetime, misfire: str) -> str:
    return f"{missed} ticks after {start.isoformat()}, up to {end.isoformat()}, were missed (misfire={misfire!r})"
