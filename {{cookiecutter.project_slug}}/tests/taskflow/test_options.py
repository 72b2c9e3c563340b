"""What a caller may say about one task: everything that is stored is checked where it is said, and nowhere else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import IntEnum
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient

from app.taskflow import TaskAdmin, TaskArgumentError, TaskManager, TaskStatus, get_task_context, task_log

from .conftest import StartManager
from .helpers import PATIENCE, eventually

pytestmark = pytest.mark.anyio

WEST, EAST = timezone(timedelta(hours=-12)), timezone(timedelta(hours=14))


class Urgency(IntEnum):
    HIGH = 9


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"run_at": datetime.max.replace(tzinfo=WEST)}, "is no time in UTC"),
    ({"run_at": datetime.min.replace(tzinfo=EAST)}, "is no time in UTC"),
    ({"run_at": datetime.max.replace(tzinfo=UTC)}, "the year 9998"),
    ({"run_at": datetime(2030, 1, 1)}, "needs a time zone"),
    ({"run_at": "2030-01-01"}, "needs a time zone: a datetime"),
    ({"run_at": datetime(2030, 1, 1).date()}, "a datetime"),
    ({"run_at": datetime(2030, 1, 1, tzinfo=UTC), "delay_seconds": 1}, "exclude each other"),
    ({"delay_seconds": timedelta(seconds=1)}, "a number of seconds"),
    ({"delay_seconds": "1"}, "a number of seconds"),
    ({"delay_seconds": True}, "a number of seconds"),
    ({"delay_seconds": float("nan")}, "between 0 seconds and ten years"),
    ({"delay_seconds": float("inf")}, "between 0 seconds and ten years"),
    ({"delay_seconds": 10**400}, "between 0 seconds and ten years"),
    ({"delay_seconds": -1}, "between 0 seconds and ten years"),
    ({"priority": "high"}, "32-bit integer"),
    ({"priority": 2**70}, "32-bit integer"),
    ({"priority": 1.5}, "32-bit integer"),
    ({"priority": True}, "32-bit integer"),
    ({"idempotency_key": ""}, "1 to 512 characters"),
    ({"idempotency_key": "x" * 513}, "1 to 512 characters"),
    ({"idempotency_key": b"key"}, "a string, an int or a UUID"),
    ({"idempotency_key": "\ud800"}, "half a surrogate pair"),
    ({"idempotency_key": "\0"}, "NUL"),
    ({"queue": 7}, "must be a string"),
    ({"queue": ["mail"]}, "must be a string"),
    ({"queue": "\ud800"}, "half a surrogate pair"),
    ({"tags": {"a": None}}, "value of 'a'"),
    ({"tags": {"a": "\ud800"}}, "half a surrogate pair"),
    ({"tags": {str(n): "x" for n in range(65)}}, "more than 64"),
    ({"tags": ["a"]}, "must be a dict"),
    ({"tags": []}, "must be a dict"),
    ({"queue": ""}, "must have 1 to 256"),
    ({"queue": 0}, "must be a string"),
    ({"delay_seconds": False}, "must be a number"),
    ({"delay_seconds": ""}, "must be a number"),
]


def define(manager: TaskManager) -> None:
    @manager.task
    async def job() -> dict[str, str]:
        context = get_task_context()
        assert context is not None
        return dict(context.tags)


def job(manager: TaskManager) -> Any:
    return manager.registry.named("job").function


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the task system logged."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    logging.getLogger("taskflow").addHandler(handler)
    yield lines
    logging.getLogger("taskflow").removeHandler(handler)


async def test_an_option_that_cannot_be_stored_is_refused_at_its_caller_naming_value_and_rule(
    start_manager: StartManager, said: list[str]
) -> None:
    manager = await start_manager(define)
    neighbours = [asyncio.create_task(manager.enqueue(job(manager))) for _ in range(20)]
    for options, rule in REFUSED:
        with pytest.raises(TaskArgumentError, match=rule) as refused:
            await manager.enqueue(job(manager), **options)
        assert refused.value.func_name == "job"
        assert refused.value.parameter in options
    for task_id in await asyncio.gather(*neighbours):
        assert await manager.result(task_id, PATIENCE) == {}
    assert manager.journal.last_error is None
    assert not [line for line in said if "away" in line]


@pytest.mark.parametrize(
    "options",
    [
        {"run_at": datetime(9998, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)},
        {"run_at": datetime(2100, 1, 1, tzinfo=ZoneInfo("America/Los_Angeles"))},
        {"delay_seconds": Decimal("86400.5")},
        {"delay_seconds": 10 * 365 * 86_400},
    ],
    ids=str,
)
async def test_a_time_far_ahead_is_kept_and_holds_up_nobody(
    start_manager: StartManager, options: dict[str, Any]
) -> None:
    manager = await start_manager(define)
    waits = await manager.enqueue(job(manager), **options)
    assert await manager.result(await manager.enqueue(job(manager)), PATIENCE) == {}
    record = await manager.store.get(waits)
    assert record.status is TaskStatus.PENDING
    expected = options.get("run_at") or record.created_at + timedelta(seconds=float(options["delay_seconds"]))
    assert record.run_at == expected


@pytest.mark.parametrize("moment", [datetime(1, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=EAST)], ids=str)
async def test_a_time_that_is_over_means_now(start_manager: StartManager, moment: datetime) -> None:
    manager = await start_manager(define)
    assert await manager.result(await manager.enqueue(job(manager), run_at=moment), PATIENCE) == {}


async def test_what_is_plainly_meant_is_taken(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    key = UUID(int=7)
    options: dict[str, Any] = {"idempotency_key": key, "priority": Urgency.HIGH, "tags": {"order": 7, "paid": True}}
    task_id = await manager.enqueue(job(manager), **options)
    assert await manager.result(task_id, PATIENCE) == {"order": "7", "paid": "True"}
    record = await manager.store.get(task_id)
    assert (record.idempotency_key, record.priority) == (str(key), 9)
    assert await manager.enqueue(job(manager), idempotency_key=str(key)) == task_id
    once = await manager.schedule_once(job(manager), run_at=datetime(2100, 1, 1, tzinfo=UTC), run_key=key)  # type: ignore[arg-type]
    assert [item.task_id for item in await manager.list_scheduled()] == [once]
    assert await manager.cancel_scheduled(key)  # type: ignore[arg-type]


async def test_a_text_of_a_class_of_its_own_is_its_letters(start_manager: StartManager) -> None:
    class Other(str):
        def __str__(self) -> str:
            return "other"

    manager = await start_manager(define)
    word = Other("word")
    record = await manager.store.get(await manager.enqueue(job(manager), idempotency_key=word, tags={word: word}))
    assert (record.idempotency_key, record.tags) == ("word", {"word": "word"})
    assert type(record.idempotency_key) is str


def test_a_client_that_brings_a_bad_option_gets_422(tmp_path: Any) -> None:
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    define(manager)
    app = FastAPI()
    TaskAdmin(app, manager, auto_install=True)

    @app.post("/{option}")
    def add(option: str, value: Any, background_tasks: BackgroundTasks) -> str:
        managed: Any = background_tasks
        return str(managed.add_task(job(manager), **{option: float(value) if value == "nan" else value}))

    with TestClient(app) as client:
        for option, value in (("delay_seconds", "nan"), ("priority", "high"), ("run_at", "tomorrow")):
            answer = client.post(f"/{option}", params={"value": value})
            assert (answer.status_code, option in answer.json()["detail"]) == (422, True)
        assert client.post("/idempotency_key", params={"value": "7"}).status_code == 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tags": {"a": None}}, "value of 'a'"),
        ({"tags": {"a": "\ud800"}}, "half a surrogate pair"),
        ({"name": "x" * 257}, "1 to 256 characters"),
        ({"name": "\ud800"}, "half a surrogate pair"),
        ({"queue": "\0"}, "NUL"),
        ({"priority": 2**70}, "32-bit"),
        ({"retries": 2**70}, "at most 1,000,000"),
    ],
)
def test_settings_that_could_not_be_stored_are_refused_where_they_are_written(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        TaskManager().task(**options)


async def test_tags_of_the_decorator_become_text_as_a_caller_s_do(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task(tags={"shop": 7, "team": "mail"})  # type: ignore[dict-item]
    async def work() -> dict[str, str]:
        context = get_task_context()
        assert context is not None
        return dict(context.tags)

    task_id = await manager.enqueue(work, tags={"team": "web"})
    assert await manager.result(task_id, PATIENCE) == {"shop": "7", "team": "web"}


# -- what a running task says


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


def say_strange_things() -> None:
    """Everything at once, as no task should."""
    context = get_task_context()
    assert context is not None
    task_log(Broken(), level=Broken(), broken=Broken(), nan=float("nan"), keys={("a", 1): 2})  # type: ignore[arg-type]
    task_log("half \ud800", level=30, half="\ud800", nul="\0", huge="x" * 10_000_000)  # type: ignore[arg-type]
    context.progress(Broken(), float("nan"), Broken())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["async", "thread", "process"])
async def test_what_a_task_says_is_stored_readably_and_breaks_neither_it_nor_a_turn(
    start_manager: StartManager, said: list[str], kind: str
) -> None:
    manager = await start_manager(define)

    @manager.task
    async def strange_async() -> str:
        say_strange_things()
        return "done"

    @manager.task
    def strange_thread() -> str:
        say_strange_things()
        return "done"

    if kind == "process":
        manager.task(executor="process", name="strange_process")(strange_process)
    function = manager.registry.named(f"strange_{kind}").function
    task_id = await manager.enqueue(function)
    assert await manager.result(task_id, PATIENCE) == "done"
    first, second = await eventually(lambda: manager.store.logs(task_id))
    assert first.message == first.level[:-1] + "…" or first.message.startswith("<Broken")
    assert first.extra["nan"] == "nan"
    assert (second.message, second.level) == ("half ?", "warning")
    assert len(str(second.extra)) < 10_000
    progress = (await manager.store.get(task_id)).progress
    assert progress is not None
    assert progress["total"] == "nan"
    assert manager.journal.last_error is None
    assert not [line for line in said if "away" in line]


def strange_process() -> str:
    say_strange_things()
    return "done"
