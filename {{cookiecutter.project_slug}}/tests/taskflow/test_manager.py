"""The whole engine behind its face: decorators, enqueue, result, start, stop, and a database that comes and goes."""

import asyncio
import gc
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from app.taskflow import (
    BackendUnavailable,
    TaskArgumentError,
    TaskFailed,
    TaskflowError,
    TaskManager,
    TaskNotFound,
    TaskStatus,
    get_task_context,
    task_log,
)
from app.taskflow.models import TaskFilter

from .conftest import StartManager
from .helpers import PATIENCE, assert_counters_match_rows, eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quick_refusals")]


def define(manager: TaskManager) -> None:
    """The tasks of these tests, on a manager of its own."""

    @manager.task
    async def double(number: int) -> int:
        return 2 * number

    @manager.task
    def slow_double(number: int) -> int:
        return 2 * number

    @manager.task
    async def fail(text: str) -> None:
        raise ValueError(text)

    @manager.task(retries=2)
    async def third_time() -> int:
        context = get_task_context()
        assert context is not None
        task_log(f"attempt {context.attempt}")
        if context.attempt < 2:
            raise ConnectionError("not yet")
        return context.attempt

    @manager.task
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @manager.task(requeue_on_interrupt=True)
    async def sleep_again(seconds: float) -> None:
        await asyncio.sleep(seconds)


def task(manager: TaskManager, name: str) -> Any:
    return manager.registry.named(name).function


async def test_the_garbage_collector_is_left_to_the_application(tmp_path: Path) -> None:
    frozen = gc.get_freeze_count()
    async with TaskManager(snapshot_db=str(tmp_path / "tasks.db")).lifespan():
        assert gc.get_freeze_count() == frozen
    assert gc.get_freeze_count() == frozen


# -- decorators


def test_the_decorator_returns_the_function_unchanged() -> None:
    manager = TaskManager()

    def bare() -> int:
        return 1

    async def with_options() -> int:
        return 2

    assert manager.task(bare) is bare
    assert manager.task(retries=2, tags={"a": "b"}, name="renamed")(with_options) is with_options
    assert manager.registry.named("renamed").config.retries == 2
    assert manager.registry.named("bare").config.tags == {}


@pytest.mark.parametrize(
    "options",
    [{"retries": -1}, {"backoff": 0}, {"timeout": 0}, {"executor": "async"}, {"retry_on": "ValueError"}, {"delay": -1}],
    ids=repr,
)
def test_an_option_that_cannot_be_is_refused_at_the_decorator(options: dict[str, Any]) -> None:
    manager = TaskManager()

    def job() -> None: ...

    with pytest.raises((ValueError, TaskflowError), match=next(iter(options))):
        manager.task(**options)(job)
    assert "job" not in manager.registry


@pytest.mark.parametrize("retry_on", [ConnectionError, (ConnectionError, KeyError), lambda error: True])
def test_retry_on_takes_one_class_several_or_a_function(retry_on: Any) -> None:
    manager = TaskManager()

    @manager.task(retry_on=retry_on, retries=1)
    def job() -> None: ...

    policy = manager.registry.named("job").config.retry_on
    assert callable(policy) or isinstance(policy, tuple)


# -- enqueue and result


@pytest.mark.parametrize("name", ["double", "slow_double"])
async def test_an_enqueued_task_runs_and_its_result_is_awaited(start_manager: StartManager, name: str) -> None:
    manager = await start_manager(define)
    task_id = await manager.enqueue(task(manager, name), 21)
    assert await manager.result(task_id, timeout=PATIENCE) == 42
    record = await manager.store.get(task_id)
    assert (record.status, record.attempt, record.func_name) == (TaskStatus.SUCCESS, 1, name)


