"""Cancelling in every state, for coroutines and threads, from this instance and from another one."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import pytest

from app.taskflow import QueueConfig, RetryLater, TaskFailed, TaskManager, TaskNotFound, TaskStatus, get_task_context
from app.taskflow.errors import TaskStateError

from .conftest import StartManager
from .helpers import PATIENCE, assert_counters_match_rows, eventually

pytestmark = pytest.mark.anyio


class Work:
    """Tasks that run until they are stopped or let go, and what happened in them."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.go = threading.Event()

    def define(self, manager: TaskManager) -> None:
        @manager.task(retries=3)
        async def endless() -> None:
            self.seen.append("started")
            try:
                await asyncio.sleep(3_600)
            except asyncio.CancelledError:
                self.seen.append("cancelled")
                raise

        @manager.task(retries=3)
        def listening() -> str:
            self.seen.append("started")
            context = get_task_context()
            assert context is not None
            while not context.cancelled and not self.go.wait(0.01):
                pass
            self.seen.append("told" if context.cancelled else "let go")
            return "late"

        @manager.task
        async def stubborn() -> str:
            self.seen.append("started")
            while not self.go.is_set():
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    self.seen.append("swallowed")
            return "late"

        @manager.task
        def deaf() -> str:
            self.seen.append("started")
            self.go.wait(PATIENCE)
            return "late"

        @manager.task(retries=3)
        async def breaking() -> None:
            self.seen.append("started")
            try:
                await asyncio.sleep(3_600)
            finally:
                raise ConnectionError("broken while it was stopped")

        @manager.task
        async def careful() -> None:
            """Cleans up for longer than it takes to look for cancels, and may be interrupted at each step."""
            self.seen.append("started")
            try:
                await asyncio.sleep(3_600)
            finally:
                while not self.go.is_set():
                    await asyncio.sleep(0.01)
                self.seen.append("cleaned up")

        @manager.task(retries=1, delay=3_600)
        async def failing() -> None:
            self.seen.append("started")
            raise ConnectionError("later")

        @manager.task
        async def postponing() -> None:
            self.seen.append("started")
            raise RetryLater(3_600)

        @manager.task
        async def double(number: int) -> int:
            return 2 * number

        @manager.task
        def thread_double(number: int) -> int:
            return 2 * number

        @manager.task
        async def raising() -> None:
            raise ValueError("no")


@pytest.fixture
async def work() -> AsyncIterator[Work]:
    work = Work()
    yield work
    work.go.set()  # no thread outlives its test


def task(manager: TaskManager, name: str) -> Any:
    return manager.registry.named(name).function


async def kinds(manager: TaskManager, task_id: str) -> list[str]:
    return [event.kind for event in await manager.store.events(task_id)]


async def status(manager: TaskManager, task_id: str) -> TaskStatus:
    return (await manager.store.get(task_id)).status


async def ended(manager: TaskManager, task_id: str) -> TaskStatus:
    return await eventually(lambda: terminal(manager, task_id))  # type: ignore[no-any-return]


async def terminal(manager: TaskManager, task_id: str) -> TaskStatus | None:
    found = await status(manager, task_id)
    return found if found.terminal else None


async def waits_again(manager: TaskManager, task_id: str) -> bool:
    record = await manager.store.get(task_id)
    return record.status is TaskStatus.PENDING and record.attempt == 1


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    began = monotonic()
    yield
    assert monotonic() - began < seconds


# -- before it runs


@pytest.mark.parametrize("name", ["double", "thread_double"])
async def test_a_pending_task_that_was_cancelled_never_runs(start_manager: StartManager, work: Work, name: str) -> None:
    manager = await start_manager(work.define, queues={"closed": QueueConfig()})
    await manager.store.pause_queue("closed")
    victim = await manager.enqueue(task(manager, name), 1, queue="closed")
    sibling = await manager.enqueue(task(manager, name), 2, queue="closed")
    record = await manager.store.cancel(victim, "ann")
    assert (record.status, record.attempt, record.start_time) == (TaskStatus.CANCELLED, 0, None)
    await manager.store.resume_queue("closed")
    assert await manager.result(sibling, PATIENCE) == 4
    assert await kinds(manager, victim) == ["accepted", "cancelled"]
    assert (await manager.store.events(victim))[-1].actor == "ann"
    await assert_counters_match_rows(manager.backend, manager.clock())


