"""The single writer: collects what must be written and writes it, one transaction per turn.

Owns everything that waits to become durable: drafts, finishes, commands, log lines. One loop takes all of it into one
turn, writes it, and tells those who wait. While a turn is on its way to the disk the next one fills, so that under
load one commit carries hundreds of changes, and when idle a change is committed at once.

Three classes of write. *Accepts* and commands fail after `accept_timeout` when the database is away, and are then
never written. *Finishes* are retried for ever. *Log lines and progress* keep the newest and count the dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from time import monotonic
from typing import Any, Protocol

import uuid_utils

from .backends.base import (
    Answer,
    AttemptId,
    Backend,
    Command,
    Demand,
    Draft,
    Finish,
    LogLine,
    Progress,
    Turn,
    TurnResult,
)
from .context import TaskContext
from .errors import BackendUnavailable, OutcomeUnknown, QueueFullError, TaskflowError
from .loops import Loop, is_cancelled, pause_after, until
from .models import QueueState
from .texts import clean, fields_text

logger = logging.getLogger("taskflow")

ACCEPT_TIMEOUT = 2.0
REFUSE_INTERVAL = 0.1
"""Seconds between looks for callers whose time is up, while a turn takes longer than that."""
POLL_INTERVAL = 1.0
"""Seconds after which a turn looks for work that nobody announced."""
LONGEST_DOUBT = 30.0
"""Seconds, beyond its time, that somebody waits to hear whether a commit was made whose answer was lost."""
MOST_WAITING = 10_000
"""Drafts, and log lines, that wait for a turn; while the database stalls, more are refused, or push out the oldest."""
MOST_DRAFTS_PER_TURN = 1_000
QUIET_PASSES = 3
"""Passes of the event loop that bring nothing more, after which a turn begins. A request takes one or two of them."""
LONGEST_GATHERING = 0.01
"""Seconds after which a turn begins although every pass brings more."""
LINGER = 0.001
"""Seconds that a turn with nothing but finishes waits, while `SIBLINGS` or more tasks still run, for half of them."""
SIBLINGS = 5
"""The idea and the number are PostgreSQL's `commit_delay` and `commit_siblings`."""


class Worker(Protocol):
    """What starts tasks: it says what it can take, and is told what became of its last turn."""

    @property
    def running(self) -> int: ...

    def demand(self, finishes: Sequence[Finish]) -> Demand | None:
        """What it can start once these finishes are written: the turn that frees a slot also fills it."""

    def held(self) -> frozenset[AttemptId]: ...

    def turned(self, finishes: Sequence[Finish], result: TurnResult) -> None: ...


Listener = Callable[[Sequence[Finish], TurnResult], None]
LogListener = Callable[[Sequence[LogLine]], None]


@dataclass(slots=True, eq=False)
class Waiting:
    """Somebody who waits for a turn's commit. `deadline` is on the monotonic clock."""

    deadline: float
    drafts: Sequence[Draft] = ()
    command: Command | None = None
    done: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True)
class Batch:
    """What one turn carries; kept until the database has confirmed it."""

    logs: list[LogLine] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    turn_id: str = field(default_factory=lambda: str(uuid_utils.uuid7()))
    """Of the turn that carries it, however often that is tried."""

    @property
    def size(self) -> int:
        return len(self.finishes) + len(self.waiting) + len(self.logs) + len(self.progress)

    def parts(self) -> list[Batch]:
        """Smaller batches that make up this one: its kinds apart, or what is of one kind halved."""
        kinds = [Batch(logs=self.logs), Batch(progress=self.progress), Batch(waiting=self.waiting)]
        kinds = [batch for batch in [*kinds, Batch(finishes=self.finishes)] if batch.size]
        if len(kinds) > 1:
            return kinds
        middle = self.size // 2
        return [self._slice(slice(middle)), self._slice(slice(middle, None))]

    def _slice(self, part: slice) -> Batch:
        return Batch(self.logs[part], self.progress[part], self.waiting[part], self.finishes[part])


