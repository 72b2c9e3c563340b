"""One idempotency key is one task: across threads, instances and processes, and in one request."""

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid5

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from app.taskflow import ManagedBackgroundTasks, QueueConfig, QueueFullError, TaskManager, TaskStatus
from app.taskflow.models import TaskFilter
from app.taskflow.store import KEY_NAMESPACE

from .conftest import StartManager
from .helpers import PATIENCE, assert_counters_match_rows, eventually

pytestmark = pytest.mark.anyio

PROJECT = Path(__file__).parents[2]
CALLS = 200


class Payments:
    """Tasks that note what they were called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def define(self, manager: TaskManager) -> None:
        @manager.task(queue="payments")
        async def pay(order: Any) -> Any:
            self.calls.append(order)
            if order == "fails":
                raise ConnectionError("declined")
            if order == "hangs":
                await asyncio.sleep(3_600)
            return order

        @manager.task
        async def refund(order: Any) -> Any:
            self.calls.append(("refund", order))
            return order


@pytest.fixture
def payments() -> Payments:
    return Payments()


def task(manager: TaskManager, name: str = "pay") -> Any:
    return manager.registry.named(name).function


async def status(manager: TaskManager, task_id: str) -> TaskStatus:
    return (await manager.store.get(task_id)).status


async def ended(manager: TaskManager, task_id: str) -> bool:
    return (await status(manager, task_id)).terminal


# -- races


def test_one_key_is_one_task_for_requests_in_many_threads(tmp_path: Path) -> None:
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    app = FastAPI()
    manager.init_app(app)
    calls = []

    @manager.task
    def pay(order: int) -> None:
        calls.append(order)

    @app.post("/pay")
    def route(tasks: Annotated[ManagedBackgroundTasks, Depends(manager.get_tasks)]) -> str:
        return tasks.add_task(pay, 1, idempotency_key="order-1")

    with TestClient(app) as client, ThreadPoolExecutor(8) as clients:
        ids = {client.post("/pay").json() for _ in range(2)}
        ids |= set(clients.map(lambda _: client.post("/pay").json(), range(CALLS // 4)))
        last = client.post("/pay").json()  # its turn comes after any that would have started another
    assert ids == {last}
    assert calls == [1]


async def test_one_key_is_one_task_for_two_instances_on_one_file(
    start_manager: StartManager, payments: Payments
) -> None:
    one, other = [await start_manager(payments.define) for _ in range(2)]
    calls = [
        manager.enqueue(task(manager), 1, idempotency_key="k") for _ in range(CALLS // 2) for manager in (one, other)
    ]
    (task_id,) = set(await asyncio.gather(*calls))
    assert await one.result(task_id, PATIENCE) == 1
    assert payments.calls == [1]
    assert [event.kind for event in await one.store.events(task_id)] == ["accepted", "started", "succeeded"]
    await assert_counters_match_rows(one.backend, one.clock())


async def test_one_key_is_one_task_for_two_processes_on_one_file(start_manager: StartManager, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    arguments = [str(tmp_path / "tasks.db"), str(starts), str(CALLS // 2)]
    race = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.taskflow.race_app", *arguments, cwd=PROJECT, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await race.communicate()
    assert race.returncode == 0
    one, other = map(json.loads, said.splitlines())
    assert one == other
    manager = await start_manager()
    (record,) = (await manager.store.page(TaskFilter())).tasks
    assert one == [record.task_id]
    assert (record.status, record.attempt) == (TaskStatus.SUCCESS, 1)
    assert starts.read_text() == "1\n"


def test_one_key_twice_in_one_request_is_one_task_with_the_first_arguments(tmp_path: Path) -> None:
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    app = FastAPI()
    manager.init_app(app)
    calls = []

    @manager.task
    async def pay(order: str) -> None:
        calls.append(order)

    @app.post("/pay")
    async def route(tasks: Annotated[ManagedBackgroundTasks, Depends(manager.get_tasks)]) -> list[str]:
        return [tasks.add_task(pay, word, idempotency_key="k") for word in ("first", "second")]

    with TestClient(app) as client:
        one, other = client.post("/pay").json()
        assert client.post("/pay").json() == [one, one]
    assert one == other
    assert calls == ["first"]


# -- what a second call with the key does


async def test_a_task_that_failed_runs_again_with_what_the_new_call_says(
    start_manager: StartManager, payments: Payments
) -> None:
    manager = await start_manager(payments.define)
    task_id = await manager.enqueue(task(manager), "fails", idempotency_key="k", tags={"try": "1"})
    await eventually(lambda: ended(manager, task_id))
    assert await manager.enqueue(task(manager), "works", idempotency_key="k", tags={"try": "2"}, priority=7) == task_id
    assert await manager.result(task_id, PATIENCE) == "works"
    record = await manager.store.get(task_id)
    assert (record.attempt, record.error, dict(record.tags), record.priority) == (2, None, {"try": "2"}, 7)
    kinds = [event.kind for event in await manager.store.events(task_id)]
    assert kinds == ["accepted", "started", "failed", "requeued", "started", "succeeded"]
    assert await manager.enqueue(task(manager), "once more", idempotency_key="k") == task_id
    assert await manager.result(task_id, PATIENCE) == "works"
    await assert_counters_match_rows(manager.backend, manager.clock())


async def test_a_task_that_was_interrupted_runs_again_with_the_new_arguments(
    start_manager: StartManager, payments: Payments
) -> None:
    first = await start_manager(payments.define, shutdown_timeout=0.1)
    task_id = await first.enqueue(task(first), "hangs", idempotency_key="k")
    await eventually(lambda: payments.calls == ["hangs"])
    await first.shutdown()
    second = await start_manager(payments.define)
    assert await status(second, task_id) is TaskStatus.INTERRUPTED
    assert await second.enqueue(task(second), "works", idempotency_key="k") == task_id
    assert await second.result(task_id, PATIENCE) == "works"
    assert payments.calls == ["hangs", "works"]


async def test_a_task_that_runs_again_keeps_the_delay_of_its_new_call(
    start_manager: StartManager, payments: Payments
) -> None:
    manager = await start_manager(payments.define)
    task_id = await manager.enqueue(task(manager), "fails", idempotency_key="k")
    await eventually(lambda: ended(manager, task_id))
    await manager.enqueue(task(manager), "later", idempotency_key="k", delay_seconds=0.6)
    record = await manager.store.get(task_id)
    assert record.status is TaskStatus.PENDING
    assert record.run_at > manager.clock()
    assert payments.calls == ["fails"]
    assert await manager.result(task_id, PATIENCE) == "later"


async def test_a_task_that_succeeded_waits_or_was_cancelled_is_left_as_it_is(
    start_manager: StartManager, payments: Payments
) -> None:
    manager = await start_manager(payments.define)
    done = await manager.enqueue(task(manager), "done", idempotency_key="done")
    await manager.result(done, PATIENCE)
    waits = await manager.enqueue(task(manager), "waits", idempotency_key="waits", delay_seconds=3_600)
    cancelled = await manager.enqueue(task(manager), "no", idempotency_key="no", delay_seconds=3_600)
    await manager.store.cancel(cancelled)
    before = [await manager.store.get(task_id) for task_id in (done, waits, cancelled)]
    for key in ("done", "waits", "no"):
        await manager.enqueue(task(manager), "again", idempotency_key=key)
    assert [await manager.store.get(task_id) for task_id in (done, waits, cancelled)] == before
    assert payments.calls == ["done"]


@pytest.mark.parametrize(("one", "other"), [("mail", "mail:refund"), ("a:b", "a%3Ab"), ("a%3A", "a:"), ("%", "%25")])
async def test_no_two_pairs_of_name_and_key_share_an_id(start_manager: StartManager, one: str, other: str) -> None:
    manager = await start_manager()

    async def first() -> None: ...

    async def second() -> None: ...

    manager.task(name=one)(first)
    manager.task(name=other)(second)
    keys = ["7", "refund:7", ":7", "b:7", "%3A7", "5:7"]
    ids = [await manager.enqueue(function, idempotency_key=key) for function in (first, second) for key in keys]
    assert len(set(ids)) == len(ids)


async def test_the_id_of_a_plain_name_and_key_is_what_it_always_was(
    start_manager: StartManager, payments: Payments
) -> None:
    manager = await start_manager(payments.define)
    paid = await manager.enqueue(task(manager), 1, idempotency_key="order:7")
    assert paid == str(uuid5(KEY_NAMESPACE, "pay:order:7"))


async def test_the_same_key_for_another_function_is_another_task(
    start_manager: StartManager, payments: Payments
) -> None:
    manager = await start_manager(payments.define)
    paid = await manager.enqueue(task(manager), 1, idempotency_key="k")
    refunded = await manager.enqueue(task(manager, "refund"), 1, idempotency_key="k")
    assert paid != refunded
    await manager.result(paid, PATIENCE)
    await manager.result(refunded, PATIENCE)
    assert sorted(payments.calls, key=str) == [("refund", 1), 1]


async def test_a_key_that_found_its_queue_full_runs_when_it_comes_again_and_there_is_room(
    start_manager: StartManager, payments: Payments
) -> None:
    manager = await start_manager(payments.define, queues={"payments": QueueConfig(max_size=1)})
    await manager.store.pause_queue("payments")
    await manager.enqueue(task(manager), "first")
    for _ in range(2):
        with pytest.raises(QueueFullError):
            await manager.enqueue(task(manager), "refused", idempotency_key="k")
    await manager.store.resume_queue("payments")
    await eventually(lambda: payments.calls == ["first"])
    task_id = await manager.enqueue(task(manager), "taken", idempotency_key="k")
    assert await manager.result(task_id, PATIENCE) == "taken"
    assert payments.calls == ["first", "taken"]
    await assert_counters_match_rows(manager.backend, manager.clock())


async def test_a_key_seen_before_holds_up_nobody_in_its_queue(start_manager: StartManager, payments: Payments) -> None:
    manager = await start_manager(payments.define, queues={"payments": QueueConfig(concurrency=1)})
    done = await manager.enqueue(task(manager), "done", idempotency_key="k")
    await manager.result(done, PATIENCE)
    _, other = await asyncio.gather(
        manager.enqueue(task(manager), "again", idempotency_key="k"), manager.enqueue(task(manager), "other")
    )
    assert await manager.result(other, 0.7) == "other"  # not only at the next poll


async def test_a_key_that_comes_again_for_another_queue_runs_there(
    start_manager: StartManager, payments: Payments
) -> None:
    """The queue whose limit judged it is the one that it goes into."""
    manager = await start_manager(payments.define, queues={"one": QueueConfig(), "two": QueueConfig()})
    task_id = await manager.enqueue(task(manager), "fails", idempotency_key="k", queue="one")
    await eventually(lambda: ended(manager, task_id))
    await manager.store.pause_queue("two")
    assert await manager.enqueue(task(manager), "works", idempotency_key="k", queue="two") == task_id
    record = await manager.store.get(task_id)
    assert (record.queue, record.status) == ("two", TaskStatus.PENDING)
    pending = {state.name: state.pending for state in await manager.store.queues()}
    assert (pending.get("one", 0), pending["two"]) == (0, 1)
    await manager.store.resume_queue("two")
    assert await manager.result(task_id, PATIENCE) == "works"
    await assert_counters_match_rows(manager.backend, manager.clock())
