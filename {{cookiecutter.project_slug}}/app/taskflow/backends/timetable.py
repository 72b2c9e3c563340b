"""Schedules inside a turn: what the code declares, the ticks that are due, what operators do to them.

Owns the rows of schedules. The invariant: a tick is fired in the transaction that moves the schedule's last tick on to
it, and only from where it stood when the tick was computed. So however many instances fire a tick, one task results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from ..models import EventKind, from_micros, schedule_subject, to_micros
from .base import Answer, DeclaredSchedule, Draft, EditSchedule, Firing, Mark
from .cells import is_sound, unreadable
from .ledger import Ledger
from .rows import micros
from .statements import Cursor, Statements, one_column
from .tables import schedule

Advance = tuple[str, int | None, int | None, int | None, str | None, int | None]
"""For `Statements.advance`: name, last_tick, next_tick, last_run, last_task_id, started_at; None: as it was."""


class Timetable:
    def __init__(
        self, connection: Connection, cursor: Cursor, statements: Statements, ledger: Ledger, now: datetime
    ) -> None:
        self._connection = connection
        self._cursor = cursor
        self._sql = statements
        self._ledger = ledger
        self._at = to_micros(now)
        self.drafts: list[Draft] = []
        """Tasks that this turn's commands brought."""

    # -- what the code declares

    def declare(self, declared: Sequence[DeclaredSchedule]) -> Answer:
        known = {row.name: row for row in self._connection.execute(sa.select(schedule)).all()}
        new = [self._new_row(item) for item in declared if item.name not in known]
        if new:
            self._connection.execute(self._sql.insert(schedule).on_conflict_do_nothing(), new)
        for item in declared:
            if item.name in known:
                self._redeclare(item, known[item.name])
        self._run_at_startup(declared, known)
        return Answer(marks=self._marks([item.name for item in declared]))

    def _new_row(self, item: DeclaredSchedule) -> dict[str, Any]:
        return {"name": item.name, "last_tick": self._at, "next_tick": to_micros(item.next_tick), **facts_of(item)}

    def _redeclare(self, item: DeclaredSchedule, row: Row[Any]) -> None:
        changes: dict[str, Any] = {name: value for name, value in facts_of(item).items() if row._mapping[name] != value}
        if "trigger" in changes or "timezone" in changes:  # else all ticks of the new one would count as missed
            changes |= {"last_tick": self._at, "next_tick": to_micros(item.next_tick)}
        if changes:
            self._connection.execute(schedule.update().where(schedule.c.name == item.name).values(changes))

    def _run_at_startup(self, declared: Sequence[DeclaredSchedule], known: Mapping[str, Row[Any]]) -> None:
        live = self._live([item.name for item in declared if item.at_startup and not item.overlap])
        for item in declared:
            row = known.get(item.name)
            if item.at_startup is None or (row is not None and row.paused) or self._just_started(item, row):
                continue
            if item.name in live:
                self._skip(item.name, item.at_startup.run_at)
                continue
            self.drafts.append(item.at_startup)
            self._advance([(item.name, None, None, self._at, item.at_startup.task_id, self._at)])

    def _just_started(self, item: DeclaredSchedule, row: Row[Any] | None) -> bool:
        if row is None or row.started_at is None or not is_sound("started_at", row.started_at):
            return False
        return bool(0 <= self._at - row.started_at < item.startup_window.total_seconds() * 1_000_000)

    # -- ticks

    def fire(self, firings: Sequence[Firing]) -> Answer:
        marks = self._marks([firing.schedule for firing in firings])
        live = self._live([firing.schedule for firing in firings if not firing.overlap])
        rows: list[Advance] = []
        for firing in firings:
            mark = marks.get(firing.schedule)
            if mark is None or mark.paused or mark.last_tick != firing.since:
                continue
            if firing.missed is not None:
                self._ledger.event(EventKind.TICK_SKIPPED, schedule_subject(firing.schedule), detail=firing.missed)
            fired = self._fired(firing, live)
            run, task_id = (to_micros(fired[-1].run_at), fired[-1].task_id) if fired else (None, None)
            rows.append((firing.schedule, to_micros(firing.until), to_micros(firing.next_tick), run, task_id, None))
            self.drafts += fired
            marks[firing.schedule] = Mark(firing.until, paused=False)
        self._advance(rows)
        return Answer(changed=len(rows), marks=marks)

    def _fired(self, firing: Firing, live: set[str]) -> list[Draft]:
        """The drafts that may become tasks; the others are recorded as skipped."""
        fired = []
        for draft in firing.drafts:
            if firing.schedule in live:
                self._skip(firing.schedule, draft.run_at)
                continue
            fired.append(draft)
            if not firing.overlap:
                live.add(firing.schedule)
        return fired

    def _skip(self, name: str, tick: datetime) -> None:
        words = f"{tick.isoformat()}: one of its tasks still waits or runs, and overlap=False"
        self._ledger.event(EventKind.TICK_SKIPPED, schedule_subject(name), detail=words)

    # -- what operators do

    def edit(self, edit: EditSchedule) -> Answer:
        row = self._connection.execute(sa.select(schedule).where(schedule.c.name == edit.name)).first()
        if row is None:
            return Answer()
        changes: dict[str, Any] = {"paused": edit.paused, "reason": edit.reason}
        if row.paused and not edit.paused:
            changes |= {"last_tick": self._at, "next_tick": micros(edit.next_tick) or row.next_tick}
        self._connection.execute(schedule.update().where(schedule.c.name == edit.name).values(changes))
        detail = {"schedule": edit.name, "note": edit.reason}
        self._ledger.event(edit.kind, "", actor=edit.actor or "", detail=json.dumps(detail))
        return Answer(changed=1)

    def run(self, name: str, task_id: str, actor: str | None) -> Answer:
        self._advance([(name, None, None, self._at, task_id, None)])
        self._ledger.event(EventKind.RUN_SCHEDULE, task_id, actor=actor or "", detail=json.dumps({"schedule": name}))
        return Answer(changed=1)

    # -- rows

    def _marks(self, names: Sequence[str]) -> dict[str, Mark]:
        found = self._sql.marks.rows(self._cursor, rows=one_column(names))
        sound = (row for row in found if not unreadable(("name", "last_tick", "paused"), row))
        return {name: Mark(from_micros(last_tick), bool(paused)) for name, last_tick, paused in sound}

    def _live(self, names: Sequence[str]) -> set[str]:
        """Those of which a task waits or runs."""
        if not names:
            return set()
        return {name for (name,) in self._sql.live_runs.rows(self._cursor, rows=one_column(names))}

    def _advance(self, rows: Sequence[Advance]) -> None:
        if rows:
            self._sql.advance.change(self._cursor, rows)


def facts_of(item: DeclaredSchedule) -> dict[str, str | bool]:
    """What the code alone decides."""
    return {
        "func_name": item.func_name,
        "trigger": item.trigger,
        "timezone": item.timezone,
        "overlap": item.overlap,
        "misfire": item.misfire,
    }
