"""Who may pass: credentials, sessions, origins, local clients, and the limit on bad logins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from fastapi.testclient import TestClient
from starlette.requests import Request

from app.taskflow import TaskAdmin, TaskflowError, TaskManager
from app.taskflow.web import auth
from app.taskflow.web.auth import (
    FixedCredentials,
    LoginLimit,
    Sessions,
    TaskAuthBackend,
    auth_backend,
    client_name,
    is_local,
    same_origin,
)
from app.taskflow.web.login import own_page

from .web_support import Service, page, service

ADA = ("ada", "lovelace")


@pytest.fixture
def closed() -> Iterator[Service]:
    with service(auth=ADA, secret_key="a key of the team") as running:
        yield running


@pytest.fixture(scope="module")
def shut() -> Iterator[Service]:
    """For requests that never get a session."""
    with service(auth=ADA, secret_key="a key of the team") as running:
        yield running


def log_in(running: Service, username: str = "ada", password: str = "lovelace", **headers: str) -> Any:
    form = {"username": username, "password": password}
    return running.client.post("/tasks/auth/login", data=form, headers=headers)


# -- closed


@pytest.mark.parametrize(
    "route",
    [
        "GET /tasks",
        "GET /tasks/metrics",
        "GET /tasks/health",
        "GET /tasks/ready",
        "GET /tasks/instances",
        "GET /tasks/x",
        "GET /tasks/x/events",
        "GET /tasks/x/logs",
        "POST /tasks/x/cancel",
        "POST /tasks/x/retry",
        "GET /tasks/dashboard/stream",
    ],
)
def test_without_a_session_every_route_is_401(shut: Service, route: str) -> None:
    method, _, address = route.partition(" ")
    response = shut.client.request(method, address)
    assert response.status_code == 401
    assert response.json()["detail"]


def test_no_route_was_forgotten(shut: Service) -> None:
    open_to_all = ("/auth/login", "/dashboard/static/")
    for address, operations in shut.client.get("/openapi.json").json()["paths"].items():
        for method in operations:
            response = shut.client.request(method, address.replace("{task_id}", "x"))
            assert response.status_code == 401 or any(part in address for part in open_to_all), address


@pytest.mark.parametrize("address", ["/dashboard", "/dashboard/tasks?q=a:b c&before=1", "/dashboard/tasks/x"])
def test_without_a_session_pages_lead_to_the_login_and_back(closed: Service, address: str) -> None:
    response = closed.client.get(f"/tasks{address}")
    assert response.status_code == 302
    login = page(closed.client.get(response.headers["location"]))
    form = login.form("Log in")
    answer = closed.client.post(form.action, data=form.fields | {"username": "ada", "password": "lovelace"})
    assert answer.status_code == 303
    assert answer.headers["location"] == f"/tasks{address}".replace(" ", "%20")


def test_a_refreshing_part_of_a_page_is_told_to_go_to_the_login(shut: Service) -> None:
    response = shut.client.get("/tasks/dashboard", headers={"hx-request": "true"})
    assert response.status_code == 401
    assert response.headers["hx-redirect"] == "/tasks/auth/login"


def test_a_session_opens_the_api_the_pages_and_the_stream(closed: Service) -> None:
    assert log_in(closed).status_code == 303
    assert closed.client.get("/tasks").status_code == 200
    assert "ada" in page(closed.client.get("/tasks/dashboard")).text
    with closed.client.stream("GET", "/tasks/dashboard/stream") as response:
        assert response.status_code == 200


def test_what_a_person_does_is_done_in_their_name(closed: Service) -> None:
    log_in(closed)
    task_id = closed.add("add_up", 1, 2, delay_seconds=60)
    closed.client.post(f"/tasks/{task_id}/cancel")
    assert closed.client.get(f"/tasks/{task_id}/events").json()[-1]["actor"] == "ada"


@pytest.mark.parametrize(("username", "password"), [("ada", "wrong"), ("eve", "lovelace"), ("", ""), ("ada", "é")])
def test_wrong_credentials_open_nothing_and_are_not_explained(closed: Service, username: str, password: str) -> None:
    response = log_in(closed, username, password)
    assert "user name or the password is wrong" in page(response, 401).text
    assert auth.COOKIE not in response.cookies
    assert closed.client.get("/tasks").status_code == 401


def test_the_login_page_does_not_show_the_password(closed: Service) -> None:
    assert "s3cret" not in log_in(closed, "ada", "s3cret").text


# -- sessions


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(closed: Service) -> None:
    cookie = log_in(closed).headers["set-cookie"].lower()
    assert cookie.startswith("taskflow_token=")
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert "path=/tasks" in cookie
    assert "secure" not in cookie


def test_on_https_the_cookie_stays_on_https() -> None:
    with service(auth=ADA, base_url="https://testserver") as running:
        assert "secure" in log_in(running).headers["set-cookie"].lower()


def test_logout_is_a_post_that_revokes(closed: Service) -> None:
    token = log_in(closed).cookies[auth.COOKIE]
    assert closed.client.get("/tasks/auth/logout").status_code == 405
    assert closed.client.get("/tasks").status_code == 200
    assert closed.client.post("/tasks/auth/logout").status_code == 303
    closed.client.cookies.set(auth.COOKIE, token)
    assert closed.client.get("/tasks").status_code == 401


def test_a_session_ends_after_its_time() -> None:
    now = [1_000.0]
    sessions = Sessions("key", 60, clock=lambda: now[0])
    token = sessions.issue("ada")
    assert sessions.read(token) is not None
    now[0] += 60
    assert sessions.read(token) is None


def test_a_session_holds_in_every_process_with_the_same_key_and_in_no_other() -> None:
    token = Sessions("key", 60).issue("ada")
    session = Sessions("key", 60).read(token)
    assert session is not None
    assert session.username == "ada"
    assert Sessions("other", 60).read(token) is None
    assert Sessions(None, 60).read(token) is None


@pytest.mark.parametrize("change", [lambda t: t + "x", lambda t: "x" + t, lambda t: t.partition(".")[0], lambda t: ""])
def test_a_token_that_was_touched_is_worth_nothing(change: Callable[[str], str]) -> None:
    sessions = Sessions("key", 60)
    assert sessions.read(change(sessions.issue("ada"))) is None


def test_a_cookie_of_any_bytes_is_401(shut: Service) -> None:
    for value in (b"\xff.\xff", b"a.b.c", b".", b"e30.e30"):
        response = shut.client.get("/tasks", headers=[(b"cookie", b"taskflow_token=" + value)])
        assert response.status_code == 401


def test_revoked_sessions_are_forgotten_once_they_would_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MOST_REMEMBERED", 3)
    now = [0.0]
    sessions = Sessions("key", 60, clock=lambda: now[0])
    tokens = [sessions.issue("ada") for _ in range(5)]
    for token in tokens:
        session = sessions.read(token)
        assert session is not None
        sessions.revoke(session)
    assert [sessions.read(token) is None for token in tokens] == [False, False, True, True, True]


# -- bad logins


def test_the_eleventh_bad_login_of_a_minute_has_to_wait_even_with_the_right_password(closed: Service) -> None:
    assert [log_in(closed, password="x").status_code for _ in range(11)] == [401] * 10 + [429]
    response = log_in(closed)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "60"


def test_a_good_login_forgives_the_bad_ones_of_its_own_name(closed: Service) -> None:
    for _ in range(3):
        assert [log_in(closed, password="x").status_code for _ in range(5)] == [401] * 5
        assert log_in(closed).status_code == 303
        closed.client.cookies.clear()


def test_a_good_login_forgives_no_other_name(closed: Service) -> None:
    assert [log_in(closed, f"eve{number}", "x").status_code for number in range(9)] == [401] * 9
    assert log_in(closed).status_code == 303
    closed.client.cookies.clear()
    assert [log_in(closed, "eve", "x").status_code for _ in range(2)] == [401, 429]


def test_a_bad_login_counts_for_a_minute_against_its_client_and_against_its_name() -> None:
    now = [0.0]
    limit = LoginLimit(clock=lambda: now[0])
    assert [limit.attempt("a", f"name {number}") for number in range(11)] == [True] * 10 + [False]
    assert limit.attempt("b", "name")
    assert [limit.attempt(f"client {number}", "ada") for number in range(11)] == [True] * 10 + [False]
    assert limit.attempt("c", "name")
    now[0] = 60.0
    assert limit.attempt("a", "ada")


def test_attempts_that_are_still_judged_count() -> None:
    limit = LoginLimit(clock=lambda: 0.0)
    assert [limit.attempt("a", "ada") for _ in range(20)].count(True) == 10


def test_a_good_login_does_not_forgive_what_others_tried_with_its_name() -> None:
    limit = LoginLimit(clock=lambda: 0.0)
    for number in range(9):
        limit.attempt(f"client {number}", "ada")
    assert limit.attempt("home", "ada")
    limit.succeeded("home", "ada")
    assert [limit.attempt("elsewhere", "ada") for _ in range(2)] == [True, False]


def test_the_memory_of_bad_logins_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MOST_REMEMBERED", 2)
    limit = LoginLimit(clock=lambda: 0.0)
    for number in range(100):
        limit.attempt(f"client {number}", f"name {number}")
    assert (len(limit._by_client), len(limit._by_name)) == (2, 2)


def test_a_form_that_is_too_large_is_refused(closed: Service) -> None:
    assert log_in(closed, password="x" * 20_000).status_code == 413


# -- where a request comes from


@pytest.mark.parametrize(
    ("headers", "ours"),
    [
        ({}, True),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site", "origin": "http://testserver"}, False),
        ({"origin": "http://testserver"}, True),
        ({"origin": "http://TESTSERVER"}, True),
        ({"origin": "http://testserver:81"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        ({"origin": "http://["}, False),
        ({"origin": "http://[::1"}, False),
    ],
)
def test_an_unsafe_request_must_come_from_our_own_pages(closed: Service, headers: dict[str, str], ours: bool) -> None:
    assert log_in(closed, **headers).status_code == (303 if ours else 403)
    closed.client.cookies.clear()
    log_in(closed)
    assert closed.client.post("/tasks/x/retry", headers=headers).status_code == (404 if ours else 403)
    assert closed.client.post("/tasks/dashboard/view", headers=headers).status_code == (303 if ours else 403)
    assert closed.client.get("/tasks", headers=headers).status_code == 200


def test_the_origin_of_nothing_is_not_ours() -> None:
    assert not same_origin(request_from("1.2.3.4", origin="null", host=""))


@pytest.mark.parametrize(
    "target",
    [
        "",
        "https://evil.example",
        "//evil.example",
        "/tasks/dashboard\\@evil.example",
        "/other",
        "/tasks/dashboard\r\nx: y",
        "/tasks/auth/login",
    ],
)
def test_a_login_leads_to_our_own_pages_only(target: str) -> None:
    assert own_page("/tasks", target) == "/tasks/dashboard"


# -- without credentials

ODD_HOSTS = ["", " ", "test", "intranet", "[", "http://[", "[::1", "localhost:8000:1", "localhost@evil.example"]
ODD_HOSTS += ["localhost/", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1, evil.example", "x" * 10_000]
PROXY_HEADERS = ["forwarded", "via", "x_forwarded_host", "x_forwarded_proto", "x_forwarded_port", "x_real_ip"]
PROXY_HEADERS += ["cf_connecting_ip", "true_client_ip", "x_original_url", "x_client_ip"]


def request_from(client: str | None, **headers: str) -> Request:
    given = {"host": "localhost:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": "http",
        "method": "POST",
        "scheme": "http",
        "path": "/tasks",
        "query_string": b"",
        "server": ("localhost", 8000),
        "client": (client, 1234) if client else None,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    return Request(scope)


@pytest.mark.parametrize(
    ("request_", "local"),
    [
        (request_from("127.0.0.1"), True),
        (request_from("127.0.0.9", host="app.localhost"), True),
        (request_from("::1", host="[::1]:8000"), True),
        (request_from("::ffff:127.0.0.1"), True),
        (request_from("testclient", host="testserver"), True),
        (request_from("127.0.0.1", host="LOCALHOST:80"), True),
        (request_from("testclient", host="anything.example"), False),
        (request_from("127.0.0.1", host="testserver"), False),
        *((request_from("127.0.0.1", host=host), False) for host in ODD_HOSTS),
        *((request_from("127.0.0.1", **{name: "1"}), False) for name in PROXY_HEADERS),
        (request_from("127.0.0.1", host="made-to-point-here.example"), False),
        (request_from("127.0.0.1", x_forwarded_for="1.2.3.4"), False),
        (request_from("testclient", x_forwarded_for="testclient"), False),
        (request_from("10.0.0.1"), False),
        (request_from("2001:db8::1"), False),
        (request_from("localhost"), False),
        (request_from(None), False),
    ],
)
def test_only_this_machine_is_local(request_: Request, local: bool) -> None:
    assert is_local(request_) is local


def test_without_credentials_others_are_refused_everywhere() -> None:
    app = FastAPI()
    TaskAdmin(app, TaskManager())
    with TestClient(app, client=("203.0.113.9", 1)) as client:
        for address in ("/tasks", "/tasks/health", "/tasks/dashboard/stream"):
            assert client.get(address).status_code == 403
        assert "auth" in page(client.get("/tasks/dashboard"), 403).text


def test_a_host_that_is_said_twice_is_none() -> None:
    twice = request_from("127.0.0.1")
    twice.scope["headers"].append((b"host", b"evil.example"))
    assert not is_local(twice)


def test_who_is_let_in_without_a_login_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with service():
        pass
    assert "open to this machine without a login" in caplog.text
    caplog.clear()
    with service(auth=ADA):
        pass
    assert "without a login" not in caplog.text


def test_without_credentials_there_is_no_login() -> None:
    with service() as running:
        assert running.client.get("/tasks/auth/login").headers["location"] == "/tasks/dashboard"


# -- settings


@pytest.mark.parametrize(
    "options",
    [
        {"environment": "production"},
        {"environment": "production", "auth": ADA},
        {"environment": "production", "secret_key": "key"},
        {"environment": "production", "auth": ADA, "secret_key": ""},
        {"environment": "production", "auth": ADA, "secret_key": "k" * 31},
        {"environment": "staging"},
        {"auth": ()},
        {"auth": []},
        {"auth": "ada:lovelace"},
        {"auth": ("ada", "")},
        {"auth": [("ada", "lovelace"), "eve"]},
        {"auth": TaskAuthBackend},
        {"path": ""},
        {"path": "tasks"},
        {"path": "/"},
        {"path": "/tasks/"},
        {"path": "/{tenant}/tasks"},
        {"token_expiry": 0},
        {"poll_interval": -1},
        {"retention_days": 0},
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(TaskflowError):
        TaskAdmin(FastAPI(), TaskManager(), **options)


def test_production_takes_credentials_and_a_key() -> None:
    with service(environment="production", auth=ADA, secret_key="k" * 32) as running:
        assert running.client.get("/tasks").status_code == 401


class Directory(TaskAuthBackend):
    def authenticate_user(self, username: str, password: str) -> bool:
        return (username, password) == ("grace", "hopper")


class Remote:
    async def authenticate_user(self, username: str, password: str) -> bool:
        return (username, password) == ("grace", "hopper")


@pytest.mark.parametrize("credentials", [Directory(), Remote(), ("grace", "hopper"), [ADA, ("grace", "hopper")]])
def test_credentials_are_a_pair_a_list_or_a_backend_of_either_colour(credentials: Any) -> None:
    with service(auth=credentials) as running:
        assert log_in(running, "grace", "lovelace").status_code == 401
        assert log_in(running, "grace", "hopper").status_code == 303


def test_a_pair_is_judged_by_both_halves() -> None:
    backend = auth_backend([ADA, ("grace", "hopper")])
    assert isinstance(backend, FixedCredentials)
    assert backend.authenticate_user("grace", "hopper")
    assert not backend.authenticate_user("ada", "hopper")


@pytest.mark.parametrize(
    ("host", "name"),
    [("1.2.3.4", "1.2.3.4"), ("2001:db8:1:2:3::4", "2001:0db8:0001:0002"), ("testclient", "testclient")],
)
def test_bad_logins_are_held_against_an_address_or_an_ipv6_network(host: str, name: str) -> None:
    assert client_name(request_from(host)) == name


def test_routes_that_add_tasks_document_that_they_may_be_refused() -> None:
    app, manager = FastAPI(), TaskManager()
    router = APIRouter(prefix="/more")

    @app.post("/adds")
    @router.post("/adds")
    def adds(background_tasks: BackgroundTasks) -> None: ...

    @router.post("/asks")
    def asks(tasks: Any = Depends(manager.get_tasks)) -> None: ...

    @app.post("/nothing")
    def nothing() -> None: ...

    app.include_router(router)
    TaskAdmin(app, manager, auto_install=True)
    paths = app.openapi()["paths"]
    for path in ("/adds", "/more/adds", "/more/asks"):
        assert {"200", "429", "503"} <= paths[path]["post"]["responses"].keys()
    assert not {"429", "503"} & paths["/nothing"]["post"]["responses"].keys()
