"""Who is told what tasks did: committed events, in order, each observer for itself, and no task ever waits for one."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from time import monotonic
from typing import Any

import pytest

from app.taskflow import (
    BackendUnavailable,
    InMemoryLogger,
    LifecycleEvent,
    LogEvent,
    RetryLater,
    TaskflowError,
    TaskManager,
    TaskObserver,
    TaskStatus,
    get_task_context,
    task_log,
)
from app.taskflow import observers as observers_module
from app.taskflow.backends.base import Backend, Cancel, LogLine, Rescue, Turn, TurnResult
from app.taskflow.observers import BATCH, ObserverChain, lifecycle_events

from .conftest import StartManager
from .helpers import PATIENCE, START, Bench, eventually, make_finish

pytestmark = pytest.mark.anyio


def make_line(n: int = 0, *, level: str = "info") -> LogLine:
    return LogLine("the id", START, level, 0, f"line {n}", json.dumps({"n": n}), "job", {"colour": "red"})


def statuses(memory: InMemoryLogger) -> list[str]:
    return [event.status.value for event in memory.lifecycle_events]


def messages(memory: InMemoryLogger) -> list[str]:
    return [event.message for event in memory.log_events]


@asynccontextmanager
async def running_chain(*observers: object) -> AsyncIterator[ObserverChain]:
    chain = ObserverChain(observers)
    chain.start()
    yield chain
    await chain.stop(monotonic() + PATIENCE)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    began = monotonic()
    yield
    assert monotonic() - began < seconds


class Hanging(TaskObserver):
    """Takes its first event and never comes back."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.closed = False

    async def on_log(self, event: LogEvent) -> None:
        self.seen.append(event.message)
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.closed = True


class Raising(TaskObserver):
    async def on_log(self, event: LogEvent) -> None:
        raise LookupError("no such exporter")

    async def on_lifecycle(self, event: LifecycleEvent) -> None:
        raise LookupError("no such exporter")


# -- what is told


async def test_an_attempt_is_told_as_started_then_its_log_then_how_it_ended(start_manager: StartManager) -> None:
    told: list[LogEvent | LifecycleEvent] = []

    class Everything:
        async def on_log(self, event: LogEvent) -> None:
            told.append(event)

        async def on_lifecycle(self, event: LifecycleEvent) -> None:
            told.append(event)

    manager = await start_manager(loggers=[Everything()])

    @manager.task(tags={"team": "mail"})
    def send(address: str) -> None:
        task_log("connecting", level="warning", host=address)

    task_id = await manager.enqueue(send, "a@b", tags={"order": "7"})
    await eventually(lambda: len(told) == 3)
    tags = {"team": "mail", "order": "7"}
    started, line, ended = told
    assert isinstance(started, LifecycleEvent)
    assert isinstance(line, LogEvent)
    assert isinstance(ended, LifecycleEvent)
    assert (started.status, started.attempt, started.duration) == (TaskStatus.RUNNING, 0, None)
    assert (line.message, line.level, line.attempt, line.extra) == ("connecting", "warning", 0, {"host": "a@b"})
    assert (ended.status, ended.attempt, ended.retries_used, ended.error) == (TaskStatus.SUCCESS, 0, 0, None)
    assert {(event.task_id, event.func_name, tuple(event.tags.items())) for event in told} == {
        (task_id, "send", tuple(tags.items()))
    }
    assert started.timestamp <= line.timestamp <= ended.timestamp
    assert ended.duration == pytest.approx((ended.timestamp - started.timestamp).total_seconds())


async def test_a_retry_is_told_as_pending_with_its_error_and_the_attempts_count_from_0(
    start_manager: StartManager,
) -> None:
    memory = InMemoryLogger()
    manager = await start_manager(loggers=[memory])

    @manager.task(retries=1)
    async def flaky() -> None:
        context = get_task_context()
        assert context is not None
        task_log(f"try {context.attempt}")
        if context.attempt == 0:
            raise LookupError("not yet")

    await manager.enqueue(flaky)
    await eventually(lambda: statuses(memory)[-1:] == ["success"])
    assert statuses(memory) == ["running", "pending", "running", "success"]
    assert [event.attempt for event in memory.lifecycle_events] == [0, 0, 1, 1]
    assert [event.retries_used for event in memory.lifecycle_events] == [0, 0, 1, 1]
    assert [event.attempt for event in memory.log_events] == [0, 1]
    retried = memory.lifecycle_events[1]
    assert retried.error == "not yet"
    assert "LookupError: not yet" in (retried.stacktrace or "")


