"""`enqueue(session=...)`: the task is part of the caller's transaction, with a `Session` and with an `AsyncSession`."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel import Field, Session, SQLModel, create_engine, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.taskflow import BackendUnavailable, QueueConfig, QueueFullError, TaskflowError, TaskManager, TaskStatus
from app.taskflow.models import TaskFilter

from .conftest import StartManager
from .helpers import PATIENCE, assert_counters_match_rows, eventually

pytestmark = pytest.mark.anyio


class Shop(SQLModel):
    metadata = sa.MetaData()


class Order(Shop, table=True):
    """What the team stores in the same database."""

    id: int | None = Field(default=None, primary_key=True)
    word: str


class Service:
    """A manager on a file, and the team's own engine on the same one."""

    def __init__(self, manager: TaskManager, file: Path) -> None:
        self.manager, self.file = manager, file
        self.ran: list[str] = []
        self.engine = create_engine(f"sqlite:///{file}")
        self.async_engine: AsyncEngine = create_async_engine(f"sqlite+aiosqlite:///{file}")
        Shop.metadata.create_all(self.engine)

        @manager.task
        async def ship(word: str) -> str:
            self.ran.append(word)
            return word

        self.ship = ship

    async def close(self) -> None:
        self.engine.dispose()
        await self.async_engine.dispose()

    def orders(self) -> list[str]:
        with Session(self.engine) as session:
            return list(session.exec(select(Order.word).order_by(Order.word)))

    async def tasks(self) -> list[TaskStatus]:
        return [record.status for record in (await self.manager.store.page(TaskFilter())).tasks]


StartService = Callable[..., Awaitable[Service]]


@pytest.fixture
async def start_service(start_manager: StartManager, tmp_path: Path) -> AsyncIterator[StartService]:
    services = []

    async def start(**options: Any) -> Service:
        services.append(Service(await start_manager(**options), tmp_path / "tasks.db"))
        return services[-1]

    yield start
    for service in services:
        await service.close()


