"""A turn on SQLite: what it shows the rules, and how it writes what they decided.

Owns the use of `sqlite.sql`. Its transaction has the write lock from the beginning, so that nothing changes between the
snapshot and the changes; only what the snapshot did not show can be stale. Hundreds of rows are one statement, during
which Python is free.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Any

from pydantic_core import from_json

from ..models import DELAYED, EventKind, TaskStatus, from_micros, to_micros
from .base import Claimed, Moved, Purge, Record
from .cells import is_sound, raw, stored_queue, stored_schedule, stored_task, unreadable, words
from .changes import (
    EXECUTORS,
    FACTS,
    LEVEL,
    PURGE_BATCH,
    RESCUE_BATCH,
    STAGE_BATCH,
    Applied,
    Changes,
    Snapshot,
    Stale,
    StoredTask,
    Tally,
    Wants,
    Wish,
)
from .scripts import assignments, statements
from .stored import broken_words, loads_object, log_row

LONGEST_LIST = 512
"""Rows of one bulk statement."""
Rows = Sequence[Sequence[Any]]

NAMED = "AND name IN (SELECT value FROM json_each(:names))"

CLAIMABLE = (
    "task_id",
    "name",
    "queue",
    "executor",
    "attempt",
    "excused",
    "max_attempts",
    "arguments",
    "tags",
    "requeue",
    "trace",
    "created_at",
    "started_at",
    "run_at",
)
"""What is read of a task that is ready: fewer columns than rules want, because there may be hundreds in a turn."""
TAGS = """json_each(CASE WHEN typeof({0}.tags) = 'text' AND json_valid({0}.tags) THEN {0}.tags ELSE '{{}}' END)
    WHERE typeof(key) = 'text' AND type = 'text'"""
"""Of a row: none where the cell cannot be read."""
LISTS = {
    "{facts}": ", ".join(FACTS),
    "{claimable}": ", ".join((*CLAIMABLE, "priority")),
    **{f"{{{row}_tags}}": TAGS.format(row) for row in ("old", "new")},
}


def listed(text: str) -> str:
    for mark, names in LISTS.items():
        text = text.replace(mark, names)
    return text


SQL = {name: listed(text) for name, text in statements("sqlite.sql").items()}


def run(cursor: sqlite3.Cursor, text: str, values: Any = ()) -> sqlite3.Cursor:
    """The same cursor: that of an asynchronous session gives something else when it executes."""
    cursor.execute(text, values)
    return cursor


class Query:
    """Whose rows come in one cell or, where JSON cannot hold one of them, each as the driver reads it."""

    def __init__(self, text: str, columns: Sequence[str]) -> None:
        cells = ", ".join(columns)
        self._whole = text.replace("{cells}", f"json_group_array(json_array({cells}))")
        self._each = text.replace("{cells}", cells)

    def rows(self, cursor: sqlite3.Cursor, values: Mapping[str, object]) -> Rows:
        try:
            rows: list[list[Any]] = from_json(run(cursor, self._whole, values).fetchone()[0])
        except (sqlite3.Error, ValueError, TypeError):  # a BLOB; text that is no UTF-8
            return run(cursor, self._each, values).fetchall()
        return rows


class Bulk:
    """A statement for many rows at a time. The list is filled up to a power of two, so that few texts are compiled."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._texts: dict[int, str] = {}

    def run(self, cursor: sqlite3.Cursor, rows: Sequence[Sequence[Any]]) -> int:
        """How many rows of the table changed."""
        return sum(self._run(cursor, rows[at : at + LONGEST_LIST]) for at in range(0, len(rows), LONGEST_LIST))

    def _run(self, cursor: sqlite3.Cursor, rows: Sequence[Sequence[Any]]) -> int:
        length, width = 1 << (len(rows) - 1).bit_length(), len(rows[0])
        if length not in self._texts:
            row = f"({', '.join('?' * width)})"
            self._texts[length] = self._text.replace("{rows}", ", ".join([row] * length))
        cells = list(chain.from_iterable(rows))
        cells += [None] * ((length - len(rows)) * width)
        return run(cursor, self._texts[length], cells).rowcount


