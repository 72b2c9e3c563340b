"""What a task sees of its caller, and what it says: context variables, traces, log lines, progress."""

import asyncio
import contextvars
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from app.taskflow import ManagedBackgroundTasks, TaskManager, TaskStatus, get_task_context, task_log
from app.taskflow import context as context_module

from .conftest import StartManager
from .helpers import PATIENCE, eventually

pytestmark = pytest.mark.anyio

TRACE_ID, SPAN_ID = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
TRACEPARENT = f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"
tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


def seen() -> dict[str, Any]:
    """What the code that runs now can see of who called it."""
    context = get_task_context()
    return {
        "tenant": tenant.get(),
        "traceparent": context and context.traceparent,
        "trace": trace.get_current_span().get_span_context().trace_id,
    }


def define(manager: TaskManager) -> None:
    @manager.task
    async def look() -> dict[str, Any]:
        return seen()

    @manager.task
    def thread_look() -> dict[str, Any]:
        return seen()

    @manager.task(retries=2)
    async def look_again() -> dict[str, Any]:
        return again()

    @manager.task(retries=2)
    def thread_look_again() -> dict[str, Any]:
        return again()

    @manager.task(requeue_on_interrupt=True)
    async def look_after_restart() -> dict[str, Any]:
        context = get_task_context()
        assert context is not None
        if context.attempt == 0:
            await asyncio.sleep(3_600)
        return seen()


def again() -> dict[str, Any]:
    """At the third attempt, what is seen then; the earlier ones leave something of their own behind, and fail."""
    context = get_task_context()
    assert context is not None
    if context.attempt < 2:
        assert tenant.get() == "acme"
        tenant.set("left over from an earlier attempt")
        raise ConnectionError("not yet")
    return seen()


LOOKS = ["look", "thread_look", "look_again", "thread_look_again"]


def task(manager: TaskManager, name: str) -> Any:
    return manager.registry.named(name).function


@contextmanager
def calling_as(name: str) -> Iterator[None]:
    token = tenant.set(name)
    yield
    tenant.reset(token)


@contextmanager
def in_a_span() -> Iterator[None]:
    """As if a tracer had started one."""
    span = NonRecordingSpan(SpanContext(TRACE_ID, SPAN_ID, is_remote=False, trace_flags=TraceFlags(1)))
    with trace.use_span(span):
        yield


# -- context variables


@pytest.mark.parametrize("name", LOOKS)
async def test_context_variables_reach_every_attempt_of_a_task(start_manager: StartManager, name: str) -> None:
    manager = await start_manager(define)
    with calling_as("acme"):
        task_id = await manager.enqueue(task(manager, name))
    with calling_as("another caller"):
        assert (await manager.result(task_id, PATIENCE))["tenant"] == "acme"


