"""What SQLite must do besides the contract: promise durability, use its indexes, say no to what it cannot be."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import sqlalchemy as sa

from app.taskflow import BackendUnavailable, QueueConfig, TaskflowError, TaskStatus
from app.taskflow.backends import open_backend
from app.taskflow.backends.base import (
    CancelScheduled,
    DeclaredSchedule,
    DeclareQueues,
    DeclareSchedules,
    EditSchedule,
    Fire,
    Firing,
    LogLine,
    Progress,
    Purge,
    RunSchedule,
    Supersede,
)
from app.taskflow.backends.search import MOST_SEARCHES
from app.taskflow.backends.sqlite import LARGEST_WAL
from app.taskflow.backends.tables import SCHEMA_VERSION
from app.taskflow.models import Cursor, EventKind, TaskFilter

from .helpers import PATIENCE, START, Bench, all_tasks, make_draft

pytestmark = pytest.mark.anyio

GROWING = "taskflow_task|taskflow_event|taskflow_log"
"""Tables that grow with all that has ever run. The others grow with names, queues and processes."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tasks.db"


class Spy:
    """Every statement that any engine runs, with one set of its parameters."""

    def __init__(self) -> None:
        self.statements: dict[str, Any] = {}

    def execute(self, sql: str, parameters: Any) -> None:
        self.statements.setdefault(sql, parameters)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()

    class SpyConnection(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = ()) -> Any:
            spy.execute(sql, parameters)
            return super().execute(sql, parameters)

        def cursor(self, *args: Any) -> Any:
            return super().cursor(SpyCursor)

    class SpyCursor(sqlite3.Cursor):
        def execute(self, sql: str, parameters: Any = ()) -> Any:
            spy.execute(sql, parameters)
            return super().execute(sql, parameters)

    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3.dbapi2, "connect", lambda *args, **kwargs: connect(*args, **kwargs, factory=SpyConnection)
    )
    return spy


@contextmanager
def steps_of_sqlite() -> Iterator[list[None]]:
    """One for every ten steps of SQLite's own machine: no other load on the computer can disturb their number."""
    steps: list[None] = []

    def watch(connection: Any, *_: Any) -> None:
        connection.connection.driver_connection.set_progress_handler(lambda: steps.append(None), 10)

    sa.event.listen(sa.Engine, "begin", watch)
    try:
        yield steps
    finally:
        sa.event.remove(sa.Engine, "begin", watch)


async def live(bench: Bench) -> None:
    """A little of everything that a service asks for all the time."""
    backend = bench.backend
    await bench.turn(commands=[DeclareQueues({"slow": QueueConfig(concurrency=2, max_size=50)})])
    drafts = [make_draft(at=bench.now, queue=queue, max_attempts=2) for queue in ("default", "slow") * 20]
    await bench.accept(*drafts, make_draft("unknown"), make_draft(run_at=START + timedelta(seconds=1)))
    again = make_draft(task_id=drafts[0].task_id, key="k")
    await bench.accept(again)
    bench.pass_time(2)
    one, two, three, four, *_ = await bench.claim(10)
    await bench.turn(
        logs=[LogLine(one.task_id, bench.now, "info", 0, "hello")],
        progress=[Progress(one.task_id, 1, '{"done": 1}')],
    )
    await bench.finish(one)
    await bench.finish(two, TaskStatus.PENDING, run_at=bench.now + timedelta(seconds=5))
    await bench.finish(three, TaskStatus.FAILED, error="x")
    await bench.cancel(four.task_id)
    await bench.cancel(drafts[-1].task_id)
    await bench.requeue(three.task_id)
    await bench.turn(held=frozenset())
    bench.beat()
    backend.pulses()
    await bench.rescue("one", "nobody")
    await bench.turn(commands=[Purge(bench.now + timedelta(days=1), 10)])
    await backend.get(one.task_id)
    await backend.events(one.task_id)
    await backend.events_after(3, 10)
    await backend.last_seq()
    await backend.logs(one.task_id, 0, 10)
    await backend.counts()
    await backend.queues()
    await backend.due(bench.now)
    await backend.instances()
    await backend.cancels("one")
    await backend.arguments([one.task_id], 100)
    await live_schedules(bench)
    before = Cursor(bench.now, "task-5")
    for where in (
        TaskFilter(),
        TaskFilter(statuses=(TaskStatus.PENDING, TaskStatus.FAILED)),
        TaskFilter(func_name="job"),
        TaskFilter(queue="slow"),
        TaskFilter(schedule="job"),
        TaskFilter(schedule="job", statuses=(TaskStatus.FAILED,)),
        TaskFilter(func_name="job", queue="slow"),
        TaskFilter(statuses=(TaskStatus.SUCCESS,), func_name="job", source="manual"),
        TaskFilter(since=START, until=bench.now, tags=(("a", "b"),)),
        TaskFilter(text="x"),
    ):
        await backend.page(where, None, 10)
        await backend.page(where, before, 10)
    backend.leave("one")


