"""The SQL backend: one turn as one transaction, and the reads.

Owns every statement over the tables, for all SQL databases; `sqlite.py` and `postgres.py` say only what their
dialect forces. Called by the journal (turns, one at a time, on the writer's thread), by the heartbeat's thread and
by readers. The hot path moves sets, not rows: hundreds of changes travel as one JSON parameter into one statement,
which the database expands. That keeps a turn at a handful of statements, and while one runs Python is free.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, Row
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeoutError

from ..errors import BackendUnavailable, TaskflowError
from ..models import (
    DELAYED,
    RETRYABLE,
    Count,
    Cursor,
    EventKind,
    InstanceRecord,
    LogEntry,
    TaskEvent,
    TaskFilter,
    TaskPage,
    TaskRecord,
    TaskStatus,
    from_micros,
    to_micros,
)
from . import tables
from .base import (
    Answer,
    Beat,
    Cancel,
    Claimed,
    Command,
    Demand,
    Draft,
    Finish,
    Instance,
    LogLine,
    Progress,
    Requeue,
    Rescue,
    Turn,
    TurnResult,
)
from .tables import counter, event, log, rank, task

T = TypeVar("T")

SEARCH_WINDOW = 100_000
"""A search by something that has no index looks at this many of the newest tasks."""
STAGE_BATCH = 1_000
CLAIM_BATCH = 250
"""Tasks of one queue that one turn claims at most: the first run while the next are claimed."""
RESCUE_BATCH = 500
CRASH_BUDGET = 3
"""Processes that may die while running one task before it is failed as `crash_loop`."""

CLAIMED_COLUMNS = (
    task.c.task_id,
    task.c.name,
    task.c.queue,
    task.c.priority,
    task.c.executor,
    task.c.attempt,
    task.c.excused,
    task.c.max_attempts,
    task.c.created_at,
    task.c.started_at,
    task.c.arguments,
    task.c.tags,
    task.c.requeue,
    task.c.trace,
)
DRAFT_COLUMNS = (
    task.c.task_id,
    task.c.name,
    task.c.queue,
    task.c.priority,
    task.c.executor,
    task.c.source,
    task.c.status,
    task.c.max_attempts,
    task.c.created_at,
    task.c.run_at,
    task.c.arguments,
    task.c.tags,
    task.c.requeue,
    task.c.idempotency_key,
    task.c.retry_of,
    task.c.trace,
)
HEAVY_COLUMNS = ("arguments", "stacktrace")
"""Columns that a list of tasks leaves out."""


def has_status(status: str) -> sa.ColumnElement[bool]:
    """As a literal, because a partial index is only used where the statement itself shows its condition."""
    return task.c.status == sa.literal_column(f"'{status}'")


class SqlBackend:
    """Storage of tasks in an SQL database. See `base.Backend` for what each method promises."""

    def __init__(self, url: URL, *, readers: int = 2) -> None:
        self.url = url
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="taskflow-writer")
        self._reading = ThreadPoolExecutor(readers, thread_name_prefix="taskflow-reader") if readers else self._writing
        self._write_engine, self._read_engine = self.create_engines()
        self._statements = Statements(self)
        self._turns = 0

    # -- what a dialect decides

    def create_engines(self) -> tuple[Engine, Engine]:
        """Engines for writing (its transactions hold the write lock from the start) and for reading."""
        raise NotImplementedError

    def expand(self, parameter: str, columns: Sequence[sa.Column[Any]]) -> sa.Subquery:
        """The rows of a JSON array of arrays, as a table with these columns."""
        raise NotImplementedError

    def insert(self, table: sa.Table) -> Any:
        """The dialect's INSERT, which knows ON CONFLICT."""
        raise NotImplementedError

    # -- lifecycle

    async def open(self) -> None:
        await self._in(self._writing, self._migrate)

    async def close(self) -> None:
        """Ends the threads and connections after what they are doing now. The backend can be opened again."""
        for engine in (self._write_engine, self._read_engine):
            await self._in(self._writing, engine.dispose)

    async def ping(self) -> None:
        await self._read(lambda connection: connection.execute(sa.select(1)).scalar())

    def _migrate(self) -> None:
        with self._write_engine.begin() as connection:
            tables.Row.metadata.create_all(connection)
            version = connection.execute(sa.select(sa.func.max(tables.schema_version.c.version))).scalar()
            if version is None:
                connection.execute(tables.schema_version.insert().values(version=tables.SCHEMA_VERSION))
            elif version > tables.SCHEMA_VERSION:
                raise TaskflowError(
                    f"{self.url.render_as_string()} has schema version {version}; this code knows up to "
                    f"{tables.SCHEMA_VERSION}: deploy the newer code, or use another database"
                )

    # -- the turn

    async def turn(self, turn: Turn) -> TurnResult:
        return await self._in(self._writing, self._turn, turn)

    def _turn(self, turn: Turn) -> TurnResult:
        self._turns += 1
        with self._write_engine.begin() as connection:
            return TurnWriter(connection, self._statements, turn).write(rotation=self._turns)

    # -- instances

    def beat(self, instance: Instance, beat: Beat) -> None:
        row = {
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
        }
        changing = {name: row[name] for name in ("beat_at", "lease_until", "slots", "running")}
        statement = self.insert(tables.instance).values(row)
        with translated(), self._write_engine.begin() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["instance_id"], set_=changing))

    def lapsed(self, now: datetime) -> Sequence[tuple[Instance, bool]]:
        with translated(), self._read_engine.connect() as connection:
            rows = connection.execute(self._statements.live_instances).all()
        return [
            (
                Instance(
                    instance_id=row.instance_id,
                    host=row.host,
                    machine=row.machine,
                    pid=row.pid,
                    birth=row.birth,
                    version=row.version,
                    started=from_micros(row.started_at),
                ),
                row.lease_until < to_micros(now),
            )
            for row in rows
        ]

    def leave(self, instance_id: str) -> None:
        statement = tables.instance.update().where(tables.instance.c.instance_id == instance_id).values(lease_until=0)
        with translated(), self._write_engine.begin() as connection:
            connection.execute(statement)

    # -- reads

    async def get(self, task_id: str) -> TaskRecord | None:
        statement = sa.select(task).where(task.c.task_id == task_id)
        row = await self._read(lambda connection: connection.execute(statement).first())
        return None if row is None else record_of(row)

    async def page(self, where: TaskFilter, before: Cursor | None, limit: int) -> TaskPage:
        statement = page_statement(where, before, limit + 1)
        rows = await self._read(lambda connection: connection.execute(statement).all())
        records = [record_of(row) for row in rows[:limit]]
        older = Cursor(records[-1].created_at, records[-1].task_id) if len(rows) > limit else None
        return TaskPage(records, older)

    async def events(self, task_id: str) -> Sequence[TaskEvent]:
        return await self._events(event.c.task_id == task_id, 10_000)

    async def events_after(self, seq: int, limit: int) -> Sequence[TaskEvent]:
        return await self._events(event.c.seq > seq, limit)

    async def _events(self, condition: sa.ColumnElement[bool], limit: int) -> Sequence[TaskEvent]:
        statement = sa.select(event).where(condition).order_by(event.c.seq).limit(limit)
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return [
            TaskEvent(
                seq=row.seq,
                task_id=row.task_id,
                time=from_micros(row.at),
                kind=row.kind,
                attempt=row.attempt,
                instance=row.instance,
                actor=row.actor,
                detail=row.detail,
            )
            for row in rows
        ]

    async def last_seq(self) -> int:
        newest = sa.select(sa.func.max(event.c.seq))
        return await self._read(lambda connection: connection.execute(newest).scalar()) or 0

    async def logs(self, task_id: str, after: int, limit: int) -> Sequence[LogEntry]:
        statement = (
            sa.select(log).where(log.c.task_id == task_id, log.c.seq > after).order_by(log.c.seq).limit(limit)
        )
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return [
            LogEntry(
                seq=row.seq,
                task_id=row.task_id,
                time=from_micros(row.at),
                level=row.level,
                attempt=row.attempt,
                message=row.message,
                extra=loads_object(row.extra),
            )
            for row in rows
        ]

    async def counts(self) -> Sequence[Count]:
        statement = sa.select(counter).where(counter.c.n > 0)
        rows = await self._read(lambda connection: connection.execute(statement).all())
        delayed = {(row.queue, row.name): row.n for row in rows if row.status == DELAYED}
        found = {(row.queue, row.name, row.status): row for row in rows if row.status != DELAYED}
        for queue, name in delayed:
            found.setdefault((queue, name, TaskStatus.PENDING), None)
        return [
            Count(
                queue=queue,
                name=name,
                status=TaskStatus(status),
                n=(row.n if row else 0) + waiting,
                seconds=row.micros / 1e6 if row else 0.0,
                delayed=waiting,
            )
            for (queue, name, status), row in found.items()
            for waiting in (delayed.get((queue, name), 0) if status == TaskStatus.PENDING else 0,)
        ]

    async def instances(self) -> Sequence[InstanceRecord]:
        statement = sa.select(tables.instance).order_by(tables.instance.c.started_at.desc())
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return [
            InstanceRecord(
                instance_id=row.instance_id,
                host=row.host,
                pid=row.pid,
                version=row.version,
                started=from_micros(row.started_at),
                heartbeat=from_micros(row.beat_at),
                slots=row.slots,
                running=row.running,
            )
            for row in rows
        ]

    async def cancels(self, instance_id: str) -> Sequence[str]:
        statement = self._statements.cancels
        rows = await self._read(lambda connection: connection.execute(statement, {"me": instance_id}).all())
        return [row.task_id for row in rows]

    # -- threads

    async def _read(self, question: Callable[[Connection], T]) -> T:
        def ask() -> T:
            with self._read_engine.connect() as connection:
                return question(connection)

        return await self._in(self._reading, ask)

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[..., T], *args: object) -> T:
        def call() -> T:
            with translated():
                return function(*args)

        return await asyncio.get_running_loop().run_in_executor(pool, call)


