"""Rows as values: how each column is read.

Owns the conversions of whole rows, for those who show them. Nothing here touches a connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from sqlalchemy.engine import Row

from ..models import (
    DELAYED,
    Cursor,
    ErrorGroup,
    InstanceRecord,
    LogEntry,
    ScheduledOnce,
    ScheduleState,
    TaskEvent,
    TaskPage,
    TaskRecord,
    from_micros,
)
from .base import Instance, Pulse
from .stored import STATUSES, broken_words, loads_object, moment, shown_status, vitals_of


def event_of(row: Row[Any] | SimpleNamespace) -> TaskEvent:
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


def log_of(row: Row[Any] | SimpleNamespace) -> LogEntry:
    return LogEntry(
        seq=row.seq,
        task_id=row.task_id,
        time=from_micros(row.at),
        level=row.level,
        attempt=row.attempt,
        message=row.message,
        extra=loads_object(row.extra),
    )


def record_of(row: Row[Any] | SimpleNamespace) -> TaskRecord:
    """From a whole row, or from a list's row without the heavy columns. One that is broken says so."""
    broken = getattr(row, "broken", ()) if isinstance(row, SimpleNamespace) else ()
    if row.status != DELAYED and row.status not in STATUSES:
        broken = [*broken, f"status {row.status!r:.40}"]
    error = row.error
    if broken:
        error = broken_words(broken) + (f"; {error}" if error else "")
    return TaskRecord(
        task_id=row.task_id,
        func_name=row.name,
        status=shown_status(row.status),
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
        stacktrace=row.stacktrace,
        arguments=row.arguments or None,
        result=row.result,
        progress=loads_object(row.progress) if row.progress else None,
        instance=row.instance,
        idempotency_key=row.idempotency_key,
        cancel_requested=bool(row.cancel_requested),
        retry_of=row.retry_of,
        schedule=row.schedule,
        run_key=row.run_key,
        error_key=row.error_key,
        dismissed=row.dismissed_at is not None,
    )


def schedule_of(row: Row[Any] | SimpleNamespace) -> ScheduleState:
    """From a schedule's row with `last_status`, the stored status of its last task."""
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


def one_off_of(row: Row[Any] | SimpleNamespace) -> ScheduledOnce:
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


def group_of(row: Row[Any] | SimpleNamespace) -> ErrorGroup:
    return ErrorGroup(
        key=row.error_key,
        func_name=row.name,
        error_type=row.error_type,
        message=row.message,
        frame=row.frame,
        first_at=from_micros(row.first_at),
        last_at=from_micros(row.last_at),
        open=row.open,
        dismissed=row.dismissed,
    )


def page_of(rows: Sequence[Row[Any] | SimpleNamespace], limit: int) -> TaskPage:
    """Of one row more than it shows, where there are more."""
    records = [record_of(row) for row in rows[:limit]]
    older = Cursor(records[-1].created_at, records[-1].task_id) if len(rows) > limit else None
    return TaskPage(records, older)


def pulse_of(row: Any) -> Pulse:
    """Of the owner of a lease or of tasks. Without a row of its own, its other cells are empty."""
    return Pulse(
        Instance(
            instance_id=row.owner,
            host=row.host or "",
            machine=row.machine or "",
            pid=row.pid or 0,
            birth=row.birth or "",
            version=row.version or "",
            started=from_micros(row.started_at or 0),
        ),
        stamp=row.beat_at or 0,
        lease=max(0, (row.lease_until or 0) - (row.beat_at or 0)) / 1e6,
    )


def instance_of(row: Row[Any] | SimpleNamespace) -> InstanceRecord:
    return InstanceRecord(
        instance_id=row.instance_id,
        host=row.host,
        pid=row.pid,
        version=row.version,
        started=from_micros(row.started_at or 0),
        heartbeat=from_micros(row.beat_at),
        slots=row.slots,
        running=row.running,
        vitals=vitals_of(row.vitals),
    )
