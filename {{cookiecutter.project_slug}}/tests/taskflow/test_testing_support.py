"""What a team tests its tasks with: drain, retries without waiting, a clock that stands still."""

import asyncio
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import pytest

from app.taskflow import LifecycleEvent, RetryLater, TaskManager, TaskObserver, TaskStatus, get_task_context
from app.taskflow.models import TaskFilter
from app.taskflow.testing import advance, drain, instant_retries, unfinished

from .conftest import StartManager
from .helpers import PATIENCE

pytestmark = pytest.mark.anyio

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = 3_600.0


def define(manager: TaskManager) -> None:
    @manager.task
    async def work(seconds: float = 0.0) -> None:
        await asyncio.sleep(seconds)

    @manager.task
    def thread_work() -> None: ...

    @manager.task(retries=3, delay=HOUR, backoff=2)
    async def flaky() -> int:
        if attempt() < 3:
            raise ConnectionError("not yet")
        return attempt()

    @manager.task
    async def postponing() -> int:
        if attempt() < 3:
            raise RetryLater(HOUR)
        return attempt()

    @manager.task
    async def chain(links: int) -> None:
        if links:
            await manager.enqueue(chain, links - 1)


def attempt() -> int:
    context = get_task_context()
    assert context is not None
    return context.attempt


def task(manager: TaskManager, name: str) -> Any:
    return manager.registry.named(name).function


@pytest.fixture(params=["file", "memory"])
async def manager(request: pytest.FixtureRequest, start_manager: StartManager) -> TaskManager:
    return await start_manager(define, **({"snapshot_db": None} if request.param == "memory" else {}))


async def statuses(manager: TaskManager) -> list[TaskStatus]:
    return [record.status for record in (await manager.store.page(TaskFilter())).tasks]


# -- drain


async def test_a_drain_returns_when_everything_that_waits_has_run(manager: TaskManager) -> None:
    for _ in range(10):
        await manager.enqueue(task(manager, "work"), 0.01)
        await manager.enqueue(task(manager, "thread_work"))
    await drain(manager)
    assert await statuses(manager) == [TaskStatus.SUCCESS] * 20
    assert await unfinished(manager) == 0


async def test_a_drain_with_nothing_to_do_returns_at_once(manager: TaskManager) -> None:
    began = monotonic()
    await drain(manager)
    assert monotonic() - began < 0.5


async def test_a_drain_runs_what_the_tasks_themselves_add(manager: TaskManager) -> None:
    await manager.enqueue(task(manager, "chain"), 5)
    await drain(manager)
    assert await statuses(manager) == [TaskStatus.SUCCESS] * 6


async def test_a_drain_leaves_delayed_tasks_and_retry_waits_where_they_are(manager: TaskManager) -> None:
    delayed = await manager.enqueue(task(manager, "work"), delay_seconds=HOUR)
    flaky = await manager.enqueue(task(manager, "flaky"))
    await drain(manager)
    records = [await manager.store.get(task_id) for task_id in (delayed, flaky)]
    assert [(record.status, record.attempt) for record in records] == [(TaskStatus.PENDING, 0), (TaskStatus.PENDING, 1)]


async def test_a_drain_that_takes_too_long_says_how_many_are_left(manager: TaskManager) -> None:
    await manager.store.pause_queue("default")
    for _ in range(3):
        await manager.enqueue(task(manager, "work"))
    with pytest.raises(TimeoutError, match=r"after 0\.1 s 3 tasks still run or wait"):
        await drain(manager, timeout=0.1)


