"""The fleet's side of a delivery: one instance of the task system inside a Celery worker.

Owns its event loop and its thread. The invariant: a message is acknowledged when the end of what it stood for is
stored, so a worker that dies gives its messages back.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future
from typing import Protocol

from celery import Celery, signals  # type: ignore[import-untyped]
from celery.exceptions import Reject  # type: ignore[import-untyped]

from .delivery import TASK, CeleryDelivery, Service
from .dispatcher import Delivery

START_TIMEOUT, STOP_TIMEOUT = 60.0, 45.0
"""Seconds that a worker has to start, and to end what it runs."""


class HostedService(Service, Protocol):
    """The same, as far as this process starts and stops it."""

    def deliver_by(self, delivery: Delivery) -> None: ...

    async def startup(self) -> None: ...

    async def shutdown(self) -> None: ...


class Host:
    """One instance in a Celery worker's process, with an event loop and a thread of its own."""

    def __init__(self, service: HostedService, delivery: CeleryDelivery) -> None:
        self._service, self._delivery = service, delivery
        self._lock = threading.Lock()
        self._process = 0
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._end: Future[None] | None = None

    def spend(self, queue: str) -> int:
        """Blocks until what the token stands for has ended. Raises Reject where it is for another worker to take."""
        ran = asyncio.run_coroutine_threadsafe(self._delivery.spend(queue), self.start()).result()
        if not ran and self._end is not None:
            raise Reject("this worker stops", requeue=True)
        return ran

    def start(self) -> asyncio.AbstractEventLoop:
        """In this process, which may have been forked from another: by its first message at the latest."""
        with self._lock:
            if self._event_loop is None or self._process != os.getpid():
                loop = asyncio.new_event_loop()
                threading.Thread(target=loop.run_forever, name="taskflow-host", daemon=True).start()
                try:
                    asyncio.run_coroutine_threadsafe(self._service.startup(), loop).result(START_TIMEOUT)
                except BaseException:
                    loop.call_soon_threadsafe(loop.stop)
                    raise
                self._process, self._event_loop = os.getpid(), loop
            return self._event_loop

    def let_go(self) -> None:
        """The worker is asked to stop: it ends what runs, in its shutdown time, and takes up nothing more."""
        if self._event_loop is not None and self._end is None:
            self._event_loop.call_soon_threadsafe(self._delivery.let_go)
            self._end = asyncio.run_coroutine_threadsafe(self._service.shutdown(), self._event_loop)

    def stop(self) -> None:
        """Returns when everything has ended."""
        with self._lock:
            if self._event_loop is not None and self._process == os.getpid():
                self.let_go()
                if self._end is not None:
                    self._end.result(STOP_TIMEOUT)
                self._event_loop.call_soon_threadsafe(self._event_loop.stop)
                self._event_loop = self._end = None


def worker_app(service: HostedService, url: str) -> Celery:
    """What `celery -A app.worker worker` runs."""
    delivery = CeleryDelivery(service, url)
    service.deliver_by(delivery)
    host = Host(service, delivery)

    @delivery.app.task(name=TASK)  # type: ignore[untyped-decorator]
    def run(queue: str) -> int:
        return host.spend(queue)

    signals.worker_shutting_down.connect(lambda **_: host.let_go(), weak=False)
    for signal in (signals.worker_process_shutdown, signals.worker_shutdown):
        signal.connect(lambda **_: host.stop(), weak=False)
    return delivery.app