async def test_a_delayed_task_is_cancelled_at_once_and_never_becomes_due(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define)
    victim = await manager.enqueue(task(manager, "endless"), delay_seconds=0.3)
    sibling = await manager.enqueue(task(manager, "double"), 2, delay_seconds=0.4)
    assert (await manager.store.cancel(victim)).status is TaskStatus.CANCELLED
    assert await manager.result(sibling, PATIENCE) == 4
    assert await kinds(manager, victim) == ["accepted", "cancelled"]
    assert work.seen == []


@pytest.mark.parametrize("name", ["failing", "postponing"])
async def test_a_task_that_waits_for_its_retry_is_cancelled_at_once(
    start_manager: StartManager, work: Work, name: str
) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, name))
    await eventually(lambda: waits_again(manager, task_id))
    assert (await manager.store.cancel(task_id)).status is TaskStatus.CANCELLED
    assert await kinds(manager, task_id) == ["accepted", "started", "retrying", "cancelled"]
    assert work.seen == ["started"]
    await assert_counters_match_rows(manager.backend, manager.clock())


# -- while it runs


async def test_a_running_coroutine_gets_cancelled_error_and_is_not_retried(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, "endless"))
    await eventually(lambda: work.seen)
    with at_most(1):
        await manager.store.cancel(task_id, "ann")
        assert await ended(manager, task_id) is TaskStatus.CANCELLED
    assert work.seen == ["started", "cancelled"]
    assert await kinds(manager, task_id) == ["accepted", "started", "cancel_requested", "cancelled"]
    with pytest.raises(TaskFailed, match="cancelled"):
        await manager.result(task_id)


async def test_a_running_thread_is_told_and_ends_cancelled(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, "listening"))
    await eventually(lambda: work.seen)
    await manager.store.cancel(task_id)
    assert await ended(manager, task_id) is TaskStatus.CANCELLED
    assert work.seen == ["started", "told"]
    assert (await manager.store.get(task_id)).result is None


@pytest.mark.parametrize("name", ["deaf", "stubborn"])
async def test_a_task_that_does_not_listen_ends_cancelled_when_it_ends_and_its_result_is_dropped(
    start_manager: StartManager, work: Work, name: str
) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, name))
    await eventually(lambda: work.seen)
    record = await manager.store.cancel(task_id)
    assert (record.status, record.cancel_requested) == (TaskStatus.RUNNING, True)
    assert await manager.result(await manager.enqueue(task(manager, "double"), 1), PATIENCE) == 2
    assert await status(manager, task_id) is TaskStatus.RUNNING
    work.go.set()
    assert await ended(manager, task_id) is TaskStatus.CANCELLED
    assert (await manager.store.get(task_id)).result is None


async def test_a_coroutine_that_breaks_while_it_is_stopped_is_cancelled_and_not_retried(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, "breaking"))
    await eventually(lambda: work.seen)
    await manager.store.cancel(task_id)
    assert await ended(manager, task_id) is TaskStatus.CANCELLED
    assert work.seen == ["started"]


async def asked(manager: TaskManager, times: int) -> None:
    """Returns when the instance has looked so often for tasks that it is to stop."""
    looks: list[object] = []
    cancels = manager.backend.cancels

    async def look(instance_id: str) -> Any:
        found = await cancels(instance_id)
        looks.append(found)
        return found

    manager.backend.cancels = look  # type: ignore[method-assign]
    await eventually(lambda: len(looks) > times)  # one more: the last answer has been acted upon


async def test_the_clean_up_of_a_cancelled_coroutine_is_not_cancelled_again(
    start_manager: StartManager, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.taskflow.housekeeping.CANCEL_INTERVAL", 0.02)
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, "careful"))
    await eventually(lambda: work.seen)
    await manager.store.cancel(task_id)
    await asked(manager, times=5)
    await manager.store.cancel(task_id)
    assert await status(manager, task_id) is TaskStatus.RUNNING
    work.go.set()
    assert await ended(manager, task_id) is TaskStatus.CANCELLED
    assert work.seen == ["started", "cleaned up"]


