"""One turn while it is decided: what the snapshot showed, and what was decided since.

Owns the one way to change a task inside a turn: a row that two parts of a turn change is written once, and the second
sees what the first made of it. The other rules write here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backends.base import AttemptId, Draft, Moved, Turn
from ..backends.changes import Changes, Snapshot, StoredTask, Update
from ..backends.stored import loads_object
from ..models import TaskStatus, to_micros
from .limits import Levels


class Work:
    def __init__(self, turn: Turn, snapshot: Snapshot, *, careful: bool) -> None:
        self.turn = turn
        self.snapshot = snapshot
        self.careful = careful
        """Whether the snapshot shows every task of the turn; otherwise each is taken for what its sender knew."""
        self.now = to_micros(turn.now)
        self.changes = Changes(self.now, turn.instance, logs=turn.logs, progress=turn.progress)
        self.drafts: list[Draft] = list(turn.drafts)
        """Tasks to admit: those that arrived, and those that commands brought."""
        self.stopping: list[AttemptId] = []
        """What this instance runs that was asked to stop."""
        self._tasks = snapshot.tasks

    def task(self, task_id: str) -> StoredTask | None:
        """As it is by now."""
        return self._tasks.get(task_id)

    def latest(self, row: StoredTask) -> StoredTask:
        """A row that was found otherwise than by its id, as it is by now."""
        return self._tasks.setdefault(row.task_id, row)

    def put(self, row: StoredTask, **values: Any) -> None:
        """Sets columns of a task."""
        known = self.changes.updates.get(row.task_id)
        first, before = (row, {}) if known is None else (known.row, known.values)
        self.changes.updates[row.task_id] = Update(first, {**before, **values})
        self.remember(row, values)

    def remember(self, row: StoredTask, values: Mapping[str, Any]) -> None:
        """What a row will be."""
        self._tasks[row.task_id] = row._replace(**{name: values[name] for name in values if name in StoredTask._fields})

    def levels(self) -> Levels:
        """As they are by now."""
        changes = [(queue, name, status, n) for (queue, name, status), n in self.changes.counts.items()]
        return Levels([*self.snapshot.levels, *changes])

    def moved(self, row: StoredTask, status: TaskStatus, **facts: Any) -> None:
        """Tells listeners what a command made of a task; `row` is what it was before."""
        values = {"attempt": row.attempt, "excused": row.excused, **facts}
        tags = loads_object(row.tags)
        self.changes.moved.append(Moved(row.task_id, row.name, tags, status, self.turn.now, **values))
