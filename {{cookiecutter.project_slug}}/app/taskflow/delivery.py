"""Delivery by Celery: its messages say that there is work, our rows say what.

Owns the seam to a fleet of Celery workers. A message is a token: "a task of this queue is ready". Whoever gets one asks
the store for the next task of that queue, under lease, fence, limits and priority as always, and acknowledges when its
end is committed. So a message twice finds nothing, and a lost one is sent again: every instance compares, each second,
what is ready with what the broker holds. Nothing but tokens is in the broker; it can be emptied, and taken away.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from celery import Celery  # type: ignore[import-untyped]
from kombu import Exchange, Queue  # type: ignore[attr-defined]
from kombu.exceptions import KombuError

from .backends.base import AttemptId, Finish, TurnResult
from .dispatcher import Delivery
from .errors import BackendUnavailable
from .journal import Journal
from .loops import Loop
from .models import DEFAULT_QUEUE, QueueConfig, TaskStatus
from .processes import settle
from .store import TaskStore

logger = logging.getLogger("taskflow")

TASK = "taskflow.run"
REPAIR_INTERVAL = 1.0
"""Seconds between looks at what is ready and has no message."""
MOST_SENT = 500
"""Messages that one look sends for a queue."""


Token = asyncio.Future[asyncio.Future[None] | None]
"""Becomes the end of the task that it was spent on."""


class Service(Protocol):
    """The task manager, as far as a delivery knows it."""

    store: TaskStore
    journal: Journal
    queues: dict[str, QueueConfig]

    def deliver_by(self, delivery: Delivery) -> None: ...

    async def startup(self) -> None: ...

    async def shutdown(self) -> None: ...


def celery_app(url: str, queues: Sequence[str]) -> Celery:
    """A client of that broker. On RabbitMQ its queues are quorum queues, which outlive a broker that is killed."""
    kind: Any = Queue
    exchange: Any = Exchange
    durable = {"x-queue-type": "quorum"} if url.startswith(("amqp", "pyamqp")) else {}
    app = Celery("taskflow", broker=url)
    app.conf.update(
        task_queues=[
            kind(name, exchange("taskflow"), routing_key=name, durable=True, queue_arguments=durable)
            for name in dict.fromkeys([DEFAULT_QUEUE, *queues])
        ],
        task_default_queue=DEFAULT_QUEUE,
        task_default_exchange="taskflow",
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        worker_pool="threads",  # one instance for each process: its event loop and its slots are shared by all messages
        worker_concurrency=100,
        broker_connection_retry_on_startup=True,
    )
    return app


class CeleryDelivery:
    """What the dispatcher asks and tells, in every process: it announces what became ready, and claims for tokens."""

    def __init__(self, service: Service, url: str) -> None:
        self._store, self._journal = service.store, service.journal
        self.app = celery_app(url, list(service.queues))
        self._asking: defaultdict[str, deque[Token]] = defaultdict(deque)
        """Queue -> the tokens that wait for a turn."""
        self._offered: Mapping[str, int] = {}
        """How many of them the turn under way asks for."""
        self._running: dict[AttemptId, asyncio.Future[None]] = {}
        """The ends that tokens wait for."""
        self._outbox: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._short: Mapping[str, int] = {}
        """Queue -> ready tasks without a message, at the last look."""
        self._loop = Loop("delivery", self._repair)
        self._sender: ThreadPoolExecutor | None = None
        self._away = False
        broker = self.app.connection_for_write()
        self._is_away = (KombuError, OSError, *broker.connection_errors, *broker.channel_errors)

    def start(self) -> None:
        self._sender = ThreadPoolExecutor(1, "taskflow-delivery")
        self._loop.start()

    async def stop(self) -> None:
        await self._loop.stop()
        if (sender := self._sender) is not None:
            self._sender = None
            sender.shutdown(wait=False)

    # -- what the dispatcher asks and tells

    def allows(self) -> Mapping[str, int]:
        self._offered = {queue: len(tokens) for queue, tokens in self._asking.items() if tokens}
        return self._offered

    def turned(self, finishes: Sequence[Finish], result: TurnResult) -> None:
        for finish in finishes:
            if (end := self._running.pop(finish.task.attempt_id, None)) is not None:
                settle(end, None)
        offered, self._offered = Counter(self._offered), {}
        for task in result.claimed:
            if tokens := self._asking.get(task.queue):
                end = self._running[task.attempt_id] = asyncio.get_running_loop().create_future()
                settle(tokens.popleft(), end)
                offered[task.queue] -= 1
        for queue, left in offered.items():
            for _ in range(min(left, len(self._asking[queue]))):
                settle(self._asking[queue].popleft(), None)
        if result.arrived:
            self._announce(result.arrived)

    # -- a token is spent

    async def spend(self, queue: str) -> int:
        """Runs the next task of a queue, if one is ready, and says how many it ran. In a queue with a limit it goes on
        while there are any: tokens that found the limit reached are gone."""
        ran = 0
        while (end := await self._claim(queue)) is not None:
            await end
            ran += 1
            state = self._journal.queues.get(queue)
            if state is None or state.concurrency is None:
                break
        return ran

    async def _claim(self, queue: str) -> asyncio.Future[None] | None:
        """The end of the task that started; None where none did."""
        token: Token = asyncio.get_running_loop().create_future()
        self._asking[queue].append(token)
        self._journal.wake()
        return await token

    # -- messages are sent

    def _announce(self, ready: Mapping[str, int]) -> None:
        with self._lock:
            idle = not self._outbox
            self._outbox.update(ready)
        if idle and self._sender is not None:
            self._sender.submit(self._send)

    def _send(self) -> None:
        """On the sender's thread. What the broker does not take is not kept: the next look finds it missing."""
        with self._lock:
            outbox, self._outbox = self._outbox, Counter()
        try:
            with self.app.producer_or_acquire() as producer:
                for queue, n in outbox.items():
                    for _ in range(n):
                        self.app.send_task(TASK, (queue,), queue=queue, producer=producer, retry=False)
            self._away = False
        except self._is_away as error:
            self._report(error)

    async def _repair(self) -> None:
        await asyncio.sleep(REPAIR_INTERVAL * random.uniform(0.75, 1.25))
        if self._sender is None:
            return
        with suppress(BackendUnavailable):
            ready = await self._ready()
            loop = asyncio.get_running_loop()
            missing = await loop.run_in_executor(self._sender, self._missing, ready) if ready else {}
            short, self._short = self._short, missing  # what is missing once may be on its way
            if twice := {queue: min(n, short[queue], MOST_SENT) for queue, n in missing.items() if queue in short}:
                self._announce(twice)

    async def _ready(self) -> dict[str, int]:
        """Queue -> how many of its tasks could start now, by what is known here."""
        ready: Counter[str] = Counter()
        for count in await self._store.counts():
            if count.status is TaskStatus.PENDING and self._store.knows(count.name):
                ready[count.queue] += count.n - count.delayed
        for state in await self._store.queues():
            if state.paused:
                del ready[state.name]
            elif state.concurrency is not None:
                ready[state.name] = min(ready[state.name], state.concurrency - state.running)
        return {queue: n for queue, n in ready.items() if n > 0}

    def _missing(self, ready: Mapping[str, int]) -> dict[str, int]:
        """On the sender's thread: how many more are ready than the broker holds messages for."""
        missing = {}
        try:
            with self.app.connection_for_write() as connection:
                for queue, n in ready.items():
                    declared = self.app.amqp.queues[queue](connection.default_channel)
                    declared.declare()
                    missing[queue] = n - int(declared.queue_declare().message_count)
            self._away = False
        except self._is_away as error:
            self._report(error)
        return {queue: n for queue, n in missing.items() if n > 0}

    def _report(self, error: Exception) -> None:
        if not self._away:  # once an outage
            logger.error("the broker is away (%s): tasks wait, and are announced once it is back", error)
        self._away = True
