"""The SQL backend: one turn as one transaction, and the reads.

Owns connections, threads and the schema, for all SQL databases; `sqlite.py` and `postgres.py` say what their dialect
forces and how it shows and writes a turn, `pages.py` holds the questions. Called by the journal (turns, one at a time,
on the writer's thread), by the heartbeat's thread and by readers.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, Row
from sqlalchemy.exc import DatabaseError, DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeoutError

from ..errors import BackendUnavailable, Contended, TaskflowError
from ..models import (
    DELAYED,
    AuditFilter,
    Count,
    Cursor,
    ErrorGroup,
    InstanceRecord,
    LogEntry,
    QueueState,
    ScheduledOnce,
    ScheduleState,
    TaskEvent,
    TaskFilter,
    TaskPage,
    TaskRecord,
    from_micros,
    to_micros,
)
from ..rules.turns import decide, wants
from . import copies, enlisted, pages, tables
from .base import EVERY_ACT, AttemptId, Batch, Beat, GaugeRow, Instance, Pulse, Turn, TurnResult
from .cells import mended
from .changes import EXECUTORS, STAGE_BATCH, Applied, Stale
from .pages import has_status, page_statement
from .rows import event_of, group_of, instance_of, log_of, one_off_of, page_of, pulse_of, record_of, schedule_of
from .search import Searches, is_search
from .stored import instance_row, merged_counts, queue_states
from .tables import counter, event, log, revoked, task

T = TypeVar("T")

NO_SCHEMA = ("42P01", "42703")
"""What PostgreSQL says of a table or a column that is not there: not yet, where another process is about to make it."""

MOST_PRIORITIES = 32
"""Of one queue, at whose oldest task somebody looks."""
MOST_TRIES = 5
"""Of one turn, while other processes change what it is about."""


class SqlBackend:
    """Storage of tasks in an SQL database. See `base.Backend` for what each method promises."""

    def __init__(self, url: URL, *, readers: int = 2) -> None:
        self.url = url
        self._readers = readers
        self._hire()
        self._write_engine, self._read_engine = self.create_engines()
        self._turns = 0
        self.clock_offset = timedelta(0)

    # -- what a dialect decides

    def create_engines(self) -> tuple[Engine, Engine]:
        """Engines for writing (its transactions hold the write lock from the start) and for reading."""
        raise NotImplementedError

    def insert(self, table: sa.Table) -> Any:
        """The dialect's INSERT, which knows ON CONFLICT."""
        raise NotImplementedError

    def _written(self, turn: Turn, *, careful: bool) -> TurnResult:
        """One try of a turn, committed. Raises Stale where something is not as it was taken for granted."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """Of the connection that turns are written on."""
        raise NotImplementedError

    def attempt(self, connection: Connection) -> AbstractContextManager[object]:
        """Around what is written inside a transaction of the caller's, and may have to be written again."""
        raise NotImplementedError

    def index_tags(self, connection: Connection) -> None:
        """Makes what keeps the index of tags, and fills it."""
        raise NotImplementedError

    def lock_schema(self, connection: Connection) -> None:
        """One process at a time brings the schema up."""

    def go_behind(self, connection: Connection, table: sa.Table) -> None:
        """The next number of a table that was given rows with numbers is behind them."""

    def count_rows(self) -> sa.Select[Any]:
        """The counts that are not zero, in the columns of the counter table."""
        return sa.select(counter).where(counter.c.n > 0)

    # -- lifecycle

    @property
    def name(self) -> str:
        return self.url.render_as_string()

    async def open(self) -> None:
        if self._process != os.getpid():
            self._begin_anew()
        await self._in(self._writing, self._migrate)

    async def is_current(self) -> bool:
        return await self._read(self._is_current)

    def _is_current(self, connection: Connection) -> bool:
        there = sa.inspect(connection).has_table(tables.schema_version.name)
        return there and self._version(connection) == tables.SCHEMA_VERSION

    def _hire(self) -> None:
        self._process = os.getpid()
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="taskflow-writer")
        self._reading = self._searching = self._writing
        if self._readers:
            self._reading = ThreadPoolExecutor(self._readers, thread_name_prefix="taskflow-reader")
            self._searching = ThreadPoolExecutor(self._readers, thread_name_prefix="taskflow-search")
        self._searches = Searches()

    def _begin_anew(self) -> None:
        """In a process forked from one that had used this: its threads are not here, its connections are not ours."""
        self._hire()
        for engine in (self._write_engine, self._read_engine):
            engine.dispose(close=False)

    async def close(self) -> None:
        """Ends the threads and connections after what they are doing now. The backend can be opened again."""
        await self._in(self._writing, self._let_go)
        for engine in (self._write_engine, self._read_engine):
            await self._in(self._writing, engine.dispose)

    def _migrate(self) -> None:
        with self._write_engine.begin() as connection:
            self.lock_schema(connection)
            if not self._is_current(connection):
                self._create_tables(connection)
                version = self._version(connection)
                for number in range((version or tables.SCHEMA_VERSION) + 1, tables.SCHEMA_VERSION + 1):
                    for step in tables.STEPS[number]:
                        step(connection)
                connection.execute(tables.schema_version.insert().values(version=tables.SCHEMA_VERSION))
            self._check_schema(connection)

    def _create_tables(self, connection: Connection) -> None:
        is_tagged = sa.inspect(connection).has_table(tables.tag.name)
        tables.Row.metadata.create_all(connection)
        if not is_tagged:
            self.index_tags(connection)

    def _check_schema(self, connection: Connection) -> None:
        """The number alone does not say that all is there: a table may have been dropped, or a restore have failed."""
        if missing := tables.missing(connection):
            raise TaskflowError(
                f"{self.url.render_as_string()} has schema version {tables.SCHEMA_VERSION}, but not its "
                f"{', '.join(missing)}: restore it from a backup, or use another database"
            )

    def _version(self, connection: Connection) -> int | None:
        """The number of the schema that is stored. Raises TaskflowError when it is of newer code."""
        version = connection.execute(sa.select(sa.func.max(tables.schema_version.c.version))).scalar()
        if version is not None and version > tables.SCHEMA_VERSION:
            raise TaskflowError(
                f"{self.url.render_as_string()} has schema version {version}; this code knows up to "
                f"{tables.SCHEMA_VERSION}: deploy the newer code, or use another database"
            )
        return version

    # -- the turn

    async def turn(self, turn: Turn) -> TurnResult:
        return await self._in(self._writing, self._turn, turn)

    def _turn(self, turn: Turn) -> TurnResult:
        self._turns += 1
        for number in range(MOST_TRIES):
            with suppress(Stale):
                return self._written(turn, careful=number > 0)
        raise Contended

    def enlist(self, connection: Connection, turn: Turn) -> TurnResult:
        """Writes drafts on a connection of the caller's, as part of the caller's transaction."""
        for _ in range(MOST_TRIES):
            with suppress(Stale), translated(), self.attempt(connection):
                snapshot = enlisted.look(connection, wants(turn, careful=True), self.count_rows())
                decision = decide(turn, snapshot, careful=True)
                counts = enlisted.write(connection, self.insert(task), decision.changes)
                if counts:
                    self.enlist_counts(connection, counts)
                return decision.result(Applied())
        raise Contended

    def enlist_counts(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        statement = self.insert(counter)
        added = {name: counter.c[name] + statement.excluded[name] for name in ("n", "micros")}
        keys = ["queue", "name", "status"]
        connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=added), rows)

    # -- instances

    def beat(self, instance: Instance, beat: Beat) -> None:
        row = instance_row(instance, beat)
        stamp = row["beat_at"]
        changing = {name: row[name] for name in ("beat_at", "lease_until", "slots", "running", "vitals")}
        known, statement = tables.instance.c.beat_at, self.insert(tables.instance).values(row)
        just_before = known.between(stamp, stamp + 999)  # a clock that stands still, say
        changing["beat_at"] = sa.case((just_before, known + 1), else_=stamp)  # never again the one before
        statement = statement.on_conflict_do_update(index_elements=["instance_id"], set_=changing)
        self._apart(lambda: self._write(statement))

    def pulses(self) -> Sequence[Pulse]:
        return [pulse_of(pulse_cells(row)) for row in self._apart(self._live_instances)]

    def leave(self, instance_id: str, stamp: int | None = None) -> None:
        row, table = tables.instance.c, tables.instance
        mine, gone = row.instance_id == instance_id, row.lease_until == 0
        if stamp is None:
            self._apart(lambda: self._write(table.update().where(mine).values(lease_until=0)))
        else:
            gone = sa.or_(gone, sa.and_(mine, row.beat_at == stamp))
        self._apart(lambda: self._write(table.delete().where(gone, pages.RUNS_NOTHING)))

    def _write(self, statement: sa.Executable) -> None:
        with self._write_engine.begin() as connection:
            connection.execute(statement)

    def _live_instances(self) -> Sequence[Row[Any]]:
        with self._read_engine.connect() as connection:
            return connection.execute(pages.LIVE_INSTANCES).all()

    def _apart(self, function: Callable[[], T]) -> T:
        """Runs on the calling thread, on a connection of its own: neither waits for a turn nor for the event loop."""
        with translated():
            return function()

    # -- reads

    async def get(self, task_id: str) -> TaskRecord | None:
        statement = sa.select(task).where(task.c.task_id == task_id)
        rows = await self._read(lambda connection: sound(connection.execute(statement)))
        return record_of(rows[0]) if rows else None

    async def page(self, where: TaskFilter, before: Cursor | None, limit: int) -> TaskPage:
        read = self._search if is_search(where) else self._read
        rows = await read(lambda connection: self._page(connection, where, before, limit + 1))
        return page_of(rows, limit)

    def _page(self, connection: Connection, where: TaskFilter, before: Cursor | None, limit: int) -> Sequence[Any]:
        if len(where.tags) > 1:  # the rarest is walked
            numbers = {pair: connection.execute(pages.number_of(pair)).scalar() or 0 for pair in where.tags}
            where = replace(where, tags=tuple(sorted(numbers, key=lambda pair: numbers[pair])))
        return sound(connection.execute(page_statement(where, before, limit)))

    async def events(self, task_id: str) -> Sequence[TaskEvent]:
        return await self._events(event.c.task_id == task_id, 10_000)

    async def events_after(self, seq: int, limit: int) -> Sequence[TaskEvent]:
        return await self._events(event.c.seq > seq, limit)

    async def _events(self, condition: sa.ColumnElement[bool], limit: int) -> Sequence[TaskEvent]:
        statement = sa.select(event).where(condition).order_by(event.c.seq).limit(limit)
        rows = await self._read(lambda connection: sound(connection.execute(statement)))
        return [event_of(row) for row in rows]

    async def audit(self, before: int | None, limit: int, where: AuditFilter = EVERY_ACT) -> Sequence[TaskEvent]:
        statement = pages.audit_statement(before, limit, where)
        read = self._search if where.asks else self._read
        rows = await read(lambda connection: sound(connection.execute(statement)))
        return [event_of(row) for row in rows]

    async def is_revoked(self, session_id: str) -> bool:
        statement = sa.select(revoked.c.session_id).where(revoked.c.session_id == session_id)
        return await self._read(lambda connection: connection.execute(statement).first()) is not None

    async def last_seq(self) -> int:
        newest = sa.select(sa.func.max(event.c.seq))
        return await self._read(lambda connection: connection.execute(newest).scalar()) or 0

    async def logs(self, task_id: str, after: int, limit: int) -> Sequence[LogEntry]:
        statement = sa.select(log).where(log.c.task_id == task_id, log.c.seq > after).order_by(log.c.seq).limit(limit)
        rows = await self._read(lambda connection: sound(connection.execute(statement)))
        return [log_of(row) for row in rows]

    async def counts(self) -> Sequence[Count]:
        statement = self.count_rows()
        rows = await self._read(lambda connection: sound(connection.execute(statement)))
        return merged_counts([(row.queue, row.name, row.status, row.n, row.micros) for row in rows])

    async def queues(self) -> Sequence[QueueState]:
        declared = sa.select(tables.queue)
        rows = await self._read(lambda connection: sound(connection.execute(declared)))
        return queue_states(rows, await self.counts())

    async def schedules(self) -> Sequence[ScheduleState]:
        statement = pages.SCHEDULES
        rows = await self._read(lambda connection: sound(connection.execute(statement)))
        return [schedule_of(row) for row in rows]

    async def scheduled(
        self, before: datetime | None, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[ScheduledOnce]:
        statement = pages.ONE_OFFS.limit(limit)
        if before is not None:
            statement = statement.where(task.c.run_at < to_micros(before))
        if after is not None:
            place = sa.tuple_(sa.literal(to_micros(after[0])), sa.literal(after[1]))
            statement = statement.where(sa.tuple_(task.c.run_at, task.c.task_id) > place)
        rows = await self._read(lambda connection: sound(connection.execute(statement)))
        return [one_off_of(row) for row in rows]

    async def groups(self, *, dismissed: bool, before: tuple[datetime, str] | None, limit: int) -> Sequence[ErrorGroup]:
        statement = pages.groups_statement(dismissed, before, limit)
        rows = await self._read(lambda connection: sound(connection.execute(statement)))
        return [group_of(row) for row in rows]

    async def gauges(self, size: int, kind: str, since: datetime, series: str | None = None) -> Sequence[GaugeRow]:
        statement = pages.gauges_statement(size, kind, since, series)
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return [GaugeRow(*row) for row in rows]

    async def oldest(self, queues: Sequence[str]) -> Mapping[str, datetime]:
        return await self._read(lambda connection: self._oldest(connection, queues))

    def _oldest(self, connection: Connection, queues: Sequence[str]) -> Mapping[str, datetime]:
        """Of each queue and executor the head of each priority: as many looks as there are priorities."""
        found: dict[str, int] = {}
        for queue in queues:
            for executor in EXECUTORS:
                above: int | None = None
                for _ in range(MOST_PRIORITIES):
                    head = connection.execute(pages.head_statement(queue, executor, above)).first()
                    if head is None:
                        break
                    above = head.rank
                    if isinstance(head.run_at, int):
                        found[queue] = min(found.get(queue, head.run_at), head.run_at)
        return {queue: from_micros(run_at) for queue, run_at in found.items()}

    async def due(self, now: datetime) -> int:
        ahead = sa.select(task.c.task_id).where(has_status(DELAYED), task.c.run_at <= to_micros(now)).limit(STAGE_BATCH)
        number = sa.select(sa.func.count()).select_from(ahead.subquery())
        return await self._read(lambda connection: connection.execute(number).scalar()) or 0

    async def instances(self) -> Sequence[InstanceRecord]:
        """Those that hold a lease, or whose lease lapsed; not those that signed off."""
        there = sa.select(tables.instance).where(tables.instance.c.lease_until > 0)
        statement = there.order_by(tables.instance.c.started_at.desc())
        rows = await self._read(lambda connection: sound(connection.execute(statement)))
        return [instance_of(row) for row in rows]

    async def cancels(self, instance_id: str) -> Sequence[AttemptId]:
        statement = pages.CANCELS
        rows = await self._read(lambda connection: connection.execute(statement, {"me": instance_id}).all())
        return [(row.task_id, row.attempt) for row in rows]

    async def arguments(self, task_ids: Sequence[str], most: int) -> Mapping[str, str]:
        beginning = sa.func.substr(task.c.arguments, 1, most).label("arguments")
        statement = sa.select(task.c.task_id, beginning).where(task.c.task_id.in_(task_ids))
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return {row.task_id: row.arguments for row in rows}

    # -- copies

    async def dump(self, kind: str, after: str, limit: int) -> Batch:
        """On the writer's connection, which tells damaged text from sound one."""
        return await self._in(self._writing, self._dump, kind, after, limit)

    def _dump(self, kind: str, after: str, limit: int) -> Batch:
        with self._write_engine.connect() as connection:
            return copies.read(connection, kind, after, limit)

    async def load(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> int:
        return await self._in(self._writing, self._load, kind, rows) if rows else 0

    def _load(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> int:
        table = copies.TABLES[kind]
        with self._write_engine.begin() as connection:
            stored = copies.write(connection, self.insert(table), kind, rows)
            if kind == "task" and stored:
                self.enlist_counts(connection, copies.counts_of(stored))
            self.go_behind(connection, table)
        return len(stored)

    # -- threads

    async def _read(self, question: Callable[[Connection], T]) -> T:
        return await self._in(self._reading, self._ask, question)

    async def _search(self, question: Callable[[Connection], T]) -> T:
        """On threads of their own, so that nothing else waits for searches, and never many at a time."""
        with self._searches.one():
            return await self._in(self._searching, self._ask, question)

    def _ask(self, question: Callable[[Connection], T]) -> T:
        with self._read_engine.connect() as connection:
            return question(connection)

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[..., T], *args: object) -> T:
        def call() -> T:
            with translated():
                return function(*args)

        return await asyncio.get_running_loop().run_in_executor(pool, call)


def sound(result: sa.CursorResult[Any]) -> list[Any]:
    """All rows, as they should be: `mended`."""
    return mended(result, tuple(result.keys()))


def pulse_cells(row: Row[Any]) -> Any:
    """An owner of tasks without a row of its own has empty cells."""
    return row if row.instance_id is None else mended([row], row._fields)[0]


class translated:  # noqa: N801 - a context manager, named as it reads
    """Turns the errors of a database that is away, locked or full into `BackendUnavailable`."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """What the values caused (a DataError, say) is not unavailability and goes on as it is."""
        away = isinstance(error, OperationalError | InterfaceError | InternalError | SQLAlchemyTimeoutError)
        away = away or getattr(getattr(error, "orig", None), "sqlstate", None) in NO_SCHEMA
        if away or type(error) is DatabaseError:  # which is what SQLite says of a file that is damaged
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise BackendUnavailable(str(reason)) from error
