"""Slots are counted right, what is claimed is started, and a stop reaches what runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from time import monotonic
from typing import cast

import pytest

from app.taskflow import TaskStatus
from app.taskflow.backends.base import Claimed, Finish, TurnResult
from app.taskflow.context import CarriedContexts, get_task_context
from app.taskflow.dispatcher import Dispatcher
from app.taskflow.executors import AsyncExecutor, Executor, ThreadExecutor
from app.taskflow.journal import Journal
from app.taskflow.models import TaskConfig
from app.taskflow.registry import TaskRegistry
from app.taskflow.runner import Runner

from .helpers import PATIENCE, START, Words, eventually, next_id

pytestmark = pytest.mark.anyio


class FakeJournal:
    def __init__(self) -> None:
        self.finishes: list[Finish] = []

    def finish(self, finish: Finish) -> None:
        self.finishes.append(finish)


class Stage:
    """A dispatcher with two async slots and one thread; the test plays the database."""

    def __init__(self) -> None:
        self.registry = TaskRegistry()
        self.executors: dict[str, Executor] = {"async": AsyncExecutor(2), "thread": ThreadExecutor(1)}
        self.journal = FakeJournal()
        runner = Runner(self.registry, self.executors, Words(), lambda: START)
        journal = cast(Journal, self.journal)
        self.dispatcher = Dispatcher(self.registry, self.executors, runner, journal, CarriedContexts())
        self.gate = asyncio.Event()
        self.begun: list[str] = []

        async def wait() -> None:
            context = get_task_context()
            assert context is not None
            self.begun.append(context.task_id)
            await self.gate.wait()

        def obey() -> None:
            context = get_task_context()
            assert context is not None
            self.begun.append(context.task_id)
            while not context.cancelled:
                threading.Event().wait(0.005)

        self.registry.add(wait, TaskConfig())
        self.registry.add(obey, TaskConfig())

    def claim(self, name: str = "wait", *, requeue: bool = False) -> Claimed:
        task = Claimed(
            task_id=next_id(),
            name=name,
            queue="default",
            executor=self.registry.executors[name],
            attempt=1,
            excused=0,
            max_attempts=1,
            started_at=START,
            arguments="[[],{}]",
            tags={},
            requeue=requeue,
            trace=None,
            created_at=START,
        )
        self.dispatcher.turned([], TurnResult(claimed=[task]))
        return task

    async def finished(self, task: Claimed) -> Finish:
        def found() -> list[Finish]:
            return [finish for finish in self.journal.finishes if finish.task is task]

        (finish,) = await eventually(found)
        return cast(Finish, finish)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    stage.dispatcher.start()
    yield stage
    await stage.dispatcher.drain(monotonic())


def free(stage: Stage, *finishes: Finish) -> dict[str, int] | None:
    demand = stage.dispatcher.demand(finishes)
    return None if demand is None else {kind: max(0, slots) for kind, slots in demand.slots.items()}


async def test_nothing_is_wanted_before_the_start_and_after_the_drain() -> None:
    stage = Stage()
    assert stage.dispatcher.demand([]) is None
    stage.dispatcher.start()
    assert free(stage) == {"async": 2, "thread": 1}
    await stage.dispatcher.drain(monotonic() + 1)
    assert stage.dispatcher.demand([]) is None


async def test_a_slot_is_taken_from_the_claim_to_the_commit_of_the_finish(stage: Stage) -> None:
    task = stage.claim()
    assert free(stage) == {"async": 1, "thread": 1}
    stage.gate.set()
    finish = await stage.finished(task)
    assert free(stage) == {"async": 1, "thread": 1}, "not free before the end is on the disk"
    assert free(stage, finish) == {"async": 2, "thread": 1}, "the turn that writes the end may fill the slot"
    stage.dispatcher.turned([finish], TurnResult())
    assert free(stage) == {"async": 2, "thread": 1}
    assert stage.dispatcher.running == 0


async def test_without_a_free_slot_nothing_is_wanted(stage: Stage) -> None:
    for name in ("wait", "wait", "obey"):
        stage.claim(name)
    assert stage.dispatcher.demand([]) is None


async def test_a_refused_finish_frees_its_slot_too(stage: Stage) -> None:
    task = stage.claim()
    stage.gate.set()
    finish = await stage.finished(task)
    stage.dispatcher.turned([finish], TurnResult(refused=frozenset({task.attempt_id})))
    assert free(stage) == {"async": 2, "thread": 1}


async def test_what_runs_here_is_known_until_its_end_is_written(stage: Stage) -> None:
    task = stage.claim()
    stage.gate.set()
    finish = await stage.finished(task)
    assert stage.dispatcher.held() == {task.attempt_id}
    stage.dispatcher.turned([finish], TurnResult())
    assert stage.dispatcher.held() == frozenset()


@pytest.mark.parametrize("name", ["wait", "obey"])
async def test_a_cancelled_attempt_ends_as_cancelled(stage: Stage, name: str) -> None:
    task = stage.claim(name)
    await eventually(lambda: stage.begun)
    assert stage.dispatcher.cancel(task.attempt_id)
    assert (await stage.finished(task)).status is TaskStatus.CANCELLED


async def test_a_task_that_is_cancelled_before_its_first_step_still_says_how_it_ended(stage: Stage) -> None:
    task = stage.claim()
    assert stage.dispatcher.cancel(task.attempt_id)
    assert (await stage.finished(task)).status is TaskStatus.CANCELLED


async def test_a_task_of_the_same_turn_that_was_asked_to_stop_is_stopped(stage: Stage) -> None:
    task = stage.claim()
    await eventually(lambda: stage.begun)
    stage.dispatcher.turned([], TurnResult(stopping=[task.attempt_id]))
    assert (await stage.finished(task)).status is TaskStatus.CANCELLED


async def test_what_is_not_here_or_has_ended_cannot_be_cancelled(stage: Stage) -> None:
    assert not stage.dispatcher.cancel(("nobody", 1))
    task = stage.claim()
    stage.gate.set()
    await stage.finished(task)
    assert not stage.dispatcher.cancel(task.attempt_id)


async def test_a_drain_waits_for_the_commit_of_what_ended(stage: Stage) -> None:
    task = stage.claim()
    await eventually(lambda: stage.begun)
    draining = asyncio.create_task(stage.dispatcher.drain(monotonic() + PATIENCE))
    stage.gate.set()
    finish = await stage.finished(task)
    assert finish.status is TaskStatus.SUCCESS
    await asyncio.sleep(0.05)
    assert not draining.done()
    stage.dispatcher.turned([finish], TurnResult())
    await draining


@pytest.mark.parametrize(("requeue", "status"), [(False, TaskStatus.INTERRUPTED), (True, TaskStatus.PENDING)])
@pytest.mark.parametrize("name", ["wait", "obey"])
async def test_at_the_deadline_a_drain_interrupts_what_still_runs(
    stage: Stage, name: str, requeue: bool, status: TaskStatus
) -> None:
    task = stage.claim(name, requeue=requeue)
    await eventually(lambda: stage.begun)
    began = monotonic()
    await stage.dispatcher.drain(began + 0.1)
    assert 0.1 <= monotonic() - began < 1.5
    assert (await stage.finished(task)).status is status


async def test_a_coroutine_that_will_not_stop_does_not_hold_up_a_drain(stage: Stage) -> None:
    async def stubborn() -> None:
        while not stage.gate.is_set():
            try:
                await asyncio.sleep(PATIENCE)
            except asyncio.CancelledError:
                stage.begun.append("still here")

    stage.registry.add(stubborn, TaskConfig())
    stage.claim("stubborn")
    await asyncio.sleep(0)
    began = monotonic()
    await stage.dispatcher.drain(began + 0.05)
    assert monotonic() - began < 2
    assert stage.begun == ["still here"]
    stage.gate.set()
