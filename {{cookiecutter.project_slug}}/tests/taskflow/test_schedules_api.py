"""Schedules and one-offs over HTTP: what is shown, what operators do, who did it, and bad input."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pytest

from app.taskflow import TaskManager
from app.taskflow.testing import advance, drain

from .web_support import Service, service

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ODD_NAMES = ["a/b", "pause", "x/run", "x/resume/", "ü ?#%", "a b", "/", "'; --", "\N{PARTY POPPER}", "a\n", "a"]
FIELDS = "name func_name trigger timezone next_run last_run last_status last_task_id paused reason overlap misfire"


def make_manager(*names: str, **options: Any) -> TaskManager:
    manager = TaskManager(**options)
    manager.clock.freeze(NOON)
    for name in names:

        @manager.schedule(every=60, name=name)
        async def job() -> None: ...

    @manager.schedule(cron="0 2 * * *", timezone="Europe/London", overlap=False, misfire="all")
    async def nightly() -> None: ...

    @manager.task
    async def remind(who: str) -> None: ...

    return manager


@pytest.fixture
def running() -> Iterator[Service]:
    with service(manager=make_manager("job")) as running:
        yield running


def pass_time(running: Service, seconds: float) -> None:
    running.client.portal.call(advance, running.manager, seconds)  # type: ignore[union-attr]


def schedules(running: Service) -> dict[str, dict[str, Any]]:
    return {schedule["name"]: schedule for schedule in running.client.get("/tasks/schedules").json()}


def audit(running: Service) -> list[tuple[str, str | None, dict[str, Any]]]:
    entries = running.client.get("/tasks/audit").json()
    return [(entry["action"], entry["task_id"], entry["detail"]) for entry in entries]


def address(name: str, command: str) -> str:
    return f"/tasks/schedules/{quote(name, safe='')}/{command}"


# -- schedules


def test_schedules_are_shown_with_their_last_and_next_run(running: Service) -> None:
    pass_time(running, 90)
    shown = schedules(running)
    assert list(shown) == ["job", "nightly"]
    assert shown["job"].keys() == set(FIELDS.split())
    task_id = shown["job"].pop("last_task_id")
    assert shown["job"] == {
        "name": "job",
        "func_name": "job",
        "trigger": "every 60 s",
        "timezone": "UTC",
        "next_run": "2026-03-01T12:02:00+00:00",
        "last_run": "2026-03-01T12:01:00+00:00",
        "last_status": "success",
        "paused": False,
        "reason": None,
        "overlap": True,
        "misfire": "once",
    }
    nightly = shown["nightly"]
    assert (nightly["trigger"], nightly["timezone"]) == ("0 2 * * *", "Europe/London")
    assert (nightly["overlap"], nightly["misfire"], nightly["last_run"]) == (False, "all", None)
    assert running.client.get(f"/tasks/{task_id}").json()["source"] == "scheduled"
    assert [task["task_id"] for task in running.client.get("/tasks?source=scheduled").json()] == [task_id]


def test_a_schedule_is_run_now(running: Service) -> None:
    answer = running.client.post("/tasks/schedules/nightly/run")
    assert answer.status_code == 200
    task_id = answer.json()["task_id"]
    assert answer.json()["last_task_id"] == task_id
    running.client.portal.call(drain, running.manager)  # type: ignore[union-attr]
    shown = schedules(running)["nightly"]
    assert (shown["last_task_id"], shown["last_status"]) == (task_id, "success")
    assert audit(running) == [("run_schedule", task_id, {"schedule": "nightly"})]


def test_a_schedule_is_paused_with_a_reason_and_resumed(running: Service) -> None:
    paused = running.client.post("/tasks/schedules/job/pause", json={"reason": "deploy"}).json()
    assert (paused["paused"], paused["reason"], paused["next_run"]) == (True, "deploy", None)
    pass_time(running, 300)
    assert schedules(running)["job"]["last_run"] is None
    resumed = running.client.post("/tasks/schedules/job/resume").json()
    assert (resumed["paused"], resumed["reason"], resumed["next_run"]) == (False, None, "2026-03-01T12:06:00+00:00")
    pass_time(running, 60)
    assert schedules(running)["job"]["last_run"] == "2026-03-01T12:06:00+00:00"
    assert [(action, detail["note"]) for action, _, detail in audit(running)] == [
        ("resume_schedule", None),
        ("pause_schedule", "deploy"),
    ]


@pytest.mark.parametrize("command", ["run", "pause", "resume"])
@pytest.mark.parametrize("name", ["nobody", "%00", "x" * 5_000, "a%2Fb", "%ED%A0%80", "", "job%20", "JOB"])
def test_an_unknown_schedule_is_404(running: Service, name: str, command: str) -> None:
    answer = running.client.post(f"/tasks/schedules/{name}/{command}")
    assert answer.status_code in (404, 405) if name == "" else answer.status_code == 404
    assert "detail" in answer.json()


def test_a_schedule_may_have_any_name() -> None:
    with service(manager=make_manager(*ODD_NAMES)) as running:
        for name in ODD_NAMES:
            for command in ("pause", "resume", "run"):
                assert running.client.post(address(name, command)).json()["name"] == name, (name, command)
        assert schedules(running).keys() >= set(ODD_NAMES)


def test_a_schedule_that_left_the_code_is_shown_and_cannot_be_run(tmp_path: Any) -> None:
    file = str(tmp_path / "tasks.db")
    with service(manager=make_manager("old", snapshot_db=file)) as running:
        pass_time(running, 60)
    with service(manager=make_manager(snapshot_db=file)) as running:
        old = schedules(running)["old"]
        assert (old["next_run"], old["last_status"]) == (None, "success")
        refused = running.client.post("/tasks/schedules/old/run")
        assert (refused.status_code, "'old'" in refused.json()["detail"]) == (409, True)
        assert running.client.post("/tasks/schedules/old/pause").json()["paused"]


@pytest.mark.parametrize("body", [[], "text", {"reason": 1}, {"other": "x"}, {"reason": "a\0b"}])
def test_a_pause_that_is_not_understood_is_422(running: Service, body: Any) -> None:
    assert running.client.post("/tasks/schedules/job/pause", json=body).status_code == 422
    assert not schedules(running)["job"]["paused"]


# -- one-offs


def test_one_offs_are_shown_soonest_first_and_cancelled_by_their_key(running: Service) -> None:
    later = running.once("remind", "ann", run_key="order/7", seconds=7_200)
    sooner = running.once("remind", "bob", run_key="order/8", seconds=3_600)
    shown = running.client.get("/tasks/scheduled").json()
    assert [item["task_id"] for item in shown] == [sooner, later]
    assert shown[1] == {
        "run_key": "order/7",
        "task_id": later,
        "func_name": "remind",
        "fire_at": "2026-03-01T14:00:00+00:00",
        "queue": "default",
        "priority": None,
        "tags": {},
        "created_at": "2026-03-01T12:00:00+00:00",
    }
    answer = running.client.delete("/tasks/scheduled/order%2F7")
    assert (answer.status_code, answer.json()) == (200, {"run_key": "order/7", "cancelled": True})
    assert [item["run_key"] for item in running.client.get("/tasks/scheduled").json()] == ["order/8"]
    assert running.client.get(f"/tasks/{later}").json()["status"] == "cancelled"
    assert audit(running) == [("cancel_scheduled", later, {"run_key": "order/7"})]


@pytest.mark.parametrize("key", ["nobody", "%00", "x" * 5_000, "a%2Fb", "%ED%A0%80", "order%2F7%20", "order%2F7%0A"])
def test_a_key_under_which_nothing_waits_is_404(running: Service, key: str) -> None:
    running.once("remind", "ann", run_key="order/7")
    assert running.client.delete(f"/tasks/scheduled/{key}").status_code == 404
    assert len(running.client.get("/tasks/scheduled").json()) == 1


def test_a_key_may_hold_anything(running: Service) -> None:
    for key in ODD_NAMES:
        running.once("remind", "ann", run_key=key)
    for key in ODD_NAMES:
        assert running.client.delete(f"/tasks/scheduled/{quote(key, safe='')}").json()["run_key"] == key
    assert running.client.get("/tasks/scheduled").json() == []


def test_the_list_of_one_offs_has_pages(running: Service) -> None:
    for number in range(7):
        running.once("remind", "ann", run_key=f"key-{number}", seconds=3_600 + number // 3)
    seen: list[str] = []
    address: str | None = "/tasks/scheduled?limit=3"
    while address is not None:
        answer = running.client.get(address)
        seen += [item["run_key"] for item in answer.json()]
        link = answer.headers.get("link")
        address = link.partition(">")[0].lstrip("<") if link else None
    assert sorted(seen) == [f"key-{number}" for number in range(7)]
    assert len(running.client.get("/tasks/scheduled").json()) == 7


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "after=x", "after=1", "other=1", "limit=ten"])
def test_a_query_that_is_not_understood_is_422(running: Service, query: str) -> None:
    assert running.client.get(f"/tasks/scheduled?{query}").status_code == 422


# -- who may


ROUTES = [
    ("GET", "/tasks/schedules"),
    ("POST", "/tasks/schedules/job/run"),
    ("POST", "/tasks/schedules/job/pause"),
    ("POST", "/tasks/schedules/job/resume"),
    ("GET", "/tasks/scheduled"),
    ("DELETE", "/tasks/scheduled/key"),
]


def test_without_a_session_nothing_is_shown_or_done() -> None:
    with service(manager=make_manager("job"), auth=("ada", "lovelace"), secret_key="a key of the team") as running:
        assert {running.client.request(method, path).status_code for method, path in ROUTES} == {401}
        running.client.post("/tasks/auth/login", data={"username": "ada", "password": "lovelace"})
        running.client.post("/tasks/schedules/job/pause")
        entry = next(e for e in running.client.get("/tasks/audit").json() if e["action"] == "pause_schedule")
        assert entry["actor"] == "ada"


def test_another_site_s_page_changes_nothing(running: Service) -> None:
    for method, path in ROUTES:
        if method != "GET":
            answer = running.client.request(method, path, headers={"Sec-Fetch-Site": "cross-site"})
            assert answer.status_code == 403, path


def test_a_backend_that_is_away_is_503(running: Service, quick_refusals: None) -> None:
    running.once("remind", "ann", run_key="key")
    with running.disk_full():
        for method, path in ROUTES:
            answer = running.client.request(method, path)
            assert answer.status_code == (200 if method == "GET" else 503), path
        assert "retry-after" in answer.headers


def test_a_full_queue_refuses_a_run_by_hand() -> None:
    manager = make_manager("job", max_size=1)
    with service(manager=manager) as running:
        running.client.post("/tasks/queues/default/pause")
        running.once("remind", "ann", run_key="key", seconds=0)
        assert running.client.post("/tasks/schedules/job/run").status_code == 429


def test_routes_of_schedules_are_described(running: Service) -> None:
    paths = running.client.get("/openapi.json").json()["paths"]
    assert {
        "/tasks/schedules", "/tasks/schedules/{name}/run", "/tasks/schedules/{name}/pause",
        "/tasks/schedules/{name}/resume", "/tasks/scheduled", "/tasks/scheduled/{run_key}",
    } <= set(paths)  # fmt: skip
