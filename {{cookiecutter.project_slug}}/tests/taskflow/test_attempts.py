"""An attempt always ends and gives its slot back, whatever its function returns, raises or does to itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest

from app.taskflow import TaskManager, TaskStatus

from . import strange_tasks as strange
from .conftest import StartManager
from .helpers import PATIENCE

pytestmark = pytest.mark.anyio

START = 60.0
"""Seconds that a worker process may take to start on a busy machine."""
WAYS: Mapping[Callable[..., Any], Mapping[str, Any]] = {
    strange.on_the_loop: {},
    strange.on_the_loop_with_dependencies: {"timeout": START},
    strange.in_a_thread: {},
    strange.in_a_thread_with_a_timeout: {"timeout": START},
    strange.in_a_process: {"executor": "process"},
}
"""Every way to run a function, with the options that lead there."""


async def start(start_manager: StartManager, function: Callable[..., Any], **options: Any) -> TaskManager:
    """One slot of each kind: what keeps its slot keeps all that come after it from running."""
    one_of_each = {"max_concurrent_tasks": 1, "max_sync_threads": 1, "max_process_workers": 1}

    def define(manager: TaskManager) -> None:
        manager.task(**WAYS[function], **options)(function)

    return await start_manager(define, **one_of_each)


async def ends(manager: TaskManager, function: Callable[..., Any], names: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name -> the record of the task that was given it, once an ordinary task behind them all has run."""
    patience = START if function is strange.in_a_process else PATIENCE
    ids = {name: await manager.enqueue(function, name) for name in names}
    with suppress(TimeoutError):  # the records say which one it was
        assert await manager.result(await manager.enqueue(function, "ordinary"), patience) == "ordinary"
    return {name: await manager.store.get(task_id) for name, task_id in ids.items()}


@pytest.mark.parametrize("function", WAYS, ids=lambda function: function.__name__)
async def test_what_cannot_be_stored_leaves_a_success_without_result_and_a_warning(
    start_manager: StartManager, function: Callable[..., Any]
) -> None:
    manager = await start(start_manager, function)
    records = await ends(manager, function, strange.RETURNED)
    assert {name: record.status for name, record in records.items()} == dict.fromkeys(records, TaskStatus.SUCCESS)
    for name, record in records.items():
        lines = await manager.store.logs(record.task_id)
        if record.result is None:
            assert [(line.level, line.message[:26]) for line in lines] == [("warning", "the result was not stored:")], (
                name
            )


@pytest.mark.parametrize("function", WAYS, ids=lambda function: function.__name__)
async def test_what_it_raises_fails_its_attempt_and_nothing_else(
    start_manager: StartManager, function: Callable[..., Any]
) -> None:
    manager = await start(start_manager, function)
    records = await ends(manager, function, strange.RAISED)
    assert {name: record.status for name, record in records.items()} == dict.fromkeys(records, TaskStatus.FAILED)
    assert [name for name, record in records.items() if not record.error or not record.stacktrace] == []


@pytest.mark.parametrize("function", WAYS, ids=lambda function: function.__name__)
async def test_a_task_may_cancel_itself_for_any_reason(
    start_manager: StartManager, function: Callable[..., Any]
) -> None:
    manager = await start(start_manager, function)
    records = await ends(manager, function, strange.CANCELS)
    assert {name: record.status for name, record in records.items()} == dict.fromkeys(records, TaskStatus.CANCELLED)
    assert [name for name, record in records.items() if not record.error or len(record.error) > 5_000] == []
    assert records["cancel for a number"].error == "5"
    assert records["cancel with a reason of its own"].error == "cut"


def exits(_error: BaseException) -> bool:
    raise SystemExit


@pytest.mark.parametrize("function", [strange.on_the_loop, strange.in_a_thread], ids=lambda function: function.__name__)
async def test_a_retry_predicate_that_exits_ends_the_retries(
    start_manager: StartManager, function: Callable[..., Any]
) -> None:
    manager = await start(start_manager, function, retries=3, retry_on=exits)
    records = await ends(manager, function, strange.RAISED)
    assert {name: record.status for name, record in records.items()} == dict.fromkeys(records, TaskStatus.FAILED)


async def test_an_attempt_that_cannot_be_started_fails_and_its_neighbours_run(start_manager: StartManager) -> None:
    manager = await start(start_manager, strange.on_the_loop)
    loop = asyncio.get_running_loop()
    refused: list[str] = []

    def factory(_loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        if coroutine.__name__ == "_work" and not refused:
            coroutine.close()
            refused.append(coroutine.__name__)
            raise RuntimeError("no task for you")
        return asyncio.Task(coroutine, loop=loop, **options)

    loop.set_task_factory(factory)
    try:
        first = await manager.enqueue(strange.on_the_loop, "first")
        assert await manager.result(await manager.enqueue(strange.on_the_loop, "ordinary"), PATIENCE) == "ordinary"
    finally:
        loop.set_task_factory(None)
    record = await manager.store.get(first)
    assert (record.status, record.error) == (TaskStatus.FAILED, "no task for you")
