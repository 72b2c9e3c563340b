"""PostgreSQL: a turn in two round trips, claims with SKIP LOCKED, and news by LISTEN.

Owns the use of `postgres.sql` and the writer's connection. Turns of several instances run side by side: what the rules
were shown of tasks and schedules is locked until the commit, and so is a queue with limits, from which others take
nothing meanwhile. Counts are kept as each instance's own deltas, so that no two turns wait for one row, and are folded
now and then. A commit whose answer was lost is looked up by its transaction.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC
from time import monotonic
from typing import Any

import psycopg
import sqlalchemy as sa
import uuid_utils
from psycopg import errors
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import URL, Connection, Engine

from ..clock import offset_of
from ..errors import BackendUnavailable, OutcomeUnknown
from ..loops import Throttle, pause_after
from ..models import TaskEvent, TaskStatus, from_micros, to_micros, utc_now
from ..rules.turns import Decision, decide, wants
from .base import Beat, Claimed, GaugeRow, Instance, Purge, Turn, TurnResult
from .changes import (
    EXECUTORS,
    FACTS,
    PURGE_BATCH,
    RESCUE_BATCH,
    STAGE_BATCH,
    TALLY,
    Applied,
    Changes,
    Ending,
    Event,
    Insert,
    Snapshot,
    Stale,
    StoredQueue,
    StoredSchedule,
    StoredTask,
    Wants,
    Wish,
)
from .scripts import assignments, statements
from .sql import SqlBackend
from .stored import LINE, claim_of, log_row
from .tables import TAG_INDEX, counter

logger = logging.getLogger("taskflow")

CONNECTION: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "taskflow",
}
"""A server that is gone without a word is noticed in seconds."""
CHANNEL = "taskflow"
ANNOUNCE_INTERVAL = 0.02
"""Seconds between two announcements: each takes a lock of the whole database for a moment."""
FOLD_INTERVAL = 30.0
REFIT_INTERVAL = 1.0

TASK_FACTS = ", ".join(f"task.{name}" for name in FACTS)
SQL = {
    name: text.replace("{facts}", ", ".join(FACTS)).replace("{task_facts}", TASK_FACTS)
    for name, text in statements("postgres.sql").items()
}

deltas = sa.Table(
    "taskflow_delta",
    sa.MetaData(),
    sa.Column("part", sa.Text, primary_key=True),
    sa.Column("queue", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("status", sa.Text, primary_key=True),
    sa.Column("n", sa.BigInteger, nullable=False),
    sa.Column("micros", sa.BigInteger, nullable=False),
)
"""What each instance changed of the counts, since they were last folded into the counters."""

Cursor = psycopg.Cursor[Any]


class PostgresBackend(SqlBackend):
    def __init__(self, url: URL) -> None:
        self._conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
        super().__init__(url)
        self._held: psycopg.Connection[Any] | None = None
        self._prepares = True
        """False once a pooler was met that mixes up prepared statements."""
        self._busy: set[str] = set()
        """Limited queues in which tasks waited when this process last looked."""
        self._doubt: tuple[str, str, Decision] | None = None
        """A turn whose commit was not answered: its id, its transaction, what it decided."""
        self._gaps: dict[int, int] = {}
        """Number of an event that is missing -> a transaction that began after that was noticed."""
        self._short: dict[str, float] = {}
        """Queues that gave fewer tasks than the counts promised, and when that was last looked into."""
        self._announcing = Throttle(ANNOUNCE_INTERVAL)
        self._folding = Throttle(FOLD_INTERVAL)
        self._listener: Listener | None = None

    # -- what the dialect decides

    def create_engines(self) -> tuple[Engine, Engine]:
        url = self.url.set(drivername="postgresql+psycopg")
        # Nothing is prepared here: behind a pooler the next statement may be another connection's.
        options: dict[str, Any] = {"pool_pre_ping": True, "connect_args": {**CONNECTION, "prepare_threshold": None}}
        reading = sa.create_engine(url, isolation_level="AUTOCOMMIT", pool_size=2 * self._readers, **options)
        return sa.create_engine(url, pool_size=2, **options), reading

    def insert(self, table: sa.Table) -> Any:
        return insert(table)

    def attempt(self, connection: Connection) -> AbstractContextManager[object]:
        return connection.begin_nested()

    def lock_schema(self, connection: Connection) -> None:
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(hashtextextended('taskflow:schema', 0))"))

    def _create_tables(self, connection: Connection) -> None:
        super()._create_tables(connection)
        deltas.create(connection, checkfirst=True)

    def index_tags(self, connection: Connection) -> None:
        for name in ("tags_of", "tag", *TAG_INDEX):
            connection.exec_driver_sql(SQL[name])

    def count_rows(self) -> sa.Select[Any]:
        both = sa.union_all(sa.select(counter), sa.select(*(deltas.c[column.name] for column in counter.c)))
        found = both.subquery()
        number = sa.func.sum(found.c.n)
        keys = (found.c.queue, found.c.name, found.c.status)
        return (
            sa.select(*keys, whole(number).label("n"), whole(sa.func.sum(found.c.micros)).label("micros"))
            .group_by(*keys)
            .having(number > 0)
        )

    def enlist_counts(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """As a part of their own: a row that the writer changes too would be locked until the caller commits."""
        part = str(uuid_utils.uuid7())
        connection.execute(deltas.insert(), [{**row, "part": part} for row in rows])

    def go_behind(self, connection: Connection, table: sa.Table) -> None:
        if "seq" in table.c:
            last = sa.func.setval(sa.func.pg_get_serial_sequence(table.name, "seq"), sa.func.max(table.c.seq))
            connection.execute(sa.select(last))

    # -- the turn

    def _turn(self, turn: Turn) -> TurnResult:
        known = self._resolved(turn)
        return super()._turn(turn) if known is None else known

    def _written(self, turn: Turn, *, careful: bool) -> TurnResult:
        transaction, decision = "", None
        connection = self._connected()
        try:
            with connection.pipeline():
                snapshot, transaction = self._look(connection, wants(turn, careful=careful))
                decision = decide(turn, snapshot, careful=careful, rotation=self._turns)
                finish = self._apply(connection, decision.changes)
                connection.commit()
            return decision.result(finish())
        except (errors.DivisionByZero, errors.DeadlockDetected, errors.SerializationFailure):
            self._undo(connection)
            raise Stale from None
        except (errors.DuplicatePreparedStatement, errors.InvalidSqlStatementName):
            self._undo(connection)
            self._prepares, connection.prepare_threshold = False, None
            raise Stale from None
        except (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction) as error:
            self._let_go()
            if decision is not None and transaction and connection.broken:
                self._doubt = (turn.turn_id, transaction, decision)
                raise OutcomeUnknown(str(error)) from error
            raise BackendUnavailable(str(error)) from error
        except BaseException:
            self._undo(connection)
            raise

    def _resolved(self, turn: Turn) -> TurnResult | None:
        """The result of a turn whose commit turns out to have been made."""
        if self._doubt is None:
            return None
        turn_id, transaction, decision = self._doubt
        try:
            with self._connected() as connection:
                (status,) = connection.execute(SQL["outcome"], {"transaction": transaction}).fetchone() or (None,)
        except psycopg.Error as error:
            self._let_go()
            raise OutcomeUnknown(str(error)) from error
        if status == "in progress":  # the server has not noticed yet that its client is gone
            raise OutcomeUnknown("the transaction is still under way")
        self._doubt = None
        return decision.result(Applied()) if status == "committed" and turn_id == turn.turn_id else None

    def _connected(self) -> psycopg.Connection[Any]:
        if self._held is None or self._held.closed:
            try:
                threshold = 3 if self._prepares else None
                self._held = psycopg.connect(self._conninfo, prepare_threshold=threshold, **CONNECTION)
            except psycopg.Error as error:
                raise BackendUnavailable(str(error)) from error
        return self._held

    def _undo(self, connection: psycopg.Connection[Any]) -> None:
        try:
            connection.rollback()
        except psycopg.Error:
            self._let_go()

    def _let_go(self) -> None:
        connection, self._held = self._held, None
        if connection is not None:
            with suppress(psycopg.Error):
                connection.close()

    # -- what the rules have to see

    def _look(self, connection: psycopg.Connection[Any], wants: Wants) -> tuple[Snapshot, str]:
        """The snapshot, and the transaction's name where it will be needed."""
        run = connection.execute
        queues = sorted(wants.queues | (self._busy if wants.stage else set()))
        words = [f"taskflow:run_key:{key}" for key in wants.run_keys] + ["taskflow:schedules"] * wants.declares
        held_queues = run(SQL["hold_queues"], {"queues": queues}) if queues else None
        if words:
            run(SQL["hold"], {"words": sorted(set(words))})
        if wants.stage:
            run(SQL["stage"], {"now": wants.now, "most": STAGE_BATCH, "me": wants.instance})
        transaction = run(SQL["transaction"]) if wants.writes else None
        levels, limits, first_due = run(SQL["levels"]), run(SQL["queues"]), run(SQL["first_due"])
        tasks = run(SQL["tasks"], {"ids": wants.tasks}) if wants.tasks else None
        one_offs = {key: run(SQL["one_offs"], {"run_key": key}) for key in wants.run_keys}
        left = self._ask_left(connection, wants.stamps) if wants.stamps else None
        held = run(SQL["held"], {"me": wants.instance}) if wants.held else None
        schedules = run(SQL["schedules"], {"names": wants.schedules}) if wants.schedules else None
        live = run(SQL["live_runs"], {"names": wants.live}) if wants.live else None
        known = {row[0]: StoredQueue(*row) for row in limits.fetchall()}
        mine = {name for (name,) in held_queues.fetchall()} if held_queues else set()
        counted, due = levels.fetchall(), first_due.fetchone()
        waiting = {queue for queue, _, status, _ in counted if status == TaskStatus.PENDING}
        self._busy = {name for name in waiting if name in known and known[name].counted}
        if wants.stage and not self._busy <= mine:  # what nobody had in mind when this began
            run(SQL["hold_queues"], {"queues": sorted(self._busy)})
            counted = run(SQL["levels"]).fetchall()
            known = {row[0]: StoredQueue(*row) for row in run(SQL["queues"]).fetchall()}
            mine |= self._busy
        snapshot = Snapshot(
            levels=counted,
            queues=known,
            first_due=due[0] if due else None,
            tasks={row.task_id: row for row in tasks_of(tasks)},
            one_offs={key: tasks_of(cursor) for key, cursor in one_offs.items()},
            left=tasks_of(left),
            held=tasks_of(held),
            schedules={row[0]: StoredSchedule(*row) for row in schedules.fetchall()} if schedules else {},
            live=frozenset(name for (name,) in live.fetchall()) if live else frozenset(),
            closed=frozenset(name for name, queue in known.items() if queue.counted and name not in mine),
        )
        if snapshot.closed & wants.queues:  # limited since its row was to be locked
            raise Stale
        return snapshot, transaction.fetchone()[0] if transaction else ""  # type: ignore[index]

    def _ask_left(self, connection: psycopg.Connection[Any], stamps: Mapping[str, int]) -> Cursor:
        """Who would beat just now waits until it is decided."""
        connection.execute(SQL["hold_beats"], {"ids": list(stamps)})
        values = {"ids": list(stamps), "stamps": list(stamps.values()), "most": RESCUE_BATCH}
        return connection.execute(SQL["left"], values)

    # -- what they decided

    def _apply(self, connection: psycopg.Connection[Any], changes: Changes) -> Callable[[], Applied]:
        """Sends all of it; what it gives back tells what came of it, once the commit is answered."""
        run, me, now = connection.execute, changes.instance, changes.now
        if changes.progress:  # while the task still runs: it may end in this very turn
            told = [(item.task_id, item.attempt, item.value) for item in changes.progress]
            run(SQL["progress"], {"me": me, **columns(("task_id", "attempt", "progress"), told)})
        if changes.endings:
            run(SQL["end_attempts"], {"rows": len(changes.endings), **columns(Ending._fields, changes.endings)})
        for row, values in changes.updates.values():
            text = f"UPDATE taskflow_task SET {assignments(values, '%({})s')} WHERE task_id = %(row_id)s"
            run(text, {**values, "row_id": row.task_id})
        if changes.inserts:
            run(SQL["insert_tasks"], {"rows": len(changes.inserts), **columns(Insert._fields, changes.inserts)})
        self._set_documents(connection, changes)
        claims = [(wish, self._claim(connection, wish, me, now)) for wish in changes.wishes]
        applied = Applied(purged=[self._purge(connection, purge, changes) for purge in changes.purges])
        if changes.logs:
            lines = [log_row(line) for line in changes.logs]
            run(SQL["insert_logs"], columns(LINE, lines))
        if changes.events:
            run(SQL["insert_events"], columns(Event._fields, changes.events))
        if tally := changes.tally():
            run(SQL["count"], {"part": me, **columns(TALLY, tally)})
        for record in changes.records:
            if record.rows:
                run(SQL["record"], {"me": me, **columns(GaugeRow._fields, record.rows)})
            for size, before in record.kept.items():
                run(SQL["forget_gauges"], {"size": size, "before": to_micros(before)})
        for key in sorted(changes.groups):  # in one order everywhere: these rows are shared
            run(SQL["regroup" if changes.groups[key].at is None else "group"], changes.groups[key]._asdict())

        def finish() -> Applied:
            for wish, cursor in claims:
                claimed = claims_of(cursor)
                applied.claimed += claimed
                if len(claimed) < min(wish.most, wish.ready):
                    self._short.setdefault(wish.queue, 0.0)
                else:
                    self._short.pop(wish.queue, None)
            return applied

        return finish

    def _claim(self, connection: psycopg.Connection[Any], wish: Wish, me: str, now: int) -> Cursor:
        if self._short.get(wish.queue, float("inf")) <= monotonic() - REFIT_INTERVAL:
            self._short[wish.queue] = monotonic()
            self._refit(connection, wish)
        values = {"queue": wish.queue, "most": wish.most, "me": me, "now": now, **wish.walks}
        return connection.execute(SQL["claim"], {**values, "names": list(wish.names)})

    def _refit(self, connection: psycopg.Connection[Any], wish: Wish) -> None:
        """Tasks that were stored when their name had another executor get the one that it has now."""
        for kind in wish.slots:
            others = [other for other in EXECUTORS if other != kind]
            names = [name for name, its in wish.names.items() if its == kind]
            values = {"queue": wish.queue, "kind": kind, "others": others, "names": names, "most": STAGE_BATCH}
            connection.execute(SQL["refit"], values)

    def _set_documents(self, connection: psycopg.Connection[Any], changes: Changes) -> None:
        run = connection.execute
        for table, statement, documents in (
            ("taskflow_queue", "set_queue", changes.queues),
            ("taskflow_schedule", "set_schedule", changes.schedules),
        ):
            for name, values in documents:
                run(SQL[statement], {"name": name})
                text = f"UPDATE {table} SET {assignments(values, '%({})s')} WHERE name = %(name)s"
                run(text, {**values, "name": name})
        if changes.queues:
            run(SQL["queue_version"], {"names": [name for name, _ in changes.queues]})
        for advance in changes.advances:
            run(SQL["advance"], advance._asdict())
        if changes.revoked:
            run(SQL["forget_revoked"], {"now": changes.now})
            run(SQL["revoke"], columns(("session_id", "expires_at"), changes.revoked))

    def _purge(self, connection: psycopg.Connection[Any], purge: Purge, changes: Changes) -> tuple[int, bool]:
        """Rows of every kind count, so that no purge holds the writer for long: a task may have a thousand lines."""
        run, deleted, room, before = connection.execute, 0, purge.limit, to_micros(purge.before)
        for status in (status.value for status in TaskStatus if status.terminal):
            most = min(room, PURGE_BATCH)
            ids = [row[0] for row in run(SQL["old"], {"status": status, "before": before, "most": most}).fetchall()]
            for kind in ("purge_logs", "purge_events"):
                if ids and room:
                    room -= number(run(SQL[kind], {"ids": ids, "most": room}))
            gone = run(SQL["purge_tasks"], {"ids": ids[:room]}).fetchall() if ids and room else []
            for queue, name, started_at, finished_at, error_key, dismissed_at in gone:
                changes.move(queue, name, status, None)
                changes.leave(error_key, dismissed_at)
                changes.ran(queue, name, status, finished_at, started_at)
            deleted += len(gone)
            room -= len(gone)
            if room <= 0 or len(ids) == PURGE_BATCH:
                return deleted, True
        run(SQL["purge_groups"], {"before": before})
        skips = number(run(SQL["purge_skips"], {"before": before, "most": room}))
        return deleted, skips == room

    # -- events

    async def events_after(self, seq: int, limit: int) -> Sequence[TaskEvent]:
        """Numbers are given before commits. Where one is missing, it may be of a transaction that is still open: what
        comes behind it is not shown until all that were open when it was noticed have ended."""
        rows = await self._read(lambda connection: asked(connection, "events_after", seq=seq, most=limit))
        found: list[TaskEvent] = []
        expected = seq + 1
        for number, *cells, oldest_open in rows:
            if number != expected and not await self._is_settled(expected, oldest_open):
                break
            found.append(event_of((number, *cells)))
            expected = number + 1
        self._gaps = {gap: since for gap, since in self._gaps.items() if gap >= expected}
        return found

    async def _is_settled(self, gap: int, oldest_open: int) -> bool:
        """Whether a number that is missing will never come."""
        if gap not in self._gaps:
            ((following,),) = await self._read(lambda connection: asked(connection, "next_transaction"))
            self._gaps[gap] = following
        return oldest_open >= self._gaps[gap]

    # -- news

    def listen(self, wake: Callable[[], None]) -> None:
        self._listener = Listener(self._conninfo, wake)
        self._listener.start()

    def announce(self) -> None:
        """Tells other processes that there is work, not more often than they could make use of."""
        if self._announcing.permits():
            self._reading.submit(self._notify)

    def _notify(self) -> None:
        with suppress(sa.exc.SQLAlchemyError), self._read_engine.connect() as connection:
            connection.exec_driver_sql(f"NOTIFY {CHANNEL}")

    async def open(self) -> None:
        await super().open()
        await self._read(self._compare_clocks)

    def _compare_clocks(self, connection: Connection) -> None:
        began = utc_now()
        ((told,),) = asked(connection, "clock")
        self.clock_offset = offset_of(self.clock_offset, began, told.astimezone(UTC), utc_now())

    def beat(self, instance: Instance, beat: Beat) -> None:
        super().beat(instance, beat)
        self._apart(lambda: self._ask(self._compare_clocks))
        if self._folding.permits():
            self._apart(lambda: self._write(sa.text(SQL["fold"])))

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
        await super().close()


