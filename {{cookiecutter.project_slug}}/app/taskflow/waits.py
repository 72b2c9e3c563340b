"""Why a task waits, in words, from facts: what operators ask first.

Owns the reasons and their order; the store gathers the facts with a bounded number of reads. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from .models import QueueState, TaskRecord, TaskStatus


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known when somebody asks."""

    now: datetime
    known: bool
    """Whether this process has the function."""
    queue: QueueState | None
    instances: int
    """That are alive."""
    busy: int
    """Tasks that run on them, of as many slots."""
    slots: int


def reasons(task: TaskRecord, facts: Facts) -> list[str]:
    """Why a pending task does not start, the reason that has to go first first; nothing where it is simply next."""
    if task.status is not TaskStatus.PENDING:
        return []
    found = []
    left = (task.run_at - facts.now).total_seconds()
    if left > 0:
        found.append(due_words(task, left))
    found += queue_words(facts.queue)
    if facts.instances == 0:
        found.append("No process that could run it is alive.")
    elif facts.slots == 0:
        found.append("No process that is alive runs tasks: they only accept.")
    elif facts.busy >= facts.slots:
        found.append(f"All {facts.slots:,} slots of the {processes(facts.instances)} are busy.")
    if not facts.known:
        found.append(
            f"This process has no function {task.func_name!r}: it waits for one that does, as in a rolling deploy."
        )
    return found


def due_words(task: TaskRecord, seconds: float) -> str:
    moment = f"{task.run_at:%Y-%m-%d %H:%M:%S} UTC"
    if task.attempt > task.excused:
        return f"It failed, and is tried again at {moment}: retry {task.retries_used + 1} of {task.max_attempts - 1}."
    if task.run_key is not None:
        return f"It is a one-off, for {moment}."
    return f"It was added for later: {moment}."


def queue_words(queue: QueueState | None) -> list[str]:
    if queue is None:
        return []
    found = []
    if queue.paused:
        why = f": {queue.reason}" if queue.reason else ""
        found.append(f"Its queue {queue.name!r} is paused{why}.")
    if queue.concurrency is not None and queue.running >= queue.concurrency:
        found.append(f"Its queue {queue.name!r} runs {queue.running:,} of at most {queue.concurrency:,} at once.")
    return found


def processes(n: int) -> str:
    return "one process" if n == 1 else f"{n} processes"