class translated:  # noqa: N801 - a context manager, named as it reads
    """Turns the errors of a database that is away, locked or full into `BackendUnavailable`."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """What the values caused (a DataError, say) is not unavailability and goes on as it is."""
        if isinstance(error, OperationalError | InterfaceError | InternalError | SQLAlchemyTimeoutError):
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise BackendUnavailable(str(reason)) from error


class Statements:
    """The statements of the hot path, built once. Each takes its rows as one JSON parameter, `rows`."""

    def __init__(self, backend: SqlBackend) -> None:
        finished = backend.expand(
            "rows",
            (
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
            ),
        )
        self.record = (
            task.update()
            .where(task.c.task_id == finished.c.task_id, *fence(finished))
            .values(
                status=finished.c.status,
                run_at=sa.func.coalesce(finished.c.run_at, task.c.run_at),
                finished_at=finished.c.finished_at,
                result=finished.c.result,
                error=finished.c.error,
                stacktrace=finished.c.stacktrace,
                excused=task.c.excused + finished.c.excused,
                cancel_requested=False,
            )
            .returning(task.c.task_id)
        )

        drafted = backend.expand("rows", DRAFT_COLUMNS)
        unset = {"attempt": 0, "excused": 0, "crashes": 0, "cancel_requested": False}
        self.admit = (
            backend.insert(task)
            .from_select(
                [*(column.name for column in DRAFT_COLUMNS), *unset],
                sa.select(*drafted.c, *(sa.literal(value) for value in unset.values())).where(sa.true()),
            )
            .on_conflict_do_nothing(index_elements=["task_id"])
            .returning(task.c.task_id)
        )

        ids = backend.expand("rows", (task.c.task_id,))
        listed = task.c.task_id.in_(sa.select(ids.c.task_id))
        self.seize = (
            task.update()
            .where(listed)
            .values(
                status=TaskStatus.RUNNING,
                attempt=task.c.attempt + 1,
                instance=sa.bindparam("me"),
                started_at=sa.bindparam("at"),
                finished_at=None,
                progress=None,
                cancel_requested=False,
            )
            .returning(*CLAIMED_COLUMNS)
        )
        self.rows = sa.select(task).where(listed).with_for_update()

        names = backend.expand("names", (task.c.name,))
        ready = (
            sa.select(task.c.task_id, task.c.name)
            .where(has_status("pending"), task.c.queue == sa.bindparam("queue"))
            .order_by(rank.desc(), task.c.run_at, task.c.task_id)
            .limit(sa.bindparam("limit"))
            .with_for_update(skip_locked=True)
        )
        self.ready = ready
        self.ready_named = ready.where(task.c.name.in_(sa.select(names.c.name)))
        self.waiting = sa.select(counter.c.queue, counter.c.name, counter.c.n).where(
            counter.c.status == TaskStatus.PENDING, counter.c.n > 0
        )

        due = (
            sa.select(task.c.task_id)
            .where(has_status(DELAYED), task.c.run_at <= sa.bindparam("at"))
            .order_by(task.c.run_at)
            .limit(STAGE_BATCH)
        )
        self.stage = (
            task.update()
            .where(task.c.task_id.in_(due))
            .values(status=TaskStatus.PENDING)
            .returning(task.c.queue, task.c.name)
        )
        self.next_due = sa.select(task.c.run_at).where(has_status(DELAYED)).order_by(task.c.run_at).limit(1)

        self.held = sa.select(*CLAIMED_COLUMNS).where(
            has_status("running"), task.c.instance == sa.bindparam("me")
        )
        self.cancels = sa.select(task.c.task_id).where(
            has_status("running"), task.c.instance == sa.bindparam("me"), task.c.cancel_requested.is_(True)
        )
        running_owners = sa.select(task.c.instance).where(has_status("running")).distinct()
        self.live_instances = sa.select(tables.instance).where(
            sa.or_(tables.instance.c.lease_until > 0, tables.instance.c.instance_id.in_(running_owners))
        )

        lost = backend.expand("rows", (task.c.instance,))
        self.lost = (
            sa.select(task)
            .where(has_status("running"), task.c.instance.in_(sa.select(lost.c.instance)))
            .limit(RESCUE_BATCH)
            .with_for_update(skip_locked=True)
        )

        self.events = insert_rows(backend, event, ("task_id", "at", "kind", "attempt", "instance", "actor", "detail"))
        self.logs = insert_rows(backend, log, ("task_id", "at", "level", "attempt", "message", "extra"))
        counted = insert_rows(backend, counter, ("queue", "name", "status", "n", "micros"))
        self.count = counted.on_conflict_do_update(
            index_elements=["queue", "name", "status"],
            set_={"n": counter.c.n + counted.excluded.n, "micros": counter.c.micros + counted.excluded.micros},
        )
        told = backend.expand("rows", (task.c.task_id, task.c.attempt, task.c.instance, task.c.progress))
        self.progress = (
            task.update()
            .where(task.c.task_id == told.c.task_id, *fence(told))
            .values(progress=told.c.progress)
        )


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


def insert_rows(backend: SqlBackend, table: sa.Table, names: Sequence[str]) -> Any:
    rows = backend.expand("rows", [table.c[name] for name in names])
    return backend.insert(table).from_select(list(names), sa.select(*rows.c).where(sa.true()))


class TurnWriter:
    """Writes one turn on an open transaction. Collects its events and changed counts, and writes them last."""

    def __init__(self, connection: Connection, statements: Statements, turn: Turn) -> None:
        self._connection = connection
        self._sql = statements
        self._turn = turn
        self._at = to_micros(turn.now)
        self._events: list[list[Any]] = []
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._micros: Counter[tuple[str, str, str]] = Counter()

    def write(self, rotation: int) -> TurnResult:
        turn = self._turn
        refused = self._record(turn.finishes) if turn.finishes else frozenset()
        existing = self._admit(turn.drafts) if turn.drafts else frozenset()
        answers = [self._obey(command) for command in turn.commands]
        next_due = self._stage()
        claimed, more = self._claim(turn.demand, rotation) if turn.demand else ([], False)
        if turn.held is not None:
            claimed += self._orphans(turn.held, {item.task_id for item in claimed})
        self._write_logs(turn.logs)
        self._write_progress(turn.progress)
        self._write_events()
        self._write_counts()
        return TurnResult(
            existing=existing,
            refused=refused,
            answers=answers,
            claimed=claimed,
            more=more,
            next_due=next_due,
        )

    # -- the parts of a turn

    def _record(self, finishes: Sequence[Finish]) -> frozenset[str]:
        rows = [
            [
                finish.task.task_id,
                finish.task.attempt,
                self._turn.instance,
                stored_status(finish.status, finish.run_at, self._turn.now),
                micros(finish.run_at),
                to_micros(finish.at) if finish.status.terminal else None,
                finish.result,
                finish.error,
                finish.stacktrace,
                int(finish.excused),
            ]
            for finish in finishes
        ]
        written = {row.task_id for row in self._rows(self._sql.record, rows)}
        for finish, (_, _, _, status, *_) in zip(finishes, rows, strict=True):
            item = finish.task
            if item.task_id not in written:
                self._event(EventKind.LEASE_LOST, item.task_id, item.attempt, detail=f"{finish.kind} came too late")
                continue
            self._event(finish.kind, item.task_id, item.attempt, at=finish.at, detail=finish.error)
            self._move(item.queue, item.name, TaskStatus.RUNNING, status)
            if finish.status.terminal:
                self._micros[item.queue, item.name, status] += to_micros(finish.at) - to_micros(item.started_at)
        return frozenset(finish.task.task_id for finish in finishes) - written

    def _admit(self, drafts: Sequence[Draft]) -> frozenset[str]:
        unique = {draft.task_id: draft for draft in drafts}
        status = {
            draft.task_id: stored_status(TaskStatus.PENDING, draft.run_at, self._turn.now) for draft in drafts
        }
        rows = [draft_row(draft, status[draft.task_id]) for draft in unique.values()]
        written = {row.task_id for row in self._rows(self._sql.admit, rows)}
        for task_id in written:
            draft = unique[task_id]
            self._event(EventKind.ACCEPTED, task_id, at=draft.created_at)
            self._move(draft.queue, draft.name, None, status[task_id])
        existing = unique.keys() - written
        if existing:
            self._rearm([unique[task_id] for task_id in existing])
        return frozenset(existing)

    def _rearm(self, drafts: Sequence[Draft]) -> None:
        """An idempotency key whose task failed or was interrupted runs that task again, with the new arguments."""
        again = {TaskStatus.FAILED, TaskStatus.INTERRUPTED}
        by_id = {draft.task_id: draft for draft in drafts if draft.key is not None}
        for row in self._rows(self._sql.rows, [[task_id] for task_id in by_id]):
            if row.status in again:
                draft = by_id[row.task_id]
                self._requeue(row, draft.max_attempts, None, arguments=draft.arguments)

    def _obey(self, command: Command) -> Answer:
        match command:
            case Cancel(task_id, actor):
                return self._cancel(task_id, actor)
            case Requeue(task_id, max_attempts, actor):
                row = self._one(task_id)
                if row is None or status_of(row) not in RETRYABLE:
                    return Answer(before=row and status_of(row))
                self._requeue(row, max_attempts, actor)
                return Answer(before=status_of(row), changed=1)
            case Rescue(instances):
                return self._rescue(instances)

    def _cancel(self, task_id: str, actor: str | None) -> Answer:
        row = self._one(task_id)
        if row is None:
            return Answer()
        status = status_of(row)
        if status is TaskStatus.PENDING:
            self._update(task_id, status=TaskStatus.CANCELLED, finished_at=self._at)
            self._event(EventKind.CANCELLED, task_id, actor=actor)
            self._move(row.queue, row.name, row.status, TaskStatus.CANCELLED)
        elif status is TaskStatus.RUNNING:
            self._update(task_id, cancel_requested=True)
            self._event(EventKind.CANCEL_REQUESTED, task_id, row.attempt, actor=actor)
        return Answer(before=status, changed=int(not status.terminal), instance=row.instance)

    def _requeue(self, row: Row[Any], max_attempts: int, actor: str | None, **changes: object) -> None:
        self._update(
            row.task_id,
            status=TaskStatus.PENDING,
            run_at=self._at,
            excused=row.attempt,
            max_attempts=max_attempts,
            crashes=0,
            finished_at=None,
            result=None,
            error=None,
            stacktrace=None,
            cancel_requested=False,
            **changes,
        )
        self._event(EventKind.REQUEUED, row.task_id, actor=actor)
        self._move(row.queue, row.name, row.status, TaskStatus.PENDING)
        if row.started_at is not None and row.finished_at is not None:
            self._micros[row.queue, row.name, row.status] -= row.finished_at - row.started_at

    def _rescue(self, instances: Sequence[str]) -> Answer:
        lost = self._rows(self._sql.lost, [[instance] for instance in instances])
        for row in lost:
            crashes = row.crashes + 1
            if not row.requeue:
                kind, status, error = EventKind.INTERRUPTED, TaskStatus.INTERRUPTED, "its process went away"
            elif crashes >= CRASH_BUDGET:
                kind, status = EventKind.FAILED, TaskStatus.FAILED
                error = f"crash_loop: its process died {crashes} times while it ran"
            else:
                kind, status, error = EventKind.RESCUED, TaskStatus.PENDING, None
            self._update(
                row.task_id,
                status=status,
                crashes=crashes,
                excused=row.excused + 1,
                error=error,
                run_at=self._at if status is TaskStatus.PENDING else row.run_at,
                finished_at=self._at if status.terminal else None,
                cancel_requested=False,
            )
            self._event(kind, row.task_id, row.attempt, detail=error or f"left running by {row.instance}")
            self._move(row.queue, row.name, TaskStatus.RUNNING, status)
        return Answer(changed=len(lost))

    def _stage(self) -> datetime | None:
        """Makes ready what has become due, and says when the next one will."""
        due = self._connection.execute(self._sql.next_due).scalar()
        if due is not None and due <= self._at:
            for row in self._connection.execute(self._sql.stage, {"at": self._at}).all():
                self._move(row.queue, row.name, DELAYED, TaskStatus.PENDING)
            due = self._connection.execute(self._sql.next_due).scalar()
        return None if due is None else from_micros(due)

    def _claim(self, demand: Demand, rotation: int) -> tuple[list[Claimed], bool]:
        """Takes what may start, queue by queue; the queue that goes first changes from turn to turn."""
        slots = {kind: free for kind, free in demand.slots.items() if free > 0}
        waiting = self._waiting()
        queues = sorted(waiting)
        chosen: list[str] = []
        more = False
        for queue in queues[rotation % len(queues) :] + queues[: rotation % len(queues)] if queues else []:
            names = {name for name in waiting[queue] if demand.names.get(name) in slots}
            limit = min(sum(slots.values()), demand.queues.get(queue, CLAIM_BATCH), CLAIM_BATCH)
            if not names or limit <= 0:
                continue
            candidates = self._ready(queue, names, waiting[queue], limit)
            more = more or len(candidates) == limit
            for row in candidates:
                kind = demand.names[row.name]
                if slots.get(kind, 0) > 0:
                    slots[kind] -= 1
                    chosen.append(row.task_id)
            slots = {kind: free for kind, free in slots.items() if free > 0}
        return (self._seize(chosen) if chosen else []), more

    def _waiting(self) -> Mapping[str, Collection[str]]:
        """Queue -> names of which tasks are ready, this turn's own changes included."""
        numbers = Counter({(row.queue, row.name): row.n for row in self._connection.execute(self._sql.waiting)})
        for (queue, name, status), n in self._counts.items():
            if status == TaskStatus.PENDING:
                numbers[queue, name] += n
        found: defaultdict[str, set[str]] = defaultdict(set)
        for (queue, name), n in numbers.items():
            if n > 0:
                found[queue].add(name)
        return found

    def _ready(self, queue: str, names: set[str], waiting: Collection[str], limit: int) -> Sequence[Row[Any]]:
        values: dict[str, object] = {"queue": queue, "limit": limit}
        if names.issuperset(waiting):
            return self._connection.execute(self._sql.ready, values).all()
        values["names"] = json.dumps([[name] for name in names])
        return self._connection.execute(self._sql.ready_named, values).all()

    def _seize(self, chosen: Sequence[str]) -> list[Claimed]:
        place = {task_id: index for index, task_id in enumerate(chosen)}
        rows = self._rows(self._sql.seize, [[task_id] for task_id in chosen], me=self._turn.instance, at=self._at)
        for row in rows:
            self._event(EventKind.STARTED, row.task_id, row.attempt)
            self._move(row.queue, row.name, TaskStatus.PENDING, TaskStatus.RUNNING)
        return [claimed_of(row) for row in sorted(rows, key=lambda row: place[row.task_id])]

    def _orphans(self, held: frozenset[str], fresh: Collection[str]) -> list[Claimed]:
        rows = self._connection.execute(self._sql.held, {"me": self._turn.instance}).all()
        return [claimed_of(row) for row in rows if row.task_id not in held and row.task_id not in fresh]

    # -- what is written last

    def _write_logs(self, lines: Sequence[LogLine]) -> None:
        rows = [
            [line.task_id, to_micros(line.at), line.level, line.attempt, line.message, dumps_object(line.extra)]
            for line in lines
        ]
        self._bulk(self._sql.logs, rows)

    def _write_progress(self, progress: Sequence[Progress]) -> None:
        rows = [[item.task_id, item.attempt, self._turn.instance, dumps_object(item.value)] for item in progress]
        self._bulk(self._sql.progress, rows)

    def _write_events(self) -> None:
        self._bulk(self._sql.events, self._events)

    def _write_counts(self) -> None:
        keys = [key for key in self._counts.keys() | self._micros.keys() if self._counts[key] or self._micros[key]]
        self._bulk(self._sql.count, [[*key, self._counts[key], self._micros[key]] for key in sorted(keys)])

    # -- helpers

    def _event(
        self,
        kind: EventKind,
        task_id: str,
        attempt: int | None = None,
        *,
        at: datetime | None = None,
        actor: str | None = None,
        detail: str | None = None,
    ) -> None:
        """`attempt` is the number of started attempts; the event counts it from 0."""
        self._events.append(
            [
                task_id,
                self._at if at is None else to_micros(at),
                kind,
                None if attempt is None else attempt - 1,
                self._turn.instance,
                actor,
                detail,
            ]
        )

    def _move(self, queue: str, name: str, before: str | None, after: str) -> None:
        if before is not None:
            self._counts[queue, name, before] -= 1
        self._counts[queue, name, after] += 1

    def _one(self, task_id: str) -> Row[Any] | None:
        found = self._rows(self._sql.rows, [[task_id]])
        return found[0] if found else None

    def _update(self, task_id: str, **values: object) -> None:
        self._connection.execute(task.update().where(task.c.task_id == task_id).values(values))

    def _rows(self, statement: sa.Executable, rows: list[list[Any]], **values: object) -> Sequence[Row[Any]]:
        return self._connection.execute(statement, {"rows": json.dumps(rows), **values}).all()

    def _bulk(self, statement: sa.Executable, rows: list[list[Any]]) -> None:
        if rows:
            self._connection.execute(statement, {"rows": json.dumps(rows)})


