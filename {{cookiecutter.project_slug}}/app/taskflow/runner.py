"""One attempt: run the function, turn what happened into an outcome, decide what the task becomes.

Owns the passage from a claimed row to a finish. It writes nothing and starts nothing else; the dispatcher calls `run`
and brings the finish to the journal. User code runs here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from . import codec
from .backends.base import Claimed, Finish
from .cipher import Cipher, Place, PlainText
from .context import BoundedWords, TaskContext, TaskSink, current
from .dependencies import Injector
from .errors import CancelTask, RetryLater, UnreadableCall, signal_of, text_of, trace_text
from .executors import Call, Executor, carried, completed, done_on, is_a
from .failures import failure_of
from .models import EventKind, TaskConfig, TaskStatus
from .registry import TaskDefinition, TaskRegistry
from .retry import LONGEST_DELAY, seconds_until_retry
from .telemetry import attempt_span
from .texts import clean

LONGEST_ERROR = 4_000
LONGEST_STACKTRACE = 32_000
MOST_RETRY_LATER = 1_000
OURS = str(Path(__file__).parent) + os.sep
"""Where the code of the task system is, as its frames say."""
UNLIMITED = asyncio.Timeout(None)
"""Never entered, so it never expires."""


@dataclass(frozen=True, slots=True)
class Succeeded:
    result: str | None


@dataclass(frozen=True, slots=True)
class Failed:
    error: BaseException
    final: bool = False
    """True for what would fail the same way every time."""


@dataclass(frozen=True, slots=True)
class Postponed:
    seconds: float


@dataclass(frozen=True, slots=True)
class Cancelled:
    reason: str


@dataclass(frozen=True, slots=True)
class Interrupted: ...


Outcome = Succeeded | Failed | Postponed | Cancelled | Interrupted


@dataclass(slots=True, eq=False)
class Attempt:
    """One running attempt. `stopped_by` says who asked it to stop, if anybody did."""

    task: Claimed
    context: TaskContext
    words: BoundedWords
    stopped_by: Literal["operator", "shutdown"] | None = None
    closing: bool = False
    """True once its function has ended and its dependencies are being closed: nothing is left to be stopped."""

    def close(self) -> None:
        self.closing = True


class Runner:
    def __init__(
        self,
        registry: TaskRegistry,
        executors: Mapping[str, Executor],
        sink: TaskSink,
        clock: Callable[[], datetime],
        cipher: Cipher | None = None,
        injector: Injector | None = None,
    ) -> None:
        self._injector = injector or Injector()
        self.retries_wait = True
        """False in tests: a retry is due at once."""
        self._cipher = cipher or PlainText()
        self._registry = registry
        self._executors = executors
        self._sink = sink
        self._clock = clock

    def attempt(self, task: Claimed) -> Attempt:
        words = BoundedWords(self._sink)
        context = TaskContext(task.task_id, task.name, task.attempt - 1, task.tags, words, task.trace)
        return Attempt(task, context, words)

    async def run(self, attempt: Attempt) -> Finish:
        """Runs the attempt to its end and says what to write. Raises nothing."""
        task = attempt.task
        try:
            definition = self._registry.for_task(task.task_id, task.name) or self._registry.named(task.name)
            with attempt_span(task) as span:
                outcome = await self._outcome(attempt, definition)
                return span.ended(self.ended(attempt, definition.config, outcome))
        except BaseException as error:  # noqa: BLE001 - the net under user code: its objects may raise wherever we look
            return self.broken(attempt, error)

    def run_here(self, attempt: Attempt, definition: TaskDefinition, loop: asyncio.AbstractEventLoop) -> Finish:
        """The same on the calling thread, for a function that `needs_only_a_thread`; what it raises is for `broken`."""
        with attempt_span(attempt.task) as span:
            outcome = self._outcome_here(attempt, definition, loop)
            return span.ended(self.ended(attempt, definition.config, outcome))

    def ended(self, attempt: Attempt, config: TaskConfig, outcome: Outcome) -> Finish:
        """What to write of an attempt that came to this."""
        attempt.words.close(attempt.context)
        finish = decide(attempt.task, config, outcome, self._clock())
        if finish.run_at is not None and self._registry.is_here(finish.task.task_id):
            never = RuntimeError("only this process could run it again: decorate a function with @task_manager.task")
            finish = failed(attempt.task, never, None, finish.at)
        return finish if self.retries_wait or finish.run_at is None else finish._replace(run_at=finish.at)

    def broken(self, attempt: Attempt, error: BaseException) -> Finish:
        """What to write of an attempt that could not be started, or whose end could not be told: it failed, for good.

        Every attempt ends: one that did not would keep its slot, and its task would be RUNNING for ever.
        """
        return failed(attempt.task, error, None, self._clock())

    def given_back(self, attempt: Attempt) -> Finish:
        """What to write of an attempt that was claimed while its instance stopped, and did not begin."""
        now = self._clock()
        return Finish(attempt.task, EventKind.RETURNED, TaskStatus.PENDING, now, run_at=now, excused=True)

    def _outcome_here(self, attempt: Attempt, definition: TaskDefinition, loop: asyncio.AbstractEventLoop) -> Outcome:
        current.set(attempt.context)
        try:
            call = Call(definition, self._arguments(attempt.task), attempt.context)
            value = completed(call.bound()(), partial(done_on, loop))
        except BaseException as error:  # noqa: BLE001 - user code
            return outcome_of(carried(error), attempt)
        finally:
            current.set(None)
        return stopped(attempt) or Succeeded(self._stored(attempt, value))

    async def _outcome(self, attempt: Attempt, definition: TaskDefinition) -> Outcome:
        executor = self._executors[definition.executor]
        seconds = definition.config.timeout
        limit = UNLIMITED if seconds is None else asyncio.timeout(seconds)
        current.set(attempt.context)
        try:
            arguments = self._arguments(attempt.task)
            call = Call(definition, arguments, attempt.context, limit=None if seconds is None else limit)
            if definition.dependencies is not None:
                value = await self._inject(attempt, executor, call)
            elif seconds is None:
                value = await executor.run(call)
            else:
                async with limit:
                    value = await executor.run(call)
        except BaseException as error:  # noqa: BLE001 - user code, and CancelledError when the attempt is stopped
            if limit.expired() and is_a(error, TimeoutError):
                attempt.context.cancelled = True
                return stopped(attempt) or Failed(timed_out(definition.config))
            return outcome_of(error, attempt)
        finally:
            current.set(None)
        if limit.expired():  # the function swallowed its cancellation
            return stopped(attempt) or Failed(timed_out(definition.config))
        return stopped(attempt) or Succeeded(self._stored(attempt, value))

    def _arguments(self, task: Claimed) -> str:
        """As they were encoded. Raises UnreadableCall when they cannot be decrypted."""
        try:
            return self._cipher.open(task.arguments, Place(task.task_id, task.name, "arguments", task.created_at))
        except ValueError as error:
            raise UnreadableCall(task.name, error) from error

    async def _inject(self, attempt: Attempt, executor: Executor, call: Call) -> Any:
        """Runs the call with what its dependencies resolve to, and returns when they are closed."""
        assert call.definition.dependencies is not None
        return await self._injector.run(
            call.definition.dependencies,
            lambda injected: executor.run(call._replace(injected=injected)),
            call.limit or asyncio.timeout(None),
            attempt.close,
        )

    def _stored(self, attempt: Attempt, value: Any) -> str | None:
        try:
            text = codec.encode_result(value)
        except codec.CannotStore as error:
            self._sink.log(attempt.context, "warning", f"the result was not stored: {error}", {})
            return None
        task = attempt.task
        return text and self._cipher.seal(text, Place(task.task_id, task.name, "result", task.created_at))


def outcome_of(error: BaseException, attempt: Attempt) -> Outcome:
    """What an attempt came to that raised this."""
    match signal_of(error):
        case RetryLater(seconds=seconds):
            return Postponed(seconds)
        case CancelTask(reason=reason):
            return Cancelled(reason)
    if is_a(error, UnreadableCall):
        return Failed(error, final=True)
    return stopped(attempt) or Failed(error)


def timed_out(config: TaskConfig) -> TimeoutError:
    return TimeoutError(f"timed out after {config.timeout:g} s")


def stopped(attempt: Attempt) -> Outcome | None:
    """What an attempt becomes that ended after it was asked to stop."""
    match attempt.stopped_by:
        case "operator":
            return Cancelled("cancelled by an operator")
        case "shutdown":
            return Interrupted()
        case None:
            return None


def decide(task: Claimed, config: TaskConfig, outcome: Outcome, now: datetime) -> Finish:
    """The transition that an outcome leads to. Pure but for the jitter."""
    match outcome:
        case Succeeded(result):
            return Finish(task, EventKind.SUCCEEDED, TaskStatus.SUCCESS, now, result=result)
        case Cancelled(reason):
            return Finish(task, EventKind.CANCELLED, TaskStatus.CANCELLED, now, error=clean(reason[:LONGEST_ERROR]))
        case Interrupted() if task.requeue:
            return Finish(task, EventKind.RESCUED, TaskStatus.PENDING, now, run_at=now, excused=True)
        case Interrupted():
            reason = "the service stopped while it ran"
            return Finish(task, EventKind.INTERRUPTED, TaskStatus.INTERRUPTED, now, error=reason, excused=True)
        case Postponed(seconds) if task.excused < MOST_RETRY_LATER:
            run_at = now + timedelta(seconds=min(seconds, LONGEST_DELAY))
            return Finish(task, EventKind.RETRYING, TaskStatus.PENDING, now, run_at=run_at, excused=True)
        case Postponed():
            return failed(task, RuntimeError(f"asked to be retried later {MOST_RETRY_LATER} times"), None, now)
        case Failed(error, final):
            return failed(task, error, None if final else retry_time(task, config, error, now), now)


def retry_time(task: Claimed, config: TaskConfig, error: BaseException, now: datetime) -> datetime | None:
    if not task.attempts_left:
        return None
    try:
        seconds = seconds_until_retry(config, error, task.attempt - task.excused - 1)
    except BaseException as broken:  # noqa: BLE001 - the predicate is user code: what it could not judge is not retried
        with contextlib.suppress(BaseException):  # so is the error
            error.add_note(f"retry_on raised {type(broken).__name__}: {text_of(broken)}")
        return None
    return None if seconds is None else now + timedelta(seconds=seconds)


def failed(task: Claimed, error: BaseException, retry_at: datetime | None, now: datetime) -> Finish:
    retried = retry_at is not None
    text, stack = clean(text_of(error)[:LONGEST_ERROR]), clean(stack_of(error)[-LONGEST_STACKTRACE:])
    return Finish(
        task,
        EventKind.RETRYING if retried else EventKind.FAILED,
        TaskStatus.PENDING if retried else TaskStatus.FAILED,
        now,
        run_at=retry_at,
        error=text,
        stacktrace=stack,
        failure=None if retried else failure_of(task.name, text, stack),
    )


def stack_of(error: BaseException) -> str:
    """The traceback from the task's function on. How the task system got there tells its reader nothing, and takes as
    long to format as the rest."""
    return trace_text(error, without_ours)


def without_ours(frames: TracebackType | None) -> TracebackType | None:
    """What comes after the task system's own frames; all of them where nothing does."""
    rest = frames
    while rest is not None and rest.tb_frame.f_code.co_filename.startswith(OURS):
        rest = rest.tb_next
    return rest or frames
