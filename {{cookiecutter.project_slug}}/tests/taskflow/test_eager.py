"""Eager tasks: accepted and started while the route still runs."""

import asyncio
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient

from app.taskflow import ManagedBackgroundTasks, QueueConfig, TaskAdmin, TaskManager

from .helpers import PATIENCE


def touch(file: str) -> None:
    """Its worker process finds it here."""
    Path(file).touch()


class Service:
    """An app whose tasks touch a file when they start."""

    def __init__(self, folder: Path, *, eager: bool = False, **options: Any) -> None:
        self.file, self.folder = folder / "tasks.db", folder
        self.manager = TaskManager(snapshot_db=str(self.file), max_process_workers=1, **options)
        self.app = FastAPI()
        TaskAdmin(self.app, self.manager)

        @self.manager.task(name="async", eager=eager)
        async def touch_async(file: str) -> None:
            touch(file)

        @self.manager.task(name="thread", eager=eager)
        def touch_thread(file: str) -> None:
            touch(file)

        self.manager.task(name="process", executor="process", eager=eager)(touch)

    def task(self, name: str) -> Callable[..., Any]:
        return self.manager.registry.named(name).function

    @property
    def tasks(self) -> Any:
        return Depends(self.manager.get_tasks)

    def mark(self, name: str = "started") -> str:
        return str(self.folder / name)

    def stored(self) -> Counter[str]:
        """Status -> number of tasks, read past the engine."""
        with closing(sqlite3.connect(self.file, timeout=5)) as connection:
            return Counter(status for (status,) in connection.execute("SELECT status FROM taskflow_task"))

    @contextmanager
    def client(self) -> Iterator[TestClient]:
        with TestClient(self.app, raise_server_exceptions=False) as client:
            yield client
            wait_until(lambda: set(self.stored()) <= {"success", "rejected"})


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = monotonic() + 2 * PATIENCE  # a worker process may have to start
    while not (value := condition()):
        assert monotonic() < deadline, condition
        sleep(0.01)
    return value


@pytest.mark.parametrize(
    ("executor", "by"),
    [("async", "decorator"), ("async", "call"), ("thread", "decorator"), ("thread", "call"), ("process", "call")],
)
def test_an_eager_task_starts_while_its_route_still_runs(tmp_path: Path, executor: str, by: str) -> None:
    service = Service(tmp_path, eager=by == "decorator")
    options: dict[str, Any] = {"eager": True} if by == "call" else {}
    started = Path(service.mark("one")), Path(service.mark("other"))

    @service.app.post("/def")
    def add(tasks: Annotated[ManagedBackgroundTasks, service.tasks]) -> str:
        task_id = tasks.add_task(service.task(executor), str(started[0]), **options)
        wait_until(started[0].exists)
        return task_id

    @service.app.post("/async")
    async def add_async(tasks: Annotated[ManagedBackgroundTasks, service.tasks]) -> str:
        task_id = tasks.add_task(service.task(executor), str(started[1]), **options)
        async with asyncio.timeout(PATIENCE):
            while not started[1].exists():
                await asyncio.sleep(0.01)
        return task_id

    with service.client() as client:
        answers = [client.post("/def"), client.post("/async")]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len({answer.json() for answer in answers}) == 2
    assert service.stored() == {"success": 2}


def test_a_task_that_is_not_eager_waits_for_its_route(tmp_path: Path) -> None:
    """What shows that the test above could fail."""
    service = Service(tmp_path, eager=True)
    seen: list[bool] = []

    @service.app.post("/add")
    def add(tasks: Annotated[ManagedBackgroundTasks, service.tasks]) -> None:
        tasks.add_task(service.task("thread"), service.mark("lazy"), eager=False)
        tasks.add_task(service.task("thread"), service.mark("eager"))
        wait_until(Path(service.mark("eager")).exists)
        seen.append(Path(service.mark("lazy")).exists())

    with service.client() as client:
        assert client.post("/add").status_code == 200
    assert seen == [False]
    assert service.stored() == {"success": 2}


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(
    ("error", "status"), [(ZeroDivisionError("bug"), 500), (HTTPException(418, "teapot"), 418)], ids=["bug", "http"]
)
def test_a_route_that_raises_afterwards_does_not_undo_it(
    tmp_path: Path, kind: str, error: Exception, status: int
) -> None:
    service = Service(tmp_path)

    def add(tasks: Annotated[ManagedBackgroundTasks, service.tasks]) -> None:
        tasks.add_task(service.task("thread"), service.mark("dropped"))
        tasks.add_task(service.task("thread"), service.mark("kept"), eager=True)
        raise error

    async def add_async(tasks: Annotated[ManagedBackgroundTasks, service.tasks]) -> None:
        add(tasks)

    service.app.post("/add")(add if kind == "def" else add_async)
    with service.client() as client:
        assert client.post("/add").status_code == status
        wait_until(Path(service.mark("kept")).exists)
    assert service.stored() == {"success": 1}
    assert not Path(service.mark("dropped")).exists()


def test_an_eager_task_is_accepted_once_and_before_the_answer(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.manager.runs_tasks = False

    @service.app.post("/add")
    async def add(tasks: Annotated[ManagedBackgroundTasks, service.tasks]) -> list[str]:
        task = service.task("async")
        return [tasks.add_task(task, "file", eager=number % 2 == 0) for number in range(10)]

    with TestClient(service.app) as client:
        ids = client.post("/add").json()
        assert service.stored() == {"pending": 10}
    assert len(set(ids)) == 10


def test_a_delayed_eager_task_is_accepted_at_once_and_starts_when_its_time_has_come(tmp_path: Path) -> None:
    service = Service(tmp_path)
    mark = Path(service.mark())

    @service.app.post("/add")
    def add(tasks: Annotated[ManagedBackgroundTasks, service.tasks]) -> bool:
        tasks.add_task(service.task("thread"), str(mark), eager=True, delay_seconds=0.4)
        wait_until(lambda: service.stored() == {"delayed": 1})
        return mark.exists()

    with service.client() as client:
        assert client.post("/add").json() is False
    assert mark.exists()


@pytest.mark.usefixtures("quick_refusals")
def test_while_the_database_is_away_the_answer_is_503_and_nothing_runs(tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    service = Service(folder, eager=True)

    @service.app.post("/add")
    def add(tasks: Annotated[ManagedBackgroundTasks, service.tasks]) -> str:
        return tasks.add_task(service.task("thread"), str(tmp_path / "started"))

    with service.client() as client:
        answer = client.post("/add")
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        folder.mkdir()
        wait_until(lambda: client.get("/tasks/ready").status_code == 200)
        assert service.stored() == {}
        assert not (tmp_path / "started").exists()
        assert client.post("/add").status_code == 200
    assert (tmp_path / "started").exists()


def test_an_eager_task_that_finds_its_queue_full_is_429_and_visible(tmp_path: Path) -> None:
    service = Service(tmp_path, queues={"narrow": QueueConfig(concurrency=1, max_size=1)})
    go = threading.Event()

    @service.manager.task(queue="narrow", eager=True)
    def hold() -> None:
        go.wait(PATIENCE)

    @service.app.post("/add")
    def add(tasks: Annotated[ManagedBackgroundTasks, service.tasks]) -> str:
        return tasks.add_task(hold)

    with service.client() as client:
        answers = [client.post("/add").status_code for _ in range(4)]
        go.set()
    assert answers == [200, 200, 429, 429]
    assert service.stored() == {"success": 2, "rejected": 2}
