"""An attempt always ends and gives its slot back, whatever its function returns, raises or does to itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest

from app.taskflow import TaskManager, TaskStatus, get_task_context
from app.taskflow.backends import open_backend
from app.taskflow.errors import BackendUnavailable

from . import strange_tasks as strange
from .conftest import StartManager
from .helpers import PATIENCE, Bench, assert_counters_match_rows, eventually

pytestmark = pytest.mark.anyio

START = 60.0
"""Seconds that a worker process may take to start on a busy machine."""
WAYS: Mapping[Callable[..., Any], Mapping[str, Any]] = {
    strange.on_the_loop: {},
    strange.on_the_loop_with_dependencies: {"timeout": START},
    strange.out_of_a_future: {},
    strange.in_a_thread: {},
    strange.by_a_coroutine_of_a_thread: {},
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


# -- two attempts of one task in one process


class Twice:
    """A task that this instance runs again although its first attempt still goes on: its lease was lost meanwhile.

    Attempt n (from 0) ends when `gates[n]` is set, and returns n.
    """

    def __init__(self) -> None:
        self.gates = [threading.Event() for _ in range(3)]
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self.manager: TaskManager
        self.function: Callable[..., Any]
        self.task_id = ""

    async def on_the_loop(self) -> int:
        attempt = self._begin()
        try:
            while not self.gates[attempt].is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled.append(attempt)
            raise
        return attempt

    def in_a_thread(self) -> int:
        attempt = self._begin()
        context = get_task_context()
        assert context is not None
        while not self.gates[attempt].wait(0.005):
            if context.cancelled:
                self.cancelled.append(attempt)
                break
        return attempt

    def _begin(self) -> int:
        context = get_task_context()
        assert context is not None
        self.begun.append(context.attempt)
        context.progress(context.attempt)
        return context.attempt

    async def begin(self) -> None:
        """Returns when both attempts run."""
        self.task_id = await self.manager.enqueue(self.function)
        await eventually(lambda: self.begun == [0])
        await self.lose_the_lease()
        await eventually(lambda: self.begun == [0, 1])

    async def lose_the_lease(self) -> None:
        """Another instance takes this one for dead."""
        neighbour = open_backend(str(self.manager.backend.url.database))  # type: ignore[attr-defined]
        await neighbour.open()
        try:
            await Bench(neighbour, "neighbour", now=self.manager.clock()).rescue(self.manager.instance_id)
        finally:
            await neighbour.close()

    async def kinds(self) -> list[str]:
        return [event.kind for event in await self.manager.store.events(self.task_id)]


@pytest.fixture(params=["on_the_loop", "in_a_thread"])
async def twice(request: pytest.FixtureRequest, start_manager: StartManager) -> AsyncIterator[Twice]:
    twice = Twice()

    def define(manager: TaskManager) -> None:
        twice.function = getattr(twice, request.param)
        manager.task(requeue_on_interrupt=True, name="twice")(twice.function)

    twice.manager = await start_manager(define, max_concurrent_tasks=3, max_sync_threads=3)
    yield twice
    for gate in twice.gates:
        gate.set()


async def all_slots_are_free(twice: Twice) -> None:
    """As many run at once as before anything went wrong."""
    await eventually(lambda: twice.manager.dispatcher.running == 0)
    twice.gates[0].clear()
    twice.begun.clear()
    ids = [await twice.manager.enqueue(twice.function) for _ in range(4)]
    await eventually(lambda: len(twice.begun) == 3)
    assert twice.manager.dispatcher.running == 3
    twice.gates[0].set()
    for task_id in ids:
        assert await twice.manager.result(task_id, PATIENCE) == 0
    await assert_counters_match_rows(twice.manager.backend, twice.manager.clock())


async def test_an_old_attempt_that_ends_first_is_refused_and_the_new_one_unharmed(twice: Twice) -> None:
    await twice.begin()
    twice.gates[0].set()
    await eventually(lambda: twice.manager.dispatcher.running == 1)
    assert (await twice.manager.store.get(twice.task_id)).status is TaskStatus.RUNNING
    assert await twice.kinds() == ["accepted", "started", "rescued", "started", "lease_lost"]
    twice.gates[1].set()
    assert await twice.manager.result(twice.task_id, PATIENCE) == 1
    await all_slots_are_free(twice)


async def test_an_old_attempt_that_ends_last_is_refused_and_the_result_stays(twice: Twice) -> None:
    await twice.begin()
    twice.gates[1].set()
    assert await twice.manager.result(twice.task_id, PATIENCE) == 1
    await eventually(lambda: twice.manager.dispatcher.running == 1)
    twice.gates[0].set()
    await eventually(lambda: twice.manager.dispatcher.running == 0)
    assert await twice.kinds() == ["accepted", "started", "rescued", "started", "succeeded", "lease_lost"]
    assert await twice.manager.result(twice.task_id) == 1
    await all_slots_are_free(twice)


async def test_two_attempts_that_end_in_one_turn_are_told_apart(twice: Twice) -> None:
    await twice.begin()
    turn = twice.manager.backend.turn
    held_up, gate = asyncio.Event(), asyncio.Event()

    async def slow(wanted: Any) -> Any:
        held_up.set()
        await gate.wait()
        return await turn(wanted)

    twice.manager.backend.turn = slow  # type: ignore[assignment, method-assign]
    await held_up.wait()
    for place in (1, 0):
        twice.gates[place].set()
    await eventually(lambda: len(twice.manager.journal._finishes) == 2)  # both wait for the same turn
    twice.manager.backend.turn = turn  # type: ignore[method-assign]
    gate.set()
    assert await twice.manager.result(twice.task_id, PATIENCE) == 1
    await eventually(lambda: twice.manager.dispatcher.running == 0)
    assert sorted(await twice.kinds()) == ["accepted", "lease_lost", "rescued", "started", "started", "succeeded"]
    await all_slots_are_free(twice)


async def test_an_operator_stops_the_attempt_that_has_the_lease_and_the_old_one_goes_on(twice: Twice) -> None:
    await twice.begin()
    await twice.manager.store.cancel(twice.task_id)
    await eventually(lambda: twice.manager.dispatcher.running == 1)
    assert twice.cancelled == [1]
    assert (await twice.manager.store.get(twice.task_id)).status is TaskStatus.CANCELLED
    twice.gates[0].set()
    await eventually(lambda: twice.manager.dispatcher.running == 0)
    assert (await twice.kinds())[-2:] == ["cancelled", "lease_lost"]
    await all_slots_are_free(twice)


async def test_a_new_attempt_whose_claim_was_answered_by_nobody_is_started_beside_the_old_one(twice: Twice) -> None:
    """The commit came through and its answer did not: what this instance holds is told by attempts, not by ids."""
    manager = twice.manager
    turn = manager.backend.turn
    lost: list[Any] = []

    async def forgetful(wanted: Any) -> Any:
        result = await turn(wanted)
        if result.claimed and not lost:
            lost.append(result)
            raise BackendUnavailable("no answer")
        return result

    twice.task_id = await manager.enqueue(twice.function)
    await eventually(lambda: twice.begun == [0])
    manager.backend.turn = forgetful  # type: ignore[assignment, method-assign]
    await twice.lose_the_lease()
    await eventually(lambda: twice.begun == [0, 1])
    assert lost
    for gate in twice.gates[:2]:
        gate.set()
    assert await manager.result(twice.task_id, PATIENCE) == 1
    await all_slots_are_free(twice)
    assert twice.begun == [0] * 4


async def test_each_attempt_s_progress_is_its_own(twice: Twice) -> None:
    await twice.begin()
    record = await eventually(lambda: shown(twice))
    assert record.progress == {"done": 1}


async def shown(twice: Twice) -> Any:
    record = await twice.manager.store.get(twice.task_id)
    return record if record.progress else None
