"""The statements of a turn, built and compiled once.

Owns the SQL of the hot path. Hundreds of rows are one statement, during which Python is free, and what is read comes
back as one JSON cell: drivers take Python back for every row that they hand over, and a busy event loop may keep it for
a while. They run on the driver's own cursor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, get_args

import sqlalchemy as sa
from pydantic_core import from_json

from ..models import DELAYED, ExecutorKind, TaskStatus
from . import tables
from .tables import counter, event, log, queue, rank, schedule, task

STAGE_BATCH = 1_000
RESCUE_BATCH = 500

EXECUTORS: Sequence[str] = get_args(ExecutorKind)
CLAIMED_COLUMNS = (
    task.c.task_id,
    task.c.name,
    task.c.queue,
    task.c.executor,
    task.c.excused,
    task.c.max_attempts,
    task.c.arguments,
    task.c.tags,
    task.c.requeue,
    task.c.trace,
    task.c.created_at,
    task.c.attempt,
    task.c.started_at,
)
DRAFT_COLUMNS = (
    task.c.task_id,
    task.c.name,
    task.c.queue,
    task.c.priority,
    task.c.executor,
    task.c.source,
    task.c.status,
    task.c.attempt,
    task.c.instance,
    task.c.started_at,
    task.c.max_attempts,
    task.c.created_at,
    task.c.run_at,
    task.c.arguments,
    task.c.tags,
    task.c.requeue,
    task.c.idempotency_key,
    task.c.retry_of,
    task.c.trace,
    task.c.schedule,
    task.c.run_key,
)
FINISH_COLUMNS = (
    task.c.task_id,
    task.c.attempt,
    task.c.instance,
    task.c.status,
    task.c.run_at,
    task.c.finished_at,
    task.c.result,
    task.c.error,
    task.c.stacktrace,
    task.c.excused,
)
EVENT_COLUMNS = ("task_id", "at", "kind", "attempt", "instance", "actor", "detail")
LOG_COLUMNS = ("task_id", "at", "level", "attempt", "message", "extra")


class Cursor(Protocol):
    """The driver's cursor, as far as it is needed here."""

    def execute(self, operation: Any, parameters: Any = None, /) -> Any: ...

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any | None: ...

    def fetchall(self) -> Sequence[Any]: ...


class Dialect(Protocol):
    """What a database decides for itself."""

    @property
    def dialect(self) -> sa.Dialect: ...

    def expand(self, parameter: str, columns: Sequence[sa.Column[Any]]) -> sa.Subquery: ...

    def arriving(self, columns: Sequence[sa.Column[Any]]) -> sa.Subquery: ...

    def prepare(self, statement: sa.Executable) -> Prepared: ...

    def gather(self, rows: sa.Subquery) -> sa.ColumnElement[str]: ...

    def insert(self, table: sa.Table) -> Any: ...


class Prepared:
    """A statement as the driver takes it: its text, and the parameters that never change.

    What goes into a row is plain: drivers take a detour for an enum's member or a bool.
    One over `Dialect.arriving` takes its rows as one JSON parameter, unless the dialect knows a better way.
    """

    def __init__(self, statement: sa.Executable, dialect: sa.Dialect) -> None:
        assert isinstance(statement, sa.ClauseElement)
        compiled = statement.compile(dialect=dialect)
        self.sql = str(compiled)
        self._constants = {name: value for name, value in compiled.params.items() if value is not None}

    def run(self, cursor: Cursor, **values: object) -> Cursor:
        cursor.execute(self.sql, self._constants | values)
        return cursor

    def change(self, cursor: Cursor, rows: Sequence[Sequence[Any]], **values: object) -> int:
        """How many rows of the table changed."""
        return self.run(cursor, rows=json.dumps(rows), **values).rowcount

    def change_each(self, cursor: Cursor, rows: Sequence[Sequence[Any]], **values: object) -> Sequence[Any]:
        """What the statement's RETURNING says of each."""
        return self.run(cursor, rows=json.dumps(rows), **values).fetchall()

    def cells(self, cursor: Cursor, **values: object) -> Sequence[Any]:
        """The one row of a query that always has one."""
        row: Sequence[Any] | None = self.run(cursor, **values).fetchone()
        assert row is not None
        return row


class Gathered:
    """A query whose rows come in one cell or, where JSON cannot hold one of them, each as the driver reads it."""

    def __init__(self, whole: Prepared, each: Prepared, errors: type[Exception]) -> None:
        self._whole = whole
        self._each = each
        self._errors = errors

    def rows(self, cursor: Cursor, **values: object) -> Sequence[Sequence[Any]]:
        try:
            return rows_of(self._whole.cells(cursor, **values)[0])
        except (self._errors, ValueError, TypeError):  # a BLOB; text that is no UTF-8
            return self._each.run(cursor, **values).fetchall()


