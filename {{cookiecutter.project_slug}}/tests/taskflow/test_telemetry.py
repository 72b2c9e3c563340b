"""Spans and numbers of tasks, read back from the real SDK; without it, and without the API, nothing changes."""

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.telemetry import TelemetryConfig
from fastapi.testclient import TestClient
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler
from opentelemetry.trace import SpanKind, StatusCode

from app.taskflow import CancelTask, ManagedBackgroundTasks, RetryLater, TaskManager, get_task_context

from . import process_tasks
from .conftest import StartManager
from .helpers import PATIENCE, eventually

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_providers")]

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


class Spans:
    """What an SDK that this process was given has seen."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        trace.set_tracer_provider(provider)

    def of(self, kind: SpanKind) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.kind is kind]

    async def processed(self, n: int) -> list[ReadableSpan]:
        """A finish may be on the disk before the span of a thread is exported."""
        await eventually(lambda: len(self.of(SpanKind.CONSUMER)) >= n)
        return self.of(SpanKind.CONSUMER)


class Numbers:
    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        metrics.set_meter_provider(MeterProvider([self.reader], shutdown_on_exit=False))

    def points(self, name: str) -> Sequence[Any]:
        data = self.reader.get_metrics_data()
        found = (
            [] if data is None else [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        )
        return [
            point
            for scope in found
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


def place(span: ReadableSpan) -> tuple[str, str]:
    """Its trace, and itself."""
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def above(span: ReadableSpan) -> tuple[str, str] | None:
    return None if span.parent is None else (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}")


def linked(span: ReadableSpan) -> list[tuple[str, str]]:
    return [(f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") for link in span.links]


def said(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {}).get(name)


def here() -> list[str]:
    context = trace.get_current_span().get_span_context()
    return [f"{context.trace_id:032x}", f"{context.span_id:016x}"]


# -- spans


def test_a_request_its_task_and_both_attempts_are_one_trace(tmp_path: Path) -> None:
    spans = Spans()
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    app = FastAPI()
    manager.init_app(app)
    traceparents: list[str | None] = []

    @manager.task(retries=1)
    async def welcome() -> None:
        context = get_task_context()
        assert context is not None
        traceparents.append(context.traceparent)
        if context.attempt == 0:
            raise ConnectionError("the text of an error may hold an address")

    @app.post("/signup")
    def signup(tasks: Annotated[ManagedBackgroundTasks, Depends(manager.get_tasks)]) -> str:
        return tasks.add_task(welcome)

    with TestClient(app) as client:
        task_id = client.post("/signup", headers={"traceparent": TRACEPARENT}).json()
        assert client.portal is not None
        client.portal.call(manager.result, task_id, PATIENCE)
    (request,) = spans.of(SpanKind.SERVER)
    (sent,) = spans.of(SpanKind.PRODUCER)
    first, second = spans.of(SpanKind.CONSUMER)
    assert above(request) == (TRACE_ID, SPAN_ID)
    assert above(sent) in [place(span) for span in spans.exporter.get_finished_spans() if span is not sent]
    assert place(sent)[0] == TRACE_ID
    assert sent.name == "send welcome"
    assert dict(sent.attributes or {}) == {
        "messaging.system": "taskflow",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "default",
        "messaging.message.id": task_id,
        "messaging.taskflow.task.name": "welcome",
        "messaging.taskflow.executor": "async",
    }
    for number, attempt in enumerate([first, second]):
        assert attempt.name == "process welcome"
        assert above(attempt) == place(sent)
        assert linked(attempt) == [place(sent)]
        assert said(attempt, "messaging.operation.type") == "process"
        assert said(attempt, "messaging.message.id") == task_id
        assert said(attempt, "messaging.taskflow.attempt") == number
    assert (first.status.status_code, second.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert said(first, "error.type") == "ConnectionError"
    assert said(second, "error.type") is None
    assert [said(span, "messaging.taskflow.outcome") for span in (first, second)] == ["retried", "success"]
    assert "address" not in first.to_json()
    assert traceparents == [f"00-{TRACE_ID}-{place(sent)[1]}-01"] * 2


@pytest.mark.parametrize("executor", ["async", "thread", "thread with a timeout", "process"])
async def test_what_a_task_does_is_below_its_attempt_in_every_executor(
    start_manager: StartManager, executor: str
) -> None:
    spans = Spans()
    manager = await start_manager(max_process_workers=1)
    kind, _, limited = executor.partition(" ")
    function = process_tasks.trace_below_async if kind == "async" else process_tasks.trace_below
    manager.task(executor=kind, name="look", timeout=60.0 if limited else None)(function)  # type: ignore[call-overload]
    found = await manager.result(await manager.enqueue(function), timeout=60)
    (attempt,) = await spans.processed(1)
    assert tuple(found) == place(attempt)
    assert said(attempt, "messaging.taskflow.executor") == kind
    (sent,) = spans.of(SpanKind.PRODUCER)
    assert above(attempt) == place(sent)
    assert above(sent) is None


async def test_an_error_in_a_worker_process_is_one_of_its_attempt(start_manager: StartManager) -> None:
    spans = Spans()
    manager = await start_manager(max_process_workers=1)
    manager.task(executor="process", name="fails")(process_tasks.fail)
    task_id = await manager.enqueue(process_tasks.fail, "api")
    await eventually(lambda: ended(manager, task_id), patience=60)
    (attempt,) = await spans.processed(1)
    assert attempt.status.status_code is StatusCode.ERROR
    assert said(attempt, "error.type") == f"{process_tasks.__name__}.ApiError"


async def ended(manager: TaskManager, task_id: str) -> bool:
    return (await manager.store.get(task_id)).status.terminal


async def test_how_an_attempt_ended_is_said_and_only_exceptions_are_errors(start_manager: StartManager) -> None:
    spans = Spans()
    manager = await start_manager(shutdown_timeout=0.1)

    @manager.task
    async def fails() -> None:
        raise LookupError("gone")

    @manager.task
    def fails_in_a_thread() -> None:
        raise LookupError("gone")

    @manager.task(timeout=0.01)
    async def hangs() -> None:
        await asyncio.sleep(3_600)

    @manager.task
    async def cancels() -> None:
        raise CancelTask("not needed")

    @manager.task
    async def comes_later() -> None:
        context = get_task_context()
        if context is not None and context.attempt == 0:
            raise RetryLater(0.0)

    @manager.task
    async def is_interrupted() -> None:
        await asyncio.sleep(3_600)

    tasks = [fails, fails_in_a_thread, hangs, cancels, comes_later, is_interrupted]
    ids = [await manager.enqueue(task) for task in tasks]
    for task_id in ids[:-1]:
        await eventually(lambda task_id=task_id: ended(manager, task_id))  # type: ignore[misc]
    await manager.shutdown()
    found = {
        (span.name, said(span, "messaging.taskflow.attempt")): (
            said(span, "messaging.taskflow.outcome"),
            span.status.status_code is StatusCode.ERROR,
            said(span, "error.type"),
        )
        for span in await spans.processed(7)
    }
    assert found == {
        ("process fails", 0): ("failed", True, "LookupError"),
        ("process fails_in_a_thread", 0): ("failed", True, "LookupError"),
        ("process hangs", 0): ("failed", True, "TimeoutError"),
        ("process cancels", 0): ("cancelled", False, None),
        ("process comes_later", 0): ("retried", False, None),
        ("process comes_later", 1): ("success", False, None),
        ("process is_interrupted", 0): ("interrupted", False, None),
    }


def test_the_header_of_a_request_that_is_no_span_is_the_parent_of_what_it_sends(tmp_path: Path) -> None:
    spans = Spans()
    manager = TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    app = FastAPI(telemetry=TelemetryConfig(tracing=False))
    manager.init_app(app)

    @manager.task
    async def nothing() -> None: ...

    @app.post("/")
    def route(tasks: Annotated[ManagedBackgroundTasks, Depends(manager.get_tasks)]) -> None:
        tasks.add_task(nothing)

    with TestClient(app) as client:
        client.post("/", headers={"traceparent": TRACEPARENT})
    (sent,) = spans.of(SpanKind.PRODUCER)
    assert above(sent) == (TRACE_ID, SPAN_ID)


async def test_another_instance_continues_the_trace(start_manager: StartManager) -> None:
    def define(manager: TaskManager) -> None:
        @manager.task
        async def look() -> list[str]:
            return here()

    spans = Spans()
    accepts = await start_manager(define)
    await accepts.store.pause_queue("default")
    task_id = await accepts.enqueue(accepts.registry.named("look").function)
    await accepts.shutdown()
    runs = await start_manager(define)
    await runs.store.resume_queue("default")
    found = await runs.result(task_id, PATIENCE)
    (attempt,) = await spans.processed(1)
    (sent,) = spans.of(SpanKind.PRODUCER)
    assert linked(attempt) == [place(sent)]
    assert tuple(found) == place(attempt)


async def test_a_task_that_a_task_adds_is_below_the_attempt_that_added_it(start_manager: StartManager) -> None:
    spans = Spans()
    manager = await start_manager()

    @manager.task
    async def second() -> None: ...

    @manager.task
    async def first() -> str:
        return await manager.enqueue(second)

    await manager.result(await manager.result(await manager.enqueue(first), PATIENCE), PATIENCE)
    attempts = {span.name: span for span in await spans.processed(2)}
    sent = {span.name: span for span in spans.of(SpanKind.PRODUCER)}
    assert above(sent["send second"]) == place(attempts["process first"])
    assert place(attempts["process second"])[0] == place(sent["send first"])[0]


async def test_a_tick_has_no_sender_and_begins_a_trace(start_manager: StartManager) -> None:
    def define(manager: TaskManager) -> None:
        @manager.schedule(every=3_600, run_on_startup=True)
        async def tick() -> None: ...

    spans = Spans()
    await start_manager(define)
    (attempt,) = await spans.processed(1)
    assert (above(attempt), linked(attempt)) == (None, [])
    assert spans.of(SpanKind.PRODUCER) == []


async def test_what_is_not_sampled_is_carried_on_as_not_sampled(start_manager: StartManager) -> None:
    spans = Spans(ALWAYS_OFF)
    manager = await start_manager()

    @manager.task
    async def look() -> str | None:
        context = get_task_context()
        return context.traceparent if context else None

    found = await manager.result(await manager.enqueue(look), PATIENCE)
    assert not trace.TraceFlags(int(found[-2:], 16)).sampled
    assert not spans.exporter.get_finished_spans()


@pytest.mark.parametrize("moment", ["on_start", "on_end"])
async def test_an_sdk_that_raises_costs_no_task_anything(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def raises(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("the processor is broken")

    processor = SpanProcessor()
    monkeypatch.setattr(processor, moment, raises)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    trace.set_tracer_provider(provider)
    manager = await start_manager()

    @manager.task
    async def answers() -> int:
        return 42

    @manager.task
    def answers_in_a_thread() -> int:
        return 42

    for task in (answers, answers_in_a_thread):
        assert await manager.result(await manager.enqueue(task), PATIENCE) == 42


async def test_without_an_sdk_the_caller_s_trace_is_the_task_s(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task
    async def look() -> list[Any]:
        context = get_task_context()
        return [context and context.traceparent, *here()]

    context = trace.SpanContext(int(TRACE_ID, 16), int(SPAN_ID, 16), is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        task_id = await manager.enqueue(look)
    assert await manager.result(task_id, PATIENCE) == [TRACEPARENT, TRACE_ID, SPAN_ID]
    assert await manager.result(await manager.enqueue(look), PATIENCE) == [None, "0" * 32, "0" * 16]


# -- numbers


def labels(point: Any, *names: str) -> tuple[Any, ...]:
    return tuple(point.attributes.get(name) for name in names)


async def test_attempts_are_counted_and_timed(start_manager: StartManager) -> None:
    numbers = Numbers()
    manager = await start_manager()

    @manager.task(retries=1)
    async def welcome() -> None:
        context = get_task_context()
        if context is not None and context.attempt == 0:
            raise ConnectionError("not yet")

    await manager.result(await manager.enqueue(welcome), PATIENCE)
    await eventually(lambda: len(numbers.points("messaging.taskflow.attempts")) == 2)
    (began,) = numbers.points("messaging.client.consumed.messages")
    assert began.value == 2
    assert dict(began.attributes) == {
        "messaging.system": "taskflow",
        "messaging.operation.name": "process",
        "messaging.destination.name": "default",
        "messaging.taskflow.task.name": "welcome",
    }
    outcome, error = "messaging.taskflow.outcome", "error.type"
    attempts = {labels(point, outcome): point.value for point in numbers.points("messaging.taskflow.attempts")}
    assert attempts == {("retried",): 1, ("success",): 1}
    ran = {labels(point, outcome, error): point for point in numbers.points("messaging.process.duration")}
    assert {key: point.count for key, point in ran.items()} == {("retried", "ConnectionError"): 1, ("success", None): 1}
    (waited,) = numbers.points("messaging.taskflow.wait.duration")
    assert isinstance(waited, HistogramDataPoint)
    assert waited.count == 2
    assert 0 <= waited.sum < PATIENCE
    assert waited.explicit_bounds[0] == 0.005


async def test_the_depth_of_queues_is_what_the_last_sample_saw(start_manager: StartManager) -> None:
    numbers = Numbers()
    manager = await start_manager()

    @manager.task
    async def nothing() -> None: ...

    await manager.store.pause_queue("default")
    for _ in range(3):
        await manager.enqueue(nothing)
    assert numbers.points("messaging.taskflow.queue.depth") == []
    await manager.recorder.sample()
    (depth,) = numbers.points("messaging.taskflow.queue.depth")
    assert (depth.value, labels(depth, "messaging.destination.name")) == (3, ("default",))


async def test_managers_of_one_process_add_up_and_one_that_stopped_is_not_heard(start_manager: StartManager) -> None:
    numbers = Numbers()
    managers = [await start_manager(snapshot_db=None) for _ in range(2)]
    for manager in managers:

        @manager.task
        async def nothing() -> None: ...

        await manager.result(await manager.enqueue(nothing), PATIENCE)
    await eventually(lambda: total(numbers, "messaging.taskflow.attempts") == 2)
    for manager in managers:
        await manager.recorder.sample()
        await manager.shutdown()
    assert numbers.points("messaging.taskflow.queue.depth") == []


def total(numbers: Numbers, name: str) -> int:
    return sum(point.value for point in numbers.points(name))


async def test_meters_are_looked_for_at_the_start(start_manager: StartManager) -> None:
    manager = await start_manager()
    before = len(manager.journal.listeners)
    numbers = Numbers()

    @manager.task
    async def nothing() -> None: ...

    await manager.result(await manager.enqueue(nothing), PATIENCE)
    assert numbers.points("messaging.taskflow.attempts") == []
    await manager.shutdown()
    await manager.startup()
    assert len(manager.journal.listeners) == before + 1
    await manager.result(await manager.enqueue(nothing), PATIENCE)
    await eventually(lambda: total(numbers, "messaging.taskflow.attempts") == 1)
    await manager.shutdown()
    assert len(manager.journal.listeners) == before


# -- without the API

BLIND = """
import asyncio, builtins, sys

asked = []
found = builtins.__import__

def blind(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if name.partition(".")[0] == "opentelemetry" and importer.partition(".")[0] == "app":
        asked.append(importer)
        raise ImportError(name)
    return found(name, globals, locals, fromlist, level)

builtins.__import__ = blind

from app.taskflow import TaskManager, get_task_context, telemetry

manager = TaskManager()

@manager.task
async def look():
    return get_task_context().traceparent

@manager.task
def look_in_a_thread():
    return get_task_context().traceparent

async def main():
    async with manager.lifespan():
        return [await manager.result(await manager.enqueue(task), 30) for task in (look, look_in_a_thread)]

print(asyncio.run(main()), asked, telemetry.trace, telemetry.metrics, telemetry.current_traceparent(sys.argv[1]))
"""
"""FastAPI imports the API for itself; to the task system it is not there."""


def test_without_the_api_tasks_run_and_one_module_alone_has_asked_for_it() -> None:
    command, project = [sys.executable, "-c", BLIND, TRACEPARENT], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split("\n")[0] == f"[None, None] ['app.taskflow.telemetry'] None None {TRACEPARENT}", done.stderr
