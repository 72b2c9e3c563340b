"""The books of one turn: what its changes of status leave in the history and in the counts.

Owns events, counts and the levels of queues. Whoever changes a row tells it here; it is written last, in the same
transaction, so that events and counts always agree with the rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import chain
from typing import Any

from sqlalchemy.engine import Row

from ..models import EventKind, to_micros
from ..texts import readable
from .room import Levels
from .statements import Cursor, Statements


class Ledger:
    def __init__(
        self,
        cursor: Cursor,
        statements: Statements,
        instance: str,
        now: datetime,
        levels: Iterable[Sequence[Any]],
    ) -> None:
        """`levels` are the stored (queue, name, status, n) of what is ready or runs."""
        self._cursor = cursor
        self._sql = statements
        self._instance = instance
        self._at = to_micros(now)
        self._before = levels
        self._events: list[Sequence[Any]] = []
        self._counts: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._micros: defaultdict[tuple[str, str, str], int] = defaultdict(int)

    def event(
        self,
        kind: EventKind,
        task_id: str,
        attempt: int | None = None,
        *,
        at: int | None = None,
        actor: str | None = None,
        detail: str | None = None,
    ) -> None:
        """`attempt` is the number of started attempts; the event counts it from 0."""
        number = None if attempt is None else attempt - 1
        actor = actor and readable(actor)  # as an authentication of the team's own named them
        self._events.append((task_id, at or self._at, str(kind), number, self._instance, actor, detail))

    def move(self, queue: str, name: str, before: str | None, after: str | None) -> None:
        """One task changes its stored status; None is no task."""
        if before is not None:
            self._counts[queue, name, before] -= 1
        if after is not None:
            self._counts[queue, name, after] += 1

    def ran(self, queue: str, name: str, status: str, started_at: int | None, ended_at: int | None) -> None:
        """The time from a task's last start to its end counts under the status it ended with."""
        if started_at is not None and ended_at is not None:
            self._micros[queue, name, status] += ended_at - started_at

    def ran_no_more(self, row: Row[Any]) -> None:
        """Takes back what `ran` counted for a task that leaves its final status."""
        self.ran(row.queue, row.name, row.status, row.finished_at, row.started_at)

    def levels(self) -> Levels:
        """As they are now, this turn's own changes included."""
        changes = ((queue, name, status, n) for (queue, name, status), n in self._counts.items())
        return Levels(chain(self._before, changes))

    def write(self) -> None:
        if self._events:
            self._sql.events.change(self._cursor, self._events)
        keys = [key for key in self._counts.keys() | self._micros.keys() if self._counts[key] or self._micros[key]]
        if keys:
            rows = [(*key, self._counts[key], self._micros[key]) for key in sorted(keys)]
            self._sql.count.change(self._cursor, rows)
