"""What goes to Redis and comes from it, as bytes and as values.

Owns the packing that `redis.lua` reads, and the way back to the values that the rules and the readers know. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import msgpack  # type: ignore[import-untyped]

from ..models import TaskEvent, TaskFilter, TaskStatus, from_micros, to_micros
from .base import Record
from .changes import Applied, Changes, Level, Snapshot, StoredQueue, StoredSchedule, StoredTask
from .redis_keys import COLUMNS
from .stored import LINE, claim_of, log_row, stored_names

STATUSES = [name for status in TaskStatus for name in stored_names(status)]


def packed(value: Any) -> bytes:
    """As the script reads it: `false` for None, and no types that its library does not know."""
    found: bytes = msgpack.packb(plain(value), use_bin_type=False)
    return found


def plain(value: Any) -> Any:
    if value is None:
        return False
    if isinstance(value, Mapping):
        return {name: plain(cell) for name, cell in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as they are stored: `false` stands for NULL, so a flag is a number."""
    return {name: int(value) if isinstance(value, bool) else value for name, value in values.items()}


def unpacked(value: Any) -> Any:
    return msgpack.unpackb(value, raw=True, strict_map_key=False)


def texts(values: Any) -> list[str]:
    return [value.decode() for value in values]


def pairs(flat: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def cell(value: Any) -> Any:
    """A stored cell as a value: text, a number, or None."""
    if value is False:
        return None
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def task_row(task_id: str, value: Any) -> SimpleNamespace:
    """A task with the attributes of an SQL row, and its newest events."""
    cells: list[Any] = unpacked(value)
    stored = dict(zip(COLUMNS, [*cells, *[False] * (len(COLUMNS) - len(cells))], strict=True))
    events = stored.pop("events")
    return SimpleNamespace(task_id=task_id, events=events, **{name: cell(found) for name, found in stored.items()})


FACTS = StoredTask._fields[1:-3]


def stored_task(item: Sequence[bytes]) -> StoredTask:
    task_id, value = item
    row = task_row(task_id.decode(), value)
    facts = StoredTask(row.task_id, *(getattr(row, name) for name in FACTS))
    return facts._replace(requeue=bool(row.requeue), cancel_requested=bool(row.cancel_requested), revision=row.revision)


def document(value: bytes) -> dict[str, Any]:
    return {name.decode(): cell(found) for name, found in unpacked(value).items()}


def stored_queue(name: bytes, value: bytes) -> StoredQueue:
    known = document(value)
    columns: dict[str, Any] = {column: known.get(column) for column in StoredQueue._fields}
    return StoredQueue(**{**columns, "name": name.decode(), "paused": bool(columns["paused"])})


def group_row(error_key: str, value: bytes) -> SimpleNamespace:
    return SimpleNamespace(**document(value), error_key=error_key)


def schedule_row(name: bytes, value: bytes) -> SimpleNamespace:
    unset = {"reason": None, "next_tick": None, "last_run": None, "last_task_id": None, "started_at": None}
    return SimpleNamespace(**{**unset, **document(value), "name": name.decode()})


def stored_schedule(name: bytes, value: bytes) -> StoredSchedule:
    row = schedule_row(name, value)
    facts = StoredSchedule(*(getattr(row, column) for column in StoredSchedule._fields[:-1]))
    return facts._replace(overlap=bool(row.overlap), paused=bool(row.paused))


def level_of(key: bytes, n: bytes) -> Level:
    queue, name, status = texts(unpacked(key))
    return queue, name, status, int(n)


def row_of_instance(value: bytes) -> SimpleNamespace:
    row = SimpleNamespace(**{"vitals": None, "schema": 1, **document(value)})  # older code says nothing of them
    row.owner = row.instance_id
    return row


def unknown_owner(instance_id: str) -> SimpleNamespace:
    """Of tasks, without a row of its own."""
    columns = ("host", "machine", "pid", "birth", "version", "started_at", "beat_at", "lease_until")
    return SimpleNamespace(owner=instance_id, **dict.fromkeys(columns))


def event_of(task_id: str, cells: Sequence[Any]) -> TaskEvent:
    seq, at, kind, attempt, instance, actor, detail = map(cell, cells)
    return TaskEvent(seq, task_id, from_micros(at), kind, attempt, instance, actor, detail)


def told(fields: Mapping[bytes, bytes]) -> TaskEvent:
    task_id, cells = unpacked(fields[b"e"])
    return event_of(task_id.decode(), cells)


def light(row: SimpleNamespace) -> SimpleNamespace:
    """Without the columns that a list leaves out."""
    row.arguments = row.stacktrace = None
    return row


def line_row(number: bytes, fields: Mapping[bytes, bytes]) -> SimpleNamespace:
    cells = dict(zip(LINE, map(cell, unpacked(fields[b"l"])), strict=True))
    return SimpleNamespace(seq=int(number.split(b"-")[0]), **cells)


def run_keys_of(snapshot: Snapshot) -> list[Any]:
    """What was seen to wait under each key that is decided about."""
    return [[key, [row.task_id for row in rows]] for key, rows in snapshot.one_offs.items()]


def arguments_of(changes: Changes) -> dict[str, Any]:
    pending = dict.fromkeys(changes.ceilings, 0)
    running = dict(pending)
    for (queue, _, status), n in changes.counts.items():
        if queue in pending:
            pending[queue] += n * (status == TaskStatus.PENDING)
            running[queue] += n * (status == TaskStatus.RUNNING)
    return {
        "now": changes.now,
        "me": changes.instance,
        "progress": [(item.task_id, item.attempt, item.value) for item in changes.progress],
        "endings": changes.endings,
        "updates": [(row.task_id, row.revision, flags(values)) for row, values in changes.updates.values()],
        "inserts": changes.inserts,
        "ceilings": [
            (queue, pending[queue], ceiling.pending, running[queue], ceiling.running)
            for queue, ceiling in changes.ceilings.items()
        ],
        "stamps": list(changes.stamps.items()),
        "advances": [advance._asdict() for advance in changes.advances],
        "queues": [(name, flags(values)) for name, values in changes.queues],
        "schedules": [(name, flags(values)) for name, values in changes.schedules],
        "revoked": changes.revoked,
        "counts": changes.tally(),
        "gauges": [gauge for record in changes.records for gauge in gauges_of(record, changes)],
        "groups": [changes.groups[key]._asdict() for key in sorted(changes.groups)],
        "events": changes.events,
        "logs": [log_row(line) for line in changes.logs],
        "wishes": [wish._asdict() for wish in changes.wishes],
        "purges": [(to_micros(purge.before), purge.limit) for purge in changes.purges],
    }


def gauges_of(record: Record, changes: Changes) -> list[Any]:
    """Size and kind, time, field, value, the second at which the hash goes, and before which time others are gone."""
    found = []
    for row in record.rows:
        oldest = to_micros(record.kept[row.size])
        goes_at = (row.at + changes.now - oldest) // 1_000_000
        field = msgpack.packb([row.series, changes.instance])
        found.append((f"{row.size}:{row.kind}", str(row.at), field, row.sums, goes_at, oldest))
    return found


def applied_of(answer: Any) -> Applied:
    claimed, purged = answer
    return Applied([claim_of(stored_task(item)) for item in claimed], [(int(n), bool(more)) for n, more in purged])


def indexes(where: TaskFilter) -> list[list[str]]:
    """For each part of a filter that has an index the sorted sets that hold what it finds; all tasks where none has."""
    parts = [[f"tag:{key}:{value}"] for key, value in where.tags]
    for kind, value in (
        ("error", where.error_key),
        ("schedule", where.schedule),
        ("name", where.func_name),
        ("queue", where.queue),
    ):
        if value is not None:
            parts.append([f"{kind}:{value}"])
    names = [stored for status in dict.fromkeys(where.statuses) for stored in stored_names(status)]
    if names or not parts:
        parts.append([f"status:{name}" for name in names or STATUSES])
    return parts