def one_column(values: Iterable[str]) -> str:
    """As the JSON parameter of `Dialect.expand`."""
    return json.dumps([[value] for value in values])


def rows_of(cell: str) -> list[list[Any]]:
    """The rows that `Dialect.gather` put into one cell."""
    rows: list[list[Any]] = from_json(cell)
    return rows


def has_status(status: str) -> sa.ColumnElement[bool]:
    """As a literal, because a partial index is only used where the statement itself shows its condition."""
    found: sa.ColumnElement[bool] = task.c.status == sa.literal_column(f"'{status}'")
    return found


def fence(rows: sa.Subquery) -> tuple[sa.ColumnElement[bool], ...]:
    """Only a task that still runs under this (attempt, instance) matches.

    The status is compared as an expression: SQLite would otherwise walk the index of all running tasks and look
    through the rows for each, instead of the other way round.
    """
    return (
        task.c.status.concat("") == TaskStatus.RUNNING,
        task.c.attempt == rows.c.attempt,
        task.c.instance == rows.c.instance,
    )


def ready_tasks(*conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Up to `most` ready tasks of a queue in their order. Each executor is a walk of its own with its own limit: where
    that is 0, it costs nothing however many tasks wait for that executor."""
    order = (rank.desc(), task.c.run_at, task.c.task_id)
    ready = sa.select(*CLAIMED_COLUMNS, task.c.run_at, rank.label("rank")).where(
        has_status("pending"), task.c.queue == sa.bindparam("queue"), *conditions
    )
    walks = [
        ready.where(task.c.executor == sa.literal_column(f"'{kind}'"))
        .order_by(*order)
        .limit(sa.bindparam(kind))
        .with_for_update(skip_locked=True)
        .subquery(kind)
        for kind in EXECUTORS
    ]
    found = sa.union_all(*map(sa.select, walks)).subquery("ready")
    columns = [found.c[column.name] for column in CLAIMED_COLUMNS]
    return (
        sa.select(*columns).order_by(found.c.rank.desc(), found.c.run_at, found.c.task_id).limit(sa.bindparam("most"))
    )


class Statements:
    def __init__(self, database: Dialect) -> None:
        self._database = database
        self._errors: type[Exception] = database.dialect.loaded_dbapi.Error
        self._listed = task.c.task_id.in_(self._ids())
        named = database.expand("rows", (task.c.task_id,))
        self.rows = sa.select(task).where(task.c.task_id.in_(sa.select(named.c.task_id))).with_for_update()
        self._build_turn()
        self._build_claim()
        self._build_logbook()
        self._build_purge()
        self._build_liveness()
        self._build_schedules()

    def insert(self, table: sa.Table) -> Any:
        """The dialect's INSERT, which knows ON CONFLICT."""
        return self._database.insert(table)

    def _prepare(self, statement: sa.Executable) -> Prepared:
        return self._database.prepare(statement)

    def _gather(self, rows: sa.Select[Any]) -> sa.Select[Any]:
        return sa.select(self._database.gather(rows.subquery("gathered")))

    def _prepare_gathered(self, rows: sa.Select[Any]) -> Gathered:
        return Gathered(self._prepare(self._gather(rows)), self._prepare(rows), self._errors)

    def look(self, cursor: Cursor) -> tuple[Sequence[Sequence[Any]], int | None, Any]:
        """How many tasks are ready and running by (queue, name, status), the newest version of queues, when the next
        delayed task is due: as they are stored."""
        try:
            levels, version, first_due = self._look.cells(cursor)
            return rows_of(levels), version, first_due
        except (self._errors, ValueError, TypeError):  # as in `Gathered.rows`
            version, first_due = self._others.cells(cursor)
            return self._levels.run(cursor).fetchall(), version, first_due

    def _ids(self) -> sa.Select[Any]:
        ids = self._database.arriving((task.c.task_id,))
        return sa.select(ids.c.task_id)

    def _insert_rows(self, table: sa.Table, names: Sequence[str]) -> Any:
        rows = self._database.arriving([table.c[name] for name in names])
        return self._database.insert(table).from_select(list(names), sa.select(*rows.c).where(sa.true()))

    def _build_turn(self) -> None:
        """Recording what finished, admitting what arrived."""
        finished = self._database.arriving(FINISH_COLUMNS)
        waits = sa.or_(finished.c.status == TaskStatus.PENDING, finished.c.status == DELAYED)
        withdrawn = sa.and_(waits, task.c.cancel_requested)  # what was asked to stop is not started again
        record = (
            task.update()
            .where(task.c.task_id == finished.c.task_id, *fence(finished))
            .values(
                status=sa.case((withdrawn, TaskStatus.CANCELLED), else_=finished.c.status),
                run_at=sa.func.coalesce(finished.c.run_at, task.c.run_at),
                finished_at=sa.case((sa.and_(waits, sa.not_(withdrawn)), sa.null()), else_=finished.c.finished_at),
                result=finished.c.result,
                error=finished.c.error,
                stacktrace=finished.c.stacktrace,
                excused=task.c.excused + finished.c.excused,
                cancel_requested=False,
            )
        )
        self.record = self._prepare(record)
        self.record_each = self._prepare(record.returning(task.c.task_id, task.c.attempt, task.c.status))
        drafted = self._database.arriving(DRAFT_COLUMNS)
        unset = {"excused": 0, "crashes": 0, "cancel_requested": False}
        admit = (
            self._database.insert(task)
            .from_select(
                [*(column.name for column in DRAFT_COLUMNS), *unset],
                sa.select(*drafted.c, *(sa.literal(value) for value in unset.values())).where(sa.true()),
            )
            .on_conflict_do_nothing(index_elements=["task_id"])
        )
        self.admit = self._prepare(admit)
        self.admit_each = self._prepare(admit.returning(task.c.task_id))

    def _build_claim(self) -> None:
        """Staging what became due, choosing what may start, seizing it."""
        live = counter.c.status.in_([sa.literal_column("'pending'"), sa.literal_column("'running'")])
        levels = sa.select(counter.c.queue, counter.c.name, counter.c.status, counter.c.n).where(live, counter.c.n > 0)
        version = sa.select(sa.func.max(queue.c.version)).scalar_subquery()
        first_due = sa.select(task.c.run_at).where(has_status(DELAYED)).order_by(task.c.run_at).limit(1)
        others = (version, first_due.scalar_subquery())
        self._look = self._prepare(sa.select(self._gather(levels).scalar_subquery(), *others))
        self._levels, self._others = self._prepare(levels), self._prepare(sa.select(*others))
        due = (
            sa.select(task.c.task_id)
            .where(has_status(DELAYED), task.c.run_at <= sa.bindparam("at"))
            .order_by(task.c.run_at)
            .limit(STAGE_BATCH)
        )
        self.stage = self._prepare(
            task.update()
            .where(task.c.task_id.in_(due))
            .values(status=TaskStatus.PENDING)
            .returning(task.c.queue, task.c.name)
        )
        self.queues = self._prepare(
            sa.select(queue.c.name, queue.c.concurrency, queue.c.max_size, queue.c.paused, queue.c.reason)
        )
        names = self._database.expand("names", (task.c.name,))
        self.ready = self._prepare_gathered(ready_tasks())
        self.ready_named = self._prepare_gathered(ready_tasks(task.c.name.in_(sa.select(names.c.name))))
        self.seize = self._prepare(
            task.update()
            .where(self._listed)
            .values(
                status=TaskStatus.RUNNING,
                attempt=task.c.attempt + 1,
                instance=sa.bindparam("me"),
                started_at=sa.bindparam("at"),
                finished_at=sa.null(),
                progress=sa.null(),
                cancel_requested=False,
            )
        )
        held = sa.select(*CLAIMED_COLUMNS).where(has_status("running"), task.c.instance == sa.bindparam("me"))
        self.held = self._prepare_gathered(held)
        self.set_aside = self._prepare(
            task.update()
            .where(
                task.c.status == sa.bindparam("before"),
                sa.cast(task.c.task_id, sa.LargeBinary) == sa.bindparam("raw_id"),
            )
            .values(status=TaskStatus.FAILED, error=sa.bindparam("reason"), finished_at=sa.bindparam("at"))
        )

    def _build_logbook(self) -> None:
        """Events, log lines, progress and counts: what a turn writes last."""
        self.events = self._prepare(self._insert_rows(event, EVENT_COLUMNS))
        self.logs = self._prepare(self._insert_rows(log, LOG_COLUMNS))
        counted = self._insert_rows(counter, ("queue", "name", "status", "n", "micros"))
        self.count = self._prepare(
            counted.on_conflict_do_update(
                index_elements=["queue", "name", "status"],
                set_={"n": counter.c.n + counted.excluded.n, "micros": counter.c.micros + counted.excluded.micros},
            )
        )
        told = self._database.arriving((task.c.task_id, task.c.attempt, task.c.instance, task.c.progress))
        self.progress = self._prepare(
            task.update().where(task.c.task_id == told.c.task_id, *fence(told)).values(progress=told.c.progress)
        )

    def _build_purge(self) -> None:
        """Deleting what ended long ago: oldest first along the index of its status, a limited number of rows at a time,
        a task after all that is known of it."""
        self.old = self._prepare(
            sa.select(task.c.task_id)
            .where(
                task.c.status == sa.bindparam("status"),
                task.c.created_at < sa.bindparam("before"),
                sa.func.coalesce(task.c.finished_at, task.c.created_at) < sa.bindparam("before"),
            )
            .order_by(task.c.created_at)
            .limit(sa.bindparam("most"))
        )
        facts = (task.c.queue, task.c.name, task.c.started_at, task.c.finished_at)
        self.purge = self._prepare(task.delete().where(self._listed).returning(*facts))
        self.purge_damaged = self._prepare(
            task.delete()
            .where(
                task.c.status == sa.bindparam("status"),
                sa.cast(task.c.task_id, sa.LargeBinary) == sa.bindparam("raw_id"),
            )
            .returning(*facts)
        )
        told = sa.select(event.c.seq).where(event.c.task_id.in_(self._ids()), event.c.actor.is_(None))
        self.purge_events = self._prepare(event.delete().where(event.c.seq.in_(told.limit(sa.bindparam("most")))))
        skipped = (
            sa.select(event.c.seq)
            .where(sa.text("kind = 'tick_skipped'"), event.c.at < sa.bindparam("before"))
            .order_by(event.c.at)
            .limit(sa.bindparam("most"))
        )
        self.purge_skips = self._prepare(event.delete().where(event.c.seq.in_(skipped)))
        said = sa.select(log.c.seq).where(log.c.task_id.in_(self._ids()))
        self.purge_logs = self._prepare(log.delete().where(log.c.seq.in_(said.limit(sa.bindparam("most")))))

    def _build_liveness(self) -> None:
        """Who is alive, what the dead left, who was asked to stop: asked seldom, so on SQLAlchemy's connection."""
        self.cancels = sa.select(task.c.task_id, task.c.attempt).where(
            has_status("running"), task.c.instance == sa.bindparam("me"), task.c.cancel_requested.is_(True)
        )
        owners = sa.select(task.c.instance).where(has_status("running"), task.c.instance.is_not(None)).distinct()
        self.runs_nothing = tables.instance.c.instance_id.not_in(owners)
        holders = sa.select(tables.instance.c.instance_id).where(tables.instance.c.lease_until > 0, self.runs_nothing)
        live = sa.union_all(owners, holders).subquery("live")
        owner = live.c[0]
        known = live.outerjoin(tables.instance, tables.instance.c.instance_id == owner)
        self.live_instances = sa.select(owner.label("owner"), tables.instance).select_from(known)
        lost = self._database.expand("rows", (task.c.instance,))
        self.lost = (
            sa.select(task)
            .where(has_status("running"), task.c.instance.in_(sa.select(lost.c.instance)))
            .limit(RESCUE_BATCH)
            .with_for_update(skip_locked=True)
        )

    def _build_schedules(self) -> None:
        """Firing the due ticks of many schedules at once; what is shown of schedules and one-offs."""
        asked = self._database.expand("rows", (schedule.c.name,))
        names = sa.select(asked.c.name)
        marks = sa.select(schedule.c.name, schedule.c.last_tick, schedule.c.paused)
        self.marks = self._prepare_gathered(marks.where(schedule.c.name.in_(names)).with_for_update())
        live = sa.and_(task.c.schedule.is_not(None), sa.text(tables.LIVE))
        live_runs = sa.select(task.c.schedule).where(live, task.c.schedule.in_(names)).distinct()
        self.live_runs = self._prepare_gathered(live_runs)
        fired = self._database.arriving(
            (
                schedule.c.name,
                schedule.c.last_tick,
                schedule.c.next_tick,
                schedule.c.last_run,
                schedule.c.last_task_id,
                schedule.c.started_at,
            ),
        )
        changed = {column.name: sa.func.coalesce(column, schedule.c[column.name]) for column in fired.c}
        self.advance = self._prepare(schedule.update().where(schedule.c.name == fired.c.name).values(changed))
        last = sa.select(schedule, task.c.status.label("last_status"))
        joined = last.outerjoin_from(schedule, task, task.c.task_id == schedule.c.last_task_id)
        self.schedules = joined.order_by(schedule.c.name)
        waiting = sa.and_(task.c.run_key.is_not(None), sa.text(tables.WAITING))
        self.one_offs = sa.select(task).where(waiting).order_by(task.c.run_at, task.c.task_id)
        self.waiting_one_offs = (
            sa.select(task).where(waiting, task.c.run_key == sa.bindparam("run_key")).with_for_update()
        )
