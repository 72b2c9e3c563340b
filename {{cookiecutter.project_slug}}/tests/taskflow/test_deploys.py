"""Versions: which one runs, when it began, what moved with it; and processes that are told to start no more tasks."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.taskflow import TaskManager, TaskStatus
from app.taskflow.backends.base import Beat, GaugeRow, Instance, Record
from app.taskflow.deploys import BEGAN, Change, Deploy, changes, code_version, deploys, split
from app.taskflow.errors import InstanceNotFound
from app.taskflow.history import RESCUED, SPANS, Bar, Lost, Sums, bucket_of, lost
from app.taskflow.models import InstanceRecord, to_micros, utc_now
from app.taskflow.web import charts
from app.taskflow.web.pages import overview, workers

from .conftest import StartManager
from .helpers import eventually
from .web_support import Service, make_manager, page, service

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
DEPLOY = Deploy(NOW, "b", "a")


def row(minute: int, series: str, sums: Sums, kind: str = "name") -> GaugeRow:
    return GaugeRow(60, to_micros(NOW + timedelta(minutes=minute)), kind, series, sums.dumps())


def start(minute: int, version: str) -> GaugeRow:
    return row(minute, version, Sums(Counter({BEGAN: 1})), "version")


def runs(seconds: float, n: int, *, failed: int = 0, retried: int = 0) -> Sums:
    ended = {TaskStatus.SUCCESS: n - failed - retried, TaskStatus.FAILED: failed, "retried": retried}
    return Sums(Counter({str(what): count for what, count in ended.items()}), run=Counter({bucket_of(seconds): n}))


# -- which version


def test_a_version_is_another_one_as_soon_as_any_python_file_is(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text("a = 1")
    (tmp_path / "notes.txt").write_text("of no account")

    def version() -> str:
        code_version.cache_clear()
        return code_version(tmp_path)

    first = version()
    assert len(first) == 7
    (tmp_path / "notes.txt").write_text("changed")
    assert version() == first
    (tmp_path / "tasks.py").write_text("a = 2")
    second = version()
    (tmp_path / "tasks.py").rename(tmp_path / "jobs.py")
    assert len({first, second, version()}) == 3


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], []),
        ([(0, "a")], []),
        ([(0, "a"), (5, "a")], []),
        ([(0, "a"), (5, "b"), (6, "b")], [(5, "b", "a")]),
        ([(5, "b"), (0, "a"), (9, "a")], [(5, "b", "a"), (9, "a", "b")]),
    ],
)
def test_a_deploy_is_the_first_start_of_another_version(rows: list[Any], found: list[Any]) -> None:
    expected = [Deploy(NOW + timedelta(minutes=minute), version, before) for minute, version, before in found]
    assert deploys([start(*each) for each in rows]) == expected


def test_a_row_without_a_start_says_nothing() -> None:
    assert deploys([start(0, "a"), row(1, "b", Sums(), "version"), start(2, "a")]) == []


# -- what moved


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        (runs(0.1, 100), runs(0.1, 100), []),
        (runs(0.1, 100), runs(1.0, 100), ["run"]),
        (runs(1.0, 100), runs(0.1, 100), ["run"]),
        (runs(0.1, 100), runs(1.0, 19), []),
        (runs(0.1, 19), runs(1.0, 100), []),
        (runs(0.001, 100), runs(0.005, 100), []),
        (runs(0.1, 100), runs(0.1, 100, failed=10), ["failed"]),
        (runs(0.1, 100), runs(0.1, 100, retried=10), ["failed"]),
        (runs(0.1, 100, failed=10), runs(0.1, 100), ["failed"]),
        (runs(0.1, 100), runs(0.1, 100, failed=2), []),
        (runs(0.1, 20), runs(0.1, 20, failed=2), []),
        (runs(0.1, 100), runs(1.0, 100, failed=50), ["failed", "run"]),
    ],
)
def test_what_moved_is_told_from_what_did_not(before: Sums, after: Sums, moved: list[str]) -> None:
    assert [change.what for change in changes({"f": before}, {"f": after})] == moved


def test_the_worst_comes_first_and_what_improved_last() -> None:
    before = {"slow": runs(0.1, 50), "broken": runs(0.1, 50), "better": runs(1.0, 50), "gone": runs(0.1, 50)}
    after = {"slow": runs(1.0, 50), "broken": runs(0.1, 50, failed=25), "better": runs(0.1, 50), "new": runs(0.1, 50)}
    assert [change.name for change in changes(before, after)] == ["broken", "slow", "better"]


def test_the_minute_of_the_deploy_counts_on_neither_side() -> None:
    rows = [row(minute, "f", runs(0.1, 1)) for minute in range(-31, 32)]
    before, after = split(DEPLOY, rows)
    assert (before["f"].run.total(), after["f"].run.total()) == (30, 30)
    assert split(DEPLOY, []) == ({}, {})


def test_a_mark_stands_where_its_moment_is() -> None:
    span = SPANS["1h"]
    history = [Bar(NOW + timedelta(minutes=n), runs(0.1, 1)) for n in range(span.bars)]
    chart = charts.throughput(history, 60.0, [Deploy(NOW + timedelta(minutes=30), "b", "a")], width=720, height=96)
    assert chart is not None
    assert [mark.x for mark in chart.marks] == [360.0]


async def test_a_comparison_is_made_once_for_everybody() -> None:
    asked: list[Deploy] = []

    async def find(deploy: Deploy) -> list[Change]:
        asked.append(deploy)
        return []

    compared = overview.Remembered(find, 60.0)
    other = Deploy(NOW, "c", "b")
    for deploy in (DEPLOY, DEPLOY, other, other):
        await compared(deploy)
    assert asked == [DEPLOY, other]


# -- the whole


async def test_a_new_version_is_a_deploy_that_every_instance_knows_of(start_manager: StartManager) -> None:
    def version(name: str) -> Any:
        return lambda manager: setattr(manager, "version", name)

    first = await start_manager(version("v1"))
    await first.recorder.write()
    assert await first.store.deploys(SPANS["1h"]) == []
    # The next bucket of a minute is another one; nobody should wait for it.
    early = to_micros((utc_now() - timedelta(minutes=5)).replace(second=0, microsecond=0))
    kept = {60: utc_now() - timedelta(days=1)}
    await first.journal.obey(Record([GaugeRow(60, early, "version", "v0", Sums(Counter({BEGAN: 1})).dumps())], kept))
    (found,) = await first.store.deploys(SPANS["1h"])
    assert (found.version, found.before) == ("v1", "v0")
    (me,) = await first.store.instances()
    assert me.version == "v1"


async def test_without_a_name_the_version_is_a_checksum_of_the_code(start_manager: StartManager) -> None:
    manager = await start_manager()
    (me,) = await eventually(manager.store.instances)
    code_version.cache_clear()
    assert me.version == code_version()


async def test_a_drained_instance_ends_what_it_runs_and_starts_nothing(start_manager: StartManager) -> None:
    go_on = asyncio.Event()

    def define(manager: TaskManager) -> None:
        @manager.task
        async def waits() -> None:
            await go_on.wait()

    first, second = await start_manager(define), await start_manager(define)
    second.dispatcher._claiming = False  # the first one is to have it
    task_id = await first.enqueue(first.registry.named("waits").function)

    async def runs_at(manager: TaskManager, task: str) -> bool:
        found = await manager.store.get(task)
        return found.status is TaskStatus.RUNNING and found.instance == manager.instance_id

    await eventually(lambda: runs_at(first, task_id))
    await second.store.drain_instance(first.instance_id, "ada")
    await eventually(lambda: first.dispatcher.retired)
    assert first.unready() == "this instance drains: it starts no more tasks"
    second.dispatcher._claiming = True
    other = await first.enqueue(first.registry.named("waits").function)
    await eventually(lambda: runs_at(second, other))
    assert await runs_at(first, task_id)
    found = {item.instance_id: item for item in await second.store.instances()}
    await eventually(lambda: slots_of(second, first.instance_id, 0))
    assert found[second.instance_id].slots > 0
    go_on.set()
    await first.result(task_id, 5)
    await first.result(other, 5)
    (act,) = await second.store.audit(None, 10)
    assert (act.kind, act.actor) == ("drain_instance", "ada")
    assert first.instance_id in (act.detail or "")


async def slots_of(manager: TaskManager, instance_id: str, slots: int) -> bool:
    return any(item.instance_id == instance_id and item.slots == slots for item in await manager.store.instances())


async def test_an_instance_that_nobody_knows_cannot_be_drained(start_manager: StartManager) -> None:
    manager = await start_manager()
    with pytest.raises(InstanceNotFound, match="'nobody'"):
        await manager.store.drain_instance("nobody")


# -- on pages


@pytest.fixture
def running() -> Iterator[Service]:
    with service() as running:
        yield running


def test_a_process_is_drained_from_its_page(running: Service) -> None:
    document = page(running.client.get("/tasks/dashboard/workers"))
    form = document.form("Drain")
    assert running.client.post(form.action).headers["location"].endswith("/dashboard/workers")
    while running.client.get("/tasks/ready").status_code == 200:
        pass
    while "Drained" not in (document := page(running.client.get("/tasks/dashboard/workers"))).text:
        pass
    assert not any("Drain " in button for form in document.forms for button in form.buttons)
    (act,) = running.client.get("/tasks/audit").json()
    assert (act["action"], act["detail"]["instance"]) == ("drain_instance", running.manager.instance_id)
    assert running.client.post("/tasks/instances/nobody/drain").status_code == 404


def test_a_drained_worker_is_told_from_one_that_only_accepts() -> None:
    one = InstanceRecord("a", "host", 1, "2", NOW, NOW, 0, 0)
    assert [row.drained for row in workers.facts([one], NOW, {"a"})] == [True]
    assert [row.drained for row in workers.facts([one], NOW)] == [False]


def test_the_overview_says_since_which_version_what_moved() -> None:
    manager = make_manager(threading.Event())
    manager.version = "v2"
    now = utc_now().replace(second=0, microsecond=0)

    def gauge(minutes: int, kind: str, series: str, sums: Sums) -> GaugeRow:
        return GaugeRow(60, to_micros(now - timedelta(minutes=minutes)), kind, series, sums.dumps())

    rows = [
        gauge(40, "version", "v1", Sums(Counter({BEGAN: 1}))),
        gauge(20, "version", "v2", Sums(Counter({BEGAN: 1}))),
    ]
    rows += [gauge(30, "name", "add_up", runs(0.1, 50)), gauge(10, "name", "add_up", runs(2.0, 50, failed=25))]
    with service(manager=manager) as running:
        running.run("add_up", 1, 2)
        record = Record(rows, {60: now - timedelta(days=1)})
        running.client.portal.call(running.manager.journal.obey, record)  # type: ignore[union-attr]
        text = page(running.client.get("/tasks/dashboard")).text
    assert "Since version v2" in text
    assert "add_up fails more often: 0 % of its attempts before, 50.0 % since" in text
    assert "is slower: 95 % of its attempts took below" in text


# -- lost processes


def test_who_saw_to_one_process_together_is_added_up() -> None:
    def gone(minute: int, series: str, rescued: int) -> GaugeRow:
        return row(minute, series, Sums(Counter({RESCUED: rescued})), "lost")

    found = lost([gone(2, "host:7 v1 beta id-1", 3), gone(1, "host:7 v1 beta id-1", 4), gone(5, "host:8 v2 id-2", 0)])
    first, second = NOW + timedelta(minutes=1), NOW + timedelta(minutes=5)
    assert found == [Lost(first, "host:7", "v1 beta", "id-1", 7), Lost(second, "host:8", "v2", "id-2", 0)]


async def test_a_lost_process_is_remembered_with_what_it_had_left(start_manager: StartManager) -> None:
    manager = await start_manager(lambda manager: setattr(manager, "lease_seconds", 1.0))
    gone = Instance("gone", "elsewhere", "", 7, "", "v1", utc_now())
    manager.backend.beat(gone, Beat(utc_now(), utc_now() + timedelta(seconds=1), 4, 0))

    async def noticed() -> bool:
        await manager.recorder.write()
        return bool(await manager.store.lost())

    await eventually(noticed, 30)
    (found,) = await manager.store.lost()
    assert (found.process, found.version, found.instance_id, found.rescued) == ("elsewhere:7", "v1", "gone", 0)


def test_the_page_of_workers_lists_them_for_a_day(running: Service) -> None:
    now = utc_now().replace(second=0, microsecond=0)
    rows = [
        GaugeRow(60, to_micros(now - ago), "lost", f"{process} v1 {process}-id", Sums(Counter({RESCUED: 3})).dumps())
        for process, ago in (("host:7", timedelta(hours=2)), ("host:8", timedelta(hours=30)))
    ]
    record = Record(rows, {60: now - timedelta(days=3)})
    running.client.portal.call(running.manager.journal.obey, record)  # type: ignore[union-attr]
    text = page(running.client.get("/tasks/dashboard/workers")).text
    assert "Lost within a day" in text
    assert "host:7" in text
    assert "host:8" not in text
