"""Delivery by a fleet of Celery workers, on real brokers: the row is the truth, a message says that there is work."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from app.taskflow import TaskFailed, TaskManager, TaskStatus
from app.taskflow.delivery import TASK, CeleryDelivery

from .brokers import RabbitServer, rabbitmq_program
from .helpers import eventually
from .servers import BACKENDS, PostgresServer, RedisServer, fresh_postgres, fresh_redis, postgres_url, redis_url

pytestmark = pytest.mark.anyio
MISSING = "there is no RabbitMQ on PATH"
PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["rabbitmq", "redis"])
def broker(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "redis":
        if "redis" not in BACKENDS:
            pytest.skip("this project has no Redis")
        with RedisServer() as redis:
            yield redis.url
        return
    if rabbitmq_program() is None:
        if os.environ.get("TASKFLOW_BROKER") == "required":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    with RabbitServer() as rabbit:
        yield rabbit.url


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    with fresh_redis(redis_url()) if request.param == "redis" else fresh_postgres(postgres_url()) as url:
        yield url


class Fleet:
    """Workers of one store and one broker, and the web process that this test is."""

    def __init__(self, store: str, broker: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = folder / "starts"
        self.file.touch()
        self.store, self.broker = store, broker
        monkeypatch.setenv("FLEET_FILE", str(self.file))
        monkeypatch.delenv("FLEET_BROKER", raising=False)
        sys.modules.pop("tests.taskflow.fleet_app", None)
        fleet_app = import_module("tests.taskflow.fleet_app")  # anew: `from . import` would find the last test's
        self.manager: TaskManager = fleet_app.define(store)
        self.log = folder / "workers.log"
        self.workers: list[subprocess.Popen[bytes]] = []

    def worker(self, *options: str) -> subprocess.Popen[bytes]:
        celery = [sys.executable, "-m", "celery", "-A", "tests.taskflow.fleet_app", "worker", "--concurrency", "10"]
        environment = {**os.environ, "FLEET_STORE": self.store, "FLEET_BROKER": self.broker, "PYTHONPATH": str(PROJECT)}
        with self.log.open("ab") as log:
            command = [*celery, "--without-mingle", "--without-gossip", *options]
            process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=log)
        self.workers.append(process)
        return process

    def starts(self) -> Counter[tuple[str, str]]:
        """(Name, task id) -> how often it was started."""
        lines = [line.split() for line in self.file.read_text().splitlines()]
        return Counter((line[0], line[1]) for line in lines)

    async def add(self, name: str, *args: Any, **options: Any) -> str:
        return await self.manager.enqueue(self.manager.registry.named(name).function, *args, **options)

    def purge(self) -> None:
        """Empties the broker's queues, as an operator might."""
        delivery = CeleryDelivery(self.manager, self.broker)
        with delivery.app.connection_for_write() as connection:
            for queue in delivery.app.amqp.queues.values():
                bound = queue(connection.default_channel)
                bound.declare()
                bound.purge()

    def close(self) -> None:
        for process in self.workers:
            process.kill()
            process.wait()