# -- values and rows


def micros(moment: datetime | None) -> int | None:
    return None if moment is None else to_micros(moment)


def moment(value: int | None) -> datetime | None:
    return None if value is None else from_micros(value)


def stored_status(status: TaskStatus, run_at: datetime | None, now: datetime) -> str:
    return DELAYED if status is TaskStatus.PENDING and run_at is not None and run_at > now else status


def status_of(row: Row[Any]) -> TaskStatus:
    return TaskStatus.PENDING if row.status == DELAYED else TaskStatus(row.status)


def dumps_object(value: Mapping[str, Any]) -> str:
    return json.dumps(value, default=str) if value else "{}"


def loads_object(text: str | None) -> dict[str, Any]:
    """A broken cell shows as empty: one bad row must never stop a turn or a page."""
    if not text or text == "{}":
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def draft_row(draft: Draft, status: str) -> list[Any]:
    """In the order of DRAFT_COLUMNS."""
    return [
        draft.task_id,
        draft.name,
        draft.queue,
        draft.priority,
        draft.executor,
        draft.source,
        status,
        draft.max_attempts,
        to_micros(draft.created_at),
        to_micros(draft.run_at),
        draft.arguments,
        dumps_object(draft.tags),
        draft.requeue,
        draft.key,
        draft.retry_of,
        draft.trace,
    ]


