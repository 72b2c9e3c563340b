"""The tests of the task system once more, with a delivery: `pytest -p tests.taskflow.delivered --store postgres FILES`.

Whatever task manager a test starts keeps its tasks in that store, and announces them to a real broker: RabbitMQ for
PostgreSQL, Redis for Redis. One Celery worker takes the messages and has the managers spend them; a thread of this
process, because that is where tests define their functions. The tests know nothing of it.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from fnmatch import fnmatch

import pytest
from celery.contrib.testing.worker import TestWorkController  # type: ignore[import-untyped]

from app.taskflow import TaskManager
from app.taskflow.backends import Backend, open_backend
from app.taskflow.delivery import TASK, CeleryDelivery, celery_app

from .brokers import RabbitServer
from .servers import RedisServer, Server, fresh_postgres, fresh_redis, postgres_url, redis_url

SQLITE = "it looks into an SQLite file, locks or moves it"
WAITS = "a task that was added waits for its message: it counts as waiting, and a stop may come first"
LEFT_OUT = {
    "test_api.py::test_a_backend_that_is_away_is_503*": SQLITE,
    "test_api.py::test_a_service_that_was_not_started*": SQLITE,
    "test_context.py::test_context_variables_of_a_request_reach*": WAITS,
    "test_context.py::test_the_traceparent_header_of_a_request*": WAITS,
    "test_examples.py::test_an_order_and_its_email_come_together": SQLITE,
    "test_idempotency.py::test_one_key_is_one_task_for_two_processes*": SQLITE,
    "test_idempotency.py::test_one_key_twice_in_one_request*": WAITS,
    "test_manager.py::test_a_full_disk_refuses*": SQLITE,
    "test_manager.py::test_a_task_that_ends_while_the_database_is_locked*": SQLITE,
    "test_manager.py::test_it_starts_while_another_process_locks*": SQLITE,
    "test_manager.py::test_it_starts_without_its_folder*": SQLITE,
    "test_operations.py::test_a_backend_that_is_away_is_503*": SQLITE,
    "test_operations.py::test_a_service_that_was_not_started*": SQLITE,
    "test_pages.py::test_a_backend_that_is_away_is_a_page*": SQLITE,
    "test_pages.py::test_the_dashboard_stays_small": "its pages are measured with what SQLite shows",
    "test_queues.py::test_a_turn_that_is_rolled_back*": SQLITE,
    "test_queues.py::test_of_many_concurrent_requests*": SQLITE,
    "test_queues.py::test_the_loser_of_a_race*": SQLITE,
    "test_queues.py::test_the_rejected_row_is_kept*": SQLITE,
    "test_queues.py::test_there_is_room_again*": WAITS,
}
"""Tests, and why they say nothing about a delivery, or something else."""


class Fleet:
    """A Celery worker, and the started managers whose tasks it runs."""

    def __init__(self, broker: str) -> None:
        self.app = celery_app(broker, [])
        self.app.set_default()
        self.app.task(self.spend, name=TASK, shared=False)
        self.loops: dict[CeleryDelivery, asyncio.AbstractEventLoop] = {}
        self.spending: defaultdict[CeleryDelivery, set[Future[int]]] = defaultdict(set)
        self.ran = 0
        quiet = {"without_mingle": True, "without_gossip": True, "use_eventloop": False}
        worker = TestWorkController(app=self.app, hostname="tests@localhost", **quiet)
        threading.Thread(target=worker.start, daemon=True).start()
        worker.ensure_started()

    def join(self, delivery: CeleryDelivery) -> None:
        ours, theirs = self.app.amqp.queues, delivery.app.amqp.queues
        for name in theirs.keys() - ours.keys():
            ours.add(theirs[name])
            self.app.control.add_consumer(name, reply=True, timeout=5, limit=1)
        self.loops[delivery] = asyncio.get_running_loop()

    def leave(self, delivery: CeleryDelivery) -> None:
        self.loops.pop(delivery, None)
        for future in list(self.spending.pop(delivery, ())):
            future.cancel()

    def spend(self, queue: str) -> int:
        """A message does not say whose it is: one that has nothing in that queue leaves it to the next."""
        for delivery, loop in random.sample(list(self.loops.items()), len(self.loops)):
            future = asyncio.run_coroutine_threadsafe(delivery.spend(queue), loop)
            self.spending[delivery].add(future)
            if delivery not in self.loops:  # it left meanwhile, and its loop may never turn again
                future.cancel()
            try:
                ran = future.result()
            except CancelledError:  # it was stopped
                continue
            finally:
                self.spending[delivery].discard(future)
            self.ran += ran
            if ran:
                return ran
        return 0


class Places:
    """Where tasks are kept instead: the same place for the same file."""

    def __init__(self, store: str, places: ExitStack) -> None:
        self._store, self._places = store, places
        self._known: dict[str, str] = {}

    def open(self, location: str | None) -> Backend:
        if location is not None and location.startswith(("redis:", "postgresql:")):
            return open_backend(location)
        if location is None:
            return open_backend(self._fresh())
        return open_backend(self._known.get(location) or self._known.setdefault(location, self._fresh()))

    def _fresh(self) -> str:
        place = fresh_redis(redis_url()) if self._store == "redis" else fresh_postgres(postgres_url())
        return self._places.enter_context(place)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store", choices=["redis", "postgres"], required=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for pattern, why in LEFT_OUT.items():
            if fnmatch(item.nodeid, f"*/{pattern}"):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session", autouse=True)
def delivered(request: pytest.FixtureRequest) -> Iterator[None]:
    store = str(request.config.getoption("--store"))
    server: Server = RedisServer() if store == "redis" else RabbitServer()
    with ExitStack() as places, pytest.MonkeyPatch.context() as patch:
        broker = places.enter_context(server).url
        fleet = Fleet(broker)
        startup, shutdown = TaskManager.startup, TaskManager.shutdown

        async def start(manager: TaskManager) -> None:
            if manager.dispatcher.delivery is None:
                manager.deliver_by(broker)
            await startup(manager)
            assert isinstance(manager.dispatcher.delivery, CeleryDelivery)
            fleet.join(manager.dispatcher.delivery)

        async def stop(manager: TaskManager) -> None:
            await shutdown(manager)
            if isinstance(manager.dispatcher.delivery, CeleryDelivery):
                fleet.leave(manager.dispatcher.delivery)

        patch.setattr("app.taskflow.manager.open_backend", Places(store, places).open)
        patch.setattr(TaskManager, "startup", start)
        patch.setattr(TaskManager, "shutdown", stop)
        yield
        assert fleet.ran, "no task came by the broker"
