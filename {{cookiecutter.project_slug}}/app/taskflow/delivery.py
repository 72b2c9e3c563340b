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
from datetime import datetime
from itertools import chain
from typing import Any, Protocol, cast

from celery import Celery  # type: ignore[import-untyped]
from kombu import Exchange, Queue  # type: ignore[attr-defined]
from kombu.exceptions import KombuError

from .backends.base import AttemptId, Finish, TurnResult
from .errors import BackendUnavailable
from .journal import Journal
from .loops import Loop
from .models import DEFAULT_QUEUE, QueueConfig, TaskStatus
from .processes import settle
from .store import TaskStore

logger = logging.getLogger("taskflow")

TASK = "taskflow.run"
LOOK_INTERVAL, LOOK_SPREAD = 1.0, 0.1
"""Seconds between looks at what has no message, and at most before one that all instances have reason for at once."""
MOST_SENT = 500
"""Messages that one look sends for a queue."""

Token = asyncio.Future[asyncio.Future[None] | None]
"""Becomes the end of the task that it was spent on; None where there was none."""


class Service(Protocol):
    """The task manager, as far as a delivery knows it."""

    store: TaskStore
    journal: Journal
    queues: dict[str, QueueConfig]


def celery_app(url: str, queues: Sequence[str]) -> Celery:
    """A client of that broker. On RabbitMQ its queues are quorum queues, which outlive a broker that is killed."""
    kind, exchange = cast("Any", Queue), cast("Any", Exchange)
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
        """Queue -> the tokens that wait for a turn, and how many of them the one under way asks for."""
        self._offered: Mapping[str, int] = {}
        self._full = False
        self._scarce: set[str] = set()
        """Queues in which a token found nothing while an executor was full: something may wait for a slot."""
        self._stopping = False
        self._running: dict[AttemptId, asyncio.Future[None]] = {}
        """The ends that tokens wait for."""
        self._outbox: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._short: Mapping[str, int] = {}
        """Queue -> ready tasks without a message, at the last look."""
        self._loop = Loop("delivery", self._look)
        self._reason = asyncio.Event()
        """Set when tasks may have become ready that no turn counts: delayed ones, those of a queue that goes on."""
        self._due: datetime | None = None
        self._limits: Mapping[str, tuple[bool, int | None]] = {}
        self._sender: ThreadPoolExecutor | None = None
        self._away = False
        broker = self.app.connection_for_write()
        self._is_away = (KombuError, OSError, *broker.connection_errors, *broker.channel_errors)

    def start(self) -> None:
        self._sender = ThreadPoolExecutor(1, "taskflow-delivery")
        self._reason, self._stopping = asyncio.Event(), False
        self._loop.start()

    async def stop(self) -> None:
        self.let_go()
        for end in self._running.values():  # which nobody will hear of any more
            settle(end, None)
        await self._loop.stop()
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown(wait=False)

    # -- what the dispatcher asks and tells

    def allows(self, *, full: bool) -> Mapping[str, int]:
        self._full = full
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
            if left > 0:
                (self._scarce.add if self._full else self._scarce.discard)(queue)
            for _ in range(min(left, len(self._asking[queue]))):
                settle(self._asking[queue].popleft(), None)
        self._announce(result.arrived)
        due, self._due = self._due, result.next_due
        known, self._limits = self._limits, {name: (it.paused, it.concurrency) for name, it in result.queues.items()}
        if self._limits != known or (due is not None and (self._due is None or self._due > due)):
            self._reason.set()

    def let_go(self) -> None:
        """This process is about to stop: what runs ends, and no token goes on or waits for a turn."""
        self._stopping = True
        for token in chain(*self._asking.values()):
            settle(token, None)
        self._asking.clear()

    # -- a token is spent

    async def spend(self, queue: str) -> int:
        """Runs the next task of a queue, if one is ready, and says how many it ran. Where tasks wait for a slot, or for
        the queue's limit, it goes on while there are any: the tokens that found none free are gone."""
        ran = 0
        while not self._stopping and (ran == 0 or self._goes_on(queue)):
            token: Token = asyncio.get_running_loop().create_future()
            self._asking[queue].append(token)
            self._journal.wake()
            if (end := await token) is None:
                break
            await end
            ran += 1
        return ran

    def _goes_on(self, queue: str) -> bool:
        limits = self._journal.queues.get(queue)
        return queue in self._scarce or (limits is not None and limits.concurrency is not None)

    # -- messages are sent

    def _announce(self, ready: Mapping[str, int]) -> None:
        with self._lock:
            idle = not self._outbox
            self._outbox.update(ready)
        if ready and idle and self._sender is not None:
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

    async def _look(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_INTERVAL * random.uniform(0.75, 1.25)):
                await self._reason.wait()
                await asyncio.sleep(LOOK_SPREAD * random.random())
        has_reason = self._reason.is_set()
        self._reason.clear()
        with suppress(BackendUnavailable):
            ready = await self._ready()
            loop = asyncio.get_running_loop()
            missing = await loop.run_in_executor(self._sender, self._missing, ready) if ready else {}
            short, self._short = self._short, missing
            if not has_reason:  # what is missing once may be on its way
                missing = {queue: min(n, short[queue]) for queue, n in missing.items() if queue in short}
            self._announce({queue: min(n, MOST_SENT) for queue, n in missing.items()})

    async def _ready(self) -> dict[str, int]:
        """Queue -> how many of its tasks could start now, by what is known here; of one executor's no more than there
        are slots: messages for the others would only go round."""
        slots, waiting, ready = Counter[str](), Counter[tuple[str, str]](), Counter[str]()
        for instance in await self._store.instances():
            slots.update({kind: n for kind, (_, n) in instance.vitals.busy.items()} if instance.vitals else {})
        for count in await self._store.counts():
            if count.status is TaskStatus.PENDING and (kind := self._store.executor_of(count.name)):
                waiting[count.queue, kind] += count.n - count.delayed
        for (queue, kind), n in waiting.items():
            ready[queue] += min(n, slots[kind])
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
