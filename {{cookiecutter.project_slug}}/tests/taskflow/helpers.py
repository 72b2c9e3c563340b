"""What the engine's tests share: waiting for a condition, and a bench that drives a backend turn by turn.

A test waits on a condition with a deadline and never sleeps and hopes. The `Bench` stands for one instance in front
of a backend; its clock moves only when the test moves it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import sqlalchemy as sa

from app.taskflow import BackendUnavailable, TaskManager
from app.taskflow.backends import tables
from app.taskflow.backends.base import (
    Answer,
    Backend,
    Beat,
    Cancel,
    Claimed,
    Command,
    Demand,
    Draft,
    Finish,
    Instance,
    Requeue,
    Rescue,
    Turn,
    TurnResult,
)
from app.taskflow.backends.sql import SqlBackend
from app.taskflow.context import TaskContext, TaskSink
from app.taskflow.executors import Call
from app.taskflow.models import Cursor, EventKind, TaskConfig, TaskFilter, TaskRecord, TaskStatus, to_micros
from app.taskflow.registry import TaskRegistry

PATIENCE = 10.0
"""Seconds that a test waits for something that should happen at once."""
START = datetime(2026, 1, 1, tzinfo=UTC)
IDLE = Demand({}, {"thread": 1})
"""Of an instance that could start something, but knows no task: it makes ready what is due, and claims nothing."""
_numbers = itertools.count(1)

OUTCOMES: Mapping[TaskStatus, EventKind] = {
    TaskStatus.SUCCESS: EventKind.SUCCEEDED,
    TaskStatus.FAILED: EventKind.FAILED,
    TaskStatus.CANCELLED: EventKind.CANCELLED,
    TaskStatus.INTERRUPTED: EventKind.INTERRUPTED,
    TaskStatus.PENDING: EventKind.RETRYING,
}
"""The event that goes with each way an attempt may end."""


async def eventually(condition: Callable[[], Awaitable[object] | object], patience: float = PATIENCE) -> Any:
    """The first true value of a condition, plain or awaitable. Fails when it does not come in time."""
    deadline = monotonic() + patience
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert monotonic() < deadline, f"not within {patience} s: {condition}"
        await asyncio.sleep(0.01)


def next_id(prefix: str = "task") -> str:
    """Sorts in the order of the calls, like the engine's own ids."""
    return f"{prefix}-{next(_numbers):08d}"


def make_draft(
    name: str = "job",
    *,
    task_id: str | None = None,
    at: datetime = START,
    run_at: datetime | None = None,
    queue: str = "default",
    priority: int | None = None,
    executor: str = "thread",
    max_attempts: int = 1,
    arguments: str = "[[],{}]",
    tags: Mapping[str, str] | None = None,
    requeue: bool = False,
    source: str = "manual",
    key: str | None = None,
) -> Draft:
    return Draft(
        task_id=task_id or next_id(),
        name=name,
        queue=queue,
        priority=priority,
        executor=executor,
        max_attempts=max_attempts,
        created_at=at,
        run_at=run_at or at,
        arguments=arguments,
        tags=tags or {},
        requeue=requeue,
        source=source,
        key=key,
    )


def make_finish(
    task: Claimed,
    status: TaskStatus,
    at: datetime,
    *,
    run_at: datetime | None = None,
    result: str | None = None,
    error: str | None = None,
    excused: bool = False,
) -> Finish:
    return Finish(task, OUTCOMES[status], status, at, run_at=run_at, result=result, error=error, excused=excused)


def make_instance(instance_id: str, *, machine: str = "here", pid: int = 1, birth: str = "1") -> Instance:
    return Instance(instance_id, "host", machine, pid, birth, "1", START)


