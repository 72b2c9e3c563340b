"""How values are stored, whatever the store: statuses, times, JSON objects, and what a claim makes of a row. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..models import DELAYED, Count, QueueState, TaskStatus, Vitals, from_micros, to_micros
from .base import Beat, Claimed, Draft, Instance, LogLine
from .changes import StoredQueue, StoredTask

STATUSES: Mapping[str, TaskStatus] = {status.value: status for status in TaskStatus}


def micros(value: datetime | None) -> int | None:
    return None if value is None else to_micros(value)


def moment(value: int | None) -> datetime | None:
    return None if value is None else from_micros(value)


def shown_status(stored: str) -> TaskStatus:
    """As readers see it: to them a delayed task is pending, and one whose status nobody knows has failed."""
    if stored == DELAYED:
        return TaskStatus.PENDING
    return STATUSES.get(stored, TaskStatus.FAILED)


def stored_pending(run_at: int | None, now: int) -> str:
    """How a task that waits is stored: apart from those that may start while its time lies ahead."""
    return DELAYED if run_at is not None and run_at > now else TaskStatus.PENDING.value


def stored_names(status: TaskStatus) -> tuple[str, ...]:
    return (status.value, DELAYED) if status is TaskStatus.PENDING else (status.value,)


WAITS = stored_names(TaskStatus.PENDING)


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


VITALS = TypeAdapter(Vitals)
LINE = ("task_id", "at", "level", "attempt", "message", "extra")


def log_row(line: LogLine) -> tuple[Any, ...]:
    """In the order of LINE."""
    return (line.task_id, to_micros(line.at), line.level, line.attempt, line.message, line.extra)


def instance_row(instance: Instance, beat: Beat) -> dict[str, Any]:
    """The columns of an instance that beats."""
    return {
        "instance_id": instance.instance_id,
        "host": instance.host,
        "machine": instance.machine,
        "pid": instance.pid,
        "birth": instance.birth,
        "version": instance.version,
        "started_at": to_micros(instance.started),
        "beat_at": to_micros(beat.at),
        "lease_until": to_micros(beat.lease_until),
        "slots": beat.slots,
        "running": beat.running,
        "vitals": None if beat.vitals is None else VITALS.dump_json(beat.vitals).decode(),
    }


def vitals_of(text: str | None) -> Vitals | None:
    """None where nothing was said, or nothing that can be read."""
    if text is not None:
        with suppress(ValidationError):
            return VITALS.validate_json(text)
    return None


def claim_of(row: StoredTask) -> Claimed:
    """A task that is running."""
    return Claimed(
        row.task_id,
        row.name,
        row.queue,
        row.executor,
        row.attempt,
        row.excused,
        row.max_attempts,
        from_micros(row.started_at or 0),
        row.arguments,
        loads_object(row.tags),
        bool(row.requeue),
        row.trace,
        from_micros(row.created_at),
        from_micros(row.run_at),
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
        draft.run_at,
    )


def broken_words(broken: Iterable[str]) -> str:
    return f"broken row: its {', '.join(broken)} cannot be read"


def merged_counts(rows: Sequence[tuple[str, str, str, int, int]]) -> Sequence[Count]:
    """Delayed tasks are pending ones to everybody but the claim."""
    found: dict[tuple[str, str, TaskStatus], Count] = {}
    for queue, name, stored, n, micros in rows:
        status = shown_status(stored)
        count = found.get((queue, name, status), Count(queue, name, status, 0, 0.0))
        delayed = n if stored == DELAYED else 0
        found[queue, name, status] = replace(
            count, n=count.n + n, seconds=count.seconds + micros / 1e6, delayed=count.delayed + delayed
        )
    return list(found.values())


def queue_states(known: Iterable[StoredQueue], counts: Iterable[Count]) -> Sequence[QueueState]:
    """By name: those that are stored, and those that only have tasks."""
    states = {
        queue.name: QueueState(queue.name, queue.concurrency, queue.max_size, bool(queue.paused), queue.reason)
        for queue in known
    }
    for count in counts:
        state = states.setdefault(count.queue, QueueState(count.queue, None, None, False, None))
        states[count.queue] = counted(state, count)
    return [states[name] for name in sorted(states)]


def counted(state: QueueState, count: Count) -> QueueState:
    match count.status:
        case TaskStatus.PENDING:
            return replace(state, pending=state.pending + count.n - count.delayed)
        case TaskStatus.RUNNING:
            return replace(state, running=state.running + count.n)
        case TaskStatus.REJECTED:
            return replace(state, rejected=state.rejected + count.n)
        case _:
            return replace(state, finished=state.finished + count.n)
