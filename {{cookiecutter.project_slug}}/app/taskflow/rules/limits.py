"""What may be started: how full the queues are, what they allow, which slots are free.

Owns the arithmetic of limits, and shares what is free among the queues as wishes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from ..backends.base import Demand
from ..backends.changes import CLAIM_BATCH, Level, StoredQueue, Wish
from ..models import TaskStatus


class Levels:
    """How many tasks are ready and running, by queue and name, at one moment of a turn."""

    def __init__(self, counts: Iterable[Level]) -> None:
        self._names: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.pending: defaultdict[str, int] = defaultdict(int)
        self.running: defaultdict[str, int] = defaultdict(int)
        for queue, name, status, n in counts:
            if status == TaskStatus.PENDING:
                self._names[queue][name] += n
                self.pending[queue] += n
            elif status == TaskStatus.RUNNING:
                self.running[queue] += n

    def ready(self, queue: str) -> Mapping[str, int]:
        """Names of which tasks are ready in that queue, and how many."""
        return {name: n for name, n in self._names[queue].items() if n > 0}

    def queues(self) -> list[str]:
        return sorted(queue for queue, n in self.pending.items() if n > 0)


class Limits:
    """Free slots of executors, and what each queue allows, counted down as they are given away."""

    def __init__(
        self, demand: Demand, queues: Mapping[str, StoredQueue], closed: frozenset[str], levels: Levels
    ) -> None:
        self._names = demand.names
        self._slots = {kind: free for kind, free in demand.slots.items() if free > 0}
        self._most = demand.queues
        self._queues = queues
        self._closed = closed
        self._levels = levels
        self._started: defaultdict[str, int] = defaultdict(int)
        self.unknown: set[str] = set()
        """Names of waiting tasks that this instance does not know."""
        self.more = False
        """Whether there is more to start that this turn does not wish for."""

    def take(self, queue: str, name: str) -> bool:
        """One slot for a task of that name, if there is one."""
        kind = self._names.get(name, "")
        if kind not in self._slots or self.allowed(queue) <= 0:
            return False
        self._spend(kind, 1)
        self._started[queue] += 1
        return True

    def allowed(self, queue: str) -> int:
        """How many more of this queue's tasks may start: on all instances together, and here."""
        state, wanted = self._queues.get(queue), self._wanted(queue)
        if state is None or (state.concurrency is None and not state.paused):
            return wanted
        if state.paused or queue in self._closed:
            return 0
        return min(wanted, (state.concurrency or 0) - self._levels.running[queue] - self._started[queue])

    def _wanted(self, queue: str) -> int:
        """How many more of this queue's tasks this instance asks for."""
        return CLAIM_BATCH if self._most is None else self._most.get(queue, 0) - self._started[queue]

    def wishes(self, rotation: int, levels: Levels) -> list[Wish]:
        """Shares the slots among the queues. `rotation` changes from turn to turn, and with it who is served first."""
        queues = levels.queues()
        first = rotation % len(queues) if queues else 0
        found = (self._wish(queue, levels) for queue in queues[first:] + queues[:first])
        return [wish for wish in found if wish is not None]

    def _wish(self, queue: str, levels: Levels) -> Wish | None:
        waiting = levels.ready(queue)
        self.unknown |= waiting.keys() - self._names.keys()
        startable = {name: self._names[name] for name in waiting if self._names.get(name) in self._slots}
        if not startable:
            return None
        allowed = self.allowed(queue)
        self.more |= allowed <= 0 and queue in self._closed
        ready: defaultdict[str, int] = defaultdict(int)
        for name, kind in startable.items():
            ready[kind] += waiting[name]
        slots = {kind: min(self._slots[kind], n, CLAIM_BATCH) for kind, n in ready.items()}
        most = min(sum(slots.values()), allowed, CLAIM_BATCH)
        if most <= 0:
            return None
        reserved = {kind: min(n, most) for kind, n in slots.items()}  # which of them it will be, the store finds out
        for kind, n in reserved.items():
            self._spend(kind, n)
        self._started[queue] += most
        total, left = sum(ready.values()), bool(self._slots.keys() & ready.keys())
        self.more |= sum(reserved.values()) > most or (total > most and left and self.allowed(queue) > 0)
        names = {name: kind for name, kind in self._names.items() if kind in slots}
        return Wish(queue, names, slots, most, len(startable) == len(waiting), total)

    def _spend(self, kind: str, n: int) -> None:
        self._slots[kind] -= n
        if self._slots[kind] <= 0:
            del self._slots[kind]
