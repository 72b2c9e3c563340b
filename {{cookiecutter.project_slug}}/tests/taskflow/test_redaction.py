"""What is secret by its name: which names, and that no answer of the service shows such a value."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from app.taskflow import TaskAdmin, TaskDefinitionError, TaskManager, task_log
from app.taskflow.web import records
from app.taskflow.web.redaction import MASK, Redaction, restored, unmasked

from .web_support import Service, page, service

SECRET = "hunter2-is-not-shown"


class Account(BaseModel):
    name: str
    password: str


@dataclass
class Key:
    api_key: str
    label: str = "live"


@pytest.mark.parametrize(
    "name",
    [
        "password", "Password", "user_password", "passwords", "PASSWORD_HASH", "passwd", "pwd", "clientSecret",
        "secrets", "api_key", "apiKey", "API-Key", "apikey", "x-api-key", "private_key", "Authorization",
        "proxy-authorization", "token", "csrf_token", "accessToken", "refresh_tokens", "Set-Cookie",
        "aws_secret_access_key", "credentials",
    ],
)  # fmt: skip
def test_a_name_that_says_secret_is_hidden(name: str) -> None:
    assert Redaction().hides(name)


@pytest.mark.parametrize(
    "name", ["", "name", "max_tokens", "token_count", "key", "keyboard", "secretary", "compass", "cookbook", 7]
)
def test_another_name_is_not(name: object) -> None:
    assert not Redaction().hides(name)


def test_a_teams_own_names_are_hidden_besides() -> None:
    redaction = Redaction(["IBAN", "dateOfBirth"])
    assert redaction.hides("iban")
    assert redaction.hides("customer_iban")
    assert redaction.hides("date_of_birth")
    assert redaction.hides("password")
    assert not redaction.hides("birth")


@pytest.mark.parametrize("redact", ["iban", [""], ["-"], [7]])
def test_names_that_cannot_be_are_refused_where_they_are_written(redact: Any) -> None:
    with pytest.raises(TaskDefinitionError, match="redact"):
        TaskAdmin(FastAPI(), TaskManager(), redact=redact)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"a": {"password": "x", "b": 1}}, {"a": {"password": MASK, "b": 1}}),
        ([{"token": "x"}, ({"token": ["y"]},)], [{"token": MASK}, [{"token": MASK}]]),
        ({"password": None, "secret": True, "pwd": ""}, {"password": None, "secret": True, "pwd": MASK}),
        ({"password": 1234}, {"password": MASK}),
        (Account(name="ada", password="x"), {"name": "ada", "password": MASK}),
        (Key("x"), {"api_key": MASK, "label": "live"}),
    ],
)
def test_it_is_hidden_wherever_it_stands(value: object, shown: object) -> None:
    assert records.plain(value) == shown


@pytest.mark.parametrize(
    ("typed", "stored", "meant"),
    [
        (MASK, "x", "x"),
        ({"a": MASK, "b": 2}, {"a": "x", "b": 1}, {"a": "x", "b": 2}),
        ([MASK, "z"], ["x", "y"], ["x", "z"]),
        ([MASK], ["x", "y"], [MASK]),
        ({"new": MASK}, {}, {"new": MASK}),
        ("other", "x", "other"),
    ],
)
def test_the_mark_stands_for_what_was_stored_in_its_place(typed: Any, stored: Any, meant: Any) -> None:
    assert restored(typed, stored) == meant


def test_a_field_that_holds_no_mark_is_what_was_typed() -> None:
    assert unmasked('{"a": 1}', "x", "y") == '{"a": 1}'
    assert unmasked("{•••", "x", "y") == "{•••"


# -- over the service


def make_manager() -> TaskManager:
    manager = TaskManager()

    @manager.task
    async def log_in(password: str, account: dict[str, Any], *, iban: str = "") -> dict[str, Any]:
        task_log("logging in", api_key=password, user="ada")
        return {"session": {"cookie": password}, "length": len(password)}

    return manager


@pytest.fixture
def running() -> Iterator[Service]:
    with service(manager=make_manager(), display_func_args=True, redact=["iban"]) as running:
        yield running


def run(running: Service) -> str:
    """By place, by name, inside a value."""
    return running.run("log_in", SECRET, {"clientSecret": SECRET, "name": "ada"}, iban=SECRET)


def test_no_answer_shows_it(running: Service) -> None:
    task_id = run(running)
    later = datetime.now(UTC) + timedelta(hours=1)
    function = running.manager.registry.named("log_in").function
    running.client.portal.call(  # type: ignore[union-attr]
        lambda: running.manager.schedule_once(
            function, SECRET, {"token": SECRET}, iban=SECRET, run_at=later, run_key="later"
        )
    )
    places = (
        "",
        f"/{task_id}",
        f"/{task_id}/logs",
        f"/{task_id}/events",
        "/scheduled",
        "/audit",
        f"/dashboard/tasks/{task_id}",
        f"/dashboard/tasks/{task_id}/again",
        f"/dashboard/tasks/{task_id}/log",
        "/dashboard/tasks",
        "/dashboard/schedules/once",
    )
    for place in places:
        text = running.client.get(f"/tasks{place}").text
        assert SECRET not in text, place
    shown = running.client.get(f"/tasks/{task_id}").json()
    assert shown["args"] == [MASK, {"clientSecret": MASK, "name": "ada"}]
    assert shown["kwargs"] == {"iban": MASK}
    assert shown["result"] == {"session": {"cookie": MASK}, "length": len(SECRET)}


def test_a_long_call_hides_it_too(running: Service) -> None:
    running.run("log_in", SECRET, {"name": "a" * 5_000, "token": SECRET})
    (shown,) = running.client.get("/tasks").json()
    assert shown["args"][0] == MASK


def test_it_is_run_again_without_having_been_seen(running: Service) -> None:
    first = run(running)
    form = page(running.client.get(f"/tasks/dashboard/tasks/{first}/again")).form("Run log_in")
    assert form.fields["password"] == MASK
    changed = form.fields | {"account": form.fields["account"].replace("ada", "grace")}
    response = running.client.post(form.action, data=changed)
    fresh = response.headers["location"].rpartition("/")[2]
    running.ended(fresh)
    record = running.client.portal.call(running.manager.store.get, fresh)  # type: ignore[union-attr]
    args, kwargs = running.manager.store.arguments(record)
    assert (*args, kwargs)[-1] == {
        "password": SECRET,
        "account": {"clientSecret": SECRET, "name": "grace"},
        "iban": SECRET,
    }
    (entry,) = [act for act in running.client.get("/tasks/audit").json() if act["action"] == "run_by_hand"]
    assert entry["detail"]["changed"] == ["account"]


def test_what_is_wrong_with_another_field_does_not_show_it(running: Service) -> None:
    first = run(running)
    form = page(running.client.get(f"/tasks/dashboard/tasks/{first}/again")).form("Run log_in")
    response = running.client.post(form.action, data=form.fields | {"account": "[]"})
    assert response.status_code == 422
    assert SECRET not in response.text


# -- error pages name their request


def test_an_error_page_says_under_which_name_the_log_has_it(running: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "taskflow"):
        response = running.client.get("/tasks/dashboard/tasks/none?a=%0Ab", headers={"X-Request-ID": "edge-7"})
    assert response.status_code == 404
    assert response.headers["x-request-id"] == "edge-7"
    assert "edge-7" in page(response, 404).text
    (line,) = [record.getMessage() for record in caplog.records if "edge-7" in record.getMessage()]
    assert line.startswith("request edge-7: GET /tasks/dashboard/tasks/none?a=%0Ab: 404 ")


@pytest.mark.parametrize("given", ["", "a b", "<b>", "x" * 200])
def test_a_name_that_no_proxy_gives_is_not_taken(running: Service, given: str) -> None:
    response = running.client.get("/tasks/dashboard/queues/none", headers={"X-Request-ID": given})
    name = response.headers["x-request-id"]
    assert name != given
    assert len(name) == 32
    assert name in page(response, 404).text


def test_a_page_that_breaks_is_a_page_and_its_traceback_is_in_the_log(
    running: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(running.manager.store, "functions", broken)
    response = running.client.get("/tasks/dashboard/run")
    assert "a fault of ours" not in page(response, 500).text
    (record,) = [record for record in caplog.records if response.headers["x-request-id"] in record.getMessage()]
    assert record.exc_info is not None
    assert "a fault of ours" in str(record.exc_info[1])