@pytest.fixture
def fleet(store: str, broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    fleet = Fleet(store, broker, tmp_path, monkeypatch)
    fleet.purge()
    yield fleet
    fleet.close()


async def test_tasks_run_in_the_fleet_and_not_here(fleet: Fleet) -> None:
    fleet.manager.deliver_by(fleet.broker)
    async with fleet.manager.lifespan():
        fleet.worker()
        ids = [await fleet.add("add_up", n, 1) for n in range(30)]
        assert [await fleet.manager.result(task_id, 60) for task_id in ids] == [n + 1 for n in range(30)]
        retried = await fleet.add("second_try")
        assert await fleet.manager.result(retried, 30) == "sent"
        here = fleet.manager.instance_id
        for task_id in [*ids, retried]:
            assert (await fleet.manager.store.get(task_id)).instance not in (None, here)
    assert {int(line.split()[3]) for line in fleet.file.read_text().splitlines()} == {fleet.workers[0].pid}


async def test_what_the_broker_lost_is_announced_again(fleet: Fleet) -> None:
    fleet.manager.deliver_by(fleet.broker)
    async with fleet.manager.lifespan():
        ids = [await fleet.add("add_up", n, 1) for n in range(20)]
        await asyncio.sleep(0.3)
        fleet.purge()
        fleet.worker()
        assert [await fleet.manager.result(task_id, 60) for task_id in ids] == [n + 1 for n in range(20)]
    assert set(fleet.starts().values()) == {1}


async def test_messages_that_say_the_same_again_run_nothing_twice(fleet: Fleet) -> None:
    fleet.manager.deliver_by(fleet.broker)
    async with fleet.manager.lifespan():
        ids = [await fleet.add("add_up", n, 1) for n in range(10)]
        delivery = fleet.manager.dispatcher.delivery
        assert isinstance(delivery, CeleryDelivery)
        delivery._announce({"default": 50})
        fleet.worker()
        for task_id in ids:
            await fleet.manager.result(task_id, 60)
        await asyncio.sleep(1)
    assert set(fleet.starts().values()) == {1}


async def test_a_limited_queue_stays_within_its_limit_and_gets_on(fleet: Fleet) -> None:
    fleet.manager.deliver_by(fleet.broker)
    async with fleet.manager.lifespan():
        ids = [await fleet.add("in_turn", 0.1) for _ in range(12)]
        fleet.worker()
        most = 0
        while not all([(await fleet.manager.store.get(task_id)).status.terminal for task_id in ids]):
            running = {state.name: state.running for state in await fleet.manager.store.queues()}
            most = max(most, running.get("narrow", 0))
            await asyncio.sleep(0.02)
        assert 1 <= most <= 2


async def test_what_becomes_ready_later_starts_at_once(fleet: Fleet) -> None:
    fleet.manager.deliver_by(fleet.broker)
    async with fleet.manager.lifespan():
        fleet.worker()
        await fleet.manager.result(await fleet.add("add_up", 1, 1), 60)
        later = await fleet.add("add_up", 2, 1, delay_seconds=1.0)
        await fleet.manager.result(later, 30)
        task = await fleet.manager.store.get(later)
        assert task.start_time is not None
        assert task.start_time - task.run_at < timedelta(seconds=0.6), "as soon as it is due"
        await fleet.manager.store.pause_queue("default", "ada", "a look at it")
        held = await fleet.add("add_up", 3, 1)
        await asyncio.sleep(1.5)
        assert (await fleet.manager.store.get(held)).status is TaskStatus.PENDING
        resumed = fleet.manager.clock()
        await fleet.manager.store.resume_queue("default", "ada")
        await fleet.manager.result(held, 30)
        task = await fleet.manager.store.get(held)
        assert task.start_time is not None
        assert task.start_time - resumed < timedelta(seconds=0.6)


async def test_what_waits_for_a_process_keeps_no_messages_moving(fleet: Fleet) -> None:
    fleet.manager.deliver_by(fleet.broker)
    async with fleet.manager.lifespan():
        fleet.worker("--loglevel", "INFO")
        began = monotonic()
        ids = [await fleet.add("compute", 0.2) for _ in range(60)]
        others = [await fleet.add("add_up", n, 1) for n in range(5)]
        for task_id in others:
            await fleet.manager.result(task_id, 60)
        assert (await fleet.manager.store.get(ids[-1])).status is TaskStatus.PENDING, "nobody waits behind processes"
        for task_id in ids:
            await fleet.manager.result(task_id, 60)
        seconds = monotonic() - began
        tasks = [await fleet.manager.store.get(task_id) for task_id in ids]
        ends = sorted(task.end_time for task in tasks if task.end_time is not None)
        assert ends[-1] - ends[0] < timedelta(seconds=10), "6 s with two at a time: no slot waits for a message"
    messages = fleet.log.read_text().count("Task taskflow.run") // 2  # received, and succeeded
    assert messages < 65 + 20 * seconds, "one for each task, and in each second a few for free slots"


async def test_a_worker_that_is_killed_loses_nothing(fleet: Fleet) -> None:
    fleet.manager.deliver_by(fleet.broker)
    async with fleet.manager.lifespan():
        first = fleet.worker()
        again, once = await fleet.add("again", 1.5), await fleet.add("once", 1.5)
        await eventually(lambda: len(fleet.starts()) == 2, 60)
        fleet.worker()
        first.send_signal(signal.SIGKILL)
        await fleet.manager.result(again, 60)
        with pytest.raises(TaskFailed, match="interrupted"):
            await fleet.manager.result(once, 60)
        assert fleet.starts() == {("again", again): 2, ("once", once): 1}


async def test_a_worker_that_is_stopped_ends_what_it_runs(fleet: Fleet) -> None:
    fleet.manager.deliver_by(fleet.broker)
    async with fleet.manager.lifespan():
        worker = fleet.worker()
        task_id = await fleet.add("once", 1.5)
        await eventually(lambda: fleet.starts()["once", task_id], 60)
        worker.send_signal(signal.SIGTERM)
        await fleet.manager.result(task_id, 30)
        await eventually(lambda: worker.poll() is not None, 30)
        assert (await fleet.manager.store.get(task_id)).status is TaskStatus.SUCCESS


async def test_a_worker_that_is_stopped_takes_up_nothing_more(fleet: Fleet) -> None:
    fleet.manager.deliver_by(fleet.broker)
    async with fleet.manager.lifespan():
        worker = fleet.worker()
        ids = [await fleet.add("in_turn", 0.5) for _ in range(100)]
        await fleet.manager.result(ids[0], 60)
        worker.send_signal(signal.SIGTERM)
        await asyncio.to_thread(worker.wait, 20)  # 25 s of tasks wait in a queue with a limit
        left = [(await fleet.manager.store.get(task_id)).status for task_id in ids]
        assert left.count(TaskStatus.PENDING) > 50
        assert set(left) == {TaskStatus.PENDING, TaskStatus.SUCCESS}


async def test_a_worker_that_is_stopped_while_the_store_is_away_ends(
    broker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PostgresServer() as server:
        fleet = Fleet(server.url, broker, tmp_path, monkeypatch)
        fleet.purge()
        fleet.manager.deliver_by(broker)
        worker = fleet.worker()
        try:
            async with fleet.manager.lifespan():
                await fleet.manager.result(await fleet.add("add_up", 1, 1), 60)
                app = CeleryDelivery(fleet.manager, broker).app
                server.kill()
                for _ in range(5):
                    app.send_task(TASK, ("default",), queue="default")
                await asyncio.sleep(2)
                worker.send_signal(signal.SIGTERM)
                await asyncio.to_thread(worker.wait, 20)
                server.start()
        finally:
            fleet.close()


async def test_without_the_setting_this_process_takes_over(fleet: Fleet) -> None:
    fleet.manager.deliver_by(fleet.broker)
    async with fleet.manager.lifespan():
        ids = [await fleet.add("add_up", n, 1) for n in range(10)]
        await asyncio.sleep(1.5)
        assert not fleet.starts()
    fleet.manager.deliver_by(None)
    async with fleet.manager.lifespan():
        assert [await fleet.manager.result(task_id, 30) for task_id in ids] == [n + 1 for n in range(10)]


async def test_turned_off_and_on_again_under_load_loses_and_doubles_nothing(fleet: Fleet) -> None:
    """As the documents say it: the workers first, then the service; back the other way round."""
    loop, ids = asyncio.get_running_loop(), list[str]()

    async def load(seconds: float) -> None:
        ends = loop.time() + seconds
        while loop.time() < ends:
            ids.extend(await asyncio.gather(*(fleet.add("add_up", n, 1) for n in range(5))))
            await asyncio.sleep(0.05)

    for broker in (fleet.broker, None, fleet.broker):
        if broker is not None:
            fleet.worker()
        fleet.manager.deliver_by(broker)
        async with fleet.manager.lifespan():
            await load(1.5)
            if broker is None:
                fleet.workers[-1].terminate()
            await load(1.5)
    async with fleet.manager.lifespan():
        for task_id in ids:
            await fleet.manager.result(task_id, 30)
    assert fleet.starts() == dict.fromkeys((("add_up", task_id) for task_id in ids), 1)
    places = {int(line.split()[3]) for line in fleet.file.read_text().splitlines()}
    assert os.getpid() in places
    assert places & {worker.pid for worker in fleet.workers}
