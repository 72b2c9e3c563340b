"""The SQL backend: one turn as one transaction, and the reads.

Owns connections, threads and the schema, for all SQL databases; `turn.py` writes a turn, `statements.py` and `pages.py`
hold the SQL, `sqlite.py` and `postgres.py` say only what their dialect forces. Called by the journal (turns, one at a
time, on the writer's thread), by the heartbeat's thread and by readers.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, Row
from sqlalchemy.exc import DatabaseError, DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeoutError

from ..errors import BackendUnavailable, TaskflowError
from ..models import (
    DELAYED,
    Count,
    Cursor,
    InstanceRecord,
    LogEntry,
    QueueState,
    ScheduledOnce,
    ScheduleState,
    TaskEvent,
    TaskFilter,
    TaskPage,
    TaskRecord,
    TaskStatus,
    from_micros,
    to_micros,
)
from . import tables
from .base import AttemptId, Beat, Instance, Pulse, Turn, TurnResult
from .cells import mended
from .pages import is_search, page_statement
from .room import QueueBook
from .rows import event_of, log_of, one_off_of, record_of, schedule_of, shown_status
from .statements import STAGE_BATCH, Prepared, Statements, has_status
from .tables import counter, event, log, revoked, task
from .turn import Mistaken, TurnWriter

T = TypeVar("T")

MOST_SEARCHES = 20
"""That run or wait for one of the threads; each takes up to a second on a big table."""


class SqlBackend:
    """Storage of tasks in an SQL database. See `base.Backend` for what each method promises."""

    def __init__(self, url: URL, *, readers: int = 2) -> None:
        self.url = url
        self._readers = readers
        self._hire()
        self._write_engine, self._read_engine = self.create_engines()
        self._writer: Connection | None = None
        """Kept between turns, used on the writer's thread alone; given back after an error."""
        self._statements = Statements(self)
        self._book = QueueBook()
        self._turns = 0

    # -- what a dialect decides

    @property
    def dialect(self) -> sa.Dialect:
        return self._write_engine.dialect

    def create_engines(self) -> tuple[Engine, Engine]:
        """Engines for writing (its transactions hold the write lock from the start) and for reading."""
        raise NotImplementedError

    def expand(self, parameter: str, columns: Sequence[sa.Column[Any]]) -> sa.Subquery:
        """The rows of a JSON array of arrays, as a table with these columns."""
        raise NotImplementedError

    def arriving(self, columns: Sequence[sa.Column[Any]]) -> sa.Subquery:
        """The rows that a prepared statement is given, as a table with these columns. The first one is never NULL."""
        return self.expand("rows", columns)

    def prepare(self, statement: sa.Executable) -> Prepared:
        return Prepared(statement, self.dialect)

    def gather(self, rows: sa.Subquery) -> sa.ColumnElement[str]:
        """All of these rows in their order, as one JSON array of arrays."""
        raise NotImplementedError

    def insert(self, table: sa.Table) -> Any:
        """The dialect's INSERT, which knows ON CONFLICT."""
        raise NotImplementedError

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
        self._searches = 0

    def _begin_anew(self) -> None:
        """In a process forked from one that had used this: its threads are not here, its connections are not ours."""
        self._hire()
        self._book = QueueBook()
        for engine in (self._write_engine, self._read_engine):
            engine.dispose(close=False)

    async def close(self) -> None:
        """Ends the threads and connections after what they are doing now. The backend can be opened again."""
        await self._in(self._writing, self._let_go)
        for engine in (self._write_engine, self._read_engine):
            await self._in(self._writing, engine.dispose)

    def _migrate(self) -> None:
        with self._write_engine.begin() as connection:
            if self._is_current(connection):
                self._check_schema(connection)
                return
            tables.Row.metadata.create_all(connection)
            version = self._version(connection)
            for number in range((version or tables.SCHEMA_VERSION) + 1, tables.SCHEMA_VERSION + 1):
                for step in tables.STEPS[number]:
                    step(connection)
            connection.execute(tables.schema_version.insert().values(version=tables.SCHEMA_VERSION))
            self._check_schema(connection)

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
        try:
            try:
                return self._written(turn, careful=False)
            except Mistaken:
                self._book = QueueBook()
                return self._written(turn, careful=True)
        except BaseException:
            self._book = QueueBook()  # what it read may have been rolled back
            raise

    def _written(self, turn: Turn, *, careful: bool) -> TurnResult:
        with self._transaction() as connection, self._driver_errors():
            cursor = connection.connection.cursor()
            writer = TurnWriter(connection, cursor, self._statements, self._book, turn, careful=careful)
            return writer.write(rotation=self._turns)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """On the writer's own connection: what a pool does at each lending and return costs as much as a statement."""
        if self._writer is None:
            self._writer = self._write_engine.connect()
        try:
            with self._writer.begin():
                yield self._writer
        except Mistaken:
            raise
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        connection, self._writer = self._writer, None
        if connection is not None:
            connection.close()

    @contextmanager
    def _driver_errors(self) -> Iterator[None]:
        """The driver's own errors as SQLAlchemy's, for statements that do not go through it."""
        driver: Any = self._write_engine.dialect.loaded_dbapi
        try:
            yield
        except driver.Error as error:
            raise DBAPIError.instance(None, None, error, driver.Error, dialect=self._write_engine.dialect) from error

    def enlist(self, connection: Connection, turn: Turn) -> TurnResult:
        """Writes drafts on a connection of the caller's, as part of the caller's transaction."""
        with translated(), self._driver_errors():
            connection.execute(counter.update().where(sa.false()).values(n=0))  # takes the write lock before it reads
            cursor = connection.connection.cursor()
            writer = TurnWriter(connection, cursor, self._statements, QueueBook(), turn, careful=True)
            return writer.write(rotation=0)

    # -- instances

    def beat(self, instance: Instance, beat: Beat) -> None:
        stamp = to_micros(beat.at)
        row = {
            "instance_id": instance.instance_id,
            "host": instance.host,
            "machine": instance.machine,
            "pid": instance.pid,
            "birth": instance.birth,
            "version": instance.version,
            "started_at": to_micros(instance.started),
            "beat_at": stamp,
            "lease_until": to_micros(beat.lease_until),
            "slots": beat.slots,
            "running": beat.running,
        }
        changing = {name: row[name] for name in ("beat_at", "lease_until", "slots", "running")}
        known, statement = tables.instance.c.beat_at, self.insert(tables.instance).values(row)
        just_before = known.between(stamp, stamp + 999)  # a clock that stands still, say
        changing["beat_at"] = sa.case((just_before, known + 1), else_=stamp)  # never again the one before
        statement = statement.on_conflict_do_update(index_elements=["instance_id"], set_=changing)
        self._apart(lambda: self._write(statement))

    def pulses(self) -> Sequence[Pulse]:
        return [
            Pulse(
                Instance(
                    instance_id=row.owner,
                    host=row.host or "",
                    machine=row.machine or "",
                    pid=row.pid or 0,
                    birth=row.birth or "",
                    version=row.version or "",
                    started=from_micros(row.started_at or 0),
                ),
                stamp=row.beat_at or 0,
                lease=max(0, (row.lease_until or 0) - (row.beat_at or 0)) / 1e6,
            )
            for row in map(pulse_cells, self._apart(self._live_instances))
        ]

    def leave(self, instance_id: str, stamp: int | None = None) -> None:
        row, table = tables.instance.c, tables.instance
        mine, gone = row.instance_id == instance_id, row.lease_until == 0
        if stamp is None:
            self._apart(lambda: self._write(table.update().where(mine).values(lease_until=0)))
        else:
            gone = sa.or_(gone, sa.and_(mine, row.beat_at == stamp))
        self._apart(lambda: self._write(table.delete().where(gone, self._statements.runs_nothing)))

    def _write(self, statement: sa.Executable) -> None:
        with self._write_engine.begin() as connection:
            connection.execute(statement)

    def _live_instances(self) -> Sequence[Row[Any]]:
        with self._read_engine.connect() as connection:
            return connection.execute(self._statements.live_instances).all()

    def _apart(self, function: Callable[[], T]) -> T:
        """Runs on the calling thread, on a connection of its own: neither waits for a turn nor for the event loop."""
        with translated():
            return function()

    # -- reads

    async def get(self, task_id: str) -> TaskRecord | None:
        statement = sa.select(task).where(task.c.task_id == task_id)
        row = await self._read(lambda connection: connection.execute(statement).first())
        return None if row is None else record_of(row)

    async def page(self, where: TaskFilter, before: Cursor | None, limit: int) -> TaskPage:
        statement = page_statement(where, before, limit + 1)
        read = self._search if is_search(where) else self._read
        rows = await read(lambda connection: connection.execute(statement).all())
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
        return [event_of(row) for row in rows]

    async def audit(self, before: int | None, limit: int) -> Sequence[TaskEvent]:
        older = sa.true() if before is None else event.c.seq < before
        acts = sa.select(event).where(event.c.actor.is_not(None), older)
        statement = acts.order_by(event.c.seq.desc()).limit(limit)
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return [event_of(row) for row in rows]

    async def is_revoked(self, session_id: str) -> bool:
        statement = sa.select(revoked.c.session_id).where(revoked.c.session_id == session_id)
        return await self._read(lambda connection: connection.execute(statement).first()) is not None

    async def last_seq(self) -> int:
        newest = sa.select(sa.func.max(event.c.seq))
        return await self._read(lambda connection: connection.execute(newest).scalar()) or 0

    async def logs(self, task_id: str, after: int, limit: int) -> Sequence[LogEntry]:
        statement = sa.select(log).where(log.c.task_id == task_id, log.c.seq > after).order_by(log.c.seq).limit(limit)
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return [log_of(row) for row in rows]

    async def counts(self) -> Sequence[Count]:
        statement = sa.select(counter).where(counter.c.n > 0)
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return merged_counts([(row.queue, row.name, row.status, row.n, row.micros) for row, _ in map(mended, rows)])

    async def queues(self) -> Sequence[QueueState]:
        declared = sa.select(tables.queue)
        rows = await self._read(lambda connection: connection.execute(declared).all())
        states = {
            row.name: QueueState(row.name, row.concurrency, row.max_size, bool(row.paused), row.reason)
            for row, _ in map(mended, rows)
        }
        for count in await self.counts():
            state = states.setdefault(count.queue, QueueState(count.queue, None, None, False, None))
            states[count.queue] = counted(state, count)
        return [states[name] for name in sorted(states)]

    async def schedules(self) -> Sequence[ScheduleState]:
        statement = self._statements.schedules
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return [schedule_of(row) for row in rows]

    async def scheduled(
        self, before: datetime | None, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[ScheduledOnce]:
        statement = self._statements.one_offs.limit(limit)
        if before is not None:
            statement = statement.where(task.c.run_at < to_micros(before))
        if after is not None:
            place = sa.tuple_(sa.literal(to_micros(after[0])), sa.literal(after[1]))
            statement = statement.where(sa.tuple_(task.c.run_at, task.c.task_id) > place)
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return [one_off_of(row) for row in rows]

    async def due(self, now: datetime) -> int:
        ahead = sa.select(task.c.task_id).where(has_status(DELAYED), task.c.run_at <= to_micros(now)).limit(STAGE_BATCH)
        number = sa.select(sa.func.count()).select_from(ahead.subquery())
        return await self._read(lambda connection: connection.execute(number).scalar()) or 0

    async def instances(self) -> Sequence[InstanceRecord]:
        """Those that hold a lease, or whose lease lapsed; not those that signed off."""
        there = sa.select(tables.instance).where(tables.instance.c.lease_until > 0)
        statement = there.order_by(tables.instance.c.started_at.desc())
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return [
            InstanceRecord(
                instance_id=row.instance_id,
                host=row.host,
                pid=row.pid,
                version=row.version,
                started=from_micros(row.started_at or 0),
                heartbeat=from_micros(row.beat_at),
                slots=row.slots,
                running=row.running,
            )
            for row, _ in map(mended, rows)
        ]

    async def cancels(self, instance_id: str) -> Sequence[AttemptId]:
        statement = self._statements.cancels
        rows = await self._read(lambda connection: connection.execute(statement, {"me": instance_id}).all())
        return [(row.task_id, row.attempt) for row in rows]

    async def arguments(self, task_ids: Sequence[str], most: int) -> Mapping[str, str]:
        beginning = sa.func.substr(task.c.arguments, 1, most).label("arguments")
        statement = sa.select(task.c.task_id, beginning).where(task.c.task_id.in_(task_ids))
        rows = await self._read(lambda connection: connection.execute(statement).all())
        return {row.task_id: row.arguments for row in rows}

    # -- threads

    async def _read(self, question: Callable[[Connection], T]) -> T:
        return await self._in(self._reading, self._ask, question)

    async def _search(self, question: Callable[[Connection], T]) -> T:
        """On threads of their own, so that nothing else waits for searches, and never many at a time."""
        if self._searches >= MOST_SEARCHES:
            raise BackendUnavailable(f"{self._searches} searches are under way, more are not taken")
        self._searches += 1
        try:
            return await self._in(self._searching, self._ask, question)
        finally:
            self._searches -= 1

    def _ask(self, question: Callable[[Connection], T]) -> T:
        with self._read_engine.connect() as connection:
            return question(connection)

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[..., T], *args: object) -> T:
        def call() -> T:
            with translated():
                return function(*args)

        return await asyncio.get_running_loop().run_in_executor(pool, call)


