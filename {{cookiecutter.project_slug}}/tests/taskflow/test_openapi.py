"""The OpenAPI document is true: whatever is asked, the answer is one that it describes, and never a 500.

Requests are made up from the document by schemathesis, against a real server; with the store, and with a store that is
away.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.taskflow import BackendUnavailable, TaskAdmin, TaskManager
from app.taskflow.backends.base import Turn, TurnResult

from .web_support import make_manager

Case = schemathesis.Case[Any]
CHECKS = [schemathesis.checks.not_a_server_error, status_code_conformance, content_type_conformance]
TRIES = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@contextmanager
def served(manager: TaskManager) -> Iterator[str]:
    app = FastAPI()
    TaskAdmin(app, manager, display_func_args=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    folder: Path = tmp_path_factory.mktemp("api")
    with served(make_manager(threading.Event(), snapshot_db=str(folder / "tasks.db"), shutdown_timeout=0.5)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.fixture(scope="module")
def api_without_store() -> Iterator[schemathesis.BaseSchema]:
    manager = make_manager(threading.Event(), shutdown_timeout=0.5)
    with served(manager) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")

        async def away(_turn: Turn) -> TurnResult:
            raise BackendUnavailable("the disk is full")

        async def unanswered(*_args: object, **_options: object) -> None:
            raise BackendUnavailable("no answer")

        vars(manager.backend)["turn"] = away
        for question in ("get", "page", "events", "audit", "counts", "queues", "schedules", "scheduled", "instances"):
            setattr(manager.backend, question, unanswered)
        yield schema


def operations() -> list[tuple[str, str]]:
    app = FastAPI()
    TaskAdmin(app, TaskManager())
    paths = app.openapi()["paths"]
    return [(method.upper(), path) for path, described in paths.items() for method in described]


@pytest.mark.parametrize(("method", "path"), operations())
def test_every_answer_is_one_that_the_document_describes(api: schemathesis.BaseSchema, method: str, path: str) -> None:
    @TRIES
    @given(case=api[path][method].as_strategy())
    def ask(case: Case) -> None:
        case.call_and_validate(checks=[*CHECKS, response_schema_conformance])

    ask()


@pytest.mark.parametrize(("method", "path"), operations())
def test_a_store_that_is_away_is_an_answer_of_the_document_too(
    api_without_store: schemathesis.BaseSchema, method: str, path: str
) -> None:
    @settings(TRIES, max_examples=3)
    @given(case=api_without_store[path][method].as_strategy())
    def ask(case: Case) -> None:
        response = case.call_and_validate(checks=CHECKS[1:])
        assert response.status_code < 500 or response.status_code == 503

    ask()
