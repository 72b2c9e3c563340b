"""Who is alive, and what the dead left behind.

Owns this instance's lease and the rescue of others'. The heartbeat has a thread and a connection of its own, so that a
task which blocks the event loop does not make its neighbours look dead; rescue looks at leases, never at a task's age.
An instance of this machine whose process is gone is rescued at once, any other when its lease has lapsed. Who could not
write its own heartbeat judges nobody's, and claims nothing while its own lease may have lapsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from time import monotonic

from .backends.base import Backend, Beat, Cancel, DeclareQueues, Instance, Pulse, Rescue
from .dispatcher import Dispatcher
from .errors import BackendUnavailable, TaskflowError
from .journal import Journal
from .leases import LOOKS_PER_LEASE, Watch
from .loops import Loop, until
from .models import LEASE_SECONDS, Cursor, QueueConfig, TaskFilter, TaskStatus, Vitals
from .store import TaskStore

logger = logging.getLogger("taskflow")

BEATS_PER_LEASE = 3
BEAT_RETRY = 1.0
"""Seconds between heartbeats while they fail."""
RESCUE_INTERVAL = 5.0
"""Seconds between looks at the others; less where leases are short."""
RETENTION_INTERVAL = 60.0
CANCEL_INTERVAL = 1.0
"""Seconds after which an instance sees that another one was asked to cancel a task it runs, or to have it drain."""


def introduce(instance_id: str, version: str, started: datetime) -> Instance:
    """This process, as others can tell it from any that comes after it."""
    pid = os.getpid()
    if not machine_name():
        logger.info("this system does not say which processes live: tasks of one that dies wait for its lease to lapse")
    return Instance(
        instance_id=instance_id,
        host=socket.gethostname(),
        machine=machine_name(),
        pid=pid,
        birth=birth_of(pid) or "",
        version=version,
        started=started,
    )


def machine_name() -> str:
    """Names the set of pids that ours belongs to: this boot of this machine, and the container in it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return ""


def birth_of(pid: int) -> str | None:
    """When the process of that pid started, in the kernel's ticks; "" when it has died and its parent has not noticed
    yet, None where there is no such process, or the system does not show it to us."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


def memory_in_use() -> int | None:
    """Bytes of this process that are in RAM; None where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def is_gone(other: Instance, machine: str) -> bool:
    """True only when that process certainly does not exist any more."""
    if not machine or other.machine != machine or not other.birth:
        return False
    birth = birth_of(other.pid)
    return not exists(other.pid) if birth is None else birth != other.birth


def exists(pid: int) -> bool:
    """Whether any process has that pid, also where /proc hides those of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and not ours to signal
        return True
    return True


def process_words(instance: Instance) -> str:
    """As people tell processes apart: what it was, and which version of the application it ran."""
    return f"{instance.host}:{instance.pid} {instance.version} {instance.instance_id}"


class Heartbeat:
    """Renews this instance's lease from a thread of its own, and knows whether that worked."""

    def __init__(
        self,
        backend: Backend,
        me: Instance,
        dispatcher: Dispatcher,
        journal: Journal,
        *,
        clock: Callable[[], datetime],
        runs_tasks: bool = True,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._runs_tasks = runs_tasks
        self._lease_seconds = lease_seconds
        self._backend = backend
        self._me = me
        self._dispatcher, self._journal = dispatcher, journal
        self._clock = clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._written = float("-inf")
        """Monotonic time at which the last heartbeat that was written set out."""
        self._failing = False
        self.failures = 0
        """Heartbeats that could not be written, ever."""

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="taskflow-heartbeat", daemon=True)
            self._thread.start()

    def beat(self) -> None:
        """Raises BackendUnavailable."""
        began, now = monotonic(), self._clock()
        lease_until = now + timedelta(seconds=self._lease_seconds)
        slots = self._dispatcher.slots if self._runs_tasks and not self._dispatcher.retired else 0
        try:
            self._backend.beat(self._me, Beat(now, lease_until, slots, self._dispatcher.running, self._vitals()))
        except BaseException:
            self._failing = True
            self.failures += 1
            raise
        self._written, self._failing = began, False

    def _vitals(self) -> Vitals:
        return Vitals(self._dispatcher.busy, self._journal.backlog, self._journal.took, memory_in_use())

    def holds(self) -> bool:
        """Whether nobody can have found this instance's lease lapsed."""
        return monotonic() - self._written < self._lease_seconds

    @property
    def regular(self) -> bool:
        """Whether heartbeats have come through of late as they should: who has trouble judges nobody."""
        return not self._failing and monotonic() - self._written < self._lease_seconds / 2

    async def stop(self, deadline: float) -> None:
        """Ends the lease, so that nobody waits for it to lapse. Returns at the monotonic `deadline` in any case."""
        self._stop.set()
        if (thread := self._thread) is not None:
            await until(lambda: not thread.is_alive(), deadline)

    def _run(self) -> None:
        regular = self._lease_seconds / BEATS_PER_LEASE
        while not self._stop.wait(min(BEAT_RETRY, regular) if self._failing else regular):
            failed_before = self._failing
            try:
                self.beat()
            except Exception as error:  # noqa: BLE001 - the next one comes
                if not failed_before:  # once an outage, not once a second
                    logger.warning("heartbeat: %s; tried again every second", error)
        try:
            self._backend.leave(self._me.instance_id)
        except Exception as error:  # noqa: BLE001 - its lease will lapse
            logger.warning("could not sign off: %s", error)