async def live_schedules(bench: Bench) -> None:
    schedule = DeclaredSchedule("job", "job", "every 60 s", "UTC", True, "once", bench.now)
    run = make_draft(at=bench.now)._replace(schedule="job")
    await bench.obey(DeclareSchedules([schedule]))
    await bench.obey(DeclareSchedules([replace(schedule, misfire="all", at_startup=run)]))
    later = bench.now + timedelta(seconds=60)
    await bench.obey(Fire([Firing("job", bench.now, later, later, [run._replace(task_id="tick")], overlap=False)]))
    await bench.obey(EditSchedule("job", EventKind.PAUSE_SCHEDULE, True, None, "ann"))
    await bench.obey(RunSchedule("job", "by-hand", "ann"))
    once = make_draft(run_at=later)._replace(run_key="key", task_id="once")
    await bench.turn(commands=[Supersede(once)], drafts=[once])
    await bench.turn(commands=[Supersede(once)], drafts=[once])
    await bench.backend.schedules()
    await bench.backend.scheduled(None, None, 10)
    await bench.backend.scheduled(later, (bench.now, "task-5"), 10)
    await bench.obey(CancelScheduled("key", "ann"))
    await bench.turn(commands=[Purge(bench.now, 10)])


async def test_no_statement_of_daily_life_walks_through_a_table_that_grows(file: Path, spy: Spy) -> None:
    backend = open_backend(str(file))
    await backend.open()
    spy.statements.clear()
    await live(Bench(backend))
    await backend.close()

    asked = {
        sql: parameters
        for sql, parameters in spy.statements.items()
        if re.match("SELECT|UPDATE|DELETE|INSERT|WITH", sql)
    }
    assert len(asked) > 40
    bad = []
    with closing(sqlite3.connect(file)) as connection:
        for sql, parameters in asked.items():
            before = ""
            for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters):
                # A walk along an index is fine where a LIMIT ends it; rows that were found may not have to be sorted.
                scans = re.match(rf"SCAN ({GROWING})\b(?! USING (COVERING )?INDEX)", step)
                walks = re.match(rf"SCAN ({GROWING})\b", step) and "LIMIT" not in sql
                sorts = "TEMP B-TREE" in step and re.search(GROWING, before)
                if scans or walks or sorts:
                    bad.append((step, sql))
                before = step
    assert not bad, json.dumps(bad, indent=1)


@pytest.mark.parametrize(
    ("words", "index"),
    [
        ("SELECT DISTINCT schedule FROM taskflow_task", "taskflow_live_runs"),
        ("run_key = :run_key", "taskflow_run_key"),
        ("ORDER BY taskflow_task.run_at, taskflow_task.task_id\n LIMIT", "taskflow_one_offs"),
        ("taskflow_task.schedule = :schedule_1 ORDER", "taskflow_runs"),
        ("kind = 'tick_skipped' AND", "taskflow_skips"),
    ],
)
async def test_schedules_and_one_offs_are_asked_about_along_their_own_index(
    file: Path, spy: Spy, words: str, index: str
) -> None:
    """So that the thousands that wait cost nothing while their time has not come."""
    backend = open_backend(str(file))
    await backend.open()
    await live_schedules(Bench(backend))
    await backend.page(TaskFilter(schedule="job"), None, 10)
    await backend.close()
    asked = [(sql, parameters) for sql, parameters in spy.statements.items() if words in sql]
    assert asked
    with closing(sqlite3.connect(file)) as connection:
        for sql, parameters in asked:
            plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters))
            assert f"INDEX {index} " in f"{plan} ", plan


async def test_the_cost_of_a_claim_and_of_a_page_does_not_grow_with_what_has_run(file: Path) -> None:
    async def cost(bench: Bench) -> int:
        await bench.add()
        with steps_of_sqlite() as steps:
            await bench.finish(await bench.claim_one())
            await bench.backend.page(TaskFilter(), None, 20)
            await bench.backend.page(TaskFilter(statuses=(TaskStatus.FAILED, TaskStatus.PENDING)), None, 20)
            await bench.backend.counts()
        return len(steps)

    backend = open_backend(str(file))
    await backend.open()
    bench = Bench(backend)
    for _ in range(30):
        await bench.become(TaskStatus.FAILED)
    few = await cost(bench)
    for _ in range(10):
        await bench.accept(*[make_draft(at=bench.now) for _ in range(500)])
        while claimed := await bench.claim(500):
            for task in claimed[:1]:
                await bench.finish(task, TaskStatus.FAILED)
    many = await cost(bench)
    await backend.close()
    assert few > 10
    assert many < 1.3 * few


