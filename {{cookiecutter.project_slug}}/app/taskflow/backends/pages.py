"""The statement behind a page of tasks.

Owns how a filter becomes walks down indexes. The invariant: a page costs what it shows, however many rows there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from ..models import DELAYED, Cursor, TaskFilter, TaskStatus, to_micros
from .tables import task

SEARCH_WINDOW = 100_000
"""A search by something that has no index looks at this many of the newest tasks."""
HEAVY_COLUMNS = ("arguments", "stacktrace")
"""Columns that a list of tasks leaves out."""


def page_statement(where: TaskFilter, before: Cursor | None, limit: int) -> sa.Select[Any]:
    """Newest first, below `before`. Each status is its own walk down its own index, merged at the end, so that the
    cost is that of the rows shown; what has no index is looked for among the newest SEARCH_WINDOW."""
    columns = [column for column in task.c if column.name not in HEAVY_COLUMNS]
    walk = sa.select(*columns).where(*indexed_conditions(where, before))
    statuses = [stored for status in dict.fromkeys(where.statuses) for stored in stored_names(status)]
    branches = [walk.where(task.c.status == stored) for stored in statuses] or [walk]
    scanned = scanned_conditions(where, len(statuses))
    window = SEARCH_WINDOW if scanned else limit
    parts = [newest_first(branch, task.c, window) for branch in branches]
    merged = sa.union_all(*(sa.select(part.subquery()) for part in parts)).subquery()
    found = sa.select(merged).where(*(condition(merged.c) for condition in scanned))
    return newest_first(found, merged.c, limit)


def is_search(where: TaskFilter) -> bool:
    """Whether it has to look through rows that it does not show."""
    return bool(scanned_conditions(where, len(where.statuses)))


def newest_first(statement: sa.Select[Any], columns: Any, limit: int) -> sa.Select[Any]:
    return statement.order_by(columns.created_at.desc(), columns.task_id.desc()).limit(limit)


def stored_names(status: TaskStatus) -> tuple[str, ...]:
    return (status, DELAYED) if status is TaskStatus.PENDING else (status,)


def indexed_conditions(where: TaskFilter, before: Cursor | None) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if before is not None:
        place = sa.tuple_(task.c.created_at, task.c.task_id)
        conditions.append(place < sa.tuple_(sa.literal(to_micros(before.created_at)), sa.literal(before.task_id)))
    if where.since is not None:
        conditions.append(task.c.created_at >= to_micros(where.since))
    if where.until is not None:
        conditions.append(task.c.created_at <= to_micros(where.until))
    if where.schedule is not None and not where.statuses:
        conditions.append(task.c.schedule == where.schedule)
    elif where.func_name is not None and not where.statuses:
        conditions.append(task.c.name == where.func_name)
    elif where.queue is not None and not where.statuses:
        conditions.append(task.c.queue == where.queue)
    return conditions


def has_tag(key: str, value: str) -> Callable[[Any], sa.ColumnElement[bool]]:
    """Exactly that tag, cut at whichever colon: a key may hold some, and nobody who types `key:value` can tell. A text
    that changes when the pair is taken out of it holds the pair; LIKE would not tell upper case from lower."""
    parts = f"{key}:{value}".split(":")
    cuts = [(":".join(parts[:place]), ":".join(parts[place:])) for place in range(1, len(parts))]
    pairs = [json.dumps({name: said})[1:-1] for name, said in cuts if name]
    return lambda columns: sa.or_(*(sa.func.replace(columns.tags, pair, "") != columns.tags for pair in pairs))


def scanned_conditions(where: TaskFilter, statuses: int) -> list[Callable[[Any], sa.ColumnElement[bool]]]:
    conditions: list[Callable[[Any], sa.ColumnElement[bool]]] = []
    if where.schedule is not None and statuses:
        conditions.append(lambda c: c.schedule == where.schedule)
    if where.func_name is not None and (statuses or where.schedule is not None):
        conditions.append(lambda c: c.name == where.func_name)
    if where.queue is not None and (statuses or where.func_name is not None or where.schedule is not None):
        conditions.append(lambda c: c.queue == where.queue)
    if where.source is not None:
        conditions.append(lambda c: c.source == where.source)
    for key, value in where.tags:
        conditions.append(has_tag(key, value))
    if where.text is not None:
        text = where.text
        conditions.append(
            lambda c: sa.or_(
                c.name.contains(text, autoescape=True),
                c.task_id.startswith(text, autoescape=True),
                c.error.contains(text, autoescape=True),
                c.tags.contains(json.dumps(text)[1:-1], autoescape=True),
            )
        )
    return conditions
