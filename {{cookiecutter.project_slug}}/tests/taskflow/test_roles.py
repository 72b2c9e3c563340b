"""Who may only look changes nothing, on any route there is; who has no session sees nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts

from app.taskflow import TaskAuthBackend
from app.taskflow.web.auth import FixedCredentials, Role, auth_backend

from .web_support import Document, Service, page, service

ADA, ALAN = ("ada", "lovelace"), ("alan", "turing", "read")
OPEN = ("/tasks/auth/login", "/tasks/dashboard/static/")
"""What anybody may ask for."""
FOR_READERS = ("/tasks/auth/logout", "/tasks/dashboard/view", "/tasks/dashboard/tasks/view")
"""What is unsafe by its method, and changes no task."""


@pytest.fixture
def closed() -> Iterator[Service]:
    with service(auth=[ADA, ALAN], secret_key="a key of the team") as running:
        yield running


def log_in(running: Service, name: str, password: str) -> None:
    form = {"username": name, "password": password}
    assert running.client.post("/tasks/auth/login", data=form).status_code == 303


def routes(running: Service) -> list[tuple[str, str]]:
    """Every method and address below the path, as the app itself knows them."""
    found = []
    for context in iter_route_contexts(running.app.routes):
        path = str(getattr(context, "path_format", "") or getattr(context, "path", ""))
        if path.startswith("/tasks"):
            address = re.sub(r"{[^}]*}", "x", path)
            found += [(method, address) for method in sorted(getattr(context, "methods", None) or {"GET"})]
    assert len(found) > 50
    return found


def test_every_route_is_refused_without_a_session(closed: Service) -> None:
    for method, address in routes(closed):
        if address.startswith(OPEN):
            continue
        response = closed.client.request(method, address)
        is_page = "/dashboard" in address and not address.endswith("/stream")
        assert response.status_code == (302 if is_page or "/auth/" in address else 401), (method, address)
        assert "/auth/login" in response.headers.get("location", "/auth/login")


def test_every_unsafe_route_is_refused_for_who_may_only_read(closed: Service) -> None:
    log_in(closed, *ALAN[:2])
    refused = 0
    for method, address in routes(closed):
        if method in ("GET", "HEAD") or address.startswith((*OPEN, *FOR_READERS)):
            continue
        response = closed.client.request(method, address)
        assert response.status_code == 403, (method, address)
        assert "alan may look at tasks" in response.text
        refused += 1
    assert refused >= 25


def test_every_unsafe_route_is_refused_from_another_site(closed: Service) -> None:
    log_in(closed, *ADA)
    for method, address in routes(closed):
        if method not in ("GET", "HEAD"):
            response = closed.client.request(method, address, headers={"Sec-Fetch-Site": "cross-site"})
            assert response.status_code == 403, (method, address)


@pytest.mark.parametrize(
    "address",
    ["", "/tasks", "/queues", "/queues?name=default", "/schedules", "/schedules/once", "/workers", "/dead", "/audit"],
)
def test_who_may_only_read_sees_every_page_and_no_button_that_would_be_refused(closed: Service, address: str) -> None:
    failed = closed.run("charge_card", 1)
    log_in(closed, *ALAN[:2])
    document: Document = page(closed.client.get(f"/tasks/dashboard{address}"))
    allowed = {"/tasks/auth/logout", "/tasks/dashboard/view"}
    assert {form.action for form in document.forms if form.method == "post"} <= allowed
    shown = page(closed.client.get(f"/tasks/dashboard/tasks/{failed}"))
    assert {form.action for form in shown.forms if form.method == "post"} <= allowed


def test_who_may_only_read_may_log_out_and_choose_a_theme(closed: Service) -> None:
    log_in(closed, *ALAN[:2])
    assert closed.client.post("/tasks/dashboard/view", data={"theme": "dark"}).status_code == 303
    assert closed.client.post("/tasks/dashboard/tasks/view", data={"q": "a", "save": "on"}).status_code == 303
    assert closed.client.post("/tasks/auth/logout").status_code == 303
    assert closed.client.get("/tasks").status_code == 401


def test_a_key_that_ends_like_an_exception_is_none(closed: Service) -> None:
    log_in(closed, *ALAN[:2])
    assert closed.client.delete("/tasks/scheduled/x/auth/logout").status_code == 403
    assert closed.client.delete("/tasks/scheduled/x/dashboard/view").status_code == 403


class Directory(TaskAuthBackend):
    def __init__(self, verdict: Any) -> None:
        self.verdict = verdict

    def authenticate_user(self, username: str, password: str) -> Any:
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


@pytest.mark.parametrize(
    ("verdict", "may_enter", "may_operate"),
    [
        (True, True, True),
        ("operate", True, True),
        ("read", True, False),
        (False, False, False),
        ("", False, False),
        ("root", False, False),
        (None, False, False),
        (ConnectionError("the directory is away"), False, False),
    ],
)
def test_a_backend_says_yes_no_or_in_which_role(verdict: Any, may_enter: bool, may_operate: bool) -> None:
    with service(auth=Directory(verdict), secret_key="k" * 32) as running:
        response = running.client.post("/tasks/auth/login", data={"username": "a", "password": "b"})
        assert response.status_code == (303 if may_enter else 401)
        if may_enter:
            assert running.client.get("/tasks").status_code == 200
            assert (running.client.post("/tasks/queues/default/pause").status_code == 200) is may_operate


def test_a_list_may_say_roles() -> None:
    backend = auth_backend([ADA, ALAN])
    assert isinstance(backend, FixedCredentials)
    assert backend.authenticate_user("ada", "lovelace") == Role.OPERATE
    assert backend.authenticate_user("alan", "turing") == Role.READ
    assert backend.authenticate_user("alan", "lovelace") is False


def test_the_audit_is_filtered_by_person_action_object_and_time(closed: Service) -> None:
    log_in(closed, *ADA)
    client = closed.client
    client.post("/tasks/queues/default/pause", json={"reason": "provider is down"})
    client.post("/tasks/queues/default/resume")
    failed = closed.run("charge_card", 1)
    client.post(f"/tasks/{failed}/retry")

    def actions(**asked: str) -> list[str]:
        return [entry["action"] for entry in client.get("/tasks/audit", params=asked).json()]

    assert actions() == ["retry", "resume_queue", "pause_queue", "login"]
    assert actions(action="retry") == ["retry"]
    assert actions(actor="ada", limit="2") == ["retry", "resume_queue"]
    assert actions(actor="grace") == []
    assert actions(task_id=failed) == ["retry"]
    assert actions(task_id="provider") == ["resume_queue", "pause_queue"]
    assert actions(until="1h") == []
    assert client.get("/tasks/audit", params={"since": "long ago"}).status_code == 422
    document = page(client.get("/tasks/dashboard/audit?action=pause+queue"))
    assert "provider is down" in document.text
    assert "resume queue" not in document.text
    lines = client.get("/tasks/dashboard/audit.csv").text.splitlines()
    assert lines[0].startswith("entry_id,timestamp,actor,action")
    assert len(lines) == 5
