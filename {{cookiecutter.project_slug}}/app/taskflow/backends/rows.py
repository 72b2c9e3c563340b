"""Rows as values and values as rows: how each column is written and read.

Owns the conversions that the SQL modules share. Nothing here touches a connection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Row

from ..models import (
    DELAYED,
    LogEntry,
    ScheduledOnce,
    ScheduleState,
    TaskEvent,
    TaskRecord,
    TaskStatus,
    from_micros,
    to_micros,
)
from .base import Claimed, Draft, Moved
from .cells import broken_words, mended

STATUSES: Mapping[str, TaskStatus] = {status.value: status for status in TaskStatus}


def micros(value: datetime | None) -> int | None:
    return None if value is None else to_micros(value)


def moment(value: int | None) -> datetime | None:
    return None if value is None else from_micros(value)


def stored_status(status: TaskStatus, run_at: datetime | None, now: datetime) -> str:
    return DELAYED if status is TaskStatus.PENDING and run_at is not None and run_at > now else status


def status_of(row: Row[Any]) -> TaskStatus:
    return shown_status(row.status)


def shown_status(stored: str) -> TaskStatus:
    """As readers see it: to them a delayed task is pending, and one whose status nobody knows has failed."""
    if stored == DELAYED:
        return TaskStatus.PENDING
    return STATUSES.get(stored, TaskStatus.FAILED)


def dumps_object(value: Mapping[str, Any]) -> str:
    return json.dumps(value, default=str) if value else "{}"


def loads_object(text: str | None) -> dict[str, Any]:
    """A broken cell shows as empty: one bad row must never stop a turn or a page."""
    if not text or text == "{}":
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def held_claim(cells: Sequence[Any]) -> Claimed:
    """A task that is running, from the cells of `statements.CLAIMED_COLUMNS`."""
    *_, attempt, started_at = cells
    return claimed_of(cells, attempt, from_micros(started_at))


def next_claim(cells: Sequence[Any], now: datetime) -> Claimed:
    """What a task that is ready becomes when it is claimed, from the same cells."""
    return claimed_of(cells, cells[-2] + 1, now)


def claimed_of(cells: Sequence[Any], attempt: int, started_at: datetime) -> Claimed:
    task_id, name, queue, executor, excused, max_attempts, arguments, tags, requeue, trace, created_at, _, _ = cells
    return Claimed(
        task_id,
        name,
        queue,
        executor,
        attempt,
        excused,
        max_attempts,
        started_at,
        arguments,
        loads_object(tags),
        bool(requeue),
        trace,
        from_micros(created_at),
    )


def first_claim(draft: Draft, started_at: datetime) -> Claimed:
    """A draft that is stored as running: what a claim would read back."""
    return Claimed(
        draft.task_id,
        draft.name,
        draft.queue,
        draft.executor,
        1,  # attempt
        0,  # excused
        draft.max_attempts,
        started_at,
        draft.arguments,
        draft.tags,
        draft.requeue,
        draft.trace,
        draft.created_at,
    )


def moved_of(row: Row[Any], status: TaskStatus, at: datetime, **facts: Any) -> Moved:
    """What a command made of a task; `row` is what it was before."""
    values = {"attempt": row.attempt, "excused": row.excused, **facts}
    return Moved(row.task_id, row.name, loads_object(row.tags), status, at, **values)


def event_of(stored: Row[Any]) -> TaskEvent:
    row, _ = mended(stored)
    return TaskEvent(
        seq=row.seq,
        task_id=row.task_id,
        time=from_micros(row.at),
        kind=row.kind,
        attempt=row.attempt,
        instance=row.instance,
        actor=row.actor,
        detail=row.detail,
    )


def log_of(stored: Row[Any]) -> LogEntry:
    row, _ = mended(stored)
    return LogEntry(
        seq=row.seq,
        task_id=row.task_id,
        time=from_micros(row.at),
        level=row.level,
        attempt=row.attempt,
        message=row.message,
        extra=loads_object(row.extra),
    )


def record_of(stored: Row[Any]) -> TaskRecord:
    """A record from a whole row, or from a list's row without the heavy columns. One that is broken says so."""
    row, broken = mended(stored)
    if row.status != DELAYED and row.status not in STATUSES:
        broken = [*broken, f"status {row.status!r:.40}"]
    error = row.error
    if broken:
        error = broken_words(broken) + (f"; {error}" if error else "")
    return TaskRecord(
        task_id=row.task_id,
        func_name=row.name,
        status=status_of(row),
        queue=row.queue,
        priority=row.priority,
        executor=row.executor,
        source=row.source,
        tags=loads_object(row.tags),
        created_at=from_micros(row.created_at),
        run_at=from_micros(row.run_at),
        start_time=moment(row.started_at),
        end_time=moment(row.finished_at),
        attempt=row.attempt,
        excused=row.excused,
        max_attempts=row.max_attempts,
        error=error,
        stacktrace=getattr(row, "stacktrace", None),
        arguments=getattr(row, "arguments", None),
        result=row.result,
        progress=loads_object(row.progress) if row.progress else None,
        instance=row.instance,
        idempotency_key=row.idempotency_key,
        cancel_requested=bool(row.cancel_requested),
        retry_of=row.retry_of,
        schedule=row.schedule,
        run_key=row.run_key,
    )


def schedule_of(stored: Row[Any]) -> ScheduleState:
    """From a schedule's row with `last_status`, the stored status of its last task."""
    row, _ = mended(stored)
    last = row.last_status
    return ScheduleState(
        name=row.name,
        func_name=row.func_name,
        trigger=row.trigger,
        timezone=row.timezone,
        overlap=bool(row.overlap),
        misfire=row.misfire,
        paused=bool(row.paused),
        reason=row.reason,
        last_tick=from_micros(row.last_tick),
        next_tick=moment(row.next_tick),
        last_run=moment(row.last_run),
        last_task_id=row.last_task_id,
        last_status=None if last is None else shown_status(last),
    )


def one_off_of(stored: Row[Any]) -> ScheduledOnce:
    row, _ = mended(stored)
    return ScheduledOnce(
        run_key=row.run_key,
        task_id=row.task_id,
        func_name=row.name,
        fire_at=from_micros(row.run_at),
        queue=row.queue,
        priority=row.priority,
        tags=loads_object(row.tags),
        created_at=from_micros(row.created_at),
    )
