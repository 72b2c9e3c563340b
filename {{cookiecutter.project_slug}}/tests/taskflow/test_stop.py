"""A clean stop: what was claimed too late is given back, and user code does not keep the process."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import pytest

from app.taskflow import LifecycleEvent, TaskManager, TaskStatus

from .conftest import StartManager
from .helpers import PATIENCE, eventually
from .process_tasks import wait_for

pytestmark = pytest.mark.anyio


async def test_what_was_claimed_while_the_service_stopped_is_given_back_unspent(start_manager: StartManager) -> None:
    begun: list[int] = []

    def define(manager: TaskManager) -> None:
        @manager.task
        async def job(number: int) -> None:
            begun.append(number)

    manager = await start_manager(define)
    turn, claimed, gate = manager.backend.turn, asyncio.Event(), asyncio.Event()

    async def slow(wanted: Any) -> Any:
        result = await turn(wanted)
        if result.claimed:
            claimed.set()
            await gate.wait()
        return result

    manager.backend.turn = slow  # type: ignore[assignment, method-assign]
    enqueued = asyncio.create_task(manager.enqueue(manager.registry.named("job").function, 1))
    await claimed.wait()
    stopping = asyncio.create_task(manager.shutdown())
    await eventually(lambda: not manager.dispatcher.claiming)
    gate.set()
    await stopping
    task_id = await enqueued
    assert begun == []

    manager.backend.turn = turn  # type: ignore[method-assign]
    await manager.startup()
    assert await manager.result(task_id, PATIENCE) is None
    assert begun == [1]
    kinds = [event.kind for event in await manager.store.events(task_id)]
    assert kinds == ["accepted", "started", "returned", "started", "succeeded"]
    assert (await manager.store.get(task_id)).retries_used == 0


class SlowObserver:
    async def on_lifecycle(self, event: LifecycleEvent) -> None:
        await asyncio.sleep(3600)

    async def close(self) -> None:
        await asyncio.sleep(3600)


@pytest.mark.parametrize("name", ["in_a_thread", "stubborn", "in_a_process"])
async def test_a_stop_takes_no_longer_than_it_may_whatever_user_code_does(
    start_manager: StartManager, tmp_path: Path, name: str
) -> None:
    begun, released = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def define(manager: TaskManager) -> None:
        @manager.task
        def in_a_thread() -> None:
            loop.call_soon_threadsafe(begun.set)
            time.sleep(20)

        @manager.task
        async def stubborn() -> None:
            begun.set()
            while not released.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await released.wait()

        manager.task(executor="process", name="in_a_process")(wait_for)

    manager = await start_manager(define, shutdown_timeout=1.0, loggers=[SlowObserver()])
    arguments = [str(tmp_path / "never")] if name == "in_a_process" else []
    task_id = await manager.enqueue(manager.registry.named(name).function, *arguments)
    if name == "in_a_process":
        await eventually(lambda: manager.dispatcher.running)
    else:
        await begun.wait()
    began = time.monotonic()
    await manager.shutdown()
    assert time.monotonic() - began < 4.5, "1 s to drain and 2 to let go, on a machine that may be busy"
    assert (await manager.store.get(task_id)).status is TaskStatus.INTERRUPTED
    released.set()
    await manager.startup()
    assert (await manager.store.get(task_id)).status is TaskStatus.INTERRUPTED
