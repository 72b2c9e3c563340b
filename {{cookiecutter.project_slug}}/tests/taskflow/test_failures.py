"""Failures with one cause: what makes them the same, how many there are, and what is done to all that match."""

from __future__ import annotations

import sqlite3
from datetime import timedelta
from pathlib import Path

import pytest

from app.taskflow import TaskManager, TaskStatus
from app.taskflow.backends import Backend, open_backend
from app.taskflow.backends.base import DismissTasks, Purge, RequeueTasks, RestoreTasks
from app.taskflow.errors import TaskStateError
from app.taskflow.failures import failure_of, masked
from app.taskflow.models import TaskFilter
from app.taskflow.store import Act
from app.taskflow.testing import drain

from .conftest import StartManager
from .helpers import Bench, all_tasks, assert_counters_match_rows, assert_groups_match_rows

pytestmark = pytest.mark.anyio

TRACE = """Traceback (most recent call last):
  File "/srv/app/billing.py", line {line}, in charge
    stripe.charge(order)
  File "/srv/.venv/lib/python3.12/site-packages/stripe/api.py", line 9, in charge
    raise CardDeclined
app.billing.CardDeclined: {message}
"""


def key(name: str = "charge_card", message: str = "insufficient funds", line: int = 88, error: str = "") -> str:
    return failure_of(name, error or message, TRACE.format(line=line, message=message)).key


# -- what makes two failures the same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("order 7 not found", "order 8 not found"),
        ("no row 0192f3c1-7a30-7d2c-a5b0-1f0a3c3e9a11", "no row 0192f3c2-0000-7d2c-a5b0-1f0a3c3e9a12"),
        ("object at 0x7f00aa", "object at 0x7f00ab"),
        ("digest 9f86d081884c7d659a2feaa0", "digest 60303ae22b998861bce3b28f"),
        ("took 1,234.5 s at 12:04:11", "took 9.1 s at 11:00"),
        ("first line\nrest 1", "first line\nanother rest"),
    ],
)
def test_what_changes_from_one_to_the_next_makes_no_other_cause(one: str, other: str) -> None:
    assert key(message=one) == key(message=other)


@pytest.mark.parametrize(
    "other",
    [key(name="refund"), key(message="card expired"), failure_of("charge_card", "insufficient funds", None).key],
)
def test_another_task_message_class_or_place_is_another_cause(other: str) -> None:
    assert key() != other


def test_a_line_that_moved_is_the_same_cause() -> None:
    assert key(line=88) == key(line=91)


def test_a_failure_names_its_class_and_the_applications_own_frame() -> None:
    failure = failure_of("charge_card", "insufficient funds", TRACE.format(line=1, message="insufficient funds"))
    assert failure[1:] == ("CardDeclined", "insufficient funds", "charge in billing.py")


def test_words_are_not_masked() -> None:
    assert masked("deadbeef cafe facade decade") == "deadbeef cafe facade decade"


# -- how many there are, on every store


async def failed(bench: Bench, error: str, name: str = "job") -> str:
    task_id = await bench.add(name)
    (task,) = await bench.claim(names={name: "thread"})
    await bench.finish(task, TaskStatus.FAILED, error=error)
    return task_id


async def test_groups_count_what_failed_and_nobody_dismissed(bench: Bench) -> None:
    first = await failed(bench, "order 1 not found")
    bench.pass_time(1)
    second = await failed(bench, "order 2 not found")
    bench.pass_time(1)
    other = await failed(bench, "timed out")
    groups = await bench.backend.groups(dismissed=False, before=None, limit=10)
    assert [(group.message, group.open) for group in groups] == [("timed out", 1), ("order 2 not found", 2)]
    assert groups[1].last_at - groups[1].first_at == timedelta(seconds=1)
    assert (
        await bench.backend.groups(dismissed=False, before=(groups[0].last_at, groups[0].key), limit=10) == groups[1:]
    )

    answer = await bench.obey(DismissTasks([first, other, "nobody"], "known", "ada"))
    assert list(answer.ids) == [first, other]
    (left,) = await bench.backend.groups(dismissed=False, before=None, limit=10)
    assert (left.open, left.dismissed) == (1, 1)
    assert len(await bench.backend.groups(dismissed=True, before=None, limit=10)) == 2
    assert (await bench.kinds(first))[-1] == "dismissed"

    assert (await bench.obey(RestoreTasks([first], "ada"))).changed == 1
    assert not (await bench.get(first)).dismissed
    await bench.obey(RequeueTasks([first, second, other], {"job": 3}, "together"))
    assert await bench.backend.groups(dismissed=False, before=None, limit=10) == []
    assert await bench.backend.groups(dismissed=True, before=None, limit=10) == []
    assert (await bench.get(other)).dismissed is False
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_only_what_failed_can_be_dismissed(bench: Bench) -> None:
    ids = [await bench.become(status) for status in TaskStatus if status is not TaskStatus.REJECTED]
    answer = await bench.obey(DismissTasks(ids, "all of it", "ada"))
    assert [await bench.status(task_id) for task_id in answer.ids] == [TaskStatus.FAILED]


