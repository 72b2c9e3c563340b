"""What is shown has a size: lists show the beginning of long values, a task's own page and answer show them whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.taskflow import TaskAdmin, TaskManager, TaskStatus, task_log
from app.taskflow.texts import MORE

from .helpers import eventually

KEY = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="


@contextmanager
def service(file: Path, **options: Any) -> Iterator[tuple[TestClient, Any]]:
    """A client of a service whose one task returns what it gets, and a function that runs one."""
    manager = TaskManager(snapshot_db=str(file), **options)

    @manager.task
    def echo(*values: Any, lines: int = 0, **named: Any) -> Any:
        for number in range(lines):
            task_log(f"{number}:{'x' * 9_000}", number=number)
        return values[0] if values else None

    app = FastAPI()
    TaskAdmin(app, manager, display_func_args=True)
    with TestClient(app, client=("127.0.0.1", 1), base_url="http://127.0.0.1") as client:

        async def run(*args: Any, **kwargs: Any) -> str:
            task_id = await manager.enqueue(echo, *args, **kwargs)

            async def ended() -> bool:
                return (await manager.store.get(task_id)).status is TaskStatus.SUCCESS

            await eventually(ended)
            return task_id

        def call(*args: Any, **kwargs: Any) -> str:
            assert client.portal is not None
            return client.portal.call(lambda: run(*args, **kwargs))

        yield client, call


def test_a_list_shows_the_beginning_of_long_arguments_and_the_task_shows_them_whole(tmp_path: Path) -> None:
    long = "x" * 300_000
    with service(tmp_path / "tasks.db") as (client, call):
        text, nested = call(long, "y"), call("a", rows=[[number, "z" * 50] for number in range(5_000)])
        short = call({"a": [1, None]}, b="c")
        answer = client.get("/tasks")
        assert len(answer.content) < 50_000
        listed = {row["task_id"]: row for row in answer.json()}
        assert (listed[short]["args"], listed[short]["kwargs"]) == ([{"a": [1, None]}], {"b": "c"})
        [cut] = listed[text]["args"]
        assert (cut[:5], cut[-1], listed[text]["kwargs"]) == ("xxxxx", MORE, {})
        assert listed[nested]["args"] == ["a"]
        assert listed[nested]["kwargs"]["rows"][0] == [0, "z" * 50]
        assert MORE in str(listed[nested]["kwargs"])
        assert client.get(f"/tasks/{text}").json()["args"] == [long, "y"]
        assert client.get(f"/tasks/{nested}").json()["kwargs"]["rows"][-1] == [4_999, "z" * 50]
        assert "yyy" not in client.get("/tasks/dashboard/tasks").text


@pytest.mark.parametrize("options", [{}, {"encrypt_args_key": KEY}], ids=["plain", "sealed"])
def test_a_list_shows_the_beginning_of_a_long_result(tmp_path: Path, options: dict[str, Any]) -> None:
    with service(tmp_path / "tasks.db", **options) as (client, call):
        task_id = call(["r" * 100] * 500)
        [row] = client.get("/tasks").json()
        assert (row["result"][0], row["result"][-1][-1]) == ("r" * 100, MORE)
        assert len(str(row["result"])) < 10_000
        assert client.get(f"/tasks/{task_id}").json()["result"] == ["r" * 100] * 500


def test_more_than_a_million_characters_of_arguments_are_shown_in_part(tmp_path: Path) -> None:
    with service(tmp_path / "tasks.db") as (client, call):
        task_id = call("x" * 3_000_000)
        for address in (f"/tasks/{task_id}", f"/tasks/dashboard/tasks/{task_id}"):
            assert 900_000 < len(client.get(address).content) < 1_200_000


def test_long_logs_are_shown_in_parts_that_lead_to_each_other(tmp_path: Path) -> None:
    with service(tmp_path / "tasks.db") as (client, call):
        task_id = call("a", lines=600)
        assert len(client.get(f"/tasks/{task_id}").content) < 2_200_000
        assert len(client.get(f"/tasks/dashboard/tasks/{task_id}").content) < 2_500_000
        seen: list[int] = []
        after = 0
        while lines := client.get(f"/tasks/{task_id}/logs?after={after}").json():
            seen += [line["extra"]["number"] for line in lines]
            after = lines[-1]["seq"]
        assert seen == list(range(600))
