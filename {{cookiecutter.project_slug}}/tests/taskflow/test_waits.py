"""Why a task waits: each fact that holds it back is said, with its number, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from app.taskflow import TaskManager, TaskStatus
from app.taskflow.models import QueueState
from app.taskflow.waits import Facts, reasons

from .conftest import StartManager
from .helpers import eventually
from .test_views import NOW, TASK

FREE = QueueState("mail", None, None, False, None)
IDLE = Facts(NOW, True, FREE, instances=2, busy=3, slots=10)
WAITING = replace(TASK, status=TaskStatus.PENDING, run_at=NOW, attempt=0, excused=0)


@pytest.mark.parametrize(
    ("task", "facts", "said"),
    [
        (WAITING, IDLE, []),
        (replace(WAITING, status=TaskStatus.RUNNING), replace(IDLE, instances=0), []),
        (replace(WAITING, run_at=NOW + timedelta(hours=1)), IDLE, ["added for later: 2026-03-01 13:00:00 UTC"]),
        (replace(WAITING, run_at=NOW + timedelta(hours=1), run_key="k"), IDLE, ["one-off, for"]),
        (replace(WAITING, run_at=NOW + timedelta(5), attempt=2, max_attempts=4), IDLE, ["retry 2 of 3"]),
        (
            WAITING,
            replace(IDLE, queue=replace(FREE, paused=True, reason="provider is down")),
            ["paused: provider is down"],
        ),
        (WAITING, replace(IDLE, queue=replace(FREE, paused=True)), ["'mail' is paused."]),
        (WAITING, replace(IDLE, queue=replace(FREE, concurrency=5, running=5)), ["runs 5 of at most 5"]),
        (WAITING, replace(IDLE, queue=replace(FREE, concurrency=5, running=4)), []),
        (WAITING, replace(IDLE, busy=10), ["All 10 slots of the 2 processes are busy"]),
        (WAITING, replace(IDLE, instances=0, slots=0), ["No process that could run it is alive"]),
        (WAITING, replace(IDLE, slots=0), ["they only accept"]),
        (WAITING, replace(IDLE, known=False), ["has no function"]),
        (
            replace(WAITING, run_at=NOW + timedelta(1)),
            replace(IDLE, known=False, queue=replace(FREE, paused=True), busy=10),
            ["for later", "paused", "All 10 slots", "has no function"],
        ),
    ],
)
def test_each_reason_is_said_and_no_other(task: object, facts: Facts, said: list[str]) -> None:
    found = reasons(task, facts)  # type: ignore[arg-type]
    assert len(found) == len(said)
    assert all(words in reason for words, reason in zip(said, found, strict=True)), found


@pytest.mark.anyio
async def test_a_store_gathers_the_facts(start_manager: StartManager) -> None:
    def define(manager: TaskManager) -> None:
        @manager.task
        def job() -> None: ...

    manager = await start_manager(define)
    await manager.store.pause_queue("default", "ada", "provider is down")
    task_id = await manager.enqueue(manager.registry.named("job").function)
    task = await manager.store.get(task_id)
    await eventually(lambda: manager.store.instances())
    assert await manager.store.why(task) == ["Its queue 'default' is paused: provider is down."]
    await manager.store.resume_queue("default")
    assert await manager.store.why(await manager.store.get(task_id)) == []
