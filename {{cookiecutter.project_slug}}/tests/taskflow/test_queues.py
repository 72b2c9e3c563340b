"""Named queues: how many run at once, how many may wait, in which order, and what an operator changes meanwhile."""

import asyncio
import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient
from sqlalchemy.exc import IntegrityError

from app.taskflow import ManagedBackgroundTasks, QueueConfig, QueueFullError, TaskManager, TaskStatus
from app.taskflow.models import QueueState, TaskFilter

from .conftest import StartManager
from .helpers import PATIENCE, assert_counters_match_rows, eventually

pytestmark = pytest.mark.anyio


class Work:
    """Tasks that tell how many of them run, and wait until they are let go."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.order: list[Any] = []
        self.go = asyncio.Event()

    def define(self, manager: TaskManager) -> None:
        @manager.task(queue="narrow")
        async def hold(word: Any = None) -> None:
            with self.counted(word):
                await self.go.wait()

        @manager.task(queue="narrow")
        async def step(word: Any = None) -> None:
            with self.counted(word):
                await asyncio.sleep(0.02)

        @manager.task(queue="narrow", retries=1, delay=3_600)
        async def fail() -> None:
            raise ConnectionError("later")

    @contextmanager
    def counted(self, word: Any) -> Iterator[None]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.order.append(word)
        yield
        self.running -= 1


@pytest.fixture
def work() -> Work:
    return Work()


def task(manager: TaskManager, name: str) -> Any:
    return manager.registry.named(name).function


def narrow(**limits: int) -> dict[str, QueueConfig]:
    return {"narrow": QueueConfig(**limits)}


async def state(manager: TaskManager, name: str = "narrow") -> QueueState:
    return next(queue for queue in await manager.store.queues() if queue.name == name)


async def statuses(manager: TaskManager) -> Counter[TaskStatus]:
    page = await manager.store.page(TaskFilter(), limit=500)
    return Counter(record.status for record in page.tasks)


# -- how many run, and in which order


async def test_two_instances_on_one_file_together_run_as_many_of_a_queue_as_it_allows_and_no_more(
    start_manager: StartManager, work: Work
) -> None:
    one, other = [await start_manager(work.define, queues=narrow(concurrency=3)) for _ in range(2)]
    ids = [await manager.enqueue(task(manager, "step")) for _ in range(15) for manager in (one, other)]
    await asyncio.gather(*(one.result(task_id, PATIENCE) for task_id in ids))
    assert work.most == 3
    owners = {(await one.store.get(task_id)).instance for task_id in ids}
    assert owners == {one.instance_id, other.instance_id}


async def test_a_queue_of_one_goes_by_priority_and_then_in_order_of_arrival(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define, queues=narrow(concurrency=1))
    await manager.store.pause_queue("narrow")
    arrivals = [("c1", None), ("a1", 9), ("c2", 0), ("d1", -1), ("b1", 5), ("a2", 9), ("c3", None), ("b2", 5)]
    for word, priority in arrivals:
        await manager.enqueue(task(manager, "step"), word, priority=priority)
    await manager.store.resume_queue("narrow")
    await eventually(lambda: len(work.order) == len(arrivals))
    assert work.order == ["a1", "a2", "b1", "b2", "c1", "c2", "c3", "d1"]
    assert work.most == 1


async def test_a_full_queue_does_not_hold_up_another_one(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define, queues={**narrow(concurrency=1), "wide": QueueConfig(concurrency=5)})
    for _ in range(3):
        await manager.enqueue(task(manager, "hold"))
    await eventually(lambda: work.running == 1)
    task_id = await manager.enqueue(task(manager, "step"), "wide", queue="wide")
    await manager.result(task_id, PATIENCE)
    assert (await state(manager)).pending == 2
    work.go.set()


# -- how many may wait


async def test_of_many_concurrent_arrivals_at_two_instances_exactly_as_many_wait_as_may(
    start_manager: StartManager, work: Work
) -> None:
    managers = [await start_manager(work.define, queues=narrow(max_size=5)) for _ in range(2)]
    for manager in managers:
        await manager.store.pause_queue("narrow")
    calls = [manager.enqueue(task(manager, "step"), number) for number in range(30) for manager in managers]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, QueueFullError)]
    assert len(refused) == 55
    assert {(error.queue, error.limit) for error in refused} == {("narrow", 5)}
    assert await statuses(managers[0]) == {TaskStatus.PENDING: 5, TaskStatus.REJECTED: 55}
    now = await state(managers[1])
    assert (now.pending, now.rejected) == (5, 55)
    await assert_counters_match_rows(managers[0].backend, managers[0].clock())


async def test_there_is_room_again_as_soon_as_a_waiting_task_starts(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define, queues=narrow(concurrency=1, max_size=2))
    accepted = 0
    for _ in range(3):  # one of them starts at once and takes no place
        await manager.enqueue(task(manager, "hold"))
    with pytest.raises(QueueFullError):
        await manager.enqueue(task(manager, "hold"))
    work.go.set()
    await eventually(lambda: len(work.order) == 3)
    for _ in range(2):
        await manager.enqueue(task(manager, "hold"))
        accepted += 1
    assert accepted == 2


async def test_delayed_and_retry_waiting_tasks_take_no_place(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define, queues=narrow(max_size=1))
    failed = await manager.enqueue(task(manager, "fail"))
    await eventually(lambda: is_waiting(manager, failed))
    await manager.store.pause_queue("narrow")
    for _ in range(3):
        await manager.enqueue(task(manager, "step"), delay_seconds=3_600)
    await manager.enqueue(task(manager, "step"))
    with pytest.raises(QueueFullError):
        await manager.enqueue(task(manager, "step"))
    await manager.enqueue(task(manager, "step"), delay_seconds=3_600)
    assert (await state(manager)).pending == 1


async def is_waiting(manager: TaskManager, task_id: str) -> bool:
    record = await manager.store.get(task_id)
    return record.status is TaskStatus.PENDING and record.attempt == 1


async def test_a_rejected_task_is_requeued_by_an_operator_and_runs(start_manager: StartManager, work: Work) -> None:
    manager = await start_manager(work.define, queues=narrow(max_size=1))
    await manager.store.pause_queue("narrow")
    await manager.enqueue(task(manager, "step"), "first")
    with pytest.raises(QueueFullError):
        await manager.enqueue(task(manager, "step"), "refused")
    (refused,) = (await manager.store.page(TaskFilter(statuses=(TaskStatus.REJECTED,)))).tasks
    await manager.store.resume_queue("narrow")
    await eventually(lambda: work.order == ["first"])
    await manager.store.retry(refused.task_id, "ann")
    await manager.result(refused.task_id, PATIENCE)
    assert work.order == ["first", "refused"]
    assert [event.kind for event in await manager.store.events(refused.task_id)] == [
        "rejected",
        "requeued",
        "started",
        "succeeded",
    ]


# -- in requests


class Service:
    """An app whose tasks wait in a queue of a few places; `go` lets them end."""

    def __init__(self, folder: Path, **limits: int) -> None:
        self.manager = TaskManager(snapshot_db=str(folder / "tasks.db"), queues=narrow(**limits), shutdown_timeout=5.0)
        self.app = FastAPI()
        self.manager.init_app(self.app)
        self.go = threading.Event()

        @self.manager.task(queue="narrow")
        def hold() -> None:
            self.go.wait(PATIENCE)

        self.hold = hold

    def rows(self) -> Counter[str]:
        with closing(
            sqlite3.connect(str(self.manager.backend.name).removeprefix("sqlite:///"), timeout=5)
        ) as connection:
            return Counter(status for (status,) in connection.execute("SELECT status FROM taskflow_task"))


Tasks = ManagedBackgroundTasks


def test_of_many_concurrent_requests_the_late_ones_get_429_and_never_more_wait_than_may(tmp_path: Path) -> None:
    service = Service(tmp_path, concurrency=1, max_size=4)

    @service.app.post("/add")
    def add(tasks: Annotated[Tasks, Depends(service.manager.get_tasks)]) -> str:
        return tasks.add_task(service.hold)

    with TestClient(service.app) as client, ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: client.post("/add"), range(40)))
        assert service.rows() == {"running": 1, "pending": 4, "rejected": 35}
        service.go.set()
    codes = Counter(answer.status_code for answer in answers)
    assert codes == {200: 5, 429: 35}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert "'narrow'" in refused.json()["detail"]


@pytest.mark.parametrize("ending", ["answers", "refuses", "breaks"])
def test_the_rejected_row_is_kept_whatever_the_route_makes_of_the_error(tmp_path: Path, ending: str) -> None:
    service = Service(tmp_path, concurrency=1, max_size=1)
    service.manager.runs_tasks = False

    @service.app.post("/add")
    async def add(tasks: Annotated[Tasks, Depends(service.manager.get_tasks)]) -> str:
        tasks.add_task(service.hold)
        try:
            tasks.add_task(service.hold)
        except QueueFullError as error:
            if ending == "refuses":
                raise HTTPException(429, "busy") from error
            if ending == "breaks":
                raise ZeroDivisionError from error
        return "done"

    with TestClient(service.app, raise_server_exceptions=False) as client:
        answer = client.post("/add")
    assert answer.status_code == {"answers": 200, "refuses": 429, "breaks": 500}[ending]
    assert service.rows() == ({"pending": 1, "rejected": 1} if ending == "answers" else {"rejected": 1})


def test_the_loser_of_a_race_for_the_last_place_gets_429_after_its_route_has_returned(tmp_path: Path) -> None:
    service = Service(tmp_path, max_size=1)
    service.manager.runs_tasks = False

    @service.app.post("/add")
    async def add(tasks: Annotated[Tasks, Depends(service.manager.get_tasks)]) -> str:
        task_id = tasks.add_task(service.hold)  # there is a place now
        await service.manager.enqueue(service.hold)  # and this takes it before the route returns
        return task_id

    with TestClient(service.app) as client:
        answer = client.post("/add")
    assert answer.status_code == 429
    assert "'narrow'" in answer.json()["detail"]
    assert service.rows() == {"pending": 1, "rejected": 1}


def test_the_default_queue_is_limited_by_max_size(tmp_path: Path) -> None:
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"), max_size=2)
    manager.runs_tasks = False
    app = FastAPI()
    manager.init_app(app)

    @manager.task
    def job() -> None: ...

    @app.post("/add")
    def add(tasks: Annotated[Tasks, Depends(manager.get_tasks)], background_tasks: BackgroundTasks) -> str:
        assert tasks is background_tasks
        return tasks.add_task(job)

    with TestClient(app) as client:
        assert [client.post("/add").status_code for _ in range(4)] == [200, 200, 429, 429]


# -- names


async def test_an_unknown_queue_name_goes_to_the_default_queue_with_one_warning(
    start_manager: StartManager, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    manager = await start_manager(work.define, queues=narrow(concurrency=1))
    with caplog.at_level(logging.WARNING, "taskflow"):
        ids = [await manager.enqueue(task(manager, "step"), queue="narow") for _ in range(3)]
    assert {(await manager.store.get(task_id)).queue for task_id in ids} == {"default"}
    assert [record.getMessage() for record in caplog.records if "narow" in record.getMessage()] == [
        "queue 'narow' is not declared in TaskManager(queues=...): its tasks go to 'default'"
    ]


# -- what an operator changes


async def test_an_edit_of_a_busy_queue_takes_effect_at_once_upwards_and_downwards(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define, queues=narrow(concurrency=1))
    for _ in range(10):
        await manager.enqueue(task(manager, "hold"))
    await eventually(lambda: work.running == 1)
    edited = await manager.store.edit_queue("narrow", {"concurrency": 4}, "ann", "more")
    assert (edited.concurrency, edited.max_size) == (4, None)
    await eventually(lambda: work.running == 4, 2)
    await manager.store.edit_queue("narrow", {"concurrency": 2})
    work.go.set()
    await eventually(lambda: len(work.order) == 10)
    assert work.most == 4
    await eventually(lambda: work.running == 0)
    work.go.clear()
    work.most = 0
    ids = [await manager.enqueue(task(manager, "step")) for _ in range(8)]
    await asyncio.gather(*(manager.result(task_id, PATIENCE) for task_id in ids))
    assert work.most == 2


async def test_an_edit_reaches_the_other_instance_at_once(start_manager: StartManager, work: Work) -> None:
    here, there = [await start_manager(work.define, queues=narrow(max_size=1)) for _ in range(2)]
    await here.store.pause_queue("narrow")
    await there.enqueue(task(there, "step"))
    with pytest.raises(QueueFullError):
        await there.enqueue(task(there, "step"))
    await here.store.edit_queue("narrow", {"max_size": 2})
    await there.enqueue(task(there, "step"))
    with pytest.raises(QueueFullError) as refused:
        await there.enqueue(task(there, "step"))
    assert refused.value.limit == 2


async def test_an_edit_and_a_pause_survive_a_restart_until_the_code_declares_something_else(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define, queues=narrow(concurrency=1, max_size=10))
    await manager.store.edit_queue("narrow", {"max_size": 7})
    await manager.store.pause_queue("narrow", "ann", "maintenance")
    await manager.shutdown()
    again = await start_manager(work.define, queues=narrow(concurrency=1, max_size=10))
    now = await state(again)
    assert (now.concurrency, now.max_size, now.paused, now.reason) == (1, 7, True, "maintenance")
    await again.shutdown()
    changed = await start_manager(work.define, queues=narrow(concurrency=2, max_size=10))
    now = await state(changed)
    assert (now.concurrency, now.max_size, now.paused) == (2, 10, True)


async def test_a_paused_queue_takes_tasks_and_starts_none_until_it_is_resumed(
    start_manager: StartManager, work: Work
) -> None:
    manager = await start_manager(work.define, queues=narrow(concurrency=5))
    await manager.enqueue(task(manager, "hold"), "before")
    await eventually(lambda: work.running == 1)
    paused = await manager.store.pause_queue("narrow", "ann", "deploy")
    assert (paused.paused, paused.reason) == (True, "deploy")
    waiting = await manager.enqueue(task(manager, "step"), "after")
    other = await manager.enqueue(task(manager, "step"), "elsewhere", queue="default")
    await manager.result(other, PATIENCE)  # turns were made, and what ran goes on
    assert (await manager.store.get(waiting)).status is TaskStatus.PENDING
    assert work.running == 1
    resumed = await manager.store.resume_queue("narrow", "ann")
    assert (resumed.paused, resumed.reason) == (False, None)
    await manager.result(waiting, 2)
    work.go.set()
    actions = [event.kind for event in await manager.store.events_after(0) if event.actor == "ann"]
    assert actions == ["pause_queue", "resume_queue"]


async def test_a_turn_that_is_rolled_back_leaves_no_stale_limits(
    start_manager: StartManager, work: Work, tmp_path: Path
) -> None:
    here, there = [await start_manager(work.define, queues=narrow(max_size=2)) for _ in range(2)]
    await here.store.pause_queue("narrow")
    with closing(sqlite3.connect(tmp_path / "tasks.db", timeout=5, isolation_level=None)) as connection:
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON taskflow_event WHEN new.kind = 'update_queue' "
            "BEGIN SELECT RAISE(ABORT, 'not now'); END"
        )
        with pytest.raises(IntegrityError, match="not now"):
            await here.store.edit_queue("narrow", {"max_size": 1})
        connection.execute("DROP TRIGGER refuse")
    await there.store.edit_queue("narrow", {"max_size": 3})  # takes the number that the failed edit would have had
    for _ in range(3):
        await here.enqueue(task(here, "step"))
    with pytest.raises(QueueFullError) as refused:
        await here.enqueue(task(here, "step"))
    assert refused.value.limit == 3