class Bench:
    """One instance in front of a backend, with a clock that the test moves."""

    def __init__(self, backend: Backend, instance: str = "one", *, now: datetime = START) -> None:
        self.backend = backend
        self.instance = instance
        self.now = now

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    async def turn(self, **parts: Any) -> TurnResult:
        return await self.backend.turn(Turn(now=self.now, instance=self.instance, **parts))

    async def accept(self, *drafts: Draft) -> TurnResult:
        return await self.turn(drafts=drafts)

    async def add(self, name: str = "job", **facts: Any) -> str:
        """Accepts one task and returns its id."""
        draft = make_draft(name, at=self.now, **facts)
        await self.accept(draft)
        return draft.task_id

    async def claim(
        self,
        slots: int | Mapping[str, int] = 100,
        *,
        names: Mapping[str, str] | None = None,
    ) -> Sequence[Claimed]:
        kinds = {"thread": slots} if isinstance(slots, int) else slots
        demand = Demand(names if names is not None else {"job": "thread"}, kinds)
        return (await self.turn(demand=demand)).claimed

    async def claim_one(self) -> Claimed:
        (task,) = await self.claim(1)
        return task

    async def finish(self, task: Claimed, status: TaskStatus = TaskStatus.SUCCESS, **facts: Any) -> bool:
        """True when it was written, False when it was refused."""
        result = await self.turn(finishes=[make_finish(task, status, self.now, **facts)])
        return task.attempt_id not in result.refused

    async def obey(self, command: Command) -> Answer:
        (answer,) = (await self.turn(commands=[command])).answers
        return answer

    async def cancel(self, task_id: str, actor: str | None = None) -> Answer:
        return await self.obey(Cancel(task_id, actor))

    async def requeue(self, task_id: str, max_attempts: int = 1, actor: str | None = None) -> Answer:
        return await self.obey(Requeue(task_id, max_attempts, actor))

    async def rescue(self, *instances: str) -> Answer:
        """As one who has just looked at them."""
        stamps = {pulse.instance.instance_id: pulse.stamp for pulse in self.backend.pulses()}
        return await self.obey(Rescue({name: stamps.get(name, 0) for name in instances}))

    async def get(self, task_id: str) -> TaskRecord:
        record = await self.backend.get(task_id)
        assert record is not None, task_id
        return record

    async def status(self, task_id: str) -> TaskStatus:
        return (await self.get(task_id)).status

    async def kinds(self, task_id: str) -> list[str]:
        return [event.kind for event in await self.backend.events(task_id)]

    def beat(self, lease_seconds: float = 30.0, instance: Instance | None = None) -> None:
        lease_until = self.now + timedelta(seconds=lease_seconds)
        self.backend.beat(instance or make_instance(self.instance), Beat(self.now, lease_until, 4, 0))

    async def become(self, status: TaskStatus, **facts: Any) -> str:
        """The id of a task that was brought to this status by the commands that lead there."""
        task_id = await self.add(**facts)
        if status is TaskStatus.PENDING:
            return task_id
        if status is TaskStatus.CANCELLED:
            await self.cancel(task_id)
            return task_id
        task = next(task for task in await self.claim() if task.task_id == task_id)
        if status is not TaskStatus.RUNNING:
            await self.finish(task, status)
        return task_id


async def all_tasks(backend: Backend, where: TaskFilter | None = None, limit: int = 50) -> list[TaskRecord]:
    """Every task of a list, page by page."""
    found: list[TaskRecord] = []
    before: Cursor | None = None
    while True:
        page = await backend.page(where or TaskFilter(), before, limit)
        found += page.tasks
        if page.older is None:
            return found
        before = page.older


async def assert_counters_match_rows(backend: Backend, now: datetime) -> None:
    """The counters say what a recount over all rows says, and the groups of failures and the index of tags do, too."""
    await assert_counts_match_rows(backend, now)
    await assert_groups_match_rows(backend)
    await assert_tags_match_rows(backend)


async def assert_counts_match_rows(backend: Backend, now: datetime) -> None:
    """Numbers, waiting ones, and seconds run."""
    numbers: Counter[tuple[str, str, TaskStatus]] = Counter()
    delayed: Counter[tuple[str, str, TaskStatus]] = Counter()
    seconds: Counter[tuple[str, str, TaskStatus]] = Counter()
    for record in await all_tasks(backend, limit=500):
        key = (record.queue, record.func_name, record.status)
        numbers[key] += 1
        if record.status is TaskStatus.PENDING and record.run_at > now:
            delayed[key] += 1
        if record.start_time is not None and record.end_time is not None:
            seconds[key] += round((record.end_time - record.start_time).total_seconds() * 1e6)
    counts = {(count.queue, count.name, count.status): count for count in await backend.counts()}
    assert {key: count.n for key, count in counts.items()} == dict(numbers)
    assert {key: count.delayed for key, count in counts.items() if count.delayed} == dict(delayed)
    assert {key: round(count.seconds * 1e6) for key, count in counts.items() if count.seconds} == {
        key: value for key, value in seconds.items() if value
    }