async def test_a_purge_takes_tasks_out_of_their_groups_and_forgets_empty_ones(bench: Bench) -> None:
    await failed(bench, "old")
    await bench.obey(DismissTasks([await failed(bench, "old and known")], "known", "ada"))
    bench.pass_time(10)
    cut = bench.now
    await failed(bench, "old")
    bench.pass_time(1)
    await bench.obey(Purge(cut, 1_000))
    await bench.obey(Purge(cut, 1_000))
    assert [group.open for group in await bench.backend.groups(dismissed=False, before=None, limit=9)] == [1]
    assert await bench.backend.groups(dismissed=True, before=None, limit=9) == []
    await assert_groups_match_rows(bench.backend)


async def test_a_group_is_a_filter_and_so_is_dismissed(bench: Bench) -> None:
    known = [await failed(bench, f"order {n} not found") for n in range(3)]
    other = await failed(bench, "timed out")
    await bench.obey(DismissTasks([known[1]], None, "ada"))
    group = (await bench.get(known[0])).error_key
    found = await all_tasks(bench.backend, TaskFilter(error_key=group))
    assert {task.task_id for task in found} == set(known)
    found = await all_tasks(bench.backend, TaskFilter(error_key=group, dismissed=False), limit=1)
    assert {task.task_id for task in found} == {known[0], known[2]}
    found = await all_tasks(bench.backend, TaskFilter(statuses=(TaskStatus.FAILED,), dismissed=False))
    assert {task.task_id for task in found} == {known[0], known[2], other}
    assert await all_tasks(bench.backend, TaskFilter(error_key=group, statuses=(TaskStatus.SUCCESS,))) == []


async def test_the_other_parts_of_a_filter_mean_the_same_everywhere(bench: Bench) -> None:
    plain = await bench.add(arguments='[["invoice \\"7\\" für Åsa"],{}]', key="order-991")
    broken = await failed(bench, "Card DECLINED: 50% off_", "mail")
    await bench.requeue(broken, 3)
    for where, expected in (
        (TaskFilter(key="order-991"), [plain]),
        (TaskFilter(key="order"), []),
        (TaskFilter(task_id=plain.upper()), [plain]),
        (TaskFilter(task_id=plain[1:]), []),
        (TaskFilter(arguments='Invoice "7"'), [plain]),
        (TaskFilter(arguments="invoice 7"), []),
        (TaskFilter(attempts=(">", 0)), [broken]),
        (TaskFilter(attempts=("=", 0)), [plain]),
        (TaskFilter(attempts=("<", 2)), [broken, plain]),
    ):
        assert sorted(task.task_id for task in await all_tasks(bench.backend, where)) == sorted(expected), where
    again = await failed(bench, "Card DECLINED: 50% off_", "third")
    for text, found in (("card declined", [again]), ("50% off_", [again]), ("5_%", []), ("declined card", [])):
        assert [task.task_id for task in await all_tasks(bench.backend, TaskFilter(error=text))] == found, text


# -- all that match, through the store


def define(manager: TaskManager) -> None:
    @manager.task
    def fails(order: int) -> None:
        raise LookupError(f"order {order} not found")

    @manager.task
    def waits() -> None: ...


async def collect(manager: TaskManager, act: Act, where: TaskFilter, reason: str | None = None) -> tuple[int, int]:
    last = (0, 0)
    async for acted in manager.store.act(act, where, "ada", reason):
        last = (acted.done, acted.skipped)
    return last


FAILED = TaskFilter(statuses=(TaskStatus.FAILED,))


