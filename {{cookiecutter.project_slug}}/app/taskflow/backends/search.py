"""What a filter means, for stores that have to look for themselves. `pages.py` says the same in SQL.

Owns the limit of searches, and which parts of a filter have an index. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BackendUnavailable
from ..models import AuditFilter, TaskEvent, TaskFilter
from .stored import loads_object, stored_names

SEARCH_WINDOW = 100_000
"""A search by something that has no index looks at this many of the newest tasks."""
MOST_SEARCHES = 20
"""Of one process, that run or wait; each takes up to a second where there are many tasks."""


class Searches:
    """How many are under way."""

    def __init__(self) -> None:
        self._number = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Raises BackendUnavailable where there are too many."""
        if self._number >= MOST_SEARCHES:
            raise BackendUnavailable(f"{self._number} searches are under way, more are not taken")
        self._number += 1
        try:
            yield
        finally:
            self._number -= 1


def is_act(where: AuditFilter, event: TaskEvent) -> bool:
    """Whether an event is one that a filter of the audit shows."""
    about = f"{event.task_id}\n{event.detail or ''}".lower()
    return (
        where.actor in (None, event.actor)
        and (not where.kinds or event.kind in where.kinds)
        and (where.subject is None or json.dumps(where.subject.lower())[1:-1] in about)
        and (where.since is None or event.time >= where.since)
        and (where.until is None or event.time <= where.until)
    )


def walked_by(where: TaskFilter) -> str:
    """The part of a filter whose index is walked; "" where all tasks are."""
    parts = (
        ("error_key", where.error_key),
        ("tags", where.tags or None),
        ("statuses", where.statuses or None),
        ("schedule", where.schedule),
        ("func_name", where.func_name),
        ("queue", where.queue),
    )
    return next((name for name, value in parts if value is not None), "")


def is_search(where: TaskFilter) -> bool:
    """Whether it has to look through tasks that it does not show."""
    named = (where.error_key, where.statuses or None, where.schedule, where.func_name, where.queue, *where.tags)
    return sum(part is not None for part in named) > 1 or is_scan(where)


def is_scan(where: TaskFilter) -> bool:
    """Whether some part of it has no index, and is looked for in rows."""
    parts = (where.source, where.text, where.dismissed, where.task_id, where.key, where.error, where.arguments)
    return where.attempts is not None or any(part is not None for part in parts)


def matches(where: TaskFilter, row: Any) -> bool:
    return all(_parts(where, row))


def _parts(where: TaskFilter, row: Any) -> Iterator[bool]:
    if where.statuses:
        yield any(row.status in stored_names(status) for status in where.statuses)
    for wanted, found in (
        (where.schedule, row.schedule),
        (where.func_name, row.name),
        (where.queue, row.queue),
        (where.source, row.source),
        (where.error_key, row.error_key),
        (where.key, row.idempotency_key),
        (where.dismissed, row.dismissed_at is not None),
    ):
        yield wanted is None or wanted == found
    if where.attempts is not None:
        sign, number = where.attempts
        yield {"<": row.attempt < number, "=": row.attempt == number, ">": row.attempt > number}[sign]
    if where.tags:
        tags = loads_object(row.tags)
        yield all(_has_tag(tags, f"{key}:{value}") for key, value in where.tags)
    if where.task_id is not None:
        yield row.task_id.lower().startswith(where.task_id.lower())
    if where.error is not None:
        yield where.error.lower() in (row.error or "").lower()
    if where.arguments is not None:
        yield json.dumps(where.arguments.lower())[1:-1] in (row.arguments or "").lower()
    if where.text is not None:
        yield _has_words(where.text.lower(), row)


def _has_tag(tags: dict[str, Any], pair: str) -> bool:
    """Cut at whichever colon: a key may hold some, and nobody who types `key:value` can tell."""
    return any(f"{key}:{value}" == pair for key, value in tags.items())


def _has_words(words: str, row: Any) -> bool:
    quoted = json.dumps(words)[1:-1]
    return (
        words in row.name.lower()
        or row.task_id.lower().startswith(words)
        or words in (row.error or "").lower()
        or quoted in (row.tags or "").lower()
    )