def claimed_of(row: Row[Any]) -> Claimed:
    return Claimed(
        task_id=row.task_id,
        name=row.name,
        queue=row.queue,
        priority=row.priority,
        executor=row.executor,
        attempt=row.attempt,
        excused=row.excused,
        max_attempts=row.max_attempts,
        created_at=from_micros(row.created_at),
        started_at=from_micros(row.started_at),
        arguments=row.arguments,
        tags=loads_object(row.tags),
        requeue=bool(row.requeue),
        trace=row.trace,
    )


def record_of(row: Row[Any]) -> TaskRecord:
    """A record from a whole row, or from a list's row without the heavy columns."""
    cells = row._mapping
    return TaskRecord(
        task_id=row.task_id,
        func_name=row.name,
        status=status_of(row),
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
        error=row.error,
        stacktrace=cells.get("stacktrace"),
        arguments=cells.get("arguments"),
        result=row.result,
        progress=loads_object(row.progress) if row.progress else None,
        instance=row.instance,
        idempotency_key=row.idempotency_key,
        cancel_requested=bool(row.cancel_requested),
        retry_of=row.retry_of,
    )


# -- pages


def page_statement(where: TaskFilter, before: Cursor | None, limit: int) -> sa.Select[Any]:
    """Newest first, below `before`. Each status is its own walk down its own index, merged at the end, so that the
    cost is that of the rows shown; what has no index is looked for among the newest SEARCH_WINDOW."""
    columns = [column for column in task.c if column.name not in HEAVY_COLUMNS]
    walk = sa.select(*columns).where(*indexed_conditions(where, before))
    statuses = [stored for status in where.statuses for stored in stored_names(status)]
    branches = [walk.where(task.c.status == stored) for stored in statuses] or [walk]
    scanned = scanned_conditions(where, len(statuses))
    window = SEARCH_WINDOW if scanned else limit
    parts = [newest_first(branch, task.c, window) for branch in branches]
    merged = sa.union_all(*(sa.select(part.subquery()) for part in parts)).subquery()
    found = sa.select(merged).where(*(condition(merged.c) for condition in scanned))
    return newest_first(found, merged.c, limit)


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
    if where.func_name is not None and not where.statuses:
        conditions.append(task.c.name == where.func_name)
    elif where.queue is not None and not where.statuses:
        conditions.append(task.c.queue == where.queue)
    return conditions


def scanned_conditions(where: TaskFilter, statuses: int) -> list[Callable[[Any], sa.ColumnElement[bool]]]:
    conditions: list[Callable[[Any], sa.ColumnElement[bool]]] = []
    if where.func_name is not None and statuses:
        conditions.append(lambda c: c.name == where.func_name)
    if where.queue is not None and (statuses or where.func_name is not None):
        conditions.append(lambda c: c.queue == where.queue)
    if where.source is not None:
        conditions.append(lambda c: c.source == where.source)
    for key, value in where.tags:
        pair = json.dumps({key: value})[1:-1]
        conditions.append(lambda c, pair=pair: c.tags.contains(pair, autoescape=True))
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