class Listener:
    """Waits for announcements on a connection of its own. Where there can be none, behind a pooler say, the poll finds
    work a little later."""

    def __init__(self, conninfo: str, wake: Callable[[], None]) -> None:
        self._conninfo = conninfo
        self._wake = wake
        self._stopped = threading.Event()
        self._failures = 0

    def start(self) -> None:
        threading.Thread(target=self._run, name="taskflow-listener", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._hear()
            except psycopg.Error as error:
                if not self._failures:
                    logger.info("no news from other processes (%s): their tasks are found by the poll", error)
                self._failures += 1
                self._stopped.wait(pause_after(self._failures))

    def _hear(self) -> None:
        with psycopg.connect(self._conninfo, autocommit=True, **CONNECTION) as connection:
            connection.execute(f"LISTEN {CHANNEL}")
            while not self._stopped.is_set():
                for _ in connection.notifies(timeout=1.0, stop_after=1):
                    self._wake()
                self._failures = 0


def driver(connection: Connection) -> psycopg.Connection[Any]:
    found: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]
    return found


def asked(connection: Connection, statement: str, **values: object) -> Sequence[Sequence[Any]]:
    return driver(connection).execute(SQL[statement], values).fetchall()


def tasks_of(cursor: Cursor | None) -> list[StoredTask]:
    return [StoredTask(*row) for row in cursor.fetchall()] if cursor else []


def claims_of(cursor: Cursor) -> list[Claimed]:
    return [claim_of(row) for row in tasks_of(cursor)]


def columns(names: Iterable[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    """Rows as one array for each column."""
    return {name: list(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=True)}


def number(cursor: Cursor) -> int:
    (found,) = cursor.fetchone() or (0,)
    return int(found)


def event_of(cells: Sequence[Any]) -> TaskEvent:
    seq, task_id, at, kind, attempt, instance, actor, detail = cells
    return TaskEvent(seq, task_id, from_micros(at), kind, attempt, instance, actor, detail)


def whole(number: sa.ColumnElement[Any]) -> sa.ColumnElement[int]:
    """A sum as an integer: of bigints it is a decimal."""
    return sa.cast(number, sa.BigInteger)
