"""Who is alive, and what the dead left behind: real processes, and leases on a clock that the test moves."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.taskflow import BackendUnavailable, TaskManager, TaskStatus
from app.taskflow import housekeeping as housekeeping_module
from app.taskflow.backends import open_backend
from app.taskflow.backends.base import Instance
from app.taskflow.housekeeping import birth_of, introduce, is_gone, machine_name
from app.taskflow.leases import Watch
from app.taskflow.models import utc_now

from .conftest import StartManager
from .helpers import PATIENCE, START, Bench, eventually, make_instance

pytestmark = pytest.mark.anyio


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    yield process
    process.kill()
    process.wait()


def instance_of(pid: int, instance_id: str = "other") -> Instance:
    return make_instance(instance_id, machine=machine_name(), pid=pid, birth=birth_of(pid) or "")


# -- telling the dead from the living


def test_this_process_introduces_itself_and_is_not_gone() -> None:
    me = introduce("me", "1", START)
    assert (me.instance_id, me.pid, me.started) == ("me", os.getpid(), START)
    assert me.birth
    assert not is_gone(me, machine_name())


def test_a_process_is_gone_when_it_has_ended_and_not_before(child: subprocess.Popen[bytes]) -> None:
    other = instance_of(child.pid)
    assert not is_gone(other, machine_name())
    child.kill()
    child.wait()
    assert is_gone(other, machine_name())


def test_a_process_that_died_is_gone_although_its_parent_has_not_noticed(child: subprocess.Popen[bytes]) -> None:
    other = instance_of(child.pid)
    child.kill()
    deadline = time.monotonic() + PATIENCE
    while not is_gone(other, machine_name()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stopped_process_is_not_gone(child: subprocess.Popen[bytes]) -> None:
    other = instance_of(child.pid)
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    assert not is_gone(other, machine_name())


def test_a_pid_that_another_process_has_now_is_a_process_that_is_gone() -> None:
    mine = instance_of(os.getpid())
    earlier = make_instance("earlier", machine=mine.machine, pid=mine.pid, birth=str(int(mine.birth) - 1))
    assert is_gone(earlier, machine_name())


@pytest.mark.parametrize("machine", ["another machine", ""])
def test_nobody_judges_the_processes_of_another_machine(machine: str) -> None:
    elsewhere = make_instance("elsewhere", machine=machine, pid=2**22 + 1, birth="1")
    assert not is_gone(elsewhere, machine_name())
    assert not is_gone(elsewhere, "")


def test_a_process_that_the_system_hides_from_us_is_not_gone_and_a_missing_one_is(
    monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[bytes]
) -> None:
    other = instance_of(child.pid)
    monkeypatch.setattr(housekeeping_module, "birth_of", lambda _pid: None)
    assert not is_gone(other, other.machine)
    child.kill()
    child.wait()
    assert is_gone(other, other.machine)


def test_nobody_judges_a_process_that_could_not_say_when_it_was_born() -> None:
    mine = instance_of(os.getpid())
    assert not is_gone(make_instance("mute", machine=mine.machine, pid=mine.pid, birth=""), mine.machine)


# -- rescue


async def leave_running(file: Path, instance: Instance, *, lease_seconds: float, requeue: bool = False) -> str:
    """A task that an instance has claimed, and will not finish."""
    backend = open_backend(str(file))
    await backend.open()
    bench = Bench(backend, instance.instance_id, now=utc_now())
    bench.beat(lease_seconds, instance)
    task_id = await bench.add("left", requeue=requeue, executor="async")
    await bench.claim(1, names={"left": "thread"})
    assert await bench.status(task_id) is TaskStatus.RUNNING
    await backend.close()
    return task_id


def define(manager: TaskManager) -> None:
    @manager.task(name="left", requeue_on_interrupt=True)
    async def left() -> str:
        return "done by another"


def impatient(manager: TaskManager) -> None:
    define(manager)
    manager.lease_seconds = 1


async def test_what_a_gone_process_left_is_rescued_at_once_whatever_its_lease(
    start_manager: StartManager, tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    other = instance_of(child.pid)
    plain = await leave_running(tmp_path / "tasks.db", other, lease_seconds=3600)
    again = await leave_running(tmp_path / "tasks.db", other, lease_seconds=3600, requeue=True)
    child.kill()
    child.wait()
    manager = await start_manager(define)
    assert await manager.result(again, PATIENCE) == "done by another"
    assert (await manager.store.get(plain)).status is TaskStatus.INTERRUPTED


async def test_what_a_live_process_runs_is_left_alone_and_is_rescued_when_it_dies(
    start_manager: StartManager, tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping_module, "RESCUE_INTERVAL", 0.02)
    task_id = await leave_running(tmp_path / "tasks.db", instance_of(child.pid), lease_seconds=3600)
    looks = 0
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    pulses = manager.backend.pulses

    def counted() -> object:
        nonlocal looks
        looks += 1
        return pulses()

    monkeypatch.setattr(manager.backend, "pulses", counted)
    async with manager.lifespan():
        await eventually(lambda: looks > 5)
        assert (await manager.store.get(task_id)).status is TaskStatus.RUNNING
        child.kill()

        async def interrupted() -> bool:
            return (await manager.store.get(task_id)).status is TaskStatus.INTERRUPTED

        await eventually(interrupted)


async def test_what_another_machine_runs_is_rescued_when_its_lease_has_lapsed_and_not_before(
    start_manager: StartManager, tmp_path: Path
) -> None:
    elsewhere = make_instance("elsewhere", machine="another", pid=1, birth="1")
    task_id = await leave_running(tmp_path / "tasks.db", elsewhere, lease_seconds=1)
    began = time.monotonic()
    manager = await start_manager(impatient)

    async def interrupted() -> bool:
        return (await manager.store.get(task_id)).status is TaskStatus.INTERRUPTED

    await eventually(interrupted)
    assert time.monotonic() - began >= 1

    async def alone() -> bool:
        return [item.instance_id for item in await manager.store.instances()] == [manager.instance_id]

    await eventually(alone)


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_clock_that_is_set_by_an_hour_makes_nobody_look_dead(
    start_manager: StartManager, tmp_path: Path, hours: int
) -> None:
    elsewhere = make_instance("elsewhere", machine="another", pid=1, birth="1")
    task_id = await leave_running(tmp_path / "tasks.db", elsewhere, lease_seconds=3600)
    looks = []

    def stepped(manager: TaskManager) -> None:
        define(manager)
        manager.lease_seconds = 0.3
        manager.clock.freeze(utc_now() + timedelta(hours=hours))
        pulses = manager.backend.pulses

        def counted() -> Any:
            looks.append(found := pulses())
            return found

        manager.backend.pulses = counted  # type: ignore[method-assign]

    manager = await start_manager(stepped)
    await eventually(lambda: len(looks) > 5)
    assert (await manager.store.get(task_id)).status is TaskStatus.RUNNING


async def test_who_could_not_write_its_own_heartbeat_rescues_nobody(
    start_manager: StartManager, tmp_path: Path
) -> None:
    elsewhere = make_instance("elsewhere", machine="another", pid=1, birth="1")
    task_id = await leave_running(tmp_path / "tasks.db", elsewhere, lease_seconds=0.5)
    broken = threading.Event()
    looks = []

    def trouble(manager: TaskManager) -> None:
        define(manager)
        manager.lease_seconds = 0.6
        beat, pulses = manager.backend.beat, manager.backend.pulses

        def failing(me: Any, with_what: Any) -> None:
            if broken.is_set():
                raise BackendUnavailable("locked")
            beat(me, with_what)

        def counted() -> Any:
            looks.append(found := pulses())
            if len(looks) == 1:
                broken.set()
            return found

        manager.backend.beat, manager.backend.pulses = failing, counted  # type: ignore[assignment, method-assign]

    manager = await start_manager(trouble)
    await eventually(lambda: len(looks) > 20)  # 2 s: four leases
    assert (await manager.store.get(task_id)).status is TaskStatus.RUNNING
    broken.clear()

    async def interrupted() -> bool:
        return (await manager.store.get(task_id)).status is TaskStatus.INTERRUPTED

    await eventually(interrupted)


async def test_an_instance_whose_lease_may_have_lapsed_claims_nothing_until_it_has_beaten_again(
    start_manager: StartManager,
) -> None:
    broken = threading.Event()

    def trouble(manager: TaskManager) -> None:
        define(manager)
        manager.lease_seconds = 0.3
        beat = manager.backend.beat

        def failing(me: Any, with_what: Any) -> None:
            if broken.is_set():
                raise BackendUnavailable("locked")
            beat(me, with_what)

        manager.backend.beat = failing  # type: ignore[assignment, method-assign]

    manager = await start_manager(trouble)
    broken.set()
    await eventually(lambda: manager.dispatcher.demand([]) is None)
    task_id = await manager.enqueue(manager.registry.named("left").function)
    assert (await manager.store.get(task_id)).status is TaskStatus.PENDING
    broken.clear()
    assert await manager.result(task_id, PATIENCE) == "done by another"


async def test_an_instance_whose_row_is_gone_registers_again(start_manager: StartManager) -> None:
    def quick(manager: TaskManager) -> None:
        manager.lease_seconds = 0.3

    manager = await start_manager(quick)
    (pulse,) = manager.backend.pulses()
    manager.backend.leave(manager.instance_id, pulse.stamp)
    await eventually(manager.backend.pulses)


@pytest.mark.parametrize(("beats", "end"), [(False, TaskStatus.CANCELLED), (True, TaskStatus.PENDING)])
async def test_what_an_earlier_run_left_waiting_is_cancelled_once_it_is_known_that_nobody_else_serves_it(
    start_manager: StartManager, tmp_path: Path, beats: bool, end: TaskStatus
) -> None:
    elsewhere = make_instance("elsewhere", machine="another", pid=1, birth="1")
    backend = open_backend(str(tmp_path / "tasks.db"))
    await backend.open()
    bench = Bench(backend, "elsewhere", now=utc_now() - timedelta(days=1))
    bench.beat(1, elsewhere)
    task_id = await bench.add("unknown here")

    async def live() -> None:
        while True:
            await asyncio.to_thread(bench.beat, 1, elsewhere)
            await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as group:
        living = group.create_task(live() if beats else asyncio.sleep(0))
        manager = await start_manager(impatient, requeue_pending=False)
        await eventually(lambda: manager.dispatcher.claiming)
        living.cancel()
    assert (await manager.store.get(task_id)).status is end
    await backend.close()


async def test_each_start_has_an_identity_of_its_own(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    first = manager.instance_id
    await manager.shutdown()
    await manager.startup()
    assert len({first, manager.instance_id, ""}) == 3


def test_a_system_that_does_not_tell_about_processes_says_so_and_judges_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: object) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", unknown)
    with caplog.at_level("INFO", "taskflow"):
        me = introduce("me", "1", START)
    assert (me.machine, me.birth) == ("", "")
    assert "lease" in caplog.text
    assert not is_gone(make_instance("other", machine=""), machine_name())


# -- the lease of this process


async def test_the_heartbeat_goes_on_while_a_task_blocks_the_event_loop(start_manager: StartManager) -> None:
    def quick_lease(manager: TaskManager) -> None:
        manager.lease_seconds = 0.3

        @manager.task
        async def blocks() -> float:
            time.sleep(1.0)  # noqa: ASYNC251 - what a task must not do, and some do
            return 1.0

    manager = await start_manager(quick_lease)
    watch, lapsed, looks = Watch(0.3, 0.02), [], 0
    stop = threading.Event()

    def look() -> None:
        nonlocal looks
        while not stop.wait(0.02):
            lapsed.extend(watch.look(manager.backend.pulses(), time.monotonic()))
            looks += 1

    watcher = threading.Thread(target=look)
    watcher.start()
    assert await manager.result(await manager.enqueue(blocks_of(manager)), PATIENCE) == 1.0
    stop.set()
    await asyncio.to_thread(watcher.join)
    assert looks > 10
    assert not lapsed


def blocks_of(manager: TaskManager) -> Any:
    return manager.registry.named("blocks").function


async def test_a_process_that_stops_cleanly_leaves_nothing_to_wait_for(
    start_manager: StartManager, tmp_path: Path
) -> None:
    manager = await start_manager(define)
    assert [pulse.instance.instance_id for pulse in manager.backend.pulses()] == [manager.instance_id]
    await manager.shutdown()
    backend = open_backend(str(tmp_path / "tasks.db"))
    await backend.open()
    assert backend.pulses() == []
    await backend.close()