async def test_an_attempt_that_asked_to_be_run_later_uses_no_retry(start_manager: StartManager) -> None:
    memory = InMemoryLogger()
    manager = await start_manager(loggers=[memory])
    calls: list[int] = []

    @manager.task
    async def patient() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise RetryLater(0)

    await manager.enqueue(patient)
    await eventually(lambda: statuses(memory)[-1:] == ["success"])
    assert statuses(memory) == ["running", "pending"] * 2 + ["running", "success"]
    assert {event.retries_used for event in memory.lifecycle_events} == {0}


async def test_the_retries_that_are_told_are_those_of_the_record(bench: Bench) -> None:
    task_id = await bench.add(max_attempts=5)
    told, stored = [], []
    for excused in (False, True, True, False):
        task = await bench.claim_one()
        finish = make_finish(task, TaskStatus.PENDING, bench.now, run_at=bench.now, excused=excused)
        told += [event.retries_used for event in lifecycle_events([finish], await bench.turn(finishes=[finish]))]
        stored.append((await bench.get(task_id)).retries_used)
    assert told == stored == [0, 0, 0, 1]


async def test_a_failure_is_told_with_its_error_and_stacktrace(start_manager: StartManager) -> None:
    memory = InMemoryLogger()
    manager = await start_manager(loggers=[memory])

    @manager.task
    def break_down() -> None:
        raise LookupError("gone")

    await manager.enqueue(break_down)
    await eventually(lambda: len(memory.lifecycle_events) == 2)
    ended = memory.lifecycle_events[1]
    assert (ended.status, ended.error) == (TaskStatus.FAILED, "gone")
    assert "break_down" in (ended.stacktrace or "")


async def test_cancelling_is_told_for_a_waiting_and_for_a_running_task(start_manager: StartManager) -> None:
    memory = InMemoryLogger()
    manager = await start_manager(loggers=[memory])

    @manager.task
    async def endless() -> None:
        await asyncio.Event().wait()

    waiting = await manager.enqueue(endless, delay_seconds=1_000, tags={"order": "7"})
    await manager.store.cancel(waiting)
    await eventually(lambda: statuses(memory) == ["cancelled"])
    told = memory.lifecycle_events[0]
    assert (told.task_id, told.func_name, told.attempt, told.duration) == (waiting, "endless", 0, None)
    assert told.tags == {"order": "7"}
    running = await manager.enqueue(endless)
    await eventually(lambda: len(memory.lifecycle_events) == 2)
    await manager.store.cancel(running)
    await eventually(lambda: statuses(memory) == ["cancelled", "running", "cancelled"])
    assert memory.lifecycle_events[2].error == "cancelled by an operator"


async def test_what_a_stop_interrupts_is_told_before_the_observers_are_closed(start_manager: StartManager) -> None:
    memory = InMemoryLogger()
    manager = await start_manager(loggers=[memory], shutdown_timeout=0.0)

    @manager.task
    async def endless() -> None:
        task_log("here")
        await asyncio.Event().wait()

    await manager.enqueue(endless)
    await eventually(lambda: messages(memory) == ["here"])
    await manager.shutdown()
    assert statuses(memory) == ["running", "interrupted"]
    assert memory.lifecycle_events[1].error == "the service stopped while it ran"


async def test_a_retry_that_meets_a_cancel_is_told_as_cancelled(bench: Bench) -> None:
    await bench.add(max_attempts=3)
    task = await bench.claim_one()
    await bench.cancel(task.task_id)
    finish = make_finish(task, TaskStatus.PENDING, bench.now, run_at=bench.now + timedelta(hours=1), error="not yet")
    result = await bench.turn(finishes=[finish])
    (told,) = lifecycle_events([finish], result)
    assert (told.status, told.error) == (TaskStatus.CANCELLED, "not yet")
    assert await bench.status(task.task_id) is TaskStatus.CANCELLED


