"""Where user code runs: an executor hands back what the function returned or raised, and loses no slot on the way."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from app.taskflow.executors import AsyncExecutor, Executor, ThreadExecutor

from .helpers import PATIENCE, eventually, make_call

pytestmark = pytest.mark.anyio

place: contextvars.ContextVar[str] = contextvars.ContextVar("place", default="nowhere")


def add(one: int, two: int = 1) -> int:
    return one + two


async def add_async(one: int, two: int = 1) -> int:
    await asyncio.sleep(0)
    return one + two


def fail(text: str) -> None:
    raise LookupError(text)


async def fail_async(text: str) -> None:
    raise LookupError(text)


class Large:
    """A result worth freeing."""


def live_threads() -> int:
    return sum(thread.name.startswith("taskflow-thread") for thread in threading.enumerate())


async def threads_before() -> int:
    """How many there are once those of earlier tests have ended."""
    while True:
        found = live_threads()
        await asyncio.sleep(0.05)
        if live_threads() == found:
            return found


@pytest.mark.parametrize(("executor", "function"), [(AsyncExecutor(), add_async), (ThreadExecutor(), add)])
async def test_a_function_gets_its_arguments_and_its_result_comes_back(executor: Executor, function: Any) -> None:
    assert await executor.run(make_call(function, 2, two=40)) == 42
    executor.close()


@pytest.mark.parametrize(("executor", "function"), [(AsyncExecutor(), fail_async), (ThreadExecutor(), fail)])
async def test_what_a_function_raises_comes_back_as_it_is(executor: Executor, function: Any) -> None:
    with pytest.raises(LookupError, match="gone") as raised:
        await executor.run(make_call(function, "gone"))
    assert [frame.name for frame in raised.traceback][-1] == function.__name__
    executor.close()


@pytest.mark.parametrize("slots", [None, 3])
def test_an_executor_has_the_slots_it_was_given_or_a_default(slots: int | None) -> None:
    for kind in (AsyncExecutor, ThreadExecutor):
        assert kind(slots).slots == slots or slots is None
        assert kind(slots).slots >= 1


async def test_a_thread_runs_beside_the_event_loop_with_the_context_of_its_caller() -> None:
    executor = ThreadExecutor()
    place.set("here")

    def where() -> list[object]:
        return [place.get(), threading.current_thread().name.startswith("taskflow-thread")]

    assert await executor.run(make_call(where)) == ["here", True]
    executor.close()


@pytest.mark.parametrize("error", [StopIteration, GeneratorExit])
async def test_what_a_future_cannot_carry_is_that_task_s_failure_all_the_same(error: type[BaseException]) -> None:
    executor = ThreadExecutor()

    def stop() -> None:
        raise error("enough")

    with pytest.raises(RuntimeError, match=error.__name__) as raised:
        await executor.run(make_call(stop))
    assert isinstance(raised.value.__cause__, error)
    executor.close()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
async def test_an_exit_from_a_thread_ends_neither_the_thread_nor_the_process(error: type[BaseException]) -> None:
    executor = ThreadExecutor(1)

    def leave() -> None:
        raise error("bye")

    with pytest.raises(error):
        await executor.run(make_call(leave))
    assert await executor.run(make_call(add, 1)) == 2
    executor.close()


async def test_threads_are_reused_and_never_more_than_the_slots() -> None:
    executor = ThreadExecutor(3)
    before = await threads_before()
    for _ in range(20):
        await executor.run(make_call(add, 1))
    assert live_threads() == before + 1
    results = await asyncio.gather(*[executor.run(make_call(add, number)) for number in range(50)])
    assert results == list(range(1, 51))
    assert before + 1 <= live_threads() <= before + 3
    executor.close()
    await eventually(lambda: live_threads() == before)


async def test_jobs_that_wait_have_a_thread_each_up_to_the_slots() -> None:
    executor = ThreadExecutor(8)
    before = await threads_before()
    together, gate = threading.Barrier(9), threading.Event()

    def meet() -> None:
        together.wait(PATIENCE)
        gate.wait(PATIENCE)

    jobs = [asyncio.create_task(executor.run(make_call(meet))) for _ in range(8)]
    late = asyncio.create_task(executor.run(make_call(add, 1)))
    await asyncio.to_thread(together.wait, PATIENCE)  # only eight that run at once get past it
    assert live_threads() == before + 8
    assert not late.done()
    gate.set()
    await asyncio.gather(*jobs)
    assert await late == 2
    assert live_threads() == before + 8
    executor.close()
    await eventually(lambda: live_threads() == before)


async def test_short_jobs_are_done_by_a_few_threads() -> None:
    executor = ThreadExecutor(200)
    before = await threads_before()
    for _ in range(5):
        await asyncio.gather(*[executor.run(make_call(add, number)) for number in range(200)])
    assert live_threads() - before < 100
    executor.close()


async def test_a_job_that_is_abandoned_before_it_began_never_runs_and_costs_no_thread() -> None:
    executor = ThreadExecutor(1)
    before = await threads_before()
    hang, begun = threading.Event(), threading.Event()
    ran: list[int] = []

    def stuck() -> None:
        begun.set()
        hang.wait(PATIENCE)

    first = asyncio.create_task(executor.run(make_call(stuck)))
    await eventually(begun.is_set)
    waiting = asyncio.create_task(executor.run(make_call(ran.append, 1)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    hang.set()
    await first
    assert await executor.run(make_call(add, 1)) == 2
    assert ran == []
    assert live_threads() == before + 1
    executor.close()


async def test_a_system_without_a_thread_to_give_does_the_work_with_those_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = ThreadExecutor(4)
    assert await executor.run(make_call(add, 1)) == 2
    hang = threading.Event()

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    jobs = [asyncio.create_task(executor.run(make_call(hang.wait, PATIENCE))) for _ in range(3)]
    await asyncio.sleep(0.01)
    hang.set()
    assert await asyncio.gather(*jobs) == [True] * 3
    executor.close()


async def test_an_abandoned_thread_frees_its_slot_at_once_and_ends_after_its_call() -> None:
    executor = ThreadExecutor(1)
    before = await threads_before()
    hang, begun = threading.Event(), threading.Event()

    def stuck() -> str:
        begun.set()
        hang.wait(PATIENCE)
        return "too late"

    for _ in range(3):
        begun.clear()
        job = asyncio.create_task(executor.run(make_call(stuck)))
        await eventually(begun.is_set)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
    assert await executor.run(make_call(add, 1)) == 2
    hang.set()
    await eventually(lambda: live_threads() == before + 1)
    assert await executor.run(make_call(add, 2)) == 3
    executor.close()
    await eventually(lambda: live_threads() == before)


async def test_a_result_that_comes_as_its_task_is_cancelled_leaves_the_threads_counted_right() -> None:
    executor = ThreadExecutor(2)
    before = await threads_before()
    for _ in range(30):
        ended = threading.Event()
        job = asyncio.create_task(executor.run(make_call(ended.set)))
        await asyncio.sleep(0)
        ended.wait(PATIENCE)  # on purpose in the loop's way: the result waits while the task is cancelled
        job.cancel()
        await asyncio.wait([job])
    assert await executor.run(make_call(add, 1)) == 2
    await eventually(lambda: live_threads() <= before + 2)
    executor.close()
    await eventually(lambda: live_threads() == before)


def test_an_executor_works_in_the_next_event_loop_although_a_thread_outlived_the_last_one() -> None:
    executor = ThreadExecutor(2)
    hang, begun = threading.Event(), threading.Event()

    def stuck() -> None:
        begun.set()
        hang.wait(PATIENCE)

    async def abandon() -> None:
        job = asyncio.create_task(executor.run(make_call(stuck)))
        await eventually(begun.is_set)
        job.cancel()
        await asyncio.wait([job])

    asyncio.run(abandon())
    before = live_threads()
    hang.set()
    deadline = monotonic() + PATIENCE
    while live_threads() == before:
        assert monotonic() < deadline

    async def use_again() -> None:
        async with asyncio.timeout(PATIENCE):
            assert await executor.run(make_call(add, 1)) == 2

    asyncio.run(use_again())
    executor.close()


async def test_an_idle_thread_does_not_keep_the_last_result_alive() -> None:
    executor = ThreadExecutor(1)
    kept: list[weakref.ref[Large]] = []

    def make() -> Large:
        large = Large()
        kept.append(weakref.ref(large))
        return large

    await executor.run(make_call(make))

    def freed() -> bool:
        gc.collect()
        return kept[0]() is None

    await eventually(freed)
    executor.close()


def test_a_thread_that_hangs_does_not_keep_the_interpreter_from_ending() -> None:
    program = """
import asyncio, time
from tests.taskflow.helpers import make_call
from app.taskflow.executors import ThreadExecutor

def hang() -> None:
    time.sleep(3600)

async def main() -> None:
    job = asyncio.create_task(ThreadExecutor().run(make_call(hang)))
    await asyncio.sleep(0.1)
    print("running" if not job.done() else "done")

asyncio.run(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=30
    )
    assert (ended.returncode, ended.stdout) == (0, "running\n"), ended.stderr
