"""What a filter means, for stores that have to look for themselves. `pages.py` says the same in SQL.

Owns the limit of searches, and which parts of a filter have an index. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BackendUnavailable
from ..models import TaskFilter
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


def is_search(where: TaskFilter) -> bool:
    """Whether it has to look through tasks that it does not show."""
    named = (bool(where.statuses), where.schedule is not None, where.func_name is not None, where.queue is not None)
    return sum(named) > 1 or where.source is not None or bool(where.tags) or where.text is not None


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
    ):
        yield wanted is None or wanted == found
    if where.tags:
        tags = loads_object(row.tags)
        yield all(_has_tag(tags, f"{key}:{value}") for key, value in where.tags)
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
