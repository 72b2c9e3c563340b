"""What only Redis can do or break: lost answers, a server that is full, starts or forgets its scripts, memory."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis

from app.taskflow import TaskRecord, TaskStatus
from app.taskflow.backends.base import Beat, Demand, LogLine, Purge, Turn
from app.taskflow.backends.redis import RedisBackend, of_response
from app.taskflow.backends.stored import instance_row
from app.taskflow.errors import BackendUnavailable, OutcomeUnknown
from app.taskflow.models import TaskFilter

from .helpers import (
    START,
    Bench,
    all_tasks,
    assert_counters_match_rows,
    assert_tags_match_rows,
    make_draft,
    make_instance,
    runs_through_a_kill,
)
from .servers import RedisServer, fresh_redis, redis_url

pytestmark = pytest.mark.anyio


@pytest.fixture
def url() -> Iterator[str]:
    with fresh_redis(redis_url()) as found:
        yield found


@pytest.fixture
async def backend(url: str) -> AsyncIterator[RedisBackend]:
    found = RedisBackend(url)
    await found.open()
    yield found
    await found.close()


def lose_the_answer(monkeypatch: pytest.MonkeyPatch, *, before: bool) -> None:
    """The next `apply` never reaches the server, or its answer never arrives."""
    call: Callable[..., Any] = RedisBackend._call

    async def lose(self: RedisBackend, function: str, argument: Any, **options: Any) -> Any:
        if function != "apply":
            return await call(self, function, argument, **options)
        monkeypatch.undo()
        if not before:
            await call(self, function, argument, **options)
        raise redis.ConnectionError("the connection was lost")

    monkeypatch.setattr(RedisBackend, "_call", lose)


@pytest.mark.parametrize("before", [True, False], ids=["before the server had it", "after it was made"])
async def test_a_turn_whose_answer_was_lost_is_made_once(
    backend: RedisBackend, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    await Bench(backend).accept(make_draft(task_id="a-task"))
    draft = make_draft(key="k")
    demand = Demand({"job": "thread"}, {"thread": 1})
    line = LogLine("a-task", START, "info", 0, "once")
    turn = Turn(now=START, instance="one", drafts=[draft], logs=[line], demand=demand, turn_id="first")
    lose_the_answer(monkeypatch, before=before)
    with pytest.raises(OutcomeUnknown):
        await backend.turn(turn)
    result = await backend.turn(turn)
    assert (result.existing, [task.task_id for task in result.claimed]) == (frozenset(), ["a-task"])
    assert [entry.message for entry in await backend.logs("a-task", 0, 10)] == ["once"]
    assert len(await all_tasks(backend)) == 2
    await assert_counters_match_rows(backend, START)


async def test_another_turn_after_a_lost_answer_is_a_turn_of_its_own(
    backend: RedisBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_the_answer(monkeypatch, before=False)
    with pytest.raises(OutcomeUnknown):
        await backend.turn(Turn(now=START, instance="one", drafts=[make_draft()], turn_id="first"))
    await backend.turn(Turn(now=START, instance="one", drafts=[make_draft()], turn_id="second"))
    assert len(await all_tasks(backend)) == 2


async def test_a_server_that_forgot_the_script_is_told_it_again(backend: RedisBackend, url: str) -> None:
    with redis.Redis.from_url(url.partition("?")[0]) as client:
        client.script_flush()
    assert await Bench(backend).add()


async def test_a_finished_task_takes_less_than_a_kilobyte(backend: RedisBackend, url: str) -> None:
    """All of it: the task, its events, its places in the indexes, measured by the server."""
    bench = Bench(backend)
    with redis.Redis.from_url(url.partition("?")[0]) as client:

        async def used(number: int) -> int:
            for _ in range(number // 500):
                await bench.accept(*[draft_of_a_service() for _ in range(500)])
                while claimed := await bench.claim(500):
                    for task in claimed[::50]:
                        await bench.finish(task)
                    rest = [task for place, task in enumerate(claimed) if place % 50]
                    await asyncio.gather(*(bench.finish(task, result="null") for task in rest))
            return int(client.info("memory")["used_memory"])

        start = await used(2_000)
        assert (await used(4_000) - start) / 4_000 < 1_000 + FEED


FEED = 400
"""Bytes of a task's three events in the feed, which ends at its hundred thousandth."""


def draft_of_a_service() -> Any:
    import uuid_utils

    task_id = str(uuid_utils.uuid7())
    return make_draft(task_id=task_id, arguments='[[],{"address":"somebody@example.org"}]')


