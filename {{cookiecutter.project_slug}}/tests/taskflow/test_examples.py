"""The gallery in `docs/examples/`: each module is imported as it stands and does what its first line says."""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from app.taskflow import TaskAdmin, TaskManager, TaskStatus
from app.taskflow.models import TaskFilter
from app.taskflow.testing import advance, drain, instant_retries

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.chdir(tmp_path)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@asynccontextmanager
async def served(module: ModuleType) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of an app that has the example's routes and its task system, started."""
    app = FastAPI()
    TaskAdmin(app, module.task_manager, auto_install=True)
    if router := getattr(module, "router", None):
        app.include_router(router)
    transport = httpx2.ASGITransport(app)
    async with (
        module.task_manager.lifespan(app),
        httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as it,
    ):
        yield it


def outside(*answers: httpx2.Response, seen: list[httpx2.Request] | None = None) -> Callable[[], httpx2.AsyncClient]:
    """Somebody else's server, which gives these answers, one after the other."""
    left = list(answers)

    def answer(request: httpx2.Request) -> httpx2.Response:
        if seen is not None:
            seen.append(request)
        return left.pop(0)

    return lambda: httpx2.AsyncClient(transport=httpx2.MockTransport(answer), base_url="https://crm.example.com")


async def records(manager: TaskManager, name: str | None = None) -> list[Any]:
    return list((await manager.store.page(TaskFilter(func_name=name))).tasks)


async def test_a_webhook_is_checked_delivered_once_and_retried(example: Callable[[str], ModuleType]) -> None:
    module = example("webhook")
    seen: list[httpx2.Request] = []
    body = json.dumps({"id": "evt_1", "kind": "paid"}).encode()
    signature = hmac.new(module.SECRET, body, hashlib.sha256).hexdigest()
    busy, taken = httpx2.Response(503, headers={"Retry-After": "120"}), httpx2.Response(200)
    async with served(module) as client:
        app = module.task_manager.injector.app
        app.dependency_overrides[module.outgoing] = outside(busy, taken, seen=seen)
        assert (await client.post("/webhook", content=body, headers={"X-Signature": "forged"})).status_code == 401
        with instant_retries(module.task_manager):
            for _ in range(2):
                answer = await client.post("/webhook", content=body, headers={"X-Signature": signature})
                assert answer.json() == {"accepted": "evt_1"}
            await drain(module.task_manager)
    assert len(seen) == 2
    assert json.loads(seen[0].content)["kind"] == "paid"
    refused = httpx2.HTTPStatusError("", request=seen[0], response=httpx2.Response(422))
    asked = httpx2.HTTPStatusError("", request=seen[0], response=busy)
    assert module.as_the_receiver_wishes(asked) == 120
    assert not module.as_the_receiver_wishes(refused)


async def test_an_order_and_its_email_come_together(example: Callable[[str], ModuleType]) -> None:
    module = example("order")
    module.SQLModel.metadata.create_all(module.engine)
    try:
        async with served(module) as client:
            placed = (await client.post("/orders", params={"email": "a@example.com"})).json()
            await module.task_manager.result(placed["task_id"], timeout=10)
        with module.Session(module.engine) as session:
            assert session.get(module.Order, placed["order_id"]).confirmed
    finally:
        module.SQLModel.metadata.remove(module.Order.__table__)


async def test_a_report_is_fetched_when_it_is_done(example: Callable[[str], ModuleType]) -> None:
    module = example("report")
    async with served(module) as client:
        task_id = (await client.post("/reports/2026")).json()["task_id"]
        await drain(module.task_manager)
        assert (await client.get(f"/reports/by-task/{task_id}")).text.splitlines()[11] == "2026,12,12000"
        assert (await module.task_manager.store.get(task_id)).progress == {
            "done": 12,
            "total": 12,
            "message": "month 12",
        }
        assert (await client.get("/reports/by-task/unknown")).status_code == 404


async def test_parts_are_collected_once(example: Callable[[str], ModuleType]) -> None:
    module = example("fan_out")
    manager = module.task_manager
    async with served(module):
        collecting = await manager.result(await manager.enqueue(module.measure_all, ["a", "bb", "ccc"]), timeout=10)
        assert await manager.result(collecting, timeout=10) == 6
        assert len(await records(manager, "measure")) == 3