async def test_hundreds_of_results_are_awaited_at_once(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    ids = [await manager.enqueue(task(manager, "double"), number) for number in range(200)]
    assert await asyncio.gather(*(manager.result(task_id, PATIENCE) for task_id in ids)) == list(range(0, 400, 2))
    await assert_counters_match_rows(manager.backend, manager.clock())


async def test_a_failed_task_raises_where_its_result_is_awaited(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    task_id = await manager.enqueue(task(manager, "fail"), "no such thing")
    with pytest.raises(TaskFailed, match="no such thing") as raised:
        await manager.result(task_id, PATIENCE)
    assert (raised.value.task_id, raised.value.status) == (task_id, TaskStatus.FAILED)


async def test_a_result_that_does_not_come_in_time_is_a_timeout(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    task_id = await manager.enqueue(task(manager, "sleep"), 60)
    with pytest.raises(TimeoutError):
        await manager.result(task_id, timeout=0.05)
    await manager.store.cancel(task_id)
    with pytest.raises(TaskFailed, match="cancelled"):
        await manager.result(task_id, PATIENCE)


async def test_the_result_of_an_unknown_id_is_an_error_at_once(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    with pytest.raises(TaskNotFound):
        await manager.result("nobody", timeout=PATIENCE)


async def test_a_bad_argument_is_refused_at_the_caller_and_stores_nothing(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    with pytest.raises(TaskArgumentError, match="'number'"):
        await manager.enqueue(task(manager, "double"), "many")
    assert (await manager.store.page(TaskFilter())).tasks == []


async def test_a_task_that_fails_is_retried_on_the_same_row_and_each_attempt_keeps_its_log(
    start_manager: StartManager,
) -> None:
    manager = await start_manager(define)
    task_id = await manager.enqueue(task(manager, "third_time"))
    assert await manager.result(task_id, PATIENCE) == 2
    kinds = [(event.kind, event.attempt) for event in await manager.store.events(task_id)]
    assert kinds == [
        ("accepted", None),
        ("started", 0),
        ("retrying", 0),
        ("started", 1),
        ("retrying", 1),
        ("started", 2),
        ("succeeded", 2),
    ]
    lines = await manager.store.logs(task_id)
    assert [(line.attempt, line.message) for line in lines] == [(n, f"attempt {n}") for n in range(3)]


async def test_one_key_makes_one_task(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    ids = await asyncio.gather(
        *(manager.enqueue(task(manager, "double"), 1, idempotency_key="once") for _ in range(50))
    )
    assert len(set(ids)) == 1
    assert await manager.result(ids[0], PATIENCE) == 2
    kinds = [event.kind for event in await manager.store.events(ids[0])]
    assert kinds == ["accepted", "started", "succeeded"]


async def test_a_delayed_task_starts_when_its_time_has_come_and_not_before(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    task_id = await manager.enqueue(task(manager, "double"), 1, delay_seconds=0.4)
    await manager.result(task_id, PATIENCE)
    record = await manager.store.get(task_id)
    assert record.start_time is not None
    assert 0.4 <= (record.start_time - record.created_at).total_seconds() < 2


async def test_a_cancelled_coroutine_is_stopped_and_its_siblings_go_on(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    victim = await manager.enqueue(task(manager, "sleep"), 60)
    sibling = await manager.enqueue(task(manager, "sleep"), 0.3)
    await eventually(lambda: manager.dispatcher.running == 2)
    await manager.store.cancel(victim)
    await manager.result(sibling, PATIENCE)
    assert (await manager.store.get(victim)).status is TaskStatus.CANCELLED
    await eventually(lambda: manager.dispatcher.running == 0)


async def test_a_cancel_reaches_a_task_that_runs_in_another_instance(start_manager: StartManager) -> None:
    owner = await start_manager(define)
    task_id = await owner.enqueue(task(owner, "sleep"), 60)
    await eventually(lambda: owner.dispatcher.running == 1)
    other = await start_manager(define)
    await other.store.cancel(task_id)
    with pytest.raises(TaskFailed, match="cancelled"):
        await other.result(task_id, PATIENCE)
    await eventually(lambda: owner.dispatcher.running == 0)


async def test_a_thread_that_was_told_to_stop_ends_cancelled(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task
    def patient() -> None:
        context = get_task_context()
        assert context is not None
        while not context.cancelled:
            threading.Event().wait(0.01)

    task_id = await manager.enqueue(patient)
    await eventually(lambda: manager.dispatcher.running == 1)
    await manager.store.cancel(task_id)
    with pytest.raises(TaskFailed, match="cancelled"):
        await manager.result(task_id, PATIENCE)


async def test_no_more_run_at_once_than_there_are_slots_and_the_others_are_pending(start_manager: StartManager) -> None:
    manager = await start_manager(max_concurrent_tasks=2, max_sync_threads=1)
    running = most = 0

    @manager.task
    async def counted() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    ids = [await manager.enqueue(counted) for _ in range(8)]
    await eventually(lambda: running == 2)
    counts = {count.status: count.n for count in await manager.store.counts()}
    assert counts.get(TaskStatus.RUNNING, 0) <= 2
    await asyncio.gather(*(manager.result(task_id, PATIENCE) for task_id in ids))
    assert most == 2


# -- stop


async def test_a_shutdown_waits_for_what_runs_and_writes_its_end(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    task_id = await manager.enqueue(task(manager, "sleep"), 0.3)
    await eventually(lambda: manager.dispatcher.running == 1)
    await manager.shutdown()
    await manager.startup()
    assert (await manager.store.get(task_id)).status is TaskStatus.SUCCESS


async def test_at_its_deadline_a_shutdown_interrupts_what_still_runs(start_manager: StartManager) -> None:
    manager = await start_manager(define, shutdown_timeout=0.2)
    lost = await manager.enqueue(task(manager, "sleep"), 60)
    again = await manager.enqueue(task(manager, "sleep_again"), 60)
    await eventually(lambda: manager.dispatcher.running == 2)
    began = monotonic()
    await manager.shutdown()
    assert monotonic() - began < 2
    manager.runs_tasks = False
    await manager.startup()
    assert (await manager.store.get(lost)).status is TaskStatus.INTERRUPTED
    record = await manager.store.get(again)
    assert (record.status, record.excused) == (TaskStatus.PENDING, 1)


async def test_a_manager_can_be_stopped_and_started_again_and_again(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    for number in range(3):
        assert await manager.result(await manager.enqueue(task(manager, "double"), number), PATIENCE) == 2 * number
        assert await manager.result(await manager.enqueue(task(manager, "slow_double"), 1), PATIENCE) == 2
        await manager.shutdown()
        with pytest.raises(BackendUnavailable, match="not started"):
            await manager.enqueue(task(manager, "double"), 1)
        await manager.startup()
    assert manager.unready() is None


def test_a_manager_works_in_one_event_loop_after_the_other(tmp_path: Path) -> None:
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"), shutdown_timeout=0.1)
    define(manager)
    hang = threading.Event()

    @manager.task
    def stuck() -> None:
        hang.wait(PATIENCE)

    async def life() -> None:
        async with manager.lifespan():
            for name in ("double", "slow_double"):
                assert await manager.result(await manager.enqueue(task(manager, name), 1), PATIENCE) == 2
            await manager.enqueue(stuck)
            await eventually(lambda: manager.dispatcher.running == 1)

    for _ in range(3):
        asyncio.run(life())
        hang.set()
        hang = threading.Event()


async def test_starting_twice_and_stopping_twice_do_no_harm(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    await manager.startup()
    assert await manager.result(await manager.enqueue(task(manager, "double"), 4), PATIENCE) == 8
    await manager.shutdown()
    await manager.shutdown()


async def test_a_manager_that_only_accepts_leaves_its_tasks_to_others(start_manager: StartManager) -> None:
    def accept_only(manager: TaskManager) -> None:
        define(manager)
        manager.runs_tasks = False

    front = await start_manager(accept_only)
    task_id = await front.enqueue(task(front, "double"), 5)
    assert front.unready() is None
    assert (await front.store.get(task_id)).status is TaskStatus.PENDING
    await start_manager(define)
    assert await front.result(task_id, PATIENCE) == 10


async def test_a_name_that_this_process_does_not_know_waits_for_one_that_does(start_manager: StartManager) -> None:
    def newer(manager: TaskManager) -> None:
        manager.runs_tasks = False

        @manager.task
        async def of_the_new_deploy() -> str:
            return "new"

    def newest(manager: TaskManager) -> None:
        newer(manager)
        manager.runs_tasks = True

    old = await start_manager(define)
    front = await start_manager(newer)
    task_id = await front.enqueue(task(front, "of_the_new_deploy"))
    assert await old.result(await old.enqueue(task(old, "double"), 1), PATIENCE) == 2
    assert (await front.store.get(task_id)).status is TaskStatus.PENDING
    assert not old.store.knows("of_the_new_deploy")
    back = await start_manager(newest)
    assert await back.result(task_id, PATIENCE) == "new"


# -- a database that comes and goes


def largest_file(folder: Path) -> int:
    return max(file.stat().st_size for file in folder.iterdir())


async def use(manager: TaskManager) -> None:
    await eventually(lambda: manager.unready() is None)
    assert await manager.result(await manager.enqueue(task(manager, "double"), 1), PATIENCE) == 2


async def refuses(manager: TaskManager) -> None:
    """It says that it is not ready, answers "no" in time, and what it refused is not stored later."""
    assert manager.unready()
    began = monotonic()
    with pytest.raises(BackendUnavailable):
        await manager.enqueue(task(manager, "fail"), "must never run")
    assert monotonic() - began < 4


async def nothing_refused_was_stored(manager: TaskManager) -> None:
    assert (await manager.store.page(TaskFilter(func_name="fail"))).tasks == []


async def test_it_starts_without_its_folder_and_works_when_that_appears(
    start_manager: StartManager, tmp_path: Path
) -> None:
    manager = await start_manager(define, snapshot_db=str(tmp_path / "missing" / "tasks.db"))
    await refuses(manager)
    (tmp_path / "missing").mkdir()
    await use(manager)
    await nothing_refused_was_stored(manager)


async def test_it_starts_while_another_process_locks_the_file_and_works_when_it_lets_go(
    start_manager: StartManager, tmp_path: Path
) -> None:
    lock = sqlite3.connect(tmp_path / "tasks.db", isolation_level=None, check_same_thread=False)
    lock.execute("BEGIN EXCLUSIVE")
    manager = await start_manager(define)
    await refuses(manager)
    lock.execute("ROLLBACK")
    lock.close()
    await use(manager)
    await nothing_refused_was_stored(manager)


async def test_a_task_that_ends_while_the_database_is_locked_is_recorded_afterwards(
    start_manager: StartManager, tmp_path: Path
) -> None:
    manager = await start_manager(define)
    ids = [await manager.enqueue(task(manager, "sleep"), 0.2) for _ in range(5)]
    await eventually(lambda: manager.dispatcher.running == 5)
    lock = sqlite3.connect(tmp_path / "tasks.db", isolation_level=None, timeout=5)
    lock.execute("BEGIN IMMEDIATE")
    await eventually(lambda: manager.journal.last_error)
    await refuses(manager)
    lock.execute("ROLLBACK")
    lock.close()
    for task_id in ids:
        await manager.result(task_id, PATIENCE)
    await nothing_refused_was_stored(manager)
    await assert_counters_match_rows(manager.backend, manager.clock())


async def test_a_full_disk_refuses_new_tasks_and_is_no_longer_full_when_there_is_room(
    start_manager: StartManager, tmp_path: Path
) -> None:
    manager = await start_manager(define)
    await use(manager)

    async def fill() -> None:
        for _ in range(50):
            await manager.enqueue(task(manager, "fail"), "x" * 100_000)

    full, room = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file(tmp_path), room))
        with pytest.raises(BackendUnavailable):
            await fill()
        stored = len((await manager.store.page(TaskFilter(func_name="fail"), None, 500)).tasks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, room))
        signal.signal(signal.SIGXFSZ, ignored)
    await use(manager)
    assert len((await manager.store.page(TaskFilter(func_name="fail"), None, 500)).tasks) == stored


def test_a_database_that_cannot_be_written_refuses_and_says_so(tmp_path: Path) -> None:
    """In a process of its own that is no superuser, for whom nothing is read-only."""
    program = f"""
import asyncio, os, sqlite3
from app.taskflow import BackendUnavailable, TaskManager, journal, manager as engine

journal.ACCEPT_TIMEOUT, engine.START_TIMEOUT = 0.7, 0.2
folder = {str(tmp_path / "closed")!r}
async def main():
    for manager in (TaskManager(snapshot_db=folder + "/tasks.db") for _ in range(2)):
        @manager.task
        async def job() -> None: ...
        async with manager.lifespan():
            try:
                await manager.enqueue(job)
                print("stored")
            except BackendUnavailable as error:
                print(error)
                print(manager.unready())
        os.chmod(folder + "/tasks.db", 0o444)
        os.chmod(folder, 0o555)
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
asyncio.run(main())
"""
    (tmp_path / "closed").mkdir()
    for parent in (tmp_path, *tmp_path.parents):
        if os.geteuid() == 0 and parent.stat().st_uid == 0 and "pytest" in parent.name:
            parent.chmod(0o755)
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    lines = ended.stdout.splitlines()
    assert lines[0] == "stored", ended.stderr
    assert "the task backend is unavailable" in lines[1], ended.stderr
    assert "away" in lines[2]


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    before = {thread for thread in threading.enumerate() if thread.name.startswith("taskflow-heartbeat")}
    yield
    assert {thread for thread in threading.enumerate() if thread.name.startswith("taskflow-heartbeat")} <= before