async def test_every_filter_finds_what_sql_finds_page_by_page(backend: RedisBackend) -> None:
    bench = Bench(backend)
    for number in range(30):
        await bench.add(
            ("job", "other")[number % 2], queue=("default", "mail")[number % 3 == 0], tags={"n": str(number % 5)}
        )
        bench.pass_time(number % 2)  # pairs share their time
    everything = await all_tasks(backend, limit=7)
    assert [record.task_id for record in everything] == sorted((r.task_id for r in everything), reverse=True)
    assert len(everything) == 30
    for where, number in (
        (TaskFilter(func_name="other"), 15),
        (TaskFilter(queue="mail"), 10),
        (TaskFilter(func_name="other", queue="mail"), 5),
        (TaskFilter(statuses=(TaskStatus.PENDING,), tags=(("n", "3"),)), 6),
        (TaskFilter(text="OTHER"), 15),
        (TaskFilter(since=START.replace(second=10)), 10),
        (TaskFilter(statuses=(TaskStatus.SUCCESS,)), 0),
    ):
        assert len(await all_tasks(backend, where, limit=4)) == number, where


async def test_many_events_of_one_task_stay_in_their_order(backend: RedisBackend) -> None:
    bench = Bench(backend)
    task_id = await bench.become(TaskStatus.FAILED)
    for _ in range(20):
        await bench.requeue(task_id)
        await bench.finish(await bench.claim_one(), TaskStatus.FAILED)
    events = await backend.events(task_id)
    assert [event.seq for event in events] == sorted(event.seq for event in events)
    assert len(events) == 3 + 20 * 3
    bench.pass_time(60)
    await bench.obey(Purge(bench.now, 1_000))
    assert (await backend.events(task_id), await backend.events_after(0, 100)) == ([], [])


# -- the server


@pytest.mark.parametrize("settings", [{"maxmemory": "1"}], ids=["full"])
async def test_a_server_that_takes_nothing_is_away_and_comes_back(settings: dict[str, str]) -> None:
    with RedisServer() as server, redis.Redis.from_url(server.url) as client:
        backend = RedisBackend(server.url)
        await backend.open()
        bench = Bench(backend)
        for name, value in settings.items():
            client.config_set(name, value)
        with pytest.raises(BackendUnavailable):
            await bench.add()
        client.config_set("maxmemory", "0")
        assert await bench.add()
        await backend.close()


async def test_a_replica_is_no_server_to_write_to() -> None:
    with RedisServer() as server, redis.Redis.from_url(server.url) as client:
        backend = RedisBackend(server.url)
        await backend.open()
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(BackendUnavailable):
            await Bench(backend).add()
        client.replicaof("NO", "ONE")
        assert await Bench(backend).add()
        await backend.close()


async def test_what_the_server_does_not_keep_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer() as server, redis.Redis.from_url(server.url) as client:
        client.config_set("appendonly", "no")
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        backend = RedisBackend(server.url)
        await backend.open()
        await backend.close()
    assert "appendonly is off" in caplog.text
    assert "set noeviction" in caplog.text


async def test_what_runs_while_the_server_is_killed_is_recorded_when_it_is_back() -> None:
    with RedisServer() as server:
        await runs_through_a_kill(server, 0)