async def test_a_cancelled_task_that_ended_by_itself_is_told_as_it_ended(bench: Bench) -> None:
    await bench.add()
    task = await bench.claim_one()
    await bench.cancel(task.task_id)
    finish = make_finish(task, TaskStatus.SUCCESS, bench.now)
    (told,) = lifecycle_events([finish], await bench.turn(finishes=[finish]))
    assert told.status is await bench.status(task.task_id) is TaskStatus.SUCCESS


async def test_a_result_that_was_refused_is_not_told(bench: Bench) -> None:
    await bench.add()
    task = await bench.claim_one()
    await bench.rescue(bench.instance)
    finish = make_finish(task, TaskStatus.SUCCESS, bench.now)
    result = await bench.turn(finishes=[finish])
    assert result.refused == {task.attempt_id}
    assert not list(lifecycle_events([finish], result))


@pytest.mark.parametrize(
    ("requeue", "cancelled", "status", "error"),
    [
        (False, False, TaskStatus.INTERRUPTED, "its process went away"),
        (True, False, TaskStatus.PENDING, None),
        (True, True, TaskStatus.CANCELLED, "cancelled by an operator"),
    ],
)
async def test_what_a_dead_instance_left_running_is_told_by_the_one_that_rescues_it(
    backend: Backend, requeue: bool, cancelled: bool, status: TaskStatus, error: str | None
) -> None:
    dead, rescuer = Bench(backend, "dead"), Bench(backend, "rescuer")
    task_id = await dead.add(requeue=requeue, tags={"order": "7"})
    await dead.claim()
    if cancelled:
        await rescuer.obey(Cancel(task_id, None))
    rescuer.pass_time(60)
    result = await rescuer.turn(commands=[Rescue({"dead": 0})])
    (told,) = lifecycle_events([], result)
    assert (told.task_id, told.func_name, told.tags) == (task_id, "job", {"order": "7"})
    assert (told.status, told.error, told.attempt, told.retries_used) == (status, error, 0, 0)
    assert (told.timestamp, told.duration) == (rescuer.now, 60)
    assert await rescuer.status(task_id) is status


async def test_nothing_is_told_before_it_is_committed(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = InMemoryLogger()
    manager = await start_manager(loggers=[memory])
    turn, refused = manager.backend.turn, asyncio.Event()
    away = True

    async def without_results(wanted: Turn) -> TurnResult:
        if away and wanted.finishes:
            refused.set()
            raise BackendUnavailable("away")
        return await turn(wanted)

    monkeypatch.setattr(manager.backend, "turn", without_results)

    @manager.task
    async def job() -> None:
        task_log("said")

    await manager.enqueue(job)
    await asyncio.wait_for(refused.wait(), PATIENCE)
    await manager.observers.delivered()
    assert (statuses(memory), messages(memory)) == (["running"], [])
    away = False
    await eventually(lambda: statuses(memory) == ["running", "success"])
    assert messages(memory) == ["said"]


# -- to whom


async def test_any_object_with_one_of_the_methods_is_an_observer(start_manager: StartManager) -> None:
    class Counter:
        def __init__(self) -> None:
            self.seen: list[TaskStatus] = []

        async def on_lifecycle(self, event: LifecycleEvent) -> None:
            self.seen.append(event.status)

    counter = Counter()
    manager = await start_manager(loggers=(observer for observer in [counter]))

    @manager.task
    async def job() -> None:
        task_log("nobody reads this")

    await manager.enqueue(job)
    await eventually(lambda: counter.seen == [TaskStatus.RUNNING, TaskStatus.SUCCESS])


@pytest.mark.parametrize("observer", [object(), TaskObserver(), print])
def test_an_object_that_observes_nothing_is_refused_where_it_is_given(observer: object) -> None:
    with pytest.raises(TaskflowError, match="neither on_log nor on_lifecycle"):
        TaskManager(loggers=[observer])


def test_a_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="min_level='loud': must be one of debug, info"):
        InMemoryLogger(min_level="loud")

    class Loud(Hanging):
        min_level = "loud"

    with pytest.raises(ValueError, match="min_level='loud'"):
        TaskManager(loggers=[Loud()])


