"""One attempt: whatever the function does becomes one finish, and nothing it can raise escapes."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from app.taskflow import CancelTask, RetryLater, TaskStatus, get_task_context, task_log
from app.taskflow import runner as runner_module
from app.taskflow.backends.base import Claimed, Finish
from app.taskflow.codec import LARGEST_RESULT, decode
from app.taskflow.executors import AsyncExecutor, Executor, ThreadExecutor
from app.taskflow.models import EventKind, TaskConfig
from app.taskflow.registry import TaskRegistry
from app.taskflow.retry import LONGEST_DELAY
from app.taskflow.runner import (
    LONGEST_ERROR,
    LONGEST_STACKTRACE,
    MOST_RETRY_LATER,
    Attempt,
    Cancelled,
    Failed,
    Interrupted,
    Outcome,
    Postponed,
    Runner,
    Succeeded,
    decide,
)

from .helpers import PATIENCE, START, Words, eventually

pytestmark = pytest.mark.anyio


def claimed(
    name: str = "job",
    *,
    attempt: int = 1,
    excused: int = 0,
    max_attempts: int = 1,
    requeue: bool = False,
    arguments: str = "[[],{}]",
) -> Claimed:
    return Claimed(
        task_id="the id",
        name=name,
        queue="default",
        executor="thread",
        attempt=attempt,
        excused=excused,
        max_attempts=max_attempts,
        started_at=START,
        arguments=arguments,
        tags={"colour": "red"},
        requeue=requeue,
        trace=None,
        created_at=START,
    )


class Stage:
    """A runner with the functions of one test."""

    def __init__(self) -> None:
        self.words = Words()
        self.registry = TaskRegistry()
        self.executors: dict[str, Executor] = {"async": AsyncExecutor(), "thread": ThreadExecutor()}
        self.runner = Runner(self.registry, self.executors, self.words, lambda: START + timedelta(seconds=1))

    def begin(self, function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Attempt, Awaitable[Finish]]:
        max_attempts = options.get("retries", 0) + 1
        definition = self.registry.add(function, TaskConfig(**options))
        task = claimed(definition.name, max_attempts=max_attempts, arguments=definition.encode(args, {}))
        attempt = self.runner.attempt(task)
        return attempt, asyncio.ensure_future(self.runner.run(attempt))

    async def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Finish:
        return await self.begin(function, *args, **options)[1]


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    for executor in stage.executors.values():
        executor.close()


# -- what an outcome leads to


@pytest.mark.parametrize(
    ("task", "config", "outcome", "kind", "status", "seconds", "excused"),
    [
        ({}, {}, Succeeded("1"), EventKind.SUCCEEDED, TaskStatus.SUCCESS, None, False),
        ({}, {}, Cancelled("stop"), EventKind.CANCELLED, TaskStatus.CANCELLED, None, False),
        ({"max_attempts": 9}, {}, Cancelled("stop"), EventKind.CANCELLED, TaskStatus.CANCELLED, None, False),
        ({}, {}, Interrupted(), EventKind.INTERRUPTED, TaskStatus.INTERRUPTED, None, True),
        ({"max_attempts": 9}, {}, Interrupted(), EventKind.INTERRUPTED, TaskStatus.INTERRUPTED, None, True),
        ({"requeue": True}, {}, Interrupted(), EventKind.RESCUED, TaskStatus.PENDING, 0, True),
        ({}, {}, Failed(ValueError()), EventKind.FAILED, TaskStatus.FAILED, None, False),
        ({"max_attempts": 2}, {"delay": 5}, Failed(ValueError()), EventKind.RETRYING, TaskStatus.PENDING, 5, False),
        (
            {"max_attempts": 3, "attempt": 2},
            {"delay": 5, "backoff": 3},
            Failed(ValueError()),
            EventKind.RETRYING,
            TaskStatus.PENDING,
            15,
            False,
        ),
        (
            {"max_attempts": 3, "attempt": 9, "excused": 7},
            {"delay": 5, "backoff": 3},
            Failed(ValueError()),
            EventKind.RETRYING,
            TaskStatus.PENDING,
            15,
            False,
        ),
        (
            {"max_attempts": 2, "attempt": 2},
            {"delay": 5},
            Failed(ValueError()),
            EventKind.FAILED,
            TaskStatus.FAILED,
            None,
            False,
        ),
        ({"max_attempts": 9}, {}, Failed(ValueError(), final=True), EventKind.FAILED, TaskStatus.FAILED, None, False),
        (
            {"max_attempts": 9},
            {"retry_on": (KeyError,)},
            Failed(ValueError()),
            EventKind.FAILED,
            TaskStatus.FAILED,
            None,
            False,
        ),
        ({}, {}, Postponed(30), EventKind.RETRYING, TaskStatus.PENDING, 30, True),
        ({}, {}, Postponed(1e18), EventKind.RETRYING, TaskStatus.PENDING, LONGEST_DELAY, True),
        ({"excused": MOST_RETRY_LATER - 1}, {}, Postponed(0), EventKind.RETRYING, TaskStatus.PENDING, 0, True),
        (
            {"excused": MOST_RETRY_LATER, "attempt": 1_001},
            {},
            Postponed(0),
            EventKind.FAILED,
            TaskStatus.FAILED,
            None,
            False,
        ),
    ],
)
def test_each_outcome_leads_to_its_transition(
    task: dict[str, Any],
    config: dict[str, Any],
    outcome: Outcome,
    kind: EventKind,
    status: TaskStatus,
    seconds: float | None,
    excused: bool,
) -> None:
    finish = decide(claimed(**task), TaskConfig(**config), outcome, START)
    assert (finish.kind, finish.status, finish.excused, finish.at) == (kind, status, excused, START)
    assert finish.run_at == (None if seconds is None else START + timedelta(seconds=seconds))


def test_a_retry_predicate_that_raises_ends_the_retries_and_is_noted() -> None:
    def predicate(error: BaseException) -> bool:
        raise KeyError("not thought of")

    finish = decide(
        claimed(max_attempts=5), TaskConfig(retries=4, retry_on=predicate), Failed(ValueError("the real error")), START
    )
    assert (finish.status, finish.error) == (TaskStatus.FAILED, "the real error")
    assert finish.stacktrace is not None
    assert "retry_on raised KeyError: 'not thought of'" in finish.stacktrace


@pytest.mark.parametrize("wait", [float("inf"), 1e300, float("nan"), "soon", 10**400])
def test_no_answer_of_a_retry_predicate_is_beyond_the_calendar(wait: Any) -> None:
    config = TaskConfig(retries=4, retry_on=lambda error: wait)
    finish = decide(claimed(max_attempts=5), config, Failed(ValueError("the real error")), START)
    assert finish.error == "the real error"
    assert finish.run_at is None or START <= finish.run_at <= START + timedelta(seconds=LONGEST_DELAY)


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan")])
def test_retry_later_takes_only_a_time_that_comes(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        RetryLater(seconds)


# -- what a function does


async def test_a_result_is_stored_with_its_types(stage: Stage) -> None:
    def job(day: datetime) -> tuple[datetime, set[int]]:
        return day, {1}

    finish = await stage.run(job, START)
    assert finish.status is TaskStatus.SUCCESS
    assert finish.result is not None
    assert decode(finish.result) == (START, {1})


async def test_a_function_without_result_stores_none(stage: Stage) -> None:
    async def job() -> None: ...

    finish = await stage.run(job)
    assert (finish.status, finish.result, finish.error) == (TaskStatus.SUCCESS, None, None)


@pytest.mark.parametrize(
    "result", [object(), "x" * (LARGEST_RESULT + 1), 10**5_000], ids=["object", "large", "huge int"]
)
async def test_a_result_that_cannot_be_kept_leaves_a_success_with_a_warning(stage: Stage, result: Any) -> None:
    def job() -> Any:
        return result

    finish = await stage.run(job)
    assert (finish.status, finish.result) == (TaskStatus.SUCCESS, None)
    ((level, message, _),) = stage.words.lines
    assert level == "warning"
    assert message.startswith("the result was not stored: ")


async def test_a_result_of_just_the_largest_size_is_kept(stage: Stage) -> None:
    def job() -> str:
        return "x" * (LARGEST_RESULT - 2)

    assert len((await stage.run(job)).result or "") == LARGEST_RESULT


async def test_a_failure_is_told_with_its_text_and_its_place(stage: Stage) -> None:
    def job() -> None:
        raise ValueError("no such address")

    finish = await stage.run(job)
    assert (finish.status, finish.error) == (TaskStatus.FAILED, "no such address")
    assert finish.stacktrace is not None
    assert "in job" in finish.stacktrace
    assert "ValueError: no such address" in finish.stacktrace


async def fail_later() -> None:
    raise LookupError("gone")


def fail_now() -> None:
    raise LookupError("gone")


@pytest.mark.parametrize("function", [fail_later, fail_now])
async def test_a_stacktrace_begins_with_the_task_s_own_code(stage: Stage, function: Callable[[], Any]) -> None:
    stacktrace = (await stage.run(function)).stacktrace or ""
    header, first, *_ = stacktrace.splitlines()
    assert header == "Traceback (most recent call last):"
    assert first.startswith(f'  File "{__file__}", line ')
    assert first.endswith(f", in {function.__name__}")


async def test_a_stacktrace_of_the_task_system_alone_is_kept_whole(stage: Stage) -> None:
    stage.registry.add(fail_now, TaskConfig())
    finish = await stage.runner.run(stage.runner.attempt(claimed("fail_now", arguments="no call")))
    assert finish.status is TaskStatus.FAILED
    assert "UnreadableCall" in (finish.stacktrace or "")
    assert "executors.py" in (finish.stacktrace or "")


def test_an_attempt_on_the_calling_thread_comes_to_the_same(stage: Stage) -> None:
    definition = stage.registry.add(fail_now, TaskConfig(retries=1, delay=5))
    attempt = stage.runner.attempt(claimed("fail_now", max_attempts=2))
    finish = stage.runner.run_here(attempt, definition, asyncio.new_event_loop())
    assert (finish.status, finish.error) == (TaskStatus.PENDING, "gone")
    assert finish.run_at == finish.at + timedelta(seconds=5)
    assert (finish.stacktrace or "").splitlines()[1].startswith(f'  File "{__file__}", line ')
    assert get_task_context() is None


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Wild(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


class Lying(SyntaxError):
    text = 5  # type: ignore[assignment]
    lineno = 3
    filename = "x"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError(), "ValueError"),
        (Mute("x"), "Mute"),
        (ValueError("x" * 1_000_000), "x" * LONGEST_ERROR),
        (ExceptionGroup("both", [ValueError("a"), KeyError("b")]), "both (2 sub-exceptions)"),
        (SystemExit(3), "3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), None),
        (asyncio.CancelledError(), "CancelledError"),
        (ValueError("nul \0 and \ud800"), "nul \N{REPLACEMENT CHARACTER} and ?"),
        (Wild(), None),
        (Lying("lies"), None),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_any_error_is_that_task_s_failure_and_fits_into_the_database(
    stage: Stage, error: BaseException, text: str | None, kind: str
) -> None:
    def job() -> None:
        raise error

    async def job_async() -> None:
        raise error

    finish = await stage.run(job if kind == "thread" else job_async)
    assert finish.status is TaskStatus.FAILED
    assert finish.error
    assert text is None or finish.error == text
    assert len(finish.error) <= LONGEST_ERROR
    assert finish.stacktrace
    assert len(finish.stacktrace) <= LONGEST_STACKTRACE
    (finish.error + finish.stacktrace).encode()
    assert "\0" not in finish.error + finish.stacktrace


async def test_endless_recursion_is_a_failure(stage: Stage) -> None:
    def job(depth: int = 0) -> None:
        job(depth + 1)

    finish = await stage.run(job)
    assert finish.status is TaskStatus.FAILED
    assert "recursion" in (finish.error or "")


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_the_signals_of_a_task_are_obeyed_in_every_executor(stage: Stage, kind: str) -> None:
    def later() -> None:
        raise RetryLater(90)

    async def later_async() -> None:
        raise RetryLater(90)

    def cancel() -> None:
        raise CancelTask("not needed any more")

    async def cancel_async() -> None:
        raise CancelTask("not needed any more")

    postponed = await stage.run(later if kind == "thread" else later_async)
    assert (postponed.status, postponed.run_at) == (TaskStatus.PENDING, START + timedelta(seconds=91))
    cancelled = await stage.run(cancel if kind == "thread" else cancel_async, retries=5)
    assert (cancelled.status, cancelled.error) == (TaskStatus.CANCELLED, "not needed any more")


async def test_a_function_that_is_gone_fails_its_task_without_retries(stage: Stage) -> None:
    finish = await stage.runner.run(stage.runner.attempt(claimed("of an older deploy", max_attempts=5)))
    assert finish.status is TaskStatus.FAILED
    assert "'of an older deploy'" in (finish.error or "")


@pytest.mark.parametrize(
    "arguments", ["", "not json", "[]", "{}", '[["text"],{}]', '[[],{"nobody":1}]', "[[[[[", "[" * 50_000]
)
async def test_arguments_that_cannot_be_read_fail_that_task_alone_and_are_not_retried(
    stage: Stage, arguments: str
) -> None:
    called = []

    def job(number: int) -> None:
        called.append(number)

    stage.registry.add(job, TaskConfig(retries=3))
    finish = await stage.runner.run(stage.runner.attempt(claimed(max_attempts=4, arguments=arguments)))
    assert finish.status is TaskStatus.FAILED
    assert finish.error
    assert called == []


# -- the context


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_a_task_sees_its_context_and_its_words_go_to_the_sink(stage: Stage, kind: str) -> None:
    def speak() -> str:
        context = get_task_context()
        assert context is not None
        task_log("hello", level="debug", user=7)
        context.progress(1, total=3, message="first")
        return f"{context.task_id} {context.func_name} {context.attempt} {context.tags} {context.cancelled}"

    async def speak_async() -> str:
        return speak()

    assert get_task_context() is None
    name = {"thread": "speak", "async": "speak_async"}[kind]
    finish = await stage.run(speak if kind == "thread" else speak_async)
    assert decode(finish.result or "") == f"the id {name} 0 {{'colour': 'red'}} False"
    assert stage.words.lines == [("debug", "hello", {"user": 7})]
    assert stage.words.progressed == [{"done": 1, "total": 3, "message": "first"}]
    assert get_task_context() is None


def test_outside_a_task_there_is_no_context_and_a_log_line_goes_nowhere() -> None:
    assert get_task_context() is None
    task_log("into the void")


# -- time is up


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_a_timeout_is_a_failed_attempt_that_the_policy_retries(stage: Stage, kind: str) -> None:
    release, saw = threading.Event(), threading.Event()

    def job() -> None:
        context = get_task_context()
        assert context is not None
        while not release.wait(0.01):
            if context.cancelled:
                saw.set()

    async def job_async() -> None:
        await asyncio.sleep(PATIENCE)

    finish = await stage.run(job if kind == "thread" else job_async, timeout=0.1, retries=1, delay=3)
    assert (finish.kind, finish.status) == (EventKind.RETRYING, TaskStatus.PENDING)
    assert finish.error == "timed out after 0.1 s"
    assert finish.run_at == START + timedelta(seconds=4)
    if kind == "thread":
        await eventually(saw.is_set)  # the thread is told, and looks for itself
    release.set()


async def test_a_timeout_error_of_the_function_s_own_keeps_its_words(stage: Stage) -> None:
    async def job() -> None:
        raise TimeoutError("the server took too long")

    assert (await stage.run(job, timeout=30)).error == "the server took too long"


async def test_a_coroutine_that_swallows_its_timeout_has_still_timed_out(stage: Stage) -> None:
    async def job() -> str:
        try:
            await asyncio.sleep(PATIENCE)
        except asyncio.CancelledError:
            return "saved what there was"
        return "slept"

    finish = await stage.run(job, timeout=0.05)
    assert (finish.status, finish.error, finish.result) == (TaskStatus.FAILED, "timed out after 0.05 s", None)


# -- asked to stop


@pytest.mark.parametrize(("by", "status"), [("operator", TaskStatus.CANCELLED), ("shutdown", TaskStatus.INTERRUPTED)])
async def test_an_attempt_that_was_asked_to_stop_ends_as_what_it_was_asked(
    stage: Stage, by: Any, status: TaskStatus
) -> None:
    begun = asyncio.Event()

    async def job() -> None:
        begun.set()
        await asyncio.sleep(PATIENCE)

    attempt, ending = stage.begin(job, retries=3)
    await begun.wait()
    attempt.stopped_by = by
    assert isinstance(ending, asyncio.Future)
    ending.cancel()
    finish = await ending
    assert finish.status is status


async def test_a_cancellation_that_nobody_asked_for_is_a_failure_and_not_a_loss(stage: Stage) -> None:
    async def job() -> None:
        inner = asyncio.ensure_future(asyncio.sleep(PATIENCE))
        inner.cancel()
        await inner

    finish = await stage.run(job)
    assert (finish.status, finish.error) == (TaskStatus.FAILED, "CancelledError")


def test_the_limits_are_below_what_a_page_can_show() -> None:
    assert runner_module.LONGEST_ERROR <= runner_module.LONGEST_STACKTRACE <= LARGEST_RESULT


def says_much() -> None:
    raise ValueError("x" * 100_000)


async def test_a_long_message_leaves_the_stacktrace_its_frames(stage: Stage) -> None:
    stage.registry.add(says_much, TaskConfig())
    finish = await stage.runner.run(stage.runner.attempt(claimed("says_much")))
    assert "in says_much" in (finish.stacktrace or "")
    assert "ValueError: xxx" in (finish.stacktrace or "")
    assert len(finish.stacktrace or "") < 10_000
