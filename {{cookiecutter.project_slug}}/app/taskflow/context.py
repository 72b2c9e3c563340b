"""What a running task can see and say: its context, its log lines, its progress, and whether it should stop.

Owns the context variable that the runner sets around user code. `task_log` and `progress` hand their values to a sink
and return; they work from coroutines and from threads alike, and do nothing outside a task.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Mapping
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, Protocol

from .texts import amount, cut, level_name, readable

logger = logging.getLogger("taskflow")

MOST_LINES = 1_000
"""Log lines that one attempt may store; one more says how many it lost."""
LONGEST_LINE = 10_000
"""Characters of a log line that are stored."""


class TaskSink(Protocol):
    """Where a task's words go: the journal's bounded queue."""

    def log(self, context: TaskContext, level: str, message: str, extra: Mapping[str, Any]) -> None: ...

    def progress(self, context: TaskContext, value: Mapping[str, Any]) -> None: ...


@dataclass(slots=True, eq=False)
class TaskContext:
    """One attempt of one task, as its function sees it. `attempt` counts from 0."""

    task_id: str
    func_name: str
    attempt: int
    tags: Mapping[str, str]
    sink: TaskSink = field(repr=False)
    traceparent: str | None = None
    """W3C trace context of whoever added the task."""
    cancelled: bool = False
    """True once somebody asked this task to stop, its time is up, or the service shuts down. A thread looks at it."""

    def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Says how far the task is; the newest word is kept and shown."""
        value: dict[str, Any] = {"done": amount(done)}
        if total is not None:
            value["total"] = amount(total)
        if message is not None:
            value["message"] = readable(message)
        self.sink.progress(self, value)


class BoundedWords:
    """The sink of one attempt: passes on what it may store, and at the end says how much more there was.

    Called from any thread; a counter of `itertools` gives each line its number without a lock.
    """

    def __init__(self, sink: TaskSink) -> None:
        self._sink = sink
        self._lines = itertools.count()

    def log(self, context: TaskContext, level: str, message: str, extra: Mapping[str, Any]) -> None:
        if next(self._lines) < MOST_LINES:
            self._sink.log(context, level, cut(message, LONGEST_LINE), extra)

    def progress(self, context: TaskContext, value: Mapping[str, Any]) -> None:
        self._sink.progress(context, value)

    def close(self, context: TaskContext) -> None:
        dropped = next(self._lines) - MOST_LINES
        if dropped > 0:
            words = f"{dropped} more log lines of this attempt were dropped: it may store {MOST_LINES:,}"
            self._sink.log(context, "warning", words, {})


class CarriedContexts:
    """The callers' context variables, kept for the tasks of this process until they end; the oldest go first."""

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self.used = True
        """False in a process that runs no tasks."""
        self._contexts: dict[str, Context] = {}
        self._lock = threading.Lock()

    def keep(self, task_id: str) -> None:
        if not self.used:
            return
        with self._lock:  # plain routes add tasks from many threads
            if len(self._contexts) >= self._most:
                self._contexts.pop(next(iter(self._contexts)))
            self._contexts[task_id] = copy_context()

    def of(self, task_id: str) -> Context:
        """A copy for one attempt; a fresh one where nothing was kept."""
        kept = self._contexts.get(task_id)
        return copy_context() if kept is None else kept.copy()

    def forget(self, task_id: str) -> None:
        with self._lock:
            self._contexts.pop(task_id, None)


current: ContextVar[TaskContext | None] = ContextVar("taskflow_context", default=None)


def get_task_context() -> TaskContext | None:
    """The running task's context, or None outside a task."""
    return current.get()


def task_log(message: str, *, level: str = "info", **extra: Any) -> None:
    """Adds a line to the running task's stored log. Outside a task it goes to the `taskflow` logger."""
    context, name, line = current.get(), level_name(level), readable(message, LONGEST_LINE)
    if context is not None:
        context.sink.log(context, name, line, extra)
    else:
        known = logging.getLevelNamesMapping().get(name.upper(), logging.INFO)
        logger.log(known, "%s", " ".join([line, *(f"{key}={readable(value)}" for key, value in extra.items())]))
