"""Schedules inside a turn: what the code declares, the ticks that are due, what operators do to them.

The invariant: a tick is fired in the turn that moves the schedule's last tick on to it, and only from where it stood
when the tick was computed. So however many instances fire a tick, one task results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from ..backends.base import Answer, DeclaredSchedule, Draft, EditSchedule, Firing, Mark
from ..backends.changes import Advance, StoredSchedule
from ..backends.stored import micros
from ..models import EventKind, from_micros, schedule_subject, to_micros
from .work import Work

# -- what the code declares


def declare(work: Work, declared: Sequence[DeclaredSchedule]) -> Answer:
    for item in declared:
        known = work.snapshot.schedules.get(item.name)
        if known is None:
            _set(work, item.name, last_tick=work.now, next_tick=to_micros(item.next_tick), paused=False, **facts(item))
        else:
            _redeclare(work, item, known)
    for item in declared:
        if item.at_startup is not None:
            _run_at_startup(work, item, item.at_startup)
    return Answer(marks=_marks(work, [item.name for item in declared]))


def _redeclare(work: Work, item: DeclaredSchedule, known: StoredSchedule) -> None:
    changes: dict[str, Any] = {name: value for name, value in facts(item).items() if getattr(known, name) != value}
    if "trigger" in changes or "timezone" in changes:  # else all ticks of the new one would count as missed
        changes |= {"last_tick": work.now, "next_tick": to_micros(item.next_tick)}
    if changes:
        _set(work, item.name, **changes)


def facts(item: DeclaredSchedule) -> dict[str, str | bool]:
    """What the code alone decides."""
    return {
        "func_name": item.func_name,
        "trigger": item.trigger,
        "timezone": item.timezone,
        "overlap": item.overlap,
        "misfire": item.misfire,
    }


def _run_at_startup(work: Work, item: DeclaredSchedule, draft: Draft) -> None:
    known = work.snapshot.schedules[item.name]
    if known.paused or _just_started(work, item, known.started_at):
        return
    if item.name in work.snapshot.live and not item.overlap:
        _skip(work, item.name, draft.run_at)
        return
    work.drafts.append(draft)
    work.snapshot.schedules = {**work.snapshot.schedules, item.name: known._replace(started_at=work.now)}
    work.changes.advances.append(
        Advance(item.name, last_run=work.now, last_task_id=draft.task_id, started_at=work.now, before=known.started_at)
    )


def _just_started(work: Work, item: DeclaredSchedule, started_at: int | None) -> bool:
    if started_at is None:
        return False
    return 0 <= work.now - started_at < item.startup_window.total_seconds() * 1_000_000


# -- ticks


def fire(work: Work, firings: Sequence[Firing]) -> Answer:
    marks = _marks(work, [firing.schedule for firing in firings])
    live = set(work.snapshot.live)
    fired_schedules = 0
    for firing in firings:
        mark = marks.get(firing.schedule)
        if mark is None or mark.paused or mark.last_tick != firing.since:
            continue
        if firing.missed is not None:
            subject = schedule_subject(firing.schedule)
            work.changes.event(EventKind.TICK_SKIPPED, subject, detail=firing.missed)
        fired = _fired(work, firing, live)
        run, task_id = (to_micros(fired[-1].run_at), fired[-1].task_id) if fired else (None, None)
        since, until = to_micros(firing.since), to_micros(firing.until)
        work.changes.advances.append(Advance(firing.schedule, since, until, to_micros(firing.next_tick), run, task_id))
        work.drafts += fired
        marks[firing.schedule] = replace(mark, last_tick=firing.until)
        fired_schedules += 1
    return Answer(changed=fired_schedules, marks=marks)


def _fired(work: Work, firing: Firing, live: set[str]) -> list[Draft]:
    """The drafts that may become tasks; the others are recorded as skipped."""
    fired = []
    for draft in firing.drafts:
        if firing.schedule in live and not firing.overlap:
            _skip(work, firing.schedule, draft.run_at)
            continue
        fired.append(draft)
        live.add(firing.schedule)
    return fired


def _skip(work: Work, name: str, tick: datetime) -> None:
    words = f"{tick.isoformat()}: one of its tasks still waits or runs, and overlap=False"
    work.changes.event(EventKind.TICK_SKIPPED, schedule_subject(name), detail=words)


# -- what operators do


def edit(work: Work, command: EditSchedule) -> Answer:
    known = work.snapshot.schedules.get(command.name)
    if known is None:
        return Answer()
    values: dict[str, Any] = {"paused": command.paused, "reason": command.reason}
    if known.paused and not command.paused:  # a pause is no misfire
        values |= {"last_tick": work.now, "next_tick": micros(command.next_tick) or known.next_tick}
    _set(work, command.name, **values)
    detail = {"schedule": command.name, "note": command.reason}
    work.changes.event(command.kind, "", actor=command.actor or "", detail=json.dumps(detail))
    return Answer(changed=1)


def run(work: Work, name: str, task_id: str, actor: str | None) -> Answer:
    work.changes.advances.append(Advance(name, last_run=work.now, last_task_id=task_id))
    detail = json.dumps({"schedule": name})
    work.changes.event(EventKind.RUN_SCHEDULE, task_id, actor=actor or "", detail=detail)
    return Answer(changed=1)


# -- rows


def _set(work: Work, name: str, **values: Any) -> None:
    known = work.snapshot.schedules.get(name) or StoredSchedule(name, "", "", "", True, "", False, 0, None, None)
    kept = {column: value for column, value in values.items() if column in StoredSchedule._fields}
    work.snapshot.schedules = {**work.snapshot.schedules, name: known._replace(**kept)}
    work.changes.schedules.append((name, values))


def _marks(work: Work, names: Sequence[str]) -> dict[str, Mark]:
    """Those that are stored, as they are by now."""
    found = (work.snapshot.schedules.get(name) for name in names)
    return {
        row.name: Mark(from_micros(row.last_tick), row.paused) for row in found if row is not None and not row.broken
    }