LEVELS = Query(SQL["levels"], LEVEL)
HELD = Query(SQL["held"], FACTS)
READY = Query(SQL["ready"].replace("{named}", ""), CLAIMABLE)
READY_NAMED = Query(SQL["ready"].replace("{named}", NAMED), CLAIMABLE)
INSERT_TASKS = Bulk(SQL["insert_tasks"])
END_ATTEMPTS = Bulk(SQL["end_attempts"])
INSERT_EVENTS = Bulk(SQL["insert_events"])
INSERT_LOGS = Bulk(SQL["insert_logs"])
COUNT = Bulk(SQL["count"])
PROGRESS = Bulk(SQL["progress"])


# -- what the rules have to see


def look(cursor: sqlite3.Cursor, wants: Wants) -> Snapshot:
    first_due = _first_due(cursor)
    if wants.stage and first_due is not None and first_due <= wants.now:
        _stage(cursor, wants.now)
        first_due = _first_due(cursor)
    snapshot = Snapshot(
        levels=[(queue, name, status, n) for queue, name, status, n in _levels(cursor)],
        queues={row[0]: stored_queue(row) for row in run(cursor, SQL["queues"]).fetchall() if is_sound("name", row[0])},
        first_due=first_due,
    )
    if wants.tasks:
        snapshot.tasks = {row.task_id: row for row in _tasks(cursor, "tasks", ids=json.dumps(wants.tasks))}
    if wants.run_keys:
        snapshot.one_offs = {key: _tasks(cursor, "one_offs", run_key=key) for key in wants.run_keys}
    if wants.stamps:
        snapshot.left = _left(cursor, wants.stamps)
    if wants.held:
        snapshot.held = [stored_task(row) for row in HELD.rows(cursor, {"me": wants.instance})]
    if wants.schedules:
        rows = run(cursor, SQL["schedules"], {"names": json.dumps(wants.schedules)}).fetchall()
        snapshot.schedules = {row.name: row for row in map(stored_schedule, rows)}
    if wants.live:
        rows = run(cursor, SQL["live_runs"], {"names": json.dumps(wants.live)}).fetchall()
        snapshot.live = frozenset(name for (name,) in rows)
    return snapshot


def _levels(cursor: sqlite3.Cursor) -> Iterator[Sequence[Any]]:
    return (row for row in LEVELS.rows(cursor, {}) if not unreadable(LEVEL, row))


def _first_due(cursor: sqlite3.Cursor) -> int | None:
    row = run(cursor, SQL["first_due"]).fetchone()
    return row[0] if row is not None and is_sound("run_at", row[0]) else None  # text: only that is delayed


def _stage(cursor: sqlite3.Cursor, now: int) -> None:
    """Makes ready what has become due."""
    staged = Changes(now, "")
    for queue, name in run(cursor, SQL["stage"], {"now": now, "most": STAGE_BATCH}).fetchall():
        staged.move(words(queue), words(name), DELAYED, TaskStatus.PENDING.value)
    COUNT.run(cursor, staged.tally())


def _tasks(cursor: sqlite3.Cursor, statement: str, **values: object) -> list[StoredTask]:
    return [stored_task(row) for row in run(cursor, SQL[statement], values).fetchall()]


def _left(cursor: sqlite3.Cursor, stamps: Mapping[str, int]) -> list[StoredTask]:
    """What was left running by those whose heartbeat is still the one that was seen."""
    beats = dict(run(cursor, SQL["beats"], {"ids": json.dumps(list(stamps))}).fetchall())
    dead = [instance for instance, stamp in stamps.items() if beats.get(instance, 0) == stamp]
    return _tasks(cursor, "left", ids=json.dumps(dead), most=RESCUE_BATCH)


# -- what they decided