async def test_a_coroutine_that_goes_on_is_told_once_by_an_operator_and_once_by_the_shutdown(
    start_manager: StartManager, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.taskflow.housekeeping.CANCEL_INTERVAL", 0.02)
    manager = await start_manager(work.define, shutdown_timeout=0.1)
    task_id = await manager.enqueue(task(manager, "stubborn"))
    await eventually(lambda: work.seen)
    await manager.store.cancel(task_id)
    await asked(manager, times=5)
    assert work.seen == ["started", "swallowed"]
    await manager.shutdown()
    assert work.seen == ["started", "swallowed", "swallowed"]


async def test_siblings_and_slots_are_unharmed(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define, max_concurrent_tasks=2, max_sync_threads=2)
    names = ["endless", "endless", "listening", "listening"]
    running = [await manager.enqueue(task(manager, name)) for name in names]
    await eventually(lambda: len(work.seen) == 4)
    waiting = [await manager.enqueue(task(manager, name), 1) for name in ("double", "thread_double") for _ in range(6)]
    for victim in (running[0], running[2]):
        await manager.store.cancel(victim)
    assert await asyncio.gather(*(manager.result(task_id, PATIENCE) for task_id in waiting)) == [2] * 12
    assert [await status(manager, task_id) for task_id in running] == [TaskStatus.CANCELLED, TaskStatus.RUNNING] * 2
    for victim in (running[1], running[3]):
        await manager.store.cancel(victim)
        await ended(manager, victim)
    await eventually(lambda: manager.dispatcher.running == 0)
    both = [await manager.enqueue(task(manager, "endless")) for _ in range(2)]  # both slots are there again
    await eventually(lambda: manager.dispatcher.running == 2)
    for victim in both:
        await manager.store.cancel(victim)
        await ended(manager, victim)
    await assert_counters_match_rows(manager.backend, manager.clock())


@pytest.mark.parametrize("name", ["endless", "listening"])
async def test_a_cancel_from_another_instance_arrives_within_about_a_second(
    start_manager: StartManager, work: Work, name: str
) -> None:
    owner = await start_manager(work.define)
    task_id = await owner.enqueue(task(owner, name))
    await eventually(lambda: work.seen)
    other = await start_manager(work.define)
    with at_most(1.8):
        await other.store.cancel(task_id, "ann")
        assert await ended(other, task_id) is TaskStatus.CANCELLED
    assert len(work.seen) == 2
    assert (await owner.store.get(task_id)).instance == owner.instance_id


async def test_a_cancel_reaches_a_task_in_the_turn_that_starts_it(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define)
    for _ in range(20):
        task_id = await manager.enqueue(task(manager, "endless"))
        await manager.store.cancel(task_id)
        assert await ended(manager, task_id) is TaskStatus.CANCELLED
    await eventually(lambda: manager.dispatcher.running == 0)
    await assert_counters_match_rows(manager.backend, manager.clock())


# -- afterwards


@pytest.mark.parametrize(("name", "arguments", "ends"), [("double", [1], "success"), ("raising", [], "failed")])
async def test_a_task_that_has_ended_cannot_be_cancelled(
    start_manager: StartManager, work: Work, name: str, arguments: list[int], ends: str
) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, name), *arguments)
    assert await ended(manager, task_id) == ends
    before = await kinds(manager, task_id)
    with pytest.raises(TaskStateError, match=f"is {ends}: it cannot be cancelled") as refused:
        await manager.store.cancel(task_id)
    assert (refused.value.status, refused.value.command) == (ends, "cancelled")
    assert await kinds(manager, task_id) == before


async def test_a_task_is_cancelled_once(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, "double"), 1, delay_seconds=3_600)
    answers = await asyncio.gather(*(manager.store.cancel(task_id) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(answer, TaskStateError) for answer in answers) == 4
    assert await kinds(manager, task_id) == ["accepted", "cancelled"]


async def test_an_unknown_id_is_not_found(start_manager: StartManager) -> None:
    manager = await start_manager()
    with pytest.raises(TaskNotFound):
        await manager.store.cancel("nothing")


async def test_a_cancelled_task_runs_again_only_when_an_operator_says_so(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define)
    task_id = await manager.enqueue(task(manager, "double"), 4, delay_seconds=3_600)
    await manager.store.cancel(task_id)
    await manager.shutdown()
    await manager.startup()
    assert await status(manager, task_id) is TaskStatus.CANCELLED
    await manager.store.retry(task_id)
    assert await manager.result(task_id, PATIENCE) == 8