def pulse_cells(row: Row[Any]) -> Any:
    """An owner of tasks without a row of its own has empty cells."""
    return row if row.instance_id is None else mended(row)[0]


def merged_counts(rows: Sequence[tuple[str, str, str, int, int]]) -> Sequence[Count]:
    """Delayed tasks are pending ones to everybody but the claim."""
    found: dict[tuple[str, str, TaskStatus], Count] = {}
    for queue, name, stored, n, micros in rows:
        status = shown_status(stored)
        count = found.get((queue, name, status), Count(queue, name, status, 0, 0.0))
        delayed = n if stored == DELAYED else 0
        found[queue, name, status] = replace(
            count, n=count.n + n, seconds=count.seconds + micros / 1e6, delayed=count.delayed + delayed
        )
    return list(found.values())


def counted(state: QueueState, count: Count) -> QueueState:
    match count.status:
        case TaskStatus.PENDING:
            return replace(state, pending=state.pending + count.n - count.delayed)
        case TaskStatus.RUNNING:
            return replace(state, running=state.running + count.n)
        case TaskStatus.REJECTED:
            return replace(state, rejected=state.rejected + count.n)
        case _:
            return replace(state, finished=state.finished + count.n)


class translated:  # noqa: N801 - a context manager, named as it reads
    """Turns the errors of a database that is away, locked or full into `BackendUnavailable`."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """What the values caused (a DataError, say) is not unavailability and goes on as it is."""
        away = isinstance(error, OperationalError | InterfaceError | InternalError | SQLAlchemyTimeoutError)
        if away or type(error) is DatabaseError:  # which is what SQLite says of a file that is damaged
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise BackendUnavailable(str(reason)) from error
