"""What only PostgreSQL can do or break: transactions of the caller's, lost connections, numbers before commits."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Session, create_engine
from sqlmodel.ext.asyncio.session import AsyncSession

from app.taskflow import QueueConfig, QueueFullError, TaskflowError, TaskManager, TaskStatus
from app.taskflow.backends import open_backend
from app.taskflow.backends.base import Turn
from app.taskflow.backends.postgres import PostgresBackend
from app.taskflow.errors import BackendUnavailable, OutcomeUnknown

from .helpers import (
    PATIENCE,
    START,
    Bench,
    all_tasks,
    assert_counters_match_rows,
    eventually,
    make_draft,
    runs_through_a_kill,
)
from .servers import PostgresServer, fresh_postgres, postgres_url

pytestmark = pytest.mark.anyio


@pytest.fixture
def url() -> Iterator[str]:
    with fresh_postgres(postgres_url()) as found:
        yield found


@pytest.fixture
async def backend(url: str) -> AsyncIterator[PostgresBackend]:
    found = PostgresBackend(sa.engine.make_url(url))
    await found.open()
    yield found
    await found.close()


@pytest.fixture
async def manager(url: str) -> AsyncIterator[TaskManager]:
    found = TaskManager(snapshot_db=url, shutdown_timeout=5.0, queues={"small": QueueConfig(max_size=1)})

    @found.task
    async def ship(word: str) -> str:
        return word

    @found.task(queue="small", executor="thread")
    def rare() -> None: ...

    async with found.lifespan():
        yield found


def driver_url(url: str, driver: str) -> str:
    return url.replace("postgresql://", f"postgresql+{driver}://")


# -- enqueue(session=...)


async def test_a_task_commits_and_rolls_back_with_a_session(manager: TaskManager, url: str) -> None:
    ship = manager.registry.named("ship").function
    engine = create_engine(driver_url(url, "psycopg"))
    with Session(engine) as session:
        lost = await manager.enqueue(ship, "lost", session=session)
        session.rollback()
        kept = await manager.enqueue(ship, "kept", session=session)
        assert await manager.backend.get(kept) is None
        session.commit()
    assert await manager.result(kept, PATIENCE) == "kept"
    assert await manager.backend.get(lost) is None
    await assert_counters_match_rows(manager.backend, manager.clock())
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_an_async_session_carries_a_task_too(manager: TaskManager, url: str, driver: str) -> None:
    ship = manager.registry.named("ship").function
    engine = create_async_engine(driver_url(url, driver))
    async with AsyncSession(engine) as session:
        first = await manager.enqueue(ship, "one", session=session)
        again = await manager.enqueue(ship, "two", idempotency_key="k", session=session)
        await session.commit()
    assert [await manager.result(task_id, PATIENCE) for task_id in (first, again)] == ["one", "two"]
    async with AsyncSession(engine) as session:
        assert await manager.enqueue(ship, "two", idempotency_key="k", session=session) == again
        await session.commit()
    await assert_counters_match_rows(manager.backend, manager.clock())
    await engine.dispose()


async def test_an_open_transaction_holds_up_no_turn(manager: TaskManager, url: str) -> None:
    """Neither its counts nor its events are rows that the writer has to wait for."""
    ship = manager.registry.named("ship").function
    engine = create_engine(driver_url(url, "psycopg"))
    with Session(engine) as session:
        later = await manager.enqueue(ship, "later", session=session)
        for number in range(5):
            assert await manager.result(await manager.enqueue(ship, str(number)), 2) == str(number)
        session.commit()
    assert await manager.result(later, PATIENCE) == "later"
    await assert_counters_match_rows(manager.backend, manager.clock())
    engine.dispose()


async def test_a_full_queue_refuses_a_session_s_task(manager: TaskManager, url: str) -> None:
    await manager.store.pause_queue("small")
    rare = manager.registry.named("rare").function
    await manager.enqueue(rare)
    engine = create_engine(driver_url(url, "psycopg"))
    with Session(engine) as session:
        with pytest.raises(QueueFullError):
            await manager.enqueue(rare, session=session)
        session.rollback()
    engine.dispose()


async def test_a_session_of_another_database_is_refused(manager: TaskManager) -> None:
    with fresh_postgres(postgres_url()) as other:
        engine = create_engine(driver_url(other, "psycopg"))
        with Session(engine) as session, pytest.raises(TaskflowError, match="one transaction cannot reach both"):
            await manager.enqueue(manager.registry.named("ship").function, "x", session=session)
        engine.dispose()


# -- turns


async def test_events_behind_an_open_transaction_wait_for_it(backend: PostgresBackend, url: str) -> None:
    bench = Bench(backend)
    await bench.add()
    with psycopg.connect(url) as other:
        other.execute("INSERT INTO taskflow_event (task_id, at, kind) VALUES ('open', 0, 'accepted')")
        await bench.add()
        assert [event.task_id for event in await backend.events_after(1, 100)] == []
        other.commit()
    found = [event.task_id for event in await backend.events_after(1, 100)]
    assert (found[0], len(found)) == ("open", 2)


async def test_a_number_that_was_rolled_back_holds_up_nobody(backend: PostgresBackend, url: str) -> None:
    bench = Bench(backend)
    await bench.add()
    with psycopg.connect(url) as other:
        other.execute("INSERT INTO taskflow_event (task_id, at, kind) VALUES ('gone', 0, 'accepted')")
        other.rollback()
    await bench.add()
    found = await eventually(lambda: backend.events_after(1, 100))
    assert len(found) == 1


@contextmanager
def after_the_commit(backend: PostgresBackend, act: Callable[[Any], None]) -> Iterator[None]:
    """The next commit is made by the server, and its answer never arrives."""
    commit = psycopg.Connection.commit

    def lose(connection: Any) -> None:
        psycopg.Connection.commit = commit  # type: ignore[method-assign]
        act(connection)
        raise psycopg.OperationalError("the answer was lost")

    psycopg.Connection.commit = lose  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        psycopg.Connection.commit = commit  # type: ignore[method-assign]


def commits_and_dies(connection: Any) -> None:
    connection.commit()
    connection.pgconn.finish()


def dies(connection: Any) -> None:
    connection.pgconn.finish()


async def test_a_commit_whose_answer_was_lost_is_recognised(backend: PostgresBackend) -> None:
    draft = make_draft(key="k")
    turn = Turn(now=START, instance="one", drafts=[draft], turn_id="first")
    with after_the_commit(backend, commits_and_dies), pytest.raises(OutcomeUnknown):
        await backend.turn(turn)
    result = await backend.turn(turn)
    assert (result.existing, result.rejected) == (frozenset(), {})
    assert len(await all_tasks(backend)) == 1
    await assert_counters_match_rows(backend, START)


async def test_a_commit_that_was_never_made_is_made_again(backend: PostgresBackend) -> None:
    draft = make_draft()
    turn = Turn(now=START, instance="one", drafts=[draft], turn_id="first")
    with after_the_commit(backend, dies), pytest.raises(OutcomeUnknown):
        await backend.turn(turn)

    async def settled() -> bool:
        try:
            await backend.turn(turn)
        except OutcomeUnknown:  # the server has not noticed yet that its client is gone
            return False
        return True

    await eventually(settled)
    assert [record.status for record in await all_tasks(backend)] == [TaskStatus.PENDING]
    await assert_counters_match_rows(backend, START)


async def test_a_cut_connection_is_away_once_and_then_made_anew(backend: PostgresBackend, url: str) -> None:
    bench = Bench(backend)
    await bench.add()
    with psycopg.connect(url, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    with pytest.raises(BackendUnavailable):
        await bench.add()
    await eventually(lambda: added(bench))
    assert len(await backend.counts()) == 1


async def added(bench: Bench) -> bool:
    try:
        return bool(await bench.add())
    except BackendUnavailable:
        return False


async def test_ten_processes_may_start_at_once(url: str) -> None:
    backends = [open_backend(url) for _ in range(10)]
    await asyncio.gather(*(backend.open() for backend in backends))
    assert all([await backend.is_current() for backend in backends])
    for backend in backends:
        await backend.close()


async def test_counts_are_folded_once_their_process_is_gone(backend: PostgresBackend, url: str) -> None:
    gone, here = Bench(backend, "gone"), Bench(backend, "here")
    await gone.accept(*[make_draft() for _ in range(5)])
    here.beat()
    with psycopg.connect(url) as other:
        (parts,) = other.execute("SELECT count(*) FROM taskflow_delta").fetchone() or (None,)
    assert parts == 0
    assert sum(count.n for count in await backend.counts()) == 5
    await assert_counters_match_rows(backend, START)


# -- the server


async def test_what_runs_while_the_server_is_killed_is_recorded_when_it_is_back() -> None:
    with PostgresServer() as server:
        await runs_through_a_kill(server, PATIENCE)  # its children may still serve for a moment
