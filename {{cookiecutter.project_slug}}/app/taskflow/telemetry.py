"""The trace a task belongs to, the spans of its sending and of its attempts, and their numbers, for OpenTelemetry.

Owns the only contact with OpenTelemetry, whose API is optional. The store asks what trace to keep with a task, the
runner puts each attempt into a span, the process executor takes it along, the manager starts the `Meters`. Names follow
the semantic conventions of messaging, https://opentelemetry.io/docs/specs/semconv/messaging/. The invariant: where no
SDK is configured no span is made and nothing is registered, and the caller's W3C trace reaches the task all the same.

An attempt links to the span that sent its task, which the conventions ask for, and is a child of it, which they allow
where one message is processed outside of any other span: a task and its retries stay in the trace of the request that
added it. The messages and tracebacks of errors may hold what users wrote; they stay in the database.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self, TypeVar

from .backends.base import Claimed, Finish, TurnResult
from .failures import error_class
from .models import EventKind

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # telemetry is optional
    context = metrics = trace = None  # type: ignore[assignment]

logger = logging.getLogger("taskflow")

T = TypeVar("T")
Facts = Mapping[str, str | int]
Listener = Callable[[Sequence[Finish], TurnResult], None]
Levels = Mapping[tuple[Any, str], Mapping[str, float]]
"""(kind, name) -> what was there when somebody looked: of the book."""

SCOPE = "taskflow"
SCHEMA = "https://opentelemetry.io/schemas/1.44.0"
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""https://www.w3.org/TR/trace-context/#traceparent-header"""
UNNAMED_ERROR = "_OTHER"
"""What the conventions call an error that has no class to name."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60, 300, 1_800, 3_600)
"""Bounds of the histograms: those of the conventions, and longer ones, because tasks may take longer than messages."""
OUTCOMES: Mapping[EventKind, str] = {
    EventKind.SUCCEEDED: "success",
    EventKind.FAILED: "failed",
    EventKind.RETRYING: "retried",
    EventKind.CANCELLED: "cancelled",
    EventKind.INTERRUPTED: "interrupted",
    EventKind.RESCUED: "interrupted",
}
"""What became of an attempt. One that was given back before it began is none."""


def facts(operation: str, queue: str, name: str) -> dict[str, str | int]:
    """What spans and numbers have in common. What the conventions have no name for is below `messaging.taskflow`."""
    return {
        "messaging.system": SCOPE,
        "messaging.operation.name": operation,
        "messaging.destination.name": queue,
        "messaging.taskflow.task.name": name,
    }


def error_of(finish: Finish) -> str | None:
    """The class of the exception that ended the attempt; None where none did."""
    if finish.stacktrace is None:
        return UNNAMED_ERROR if finish.kind is EventKind.FAILED else None
    return error_class(finish.stacktrace) or UNNAMED_ERROR


def safely(act: Callable[[], T], otherwise: T) -> T:
    """Processors and samplers of an SDK may raise: like an observer's, that is logged and costs no task anything."""
    try:
        return act()
    except Exception:
        logger.exception("OpenTelemetry failed")
        return otherwise


# -- the trace


def current_traceparent(header: str | None = None) -> str | None:
    """Of the span that is active here; else the header's, when it is one."""
    if trace is not None and (span := trace.get_current_span()) is not trace.INVALID_SPAN:
        found = traceparent_of(span)
        if found is not None:
            return found
    return header if header is not None and TRACEPARENT.fullmatch(header) else None


def traceparent_of(span: trace.Span) -> str | None:
    found = span.get_span_context()
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}" if found.is_valid else None


def remote(traceparent: str | None) -> context.Context:
    """A context with that span and nothing else."""
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})


# -- spans


def tracer_here() -> trace.Tracer | None:
    """None where nobody traces: there is no API, or no SDK behind it."""
    if trace is None:
        return None
    provider = trace.get_tracer_provider()
    if isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
        return None
    return tracer_of(provider)


@lru_cache(maxsize=1)
def tracer_of(provider: trace.TracerProvider) -> trace.Tracer:
    return provider.get_tracer(SCOPE, schema_url=SCHEMA)


def described(operation: str, queue: str, name: str, task_id: str, executor: str) -> dict[str, str | int]:
    found = facts(operation, queue, name)
    found["messaging.operation.type"] = operation
    found["messaging.message.id"] = task_id
    found["messaging.taskflow.executor"] = executor
    return found


def sent_traceparent(name: str, task_id: str, queue: str, executor: str, header: str | None = None) -> str | None:
    """What to store with a task that is being added: the trace context of a span which says so, or the caller's where
    nobody traces."""
    caller, tracer = current_traceparent(header), tracer_here()
    if tracer is None:
        return caller

    def send() -> str | None:
        here = trace.get_current_span().get_span_context().is_valid
        span = tracer.start_span(
            f"send {name}",
            None if here else remote(caller),
            kind=trace.SpanKind.PRODUCER,
            attributes=described("send", queue, name, task_id, executor),
        )
        span.end()
        return traceparent_of(span)

    return safely(send, None) or caller


