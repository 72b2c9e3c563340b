"""A move from one store to another: everything arrives, between any two, whatever interrupts it, and goes on there."""

from __future__ import annotations

import asyncio
import functools
import itertools
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.taskflow import (
    QueueConfig,
    QueueFullError,
    TaskDefinitionError,
    TaskManager,
    TaskStatus,
    get_task_context,
    task_log,
)
from app.taskflow.backends import Backend, open_backend
from app.taskflow.backends.base import KINDS, LogLine, Purge, Revoke
from app.taskflow.copying import Copied, batches, copy
from app.taskflow.errors import CopyRefused
from app.taskflow.housekeeping import introduce
from app.taskflow.models import TaskFilter, utc_now
from app.taskflow.testing import drain

from .conftest import LOCATIONS, SHARED
from .helpers import (
    Bench,
    all_tasks,
    assert_counters_match_rows,
    assert_counts_match_rows,
    eventually,
    make_instance,
)

pytestmark = pytest.mark.anyio

PAIRS = list(itertools.product(SHARED, repeat=2))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every kind comes in several, and some end within a task."""
    monkeypatch.setattr("app.taskflow.copying.BATCH", 7)
    monkeypatch.setattr("app.taskflow.copying.LARGEST_LOAD", 2_000)
    if "redis" in SHARED:
        monkeypatch.setattr("app.taskflow.backends.redis_copies.AT_ONCE", 3)


class Places:
    """Gives fresh locations of stores."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._numbers = itertools.count()

    def fresh(self, name: str) -> str:
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        location = self._stack.enter_context(LOCATIONS[name](folder))
        assert location is not None
        return location


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    with ExitStack() as stack:
        yield Places(tmp_path, stack)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Stores that hold something of everything; a copy changes nothing in them."""
    with ExitStack() as stack:
        places = Places(tmp_path_factory.mktemp("sources"), stack)

        @functools.cache
        def source(name: str) -> str:
            location = places.fresh(name)
            asyncio.run(populate(location))
            return location

        yield source


@pytest.fixture(params=PAIRS, ids="-to-".join)
def locations(request: pytest.FixtureRequest, places: Places, sources: Callable[[str], str]) -> tuple[str, str]:
    source, target = request.param
    return sources(source), places.fresh(target)


@pytest.fixture
async def pair(locations: tuple[str, str]) -> AsyncIterator[tuple[Backend, Backend]]:
    """A source that holds something of everything, and an empty target."""
    source, target = map(open_backend, locations)
    yield source, target
    await source.close()
    await target.close()


def make_service(location: str) -> TaskManager:
    limits = QueueConfig(concurrency=1, max_size=2)
    manager = TaskManager(snapshot_db=location, queues={"slow": limits}, shutdown_timeout=5.0)

    @manager.task
    async def greet(name: str) -> str:
        return f"hello {name}"

    @manager.task
    async def fail(text: str) -> None:
        raise ValueError(text)

    @manager.task(retries=2, delay=3_600)
    async def flaky() -> None:
        raise OSError("not now")

    @manager.task(tags={"kind": "chatty"}, priority=-3)
    async def chatty() -> Mapping[str, int]:
        context = get_task_context()
        assert context is not None
        for number in range(20):
            task_log(f"line {number}", number=number)
        context.progress(done=20)
        return {"lines": 20}

    @manager.schedule(every=3_600, run_on_startup=True)
    async def hourly() -> None: ...

    @manager.schedule(cron="0 2 * * *", timezone="Europe/Berlin", overlap=False)
    async def nightly() -> None: ...

    return manager


def function(manager: TaskManager, name: str) -> Any:
    return manager.registry.named(name).function


async def populate(location: str) -> None:
    manager = make_service(location)
    async with manager.lifespan():
        greet, soon = function(manager, "greet"), utc_now() + timedelta(hours=1)
        await manager.enqueue(greet, "ann", tags={"who": "ann"}, idempotency_key="ann")
        await manager.enqueue(function(manager, "fail"), "no way")
        await manager.enqueue(function(manager, "flaky"))
        await manager.enqueue(function(manager, "chatty"))
        await manager.schedule_once(greet, "in time", run_at=soon, run_key="deadline: 1/2")
        delayed = await manager.enqueue(greet, "x" * 3_000, delay_seconds=3_600, priority=2)
        await drain(manager)
        await manager.store.cancel(delayed, "ann")
        await manager.store.pause_queue("slow", "ann", "repairs")
        await manager.schedules.pause("nightly", "bob", "nobody reads it")
        for number in range(2):
            await manager.enqueue(greet, f"slow {number}", queue="slow")
        with pytest.raises(QueueFullError):
            await manager.enqueue(greet, "too many", queue="slow")
    manager = make_service(location)
    manager.runs_tasks = False
    async with manager.lifespan():
        for number in range(3):
            await manager.enqueue(function(manager, "greet"), f"ready {number}")
    await add_by_hand(location)


async def add_by_hand(location: str) -> None:
    """What only crashes and long lives make."""
    backend = open_backend(location)
    await backend.open()
    gone, lost, other = (Bench(backend, name, now=utc_now()) for name in ("gone", "lost", "other"))
    await gone.add("left", tags={"ümlaut": "✓"}, max_attempts=3)
    (left,) = await gone.claim(names={"left": "thread"})
    await other.cancel(left.task_id, "bob")
    for name in ("lost", "often"):
        often = await lost.add(name)
        await lost.claim(names={name: "thread"})
    await other.rescue("lost")
    for number in range(10):
        await other.requeue(often, actor="ann" if number % 2 else None)
        await other.cancel(often, None if number % 2 else "ann")
    await other.obey(Revoke("session", utc_now() + timedelta(days=1)))
    long_ago = utc_now() - timedelta(days=9)
    await leave_traces(Bench(backend, "early", now=long_ago), Bench(backend, "other", now=long_ago))
    await backend.close()


async def leave_traces(early: Bench, other: Bench) -> None:
    """Of a task that was deleted: what somebody did to it, a line and an end that came too late."""
    deleted = await early.add("deleted")
    (task,) = await early.claim(names={"deleted": "thread"})
    await early.cancel(deleted, "bob")
    await other.rescue("early")
    await other.obey(Purge(early.now + timedelta(days=1), 1_000))
    assert await other.backend.get(deleted) is None
    assert not await early.finish(task)
    await early.turn(logs=[LogLine(deleted, early.now, "info", 0, "too late")])


async def rows_of(store: Backend, kind: str) -> list[Mapping[str, Any]]:
    return [row async for batch in batches(store, kind) for row in batch.rows]


FILTERS = [
    *(TaskFilter(statuses=(status,)) for status in TaskStatus),
    *(TaskFilter(func_name=name) for name in ("greet", "flaky", "hourly", "left")),
    *(TaskFilter(queue=queue) for queue in ("default", "slow")),
    TaskFilter(schedule="hourly"),
]


async def contents(store: Backend) -> dict[str, Any]:
    """All that readers can see."""
    tasks = await all_tasks(store)
    ids = [task.task_id for task in tasks]
    return {
        "tasks": [await store.get(task_id) for task_id in ids],
        "lists": [await all_tasks(store, where) for where in FILTERS],
        "arguments": await store.arguments(ids, 10_000),
        "events": {task_id: await store.events(task_id) for task_id in ids},
        "logs": {task_id: await store.logs(task_id, 0, 1_000) for task_id in ids},
        "audit": await store.audit(None, 1_000),
        "last": await store.last_seq(),
        "queues": await store.queues(),
        "schedules": await store.schedules(),
        "one-offs": await store.scheduled(None, None, 100),
        "counts": {(count.queue, count.name, count.status): count for count in await store.counts()},
        "revoked": await store.is_revoked("session"),
        "stopping": await store.cancels("gone"),
    }


def held_by(report: Copied) -> dict[str, int]:
    return {line.name: line.held for line in report.lines}


async def test_every_record_event_and_line_arrives_as_it_was(pair: tuple[Backend, Backend]) -> None:
    source, target = pair
    report = await copy(source, target, utc_now())
    assert report.complete, report
    assert report.mended == 0
    before, after = await contents(source), await contents(target)
    for part in before:
        assert after[part] == before[part], part
    assert {task.status for task in after["tasks"]} == set(TaskStatus)
    assert all(after["lists"])
    assert held_by(report)["tasks"] == len(before["tasks"])
    assert any(len(events) > 20 for events in after["events"].values())
    assert {event.actor for event in after["audit"]} == {"ann", "bob"}
    assert after["revoked"]
    await assert_counters_match_rows(target, utc_now())
    for kind in KINDS:
        read, held = await rows_of(source, kind), await rows_of(target, kind)
        assert sorted(map(repr, map(by_name, held))) == sorted(map(repr, map(by_name, read))), kind
    assert [pulse.instance.instance_id for pulse in await asyncio.to_thread(target.pulses)] == ["gone"]


def by_name(row: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    return sorted(row.items())


async def test_the_copy_goes_on_where_the_source_stopped(
    pair: tuple[Backend, Backend], locations: tuple[str, str]
) -> None:
    source, target = pair
    assert (await copy(source, target, utc_now())).complete
    known, newest = await all_tasks(target), await target.last_seq()
    manager = make_service(locations[1])
    manager.lease_seconds = 1.0
    async with manager.lifespan():
        store, greet = manager.store, function(manager, "greet")

        async def became(status: TaskStatus, *ids: str) -> bool:
            return {(await store.get(task_id)).status for task_id in ids} == {status}

        pending = [task for task in known if task.status is TaskStatus.PENDING]
        ready = [task.task_id for task in pending if task.queue == "default" and task.run_at < utc_now()]
        left = [task.task_id for task in known if task.status is TaskStatus.RUNNING]
        assert (len(ready), len(left)) == (3, 1)
        await eventually(lambda: became(TaskStatus.SUCCESS, *ready))
        await eventually(lambda: became(TaskStatus.CANCELLED, *left))  # it was asked to stop, and its process is dead
        slow = [task.task_id for task in pending if task.queue == "slow"]
        assert [(await store.get(task_id)).status for task_id in slow] == [TaskStatus.PENDING] * 2
        with pytest.raises(QueueFullError):
            await manager.enqueue(greet, "too many", queue="slow")
        await store.resume_queue("slow")
        for task_id in slow:
            assert (await manager.result(task_id, timeout=10)).startswith("hello slow")
        (ann,) = (task for task in known if task.idempotency_key == "ann")
        assert await manager.enqueue(greet, "ann", idempotency_key="ann") == ann.task_id
        assert (await store.get(ann.task_id)).attempt == 1
        (flaky,) = (task for task in known if task.func_name == "flaky")
        assert ((await store.get(flaky.task_id)).status, flaky.attempt) == (TaskStatus.PENDING, 1)
        assert [one.run_key for one in await manager.list_scheduled()] == ["deadline: 1/2"]
        assert await manager.cancel_scheduled("deadline: 1/2")
        states = {state.name: state for state in await manager.schedules.states()}
        assert (states["nightly"].paused, states["nightly"].reason) == (True, "nobody reads it")
        fresh = await manager.enqueue(greet, "new")
        assert await manager.result(fresh, timeout=10) == "hello new"
        chatty = await manager.enqueue(function(manager, "chatty"))
        await manager.result(chatty, timeout=10)
        lines = await eventually(lambda: store.logs(chatty))
        old = {line.seq for task in known for line in await target.logs(task.task_id, 0, 1_000)}
        assert min(line.seq for line in lines) > max(old)
        assert min(event.seq for event in await store.events(fresh)) > newest
        await drain(manager)
    await assert_counters_match_rows(target, utc_now())


class Killed(Exception):
    pass


async def is_killed(monkeypatch: pytest.MonkeyPatch, source: Backend, target: Backend, most: int) -> bool:
    """Whether a copy that ends at its next write after so many came to that."""
    load, loads = target.load, itertools.count()

    async def kill(kind: str, rows: Any) -> int:
        if next(loads) == most:
            raise Killed
        return await load(kind, rows)

    with monkeypatch.context() as patch:
        patch.setattr(target, "load", kill)
        try:
            await copy(source, target, utc_now())
        except Killed:
            return True
    return False


async def test_a_copy_that_is_killed_is_made_again_and_doubles_nothing(
    pair: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair
    most = 0
    while await is_killed(monkeypatch, source, target, most):
        await assert_counts_match_rows(target, utc_now())  # groups come before their tasks
        most += 3
    assert most > 12
    report = await copy(source, target, utc_now())
    assert report.complete, report
    assert await contents(target) == await contents(source)
    again = await copy(source, target, utc_now())
    assert again.complete
    assert held_by(again) == held_by(report)
    await assert_counters_match_rows(target, utc_now())


# -- what is refused


@pytest.fixture(params=SHARED)
async def stores(request: pytest.FixtureRequest, places: Places) -> AsyncIterator[tuple[Backend, Backend]]:
    """Two of a kind; the first has a task."""
    source, target = open_backend(places.fresh(request.param)), open_backend(places.fresh(request.param))
    await source.open()
    await Bench(source).add()
    yield source, target
    await source.close()
    await target.close()


@pytest.mark.parametrize("which", ["source", "target"])
async def test_a_store_that_is_in_use_is_refused(stores: tuple[Backend, Backend], which: str) -> None:
    source, target = stores
    await target.open()
    store = source if which == "source" else target
    bench = Bench(store, "alive", now=utc_now())
    await asyncio.to_thread(bench.beat)
    with pytest.raises(CopyRefused, match=r"is in use by host \(pid 1\)"):
        await copy(source, target, utc_now())
    assert await all_tasks(target) == []
    await asyncio.to_thread(store.leave, "alive")
    assert (await copy(source, target, utc_now())).complete


async def test_whether_a_store_is_in_use_is_judged_by_its_own_clock(
    stores: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = stores
    behind = timedelta(hours=-2)
    await asyncio.to_thread(Bench(source, "alive", now=utc_now() + behind).beat)
    monkeypatch.setattr(type(source), "clock_offset", property(lambda _: behind, lambda *_: None), raising=False)
    with pytest.raises(CopyRefused, match="is in use"):
        await copy(source, target, utc_now())


async def test_whoever_died_long_ago_or_on_this_machine_does_not_hold_it_up(stores: tuple[Backend, Backend]) -> None:
    source, target = stores
    dead = introduce("dead", "1", utc_now())
    await asyncio.to_thread(
        Bench(source, now=utc_now()).beat, 30.0, make_instance("x", machine=dead.machine, pid=2**22)
    )
    await asyncio.to_thread(Bench(source, "old", now=utc_now() - timedelta(minutes=2)).beat)
    assert (await copy(source, target, utc_now())).complete


async def test_one_database_is_not_copied_into_itself(stores: tuple[Backend, Backend]) -> None:
    source, _ = stores
    location = source.name.replace("sqlite:///", "sqlite:////.")
    same = open_backend(location.replace("127.0.0.1", "localhost"))
    with pytest.raises(CopyRefused, match="are one database"):
        await copy(source, same, utc_now())
    await same.close()
    assert await asyncio.to_thread(source.pulses) == []


async def test_a_target_with_tasks_of_its_own_is_refused_and_left_alone(stores: tuple[Backend, Backend]) -> None:
    source, target = stores
    await target.open()
    theirs = await Bench(target).add()
    with pytest.raises(CopyRefused, match=f"holds tasks that .* has not, {theirs}"):
        await copy(source, target, utc_now())
    assert [task.task_id for task in await all_tasks(target)] == [theirs]


async def test_a_target_with_a_history_of_its_own_is_refused(stores: tuple[Backend, Backend]) -> None:
    source, target = stores
    await target.open()
    manager = TaskManager(snapshot_backend=target, queues={"slow": QueueConfig(1)})
    async with manager.lifespan():
        await manager.store.pause_queue("slow", "ann")
    with pytest.raises(CopyRefused, match="has a history of its own"):
        await copy(source, target, utc_now())


async def test_a_target_where_a_service_was_started_once_gets_the_queues_and_schedules_of_the_source(
    pair: tuple[Backend, Backend], locations: tuple[str, str]
) -> None:
    source, target = pair
    manager = TaskManager(snapshot_db=locations[1], queues={"slow": QueueConfig(concurrency=9)})
    manager.schedule(cron="0 2 * * *", name="nightly")(lambda: None)
    async with manager.lifespan():
        assert {state.name for state in await manager.schedules.states()} == {"nightly"}
    assert (await copy(source, target, utc_now())).complete
    assert await target.queues() == await source.queues()
    assert await target.schedules() == await source.schedules()


async def test_a_source_without_a_schema_is_refused(stores: tuple[Backend, Backend]) -> None:
    source, target = stores
    with pytest.raises(CopyRefused, match="python -m app migrate"):
        await copy(target, source, utc_now())


async def test_a_difference_is_found_and_named(stores: tuple[Backend, Backend]) -> None:
    source, target = stores
    assert (await copy(source, target, utc_now())).complete
    task = await Bench(target).claim_one()
    report = await copy(source, target, utc_now())
    assert not report.complete
    assert {line.name for line in report.lines if not line.same} == {
        "tasks",
        "events",
        "pending tasks",
        "running tasks",
    }
    assert await Bench(target).status(task.task_id) is TaskStatus.RUNNING


# -- damage


@pytest.mark.parametrize("name", SHARED)
async def test_broken_rows_arrive_as_readers_were_shown_them_and_never_run(places: Places, name: str) -> None:
    location = places.fresh("sqlite-file")
    source, target = open_backend(location), open_backend(places.fresh(name))
    await source.open()
    bench = Bench(source, now=utc_now())
    ids = [await bench.add() for _ in range(8)]
    with closing(sqlite3.connect(location.removeprefix("sqlite:///"))) as connection, connection:
        for task_id, change in zip(
            ids,
            (
                "arguments = x'ff00'",
                "run_at = 'soon'",
                "priority = 9999999999",
                "name = CAST(x'6aff' AS TEXT)",
                "tags = 'a' || char(0)",
                "status = 'odd'",
                "task_id = CAST(x'ff' || task_id AS TEXT)",
            ),
            strict=False,
        ):
            connection.execute(f"UPDATE taskflow_task SET {change} WHERE task_id = ?", [task_id])
        connection.execute("UPDATE taskflow_event SET detail = x'00', attempt = 'first' WHERE seq = 1")
    report = await copy(source, target, utc_now())
    tasks = {line.name: line for line in report.lines}
    assert all(line.same for line in report.lines), report
    assert report.mended == 8
    assert (tasks["failed tasks"].held, tasks["pending tasks"].held) == (7, 1)
    for task_id in ids[:5]:
        record = await Bench(target).get(task_id)
        assert record.error is not None
        assert "broken row: its " in record.error
    assert [task.task_id for task in await Bench(target, now=utc_now()).claim()] == [ids[7]]
    await source.close()
    await target.close()


# -- what is not there


def test_a_store_that_this_project_was_not_made_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "app.taskflow.backends.postgres", None)
    with pytest.raises(TaskDefinitionError, match=r"postgresql://ann:\*\*\*@host/tasks: this project has no"):
        open_backend("postgresql://ann:secret@host/tasks")
