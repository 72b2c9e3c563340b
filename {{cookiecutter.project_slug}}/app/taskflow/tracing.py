"""The trace a task belongs to: W3C traceparent out of the caller, and into every attempt.

Owns the only contact with OpenTelemetry: when its API is installed, the caller's span is carried along and each attempt
is a span of its own; when it is not, the request's `traceparent` header is carried as it came.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext

try:
    from opentelemetry import propagate, trace
except ImportError:  # tracing is optional
    propagate = trace = None  # type: ignore[assignment]

TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""https://www.w3.org/TR/trace-context/#traceparent-header"""
UNTRACED = nullcontext()


def current_traceparent(header: str | None = None) -> str | None:
    """Of the span that is active here; else the header's, when it is one."""
    if propagate is not None and trace.get_current_span() is not trace.INVALID_SPAN:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        if "traceparent" in carrier:
            return carrier["traceparent"]
    return header if header is not None and TRACEPARENT.fullmatch(header) else None


def attempt_span(name: str, task_id: str, attempt: int, traceparent: str | None) -> AbstractContextManager[object]:
    """A span around one attempt, child of the caller's; nothing where nobody traces."""
    if trace is None or (traceparent is None and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)):
        return UNTRACED
    parent = propagate.extract({"traceparent": traceparent}) if traceparent else None
    attributes: dict[str, str | int] = {"task.id": task_id, "task.name": name, "task.attempt": attempt}
    return trace.get_tracer("taskflow").start_as_current_span(f"task {name}", parent, attributes=attributes)
