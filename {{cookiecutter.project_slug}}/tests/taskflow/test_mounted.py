"""A task system on a mounted app works, or says what to do. And what clients are told of options that cannot be."""

from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient

from app.taskflow import TaskAdmin, TaskManager


def job() -> None: ...


def inner_app(manager: TaskManager) -> FastAPI:
    app = FastAPI()
    TaskAdmin(app, manager, auto_install=True)
    manager.task(job)

    @app.post("/add")
    def add(tasks: BackgroundTasks, options: dict[str, Any]) -> str | None:
        return tasks.add_task(job, **options)  # type: ignore[func-returns-value]

    return app


def test_a_mounted_app_says_that_its_tasks_are_not_started() -> None:
    outer = FastAPI()
    outer.mount("/inner", inner_app(TaskManager()))
    with TestClient(outer, client=("127.0.0.1", 5000)) as client:
        answer = client.post("/inner/add", json={})
    assert answer.status_code == 503
    assert "init_app(outer_app)" in answer.json()["detail"]


def test_a_mounted_app_works_within_the_lifespan_of_the_outer_one() -> None:
    manager, outer = TaskManager(), FastAPI()
    outer.mount("/inner", inner_app(manager))
    manager.init_app(outer)
    with TestClient(outer, base_url="http://localhost", client=("127.0.0.1", 5000)) as client:
        task_id = client.post("/inner/add", json={}).json()
        assert client.get(f"/inner/tasks/{task_id}").json()["func_name"] == "job"
        assert "/inner/tasks" in client.get("/inner/tasks/dashboard").text


@pytest.mark.parametrize(
    "options",
    [
        {"delay_seconds": "soon"},
        {"delay_seconds": -1},
        {"run_at": "2030-01-01"},
        {"priority": "high"},
        {"priority": 2**40},
        {"tags": 5},
        {"idempotency_key": {}},
        {"queue": 5},
    ],
)
def test_an_option_that_a_client_gave_and_that_cannot_be_is_422(options: dict[str, Any]) -> None:
    with TestClient(inner_app(TaskManager())) as client:
        answer = client.post("/add", json=options)
    assert answer.status_code == 422
    assert next(iter(options)) in answer.json()["detail"]