class Housekeeping:
    """Starts claiming once this instance is known, rescues what others left, and hears cancels from elsewhere."""

    def __init__(
        self,
        backend: Backend,
        journal: Journal,
        dispatcher: Dispatcher,
        me: Instance,
        *,
        clock: Callable[[], datetime],
        store: TaskStore,
        queues: Mapping[str, QueueConfig],
        runs_tasks: bool = True,
        requeue_pending: bool = True,
        retention_days: float | None = None,
        lease_seconds: float = LEASE_SECONDS,
        lost: Callable[[datetime, str, int], None] = lambda _now, _process, _rescued: None,
    ) -> None:
        """`lost` hears of each process that went without a word, and how many tasks it had left."""
        self._lost = lost
        self._store = store
        self._queues = queues
        self._requeue_pending = requeue_pending
        self._retention_days = retention_days
        self._backend = backend
        self._journal = journal
        self._dispatcher = dispatcher
        self._me = me
        self._clock = clock
        self._runs_tasks = runs_tasks
        self.introduced = asyncio.Event()
        """Set once this instance is known to the others, and may claim."""
        self.heartbeat = Heartbeat(
            backend, me, dispatcher, journal, clock=clock, runs_tasks=runs_tasks, lease_seconds=lease_seconds
        )
        self._look_interval = min(RESCUE_INTERVAL, lease_seconds / LOOKS_PER_LEASE)
        self._watch = Watch(lease_seconds, self._look_interval)
        self.rescued = 0
        """Tasks, ever."""
        self._failures = 0
        """Of heartbeats, when this instance last looked at the others."""
        self._rescue_loop = Loop("rescue", self._rescue_round)
        self._cancel_loop = Loop("cancels", self._cancel_round)
        self._retention_loop = Loop("retention", self._retention_round)

    def refuse_in_fork(self) -> None:
        """Raises TaskflowError in a process that got all this by a fork: its loops and threads did not come along."""
        if os.getpid() != self._me.pid:
            raise TaskflowError("this process was forked from one that serves tasks: fork before the start, or spawn")

    def start(self) -> None:
        self._rescue_loop.start()
        if self._runs_tasks:
            self._cancel_loop.start()
        if self._retention_days is not None:
            self._retention_loop.start()

    async def stop(self) -> None:
        await self._rescue_loop.stop()
        await self._cancel_loop.stop()
        await self._retention_loop.stop()

    async def sign_off(self, deadline: float) -> None:
        await self.heartbeat.stop(deadline)

    async def _rescue_round(self) -> None:
        try:
            if not self.introduced.is_set():
                await self._introduce()
            await self._rescue()
        except BackendUnavailable:
            self._watch.restart()
            await asyncio.sleep(CANCEL_INTERVAL)
        else:
            await asyncio.sleep(self._look_interval)

    async def _introduce(self) -> None:
        """Nothing is claimed before the instance row is there: what an unknown instance runs could not be rescued."""
        await self._journal.ready()
        await asyncio.to_thread(self.heartbeat.beat)
        self.heartbeat.start()
        await self._journal.obey(DeclareQueues(self._queues))
        await self._rescue()
        if not self._requeue_pending:
            await self._drop_pending()
        if self._runs_tasks:
            self._dispatcher.start(self.heartbeat.holds)
            self._journal.wake()
        self.introduced.set()

    async def _rescue(self) -> None:
        dead = await self._dead()
        before = self.rescued
        for pulse in dead:
            rescued = await self._rescue_from(pulse)
            if not pulse.signed_off:
                self._lost(self._clock(), process_words(pulse.instance), rescued)
        if n := self.rescued - before:
            logger.warning("rescued %d tasks that %d lost instances left running", n, len(dead))

    async def _rescue_from(self, pulse: Pulse) -> int:
        """How many tasks it had left."""
        instance_id, rescued = pulse.instance.instance_id, 0
        while (answer := await self._journal.obey(Rescue({instance_id: pulse.stamp}))).changed:
            rescued += answer.changed
            self.rescued += answer.changed
        await asyncio.to_thread(self._backend.leave, instance_id, pulse.stamp)
        self._watch.forget([instance_id])
        return rescued

    async def _dead(self) -> Sequence[Pulse]:
        pulses = await self._others()
        gone = [pulse for pulse in pulses if is_gone(pulse.instance, self._me.machine)]
        return list({pulse.instance.instance_id: pulse for pulse in [*gone, *self._lapsed(pulses)]}.values())

    async def _others(self) -> Sequence[Pulse]:
        pulses = await asyncio.to_thread(self._backend.pulses)
        return [pulse for pulse in pulses if pulse.instance.instance_id != self._me.instance_id]

    async def _others_serve(self) -> bool:
        """Waits until it is known: the processes of this machine can be seen, one of another machine either beats or
        does not for a whole lease."""
        stamps: dict[str, int] = {}
        while others := await self._others():
            for other, stamp, _ in others:
                lives_here = other.machine == self._me.machine != "" and not is_gone(other, self._me.machine)
                if lives_here or stamps.setdefault(other.instance_id, stamp) != stamp:
                    return True
            await asyncio.sleep(self._look_interval)
            await self._rescue()
        return False

    def _lapsed(self, pulses: Sequence[Pulse]) -> Sequence[Pulse]:
        failures = self.heartbeat.failures
        if failures != self._failures or not self.heartbeat.regular:
            self._failures = failures
            self._watch.restart()
        return self._watch.look(pulses, monotonic())

    async def _cancel_round(self) -> None:
        await asyncio.sleep(CANCEL_INTERVAL)
        with contextlib.suppress(BackendUnavailable):
            if self._dispatcher.running:
                for attempt_id in await self._backend.cancels(self._me.instance_id):
                    self._dispatcher.cancel(attempt_id)
            if self._dispatcher.claiming and await self._store.is_drained(self._me.instance_id):
                self._dispatcher.retire()
                logger.info("told to drain: %d tasks run, no more are started", self._dispatcher.running)
                await asyncio.to_thread(self.heartbeat.beat)

    async def _drop_pending(self) -> None:
        """With `requeue_pending=False`: what an earlier run left waiting is cancelled, unless others serve it."""
        if await self._others_serve():
            return
        # Not what this process has accepted while it waited for its database.
        pending = TaskFilter(statuses=(TaskStatus.PENDING,), until=self._me.started - timedelta(microseconds=1))
        cursor: Cursor | None = None
        while True:
            page = await self._store.page(pending, cursor, 500)
            dropped = [task.task_id for task in page.tasks if task.run_key is None]  # a one-off is an appointment
            await asyncio.gather(*(self._journal.obey(Cancel(task_id, None)) for task_id in dropped))
            if (cursor := page.older) is None:
                return

    async def _retention_round(self) -> None:
        await asyncio.sleep(RETENTION_INTERVAL)
        with contextlib.suppress(BackendUnavailable):
            await self._store.prune(self._clock() - timedelta(days=self._retention_days or 0.0))
