"""Records as the API shows them: plain JSON, and nothing that the reader was not meant to see.

Owns how a record becomes the shape that `shapes.py` names. Pure; called by `api.py` and, for values, by `views.py`.
"""

from __future__ import annotations

import base64
import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time
from functools import cache
from itertools import repeat
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic_core import from_json

from ..codec import DEEPEST
from ..models import (
    EventKind,
    InstanceRecord,
    LogEntry,
    ScheduleState,
    TaskEvent,
    TaskRecord,
)
from ..store import Metrics, Retried, TaskStore
from ..texts import MORE
from .redaction import DEFAULT, Redaction
from .shapes import Shape, ShownInstance, ShownMetrics, ShownSchedule, ShownTask

LONGEST_LISTED = 4_000
"""Characters of JSON that a list shows of one task's result, and of its arguments."""
LONGEST_SHOWN = 1_000_000
"""Characters of JSON that are shown of one task's arguments."""
UNREADABLE = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError)
"""What reading a stored value may raise when its text was damaged, or was written under another key."""

MOST_SILENT = 1_000
"""Attempts without a log line that are announced in a record's log."""
ACTIONS: Mapping[str, str] = {
    EventKind.REQUEUED: "retry",
    EventKind.COPIED: "retry",
    EventKind.CANCELLED: "cancel",
    EventKind.CANCEL_REQUESTED: "cancel",
}
"""What the audit calls an event; the others have the action's name."""


