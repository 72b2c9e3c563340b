"""The questions that pages and housekeeping ask an SQL database.

Owns how a filter becomes walks down indexes. The invariant: a page costs what it shows, however many rows there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from ..models import AuditFilter, Cursor, TaskFilter, to_micros
from .search import SEARCH_WINDOW, walked_by
from .stored import stored_names
from .tables import WAITING, event, failure, gauge, instance, rank, schedule, tag, task

HEAVY: Mapping[str, sa.ColumnElement[Any]] = {"arguments": sa.literal(""), "stacktrace": sa.null()}
"""Columns that a list of tasks leaves out, and what stands for them."""


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


def groups_statement(dismissed: bool, before: tuple[datetime, str] | None, limit: int) -> sa.Select[Any]:
    there = sa.text("dismissed > 0" if dismissed else "open > 0")
    order = (failure.c.last_at.desc(), failure.c.error_key.desc())
    statement = sa.select(failure).where(there).order_by(*order).limit(limit)
    if before is not None:
        place = sa.tuple_(sa.literal(to_micros(before[0])), sa.literal(before[1]))
        statement = statement.where(sa.tuple_(failure.c.last_at, failure.c.error_key) < place)
    return statement


def gauges_statement(size: int, kind: str, since: datetime, series: str | None) -> sa.Select[Any]:
    columns = (gauge.c.size, gauge.c.at, gauge.c.kind, gauge.c.series, gauge.c.sums)
    there = (gauge.c.size == size, gauge.c.kind == kind, gauge.c.at >= to_micros(since))
    statement = sa.select(*columns).where(*there).order_by(gauge.c.at)
    return statement if series is None else statement.where(gauge.c.series == series)


def head_statement(queue: str, executor: str, above: int | None) -> sa.Select[Any]:
    """The first of the next lower priority that could start."""
    there = [has_status("pending"), task.c.queue == queue, task.c.executor == executor]
    if above is not None:
        there.append(rank < above)
    order = (rank.desc(), task.c.run_at, task.c.task_id)
    return sa.select(rank.label("rank"), task.c.run_at).where(*there).order_by(*order).limit(1)


def audit_statement(before: int | None, limit: int, where: AuditFilter) -> sa.Select[Any]:
    acts = sa.select(event).where(event.c.actor.is_not(None)).order_by(event.c.seq.desc())
    if before is not None:
        acts = acts.where(event.c.seq < before)
    if not where.asks:
        return acts.limit(limit)
    newest = acts.limit(SEARCH_WINDOW).subquery()
    conditions = []
    if where.actor is not None:
        conditions.append(newest.c.actor == where.actor)
    if where.kinds:
        conditions.append(newest.c.kind.in_(where.kinds))
    if where.subject is not None:
        about = newest.c.detail.icontains(json.dumps(where.subject)[1:-1], autoescape=True)
        conditions.append(sa.or_(newest.c.task_id.icontains(where.subject, autoescape=True), about))
    if where.since is not None:
        conditions.append(newest.c.at >= to_micros(where.since))
    if where.until is not None:
        conditions.append(newest.c.at <= to_micros(where.until))
    return sa.select(newest).where(*conditions).order_by(newest.c.seq.desc()).limit(limit)


def page_statement(where: TaskFilter, before: Cursor | None, limit: int) -> sa.Select[Any]:
    """Newest first, below `before`. Each status is its own walk down its own index, merged at the end, so that the
    cost is that of the rows shown; what has no index is looked for among the newest SEARCH_WINDOW."""
    heavy = HEAVY if where.arguments is None else {"stacktrace": HEAVY["stacktrace"]}
    columns = [heavy[column.name].label(column.name) if column.name in heavy else column for column in task.c]
    walked = walked_by(where)
    place = tag.c if walked == "tags" else task.c
    walk = sa.select(*columns).where(*indexed_conditions(where, before, place))
    if walked == "tags":
        walk = walk.join_from(tag, task, task.c.task_id == tag.c.task_id)
    statuses = stored_statuses(where) if walked == "statuses" else []
    branches = [walk.where(task.c.status == stored) for stored in statuses] or [walk]
    scanned = scanned_conditions(where)
    if len(branches) == 1 and not scanned:
        return newest_first(branches[0], place, limit)
    window = SEARCH_WINDOW if scanned else limit
    parts = [newest_first(branch, place, window) for branch in branches]
    merged = sa.union_all(*(sa.select(part.subquery()) for part in parts)).subquery()
    found = sa.select(merged).where(*(condition(merged.c) for condition in scanned))
    return newest_first(found, merged.c, limit)


def newest_first(statement: sa.Select[Any], columns: Any, limit: int) -> sa.Select[Any]:
    return statement.order_by(columns.created_at.desc(), columns.task_id.desc()).limit(limit)


def indexed_conditions(where: TaskFilter, before: Cursor | None, place: Any) -> list[sa.ColumnElement[bool]]:
    """`place` are the columns of the table whose index is walked."""
    conditions: list[sa.ColumnElement[bool]] = []
    if before is not None:
        end = sa.tuple_(sa.literal(to_micros(before.created_at)), sa.literal(before.task_id))
        conditions.append(sa.tuple_(place.created_at, place.task_id) < end)
    if where.since is not None:
        conditions.append(place.created_at >= to_micros(where.since))
    if where.until is not None:
        conditions.append(place.created_at <= to_micros(where.until))
    tags = [f"{key}:{value}" for key, value in where.tags]
    match walked_by(where):
        case "tags":
            conditions.append(place.tag == tags.pop(0))
        case "error_key":
            conditions.append(task.c.error_key == where.error_key)
        case "schedule":
            conditions.append(task.c.schedule == where.schedule)
        case "func_name":
            conditions.append(task.c.name == where.func_name)
        case "queue":
            conditions.append(task.c.queue == where.queue)
    return conditions + [has_tag(place, word) for word in tags]


def has_tag(place: Any, word: str) -> sa.ColumnElement[bool]:
    other = tag.alias()
    same = (other.c.created_at == place.created_at, other.c.task_id == place.task_id)
    return sa.exists().where(other.c.tag == word, *same)


def number_of(pair: tuple[str, str]) -> sa.Select[Any]:
    """How many tasks have a tag, as far as it matters."""
    some = sa.select(tag.c.task_id).where(tag.c.tag == ":".join(pair)).limit(SEARCH_WINDOW)
    return sa.select(sa.func.count()).select_from(some.subquery())


def stored_statuses(where: TaskFilter) -> list[str]:
    return [stored for status in dict.fromkeys(where.statuses) for stored in stored_names(status)]


def scanned_conditions(where: TaskFilter) -> list[Callable[[Any], sa.ColumnElement[bool]]]:
    """What the walk itself does not see to."""
    conditions: list[Callable[[Any], sa.ColumnElement[bool]]] = []
    walked = walked_by(where)
    if where.statuses and walked != "statuses":
        conditions.append(lambda c: c.status.in_(stored_statuses(where)))
    for part, column in (("schedule", "schedule"), ("func_name", "name"), ("queue", "queue")):
        if getattr(where, part) is not None and walked != part:
            conditions.append(is_equal(column, getattr(where, part)))
    if where.source is not None:
        conditions.append(is_equal("source", where.source))
    if where.key is not None:
        conditions.append(is_equal("idempotency_key", where.key))
    if where.dismissed is not None:
        conditions.append(lambda c: c.dismissed_at.is_not(None) if where.dismissed else c.dismissed_at.is_(None))
    if where.attempts is not None:
        sign, number = where.attempts
        conditions.append(lambda c: {"<": c.attempt < number, "=": c.attempt == number, ">": c.attempt > number}[sign])
    return conditions + words_conditions(where)


def is_equal(column: str, value: str) -> Callable[[Any], sa.ColumnElement[bool]]:
    return lambda columns: columns[column] == value


def words_conditions(where: TaskFilter) -> list[Callable[[Any], sa.ColumnElement[bool]]]:
    text, task_id, error, arguments = where.text, where.task_id, where.error, where.arguments
    conditions: list[Callable[[Any], sa.ColumnElement[bool]]] = []
    if task_id is not None:
        conditions.append(lambda c: c.task_id.istartswith(task_id, autoescape=True))
    if error is not None:
        conditions.append(lambda c: c.error.icontains(error, autoescape=True))
    if arguments is not None:
        conditions.append(lambda c: c.arguments.icontains(json.dumps(arguments)[1:-1], autoescape=True))
    if text is not None:
        conditions.append(
            lambda c: sa.or_(
                c.name.icontains(text, autoescape=True),
                c.task_id.istartswith(text, autoescape=True),
                c.error.icontains(text, autoescape=True),
                c.tags.icontains(json.dumps(text)[1:-1], autoescape=True),
            )
        )
    return conditions