def apply(cursor: sqlite3.Cursor, changes: Changes) -> Applied:
    """Raises Stale where a task is not as it was taken for granted."""
    applied = Applied()
    if changes.progress:  # while the task still runs: it may end in this very turn
        PROGRESS.run(cursor, [(item.task_id, item.attempt, changes.instance, item.value) for item in changes.progress])
    if changes.endings and END_ATTEMPTS.run(cursor, changes.endings) != len(changes.endings):
        raise Stale
    for row, values in changes.updates.values():
        _update(cursor, row, values)
    for raw_id, before, reason in changes.aside:
        _set_aside(cursor, raw_id, before, reason, changes.now)
    if changes.inserts and INSERT_TASKS.run(cursor, changes.inserts) != len(changes.inserts):
        raise Stale
    _set_documents(cursor, changes)
    for wish in changes.wishes:
        applied.claimed += _claim(cursor, wish, changes)
    applied.purged = [_purge(cursor, purge, changes) for purge in changes.purges]
    if changes.logs:
        INSERT_LOGS.run(cursor, [log_row(line) for line in changes.logs])
    if changes.events:
        INSERT_EVENTS.run(cursor, changes.events)
    if tally := changes.tally():
        COUNT.run(cursor, tally)
    for record in changes.records:
        _record(cursor, record, changes.instance)
    for key in sorted(changes.groups):
        _regroup(cursor, changes.groups[key])
    return applied


def _record(cursor: sqlite3.Cursor, record: Record, instance: str) -> None:
    cursor.executemany(SQL["record"], [(*row, instance) for row in record.rows])
    for size, before in record.kept.items():
        run(cursor, SQL["forget_gauges"], {"size": size, "before": to_micros(before)})


def _regroup(cursor: sqlite3.Cursor, tally: Tally) -> None:
    run(cursor, SQL["regroup" if tally.at is None else "group"], tally._asdict())


def _update(cursor: sqlite3.Cursor, row: StoredTask, values: Mapping[str, Any]) -> None:
    """By the bytes of its id where that is damaged."""
    where = "CAST(task_id AS BLOB) = :row_id" if row.raw_id else "task_id = :row_id"
    text = f"UPDATE taskflow_task SET {assignments(values, ':{}')} WHERE {where}"
    run(cursor, text, {**values, "row_id": row.raw_id or row.task_id})


def _set_aside(cursor: sqlite3.Cursor, raw_id: bytes, before: str, reason: str, now: int) -> None:
    run(cursor, SQL["set_aside"], {"raw_id": raw_id, "before": before, "reason": reason, "now": now})


def _set_documents(cursor: sqlite3.Cursor, changes: Changes) -> None:
    for name, values in changes.queues:
        _set(cursor, "taskflow_queue", name, values, paused=False, version=0)
    if changes.queues:
        run(cursor, SQL["queue_version"])
    for name, values in changes.schedules:
        _set(cursor, "taskflow_schedule", name, values)
    for advance in changes.advances:
        run(cursor, SQL["advance"], advance._asdict())
    if changes.revoked:
        run(cursor, SQL["forget_revoked"], {"now": changes.now})
        cursor.executemany(SQL["revoke"], changes.revoked)


def _set(cursor: sqlite3.Cursor, table: str, name: str, values: Mapping[str, object], **fresh: object) -> None:
    """Some columns of a row that may not be there yet; `fresh` are others that it then gets."""
    known = run(cursor, f"SELECT 1 FROM {table} WHERE name = ?", (name,)).fetchone()
    if known:
        text = f"UPDATE {table} SET {assignments(values, ':{}')} WHERE name = :name"
    else:
        values = {**fresh, **values}
        columns, marks = ", ".join(f'"{column}"' for column in values), ", ".join(f":{column}" for column in values)
        text = f"INSERT INTO {table} (name, {columns}) VALUES (:name, {marks})"
    run(cursor, text, {"name": name, **values})


# -- claims


def _claim(cursor: sqlite3.Cursor, wish: Wish, changes: Changes) -> list[Claimed]:
    taken = _within(_sound(cursor, _ready(cursor, wish), changes), wish)
    if len(taken) < min(wish.most, wish.ready):
        taken = _within(_sound(cursor, _others_ready(cursor, wish), changes), wish)
    if taken:
        values = {"ids": json.dumps([cells[0] for cells in taken]), "me": changes.instance, "now": changes.now}
        run(cursor, SQL["seize"], values)
    started_at = from_micros(changes.now)
    claimed = [_claimed(cells, started_at) for cells in taken]
    for task in claimed:
        changes.event(EventKind.STARTED, task.task_id, task.attempt)
        changes.move(task.queue, task.name, TaskStatus.PENDING.value, TaskStatus.RUNNING.value)
    return claimed


