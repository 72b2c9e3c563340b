"""Who is told what tasks did: the events, the port for observers, and the chain that feeds them.

Owns one bounded queue and one loop for each observer. The journal calls the chain after a committed turn; the chain
puts events in the queues and returns. The invariant: an observer that is slow, raises or hangs costs nobody but itself.

Any object with some of `TaskObserver`'s methods is an observer. Its coroutines share the event loop with everything
else, so a blocking call in them belongs in a thread; a plain method is run in one.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from time import monotonic
from typing import Any

from .backends.base import Claimed, Finish, LogLine, Moved, TurnResult
from .errors import TaskDefinitionError
from .loops import Loop, is_cancelled
from .models import TaskStatus

logger = logging.getLogger("taskflow")

LEVELS: Mapping[str, int] = {"debug": 0, "info": 1, "warning": 2, "error": 3, "critical": 4}
"""A level that is not listed counts as info."""
MOST_WAITING = 10_000
"""Events that wait for one observer; more push out the oldest, which are counted."""
BATCH = 200
"""Events that are delivered before `flush`, and before the rest of the service gets its turn."""
PATIENCE = 30.0
"""Seconds that one call of an observer may take before it is cancelled."""
LAST_WORDS = 2.0
"""Seconds that a stopping service gives its observers for what waits, and as many again to close."""
FEWEST_WORDS = 0.25
"""The same where its time to stop is over."""
SAY_EVERY = 60.0
"""Seconds between two lines about the same trouble of one observer."""


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One `task_log` line, stored. `attempt` counts from 0."""

    task_id: str
    func_name: str
    message: str
    level: str
    timestamp: datetime
    attempt: int
    tags: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LifecycleEvent:
    """One change of status, stored: RUNNING when an attempt starts, PENDING when another will follow, or how it ended.

    `attempt` counts from 0. `duration` is seconds since the attempt started; None when it starts, or never did.
    """

    task_id: str
    func_name: str
    status: TaskStatus
    timestamp: datetime
    attempt: int
    retries_used: int
    duration: float | None = None
    error: str | None = None
    stacktrace: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


Event = LogEvent | LifecycleEvent
Hook = Callable[..., Awaitable[object]]


class TaskObserver:
    """Does nothing with what it is told; override what you want to hear. Every method may be slow, and may fail."""

    min_level: str = "info"
    """Log lines below it are not delivered."""
    log_lifecycle: bool = True
    """False: changes of status are not delivered."""

    def __init__(self, min_level: str = "info") -> None:
        self.min_level = checked_level(min_level)

    async def startup(self) -> None:
        """Called before the first event."""

    async def on_log(self, event: LogEvent) -> None: ...

    async def on_lifecycle(self, event: LifecycleEvent) -> None: ...

    async def flush(self) -> None:
        """Called when all that waited was delivered, and after `BATCH` events: the place to send them together."""

    async def close(self) -> None:
        """Called after the last event."""


def checked_level(level: str) -> str:
    if level not in LEVELS:
        raise TaskDefinitionError(f"min_level={level!r}: must be one of {', '.join(LEVELS)}")
    return level


def rank(level: str) -> int:
    return LEVELS.get(level, LEVELS["info"])


class ObserverChain:
    """All observers of one manager. Without any it is never called."""

    def __init__(self, observers: Iterable[object]) -> None:
        self._channels = [Channel(observer) for observer in observers]
        self._readers = [channel for channel in self._channels if channel.reads_logs]
        self._watchers = [channel for channel in self._channels if channel.watches_lifecycle]
        self._lowest = min((channel.lowest for channel in self._readers), default=0)

    def __bool__(self) -> bool:
        return bool(self._channels)

    def start(self) -> None:
        for channel in self._channels:
            channel.start()

    async def delivered(self) -> None:
        """Returns when every observer was told all that was offered so far."""
        for channel in self._channels:
            await channel.delivered()

    async def stop(self, deadline: float) -> None:
        """Delivers what waits and closes the observers; those that do not end in time are left behind."""
        if not self._channels:
            return
        patience = min(LAST_WORDS, max(FEWEST_WORDS, deadline - monotonic()))
        ends = [asyncio.create_task(channel.stop(patience)) for channel in self._channels]
        _, late = await asyncio.wait(ends, timeout=2 * patience + FEWEST_WORDS)
        for end in late:
            end.cancel()
        if late:
            logger.error("%d observers could not be stopped: left behind", len(late))

    # -- what the journal tells

    def logged(self, lines: Sequence[LogLine]) -> None:
        if not self._readers:
            return
        for line in lines:
            level = rank(line.level)
            if level >= self._lowest:
                event = log_event(line)
                for channel in self._readers:
                    if level >= channel.lowest:
                        channel.offer(event)

    def turned(self, finishes: Sequence[Finish], result: TurnResult) -> None:
        if self._watchers:
            for event in lifecycle_events(finishes, result):
                for channel in self._watchers:
                    channel.offer(event)