async def assert_groups_match_rows(backend: Backend) -> None:
    """The groups of failures say what a recount says, too; and only what FAILED belongs to one."""
    numbers: Counter[tuple[str, bool]] = Counter()
    for record in await all_tasks(backend, limit=500):
        assert record.error_key is None or record.status is TaskStatus.FAILED
        assert record.error_key is not None or not record.dismissed or "broken" in (record.error or "")
        if record.error_key is not None:
            numbers[record.error_key, record.dismissed] += 1
    for dismissed in (False, True):
        groups = await backend.groups(dismissed=dismissed, before=None, limit=1_000)
        found = {group.key: group.dismissed if dismissed else group.open for group in groups}
        assert found == {key: n for (key, gone), n in numbers.items() if gone is dismissed}


async def assert_tags_match_rows(backend: Backend) -> None:
    assert await tag_entries(backend) == {
        (f"{key}:{value}", to_micros(record.created_at), record.task_id)
        for record in await all_tasks(backend, limit=500)
        for key, value in record.tags.items()
    }


async def tag_entries(backend: Any) -> set[tuple[str, int, str]]:
    """The whole index of tags: the tag, when the task was added, its id."""
    if isinstance(backend, SqlBackend):
        rows = await backend._read(lambda connection: connection.execute(sa.select(tables.tag)).all())
        return {(row.tag, row.created_at, row.task_id) for row in rows}
    found = set()
    start = backend.keys("tag", "")
    async for name in backend._reader.scan_iter(f"{start}*", count=1_000):
        for task_id, score in await backend._reader.zrange(name, 0, -1, withscores=True):
            found.add((name.decode().removeprefix(start), int(score), task_id.decode()))
    return found


async def refuses(manager: TaskManager, function: Callable[..., Any]) -> bool:
    try:
        await manager.enqueue(function)
    except BackendUnavailable:
        return True
    return False


async def runs_through_a_kill(server: Any, patience: float) -> None:
    """A task that runs while its server, one of `servers.py`, is killed is recorded when that is back. Nothing is taken
    meanwhile, after `patience` seconds at the latest."""
    gate = asyncio.Event()
    manager = TaskManager(snapshot_db=server.url, shutdown_timeout=5.0)

    @manager.task
    async def waits() -> str:
        await gate.wait()
        return "done"

    async with manager.lifespan():
        task_id = await manager.enqueue(waits)
        await eventually(lambda: manager.dispatcher.running == 1)
        await asyncio.to_thread(server.kill)
        gate.set()
        await eventually(lambda: refuses(manager, waits), patience)
        assert manager.unready() is not None
        await asyncio.to_thread(server.start)
        await eventually(lambda: manager.unready() is None)
        assert await manager.result(task_id, PATIENCE) == "done"
        kinds = [event.kind for event in await manager.backend.events(task_id)]
        assert kinds == ["accepted", "started", "succeeded"]


class Words:
    """A sink that keeps what a task said."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, Mapping[str, Any]]] = []
        self.progressed: list[Mapping[str, Any]] = []

    def log(self, context: TaskContext, level: str, message: str, extra: Mapping[str, Any]) -> None:
        self.lines.append((level, message, extra))

    def progress(self, context: TaskContext, value: Mapping[str, Any]) -> None:
        self.progressed.append(value)


def make_context(sink: TaskSink | None = None) -> TaskContext:
    return TaskContext(next_id(), "job", 0, {}, sink or Words())


def make_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    """A call of a function as an executor takes it."""
    definition = TaskRegistry().add(function, TaskConfig())
    return Call(definition, definition.encode(args, kwargs), make_context())