def _claimed(cells: Sequence[Any], started_at: datetime) -> Claimed:
    task_id, name, queue, executor, attempt, excused, most, arguments, tags, requeue, trace, created, _, due = cells
    facts = (arguments, loads_object(tags), bool(requeue), trace, from_micros(created), from_micros(due))
    return Claimed(task_id, name, queue, executor, attempt + 1, excused, most, started_at, *facts)


def _ready(cursor: sqlite3.Cursor, wish: Wish) -> Rows:
    """Of the executors that the names have now."""
    values = {"queue": wish.queue, "most": wish.most, **wish.walks}
    if wish.every_name:
        return READY.rows(cursor, values)
    return READY_NAMED.rows(cursor, {**values, "names": json.dumps(list(wish.names))})


def _others_ready(cursor: sqlite3.Cursor, wish: Wish) -> Rows:
    """Where the counts say that there are more: those that were stored when a name had another executor, or behind
    tasks that are not counted."""
    values = {"queue": wish.queue, "most": wish.most, "names": json.dumps(list(wish.names))}
    return READY_NAMED.rows(cursor, values | dict.fromkeys(EXECUTORS, wish.most))


def _sound(cursor: sqlite3.Cursor, rows: Rows, changes: Changes) -> list[Sequence[Any]]:
    """Those that can be run; the others end here, so that nothing waits behind them."""
    sound = []
    for cells in rows:
        if broken := unreadable(CLAIMABLE, cells):
            _end_broken(cursor, cells, broken, changes)
        else:
            sound.append(cells)
    return sound


def _within(rows: Iterable[Sequence[Any]], wish: Wish) -> list[Sequence[Any]]:
    """As many of each executor as there are slots."""
    slots = dict(wish.slots)
    taken = []
    for cells in rows:
        kind = wish.names.get(cells[1], "")
        if slots.get(kind, 0) > 0:
            slots[kind] -= 1
            taken.append(cells)
    return taken


def _end_broken(cursor: sqlite3.Cursor, cells: Sequence[Any], broken: Sequence[str], changes: Changes) -> None:
    reason, pending = broken_words(broken), TaskStatus.PENDING.value
    task_id, name, queue = map(words, cells[:3])
    _set_aside(cursor, raw(cells[0]), pending, reason, changes.now)
    changes.event(EventKind.FAILED, task_id, detail=reason)
    changes.move(queue, name, pending, TaskStatus.FAILED.value)
    failed = Moved(task_id, name, {}, TaskStatus.FAILED, from_micros(changes.now), 0, 0, error=reason)
    changes.moved.append(failed)


# -- history


def _purge(cursor: sqlite3.Cursor, purge: Purge, changes: Changes) -> tuple[int, bool]:
    """Rows of every kind count, so that no purge holds the writer for long: a task may have a thousand lines."""
    deleted, room, before = 0, purge.limit, to_micros(purge.before)
    for status in (status.value for status in TaskStatus if status.terminal):
        most = min(room, PURGE_BATCH)
        old = run(cursor, SQL["old"], {"status": status, "before": before, "most": most}).fetchall()
        ids = [task_id for (task_id,) in old if is_sound("task_id", task_id)]
        for kind in ("purge_logs", "purge_events"):
            if ids and room:
                room -= run(cursor, SQL[kind], {"ids": json.dumps(ids), "most": room}).rowcount
        gone = run(cursor, SQL["purge_tasks"], {"ids": json.dumps(ids[:room])}).fetchall() if ids and room else []
        for damaged in (task_id for (task_id,) in old if not is_sound("task_id", task_id)):
            gone += run(cursor, SQL["purge_damaged"], {"status": status, "raw_id": raw(damaged)}).fetchall()
        for queue, name, started_at, finished_at, error_key, dismissed_at in gone:
            changes.move(words(queue), words(name), status, None)
            if isinstance(error_key, str):
                changes.leave(error_key, dismissed_at)
            if is_sound("at", started_at) and is_sound("at", finished_at):
                changes.ran(words(queue), words(name), status, finished_at, started_at)
        deleted += len(gone)
        room -= len(gone)
        if room <= 0 or len(old) == PURGE_BATCH:
            return deleted, True
    run(cursor, SQL["purge_groups"], {"before": before})
    skips = run(cursor, SQL["purge_skips"], {"before": before, "most": room}).rowcount
    return deleted, skips == room