@pytest.mark.parametrize(
    ("answer", "away"),
    [
        (redis.ResponseError("Error running script (call to f_1): @user_script:1: -OOM command not allowed"), True),
        (redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'"), True),
        (redis.exceptions.ReadOnlyError("You can't write against a read only replica."), True),
        (redis.exceptions.MasterDownError("Link with MASTER is down"), True),
        (redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"), True),
        (redis.ResponseError("NOREPLICAS Not enough good replicas to write."), True),
        (redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), False),
    ],
)
def test_what_a_server_answers_is_away_or_about_what_was_sent(answer: redis.ResponseError, away: bool) -> None:
    """Redis 6 and 7 word what a script came upon differently, and the client takes words away."""
    assert isinstance(of_response(answer), BackendUnavailable) == away


def forget_tags(client: redis.Redis) -> None:
    """As if all tasks had been stored by code of the first schema."""
    client.delete(*client.scan_iter("*{taskflow}:tag:*"))


async def older_tasks(url: str) -> list[str]:
    """Adds tasks to a store as code of the first schema left it, and returns the ids of those that have a tag."""
    backend = RedisBackend(url)
    await backend.open()
    bench = Bench(backend)
    drafts = [make_draft(("job", "mail")[n % 2], tags={"tenant": "acme"} if n % 3 else None) for n in range(30)]
    await bench.accept(*drafts[:20])  # of one moment
    for draft in drafts[20:]:
        bench.pass_time(1)
        await bench.accept(draft._replace(created_at=bench.now))
    with redis.Redis.from_url(url.partition("?")[0]) as client:
        forget_tags(client)
        client.set(backend.keys("schema"), 1)
    await backend.close()
    return sorted((draft.task_id for draft in drafts if draft.tags), reverse=True)


ACME = TaskFilter(tags=(("tenant", "acme"),))


async def test_tasks_of_the_first_schema_are_indexed_once_in_batches_however_often_it_is_interrupted(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.taskflow.backends.redis.INDEX_BATCH", 4)
    monkeypatch.setattr("app.taskflow.backends.redis.LATE", 0)
    ids = await older_tasks(url)
    call: Callable[..., Any] = RedisBackend._call
    batches: list[int] = []

    async def dies_soon(self: RedisBackend, function: str, argument: Any, **options: Any) -> Any:
        if len(batches) in (2, 5):
            batches.append(-1)
            raise redis.ConnectionError("killed")
        if function == "index":
            batches.append(argument["after"])
        return await call(self, function, argument, **options)

    monkeypatch.setattr(RedisBackend, "_call", dies_soon)
    backend = RedisBackend(url)
    for _ in range(2):
        with pytest.raises(BackendUnavailable):
            await backend.open()
        assert not await backend.is_current()
    await backend.open()
    assert [record.task_id for record in await all_tasks(backend, ACME, 7)] == ids
    await assert_tags_match_rows(backend)
    assert sorted(set(batches[3:])) != sorted(batches[3:5]), "it goes on where it was"
    assert await backend.is_current()
    number = len(batches)
    await backend.open()
    assert len(batches) == number
    await backend.close()


async def test_what_older_code_adds_beside_newer_is_indexed_by_the_next_who_opens(url: str) -> None:
    ids = await older_tasks(url)
    older, newer = RedisBackend(url), RedisBackend(url)
    await older.open()
    row = instance_row(make_instance("older"), Beat(START, START + timedelta(seconds=30), 4, 0))
    older._run_apart("beat", row)
    with redis.Redis.from_url(url.partition("?")[0]) as client:
        client.set(older.keys("schema"), 1)
        await newer.open()
        Bench(newer, "newer").beat()
        assert [record.task_id for record in await all_tasks(newer, ACME)] == ids
        assert not await newer.is_current()
        added = await Bench(older, "older", now=START + timedelta(seconds=5)).add(tags={"tenant": "acme"})
        client.zrem(newer.keys("tag", "tenant", "acme"), added)
    older.leave("older")
    await newer.open()
    assert added in [record.task_id for record in await all_tasks(newer, ACME)]
    assert await newer.is_current()
    await assert_tags_match_rows(newer)
    for backend in (older, newer):
        await backend.close()


async def test_what_hardly_anything_has_is_not_looked_for_without_end(
    backend: RedisBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.taskflow.backends.redis_pages.MOST_IDS", 8)
    monkeypatch.setattr("app.taskflow.backends.redis_pages.MOST_COMPARED", 20)
    bench = Bench(backend)
    for number in range(60):
        bench.pass_time(1)
        await bench.add(name="mail", queue="slow" if number in (0, 55) else "default")
        await bench.add(name="job", queue="slow")
    page = await backend.page(TaskFilter(func_name="mail", queue="slow"), None, 5)
    assert [record.queue for record in page.tasks] == ["slow"]


@pytest.mark.parametrize(
    "where",
    [
        TaskFilter(func_name="mail", queue="slow"),
        TaskFilter(statuses=(TaskStatus.PENDING, TaskStatus.FAILED), func_name="mail", tags=(("n", "3"),)),
        TaskFilter(statuses=(TaskStatus.CANCELLED,), queue="slow"),
        TaskFilter(func_name="mail", queue="slow", source="scheduled"),
        TaskFilter(func_name="nobody", queue="slow"),
    ],
)
async def test_of_several_indexed_parts_rows_are_read_only_of_what_has_all(
    backend: RedisBackend, monkeypatch: pytest.MonkeyPatch, where: TaskFilter
) -> None:
    monkeypatch.setattr("app.taskflow.backends.redis.SEARCH_WINDOW", 12)
    monkeypatch.setattr("app.taskflow.backends.redis_pages.MOST_IDS", 8)
    bench = Bench(backend)
    for number in range(60):
        bench.pass_time(number % 2)
        await bench.add(
            name="mail" if number % 10 == 3 else "job",
            queue="slow" if number % 4 == 3 else "default",
            tags={"n": str(number % 5)},
            source="scheduled" if number % 3 else "manual",
        )
    for record in (await all_tasks(backend))[10:20]:
        await bench.cancel(record.task_id)
    expected = [record.task_id for record in await all_tasks(backend) if matches_it(where, record)]
    read: list[str] = []
    tasks: Callable[..., Any] = backend._tasks

    async def count(ids: Any) -> Any:
        read.extend(ids)
        return await tasks(ids)

    monkeypatch.setattr(backend, "_tasks", count)
    for limit in (1, 2, 50):
        read.clear()
        assert [record.task_id for record in await all_tasks(backend, where, limit)] == expected
    assert len(read) <= (12 if where.source else len(expected))


def matches_it(where: TaskFilter, record: TaskRecord) -> bool:
    return (
        (not where.statuses or record.status in where.statuses)
        and where.func_name in (None, record.func_name)
        and where.queue in (None, record.queue)
        and where.source in (None, record.source)
        and all(record.tags.get(key) == value for key, value in where.tags)
    )
