"""A timeout is a failed attempt, which the policy retries; what comes after it is refused."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.taskflow import TaskFailed, TaskManager, TaskStatus, get_task_context

from .conftest import StartManager
from .helpers import PATIENCE, assert_counters_match_rows, eventually

pytestmark = pytest.mark.anyio

SHORT = 0.15


class Work:
    """Tasks that are too slow at their first attempts, and what happened in them."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.go = threading.Event()

    def define(self, manager: TaskManager) -> None:
        @manager.task(timeout=SHORT, retries=1)
        async def endless() -> None:
            self.seen.append("started")
            try:
                await asyncio.sleep(3_600)
            except asyncio.CancelledError:
                self.seen.append("cancelled")
                raise

        @manager.task(timeout=SHORT, retries=1)
        async def slow_once() -> str:
            await asyncio.sleep(0 if attempt() else 3_600)
            return "in time"

        @manager.task(timeout=SHORT, retries=1)
        def slow_thread_once() -> str:
            if attempt():
                return "in time"
            context = get_task_context()
            assert context is not None
            while not context.cancelled and not self.go.wait(0.01):
                pass
            self.seen.append("told")
            return "too late"

        @manager.task(timeout=SHORT)
        def deaf() -> str:
            self.go.wait(PATIENCE)
            self.seen.append("ended")
            return "too late"

        @manager.task(timeout=SHORT, retries=1)
        async def stubborn() -> str:
            try:
                await asyncio.sleep(3_600)
            except asyncio.CancelledError:
                self.seen.append("swallowed")
            return "too late"

        @manager.task(timeout=SHORT, retries=1, retry_on=ConnectionError)
        async def only_connections() -> None:
            self.seen.append("started")
            await asyncio.sleep(3_600)

        @manager.task(timeout=SHORT, retries=1, delay=3_600)
        async def slow_then_waits() -> None:
            await asyncio.sleep(3_600)

        @manager.task
        async def double(number: int) -> int:
            return 2 * number

        @manager.task
        def thread_double(number: int) -> int:
            return 2 * number


def attempt() -> int:
    context = get_task_context()
    assert context is not None
    return context.attempt


@pytest.fixture
async def work() -> AsyncIterator[Work]:
    work = Work()
    yield work
    work.go.set()  # no thread outlives its test


def task(manager: TaskManager, name: str) -> Any:
    return manager.registry.named(name).function


async def history(manager: TaskManager, task_id: str) -> list[tuple[str, int | None, str | None]]:
    return [(event.kind, event.attempt, event.detail) for event in await manager.store.events(task_id)]


async def test_a_coroutine_is_cancelled_and_fails_when_its_attempts_are_spent(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, "endless"))
    with pytest.raises(TaskFailed, match=r"failed: timed out after 0.15 s"):
        await manager.result(task_id, PATIENCE)
    assert work.seen == ["started", "cancelled"] * 2
    record = await manager.store.get(task_id)
    assert (record.attempt, record.retries_used, record.error) == (2, 1, "timed out after 0.15 s")
    assert record.duration is not None
    assert SHORT <= record.duration < SHORT + 1


@pytest.mark.parametrize("name", ["slow_once", "slow_thread_once"])
async def test_the_next_attempt_may_be_in_time(start_manager: StartManager, work: Work, name: str) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, name))
    assert await manager.result(task_id, PATIENCE) == "in time"
    assert await history(manager, task_id) == [
        ("accepted", None, None),
        ("started", 0, None),
        ("retrying", 0, "timed out after 0.15 s"),
        ("started", 1, None),
        ("succeeded", 1, None),
    ]


async def test_a_thread_is_told_and_its_late_result_is_refused(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, "slow_thread_once"))
    await eventually(lambda: work.seen == ["told"])
    assert await manager.result(task_id, PATIENCE) == "in time"


async def test_a_thread_that_does_not_listen_fails_in_time_and_what_it_returns_later_changes_nothing(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define, max_sync_threads=1)
    task_id = await manager.enqueue(task(manager, "deaf"))
    with pytest.raises(TaskFailed, match="timed out"):
        await manager.result(task_id, 2)
    before = await manager.store.get(task_id)
    sibling = await manager.enqueue(task(manager, "thread_double"), 1)
    assert await manager.result(sibling, PATIENCE) == 2  # its slot is free, although the thread still hangs
    work.go.set()
    await eventually(lambda: work.seen == ["ended"])
    assert await manager.result(await manager.enqueue(task(manager, "thread_double"), 2), PATIENCE) == 4
    assert await manager.store.get(task_id) == before
    assert before.status is TaskStatus.FAILED


async def test_a_coroutine_that_swallows_its_cancellation_does_not_turn_its_timeout_into_a_success(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, "stubborn"))
    with pytest.raises(TaskFailed, match="timed out"):
        await manager.result(task_id, PATIENCE)
    assert work.seen == ["swallowed"] * 2
    assert (await manager.store.get(task_id)).result is None


async def test_a_timeout_is_retried_only_where_the_policy_says_so(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, "only_connections"))
    with pytest.raises(TaskFailed, match="timed out"):
        await manager.result(task_id, PATIENCE)
    assert work.seen == ["started"]


async def test_a_task_that_waits_after_its_timeout_holds_no_slot(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define, max_concurrent_tasks=1)
    slow = await manager.enqueue(task(manager, "slow_then_waits"))
    sibling = await manager.enqueue(task(manager, "double"), 1)
    assert await manager.result(sibling, PATIENCE) == 2
    record = await manager.store.get(slow)
    assert (record.status, record.error) == (TaskStatus.PENDING, "timed out after 0.15 s")
    await eventually(lambda: manager.dispatcher.running == 0)
    await assert_counters_match_rows(manager.backend, manager.clock())


async def test_an_operator_s_cancel_wins_over_a_timeout_that_comes_later(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define)

    @manager.task(timeout=0.5, retries=3)
    def hanging() -> None:
        work.seen.append("started")
        work.go.wait(PATIENCE)

    task_id = await manager.enqueue(hanging)
    await eventually(lambda: work.seen)
    await manager.store.cancel(task_id)
    with pytest.raises(TaskFailed, match="is cancelled"):
        await manager.result(task_id, PATIENCE)
    assert work.seen == ["started"]
