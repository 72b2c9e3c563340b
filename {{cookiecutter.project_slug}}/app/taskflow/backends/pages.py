"""The questions that pages and housekeeping ask an SQL database.

Owns how a filter becomes walks down indexes. The invariant: a page costs what it shows, however many rows there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from ..models import Cursor, TaskFilter, to_micros
from .search import SEARCH_WINDOW
from .stored import stored_names
from .tables import WAITING, instance, schedule, task

HEAVY_COLUMNS = ("arguments", "stacktrace")
"""Columns that a list of tasks leaves out."""


def has_status(status: str) -> sa.ColumnElement[bool]:
    """As a literal, because a partial index is only used where the statement itself shows its condition."""
    found: sa.ColumnElement[bool] = task.c.status == sa.literal_column(f"'{status}'")
    return found


OWNERS = sa.select(task.c.instance).where(has_status("running"), task.c.instance.is_not(None)).distinct()
RUNS_NOTHING = instance.c.instance_id.not_in(OWNERS)
CANCELS = sa.select(task.c.task_id, task.c.attempt).where(
    has_status("running"), task.c.instance == sa.bindparam("me"), task.c.cancel_requested.is_(True)
)
SCHEDULES = (
    sa.select(schedule, task.c.status.label("last_status"))
    .outerjoin_from(schedule, task, task.c.task_id == schedule.c.last_task_id)
    .order_by(schedule.c.name)
)
ONE_OFFS = sa.select(task).where(task.c.run_key.is_not(None), sa.text(WAITING)).order_by(task.c.run_at, task.c.task_id)


def live_instances() -> sa.Select[Any]:
    """Who holds a lease or owns running tasks, whether it is known or not."""
    holders = sa.select(instance.c.instance_id).where(instance.c.lease_until > 0, RUNS_NOTHING)
    owner = sa.union_all(OWNERS, holders).subquery("live").c[0]
    return sa.select(owner.label("owner"), instance).outerjoin_from(
        owner.table, instance, instance.c.instance_id == owner
    )


LIVE_INSTANCES = live_instances()


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


def newest_first(statement: sa.Select[Any], columns: Any, limit: int) -> sa.Select[Any]:
    return statement.order_by(columns.created_at.desc(), columns.task_id.desc()).limit(limit)


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
                c.name.icontains(text, autoescape=True),
                c.task_id.istartswith(text, autoescape=True),
                c.error.icontains(text, autoescape=True),
                c.tags.icontains(json.dumps(text)[1:-1], autoescape=True),
            )
        )
    return conditions