class Untraced:
    """What an attempt runs in where nobody traces."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def ended(self, finish: Finish) -> Finish:
        """Hears how the attempt ended."""
        return finish


class Traced(Untraced):
    """A span that is the current one inside, and ends with it."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def __enter__(self) -> Self:
        self._token = context.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        context.detach(self._token)
        if kind is not None:
            self._failed(f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."))
        safely(self._span.end, None)

    def ended(self, finish: Finish) -> Finish:
        if self._span.is_recording():
            self._span.set_attribute("messaging.taskflow.outcome", OUTCOMES[finish.kind])
            if (error := error_of(finish)) is not None:
                self._failed(error)
        return finish

    def _failed(self, error: str) -> None:
        self._span.set_attribute("error.type", error)
        self._span.set_status(trace.StatusCode.ERROR)


UNTRACED = Untraced()


def attempt_span(task: Claimed) -> Untraced:
    """A span around one attempt, linked to and below the one that sent the task; without an SDK, the caller's."""
    tracer = tracer_here()
    return restored(task.trace) if tracer is None else safely(lambda: Traced(started(tracer, task)), UNTRACED)


def started(tracer: trace.Tracer, task: Claimed) -> trace.Span:
    sender = remote(task.trace)
    attributes = described("process", task.queue, task.name, task.task_id, task.executor)
    attributes["messaging.taskflow.attempt"] = task.attempt - 1
    links = [trace.Link(trace.get_current_span(sender).get_span_context())] if task.trace else []
    kind = trace.SpanKind.CONSUMER
    return tracer.start_span(f"process {task.name}", sender, kind=kind, attributes=attributes, links=links)


def restored(traceparent: str | None) -> Untraced:
    """The span of another process as the current one, so that what starts inside is below it."""
    if trace is None or traceparent is None:
        return UNTRACED
    return Traced(trace.get_current_span(remote(traceparent)))


# -- numbers


class Meters:
    """What one manager tells the meters: a listener of the journal, from its start until its stop."""

    def __init__(self, listeners: list[Listener], levels: Callable[[], Levels]) -> None:
        self._listeners = listeners
        self._levels = levels
        self._instruments: Instruments | None = None

    def start(self) -> None:
        """Registers nothing where no SDK is configured by now."""
        self._instruments = instruments_here()
        if self._instruments is not None:
            self._instruments.watched.append(self._levels)
            self._listeners.append(self._turned)

    def stop(self) -> None:
        if self._instruments is not None:
            self._instruments.watched.remove(self._levels)
            self._listeners.remove(self._turned)
            self._instruments = None

    def _turned(self, finishes: Sequence[Finish], result: TurnResult) -> None:
        assert self._instruments is not None
        safely(lambda: self._tell(finishes, result), None)

    def _tell(self, finishes: Sequence[Finish], result: TurnResult) -> None:
        assert self._instruments is not None
        self._instruments.ended([finish for finish in finishes if finish.task.attempt_id not in result.refused])
        self._instruments.began(result.claimed)


class Instruments:
    """Of one meter provider: it takes each name once, however many managers a process has."""

    def __init__(self, provider: metrics.MeterProvider) -> None:
        self.watched: list[Callable[[], Levels]] = []
        meter = provider.get_meter(SCOPE, schema_url=SCHEMA)
        self._began = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Attempts that began, in this process."
        )
        self._ended = meter.create_counter(
            "messaging.taskflow.attempts", "{attempt}", "Attempts that ended, by outcome, in this process."
        )
        self._ran = meter.create_histogram(
            "messaging.process.duration", "s", "How long attempts ran.", explicit_bucket_boundaries_advisory=SECONDS
        )
        self._waited = meter.create_histogram(
            "messaging.taskflow.wait.duration",
            "s",
            "From when an attempt could start to when it did.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        meter.create_observable_gauge(
            "messaging.taskflow.queue.depth",
            [self._depths],
            "{task}",
            "Tasks that waited to start at the last sample. The same from every instance.",
        )

    def began(self, claimed: Sequence[Claimed]) -> None:
        for task in claimed:
            since = task.due_at or task.created_at
            seconds = max(0.0, (task.started_at - since).total_seconds())
            self._waited.record(seconds, facts("process", task.queue, task.name))
        for (queue, name), n in Counter((task.queue, task.name) for task in claimed).items():
            self._began.add(n, facts("process", queue, name))

    def ended(self, finishes: Sequence[Finish]) -> None:
        counts: Counter[tuple[str, str, str]] = Counter()
        for finish in finishes:
            if (outcome := OUTCOMES.get(finish.kind)) is not None:
                task = finish.task
                counts[task.queue, task.name, outcome] += 1
                seconds = max(0.0, (finish.at - task.started_at).total_seconds())
                self._ran.record(seconds, ending(task.queue, task.name, outcome, error_of(finish)))
        for key, n in counts.items():
            self._ended.add(n, ending(*key))

    def _depths(self, _options: object) -> Iterator[metrics.Observation]:
        """Called from the thread of whoever collects."""
        for levels in tuple(self.watched):
            for (kind, queue), level in levels().items():
                if kind == "queue":
                    attributes = {"messaging.system": SCOPE, "messaging.destination.name": queue}
                    yield metrics.Observation(level.get("pending", 0), attributes)


def ending(queue: str, name: str, outcome: str, error: str | None = None) -> Facts:
    found = facts("process", queue, name)
    found["messaging.taskflow.outcome"] = outcome
    if error is not None:
        found["error.type"] = error
    return found


def instruments_here() -> Instruments | None:
    """None where nobody collects: there is no API, or no SDK behind it."""
    if metrics is None:
        return None
    provider = metrics.get_meter_provider()
    if isinstance(provider, metrics.NoOpMeterProvider) or type(provider).__name__ == "_ProxyMeterProvider":
        return None
    return instruments_of(provider)


@lru_cache(maxsize=1)
def instruments_of(provider: metrics.MeterProvider) -> Instruments:
    return Instruments(provider)