async def test_all_that_match_are_dismissed_restored_and_retried_with_one_entry_each(
    start_manager: StartManager,
) -> None:
    manager = await start_manager(define)
    for order in range(7):
        await manager.enqueue(manager.registry.named("fails").function, order)
    await drain(manager)
    (group,) = await manager.store.error_groups()
    assert (group.open, group.error_type, group.func_name) == (7, "LookupError", "fails")
    assert await manager.store.count_matching(TaskFilter(error_key=group.key)) == (7, True)

    assert await collect(manager, Act.DISMISS, TaskFilter(error_key=group.key), "shop was closed") == (7, 0)
    assert await manager.store.error_groups() == []
    assert await collect(manager, Act.RESTORE, TaskFilter(error_key=group.key)) == (7, 0)
    assert await collect(manager, Act.RETRY, TaskFilter(func_name="fails")) == (7, 0)
    await drain(manager)
    acts = await manager.store.audit()
    assert [act.kind for act in acts] == ["bulk_retry", "bulk_restore", "bulk_dismiss"]
    assert '"done": 7' in (acts[2].detail or "")
    assert "shop was closed" in (acts[2].detail or "")
    (group,) = await manager.store.error_groups()
    assert group.open == 7
    await assert_groups_match_rows(manager.backend)


async def test_what_fails_again_meanwhile_is_not_taken_twice(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.taskflow.store.BATCH", 2)
    manager = await start_manager(define)
    for order in range(7):
        await manager.enqueue(manager.registry.named("fails").function, order)
    await drain(manager)
    async for _ in manager.store.act(Act.RETRY, FAILED, "ada"):
        await drain(manager)  # those of this batch have failed again
    assert [task.attempt for task in await all_tasks(manager.backend)] == [2] * 7


async def test_an_act_that_is_stopped_says_how_far_it_came(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.taskflow.store.BATCH", 2)
    manager = await start_manager(define)
    for order in range(7):
        await manager.enqueue(manager.registry.named("fails").function, order)
    await drain(manager)
    acting = manager.store.act(Act.DISMISS, FAILED, "ada", "enough")
    await anext(acting)
    await acting.aclose()  # type: ignore[attr-defined]
    (act,) = await manager.store.audit()
    assert '"done": 2' in (act.detail or "")
    assert "before the end" in (act.detail or "")


async def test_waiting_tasks_that_match_are_cancelled(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    waits = manager.registry.named("waits").function
    for _ in range(3):
        await manager.enqueue(waits, delay_seconds=60, tags={"tenant": "acme"})
    kept = await manager.enqueue(waits, delay_seconds=60)
    assert await collect(manager, Act.CANCEL, TaskFilter(tags=(("tenant", "acme"),))) == (3, 0)
    assert [task.task_id for task in await all_tasks(manager.backend) if not task.status.terminal] == [kept]


async def test_one_task_is_dismissed_for_a_reason_and_no_other_than_a_failed_one(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    task_id = await manager.enqueue(manager.registry.named("fails").function, 1)
    await drain(manager)
    assert (await manager.store.dismiss(task_id, "known", "ada")).dismissed
    with pytest.raises(TaskStateError, match="failed"):
        await manager.store.dismiss(task_id, "again", "ada")
    assert not (await manager.store.restore(task_id, "ada")).dismissed


# -- a file of older code


async def test_failures_of_an_older_schema_are_kept_and_can_be_retried(tmp_path: Path) -> None:
    backend: Backend = open_backend(str(tmp_path / "old.db"))
    await backend.open()
    bench = Bench(backend)
    task_id = await failed(bench, "before there were groups")
    await backend.close()
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.execute("DROP INDEX taskflow_by_error")
        connection.execute("ALTER TABLE taskflow_task DROP COLUMN error_key")
        connection.execute("ALTER TABLE taskflow_task DROP COLUMN dismissed_at")
        connection.execute("DROP TABLE taskflow_failure")
        connection.execute("UPDATE taskflow_schema_version SET version = 4")
    backend = open_backend(str(tmp_path / "old.db"))
    await backend.open()
    bench = Bench(backend)
    assert (await bench.get(task_id)).error_key is None
    assert (await bench.obey(DismissTasks([task_id], "seen", "ada"))).changed == 1
    assert (await bench.requeue(task_id, 3)).changed == 1
    await assert_counters_match_rows(backend, bench.now)
    await backend.close()