@pytest.mark.parametrize(
    ("lowest", "delivered"),
    [
        ("debug", "debug info odd warning error critical"),
        ("warning", "warning error critical"),
        ("critical", "critical"),
    ],
)
async def test_lines_below_the_level_are_not_delivered_and_an_unknown_level_counts_as_info(
    lowest: str, delivered: str
) -> None:
    chosen, everything = InMemoryLogger(min_level=lowest), InMemoryLogger()
    levels = ["debug", "info", "odd", "warning", "error", "critical"]
    async with running_chain(chosen, everything) as chain:
        chain.logged([make_line(level=level) for level in levels])
        await chain.delivered()
    assert [event.level for event in chosen.log_events] == delivered.split()
    assert [event.level for event in everything.log_events] == levels


async def test_changes_of_status_are_delivered_whatever_the_level_unless_they_are_not_wanted(bench: Bench) -> None:
    memory, silent = InMemoryLogger(min_level="critical"), InMemoryLogger()
    silent.log_lifecycle = False
    await bench.add()
    async with running_chain(memory, silent) as chain:
        chain.turned([], TurnResult(claimed=await bench.claim()))
        chain.logged([make_line()])
        await chain.delivered()
    assert (statuses(memory), messages(memory)) == (["running"], [])
    assert (statuses(silent), messages(silent)) == ([], ["line 0"])


def test_without_observers_the_journal_calls_nobody_for_them() -> None:
    manager = TaskManager()
    assert not manager.journal.log_listeners
    assert manager.observers.turned not in manager.journal.listeners
    assert not manager.observers


# -- an observer that is slow, raises or hangs


async def test_tasks_and_other_observers_go_on_while_one_hangs_and_one_raises(start_manager: StartManager) -> None:
    hanging, memory = Hanging(), InMemoryLogger()
    manager = await start_manager(loggers=[hanging, Raising(), memory])

    @manager.task
    async def job(n: int) -> int:
        task_log(f"line {n}")
        return n

    with deadline(PATIENCE):
        ids = [await manager.enqueue(job, n) for n in range(50)]
        assert [await manager.result(task_id) for task_id in ids] == list(range(50))
        await eventually(lambda: len(memory.log_events) == 50 and len(memory.lifecycle_events) == 100)
    assert len(hanging.seen) == 1


async def test_what_an_observer_raises_is_logged_once_with_its_traceback_and_then_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_chain(Raising()) as chain:
        chain.logged([make_line(n) for n in range(5)])
        await chain.delivered()
    first, last = caplog.messages
    assert first == "observer Raising: on_log raised LookupError (1 failures so far); tasks are not affected"
    assert "no such exporter" in caplog.text
    assert last == "observer Raising: 5 failures"


@pytest.mark.parametrize("exit_", [SystemExit, KeyboardInterrupt])
async def test_an_observer_that_exits_ends_neither_itself_nor_the_service(exit_: type[BaseException]) -> None:
    seen: list[str] = []

    class Waiting(TaskObserver):
        async def on_log(self, event: LogEvent) -> None:
            seen.append(event.message)
            raise exit_

    class Plain:
        def on_log(self, event: LogEvent) -> None:
            seen.append(event.message)
            raise exit_

    class Hidden:
        def on_log(self, event: LogEvent) -> Any:
            return Waiting().on_log(event)

    for observer in (Waiting(), Plain(), Hidden()):
        seen.clear()
        with deadline(PATIENCE):
            async with running_chain(observer) as chain:
                chain.logged([make_line(1), make_line(2)])
                await chain.delivered()
        assert len(seen) == 2


async def test_an_observer_that_cancels_itself_is_told_the_next_event() -> None:
    seen: list[str] = []

    class Cancelling:
        async def on_log(self, event: LogEvent) -> None:
            seen.append(event.message)
            raise asyncio.CancelledError

    async with running_chain(Cancelling()) as chain:
        chain.logged([make_line(1), make_line(2)])
        await asyncio.wait_for(chain.delivered(), PATIENCE)
    assert seen == ["line 1", "line 2"]


