"""Whole rows out of an SQL database and into one, for a move from one store to another.

Owns the order in which rows come, and what becomes of one with a cell that cannot be read: something stands for it, and
a task that would still have run ends as FAILED instead, as it would have when its turn came. A row that is there
already is not stored again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from ..models import DELAYED, TaskStatus
from . import tables
from .base import Batch
from .cells import stand_in, unreadable, whole
from .changes import Changes
from .stored import STATUSES, broken_words, shown_status

TABLES: Mapping[str, sa.Table] = {
    "queue": tables.queue,
    "schedule": tables.schedule,
    "revoked": tables.revoked,
    "failure": tables.failure,
    "task": tables.task,
    "event": tables.event,
    "log": tables.log,
}
REPLACED = ("queue", "schedule", "failure")
"""Documents that a service declares when it starts, and sums: a target that has one gets what the source has."""
COUNTED = [tables.task.c[name] for name in ("queue", "name", "status", "started_at", "finished_at")]
AT_ONCE = {"insertmanyvalues_page_size": 50}
"""Rows of one statement. SQLite looks for each parameter among all of them: with more it takes ten times as long."""
SMALL = {
    column.name
    for table in TABLES.values()
    for column in table.c
    if isinstance(column.type, sa.Integer) and not isinstance(column.type, sa.BigInteger) and column.name != "seq"
}
"""Columns of 32 bits, where a database has such."""


def read(connection: Connection, kind: str, after: str, limit: int) -> Batch:
    """See `Backend.dump`."""
    table = TABLES[kind]
    place = place_in(table, connection.dialect.name)
    statement = sa.select(place, *table.c).order_by(place).limit(limit)
    if after:
        statement = statement.where(place > (int(after) if isinstance(place.type, sa.Integer) else after))
    if kind == "log":  # lines of a task that is gone are nobody's
        statement = statement.where(sa.exists().where(tables.task.c.task_id == table.c.task_id))
    stored = connection.execute(statement).all()
    found = [sound_row(table, cells) for _, *cells in stored]
    end = str(stored[-1][0]) if len(stored) == limit else None
    return Batch([row for row, _ in found], end, sum(broken for _, broken in found))


def place_in(table: sa.Table, dialect: str) -> sa.ColumnElement[Any]:
    """By which rows are walked. The number of a row in SQLite, because its key may be damaged."""
    if dialect == "sqlite":
        return sa.literal_column(f"{table.name}.rowid", sa.Integer)
    (key,) = table.primary_key
    return key


def sound_row(table: sa.Table, cells: Sequence[Any]) -> tuple[dict[str, Any], bool]:
    """A row that every store can hold, and whether something stands for a cell in it."""
    names = [column.name for column in table.c]
    broken = unreadable(names, cells)
    row = dict(zip(names, whole(names, cells), strict=True))
    for name, cell in row.items():
        if (isinstance(cell, str) and "\0" in cell) or (name in SMALL and not -(2**31) <= (cell or 0) < 2**31):
            row[name] = stand_in(name, cell)
            broken.append(name)
    if table is tables.task:
        end_broken(row, broken)
    return row, bool(broken)


def end_broken(row: dict[str, Any], broken: list[str]) -> None:
    """What a reader is shown of a broken task is what it becomes; nothing of it runs."""
    status = row["status"]
    if status != DELAYED and status not in STATUSES:
        broken.append(f"status {status!r:.40}")
    if status == TaskStatus.RUNNING and row["instance"] is None:
        broken.append("instance")
    if broken:
        row["error"] = broken_words(broken) + (f"; {row['error']}" if row["error"] else "")
        shown = shown_status(status)
        row["status"] = (shown if shown.terminal else TaskStatus.FAILED).value


def write(connection: Connection, statement: Any, kind: str, rows: Sequence[Mapping[str, Any]]) -> Sequence[Row[Any]]:
    """See `Backend.load`. `statement` is the dialect's INSERT. What was stored: of tasks the columns COUNTED, of others
    the keys."""
    table = TABLES[kind]
    (key,) = table.primary_key
    if kind in REPLACED:
        fresh = {column.name: statement.excluded[column.name] for column in table.c if column is not key}
        statement = statement.on_conflict_do_update(index_elements=[key], set_=fresh)
    else:
        statement = statement.on_conflict_do_nothing(index_elements=[key])
    told = COUNTED if table is tables.task else [key]
    statement = statement.returning(*told)
    stored: Sequence[Row[Any]] = connection.execute(statement, list(rows), execution_options=AT_ONCE).all()
    return stored


def counts_of(stored: Sequence[Row[Any]]) -> list[dict[str, Any]]:
    """What tasks that were stored change of the counts."""
    books = Changes(0, "")
    for row in stored:
        books.move(row.queue, row.name, None, row.status)
        books.ran(row.queue, row.name, row.status, row.started_at, row.finished_at)
    return books.tally_rows()