class Slow(TaskObserver):
    """Hears of everything later than it happens."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.heard: list[str] = []

    async def on_lifecycle(self, event: LifecycleEvent) -> None:
        await asyncio.sleep(self.seconds)
        self.heard.append(event.status)


async def test_a_drain_returns_when_observers_have_heard_of_it(start_manager: StartManager) -> None:
    manager = await start_manager(define, loggers=[slow := Slow(0.1)])
    await manager.enqueue(task(manager, "work"))
    await drain(manager)
    assert slow.heard == [TaskStatus.RUNNING, TaskStatus.SUCCESS]


async def test_a_drain_that_an_observer_holds_up_says_so(start_manager: StartManager) -> None:
    manager = await start_manager(define, loggers=[Slow(2.0)])
    await manager.enqueue(task(manager, "work"))
    with pytest.raises(TimeoutError, match="after 1 s an observer has not heard of all"):
        await drain(manager, timeout=1.0)


# -- retries without waiting


@pytest.mark.parametrize("name", ["flaky", "postponing"])
async def test_with_instant_retries_a_task_is_tried_to_its_end_without_waiting(manager: TaskManager, name: str) -> None:
    with instant_retries(manager):
        task_id = await manager.enqueue(task(manager, name))
        await drain(manager)
    record = await manager.store.get(task_id)
    assert (record.status, record.attempt) == (TaskStatus.SUCCESS, 4)
    assert await manager.result(task_id) == 3


async def test_after_the_block_retries_wait_again_even_when_it_broke(manager: TaskManager) -> None:
    with pytest.raises(ZeroDivisionError), instant_retries(manager):
        raise ZeroDivisionError
    task_id = await manager.enqueue(task(manager, "flaky"))
    await drain(manager)
    assert (await manager.store.get(task_id)).status is TaskStatus.PENDING


# -- the clock


async def test_a_frozen_clock_dates_everything_that_is_written(manager: TaskManager) -> None:
    manager.clock.freeze(NOON)
    task_id = await manager.enqueue(task(manager, "work"))
    await drain(manager)
    record = await manager.store.get(task_id)
    assert {record.created_at, record.run_at, record.start_time, record.end_time} == {NOON}
    assert {event.time for event in await manager.store.events(task_id)} == {NOON}


async def test_a_delayed_task_runs_when_the_clock_is_moved_to_its_time_and_not_before(manager: TaskManager) -> None:
    manager.clock.freeze(NOON)
    task_id = await manager.enqueue(task(manager, "work"), delay_seconds=HOUR)
    await advance(manager, HOUR - 1)
    assert (await manager.store.get(task_id)).status is TaskStatus.PENDING
    await advance(manager, 1)
    record = await manager.store.get(task_id)
    assert (record.status, record.start_time) == (TaskStatus.SUCCESS, NOON + timedelta(hours=1))


async def test_each_retry_comes_at_its_time(manager: TaskManager) -> None:
    manager.clock.freeze(NOON)
    task_id = await manager.enqueue(task(manager, "flaky"))
    await drain(manager)
    for hours in (1, 2, 4):
        await advance(manager, hours * HOUR - 1)
        attempts = (await manager.store.get(task_id)).attempt
        await advance(manager, 1)
        assert (await manager.store.get(task_id)).attempt == attempts + 1
    started = [event.time for event in await manager.store.events(task_id) if event.kind == "started"]
    assert started == [NOON + timedelta(hours=hours) for hours in (0, 1, 3, 7)]
    assert await manager.result(task_id) == 3


async def test_a_week_of_delays_is_tested_in_no_time(manager: TaskManager) -> None:
    manager.clock.freeze()
    for day in range(7):
        await manager.enqueue(task(manager, "work"), delay_seconds=day * 24 * HOUR)
    began = monotonic()
    for day in range(7):
        await drain(manager)
        assert (await statuses(manager)).count(TaskStatus.SUCCESS) == day + 1
        await advance(manager, 24 * HOUR)
    assert monotonic() - began < PATIENCE


async def test_a_resumed_clock_says_the_time_again(manager: TaskManager) -> None:
    manager.clock.freeze(NOON)
    assert manager.clock() == NOON
    manager.clock.resume()
    assert abs(manager.clock() - datetime.now(UTC)) < timedelta(seconds=1)
    with pytest.raises(ValueError, match="freeze"):
        await advance(manager, 1)


def test_a_clock_is_not_frozen_at_a_time_without_zone() -> None:
    with pytest.raises(ValueError, match="time zone"):
        TaskManager().clock.freeze(datetime(2026, 3, 1))
