"""Fixtures of the engine's tests.

Asynchronous tests run through anyio's pytest plugin (`pytestmark = pytest.mark.anyio`), on asyncio alone. A new backend
joins every test of the contract with one line in `LOCATIONS`; only those whose backend is here are used.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.metrics import _internal as metrics
from opentelemetry.util._once import Once

from app.taskflow import TaskManager
from app.taskflow.backends import Backend, open_backend

from .helpers import Bench
from .servers import BACKENDS, SERVERS, fresh_postgres, fresh_redis, postgres_url, redis_url

LOCATIONS: dict[str, Callable[[Path], AbstractContextManager[str | None]]] = {
    "sqlite-file": lambda folder: nullcontext(f"sqlite:///{folder / 'tasks.db'}"),
    "sqlite-memory": lambda folder: nullcontext(None),
    "redis": lambda folder: fresh_redis(redis_url()),
    "postgres": lambda folder: fresh_postgres(postgres_url()),
}
"""Backend -> where a test keeps its tasks."""
HERE = [name for name in LOCATIONS if name not in SERVERS or name in BACKENDS]
SHARED = [name for name in HERE if name != "sqlite-memory"]
"""Those that several instances can open at once."""

LONGEST_TEST = 60.0
"""Seconds."""
StartManager = Callable[..., Awaitable[TaskManager]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for ever is a failure, and not a test run without end."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = limited(item.obj)


def limited(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(*args: Any, **kwargs: Any) -> None:
        async with asyncio.timeout(LONGEST_TEST):
            await test(*args, **kwargs)

    return run


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=HERE)
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str | None]:
    with LOCATIONS[request.param](tmp_path) as found:
        yield found


@pytest.fixture(params=SHARED)
def shared_location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with LOCATIONS[request.param](tmp_path) as found:
        assert found is not None
        yield found


@pytest.fixture
async def backend(location: str | None) -> AsyncIterator[Backend]:
    backend = open_backend(location)
    await backend.open()
    yield backend
    await backend.close()


@pytest.fixture
def bench(backend: Backend) -> Bench:
    return Bench(backend)


@pytest.fixture
def quick_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is away is waited for a fraction of the usual time."""
    monkeypatch.setattr("app.taskflow.journal.ACCEPT_TIMEOUT", 0.7)
    monkeypatch.setattr("app.taskflow.manager.START_TIMEOUT", 0.2)
    monkeypatch.setattr("app.taskflow.housekeeping.CANCEL_INTERVAL", 0.1)


@pytest.fixture
def no_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process can give OpenTelemetry its providers once; so can a test with this, and the next test finds none."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    monkeypatch.setattr(metrics, "_METER_PROVIDER", None)
    monkeypatch.setattr(metrics, "_METER_PROVIDER_SET_ONCE", Once())
    monkeypatch.setattr(metrics, "_PROXY_METER_PROVIDER", metrics._ProxyMeterProvider())


@pytest.fixture
async def start_manager(tmp_path: Path) -> AsyncIterator[StartManager]:
    """Starts a manager on a file of this test, with `define(manager)` called before, and stops it at the end."""
    async with AsyncExitStack() as stack:

        async def start(define: Callable[[TaskManager], object] | None = None, **options: Any) -> TaskManager:
            manager = TaskManager(**{"snapshot_db": str(tmp_path / "tasks.db"), "shutdown_timeout": 5.0, **options})
            if define is not None:
                define(manager)
            await stack.enter_async_context(manager.lifespan())
            return manager

        yield start