@pytest.fixture
def no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but a wake-up makes the journal look."""
    monkeypatch.setattr("app.taskflow.journal.POLL_INTERVAL", 60.0)
    monkeypatch.setattr("app.taskflow.housekeeping.RESCUE_INTERVAL", 60.0)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    began = monotonic()
    yield
    assert monotonic() - began < seconds


# -- one transaction


@pytest.mark.usefixtures("no_poll")
async def test_a_task_starts_when_the_session_has_committed_and_not_before(start_service: StartService) -> None:
    service = await start_service()
    with Session(service.engine) as session:
        session.add(Order(word="book"))
        task_id = await service.manager.enqueue(service.ship, "book", session=session)
        service.manager.journal.wake()
        await asyncio.sleep(0.1)
        assert await service.tasks() == []
        assert service.ran == []
        session.commit()
    with at_most(1):
        assert await service.manager.result(task_id, PATIENCE) == "book"
    assert service.orders() == ["book"]
    await assert_counters_match_rows(service.manager.backend, service.manager.clock())


@pytest.mark.usefixtures("no_poll")
async def test_an_async_session_carries_a_task_too(start_service: StartService) -> None:
    service = await start_service()
    async with AsyncSession(service.async_engine) as session:
        session.add(Order(word="book"))
        task_id = await service.manager.enqueue(service.ship, "book", session=session)
        assert await service.tasks() == []
        await session.commit()
    with at_most(1):
        assert await service.manager.result(task_id, PATIENCE) == "book"
    assert service.orders() == ["book"]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_task_is_rolled_back_with_its_session(start_service: StartService, kind: str) -> None:
    service = await start_service()
    if kind == "sync":
        with Session(service.engine) as session:
            session.add(Order(word="book"))
            await service.manager.enqueue(service.ship, "book", session=session)
    else:
        async with AsyncSession(service.async_engine) as session:
            session.add(Order(word="book"))
            await service.manager.enqueue(service.ship, "book", session=session)
            await session.rollback()
    kept = await service.manager.enqueue(service.ship, "kept")
    await service.manager.result(kept, PATIENCE)
    assert await service.tasks() == [TaskStatus.SUCCESS]
    assert (service.ran, service.orders()) == (["kept"], [])
    await assert_counters_match_rows(service.manager.backend, service.manager.clock())


async def test_two_tasks_in_one_transaction_commit_together(start_service: StartService) -> None:
    service = await start_service()
    with Session(service.engine) as session:
        ids = [await service.manager.enqueue(service.ship, word, session=session) for word in ("one", "two")]
        assert await service.tasks() == []
        session.commit()
    assert [await service.manager.result(task_id, PATIENCE) for task_id in ids] == ["one", "two"]
    await assert_counters_match_rows(service.manager.backend, service.manager.clock())


@pytest.mark.usefixtures("no_poll")
async def test_a_session_that_is_used_again_carries_its_next_transaction_s_tasks(start_service: StartService) -> None:
    service = await start_service()
    with Session(service.engine) as session:
        for word in ("one", "two", "three"):
            task_id = await service.manager.enqueue(service.ship, word, session=session)
            session.commit()
            with at_most(1):
                assert await service.manager.result(task_id, PATIENCE) == word
        await service.manager.enqueue(service.ship, "dropped", session=session)
        session.rollback()
        last = await service.manager.enqueue(service.ship, "last", session=session)
        session.commit()
    await service.manager.result(last, PATIENCE)
    assert service.ran == ["one", "two", "three", "last"]


async def test_a_session_is_listened_to_once_however_often_it_is_used(start_service: StartService) -> None:
    service = await start_service()
    with Session(service.engine) as session:
        for _ in range(5):
            await service.manager.enqueue(service.ship, "word", session=session)
            session.commit()
        assert len(list(session.dispatch.after_commit)) == 1


@pytest.mark.usefixtures("no_poll")
async def test_a_savepoint_that_is_rolled_back_takes_its_task_along_and_the_rest_starts_after_the_commit(
    start_service: StartService,
) -> None:
    service = await start_service()
    with Session(service.engine) as session:
        kept = await service.manager.enqueue(service.ship, "kept", session=session)
        with session.begin_nested() as savepoint:
            await service.manager.enqueue(service.ship, "dropped", session=session)
            savepoint.rollback()
        with session.begin_nested():
            released = await service.manager.enqueue(service.ship, "released", session=session)
        await asyncio.sleep(0.1)  # a journal that was woken now would find nothing, and not look again
        assert service.ran == []
        session.commit()
    with at_most(1):
        assert await service.manager.result(kept, PATIENCE) == "kept"
        assert await service.manager.result(released, PATIENCE) == "released"
    assert len(service.ran) == 2


async def test_options_arguments_and_keys_are_those_of_any_task(start_service: StartService) -> None:
    service = await start_service()
    with Session(service.engine) as session:
        options: dict[str, Any] = {"tags": {"a": "b"}, "priority": 3, "delay_seconds": 3_600.0, "idempotency_key": "k"}
        task_id = await service.manager.enqueue(service.ship, "x", session=session, **options)
        assert await service.manager.enqueue(service.ship, "y", session=session, **options) == task_id
        with pytest.raises(TaskflowError, match="'word'"):
            await service.manager.enqueue(service.ship, [], session=session)
        session.commit()
    record = await service.manager.store.get(task_id)
    assert (dict(record.tags), record.priority, record.status) == ({"a": "b"}, 3, TaskStatus.PENDING)
    assert record.run_at > record.created_at
    tagged = await service.manager.store.page(TaskFilter(tags=(("a", "b"),)))
    assert [record.task_id for record in tagged.tasks] == [task_id]
    assert await service.tasks() == [TaskStatus.PENDING]


# -- refused


async def test_a_session_of_another_database_is_refused(start_service: StartService, tmp_path: Path) -> None:
    service = await start_service()
    elsewhere = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    with Session(elsewhere) as session, pytest.raises(TaskflowError, match=r"other\.db.*tasks\.db") as refused:
        await service.manager.enqueue(service.ship, "x", session=session)
    assert "one transaction cannot reach both" in str(refused.value)
    elsewhere.dispose()


async def test_the_same_file_by_another_way_is_the_same_database(
    start_service: StartService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start_service()
    monkeypatch.chdir(tmp_path)
    relative = create_engine("sqlite:///./tasks.db")
    with Session(relative) as session:
        task_id = await service.manager.enqueue(service.ship, "x", session=session)
        session.commit()
    assert await service.manager.result(task_id, PATIENCE) == "x"
    relative.dispose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
async def test_a_database_in_memory_cannot_be_shared(url: str) -> None:
    manager = TaskManager()

    @manager.task
    async def ship(word: str) -> None: ...

    async with manager.lifespan():
        engine = create_engine(url)
        with Session(engine) as session, pytest.raises(TaskflowError, match="cannot reach both"):
            await manager.enqueue(ship, "x", session=session)
        engine.dispose()


async def test_a_full_queue_refuses_and_leaves_the_transaction_to_its_owner(start_service: StartService) -> None:
    service = await start_service(queues={"default": QueueConfig(max_size=1)})
    await service.manager.store.pause_queue("default")
    with Session(service.engine) as session:
        session.add(Order(word="book"))
        await service.manager.enqueue(service.ship, "first", session=session)
        with pytest.raises(QueueFullError) as refused:
            await service.manager.enqueue(service.ship, "second", session=session)
        session.commit()
    assert (refused.value.queue, refused.value.limit) == ("default", 1)
    assert service.orders() == ["book"]
    assert sorted(await service.tasks()) == [TaskStatus.PENDING, TaskStatus.REJECTED]
    await assert_counters_match_rows(service.manager.backend, service.manager.clock())


async def test_of_many_concurrent_transactions_exactly_as_many_get_a_place_as_there_are(
    start_service: StartService,
) -> None:
    service = await start_service(queues={"default": QueueConfig(max_size=5)})
    await service.manager.store.pause_queue("default")

    def buy(number: int) -> bool:
        with Session(service.engine) as session:
            session.add(Order(word=str(number)))
            try:
                asyncio.run(service.manager.enqueue(service.ship, str(number), session=session))
            except QueueFullError:
                session.rollback()
                return False
            session.commit()
            return True

    with ThreadPoolExecutor(8) as buyers:
        loop = asyncio.get_running_loop()
        bought = await asyncio.gather(*(loop.run_in_executor(buyers, buy, number) for number in range(24)))
    assert bought.count(True) == 5
    assert await service.tasks() == [TaskStatus.PENDING] * 5
    assert len(service.orders()) == 5


async def test_a_database_that_is_locked_is_unavailable_and_nothing_runs(start_service: StartService) -> None:
    service = await start_service()
    impatient = create_engine(f"sqlite:///{service.file}", connect_args={"timeout": 0.1})
    with Session(service.engine) as other, Session(impatient) as session:
        other.add(Order(word="takes the lock"))
        other.flush()
        with pytest.raises(BackendUnavailable, match="locked"):
            await service.manager.enqueue(service.ship, "x", session=session)
        session.rollback()
        other.commit()
    assert await service.tasks() == []
    impatient.dispose()


# -- while a transaction is open


async def test_the_journal_goes_on_after_a_transaction_that_was_open_for_three_seconds(
    start_service: StartService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "taskflow")
    service = await start_service()

    @service.manager.task
    async def long() -> str:
        await asyncio.sleep(0.5)
        return "ended while the database was locked"

    running = await service.manager.enqueue(long)
    await eventually(lambda: service.manager.dispatcher.running == 1)
    answers: list[str | BackendUnavailable] = []

    async def keep_adding(until: float) -> None:
        while monotonic() < until:
            try:
                answers.append(await service.manager.enqueue(service.ship, str(len(answers))))
            except BackendUnavailable as error:
                answers.append(error)
            await asyncio.sleep(0.05)

    with Session(service.engine) as session:
        joined = await service.manager.enqueue(service.ship, "joined", session=session)
        await asyncio.gather(*(keep_adding(monotonic() + 3) for _ in range(3)))
        session.commit()
    accepted = [answer for answer in answers if isinstance(answer, str)]
    refused = [answer for answer in answers if isinstance(answer, BackendUnavailable)]
    assert refused, "the transaction was in nobody's way"
    last = await service.manager.enqueue(service.ship, "last")
    for task_id in (joined, running, last, *accepted):
        await service.manager.result(task_id, PATIENCE)
    stored = (await service.manager.store.page(TaskFilter(), limit=500)).tasks
    assert {record.task_id for record in stored} == {joined, running, last, *accepted}  # and none that was refused
    assert len(service.ran) == len(stored) - 1
    await assert_counters_match_rows(service.manager.backend, service.manager.clock())
