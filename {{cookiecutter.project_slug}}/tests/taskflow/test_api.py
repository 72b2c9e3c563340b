"""The JSON API: shapes, filters, commands, and that nothing a client sends is a 500."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient

from app.taskflow import ManagedBackgroundTasks, TaskAdmin, TaskManager
from app.taskflow import manager as manager_module
from app.taskflow.models import LogEntry, TaskStatus
from app.taskflow.web import records
from app.taskflow.web.records import MOST_SILENT, log_lines

from .web_support import Service, make_manager, service

RECORD = {
    "task_id",
    "func_name",
    "status",
    "created_at",
    "start_time",
    "end_time",
    "duration",
    "retries_used",
    "error",
    "logs",
    "stacktrace",
    "tags",
    "source",
    "priority",
    "executor",
    "queue",
    "run_at",
    "attempt",
    "max_attempts",
    "result",
    "progress",
    "instance",
}


@pytest.fixture
def running() -> Iterator[Service]:
    with service() as running:
        yield running


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    """For questions that change nothing."""
    with service() as shared:
        yield shared


def ids(running: Service, query: str = "") -> list[str]:
    response = running.client.get(f"/tasks{query}")
    assert response.status_code == 200, response.text
    return [row["task_id"] for row in response.json()]


# -- records


def test_a_record_has_the_names_of_the_contract_and_no_arguments(running: Service) -> None:
    task_id = running.run("add_up", 1, 2)
    record = running.client.get(f"/tasks/{task_id}").json()
    assert set(record) == RECORD
    assert record["status"] == "success"
    assert record["result"] == {"sum": 3}
    assert record["tags"] == {"team": "numbers"}
    assert (record["attempt"], record["max_attempts"], record["retries_used"]) == (1, 1, 0)
    assert datetime.fromisoformat(record["created_at"]).utcoffset() == timedelta(0)
    assert record["duration"] >= 0


def test_a_list_leaves_out_logs_and_stacktrace(running: Service) -> None:
    running.run("add_up", 1, 2)
    (row,) = running.client.get("/tasks").json()
    assert set(row) == RECORD - {"logs", "stacktrace"}


def test_arguments_are_shown_where_the_team_allows_it() -> None:
    with service(display_func_args=True) as running:
        task_id = running.run("add_up", 1, b=2)
        for record in (running.client.get(f"/tasks/{task_id}").json(), running.client.get("/tasks").json()[0]):
            assert (record["args"], record["kwargs"]) == ([1], {"b": 2})


def test_logs_are_lines_with_a_separator_before_each_retry(running: Service) -> None:
    record = running.client.get(f"/tasks/{running.run('charge_card', 7)}").json()
    words = [line.partition("Z ")[2] or line for line in record["logs"]]
    said = ["calling the provider", "it said no"]
    assert words == [*said, "--- Retry 1 ---", *said, "--- Retry 2 ---", *said]
    assert datetime.fromisoformat(record["logs"][0].split()[0]).tzinfo is not None
    assert record["error"] == "insufficient funds for order 7"
    assert "Declined" in record["stacktrace"]
    assert record["retries_used"] == 2


def test_events_tell_the_history_in_order(running: Service) -> None:
    events = running.client.get(f"/tasks/{running.run('charge_card', 7)}/events").json()
    assert [event["kind"] for event in events] == [
        "accepted", "started", "retrying", "started", "retrying", "started", "failed",
    ]  # fmt: skip
    assert set(events[0]) == {"seq", "time", "kind", "attempt", "instance", "actor", "detail"}
    assert [event["attempt"] for event in events if event["kind"] == "started"] == [0, 1, 2]
    assert sorted(event["seq"] for event in events) == [event["seq"] for event in events]


def test_logs_continue_after_a_line(running: Service) -> None:
    task_id = running.run("charge_card", 7)
    lines = running.client.get(f"/tasks/{task_id}/logs").json()
    assert set(lines[0]) == {"seq", "time", "level", "attempt", "message", "extra"}
    assert lines[0]["extra"] == {"order": 7}
    assert lines[1]["level"] == "warning"
    assert running.client.get(f"/tasks/{task_id}/logs?after={lines[3]['seq']}").json() == lines[4:]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": (1, {2}), 3: None}, {"a": [1, [2]], "3": None}),
        (float("inf"), "inf"),
        (b"\xff", "/w=="),
        (datetime(2026, 1, 1, tzinfo=UTC), "2026-01-01T00:00:00+00:00"),
        (Path("/a"), "/a"),
        (10**40, 10**40),
    ],
)
def test_a_value_that_json_has_no_word_for_is_shown_as_plain_json(value: object, shown: object) -> None:
    assert records.plain(value) == shown


def test_a_lone_surrogate_does_not_break_the_answer() -> None:
    assert records.Json({"a": "\ud800"}).body == b'{"a":"?"}'


# -- lists


def test_pages_follow_the_link_header_and_meet_every_task_once(running: Service) -> None:
    added = [running.run("add_up", n, n) for n in range(5)]
    seen: list[str] = []
    address: str | None = "/tasks?limit=2&func_name=add_up"
    while address:
        response = running.client.get(address)
        seen += [row["task_id"] for row in response.json()]
        address = response.links.get("next", {}).get("url")
    assert seen == added[::-1]


def test_filters_must_all_hold(running: Service) -> None:
    good = running.run("add_up", 1, 2, tags={"tenant": "acme:eu"})
    bad = running.run("charge_card", 7)
    later = running.add("add_up", 3, 4, delay_seconds=600)
    assert ids(running, "?status=failed") == [bad]
    assert ids(running, "?status=failed&status=success") == [bad, good]
    assert ids(running, "?status=pending") == [later]
    assert ids(running, "?func_name=add_up&status=success") == [good]
    assert ids(running, "?queue=billing") == [bad]
    assert ids(running, "?tag=tenant:acme:eu") == [good]
    assert ids(running, "?tag=team:numbers&tag=tenant:acme:eu") == [good]
    assert ids(running, "?source=scheduled") == []
    assert ids(running, "?source=manual&q=insufficient") == [bad]
    assert ids(running, f"?q={good[:18]}")[-1] == good
    assert ids(running, "?since=1h") == [later, bad, good]
    assert ids(running, "?until=1h") == []
    assert ids(running, "?since=2020-01-01T00:00:00Z&until=2020-01-02") == []
    assert ids(running, "?since=2020-01-01T00:00:00+02:00") == [later, bad, good]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=501",
        "limit=x",
        "status=done",
        "source=else",
        "tag=alone",
        "tag=:x",
        "since=yesterday",
        "since=5y",
        "until=999999d",
        "before=1",
        "before=x_y",
        "before=99999999999999999999_x",
        "q=%00",
        "func_name=%00",
        "q=" + "x" * 600,
        "unknown=1",
        "&".join(f"tag=a:{n}" for n in range(50)),
    ],
)
def test_a_query_that_is_not_understood_is_422(shared: Service, query: str) -> None:
    response = shared.client.get(f"/tasks?{query}")
    assert response.status_code == 422
    assert response.json()["detail"]


def test_the_list_is_at_the_path_with_and_without_a_slash(shared: Service) -> None:
    assert shared.client.get("/tasks/", follow_redirects=True).json() == shared.client.get("/tasks").json() == []


# -- one task


@pytest.mark.parametrize(
    "task_id", ["0192f3c1-5c0e-7a53-9d5f-0f6a8f110000", "no-such-id", "%00", "x" * 5_000, "%F0%9F%8E%89", "a'b"]
)
@pytest.mark.parametrize("route", ["GET ", "GET /events", "GET /logs", "POST /cancel", "POST /retry"])
def test_an_unknown_id_is_404(shared: Service, task_id: str, route: str) -> None:
    method, _, rest = route.partition(" ")
    response = shared.client.request(method, f"/tasks/{task_id}{rest}")
    assert response.status_code == 404
    assert response.json()["detail"]


def test_a_cancelled_pending_task_is_terminal_and_says_who_did_it(running: Service) -> None:
    task_id = running.add("add_up", 1, 2, delay_seconds=60)
    answer = running.client.post(f"/tasks/{task_id}/cancel")
    assert answer.status_code == 200
    assert (answer.json()["task_id"], answer.json()["task"]["status"]) == (task_id, "cancelled")
    assert running.client.post(f"/tasks/{task_id}/cancel").status_code == 400
    assert running.client.get(f"/tasks/{task_id}/events").json()[-1]["actor"] == "anonymous"


def test_a_running_task_is_cancelled(running: Service) -> None:
    task_id = running.add("wait_for_gate")
    wait_until(running, task_id, "running")
    assert running.client.post(f"/tasks/{task_id}/cancel").status_code == 200
    assert running.client.get(f"/tasks/{running.ended(task_id)}").json()["status"] == "cancelled"


def test_a_failed_task_is_retried_under_its_id(running: Service) -> None:
    task_id = running.run("charge_card", 7)
    answer = running.client.post(f"/tasks/{task_id}/retry")
    assert answer.status_code == 200
    assert answer.json()["task_id"] == task_id
    assert running.client.get(f"/tasks/{running.ended(task_id)}").json()["attempt"] == 6


def test_a_successful_task_cannot_be_retried_nor_cancelled(running: Service) -> None:
    task_id = running.run("add_up", 1, 2)
    for command in ("retry", "cancel"):
        response = running.client.post(f"/tasks/{task_id}/{command}")
        assert response.status_code == 400
        assert "success" in response.json()["detail"]


def test_a_task_whose_function_is_gone_cannot_be_retried_here(tmp_path: Path) -> None:
    location = str(tmp_path / "tasks.db")
    with service(manager=make_manager_at(location)) as running:
        task_id = running.run("charge_card", 7)
    with service(manager=TaskManager(snapshot_db=location)) as running:
        assert running.client.post(f"/tasks/{task_id}/retry").status_code == 409
        assert running.client.get(f"/tasks/{task_id}").json()["status"] == "failed"


# -- the process


def test_metrics_count_every_status(running: Service) -> None:
    running.run("add_up", 1, 2)
    running.run("charge_card", 7)
    running.add("add_up", 1, 2, delay_seconds=60)
    found = running.client.get("/tasks/metrics").json()
    assert set(found) == {"total", "success_rate", "avg_duration_seconds", *TaskStatus}
    assert (found["total"], found["success"], found["failed"], found["pending"]) == (3, 1, 1, 1)
    assert found["success_rate"] == 0.5


@pytest.mark.parametrize(
    ("accept", "text"),
    [
        ("text/plain", True),
        ("text/*", True),
        ("application/json;q=0.5, text/plain", True),
        ("text/plain;q=0.1, application/json; q=0.9", False),
        ("text/plain;q=0, application/json", False),
        ("text/plain;q=0", False),
        ("application/*, text/plain", False),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
        ("application/json", False),
        ("*/*", False),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
    ],
)
def test_metrics_are_prometheus_text_for_those_who_ask(shared: Service, accept: str, text: bool) -> None:
    response = shared.client.get("/tasks/metrics", headers={"accept": accept})
    kinds = ("text/plain", "application/openmetrics-text") if text else ("application/json",)
    assert response.headers["content-type"].startswith(kinds)


def test_instances_show_this_process(running: Service) -> None:
    running.run("add_up", 1, 2)
    (found,) = running.client.get("/tasks/instances").json()
    assert set(found) == {"id", "host", "pid", "version", "started", "heartbeat", "slots", "running"}
    assert found["id"] == running.manager.instance_id


def test_health_and_readiness_of_a_service_that_works(running: Service) -> None:
    running.run("add_up", 1, 2)
    assert running.client.get("/tasks/health").status_code == 200
    assert running.client.get("/tasks/ready").status_code == 200


def test_a_service_whose_disk_is_full_is_healthy_but_not_ready_until_it_is_not(running: Service) -> None:
    with running.disk_full():
        response = running.client.get("/tasks/ready")
        assert response.status_code == 503
        assert "disk full" in response.json()["detail"]
        assert response.headers["retry-after"]
        assert running.client.get("/tasks/health").status_code == 200
    running.run("add_up", 1, 2)
    assert running.client.get("/tasks/ready").status_code == 200


def test_a_service_whose_writer_stands_still_is_not_ready(running: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "STANDSTILL", 0.0)
    response = running.client.get("/tasks/ready")
    assert response.status_code == 503
    assert "stands still" in response.json()["detail"]


def test_a_service_that_was_not_started_is_not_ready_and_answers_503() -> None:
    app = FastAPI()
    manager = make_manager_at(None)
    TaskAdmin(app, manager)
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get("/tasks/ready").status_code == 503
    for method, address in (("GET", "/tasks"), ("GET", "/tasks/metrics"), ("POST", f"/tasks/{uuid4()}/cancel")):
        response = client.request(method, address)
        assert response.status_code == 503, address
        assert response.headers["retry-after"] == "2"


def test_a_backend_that_is_away_is_503_and_not_ready(tmp_path: Path) -> None:
    manager = make_manager_at(str(tmp_path / "missing" / "tasks.db"))
    with service(manager=manager) as running:
        for address in ("/tasks", "/tasks/metrics", "/tasks/instances", f"/tasks/{uuid4()}", "/tasks/ready"):
            response = running.client.get(address)
            assert response.status_code == 503, address
            assert response.headers["retry-after"]


def test_routes_are_in_openapi_and_pages_are_not(shared: Service) -> None:
    paths = shared.client.get("/openapi.json").json()["paths"]
    assert {"/tasks", "/tasks/{task_id}", "/tasks/{task_id}/retry", "/tasks/metrics"} <= set(paths)
    assert not [path for path in paths if "dashboard" in path or "auth" in path]


def test_another_path_moves_everything() -> None:
    with service(path="/admin/jobs") as running:
        task_id = running.run("add_up", 1, 2)
        assert running.client.get(f"/admin/jobs/{task_id}").status_code == 200
        assert running.client.get("/admin/jobs/dashboard").status_code == 200
        assert running.client.get("/tasks").status_code == 404


def test_auto_install_manages_the_apps_routes_and_not_our_own() -> None:
    manager = make_manager_at(None)
    add_up = manager.registry.named("add_up").function
    app = FastAPI()

    @app.post("/before")
    def before(background_tasks: BackgroundTasks) -> str:
        return str(background_tasks.add_task(add_up, 1, 2))  # type: ignore[func-returns-value]

    TaskAdmin(app, manager, auto_install=True)

    @app.post("/after")
    async def after(background_tasks: ManagedBackgroundTasks) -> str:
        return background_tasks.add_task(add_up, 3, 4)

    calls: list[object] = []
    with TestClient(app) as client:  # which spares those that bring no tasks
        app.dependency_overrides[manager.get_tasks] = lambda: calls.append(1)
        client.get("/tasks/health")
        client.get("/tasks/dashboard")
        assert calls == []
        app.dependency_overrides.clear()
        for route in ("/before", "/after"):
            task_id = client.post(route).json()
            assert client.get(f"/tasks/{task_id}").json()["task_id"] == task_id


def make_manager_at(location: str | None) -> TaskManager:
    return make_manager(threading.Event(), snapshot_db=location)


def wait_until(running: Service, task_id: str, status: str) -> None:
    """Until the task has that status; a turn takes milliseconds."""
    deadline = datetime.now(UTC) + timedelta(seconds=10)
    while running.client.get(f"/tasks/{task_id}").json()["status"] != status:
        assert datetime.now(UTC) < deadline, f"{task_id} did not become {status}"


def test_an_attempt_that_logged_nothing_has_its_separator_too() -> None:
    def entry(attempt: int, message: str) -> LogEntry:
        return LogEntry(1, "id", datetime(2026, 1, 1, tzinfo=UTC), "info", attempt, message, {})

    said = log_lines([entry(0, "one"), entry(2, "two")], 4)
    words = [line.partition("Z ")[2] or line for line in said]
    assert words == ["one", "--- Retry 1 ---", "--- Retry 2 ---", "two", "--- Retry 3 ---"]
    assert log_lines([], 1) == []
    assert len(log_lines([], 1_000_000)) == MOST_SILENT