async def test_a_night_is_one_run(example: Callable[[str], ModuleType]) -> None:
    module = example("nightly")
    manager = module.task_manager
    manager.clock.freeze(datetime(2026, 3, 28, 12, tzinfo=UTC))
    async with served(module):
        await advance(manager, 3 * 86_400)
        runs = await records(manager, "clean_up")
    assert [task.run_at.hour for task in runs] == [2, 2, 2]  # three in London's summer, which began that night
    assert {task.status for task in runs} == {TaskStatus.SUCCESS}


async def test_a_client_that_is_told_to_wait_waits(example: Callable[[str], ModuleType]) -> None:
    module = example("rate_limited")
    manager = module.task_manager
    async with served(module):
        full, taken = httpx2.Response(429, headers={"Retry-After": "7"}), httpx2.Response(200)
        manager.injector.app.dependency_overrides[module.crm] = outside(full, taken)
        with instant_retries(manager):
            task_id = await manager.enqueue(module.push_contact, {"id": 1})
            assert await manager.result(task_id, timeout=10) == 200
        assert (await manager.store.get(task_id)).retries_used == 0


async def test_an_upload_is_read_and_goes(example: Callable[[str], ModuleType]) -> None:
    module = example("upload")
    async with served(module) as client:
        answer = await client.post("/uploads", files={"file": ("../../etc/passwd", b"content")})
        found = await module.task_manager.result(answer.json()["task_id"], timeout=10)
    assert found == hashlib.sha256(b"content").hexdigest()
    assert os.listdir("spool") == []
    assert module.digest(Path("spool/gone")) == "done before"


async def test_a_tenant_has_one_run_a_month(example: Callable[[str], ModuleType]) -> None:
    module = example("tenants")
    async with served(module) as client:
        first, again = [(await client.post("/tenants/acme/invoices/2026-11")).json() for _ in range(2)]
        other = (await client.post("/tenants/zeta/invoices/2026-11")).json()
        await drain(module.task_manager)
        assert first == again != other
        found = (await client.get("/tasks", params={"tag": "tenant:acme"})).json()
    assert [(task["queue"], task["result"]) for task in found] == [("invoices-large", "acme 2026-11")]


async def test_many_changes_are_one_rebuild(example: Callable[[str], ModuleType]) -> None:
    module = example("debounce")
    manager = module.task_manager
    async with served(module) as client:
        answers = [(await client.put(f"/sites/shop/pages/{page}")).json() for page in ("a", "b", "c")]
        waiting = await manager.list_scheduled()
        statuses = sorted(task.status for task in await records(manager))
    assert [item.task_id for item in waiting] == [answers[-1]["rebuilt_by"]]
    assert statuses == ["cancelled", "cancelled", "pending"]


async def test_thumbnails_are_made_in_a_process(example: Callable[[str], ModuleType]) -> None:
    module = example("thumbnails")
    assert module.shrink(b"abcdef", 2) == b"ace"
    assert module.task_manager.registry.named("shrink").executor == "process"


async def test_a_step_that_fails_for_good_undoes_the_one_before(example: Callable[[str], ModuleType]) -> None:
    module = example("steps")
    manager = module.task_manager
    async with served(module):
        await manager.enqueue(module.book_flight, "t1", 2)
        await manager.enqueue(module.book_flight, "t2", 5)
        await drain(manager)
        while any(not task.status.terminal for task in await records(manager)):
            await drain(manager)
    assert module.booked == {"t1": {"flight", "hotel"}, "t2": set()}


async def test_people_are_told_of_what_failed(example: Callable[[str], ModuleType]) -> None:
    module = example("alerts")
    seen: list[httpx2.Request] = []
    manager: TaskManager = module.make_manager(outside(httpx2.Response(200), seen=seen)())

    @manager.task
    def fails() -> None:
        raise ValueError("no such order")

    async with manager.lifespan():
        await manager.enqueue(fails)
        await drain(manager)
    assert "fails failed after 1 attempts: no such order" in json.loads(seen[0].content)["text"]


def test_every_example_is_in_the_gallery() -> None:
    gallery = (EXAMPLES / "index.md").read_text("utf-8")
    assert all(f"({path.name})" in gallery for path in EXAMPLES.glob("*.py"))