async def test_a_call_that_hangs_is_cancelled_after_a_while_and_the_next_event_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(observers_module, "PATIENCE", 0.02)
    hanging = Hanging()
    async with running_chain(hanging) as chain:
        chain.logged([make_line(1), make_line(2)])
        await asyncio.wait_for(chain.delivered(), PATIENCE)
    assert hanging.seen == ["line 1", "line 2"]
    assert "on_log raised TimeoutError" in caplog.text
    assert "did not end within 0.02 s" in caplog.text


async def test_an_observer_that_does_not_keep_up_loses_the_oldest_events_and_they_are_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(observers_module, "MOST_WAITING", 3)
    seen: list[str] = []
    gate = asyncio.Event()

    class Slow:
        async def on_log(self, event: LogEvent) -> None:
            seen.append(event.message)
            await gate.wait()

    async with running_chain(Slow()) as chain:
        chain.logged([make_line(0)])
        await eventually(lambda: seen)
        chain.logged([make_line(n) for n in range(1, 10)])
        gate.set()
        await chain.delivered()
    assert seen == ["line 0", "line 7", "line 8", "line 9"]
    assert caplog.messages == [
        "observer Slow does not keep up: 1 events dropped",
        "observer Slow did not keep up: 6 events dropped",
    ]


async def test_an_observer_that_never_waits_leaves_the_event_loop_its_turns() -> None:
    memory = InMemoryLogger()
    async with running_chain(memory) as chain:
        chain.logged([make_line(n) for n in range(10 * BATCH)])
        turns = 0
        while len(memory.log_events) < 10 * BATCH:
            await asyncio.sleep(0)
            turns += 1
    assert turns >= 10


async def test_a_plain_method_runs_in_a_thread_and_may_block() -> None:
    release, seen = threading.Event(), list[tuple[str, str]]()

    class Plain:
        def on_log(self, event: LogEvent) -> None:
            assert release.wait(PATIENCE)
            seen.append((event.message, threading.current_thread().name))

    async with running_chain(Plain()) as chain:
        chain.logged([make_line(1), make_line(2)])
        for _ in range(10):
            await asyncio.sleep(0)  # the loop is free while the method blocks
        assert not seen
        release.set()
        await asyncio.wait_for(chain.delivered(), PATIENCE)
    assert seen == [("line 1", "taskflow-observer"), ("line 2", "taskflow-observer")]


async def test_a_method_that_hides_its_coroutine_is_awaited_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    memory = InMemoryLogger()

    class Wrapped:
        def on_log(self, event: LogEvent) -> Any:
            return memory.on_log(event)

        def flush(self) -> None:
            next(iter(()))  # StopIteration is a failure like any other

    async with running_chain(Wrapped()) as chain:
        chain.logged([make_line(1)])
        await asyncio.wait_for(chain.delivered(), PATIENCE)
    assert messages(memory) == ["line 1"]
    assert "flush raised RuntimeError" in caplog.text


# -- its life


class Lived(TaskObserver):
    def __init__(self) -> None:
        self.calls: list[str] = []

    async def startup(self) -> None:
        self.calls.append("startup")

    async def on_log(self, event: LogEvent) -> None:
        await asyncio.sleep(0.001)
        self.calls.append(event.message)

    async def flush(self) -> None:
        self.calls.append("flush")

    async def close(self) -> None:
        self.calls.append("close")


async def test_an_observer_is_started_told_flushed_and_closed_and_that_again_at_the_next_start() -> None:
    lived = Lived()
    chain = ObserverChain([lived])
    for _ in range(2):
        chain.start()
        chain.logged([make_line(1), make_line(2)])
        await chain.stop(monotonic() + PATIENCE)
    assert lived.calls == ["startup", "line 1", "line 2", "flush", "close"] * 2


async def test_an_observer_is_flushed_at_least_once_for_so_many_events() -> None:
    lived = Lived()
    async with running_chain(lived) as chain:
        chain.logged([make_line(n) for n in range(2 * BATCH + 1)])
        await asyncio.wait_for(chain.delivered(), PATIENCE)
        assert lived.calls.count("flush") == 3


