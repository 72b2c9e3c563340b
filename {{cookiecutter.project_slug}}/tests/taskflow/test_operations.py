"""What operators do to many tasks and to queues, and who did it: shapes, effects, the audit, and bad input."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response
from pydantic import TypeAdapter

from app.taskflow import BackendUnavailable, QueueConfig, TaskAdmin, TaskManager
from app.taskflow.backends import open_backend
from app.taskflow.backends.base import Revoke
from app.taskflow.backends.tables import SCHEMA_VERSION
from app.taskflow.models import EventKind, TaskEvent
from app.taskflow.testing import instant_retries
from app.taskflow.web import auth, records, shapes, visits
from app.taskflow.web.operations import MOST_IDS
from app.taskflow.web.route import LARGEST_BODY

from .helpers import Bench
from .web_support import Service, make_manager, service

ADA: dict[str, Any] = {"auth": ("ada", "lovelace"), "secret_key": "a key of the team"}
ODD_NAMES = [
    "a/b",
    "pause",
    "x/pause",
    "x/resume/",
    "ü ?#%",
    "a b",
    "/",
    "'; --",
    "\N{PARTY POPPER}",
    "a\nb",
    "a",
    "a\n",
]


@pytest.fixture
def running() -> Iterator[Service]:
    with service() as running:
        yield running


@pytest.fixture
def frozen(running: Service) -> Iterator[Service]:
    """Its clock moves only when the test moves it, and retries do not wait for it."""
    running.manager.clock.freeze()
    with instant_retries(running.manager):
        yield running


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    """For requests that change nothing that another test looks at."""
    with service() as shared:
        yield shared


def answer(response: Response, status: int = 200) -> Any:
    assert response.status_code == status, response.text
    return response.json()


def audit(running: Service, query: str = "") -> list[dict[str, Any]]:
    found = answer(running.client.get(f"/tasks/audit{query}"))
    assert isinstance(found, list)
    return found


def actions(running: Service) -> list[tuple[str, str]]:
    return [(entry["action"], entry["actor"]) for entry in audit(running)]


def until(condition: Callable[[], object]) -> None:
    """Returns once the condition holds; fails when it does not in time."""
    deadline = monotonic() + 10
    while not condition():
        assert monotonic() < deadline


def stored_in(location: Path | str | None, **options: Any) -> TaskManager:
    return make_manager(threading.Event(), snapshot_db=location and str(location), **options)


# -- many tasks


def test_a_bulk_retry_runs_again_what_can_be_and_counts_an_id_once(running: Service) -> None:
    failed = [running.run("charge_card", n) for n in range(2)]
    good = running.run("add_up", 1, 2)
    asked = [*failed, failed[0], good, str(uuid4()), "no such id"]
    found = answer(running.client.post("/tasks/bulk-retry", json={"task_ids": asked}))
    same = [{"original_task_id": task_id, "new_task_id": task_id} for task_id in failed]
    assert found == {"dispatched": 2, "skipped": 3, "results": same}
    for task_id in failed:
        running.ended(task_id)
        assert running.client.get(f"/tasks/{task_id}").json()["attempt"] == 6


def test_a_bulk_retry_is_one_entry_of_the_audit(running: Service) -> None:
    failed = [running.run("charge_card", n) for n in range(3)]
    running.client.post("/tasks/bulk-retry", json={"task_ids": [*failed, "unknown"]})
    (entry,) = audit(running)
    assert (entry["action"], entry["task_id"], entry["actor"]) == ("bulk_retry", None, "anonymous")
    assert entry["detail"] == {"task_ids": [*failed, "unknown"], "dispatched": 3, "skipped": 1}
    events = running.client.get(f"/tasks/{failed[0]}/events").json()
    assert "requeued" in [event["kind"] for event in events]
    assert [event["actor"] for event in events if event["actor"]] == []


def test_a_retry_that_keeps_the_original_answers_with_the_new_id() -> None:
    with service(manager=stored_in(None, retry_replaces_original=False)) as running:
        failed = running.run("charge_card", 7)
        found = answer(running.client.post("/tasks/bulk-retry", json={"task_ids": [failed]}))
        (pair,) = found["results"]
        assert pair["original_task_id"] == failed != pair["new_task_id"]
        assert running.client.get(f"/tasks/{running.ended(pair['new_task_id'])}").json()["status"] == "failed"
        one = answer(running.client.post(f"/tasks/{failed}/retry"))
        entry = audit(running)[0]
        assert (entry["action"], entry["task_id"]) == ("retry", failed)
        assert entry["detail"] == {"new_task_id": one["task_id"]}


def test_a_bulk_retry_has_a_limit_of_ids_and_of_bytes(shared: Service) -> None:
    ids = [f"task-{n}" for n in range(MOST_IDS + 1)]
    assert answer(shared.client.post("/tasks/bulk-retry", json={"task_ids": ids[1:]}))["skipped"] == MOST_IDS
    assert answer(shared.client.post("/tasks/bulk-retry", json={"task_ids": ids}), 422)["detail"]
    longest = {"task_ids": [f"{n:0128}" for n in range(MOST_IDS)]}
    assert answer(shared.client.post("/tasks/bulk-retry", json=longest))["skipped"] == MOST_IDS
    huge = b'{"task_ids": ["' + b"x" * LARGEST_BODY + b'"]}'
    headers = {"content-type": "application/json"}
    assert shared.client.post("/tasks/bulk-retry", content=huge, headers=headers).status_code == 413


def test_what_failed_in_a_window_is_retried_by_name(frozen: Service) -> None:
    running = frozen
    old = running.run("charge_card", 1)
    running.manager.clock.advance(7 * 3_600)
    new = running.run("charge_card", 2)
    running.run("add_up", 1, 2)

    def retried(query: str) -> set[str]:
        found = answer(running.client.post(f"/tasks/retry-failed{query}"))
        assert found["dispatched"] == len(found["results"])
        assert found["skipped"] == 0
        return {running.ended(pair["new_task_id"]) for pair in found["results"]}

    assert retried("") == {new}
    assert retried("?since=6h&func_name=charge_card") == {new}
    assert retried("?since=6h&func_name=add_up") == set()
    assert retried("?since=8h") == {old, new}
    assert retried("?since=1d") == {old, new}
    assert retried("?since=all") == {old, new}
    assert [entry["action"] for entry in audit(running)] == ["bulk_retry"] * 6
    assert audit(running)[0]["detail"] == {"since": "all", "func_name": None, "dispatched": 2, "skipped": 0}


@pytest.mark.parametrize(
    "since", ["", "6", "h", "6m", "-1h", "6H", "6h ", "1.5h", "999999d", "9" * 400 + "h", "٣h", "%00"]
)
def test_a_window_that_is_not_understood_is_400(shared: Service, since: str) -> None:
    assert "since" in answer(shared.client.post(f"/tasks/retry-failed?since={since}"), 400)["detail"]


def test_history_deletes_only_what_ended_long_enough_ago(frozen: Service) -> None:
    running = frozen
    old = [running.run("add_up", 1, 2), running.run("charge_card", 7)]
    waiting = running.add("add_up", 1, 2, delay_seconds=86_400)
    rejected = running.add("add_up", 1, 2, delay_seconds=86_400)
    running.client.post(f"/tasks/{rejected}/cancel")
    running.manager.clock.advance(3_600)
    new = running.run("add_up", 3, 4)

    def deleted(query: str) -> int:
        return int(answer(running.client.delete(f"/tasks/history?{query}"))["deleted"])

    assert deleted("value=1&unit=day") == deleted("value=61&unit=min") == 0
    assert deleted("value=1&unit=hour") == 0, "not those that ended exactly then"
    assert deleted("value=59&unit=min") == 3
    assert {task["task_id"] for task in running.client.get("/tasks").json()} == {waiting, new}
    assert running.client.get(f"/tasks/{old[0]}").status_code == 404
    entry = audit(running)[0]
    assert (entry["action"], entry["task_id"], entry["detail"]["deleted"]) == ("delete_history", None, 3)
    before = datetime.fromisoformat(entry["detail"]["before"])
    assert before == running.manager.clock() - timedelta(minutes=59)


def test_deleting_history_does_not_delete_what_people_did(frozen: Service) -> None:
    running = frozen
    task_id = running.add("add_up", 1, 2, delay_seconds=60)
    running.client.post(f"/tasks/{task_id}/cancel")
    running.manager.clock.advance(3_600)
    assert answer(running.client.delete("/tasks/history?value=1&unit=min")) == {"deleted": 1}
    assert [(entry["action"], entry["task_id"]) for entry in audit(running)] == [
        ("delete_history", None),
        ("cancel", task_id),
    ]


@pytest.mark.parametrize(
    "query",
    [
        "",
        "value=1",
        "unit=day",
        "value=0&unit=day",
        "value=-1&unit=day",
        "value=1.5&unit=day",
        "value=x&unit=day",
        "value=1&unit=week",
        "value=1&unit=",
        "value=2147483647&unit=day",
        "value=999999999999999999999999&unit=min",
        f"value={'9' * 5_000}&unit=min",
        "value=%00&unit=min",
    ],
)
def test_a_history_that_is_not_understood_is_422(shared: Service, query: str) -> None:
    assert answer(shared.client.delete(f"/tasks/history?{query}"), 422)["detail"]


# -- queues


def queue(running: Service, name: str) -> dict[str, Any]:
    return next(state for state in answer(running.client.get("/tasks/queues")) if state["name"] == name)


def test_queues_show_their_limits_and_numbers(running: Service) -> None:
    running.run("add_up", 1, 2)
    assert queue(running, "sums") == {
        "name": "sums",
        "concurrency": None,
        "max_size": None,
        "paused": False,
        "reason": None,
        "pending": 0,
        "running": 0,
        "finished": 1,
        "rejected": 0,
    }
    assert [state["name"] for state in answer(running.client.get("/tasks/queues"))] == ["billing", "default", "sums"]


def test_an_edit_changes_what_is_named_and_null_is_unlimited(running: Service) -> None:
    def edit(**change: int | None) -> tuple[Any, Any]:
        found = answer(running.client.patch("/tasks/queues/sums", json=change))
        assert found == queue(running, "sums")
        return found["concurrency"], found["max_size"]

    assert edit(concurrency=3, max_size=5) == (3, 5)
    assert edit(max_size=7) == (3, 7)
    assert edit(concurrency=None) == (None, 7)
    assert edit() == (None, 7)
    assert actions(running) == [("update_queue", "anonymous")] * 3, "an edit of nothing is none"
    assert audit(running)[0]["detail"] == {
        "queue": "sums",
        "before": {"concurrency": 3},
        "after": {"concurrency": None},
        "note": None,
    }


@pytest.mark.parametrize(
    "change",
    [
        *(
            f'{{"{limit}": {value}}}'
            for limit in ("concurrency", "max_size")
            for value in ("0", "-1", "1.5", "2.0", '"3"', "true", "[]", "{}", "NaN", "Infinity", str(2**31), "9" * 400)
        ),
        '{"concurrency": ' + "9" * 5_000 + "}",
        '{"concurency": 1}',
        '{"\\ud800": 1}',
        '{"concurrency": "\\ud800"}',
        "[" * 100_000,
        "{",
        "[]",
        "null",
        "",
    ],
)
def test_a_limit_that_cannot_be_is_422_and_changes_nothing(shared: Service, change: str) -> None:
    before = queue(shared, "billing")
    response = shared.client.patch(
        "/tasks/queues/billing", content=change.encode(), headers={"content-type": "application/json"}
    )
    assert answer(response, 422)["detail"]
    assert queue(shared, "billing") == before


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"reason": "\xff"}', b'{"reason": "\\u0000"}', b'{"reason": 1}'])
@pytest.mark.parametrize("address", ["bulk-retry", "queues/billing/pause"])
def test_a_body_that_is_no_such_json_is_422(shared: Service, address: str, content: bytes) -> None:
    response = shared.client.post(f"/tasks/{address}", content=content, headers={"content-type": "application/json"})
    assert answer(response, 422)["detail"]


@pytest.mark.parametrize("ids", ['["\\ud800"]', '["\\u0000"]', "[1]", "[null]", '"x"', "{}", f'["{"x" * 200}"]'])
def test_ids_that_no_task_can_have_are_422(shared: Service, ids: str) -> None:
    response = shared.client.post(
        "/tasks/bulk-retry", content=f'{{"task_ids": {ids}}}', headers={"content-type": "application/json"}
    )
    assert answer(response, 422)["detail"]


def test_an_edit_of_a_busy_queue_takes_effect_at_once_and_never_freezes_it(running: Service) -> None:
    running.client.patch("/tasks/queues/billing", json={"concurrency": 1})
    tasks = [running.add("wait_for_gate", queue="billing") for _ in range(6)]
    until(lambda: queue(running, "billing")["running"] == 1)
    assert queue(running, "billing")["pending"] == 5
    running.client.patch("/tasks/queues/billing", json={"concurrency": 4})
    until(lambda: queue(running, "billing")["running"] == 4)
    running.client.patch("/tasks/queues/billing", json={"concurrency": 2})
    assert queue(running, "billing")["running"] == 4, "what runs goes on"
    running.gate.set()
    for task_id in tasks:
        running.ended(task_id)
    state = queue(running, "billing")
    assert (state["pending"], state["running"], state["finished"]) == (0, 0, 6)


def test_a_narrowed_queue_refuses_what_comes_after(running: Service) -> None:
    running.client.post("/tasks/queues/sums/pause")
    running.add("add_up", 1, 2)
    running.client.patch("/tasks/queues/sums", json={"max_size": 1})
    with pytest.raises(Exception, match="is full"):
        running.add("add_up", 3, 4)
    assert (queue(running, "sums")["pending"], queue(running, "sums")["rejected"]) == (1, 1)


def test_a_paused_queue_starts_nothing_until_it_is_resumed(running: Service) -> None:
    paused = answer(running.client.post("/tasks/queues/sums/pause", json={"reason": "the bank is closed"}))
    assert (paused["paused"], paused["reason"]) == (True, "the bank is closed")
    task_id = running.add("add_up", 1, 2)
    assert queue(running, "sums")["pending"] == 1
    resumed = answer(running.client.post("/tasks/queues/sums/resume"))
    assert (resumed["paused"], resumed["reason"]) == (False, None)
    assert running.client.get(f"/tasks/{running.ended(task_id)}").json()["status"] == "success"
    assert actions(running) == [("resume_queue", "anonymous"), ("pause_queue", "anonymous")]
    assert audit(running)[1]["detail"]["note"] == "the bank is closed"


@pytest.mark.parametrize("body", [{}, {"json": None}, {"json": {}}, {"json": {"reason": None}}])
def test_a_pause_needs_no_reason(running: Service, body: dict[str, Any]) -> None:
    assert answer(running.client.post("/tasks/queues/sums/pause", **body))["reason"] is None


def test_an_edit_and_a_pause_survive_a_restart_until_the_code_says_something_else(tmp_path: Path) -> None:
    file = tmp_path / "tasks.db"
    with service(manager=stored_in(file)) as running:
        running.client.patch("/tasks/queues/sums", json={"concurrency": 2, "max_size": 9})
        running.client.post("/tasks/queues/sums/pause", json={"reason": "audit"})
    with service(manager=stored_in(file)) as running:
        state = queue(running, "sums")
        assert (state["concurrency"], state["max_size"], state["paused"], state["reason"]) == (2, 9, True, "audit")
    other = TaskManager(snapshot_db=str(file), queues={"sums": QueueConfig(concurrency=5)})
    with service(manager=other) as running:
        state = queue(running, "sums")
        assert (state["concurrency"], state["max_size"], state["paused"]) == (5, None, True)


def test_a_queue_may_have_any_name() -> None:
    manager = TaskManager(queues={name: QueueConfig() for name in ODD_NAMES})
    with service(manager=manager) as running:
        for name in ODD_NAMES:
            address = f"/tasks/queues/{quote(name, safe='')}"
            assert answer(running.client.patch(address, json={"concurrency": 1}))["name"] == name
            assert answer(running.client.post(f"{address}/pause"))["name"] == name
            assert answer(running.client.post(f"{address}/resume"))["name"] == name
        assert {state["name"] for state in answer(running.client.get("/tasks/queues"))} == {*ODD_NAMES, "default"}


@pytest.mark.parametrize("name", ["nobody", "%00", "x" * 5_000, "a%2Fb", "%ED%A0%80", "", "sums%20", "SUMS"])
@pytest.mark.parametrize("route", ["PATCH ", "POST /pause", "POST /resume"])
def test_an_unknown_queue_is_404(shared: Service, name: str, route: str) -> None:
    method, _, rest = route.partition(" ")
    body: dict[str, Any] = {"json": {"concurrency": 1}} if method == "PATCH" else {}
    assert answer(shared.client.request(method, f"/tasks/queues/{name}{rest}", **body), 404)["detail"]


def test_the_default_queue_can_be_edited_before_it_was_used(running: Service) -> None:
    assert answer(running.client.patch("/tasks/queues/default", json={}))["concurrency"] is None
    assert answer(running.client.patch("/tasks/queues/default", json={"concurrency": 3}))["concurrency"] == 3


# -- the audit


def test_the_audit_says_who_did_what_newest_first(running: Service) -> None:
    failed = running.run("charge_card", 7)
    waiting = running.add("add_up", 1, 2, delay_seconds=60)
    runs = running.add("wait_for_gate")
    until(lambda: running.client.get(f"/tasks/{runs}").json()["status"] == "running")
    running.client.post(f"/tasks/{failed}/retry")
    running.client.post(f"/tasks/{waiting}/cancel")
    running.client.post(f"/tasks/{runs}/cancel")
    running.ended(runs)
    entries = audit(running)
    assert [(entry["action"], entry["task_id"]) for entry in entries] == [
        ("cancel", runs),
        ("cancel", waiting),
        ("retry", failed),
    ]
    assert {entry["actor"] for entry in entries} == {"anonymous"}
    assert set(entries[0]) == {"entry_id", "action", "task_id", "actor", "timestamp", "detail"}
    assert entries[0]["detail"] == {}
    written = datetime.fromisoformat(entries[0]["timestamp"])
    assert timedelta(0) <= datetime.now(UTC) - written < timedelta(minutes=1)


def test_the_audit_has_pages(running: Service) -> None:
    for number in range(1, 6):
        running.client.patch("/tasks/queues/sums", json={"concurrency": number})
    seen: list[int] = []
    address: str | None = "/tasks/audit?limit=2"
    pages = 0
    while address:
        response = running.client.get(address)
        seen += [entry["detail"]["after"]["concurrency"] for entry in response.json()]
        address = response.links.get("next", {}).get("url")
        pages += 1
    assert (seen, pages) == ([5, 4, 3, 2, 1], 3)
    (last,) = audit(running, f"?before={audit(running)[3]['entry_id']}")
    assert last["detail"]["after"]["concurrency"] == 1


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=501", "limit=x", "before=-1", "before=x", "before=" + "9" * 19, "before=%00", "other=1"]
)
def test_an_audit_query_that_is_not_understood_is_422(shared: Service, query: str) -> None:
    assert answer(shared.client.get(f"/tasks/audit?{query}"), 422)["detail"]


@pytest.mark.parametrize(
    ("stored", "shown"),
    [(None, {}), ("", {}), ('{"a": 1}', {"a": 1}), ("words", {"message": "words"}), ("[1]", {"message": "[1]"})],
)
def test_a_detail_is_an_object_whatever_is_stored(stored: str | None, shown: object) -> None:
    event = TaskEvent(7, "", datetime(2026, 1, 1, tzinfo=UTC), EventKind.LOGIN, None, "me", "ada", stored)
    assert records.audit_row(event)["detail"] == shown


@pytest.mark.anyio
async def test_a_page_of_the_audit_costs_what_it_shows(tmp_path: Path) -> None:
    file = tmp_path / "tasks.db"
    backend = open_backend(str(file))
    await backend.open()
    await Bench(backend).cancel(await Bench(backend).add(), actor="ann")
    with closing(sqlite3.connect(file)) as connection:
        sql = "SELECT * FROM taskflow_event WHERE actor IS NOT NULL AND seq < 9 ORDER BY seq DESC LIMIT 5"
        plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}"))
    assert "taskflow_audit" in plan
    assert [(event.kind, event.actor) for event in await backend.audit(None, 5)] == [("cancelled", "ann")]
    await backend.close()


@pytest.mark.anyio
async def test_a_database_of_the_first_schema_gets_what_the_audit_needs(tmp_path: Path) -> None:
    file = tmp_path / "tasks.db"
    backend = open_backend(str(file))
    await backend.open()
    await backend.close()
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(
            "DROP INDEX taskflow_audit; DROP TABLE taskflow_revoked; UPDATE taskflow_schema_version SET version = 1"
        )
    await backend.open()
    await backend.audit(None, 1)
    assert not await backend.is_revoked("x")
    await backend.close()
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT max(version) FROM taskflow_schema_version").fetchone() == (SCHEMA_VERSION,)
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'taskflow_audit'").fetchone()


# -- people who come and go


def log_in(running: Service, username: str = "ada", password: str = "lovelace") -> Response:
    return running.client.post("/tasks/auth/login", data={"username": username, "password": password})


def token_of(response: Response) -> str:
    assert response.status_code == 303, response.text
    return str(response.cookies[auth.COOKIE])


def admitted(running: Service, token: str, address: str = "/tasks/health") -> bool:
    response = running.client.get(address, headers={"cookie": f"{auth.COOKIE}={token}"})
    assert response.status_code in (200, 401), response.text
    return bool(response.status_code == 200)


def test_logins_and_logouts_are_in_the_audit() -> None:
    with service(**ADA) as running:
        log_in(running, password="wrong")
        log_in(running, username="eve\0", password="x")
        log_in(running)
        running.client.post("/tasks/auth/logout")
        log_in(running)
        assert actions(running) == [
            ("login", "ada"),
            ("logout", "ada"),
            ("login", "ada"),
            ("login_failed", "eve\N{REPLACEMENT CHARACTER}"),
            ("login_failed", "ada"),
        ]
        assert audit(running)[0]["detail"] == {"client": "testclient"}
        assert audit(running)[0]["task_id"] is None
        assert "wrong" not in json.dumps(audit(running))


def test_a_login_that_had_to_wait_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MOST_BAD_LOGINS", 2)
    with service(**ADA) as running:
        assert [log_in(running, password="x").status_code for _ in range(4)] == [401, 401, 429, 429]
        events = running.client.portal.call(running.manager.store.audit)  # type: ignore[union-attr]
        assert [event.kind for event in events] == ["login_failed"] * 2


def test_a_session_that_was_logged_out_is_over_in_every_process_and_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "LOOK_INTERVAL", 0.0)
    file = tmp_path / "tasks.db"
    with service(manager=stored_in(file), **ADA) as one, service(manager=stored_in(file), **ADA) as two:
        token, other = token_of(log_in(one)), token_of(log_in(two))
        assert admitted(two, token)
        one.client.post("/tasks/auth/logout")
        assert not admitted(one, token)
        assert not admitted(two, token)
        assert admitted(two, other), "only that session is over"
    with service(manager=stored_in(file), **ADA) as again:
        assert not admitted(again, token)
        assert admitted(again, other)


def test_a_session_is_asked_about_once_in_a_while(running: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    now = [100.0]
    known = visits.Visits(running.manager.store, running.manager.journal, clock=lambda: now[0])

    async def revoked(session_id: str) -> bool:
        asked.append(session_id)
        return session_id == "bad"

    monkeypatch.setattr(running.manager.store, "is_revoked", revoked)

    def ended(session_id: str) -> bool:
        return bool(running.client.portal.call(known.ended, session_id))  # type: ignore[union-attr]

    assert [ended("good") for _ in range(3)] == [False] * 3
    assert asked == ["good"]
    now[0] += visits.LOOK_INTERVAL
    assert not ended("good")
    assert asked == ["good"] * 2
    assert ended("bad")
    monkeypatch.setattr(visits, "MOST_REMEMBERED", 1)
    assert not ended("third")
    assert not ended("good"), "the oldest was forgotten and is asked about again"
    assert asked == ["good", "good", "bad", "third", "good"]


@pytest.mark.anyio
async def test_revocations_are_forgotten_once_the_session_would_have_ended(tmp_path: Path) -> None:
    backend = open_backend(str(tmp_path / "tasks.db"))
    await backend.open()
    bench = Bench(backend)
    for session_id, seconds in (("short", 60), ("long", 600), ("long", 600)):
        await bench.obey(Revoke(session_id, bench.now + timedelta(seconds=seconds)))
    assert await backend.is_revoked("short")
    bench.pass_time(60)
    await bench.obey(Revoke("new", bench.now + timedelta(seconds=60)))
    assert [await backend.is_revoked(session_id) for session_id in ("short", "long", "new")] == [False, True, True]
    await backend.close()


def test_a_full_disk_keeps_nobody_from_logging_in_or_out_and_is_told_of_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_refusals: None
) -> None:
    for setting, value in (("LOOK_INTERVAL", 0.0), ("PATIENCE", 0.05), ("PAUSE", 0.01)):
        monkeypatch.setattr(visits, setting, value)
    file = tmp_path / "tasks.db"
    with service(manager=stored_in(file), **ADA) as one, service(manager=stored_in(file), **ADA) as two:
        log_in(one)
        with one.disk_full():
            token = token_of(log_in(one))
            assert admitted(one, token)
            one.client.post("/tasks/auth/logout")
            assert not admitted(one, token)
            assert admitted(two, token), "not told yet"
            came_back = datetime.now(UTC)
        until(lambda: not admitted(two, token))
        log_in(one)
        until(lambda: len(actions(one)) == 4)
        entries = audit(one)
        assert [entry["action"] for entry in entries] == ["login", "logout", "login", "login"]
        assert datetime.fromisoformat(entries[1]["timestamp"]) < came_back, "as of when it was done"


def test_a_backend_that_is_away_from_the_start_keeps_nobody_from_logging_in_or_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_refusals: None
) -> None:
    monkeypatch.setattr(visits, "PATIENCE", 0.05)
    with service(manager=stored_in(tmp_path / "missing" / "tasks.db"), **ADA) as running:
        token = token_of(log_in(running))
        assert admitted(running, token)
        assert log_in(running, password="x").status_code == 401
        assert running.client.post("/tasks/auth/logout").status_code == 303
        assert not admitted(running, token)
        assert not (tmp_path / "missing").exists()


def test_what_waits_to_be_written_is_bounded(
    running: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for setting, value in (("MOST_UNWRITTEN", 2), ("PATIENCE", 0.01), ("PAUSE", 0.01)):
        monkeypatch.setattr(visits, setting, value)
    written: list[object] = []
    away = [True]

    async def obey(command: object) -> None:
        if away[0]:
            raise BackendUnavailable("away")
        written.append(command)

    monkeypatch.setattr(running.manager.journal, "obey", obey)
    known = visits.Visits(running.manager.store, running.manager.journal)
    call = running.client.portal.call  # type: ignore[union-attr]
    for number in range(4):
        call(known.was_refused, f"eve{number}", "1.2.3.4")
    call(known.logged_out, "ada", "1.2.3.4", "session", 2_000_000_000)
    away[0] = False
    until(lambda: len(written) == 3)
    assert [type(command).__name__ for command in written] == ["Note", "Note", "Revoke"]
    assert "'eve3'" in caplog.text


# -- bad days and bad input

ROUTES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/bulk-retry", {"json": {"task_ids": ["a"]}}),
    ("POST", "/retry-failed?since=all", {}),
    ("DELETE", "/history?value=1&unit=day", {}),
    ("PATCH", "/queues/sums", {"json": {"concurrency": 1}}),
    ("POST", "/queues/sums/pause", {"json": {"reason": "x"}}),
    ("POST", "/queues/sums/resume", {}),
    ("GET", "/queues", {}),
    ("GET", "/audit", {}),
]


@pytest.mark.parametrize(("method", "address", "body"), ROUTES)
def test_a_backend_that_is_away_is_503(
    tmp_path: Path, quick_refusals: None, method: str, address: str, body: dict[str, Any]
) -> None:
    with service(manager=stored_in(tmp_path / "missing" / "tasks.db")) as running:
        response = running.client.request(method, f"/tasks{address}", **body)
        assert answer(response, 503)["detail"]
        assert response.headers["retry-after"] == "2"


def test_a_full_disk_is_503_for_commands_and_nothing_for_questions(running: Service, quick_refusals: None) -> None:
    with running.disk_full():
        for method, address, body in ROUTES:
            response = running.client.request(method, f"/tasks{address}", **body)
            assert response.status_code == (200 if method == "GET" else 503), address
            assert ("retry-after" in response.headers) == (method != "GET")
    until(lambda: running.client.get("/tasks/ready").status_code == 200)
    assert audit(running) == [], "what was refused was not done"
    assert queue(running, "sums")["concurrency"] is None


@pytest.mark.parametrize(("method", "address", "body"), ROUTES)
def test_a_service_that_was_not_started_answers_503(method: str, address: str, body: dict[str, Any]) -> None:
    app = FastAPI()
    TaskAdmin(app, stored_in(None))
    client = TestClient(app, raise_server_exceptions=False)
    assert answer(client.request(method, f"/tasks{address}", **body), 503)["detail"]


@pytest.mark.parametrize(("method", "address", "body"), ROUTES)
def test_another_sites_page_and_a_stranger_change_nothing(method: str, address: str, body: dict[str, Any]) -> None:
    with service(**ADA) as running:
        assert running.client.request(method, f"/tasks{address}", **body).status_code == 401
        log_in(running)
        foreign = running.client.request(method, f"/tasks{address}", headers={"sec-fetch-site": "cross-site"}, **body)
        assert foreign.status_code == (200 if method == "GET" else 403)
        assert actions(running) == [("login", "ada")]


def test_bulk_commands_are_done_in_the_name_of_who_is_logged_in() -> None:
    with service(**ADA) as running:
        log_in(running)
        for method, address, body in ROUTES:
            assert running.client.request(method, f"/tasks{address}", **body).status_code == 200, address
        assert actions(running) == [
            (action, "ada")
            for action in (
                "resume_queue",
                "pause_queue",
                "update_queue",
                "delete_history",
                "bulk_retry",
                "bulk_retry",
                "login",
            )
        ]


# -- OpenAPI


def test_every_answer_has_the_shape_that_the_documentation_shows() -> None:
    with service(display_func_args=True) as running:
        failed, good = running.run("charge_card", 7), running.run("add_up", 1, 2)
        retried = running.client.post("/tasks/bulk-retry", json={"task_ids": [failed]})
        running.ended(failed)
        running.once("add_up", 1, 2, run_key="order/7")
        shown: dict[str, tuple[Any, Response]] = {
            "list": (list[shapes.ShownTask], running.client.get("/tasks")),
            "record": (shapes.ShownTaskRecord, running.client.get(f"/tasks/{failed}")),
            "command": (shapes.ShownCommand, running.client.post(f"/tasks/{failed}/retry")),
            "events": (list[shapes.ShownEvent], running.client.get(f"/tasks/{good}/events")),
            "logs": (list[shapes.ShownLogLine], running.client.get(f"/tasks/{good}/logs")),
            "metrics": (shapes.ShownMetrics, running.client.get("/tasks/metrics")),
            "instances": (list[shapes.ShownInstance], running.client.get("/tasks/instances")),
            "health": (shapes.ShownHealth, running.client.get("/tasks/health")),
            "queues": (list[shapes.ShownQueue], running.client.get("/tasks/queues")),
            "bulk": (shapes.ShownBulkRetry, retried),
            "deletion": (shapes.ShownDeletion, running.client.delete("/tasks/history?value=1&unit=day")),
            "schedules": (list[shapes.ShownSchedule], running.client.get("/tasks/schedules")),
            "schedule": (shapes.ShownSchedule, running.client.post("/tasks/schedules/tidy/pause")),
            "run": (shapes.ShownScheduleRun, running.client.post("/tasks/schedules/tidy/run")),
            "one-offs": (list[shapes.ShownScheduledOnce], running.client.get("/tasks/scheduled")),
            "cancellation": (shapes.ShownCancellation, running.client.delete("/tasks/scheduled/order%2F7")),
            "audit": (list[shapes.ShownAuditEntry], running.client.get("/tasks/audit")),
            "problem": (shapes.ShownProblem, running.client.get("/tasks/nobody")),
        }
        for name, (shape, response) in shown.items():
            assert response.json(), name
            TypeAdapter(shape).validate_json(response.content)


def test_every_json_route_is_described(shared: Service) -> None:
    document = shared.client.get("/openapi.json").json()
    for address, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation["responses"]["200"]["content"]["application/json"]["schema"]
            assert re.search(r"Shown\w+", json.dumps(content)), f"{method} {address}"
            assert "503" in operation["responses"]
            assert operation["summary"]
    assert {"/tasks/queues/{name}", "/tasks/queues/{name}/pause", "/tasks/audit", "/tasks/history"} <= set(
        document["paths"]
    )