class Json(JSONResponse):
    """JSON that can always be sent: a lone surrogate in a stored text becomes a question mark, not an error. It is kept
    nowhere on its way, and taken for nothing else."""

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers({"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **(headers or {})})

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def plain(value: object, redaction: Redaction = DEFAULT, depth: int = 0) -> Any:
    """A value in terms of JSON alone: what JSON has no word for becomes a string or a list, and what is secret by its
    name a mark."""
    if depth > DEEPEST:
        return MORE
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {
                str(plain(key, redaction, depth + 1)): plain(redaction.shown(key, item), redaction, depth + 1)
                for key, item in value.items()
            }
        case list() | tuple() | set() | frozenset() | deque():
            return [plain(item, redaction, depth + 1) for item in value]
        case BaseModel():
            return plain(dict(value), redaction, depth)
        case _ if is_dataclass(value) and not isinstance(value, type):
            return plain({field.name: getattr(value, field.name) for field in fields(value)}, redaction, depth)
        case bytes():
            return base64.b64encode(value).decode()
        case datetime() | date() | time():
            return value.isoformat()
        case _:
            return str(value)


def returned(store: TaskStore, task: TaskRecord, redaction: Redaction = DEFAULT, *, listed: bool = False) -> Any:
    """What the task returned, as plain JSON; None when there is nothing, or nothing that can be read."""
    try:
        text = store.result_text(task)
        if listed and text is not None and len(text) > LONGEST_LISTED:
            return beginning(text, LONGEST_LISTED, redaction)
        return plain(store.returned(task), redaction)
    except UNREADABLE:
        return None


def arguments(
    store: TaskStore, task: TaskRecord, redaction: Redaction = DEFAULT, most: int = LONGEST_SHOWN
) -> dict[str, Any]:
    """`args` and `kwargs` as plain JSON, their beginning where they are longer; both None when they cannot be read."""
    try:
        if task.arguments is not None and len(task.arguments) > most:
            args, kwargs = [*beginning(task.arguments, most, redaction), {}][:2]
        else:
            args, kwargs = map(plain, store.arguments(task), repeat(redaction))
        return {"args": redaction.call(store.parameters(task.func_name), args), "kwargs": kwargs}
    except UNREADABLE:
        return {"args": None, "kwargs": None}


def beginning(text: str, most: int, redaction: Redaction) -> Any:
    """The first values of a JSON text, with a mark where it was cut."""
    return marked(plain(from_json(text[:most], allow_partial="trailing-strings"), redaction))


def marked(value: Any) -> Any:
    match value:
        case str():
            return value + MORE
        case list():
            return [*value[:-1], marked(value[-1])] if value else [MORE]
        case dict() if value:
            last = next(reversed(value))
            return value | {last: marked(value[last])}
        case dict():
            return {MORE: MORE}
        case _:
            return value


def shown(shape: type[Shape], source: object, redaction: Redaction = DEFAULT, **made: Any) -> dict[str, Any]:
    """What a shape says: `made`, and of the rest the source's attributes of those names, as plain JSON."""
    return {name: made[name] if name in made else plain(getattr(source, name), redaction) for name in required(shape)}


@cache
def required(shape: type[Shape]) -> Sequence[str]:
    return [name for name, field in shape.model_fields.items() if field.is_required()]


def task_row(
    store: TaskStore, task: TaskRecord, redaction: Redaction = DEFAULT, *, listed: bool = True
) -> dict[str, Any]:
    """A task in a list: without the texts that can be long, and with the beginning of a long result."""
    result = returned(store, task, redaction, listed=listed)
    return shown(ShownTask, task, redaction, result=result, tags=dict(task.tags))


def task_record(
    store: TaskStore, task: TaskRecord, logs: Iterable[LogEntry], redaction: Redaction = DEFAULT
) -> dict[str, Any]:
    lines = log_lines(logs, task.attempt)
    return task_row(store, task, redaction, listed=False) | {"logs": lines, "stacktrace": task.stacktrace}


def log_lines(logs: Iterable[LogEntry], started: int) -> list[str]:
    """Log entries as lines of text. Each attempt after the first is announced by its number; of more attempts than
    MOST_SILENT the early ones only where they have something to say."""
    lines: list[str] = []
    attempt, first = 0, started - MOST_SILENT
    for entry in logs:
        lines += announcements(attempt, entry.attempt, first)
        lines.append(f"{entry.time:%Y-%m-%dT%H:%M:%SZ} {entry.message}")
        attempt = max(attempt, entry.attempt)
    return lines + announcements(attempt, started - 1, first)


def announcements(after: int, upto: int, first: int) -> list[str]:
    return [f"--- Retry {number} ---" for number in range(max(after + 1, min(first, upto)), upto + 1)]


def instance_row(instance: InstanceRecord) -> dict[str, Any]:
    return shown(ShownInstance, instance, id=instance.instance_id)


def schedule_row(schedule: ScheduleState) -> dict[str, Any]:
    return shown(ShownSchedule, schedule, next_run=plain(schedule.next_tick))


def retried(found: Retried) -> dict[str, Any]:
    """What a retry of many tasks did."""
    return {
        "dispatched": len(found.new_ids),
        "skipped": found.skipped,
        "results": [{"original_task_id": old, "new_task_id": new} for old, new in found.new_ids.items()],
    }


def kinds_of(action: str) -> tuple[str, ...]:
    """The events that the audit calls so."""
    known = [kind for kind, name in ACTIONS.items() if name == action]
    return tuple(known) if known else (action,)


def audit_row(event: TaskEvent) -> dict[str, Any]:
    """An event with an actor, as an entry of the audit. Its id is a string, which no reader rounds."""
    return {
        "entry_id": str(event.seq),
        "action": ACTIONS.get(event.kind, event.kind),
        "task_id": event.task_id or None,
        "actor": event.actor,
        "timestamp": plain(event.time),
        "detail": detail_object(event.detail),
    }


def detail_object(text: str | None) -> Any:
    """What is stored as a JSON object, as such; words under `message`; nothing as an empty one."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return plain(value) if isinstance(value, dict) else {"message": text}


def metrics_json(metrics: Metrics) -> dict[str, Any]:
    by_status: dict[str, Any] = {status.value: n for status, n in metrics.by_status.items()}
    return shown(ShownMetrics, metrics, DEFAULT, **by_status)