class Channel:
    """One observer with its queue and its loop."""

    def __init__(self, observer: object) -> None:
        """Raises TaskDefinitionError for an object that observes nothing, and for a level that does not exist."""
        self.name = type(observer).__name__
        in_order = InOrder()
        self._hooks = {
            name: hook
            for name in ("startup", "on_log", "on_lifecycle", "flush", "close")
            if (hook := hook_of(observer, name, in_order)) is not None
        }
        if not self._hooks.keys() & {"on_log", "on_lifecycle"}:
            raise TaskDefinitionError(f"loggers: {observer!r} has neither on_log nor on_lifecycle")
        self.reads_logs = "on_log" in self._hooks
        self.watches_lifecycle = "on_lifecycle" in self._hooks and getattr(observer, "log_lifecycle", True)
        self.lowest = LEVELS[checked_level(getattr(observer, "min_level", "debug"))]
        self._events: deque[Event] = deque()
        self._loop = Loop(f"observer {self.name}", self._round)
        self._wake, self._idle = asyncio.Event(), asyncio.Event()
        self._started = self._stopping = False
        self._dropped, self._failed = Tally(), Tally()

    def start(self) -> None:
        self._started = self._stopping = False
        self._wake, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._loop.start()

    def offer(self, event: Event) -> None:
        """Never waits: what an observer cannot keep up with pushes out its oldest."""
        if len(self._events) >= MOST_WAITING:
            self._events.popleft()
            if self._dropped.add():
                logger.warning("observer %s does not keep up: %d events dropped", self.name, self._dropped.total)
        self._events.append(event)
        self._idle.clear()
        self._wake.set()

    async def delivered(self) -> None:
        await self._idle.wait()

    async def stop(self, patience: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self.delivered()
        self._stopping = True
        await self._loop.stop()
        self._say_what_was_lost()
        await self._call("close", patience=patience)

    async def _round(self) -> None:
        if not self._started:
            self._started = True
            await self._call("startup")
        await self._wake.wait()
        self._wake.clear()
        for _ in range(min(BATCH, len(self._events))):
            event = self._events.popleft()
            await self._call("on_log" if isinstance(event, LogEvent) else "on_lifecycle", event)
        await self._call("flush")
        if self._events:
            self._wake.set()
        else:
            self._idle.set()
        await asyncio.sleep(0)  # an observer that never waits must not keep the event loop to itself

    async def _call(self, name: str, *args: object, patience: float | None = None) -> None:
        hook = self._hooks.get(name)
        if hook is None:
            return
        seconds = PATIENCE if patience is None else patience
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                await hook(*args)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            self._report(name, error)  # the observer's own: it must not end this loop
        except BaseException as error:  # noqa: BLE001 - around an observer: its failure is its own, an exit too
            self._report(name, TimeoutError(f"did not end within {seconds:g} s") if limit.expired() else error)
        if self._stopping and is_cancelled():  # the observer swallowed the end of its loop
            raise asyncio.CancelledError

    def _report(self, name: str, error: BaseException) -> None:
        if self._failed.add():
            logger.error(
                "observer %s: %s raised %s (%d failures so far); tasks are not affected",
                self.name,
                name,
                type(error).__name__,
                self._failed.total,
                exc_info=error,
            )

    def _say_what_was_lost(self) -> None:
        if self._events:
            logger.warning("observer %s: stopped before %d events were delivered", self.name, len(self._events))
            self._events.clear()
        if self._dropped.unsaid:
            logger.warning("observer %s did not keep up: %d events dropped", self.name, self._dropped.total)
        if self._failed.unsaid:
            logger.warning("observer %s: %d failures", self.name, self._failed.total)


class Tally:
    """Counts a trouble, and says when it is worth a line: the first time, then once in a while."""

    def __init__(self) -> None:
        self.total = 0
        self.unsaid = False
        self._next = 0.0

    def add(self) -> bool:
        self.total += 1
        now = monotonic()
        self.unsaid = now < self._next
        if not self.unsaid:
            self._next = now + SAY_EVERY
        return not self.unsaid


class InOrder:
    """Runs blocking calls in daemon threads, one after the other.

    One that hangs holds up the ones behind it, and neither the event loop nor the interpreter's exit.
    """

    def __init__(self) -> None:
        self._last: asyncio.Future[tuple[object, BaseException | None]] | None = None

    async def run(self, function: Callable[..., object], *args: object) -> object:
        loop = asyncio.get_running_loop()
        while self._last is not None and self._last.get_loop() is loop and not self._last.done():
            await asyncio.shield(self._last)
        self._last = loop.create_future()
        work = partial(run_and_tell, loop, self._last, function, *args)
        threading.Thread(target=work, name="taskflow-observer", daemon=True).start()
        value, error = await asyncio.shield(self._last)
        if error is not None:
            raise error
        return value


def run_and_tell(
    loop: asyncio.AbstractEventLoop,
    done: asyncio.Future[tuple[object, BaseException | None]],
    function: Callable[..., object],
    *args: object,
) -> None:
    value, failure = None, None
    try:
        value = function(*args)
    except BaseException as error:  # noqa: BLE001 - around an observer: raised where it is awaited
        failure = error
    with contextlib.suppress(RuntimeError):  # the event loop is gone, and who waited with it
        loop.call_soon_threadsafe(done.set_result, (value, failure))


def hook_of(observer: object, name: str, in_order: InOrder) -> Hook | None:
    """The observer's method as a coroutine function; None where it has none, or only the base's empty one."""
    method = getattr(observer, name, None)
    if method is None or getattr(type(observer), name, None) is getattr(TaskObserver, name):
        return None
    if inspect.iscoroutinefunction(method):
        return method  # type: ignore[no-any-return]

    async def beside(*args: object) -> None:
        value = await in_order.run(method, *args)
        if inspect.isawaitable(value):
            await value

    return beside


def log_event(line: LogLine) -> LogEvent:
    return LogEvent(
        task_id=line.task_id,
        func_name=line.func_name,
        message=line.message,
        level=line.level,
        timestamp=line.at,
        attempt=line.attempt,
        tags=line.tags,
        extra=json.loads(line.extra),
    )


def lifecycle_events(finishes: Sequence[Finish], result: TurnResult) -> Iterable[LifecycleEvent]:
    """What one committed turn changed, in the order in which it wrote it."""
    for finish in finishes:
        if finish.task.attempt_id not in result.refused:
            yield finished(finish, withdrawn=finish.task.attempt_id in result.withdrawn)
    for change in result.moved:
        yield moved(change)
    for task in result.claimed:
        yield started(task)


def finished(finish: Finish, *, withdrawn: bool) -> LifecycleEvent:
    task = finish.task
    return LifecycleEvent(
        task_id=task.task_id,
        func_name=task.name,
        status=TaskStatus.CANCELLED if withdrawn else finish.status,
        timestamp=finish.at,
        attempt=task.attempt - 1,
        retries_used=retries_used(task.attempt, task.excused + finish.excused),
        duration=seconds_between(task.started_at, finish.at),
        error=finish.error,
        stacktrace=finish.stacktrace,
        tags=task.tags,
    )


def moved(change: Moved) -> LifecycleEvent:
    return LifecycleEvent(
        task_id=change.task_id,
        func_name=change.name,
        status=change.status,
        timestamp=change.at,
        attempt=max(0, change.attempt - 1),
        retries_used=retries_used(change.attempt, change.excused),
        duration=seconds_between(change.started_at, change.at),
        error=change.error,
        tags=change.tags,
    )


def started(task: Claimed) -> LifecycleEvent:
    return LifecycleEvent(
        task_id=task.task_id,
        func_name=task.name,
        status=TaskStatus.RUNNING,
        timestamp=task.started_at,
        attempt=task.attempt - 1,
        retries_used=retries_used(task.attempt, task.excused),
        tags=task.tags,
    )


def retries_used(attempt: int, excused: int) -> int:
    return max(0, attempt - excused - 1)


def seconds_between(start: datetime | None, end: datetime) -> float | None:
    return None if start is None else max(0.0, (end - start).total_seconds())
