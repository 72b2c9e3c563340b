"""A turn inside a transaction of the caller's, on any driver: `enqueue(session=...)`.

Owns how tasks are added there. The connection is the caller's, and so is its driver, which may be an asynchronous one:
statements go through SQLAlchemy. They are few and carry only drafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .cells import stored_queue, stored_task, unreadable
from .changes import FACTS, LEVEL, Changes, Snapshot, Stale, StoredQueue, Wants
from .tables import event, queue, task


def look(connection: Connection, wants: Wants, counts: sa.Select[Any]) -> Snapshot:
    levels = [tuple(row)[:4] for row in connection.execute(counts).all()]
    queues = connection.execute(sa.select(*(queue.c[name] for name in StoredQueue._fields))).all()
    ids = task.c.task_id.in_(wants.tasks)
    rows = connection.execute(sa.select(*(task.c[name] for name in FACTS)).where(ids).with_for_update()).all()
    return Snapshot(
        levels=[level for level in levels if not unreadable(LEVEL, level)],
        queues={row[0]: stored_queue(tuple(row)) for row in queues},
        tasks={row.task_id: row for row in (stored_task(tuple(row)) for row in rows)},
    )


def write(connection: Connection, insert: Any, changes: Changes) -> Sequence[Mapping[str, Any]]:
    """Everything but the counts, which it gives back. Raises Stale where another transaction added a task meanwhile."""
    unset = {"excused": 0, "crashes": 0, "cancel_requested": False}
    if changes.inserts:
        rows = [{**item._asdict(), "requeue": bool(item.requeue), **unset} for item in changes.inserts]
        new = insert.values(rows).on_conflict_do_nothing(index_elements=["task_id"]).returning(task.c.task_id)
        if len(connection.execute(new).all()) != len(rows):
            raise Stale
    for row, values in changes.updates.values():
        connection.execute(task.update().where(task.c.task_id == row.task_id).values(**values))
    if changes.events:
        connection.execute(event.insert(), [item._asdict() for item in changes.events])
    return changes.tally_rows()
