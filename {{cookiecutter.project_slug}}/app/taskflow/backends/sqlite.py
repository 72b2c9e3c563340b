"""SQLite: what its dialect forces, and nothing else.

Owns the pragmas, the write lock and the expansion of JSON rows. Processes of one host share one file: WAL lets
readers go on while one of them writes, `BEGIN IMMEDIATE` makes writers take turns, `synchronous=FULL` makes a
commit survive a power loss.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from time import monotonic, sleep
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import QueuePool, StaticPool
from sqlalchemy.sql.compiler import SQLCompiler

from ..errors import TaskDefinitionError
from .sql import SqlBackend, translated
from .statements import Cursor, Prepared

T = TypeVar("T")

OLDEST_SQLITE = (3, 35, 0)
"""The first with RETURNING."""
BUSY_TIMEOUT = 0.5
"""Seconds that one try waits for another process's transaction. Below the journal's `accept_timeout`, so that a
caller who was told "no" is never written afterwards."""
TRY_AGAIN = (0.0005, 0.003)
"""Seconds between two asks for the lock."""
POSITIONAL = sqlite_dialect(paramstyle="qmark")
ROW = re.compile(r"\(/\*(\d+)\*/\)")
"""Where the rows of a bulk statement go in its text, and how many cells each has."""
LARGEST_WAL = 16 * 1024 * 1024
"""Bytes of the write-ahead log that are kept for reuse. A commit adds every page that it changes, twenty for a task
that comes alone, and beside a long reader none is taken out: without this the file would stay as large as it was."""
LONGEST_LIST = 512
"""Rows of one bulk statement."""


class SqliteBackend(SqlBackend):
    def __init__(self, url: URL) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise TaskDefinitionError(f"SQLite {sqlite3.sqlite_version} is too old: 3.35 or newer is needed")
        self._in_memory = url.database in (None, "", ":memory:")
        super().__init__(url, readers=0 if self._in_memory else 2)

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

    def expand(self, parameter: str, columns: Sequence[sa.Column[Any]]) -> sa.Subquery:
        row = sa.func.json_each(sa.bindparam(parameter)).table_valued("value")
        cells = [
            sa.func.json_extract(row.c.value, sa.literal_column(f"'$[{place}]'"), type_=column.type).label(column.name)
            for place, column in enumerate(columns)
        ]
        return sa.select(*cells).subquery(f"{parameter}_table")

    def arriving(self, columns: Sequence[sa.Column[Any]]) -> sa.Subquery:
        cells = ", ".join(f"column{place} AS {column.name}" for place, column in enumerate(columns, 1))
        rows = sa.text(f"SELECT {cells} FROM (VALUES (/*{len(columns)}*/)) WHERE column1 IS NOT NULL")
        return rows.columns(*(sa.column(column.name, column.type) for column in columns)).subquery("arriving")

    def prepare(self, statement: sa.Executable) -> Prepared:
        prepared = super().prepare(statement)
        return BulkStatement(statement, self.dialect) if ROW.search(prepared.sql) else prepared

    def gather(self, rows: sa.Subquery) -> sa.ColumnElement[str]:
        return sa.func.json_group_array(sa.func.json_array(*rows.c))

    def insert(self, table: sa.Table) -> Any:
        return insert(table)


class BulkStatement(Prepared):
    """A statement whose rows come as the parameters of a VALUES list.

    SQLite needs three times as long to unpack them from JSON. The list is filled up to a power of two, so that few
    texts have to be compiled.
    """

    def __init__(self, statement: sa.Executable, dialect: sa.Dialect) -> None:
        super().__init__(statement, dialect)
        assert isinstance(statement, sa.ClauseElement)
        compiled = statement.compile(dialect=POSITIONAL)
        assert isinstance(compiled, SQLCompiler)
        assert compiled.positiontup is not None
        self._before, row, self._after = ROW.split(str(compiled))
        place = self._before.count("?")
        self._names_before, self._names_after = compiled.positiontup[:place], compiled.positiontup[place:]
        self._width = int(row)
        self._texts: dict[int, str] = {}

    def change(self, cursor: Cursor, rows: Sequence[Sequence[Any]], **values: object) -> int:
        return sum(self._run_part(cursor, part, values).rowcount for part in parts(rows))

    def change_each(self, cursor: Cursor, rows: Sequence[Sequence[Any]], **values: object) -> Sequence[Any]:
        return [told for part in parts(rows) for told in self._run_part(cursor, part, values).fetchall()]

    def _run_part(self, cursor: Cursor, rows: Sequence[Sequence[Any]], values: Mapping[str, object]) -> Cursor:
        known = {**self._constants, **values}
        length = 1 << (len(rows) - 1).bit_length()
        cells = [known[name] for name in self._names_before]
        cells += chain.from_iterable(rows)
        cells += [None] * ((length - len(rows)) * self._width)
        cells += [known[name] for name in self._names_after]
        cursor.execute(self._text(length), cells)
        return cursor

    def _text(self, length: int) -> str:
        if length not in self._texts:
            row = f"({', '.join('?' * self._width)})"
            self._texts[length] = self._before + ", ".join([row] * length) + self._after
        return self._texts[length]


def parts(rows: Sequence[Sequence[Any]]) -> Iterator[Sequence[Sequence[Any]]]:
    for start in range(0, len(rows), LONGEST_LIST):
        yield rows[start : start + LONGEST_LIST]


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
