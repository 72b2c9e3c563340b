"""SQLite: what its dialect forces, and nothing else.

Owns the pragmas and the write lock; `sqlite_turn.py` writes a turn. Processes of one host share one file: WAL lets
readers go on while one of them writes, `BEGIN IMMEDIATE` makes writers take turns, `synchronous=FULL` makes a
commit survive a power loss.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import monotonic, sleep
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import QueuePool, StaticPool

from ..errors import TaskDefinitionError
from ..rules.turns import decide, wants
from . import sqlite_turn
from .base import Turn, TurnResult
from .changes import Stale
from .neighbours import Neighbours
from .sql import SqlBackend, translated
from .tables import TAG_INDEX, counter

T = TypeVar("T")

OLDEST_SQLITE = (3, 35, 0)
"""The first with RETURNING."""
BUSY_TIMEOUT = 0.5
"""Seconds that one try waits for another process's transaction. Below the journal's `accept_timeout`, so that a
caller who was told "no" is never written afterwards."""
TRY_AGAIN = (0.0005, 0.003)
"""Seconds between two asks for the lock."""
LARGEST_WAL = 16 * 1024 * 1024
"""Bytes of the write-ahead log that are kept for reuse. A commit adds every page that it changes, twenty for a task
that comes alone, and beside a long reader none is taken out: without this the file would stay as large as it was."""


class SqliteBackend(SqlBackend):
    def __init__(self, url: URL) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise TaskDefinitionError(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 or newer is needed")
        self._in_memory = url.database in (None, "", ":memory:")
        super().__init__(url, readers=0 if self._in_memory else 2)
        self._writer: Connection | None = None
        """Kept between turns, used on the writer's thread alone; given back after an error."""
        self._neighbours = None if self._in_memory else Neighbours(url.database or "")

    def listen(self, wake: Callable[[], None]) -> None:
        if self._neighbours is not None:
            self._neighbours.listen(wake)

    def announce(self) -> None:
        if self._neighbours is not None:
            self._neighbours.announce()

    async def close(self) -> None:
        if self._neighbours is not None:
            self._neighbours.close()
        await super().close()

    def create_engines(self) -> tuple[Engine, Engine]:
        if self._in_memory:
            only = self._engine(StaticPool)
            return only, only
        return self._engine(QueuePool), self._engine(QueuePool, reads_only=True)

    def _apart(self, function: Callable[[], T]) -> T:
        """A database in memory has one connection, which takes one transaction at a time: it waits for the writer."""
        if not self._in_memory:
            return super()._apart(function)
        with translated():
            return self._writing.submit(function).result()

    def _engine(self, pool: type[QueuePool] | type[StaticPool], *, reads_only: bool = False) -> Engine:
        engine = sa.create_engine(
            self.url,
            poolclass=pool,
            paramstyle="named",
            connect_args={"timeout": BUSY_TIMEOUT, "check_same_thread": False, "cached_statements": 512},
        )
        sa.event.listen(engine, "connect", prepare_connection)
        sa.event.listen(engine, "connect", read_any_text if reads_only else mark_damaged_text)
        if not reads_only:
            sa.event.listen(engine, "connect", wait_for_no_lock)
        sa.event.listen(engine, "begin", begin_read if reads_only else begin_write)
        return engine

    def insert(self, table: sa.Table) -> Any:
        return insert(table)

    def index_tags(self, connection: Connection) -> None:
        for name in TAG_INDEX:
            connection.exec_driver_sql(sqlite_turn.SQL[name])

    def _written(self, turn: Turn, *, careful: bool) -> TurnResult:
        with self._transaction() as connection, self._driver_errors():
            cursor: Any = connection.connection.cursor()
            snapshot = sqlite_turn.look(cursor, wants(turn, careful=careful))
            decision = decide(turn, snapshot, careful=careful, rotation=self._turns)
            return decision.result(sqlite_turn.apply(cursor, decision.changes))

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """On the writer's own connection: what a pool does at each lending and return costs as much as a statement."""
        if self._writer is None:
            self._writer = self._write_engine.connect()
        try:
            with self._writer.begin():
                yield self._writer
        except Stale:
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
        try:
            yield
        except sqlite3.Error as error:
            dialect = self._write_engine.dialect
            raise DBAPIError.instance(None, None, error, sqlite3.Error, dialect=dialect) from error

    def attempt(self, connection: Connection) -> AbstractContextManager[object]:
        """Takes the write lock before anything is read: then nothing can be stale."""
        connection.execute(counter.update().where(sa.false()).values(n=0))
        return nullcontext()


def prepare_connection(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself: see begin_write
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "wal_autocheckpoint=4000",
        f"journal_size_limit={LARGEST_WAL}",
        "temp_store=MEMORY",
        "cache_size=-16000",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def read_any_text(connection: sqlite3.Connection, _record: object) -> None:
    """Damaged text is shown with marks in it; by itself the driver would fail the whole query."""
    connection.text_factory = lambda text: text.decode("utf-8", "replace")


def mark_damaged_text(connection: sqlite3.Connection, _record: object) -> None:
    """Nothing is run with damaged text: see `cells.HALF_A_PAIR`."""
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")


def wait_for_no_lock(connection: sqlite3.Connection, _record: object) -> None:
    """`begin_write` waits instead."""
    connection.execute("PRAGMA busy_timeout=0").close()


def begin_write(connection: Connection) -> None:
    """Takes the write lock at once: a transaction that starts as a reader could fail halfway.

    While another process holds it, asks again every few milliseconds. SQLite's own waiting leaves up to a tenth of a
    second between two tries, in which a busy neighbour gets it again and again.
    """
    driver: Any = connection.connection.driver_connection
    deadline = monotonic() + BUSY_TIMEOUT
    while True:
        try:
            driver.execute("BEGIN IMMEDIATE").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or monotonic() > deadline:
                raise OperationalError("BEGIN IMMEDIATE", None, error) from error
        sleep(random.uniform(*TRY_AGAIN))


def begin_read(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")