async def test_the_cost_of_a_claim_does_not_grow_with_what_waits_for_a_full_executor(file: Path) -> None:
    backend = open_backend(str(file))
    await backend.open()
    bench, names = Bench(backend), {"plain": "thread", "quick": "async"}

    async def cost() -> int:
        await bench.accept(*[make_draft("quick", executor="async") for _ in range(3)])
        with steps_of_sqlite() as steps:
            assert len(await bench.claim({"async": 3}, names=names)) == 3
        return len(steps)

    await bench.accept(*[make_draft("plain") for _ in range(10)])
    few = await cost()
    for _ in range(10):
        await bench.accept(*[make_draft("plain") for _ in range(500)])
    many = await cost()
    await backend.close()
    assert few > 10
    assert many < 1.3 * few


async def test_a_database_of_the_third_schema_gets_the_index_of_claims(file: Path) -> None:
    backend = open_backend(str(file))
    await backend.open()
    await backend.close()
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(
            "DROP INDEX taskflow_claim; CREATE INDEX taskflow_ready ON taskflow_task (queue) WHERE status = 'pending';"
            "UPDATE taskflow_schema_version SET version = 3"
        )
    await backend.open()
    bench = Bench(backend)
    await bench.add()
    await bench.finish(await bench.claim_one())
    await backend.close()
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT max(version) FROM taskflow_schema_version").fetchone() == (SCHEMA_VERSION,)
        found = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        assert "taskflow_claim" in found
        assert "taskflow_ready" not in found


