"""What the system's being there costs an app's own routes, in calls of Python functions: no load changes that."""

import asyncio
import sys
from types import FrameType
from typing import Any

import fastapi
import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from app.taskflow import TaskAdmin, TaskManager

MOST_EXTRA_CALLS = 10


def make_app(admin: str | None, *, routed: str) -> FastAPI:
    """An app with one route that takes no background tasks, on the app itself or in a router of its own."""

    async def session() -> str:
        return "a dependency of the team's own"

    async def nothing(session: str = Depends(session)) -> dict[str, str]:
        return {"session": session}

    app = FastAPI()

    def add_routes() -> None:
        router = APIRouter() if routed == "router" else app
        router.get("/nothing")(nothing)
        if isinstance(router, APIRouter):
            app.include_router(router)

    if admin is None:
        add_routes()
        return app
    place, _, installed = admin.partition(", ")
    if place == "after":
        add_routes()
    TaskAdmin(app, TaskManager(), auto_install=bool(installed))
    if place == "before":
        add_routes()
    return app


def calls_of_one_request(app: FastAPI) -> int:
    with TestClient(app) as client:
        client.get("/nothing")  # what FastAPI remembers of a route it makes at the first request
        return asyncio.run(calls_of(app, "/nothing"))


async def calls_of(app: FastAPI, path: str) -> int:
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": [], "root_path": ""}
    number = 0

    def count(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal number
        number += event == "call"

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        assert message.get("status", 200) == 200

    sys.setprofile(count)
    try:
        await app(scope, receive, send)
    finally:
        sys.setprofile(None)
    return number


@pytest.mark.parametrize("routed", ["app", "router"])
@pytest.mark.parametrize("admin", ["before", "after", "before, auto_install", "after, auto_install"])
def test_a_route_that_takes_no_tasks_does_not_pay_for_those_that_do(admin: str, routed: str) -> None:
    alone = calls_of_one_request(make_app(None, routed=routed))
    assert alone > 50  # else nothing was counted
    assert calls_of_one_request(make_app(admin, routed=routed)) <= alone + MOST_EXTRA_CALLS


def test_what_is_used_of_fastapi_s_inside_is_what_this_version_has() -> None:
    """Included routers, dependants and the stack in the scope are FastAPI's own affair. With another version, read
    `admin.py` and `background.py` beside it: this test fails to say so."""
    assert fastapi.__version__.startswith("0.165.")
    app = make_app("before, auto_install", routed="router")
    with TestClient(app):
        shown = {
            route.path: route.dependant for route in iter_route_contexts(app.routes) if "nothing" in str(route.path)
        }
    assert [asked.call.__name__ for asked in shown["/nothing"].dependencies if asked.call] == ["session"]
