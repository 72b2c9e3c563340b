"""What may be claimed: the queues' limits, how full they are, and what is left of it in this turn.

Owns the arithmetic of limits; it asks the database only for the limits themselves. The turn writer calls it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..models import QueueState, TaskStatus
from .base import Demand
from .cells import is_sound, stand_in
from .statements import Cursor, Statements

CLAIM_BATCH = 250
"""Tasks of one queue that one turn claims at most: the first run while the next are claimed."""


class QueueBook:
    """The queues' limits, remembered between turns and read again when their version has changed."""

    def __init__(self) -> None:
        self._version: int | None = None
        self.queues: Mapping[str, QueueState] = {}

    def refresh(self, version: int | None, cursor: Cursor, statements: Statements) -> None:
        """`version` is that of the limits which are stored now."""
        if version != self._version:
            rows = statements.queues.run(cursor).fetchall()
            self.queues = {row[0]: self._state(row) for row in rows if is_sound("name", row[0])}
            self._version = version

    def _state(self, row: Sequence[Any]) -> QueueState:
        """A limit that cannot be read is none."""
        names = ("name", "concurrency", "max_size", "paused", "reason")
        cells: list[Any] = [
            cell if is_sound(column, cell) else stand_in(column, cell) for column, cell in zip(names, row, strict=True)
        ]
        name, concurrency, max_size, paused, reason = cells
        return QueueState(name, concurrency, max_size, bool(paused), reason)


class Levels:
    """How many tasks are ready and running, by queue and name, at one moment of a turn."""

    def __init__(self, counts: Iterable[Sequence[Any]]) -> None:
        """Of (queue, name, status, n)."""
        self._names: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.pending: Counter[str] = Counter()
        self.running: Counter[str] = Counter()
        for queue, name, status, n in counts:
            if status == TaskStatus.PENDING:
                self._names[queue][name] += n
                self.pending[queue] += n
            elif status == TaskStatus.RUNNING:
                self.running[queue] += n

    def waiting(self, queue: str) -> set[str]:
        """Names of which tasks are ready in that queue."""
        return {name for name, n in self._names[queue].items() if n > 0}

    def ready(self, queue: str, names: Collection[str]) -> int:
        """How many tasks of these names are ready in that queue."""
        return sum(self._names[queue][name] for name in names)

    def queues(self) -> list[str]:
        return sorted(queue for queue, n in self.pending.items() if n > 0)


class Room:
    """What may still be claimed in this turn: free slots of executors, and what each queue allows, counted down."""

    def __init__(self, demand: Demand, queues: Mapping[str, QueueState], levels: Levels) -> None:
        self.names = demand.names
        self._slots = {kind: free for kind, free in demand.slots.items() if free > 0}
        self._queues = queues
        self._running = Counter(levels.running)

    def startable(self, names: Collection[str]) -> set[str]:
        """Those names that this instance knows and has a slot for."""
        return {name for name in names if self.names.get(name) in self._slots}

    def kinds(self, names: Collection[str]) -> set[str]:
        """The executors of these names."""
        return {self.names.get(name, "") for name in names}

    def free(self, queue: str, names: Collection[str]) -> int:
        """How many tasks of these names may be taken from that queue."""
        slots = sum(self._slots.get(kind, 0) for kind in self.kinds(names))
        return max(0, min(slots, self._allowed(queue), CLAIM_BATCH))

    def take(self, queue: str, name: str) -> bool:
        """One slot for a task of that name, if there is one."""
        kind = self.names.get(name, "")
        if kind not in self._slots or self._allowed(queue) <= 0:
            return False
        self._slots[kind] -= 1
        if self._slots[kind] == 0:
            del self._slots[kind]
        self._running[queue] += 1
        return True

    def _allowed(self, queue: str) -> int:
        """How many more of this queue's tasks may run, on all instances together."""
        state = self._queues.get(queue)
        if state is None or (state.concurrency is None and not state.paused):
            return CLAIM_BATCH
        return 0 if state.paused else (state.concurrency or 0) - self._running[queue]