async def test_nobody_waits_for_searches_and_too_many_of_them_are_refused(file: Path) -> None:
    bench = Bench(open_backend(str(file)))
    await bench.backend.open()
    await bench.turn(drafts=[draft := make_draft()])
    searched, go_on = TaskFilter(text="needle"), threading.Event()

    def hold_up(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "LIKE" in statement:
            go_on.wait(PATIENCE)

    sa.event.listen(sa.Engine, "before_cursor_execute", hold_up)
    try:
        searches = [asyncio.create_task(bench.backend.page(searched, None, 10)) for _ in range(MOST_SEARCHES)]
        await asyncio.sleep(0)
        assert await bench.backend.get(draft.task_id) is not None
        assert len((await bench.backend.page(TaskFilter(), None, 10)).tasks) == 1
        with pytest.raises(BackendUnavailable, match="searches are under way"):
            await bench.backend.page(searched, None, 10)
        assert not any(search.done() for search in searches)
        go_on.set()
        await asyncio.gather(*searches)
        await bench.backend.page(searched, None, 10)
    finally:
        go_on.set()
        sa.event.remove(sa.Engine, "before_cursor_execute", hold_up)


async def test_a_commit_survives_a_power_loss(file: Path, spy: Spy) -> None:
    backend = open_backend(str(file))
    await backend.open()
    await Bench(backend).add()
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await backend.close()
    assert any(re.fullmatch(r"PRAGMA synchronous ?= ?FULL", sql) for sql in spy.statements)
    assert not any(re.match(r"PRAGMA synchronous ?= ?(NORMAL|OFF)", sql) for sql in spy.statements)


def hog(file: Path, stop: threading.Event) -> None:
    """A neighbour that lets go of the write lock for a moment only."""
    with closing(sqlite3.connect(file, timeout=5, isolation_level=None)) as connection:
        while not stop.is_set():
            connection.execute("BEGIN IMMEDIATE")
            sleep(0.05)
            connection.execute("COMMIT")
            sleep(0.004)


async def test_a_busy_neighbour_does_not_keep_the_lock_to_itself(file: Path) -> None:
    backend = open_backend(str(file))
    await backend.open()
    bench, stop = Bench(backend), threading.Event()
    neighbour = threading.Thread(target=hog, args=(file, stop))
    neighbour.start()
    try:
        for _ in range(15):
            await bench.accept(make_draft())
    finally:
        stop.set()
        neighbour.join()
        await backend.close()


async def test_a_lock_that_nobody_gives_back_is_unavailable(file: Path) -> None:
    backend = open_backend(str(file))
    await backend.open()
    with closing(sqlite3.connect(file, isolation_level=None)) as neighbour:
        neighbour.execute("BEGIN IMMEDIATE")
        with pytest.raises(BackendUnavailable, match="locked"):
            await Bench(backend).accept(make_draft())
    await Bench(backend).accept(make_draft())
    await backend.close()


async def test_a_newer_schema_is_refused_and_left_as_it_is(file: Path) -> None:
    backend = open_backend(str(file))
    await backend.open()
    await backend.close()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("INSERT INTO taskflow_schema_version VALUES (999)")
        connection.commit()
    with pytest.raises(TaskflowError, match="999"):
        await open_backend(str(file)).open()


async def test_opening_twice_changes_nothing(file: Path) -> None:
    def schema() -> list[Any]:
        with closing(sqlite3.connect(file)) as connection:
            return connection.execute("SELECT * FROM sqlite_master ORDER BY name").fetchall()

    backend = open_backend(str(file))
    await backend.open()
    before = schema()
    await backend.open()
    assert schema() == before
    await backend.close()


@pytest.fixture
def damaged(file: Path) -> str:
    file.write_bytes(b"certainly not a database" * 100)
    return str(file)


async def test_a_file_that_is_no_database_is_an_error_that_names_the_trouble(damaged: str) -> None:
    with pytest.raises(BackendUnavailable, match="not a database"):
        await open_backend(damaged).open()


async def test_a_broken_row_shows_what_can_be_read_and_stops_nobody(file: Path) -> None:
    backend = open_backend(str(file))
    await backend.open()
    bench = Bench(backend)
    broken, good = await bench.add(), await bench.add()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(
            "UPDATE taskflow_task SET tags = '{broken', arguments = 'no json', progress = '[' WHERE task_id = ?",
            [broken],
        )
        connection.commit()
    assert [record.task_id for record in await all_tasks(backend)] == [good, broken]
    assert (await bench.get(broken)).tags == {}
    assert [task.task_id for task in await bench.claim()] == [broken, good]
    await backend.close()


@pytest.mark.parametrize("location", ["mysql://somewhere/db", "nonsense://", "oracle+x://a"])
def test_a_url_without_backend_is_refused_with_the_ones_there_are(location: str) -> None:
    with pytest.raises(TaskflowError, match="sqlite"):
        open_backend(location)


def test_a_password_in_a_url_is_never_shown() -> None:
    with pytest.raises(TaskflowError) as refused:
        open_backend("mysql://user:s3cret@somewhere/db")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("location", ["{file}", "sqlite:///{file}"])
async def test_a_path_and_a_url_mean_the_same_file(file: Path, location: str) -> None:
    backend = open_backend(location.format(file=file))
    await backend.open()
    await Bench(backend).add()
    await backend.close()
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT count(*) FROM taskflow_task").fetchone() == (1,)


async def test_two_databases_in_memory_are_two() -> None:
    one, two = open_backend(None), open_backend(None)
    await one.open()
    await two.open()
    await Bench(one).add()
    assert await all_tasks(two) == []
    await one.close()
    await two.close()


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ("DROP TABLE taskflow_log", "table taskflow_log"),
        ("DROP TABLE taskflow_task", "table taskflow_task"),
        ("ALTER TABLE taskflow_event DROP COLUMN detail", "column taskflow_event.detail"),
        ("DROP TRIGGER taskflow_tag_gone_tasks", "trigger taskflow_tag_gone_tasks"),
    ],
)
async def test_a_schema_with_something_missing_is_refused_and_left_as_it_is(
    file: Path, change: str, missing: str
) -> None:
    backend = open_backend(str(file))
    await backend.open()
    await backend.close()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(change)
    with pytest.raises(TaskflowError, match=missing):
        await backend.open()
    with closing(sqlite3.connect(file)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    assert missing.removeprefix("table ") not in tables
    await backend.close()


async def test_the_write_ahead_log_is_cut_back_once_a_long_reader_has_left(file: Path) -> None:
    backend = open_backend(str(file))
    await backend.open()
    bench, log = Bench(backend), file.with_name(f"{file.name}-wal")
    long = "x" * 100_000
    with closing(sqlite3.connect(file, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM taskflow_task").fetchone()
        while log.stat().st_size < 2 * LARGEST_WAL:
            await bench.accept(*(make_draft(arguments=long) for _ in range(100)))
    for _ in range(2):
        await bench.add(arguments=long)
    assert log.stat().st_size <= LARGEST_WAL
    await backend.close()