async def test_the_manager_closes_its_observers_last(start_manager: StartManager) -> None:
    lived = Lived()
    manager = await start_manager(loggers=[lived], shutdown_timeout=0.0)

    @manager.task
    async def endless() -> None:
        task_log("here")
        try:
            await asyncio.Event().wait()
        finally:
            task_log("stopped")

    await manager.enqueue(endless)
    await eventually(lambda: "here" in lived.calls)
    await manager.shutdown()
    assert [call for call in lived.calls if call != "flush"] == ["startup", "here", "stopped", "close"]


@pytest.mark.parametrize("trouble", ["raises", "hangs"])
async def test_a_start_that_fails_or_hangs_does_not_hold_up_the_service(
    start_manager: StartManager, trouble: str
) -> None:
    class BadStart(TaskObserver):
        async def startup(self) -> None:
            if trouble == "hangs":
                await asyncio.Event().wait()
            raise OSError("no route to the collector")

        async def on_log(self, event: LogEvent) -> None:
            seen.append(event.message)

    seen: list[str] = []
    with deadline(PATIENCE):
        manager = await start_manager(loggers=[BadStart()])

        @manager.task
        async def job() -> int:
            task_log("said")
            return 42

        assert await manager.result(await manager.enqueue(job)) == 42
        if trouble == "raises":
            await eventually(lambda: seen == ["said"])


@pytest.mark.parametrize("stubborn", [False, True])
async def test_an_observer_that_hangs_delays_a_stop_only_up_to_the_deadline(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stubborn: bool
) -> None:
    monkeypatch.setattr(observers_module, "LAST_WORDS", 0.1)
    free = asyncio.Event()

    class Stubborn(Hanging):
        async def on_log(self, event: LogEvent) -> None:
            while stubborn and not free.is_set():
                try:
                    await free.wait()
                except asyncio.CancelledError:
                    continue
            await super().on_log(event)

    hanging, memory = Stubborn(), InMemoryLogger()
    with deadline(3.0):
        async with running_chain(hanging, memory) as chain:
            chain.logged([make_line(n) for n in range(3)])
            await eventually(lambda: len(memory.log_events) == 3)
    if stubborn:
        assert caplog.messages == ["1 observers could not be stopped: left behind"]
    else:
        assert hanging.closed
        assert caplog.messages == ["observer Stubborn: stopped before 2 events were delivered"]
    free.set()


async def test_an_observer_that_swallows_the_end_of_its_loop_is_closed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(observers_module, "LAST_WORDS", 0.1)

    class Swallowing(Hanging):
        async def on_log(self, event: LogEvent) -> None:
            with suppress(asyncio.CancelledError):
                await super().on_log(event)

    swallowing = Swallowing()
    async with running_chain(swallowing) as chain:
        chain.logged([make_line(n) for n in range(3)])
        await eventually(lambda: swallowing.seen)
    assert swallowing.seen == ["line 0"]
    assert swallowing.closed
    assert caplog.messages == ["observer Swallowing: stopped before 2 events were delivered"]


async def test_the_tasks_last_words_reach_the_observers_at_a_stop(start_manager: StartManager) -> None:
    memory = InMemoryLogger()
    manager = await start_manager(loggers=[memory])

    @manager.task
    def job(n: int) -> None:
        task_log(f"line {n}")

    for n in range(100):
        await manager.enqueue(job, n)
    await manager.shutdown()
    ended = [event for event in memory.lifecycle_events if event.status is TaskStatus.SUCCESS]
    assert len(ended) == len(memory.log_events) > 0
    assert set(statuses(memory)) == {"running", "success"}


def test_events_cannot_be_changed_by_one_observer_for_another() -> None:
    event = LogEvent("the id", "job", "words", "info", START, 0)
    with pytest.raises(AttributeError):
        event.message = "others"  # type: ignore[misc]
    assert not hasattr(event, "__dict__")
    assert not hasattr(LifecycleEvent("the id", "job", TaskStatus.RUNNING, START, 0, 0), "__dict__")
