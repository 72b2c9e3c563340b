"""A process is killed at a named point, for real, and the next one goes on from the same file.

Nothing that was accepted is lost, nothing without `requeue_on_interrupt` is started twice, and what has it ends.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.taskflow import TaskManager, TaskRecord, TaskStatus
from app.taskflow.models import TaskFilter

from .conftest import StartManager
from .helpers import PATIENCE, assert_counters_match_rows, eventually
from .kill_app import define, note

pytestmark = pytest.mark.anyio

PROJECT = Path(__file__).parents[2]


class Lives:
    """One process after the other over one folder."""

    def __init__(self, parent: subprocess.Popen[str], folder: Path) -> None:
        self.parent, self.folder = parent, folder

    async def begin(self, point: str, kind: str, lease_seconds: float = 30.0) -> int:
        """The pid of a process that adds two tasks and dies at that point."""
        assert self.parent.stdin is not None
        self.parent.stdin.write(json.dumps([point, kind, str(self.folder), lease_seconds]) + "\n")
        self.parent.stdin.flush()
        return await self._number()

    async def ended(self) -> int:
        """Its exit code, when it has ended."""
        return await self._number()

    async def _number(self) -> int:
        assert self.parent.stdout is not None
        async with asyncio.timeout(PATIENCE):
            return int(await asyncio.to_thread(self.parent.stdout.readline))

    def hold(self, attempt: int = 0) -> None:
        """Keeps every such attempt from ending."""
        note(str(self.folder), f"hold-{attempt}")

    def let_go(self, attempt: int = 0) -> None:
        (self.folder / f"hold-{attempt}").unlink(missing_ok=True)

    def started(self) -> Counter[str]:
        file = self.folder / "starts"
        return Counter(file.read_text().split() if file.exists() else ())

    def accepted(self) -> set[str]:
        file = self.folder / "accepted"
        return set(file.read_text().split() if file.exists() else ())


@pytest.fixture(scope="module")
def parent() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.taskflow.kill_app"]
    parent = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield parent
    parent.communicate(timeout=PATIENCE)


@pytest.fixture
def lives(parent: subprocess.Popen[str], tmp_path: Path) -> Iterator[Lives]:
    lives = Lives(parent, tmp_path)
    yield lives
    for attempt in range(2):
        lives.let_go(attempt)


@pytest.fixture(autouse=True)
def quick_rescue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.taskflow.housekeeping.RESCUE_INTERVAL", 0.2)


async def tasks(manager: TaskManager) -> tuple[TaskRecord, TaskRecord]:
    """The one that is not to be started again, and the one that is."""
    once, again = sorted(
        (await manager.store.page(TaskFilter())).tasks, key=lambda record: record.func_name.startswith("again")
    )
    return once, again


async def all_ended(manager: TaskManager) -> bool:
    return all(record.status.terminal for record in await tasks(manager))


INTERRUPTED, SUCCESS = TaskStatus.INTERRUPTED, TaskStatus.SUCCESS


@pytest.mark.parametrize(
    ("point", "kind", "once_ends", "starts"),
    [
        pytest.param("after-accept", "thread", SUCCESS, (1, 1), id="after accept"),
        pytest.param("after-claim", "thread", INTERRUPTED, (0, 1), id="after claim"),
        pytest.param("mid-run", "async", INTERRUPTED, (1, 2), id="mid-run of a coroutine"),
        pytest.param("mid-run", "thread", INTERRUPTED, (1, 2), id="mid-run of a thread"),
        pytest.param("mid-run", "process", INTERRUPTED, (1, 2), id="mid-run of a process"),
        pytest.param("before-finish", "thread", INTERRUPTED, (1, 2), id="before the finishing turn"),
        pytest.param("inside-finish", "thread", INTERRUPTED, (1, 2), id="inside the finishing turn"),
        pytest.param("inside-retry", "flaky", INTERRUPTED, (1, 2), id="while a retry is recorded"),
        pytest.param("inside-rescue", "thread", INTERRUPTED, (1, 2), id="during rescue"),
    ],
)
async def test_whatever_point_a_process_is_killed_at_nothing_is_lost_and_nothing_started_twice(
    start_manager: StartManager, lives: Lives, point: str, kind: str, once_ends: TaskStatus, starts: tuple[int, int]
) -> None:
    if point in ("mid-run", "inside-rescue"):
        lives.hold()
        await kill_mid_run(lives, kind)
    elif point in ("before-finish", "inside-finish"):
        lives.hold()  # neither ends before both have begun
        await lives.begin(point, kind)
        await eventually(lambda: len(lives.started()) == 2)
        lives.let_go()
        assert await lives.ended() == -signal.SIGKILL
    else:
        await lives.begin(point, kind)
        assert await lives.ended() == -signal.SIGKILL
    if point == "inside-rescue":
        await lives.begin(point, kind)
        assert await lives.ended() == -signal.SIGKILL
    lives.let_go()

    manager = await start_manager(lambda manager: define(manager, kind))
    await eventually(lambda: all_ended(manager))
    once, again = await tasks(manager)
    assert lives.accepted() <= {once.task_id, again.task_id}
    assert bool(lives.accepted()) == (point != "after-claim")  # killed in the turn that accepts them: nobody was told
    assert (once.status, again.status) == (once_ends, SUCCESS)
    started = lives.started()
    assert started[once.task_id] == starts[0]
    assert 1 <= started[again.task_id] <= starts[1]
    assert again.retries_used == 0
    ends = [event.kind for event in await manager.store.events(again.task_id)].count("succeeded")
    assert ends == 1
    await assert_counters_match_rows(manager.backend, manager.clock())


async def kill_mid_run(lives: Lives, kind: str) -> None:
    pid = await lives.begin("mid-run", kind)
    await eventually(lambda: len(lives.started()) == 2)
    os.kill(pid, signal.SIGKILL)
    assert await lives.ended() == -signal.SIGKILL


async def test_a_process_that_stood_still_for_three_leases_has_its_late_results_refused(
    start_manager: StartManager, lives: Lives
) -> None:
    lives.hold()
    lives.hold(1)
    stopped = await lives.begin("mid-run", "thread", 0.6)
    await eventually(lambda: len(lives.started()) == 2)
    os.kill(stopped, signal.SIGSTOP)
    try:
        manager = await start_manager(lambda manager: define(manager, "thread"))
        once, again = await tasks(manager)
        await eventually(lambda: lives.started()[again.task_id] == 2)
        await asyncio.sleep(3 * 0.6)
    finally:
        lives.let_go()
        os.kill(stopped, signal.SIGCONT)
    await eventually(lambda: lost(manager, once.task_id, again.task_id))
    assert (await manager.store.get(again.task_id)).status is TaskStatus.RUNNING
    lives.let_go(1)
    await manager.result(again.task_id, PATIENCE)
    os.kill(stopped, signal.SIGKILL)
    await lives.ended()
    once, again = await tasks(manager)
    assert (once.status, again.status) == (INTERRUPTED, SUCCESS)
    assert await manager.result(again.task_id) == os.getpid()
    assert lives.started() == {once.task_id: 1, again.task_id: 2}
    assert await kinds(manager, once.task_id) == ["accepted", "started", "interrupted", "lease_lost"]
    assert await kinds(manager, again.task_id) == [
        "accepted",
        "started",
        "rescued",
        "started",
        "lease_lost",
        "succeeded",
    ]


async def kinds(manager: TaskManager, task_id: str) -> list[str]:
    return [event.kind for event in await manager.store.events(task_id)]


async def lost(manager: TaskManager, *task_ids: str) -> bool:
    return all([(await kinds(manager, task_id))[-1] == "lease_lost" for task_id in task_ids])


async def test_a_coroutine_that_blocks_its_event_loop_for_longer_than_a_lease_runs_once(
    start_manager: StartManager, lives: Lives
) -> None:
    blocked = await lives.begin("mid-run", "blocking", 0.9)
    await eventually(lambda: lives.started())
    manager = await start_manager(lambda manager: define(manager, "blocking"))
    once, again = await tasks(manager)
    assert (await manager.store.get(once.task_id)).status is TaskStatus.RUNNING
    assert await manager.result(once.task_id, PATIENCE) == blocked
    await manager.result(again.task_id, PATIENCE)
    assert lives.started() == {once.task_id: 1, again.task_id: 1}
    assert await kinds(manager, once.task_id) == ["accepted", "started", "succeeded"]
    os.kill(blocked, signal.SIGKILL)
    await lives.ended()