async def test_tasks_of_different_callers_see_each_their_own(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    ids = {}
    for number in range(20):
        with calling_as(f"tenant {number}"):
            ids[f"tenant {number}"] = await manager.enqueue(task(manager, LOOKS[number % 2]))
    for name, task_id in ids.items():
        assert (await manager.result(task_id, PATIENCE))["tenant"] == name


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_context_variables_of_a_request_reach_its_tasks(tmp_path: Path, kind: str) -> None:
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    app = FastAPI()
    manager.init_app(app)
    found: list[str] = []

    @manager.task
    async def look() -> None:
        found.append(tenant.get())

    def route(name: str, tasks: Annotated[ManagedBackgroundTasks, Depends(manager.get_tasks)]) -> None:
        tenant.set(name)
        tasks.add_task(look)

    async def async_route(name: str, tasks: Annotated[ManagedBackgroundTasks, Depends(manager.get_tasks)]) -> None:
        route(name, tasks)

    app.post("/look")(route if kind == "def" else async_route)
    with TestClient(app) as client:
        for name in ("acme", "initech"):
            assert client.post("/look", params={"name": name}).status_code == 200
    assert sorted(found) == ["acme", "initech"]


def test_callers_contexts_are_kept_for_a_bounded_number_of_tasks_the_oldest_go_first() -> None:
    carried = context_module.CarriedContexts(most=3)
    for number in range(5):
        with calling_as(str(number)):
            carried.keep(f"task {number}")
    assert [carried.of(f"task {number}").get(tenant) for number in range(5)] == [None, None, "2", "3", "4"]
    carried.forget("task 3")
    assert carried.of("task 3").get(tenant) is None


# -- traces


@pytest.mark.parametrize("name", ["look", "thread_look"])
async def test_the_caller_s_span_is_stored_and_restored(start_manager: StartManager, name: str) -> None:
    manager = await start_manager(define)
    with in_a_span():
        task_id = await manager.enqueue(task(manager, name))
    found = await manager.result(task_id, PATIENCE)
    assert (found["traceparent"], found["trace"]) == (TRACEPARENT, TRACE_ID)


@pytest.mark.parametrize("name", ["look_again", "thread_look_again"])
async def test_a_retry_belongs_to_the_trace_of_the_first_caller(start_manager: StartManager, name: str) -> None:
    manager = await start_manager(define)
    with in_a_span(), calling_as("acme"):
        task_id = await manager.enqueue(task(manager, name))
    found = await manager.result(task_id, PATIENCE)
    assert (found["traceparent"], found["trace"]) == (TRACEPARENT, TRACE_ID)


async def test_another_instance_restores_the_trace_but_not_the_variables(start_manager: StartManager) -> None:
    accepts = await start_manager(define)
    await accepts.store.pause_queue("default")
    with in_a_span(), calling_as("acme"):
        ids = [await accepts.enqueue(task(accepts, name)) for name in ("look", "thread_look")]
    await accepts.shutdown()
    runs = await start_manager(define)
    await runs.store.resume_queue("default")
    for task_id in ids:
        assert await runs.result(task_id, PATIENCE) == {
            "tenant": "nobody",
            "traceparent": TRACEPARENT,
            "trace": TRACE_ID,
        }


async def test_a_task_that_recovers_after_a_restart_keeps_its_trace(start_manager: StartManager) -> None:
    first = await start_manager(define, shutdown_timeout=0.1)
    with in_a_span():
        task_id = await first.enqueue(task(first, "look_after_restart"))
    await eventually(lambda: first.dispatcher.running == 1)
    await first.shutdown()
    second = await start_manager(define)
    found = await second.result(task_id, PATIENCE)
    assert (found["traceparent"], found["trace"]) == (TRACEPARENT, TRACE_ID)


@pytest.mark.parametrize(
    ("header", "stored"),
    [
        (TRACEPARENT, TRACEPARENT),
        ("00-nonsense", None),
        (TRACEPARENT + "; DROP TABLE", None),
        (None, None),
    ],
)
def test_the_traceparent_header_of_a_request_is_carried_when_it_is_one(
    tmp_path: Path, header: str | None, stored: str | None
) -> None:
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    app = FastAPI()
    manager.init_app(app)
    found: list[Any] = []

    @manager.task
    def look() -> None:
        found.append(seen())

    @app.post("/look")
    def route(tasks: Annotated[ManagedBackgroundTasks, Depends(manager.get_tasks)]) -> None:
        tasks.add_task(look)

    with TestClient(app) as client:
        client.post("/look", headers={"traceparent": header} if header else {})
    assert found == [{"tenant": "nobody", "traceparent": stored, "trace": TRACE_ID if stored else 0}]


# -- words


async def test_levels_and_extras_are_stored_in_order_before_the_end(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task
    async def talk() -> None:
        task_log("plain")
        task_log("loud", level="warning", code=7, where=Path("here"))
        await asyncio.sleep(0.02)
        task_log("nested", level="error", data={"list": [1, None, "ü"]})

    @manager.task
    def thread_talk() -> None:
        for number in range(50):
            task_log(f"line {number}", number=number)

    talked = await manager.enqueue(talk)
    await manager.result(talked, PATIENCE)
    assert [(line.level, line.message, line.extra, line.attempt) for line in await manager.store.logs(talked)] == [
        ("info", "plain", {}, 0),
        ("warning", "loud", {"code": 7, "where": "here"}, 0),
        ("error", "nested", {"data": {"list": [1, None, "ü"]}}, 0),
    ]
    talked = await manager.enqueue(thread_talk)
    await manager.result(talked, PATIENCE)
    lines = await manager.store.logs(talked)
    assert [line.extra for line in lines] == [{"number": number} for number in range(50)]
    ended = (await manager.store.get(talked)).end_time
    assert ended is not None
    assert all(line.time <= ended for line in lines)


async def test_lines_are_there_while_the_task_still_runs(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task
    async def talk() -> None:
        task_log("begun")
        await asyncio.sleep(3_600)

    task_id = await manager.enqueue(talk)
    await eventually(lambda: first_lines(manager, task_id))
    assert (await manager.store.get(task_id)).status is TaskStatus.RUNNING
    await manager.store.cancel(task_id)


async def first_lines(manager: TaskManager, task_id: str) -> Sequence[Any]:
    return await manager.store.logs(task_id)


@pytest.mark.parametrize("name", ["chatty", "thread_chatty"])
async def test_an_attempt_stores_a_limited_number_of_lines_and_one_says_how_many_it_lost(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert context_module.MOST_LINES == 1_000
    monkeypatch.setattr(context_module, "MOST_LINES", 10)
    manager = await start_manager()

    def talk() -> None:
        context = get_task_context()
        assert context is not None
        for number in range(25 if context.attempt == 0 else 10):
            task_log(f"line {number}")
        if context.attempt == 0:
            raise ConnectionError("again")

    @manager.task(retries=1)
    async def chatty() -> None:
        talk()

    @manager.task(retries=1)
    def thread_chatty() -> None:
        talk()

    task_id = await manager.enqueue(task(manager, name))
    await manager.result(task_id, PATIENCE)
    lines = await manager.store.logs(task_id)
    assert [line.message for line in lines if line.attempt == 0] == [
        *(f"line {number}" for number in range(10)),
        "15 more log lines of this attempt were dropped: it may store 10",
    ]
    assert [line.message for line in lines if line.attempt == 1] == [f"line {number}" for number in range(10)]
    assert lines[10].level == "warning"


async def test_the_limit_holds_for_many_threads_of_one_attempt(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_module, "MOST_LINES", 50)
    manager = await start_manager()

    @manager.task
    def chatty() -> None:
        def talk(context: contextvars.Context) -> None:
            for _ in range(20):
                context.run(task_log, "line")

        threads = [threading.Thread(target=talk, args=[contextvars.copy_context()]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    task_id = await manager.enqueue(chatty)
    await manager.result(task_id, PATIENCE)
    lines = [line.message for line in await manager.store.logs(task_id)]
    assert lines[:50] == ["line"] * 50
    assert lines[50:] == ["110 more log lines of this attempt were dropped: it may store 50"]


async def test_a_line_that_is_far_too_long_is_cut(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task
    async def talk() -> None:
        task_log("x" * 1_000_000)

    task_id = await manager.enqueue(talk)
    await manager.result(task_id, PATIENCE)
    (line,) = await manager.store.logs(task_id)
    assert line.message == "x" * (context_module.LONGEST_LINE - 1) + "…"


@pytest.mark.parametrize("name", ["work", "thread_work"])
async def test_the_newest_progress_is_shown_while_the_task_runs_and_kept_afterwards(
    start_manager: StartManager, name: str
) -> None:
    manager = await start_manager()
    go = threading.Event()

    def begin() -> None:
        context = get_task_context()
        assert context is not None
        for done in range(100):
            context.progress(done, 100, "copying")

    def end() -> None:
        context = get_task_context()
        assert context is not None
        context.progress(100)

    @manager.task
    async def work() -> None:
        begin()
        while not go.is_set():
            await asyncio.sleep(0.01)
        end()

    @manager.task
    def thread_work() -> None:
        begin()
        go.wait(PATIENCE)
        end()

    task_id = await manager.enqueue(task(manager, name))
    newest = {"done": 99, "total": 100, "message": "copying"}
    await eventually(lambda: shows(manager, task_id, newest))
    go.set()
    await manager.result(task_id, PATIENCE)
    assert (await manager.store.get(task_id)).progress == {"done": 100}


async def shows(manager: TaskManager, task_id: str, progress: dict[str, Any]) -> bool:
    return (await manager.store.get(task_id)).progress == progress


async def test_a_task_knows_its_id_name_attempt_and_tags(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task(retries=1, tags={"team": "mail"})
    async def look() -> list[Any]:
        context = get_task_context()
        assert context is not None
        if context.attempt == 0:
            raise ConnectionError("again")
        return [context.task_id, context.func_name, context.attempt, dict(context.tags), context.cancelled]

    task_id = await manager.enqueue(look, tags={"order": "7"})
    found = await manager.result(task_id, PATIENCE)
    assert found == [task_id, "look", 1, {"team": "mail", "order": "7"}, False]


async def test_outside_a_task_there_is_no_context_and_words_go_nowhere(start_manager: StartManager) -> None:
    manager = await start_manager(define)
    assert get_task_context() is None
    task_log("to nobody", level="error", code=1)
    await manager.result(await manager.enqueue(task(manager, "look")), PATIENCE)
    assert get_task_context() is None
    assert await asyncio.to_thread(get_task_context) is None


def test_a_line_outside_a_task_goes_to_the_logger_at_its_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="taskflow"):
        task_log("50% done")
        task_log("careful", level="warning", left=3)
        task_log("odd", level="shout")
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [
        ("taskflow", "INFO", "50% done"),
        ("taskflow", "WARNING", "careful left=3"),
        ("taskflow", "INFO", "odd"),
    ]