class Journal:
    def __init__(self, backend: Backend, *, clock: Callable[[], datetime]) -> None:
        self._backend = backend
        self._instance_id = ""
        self._clock = clock
        self._worker: Worker | None = None
        self._opened = False
        self._is_alone = False
        self._loop = Loop("journal", self._round)
        self._wake = asyncio.Event()
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0

        self._waiting: deque[Waiting] = deque()
        self._waiting_drafts = 0
        self._finishes: list[Finish] = []
        self._logs: deque[LogLine] = deque(maxlen=MOST_WAITING)
        self._progress: dict[AttemptId, Progress] = {}
        self._words = threading.Lock()

        self._turn_began = float("inf")
        """Monotonic time at which the turn now under way began; infinite between turns."""
        self._answered = asyncio.Event()
        self._failures = 0
        self._unsure = False
        """Whether tasks may have been claimed for this instance of which it was not told."""
        self._doubtful: Batch | None = None
        """What a turn carried that may have been made: nothing else is written before that is known."""
        self._suspects: deque[Batch] = deque()
        """Parts of a turn that failed because of what it carried, each to be tried alone."""
        self._more = False
        self._next_due: datetime | None = None
        self.queues: Mapping[str, QueueState] = {}
        """Queues that have limits, as the last turn left them."""
        self.last_turn: float | None = None
        """Monotonic time of the last turn that was committed; None before the first."""
        self.took: float | None = None
        """Seconds from its beginning to its end."""
        self.last_error: str | None = None
        self.listeners: list[Listener] = []
        """Called after each turn that changed something. Must not block and must not raise."""
        self.log_listeners: list[LogListener] = []
        """Called with the log lines that a turn stored, before `listeners`. Must not block and must not raise."""

    # -- lifecycle

    def attach(self, worker: Worker) -> None:
        self._worker = worker

    def start(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._event_loop = asyncio.get_running_loop()
        self._wake, self._answered = asyncio.Event(), asyncio.Event()
        self._thread = threading.get_ident()
        self._loop.start()

    @asynccontextmanager
    async def alone(self, name: str) -> AsyncIterator[None]:
        """Started for a moment, in a process that is no instance: `name` stands in the events for who wrote."""
        self._is_alone = True
        self.start(name)
        try:
            yield
        finally:
            await self.stop()
            self._is_alone = False

    async def ready(self) -> None:
        """Returns after the next committed turn: the backend is open and takes writes."""
        self.wake()
        await self._answered.wait()

    @property
    def backlog(self) -> int:
        """Drafts, commands, finishes and log lines that wait for a turn."""
        return self._waiting_drafts + len(self._waiting) + len(self._finishes) + len(self._logs)

    @property
    def _turning(self) -> bool:
        return self._turn_began < float("inf")

    async def turned(self, deadline: float) -> None:
        """Returns when no turn is under way, at the latest at the monotonic `deadline`."""
        await until(lambda: not self._turning, deadline)

    async def flush(self, deadline: float) -> None:
        """Writes what waits, until the monotonic `deadline`."""
        while monotonic() < deadline:
            if self._tries_again or self._finishes or self._waiting or self._logs:
                self.wake()
            elif not self._turning:
                return
            await asyncio.sleep(0.005)

    async def stop(self, deadline: float = 0.0) -> None:
        """Ends the loop after the turn under way, at the monotonic `deadline` in any case; whoever still waits is told
        so."""
        await self.turned(deadline)
        await self._loop.stop()
        self._event_loop = None
        for batch in [*self._suspects, *([self._doubtful] if self._doubtful else [])]:
            self._put_back(batch)
        self._suspects.clear()
        self._doubtful = None
        while self._waiting:
            settle(self._waiting.popleft(), BackendUnavailable("the service stopped"))
        if self._finishes:
            logger.error("stopped with %d results that the database did not take", len(self._finishes))
            self._finishes.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + max(0.1, deadline - monotonic())):
                await self._backend.close()
        self._opened, self.last_turn = False, None
        self._answered.clear()

    def wake(self) -> None:
        """Asks for a turn soon. Callable from any thread."""
        if threading.get_ident() == self._thread:
            self._wake.set()
        elif self._event_loop is not None and not self._wake.is_set():
            with contextlib.suppress(RuntimeError):  # a thread that outlived the event loop
                self._event_loop.call_soon_threadsafe(self._wake.set)

    @property
    def event_loop(self) -> asyncio.AbstractEventLoop | None:
        """The one on which this was started; None while it is not."""
        return self._event_loop

    # -- what callers bring

    async def accept(self, drafts: Sequence[Draft]) -> None:
        """Returns once the drafts are committed.

        Raises BackendUnavailable when they could not be in `ACCEPT_TIMEOUT` seconds: then they never will be.
        Raises QueueFullError when a queue refused one of them; the refused are stored as REJECTED.
        """
        if self._waiting_drafts >= MOST_WAITING and self._stalled:
            raise BackendUnavailable(f"{self._waiting_drafts} tasks wait to be stored, more are not taken")
        self._waiting_drafts += len(drafts)
        try:
            await self._submit(Waiting(monotonic() + ACCEPT_TIMEOUT, drafts=drafts))
        finally:
            self._waiting_drafts -= len(drafts)

    @property
    def _stalled(self) -> bool:
        """The database is away, or has been busy with one turn for too long. Otherwise callers wait their turn."""
        return bool(self._failures) or monotonic() - self._turn_began > ACCEPT_TIMEOUT

    async def obey(self, command: Command, drafts: Sequence[Draft] = ()) -> Answer:
        """What the command found and did, once that is committed, and with it the drafts that belong to it.

        Raises BackendUnavailable and QueueFullError like `accept`.
        """
        if self._event_loop is None:
            raise BackendUnavailable("the task manager was not started")
        answer = await self._submit(Waiting(monotonic() + ACCEPT_TIMEOUT, drafts, command))
        assert isinstance(answer, Answer)
        return answer

    async def _submit(self, waiting: Waiting) -> Any:
        if self._event_loop is None:
            raise BackendUnavailable(
                "the task manager was not started (in tests: `with TestClient(app) as client`; an app that is "
                "mounted in another is not started by it: call `task_manager.init_app(outer_app)` as well)"
            )
        if asyncio.get_running_loop() is not self._event_loop:  # its answer would never arrive here
            raise TaskflowError(
                "this is another event loop than the one on which the task manager was started: "
                "from a thread or a plain task call task_manager.enqueue_sync(...)"
            )
        self._waiting.append(waiting)
        self._wake.set()
        return await waiting.done

    def finish(self, finish: Finish) -> None:
        """Takes a result; `Worker.turned` says when it is written."""
        if finish.error is not None:  # words of user code: a lone surrogate would make the row unreadable
            stacktrace = finish.stacktrace and clean(finish.stacktrace)
            finish = finish._replace(error=clean(finish.error), stacktrace=stacktrace)
        self._finishes.append(finish)
        self._wake.set()

    def log(self, context: TaskContext, level: str, message: str, extra: Mapping[str, Any]) -> None:
        """From any thread. Kept in order, before the finish of its attempt."""
        line = LogLine(
            context.task_id,
            self._clock(),
            clean(level),
            context.attempt,
            clean(message),
            fields_text(extra),
            context.func_name,
            context.tags,
        )
        with self._words:
            self._logs.append(line)
        self.wake()

    def progress(self, context: TaskContext, value: Mapping[str, Any]) -> None:
        """From any thread. Only the newest word of each attempt waits."""
        item = Progress(context.task_id, context.attempt + 1, fields_text(value))
        with self._words:
            self._progress[item.attempt_id] = item
        self.wake()

    # -- the loop

    async def _round(self) -> None:
        await self._until_needed()
        await self._gather()
        await self._linger()
        self._expire()
        batch = self._collect()
        try:
            result = await self._answer(batch)
        except OutcomeUnknown as error:
            self._doubtful = batch
            self._away(error.reason)
            await self._pause()
        except BackendUnavailable as error:
            self._put_back(batch)
            self._away(error.reason)
            await self._pause()
        except Exception as error:
            self._isolate(batch, error)
            raise
        except asyncio.CancelledError:
            self._put_back(batch)
            if not is_cancelled():
                self._away("the turn was cancelled")
            raise
        else:
            self._written(batch, result)

    async def _answer(self, batch: Batch) -> TurnResult:
        """Of the turn, however long it takes. Meanwhile those who are not in it are refused when their time is up."""
        self._turn_began = monotonic()
        loop = asyncio.get_running_loop()
        late: asyncio.TimerHandle

        def refuse() -> None:
            nonlocal late
            self._expire()
            late = loop.call_later(REFUSE_INTERVAL, refuse)

        late = loop.call_later(ACCEPT_TIMEOUT, refuse)
        try:
            if not self._opened:
                await self._open()
            result = await asyncio.shield(self._backend.turn(self._turn(batch)))
            self.took = monotonic() - self._turn_began
            return result
        finally:
            late.cancel()
            self._turn_began = float("inf")

    async def _open(self) -> None:
        try:
            await self._backend.open()
        except TaskflowError as error:  # a newer schema, say: nothing can be stored until other code comes
            raise error if isinstance(error, BackendUnavailable) else BackendUnavailable(str(error)) from error
        self._opened = True
        if not self._is_alone:
            self._backend.listen(self.wake)

    async def _until_needed(self) -> None:
        if not (self._wake.is_set() or self._more or self._tries_again or self._waiting or self._finishes):
            try:
                async with asyncio.timeout(self._seconds_to_next_look()):
                    await self._wake.wait()
            except TimeoutError:
                pass
        self._wake.clear()

    @property
    def _tries_again(self) -> bool:
        return bool(self._suspects) or self._doubtful is not None

    async def _gather(self) -> None:
        """While the event loop is at work on requests that bring more, it is not robbed of the interpreter: one turn
        carries what they all bring. An idle loop passes in microseconds."""
        until, quiet, number = monotonic() + LONGEST_GATHERING, 0, self._brought
        while quiet < QUIET_PASSES and monotonic() < until:
            await asyncio.sleep(0)
            quiet = quiet + 1 if number == self._brought else 0
            number = self._brought

    @property
    def _brought(self) -> int:
        return len(self._waiting) + len(self._finishes)

    async def _linger(self) -> None:
        """Many short tasks end at almost the same time: one commit is cheaper than one for the first and one for the
        others. Half of them are enough: the others run while these are written."""
        if self._finishes and self._more_will_finish():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    while self._more_will_finish():
                        self._wake.clear()
                        await self._wake.wait()

    def _more_will_finish(self) -> bool:
        others = self._worker.running - len(self._finishes) if self._worker else 0
        return others >= max(SIBLINGS, len(self._finishes)) and not self._waiting

    def _seconds_to_next_look(self) -> float:
        if self._next_due is None:
            return POLL_INTERVAL
        return min(POLL_INTERVAL, max(0.0, (self._next_due - self._clock()).total_seconds()))

    def _expire(self) -> None:
        """Refuses those whose time is up, while the database does not answer. Those who are in the turn under way are
        not among them: nobody can say yet whether they are written."""
        now = monotonic()
        while self._stalled and self._waiting and self._waiting[0].deadline <= now:
            settle(self._waiting.popleft(), BackendUnavailable(self.last_error or "no answer"))
        for waiting in self._doubtful.waiting if self._doubtful else ():
            if waiting.deadline + LONGEST_DOUBT <= now:
                settle(waiting, BackendUnavailable("the answer to the commit was lost: it may have been made"))

    def _collect(self) -> Batch:
        if self._doubtful is not None:
            return self._doubtful
        if self._suspects:
            return self._suspects.popleft()
        finishes, self._finishes = self._finishes, []
        waiting: list[Waiting] = []
        drafts = 0
        while self._waiting and drafts < MOST_DRAFTS_PER_TURN:
            first = self._waiting.popleft()
            if not first.done.done():  # its caller gave up
                waiting.append(first)
                drafts += len(first.drafts)
        with self._words:
            logs, progress = list(self._logs), list(self._progress.values())
            self._logs.clear()
            self._progress.clear()
        return Batch(logs, progress, waiting, finishes)

    def _turn(self, batch: Batch) -> Turn:
        return Turn(
            now=self._clock(),
            instance=self._instance_id,
            finishes=batch.finishes,
            drafts=[draft for waiting in batch.waiting for draft in waiting.drafts],
            commands=[waiting.command for waiting in batch.waiting if waiting.command is not None],
            logs=batch.logs,
            progress=batch.progress,
            demand=self._worker.demand(batch.finishes) if self._worker else None,
            turn_id=batch.turn_id if batch.size else "",
            held=self._worker.held() if self._worker and self._unsure and batch is not self._doubtful else None,
        )

    def _written(self, batch: Batch, result: TurnResult) -> None:
        if self._failures:
            logger.warning("the task backend answers again after %d failed tries", self._failures)
        self._failures, self.last_error = 0, None
        self._unsure, self._doubtful = batch is self._doubtful, None
        self._more, self._next_due, self.queues = result.more, result.next_due, result.queues
        self.last_turn = monotonic()
        self._answered.set()
        answers = iter(result.answers)
        for waiting in batch.waiting:
            answer = next(answers) if waiting.command is not None else None
            settle(waiting, verdict(waiting.drafts, result) or answer)
        if self._worker is not None:
            self._worker.turned(batch.finishes, result)
        if batch.logs:
            for hears in self.log_listeners:
                hears(batch.logs)
        if result.left:
            self._backend.announce()
        if batch.size or result.claimed:
            for listener in self.listeners:
                listener(batch.finishes, result)

    def _put_back(self, batch: Batch) -> None:
        self._finishes[:0] = batch.finishes
        self._waiting.extendleft(reversed(batch.waiting))
        with self._words:
            self._logs = deque([*batch.logs, *self._logs], maxlen=MOST_WAITING)  # the newest stay
            self._progress = {item.attempt_id: item for item in batch.progress} | self._progress

    def _away(self, reason: str) -> None:
        if not self._failures:
            logger.error("the task backend is away (%s); results are kept and tried again", reason)
        self._failures += 1
        self._unsure, self._more = True, False
        self.last_error = reason

    def _isolate(self, batch: Batch, error: Exception) -> None:
        """One broken value must not hold up the others: the batch is tried again in parts, and what fails alone is
        given up."""
        self._away(f"{type(error).__name__}: {error}")
        if batch.size > 1:
            self._suspects.extendleft(reversed(batch.parts()))
        elif batch.waiting:
            settle(batch.waiting[0], error)
        else:  # a log line or a word of progress is dropped; a finish waits behind those that can be written
            self._finishes += [without_texts(finish) for finish in batch.finishes]

    async def _pause(self) -> None:
        """Before the next try. Whoever's time is up meanwhile is told so at once."""
        end = monotonic() + pause_after(self._failures)
        while (left := end - monotonic()) > 0:
            if self._waiting:
                left = min(left, max(0.0, self._waiting[0].deadline - monotonic()) + 0.001)
            await asyncio.sleep(left)
            self._expire()


def settle(waiting: Waiting, outcome: Answer | Exception | None) -> None:
    if waiting.done.done():  # its caller was cancelled
        return
    if isinstance(outcome, Exception):
        waiting.done.set_exception(outcome)
    else:
        waiting.done.set_result(outcome)


def verdict(drafts: Sequence[Draft], result: TurnResult) -> QueueFullError | None:
    """Those that were refused when they were added have told their caller already."""
    for draft in drafts:
        if draft.task_id in result.rejected and draft.rejected_by is None:
            return QueueFullError(draft.queue, result.rejected[draft.task_id])
    return None


def without_texts(finish: Finish) -> Finish:
    """What remains of a finish whose texts the database does not take: how it ended."""
    return finish._replace(result=None, error=finish.error and "(the error text could not be stored)", stacktrace=None)
