"""Whatever a client sends in a header, a parameter or a body, no route of ours fails."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from httpx2 import InvalidURL

from .web_support import Service, service

HOSTILE = ["", " ", "http://[", "\0", "\xff\xfe", "é", "a" * 9_000, "%00", "%ZZ", "../..", "[]", "{}", "-1", "9" * 400]
HOSTILE += ["NaN", "1e999", "' OR 1=1 --", "<script>", "\xed\xa0\x80", "2026-99-99", "[" * 3_000, "status:x a:b"]
HEADERS = ["referer", "accept", "accept-encoding", "content-type", "if-none-match", "last-event-id", "sec-fetch-site"]
HEADERS += ["hx-request", "hx-target", "traceparent", "x-forwarded-for", "authorization", "range", "accept-language"]
ALONE = ["host", "origin", "cookie", "content-length"]
"""Headers whose check stands before all others."""
PARAMETERS = [
    "limit",
    "before",
    "status",
    "func_name",
    "queue",
    "tag",
    "source",
    "since",
    "until",
    "q",
    "after",
    "value",
]
PARAMETERS += ["unit", "next", "window"]


@pytest.fixture(scope="module", params=["open", "closed", "logged in"])
def any_service(request: pytest.FixtureRequest) -> Iterator[Service]:
    auth: Any = None if request.param == "open" else ("ada", "lovelace")
    with service(auth=auth, secret_key="a key of the team") as running:
        if request.param == "logged in":
            form = {"username": "ada", "password": "lovelace"}
            assert running.client.post("/tasks/auth/login", data=form, follow_redirects=False).status_code == 303
        yield running


def operations(app: FastAPI) -> list[tuple[str, str]]:
    """Every route below the path, pages too."""
    found = []
    for route in iter_route_contexts(app.routes):
        path, methods = getattr(route, "path_format", ""), getattr(route, "methods", None) or ()
        if path.startswith("/tasks") and not path.endswith(("/stream", "/logout")):
            found += [(method, re.sub(r"{.*?}", "x", path)) for method in sorted(methods)]
    return found


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_no_header_parameter_or_body_makes_a_route_fail(any_service: Service, hostile: str) -> None:
    client, value = any_service.client, hostile.encode("latin-1", "replace")
    app = client.app
    assert isinstance(app, FastAPI)
    found = operations(app)
    assert len(found) > 25
    for method, path in found:
        tries: list[dict[str, Any]] = [{"headers": {name: value}} for name in ALONE]
        tries.append({"headers": dict.fromkeys(HEADERS, value)})
        tries.append({"params": dict.fromkeys(PARAMETERS, hostile)})
        for kind in ("application/json", "application/x-www-form-urlencoded"):
            tries.append({"content": value, "headers": {"content-type": kind}})
        for what in tries:
            answer = send(client, method, path, what)
            if answer is not None and answer.status_code >= 400:
                assert answer.status_code < 500, (method, path, what)
                said = answer.headers.get("content-type", "")
                assert "hx-redirect" in answer.headers or "html" in said or answer.json()["detail"], (
                    method,
                    path,
                    what,
                )


def send(client: TestClient, method: str, path: str, what: dict[str, Any]) -> Any:
    """The answer; None for what no client can send."""
    try:
        return client.request(method, path, follow_redirects=False, **what)
    except (ValueError, UnicodeError, InvalidURL) as error:
        if "app/taskflow" in "".join(traceback.format_exception(error)):
            raise
        return None
