"""Tasks from plain code: a plain task, a thread, a script; and what another event loop is told."""

import asyncio
from pathlib import Path
from threading import Thread

import pytest

from app.taskflow import QueueConfig, QueueFullError, TaskFailed, TaskflowError, TaskManager, TaskStatus

from .conftest import StartManager

pytestmark = pytest.mark.anyio


def define(manager: TaskManager) -> None:
    @manager.task
    def child(number: int) -> int:
        return number + 1

    @manager.task
    def parent(number: int) -> str:
        return manager.enqueue_sync(child, number, tags={"from": "parent"})

    @manager.task
    def stray(number: int) -> str:
        return asyncio.run(manager.enqueue(child, number))


async def test_a_plain_task_adds_a_task(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    parent = manager.registry.named("parent").function
    child_id = await manager.result(await manager.enqueue(parent, 1), timeout=30)
    assert await manager.result(child_id, timeout=30) == 2
    assert (await manager.store.get(child_id)).tags == {"from": "parent"}


async def test_another_event_loop_is_told_at_once_what_to_use(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    task_id = await manager.enqueue(manager.registry.named("stray").function, 1)
    with pytest.raises(TaskFailed, match="enqueue_sync"):
        await manager.result(task_id, timeout=30)


async def test_the_managers_own_event_loop_is_not_blocked(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    with pytest.raises(TaskflowError, match="await"):
        manager.enqueue_sync(manager.registry.named("child").function, 1)


async def test_a_full_queue_is_told_to_the_thread(start_manager: StartManager) -> None:
    manager = await start_manager(define, queues={"small": QueueConfig(concurrency=1, max_size=1)})
    await manager.store.pause_queue("small")
    child = manager.registry.named("child").function
    await asyncio.to_thread(manager.enqueue_sync, child, 1, queue="small")
    with pytest.raises(QueueFullError):
        await asyncio.to_thread(manager.enqueue_sync, child, 2, queue="small")


def test_threads_of_a_script_that_started_nothing_add_tasks(tmp_path: Path) -> None:
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    define(manager)
    child = manager.registry.named("child").function
    found: list[str] = []
    threads = [Thread(target=lambda: found.append(manager.enqueue_sync(child, 1))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def statuses() -> list[TaskStatus]:
        async with manager.lifespan():
            for task_id in found:
                await manager.result(task_id, timeout=30)
            return [(await manager.store.get(task_id)).status for task_id in found]

    assert asyncio.run(statuses()) == [TaskStatus.SUCCESS] * 3


def test_a_script_is_told_that_memory_does_not_last() -> None:
    manager = TaskManager()
    define(manager)
    with pytest.raises(TaskflowError, match="memory"):
        manager.enqueue_sync(manager.registry.named("child").function, 1)
