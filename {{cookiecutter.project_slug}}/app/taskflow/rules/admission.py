"""What becomes of the tasks that arrive: started at once, waiting, delayed, rejected, or known already.

A task starts in the turn that stores it when it could have been claimed in that turn: it is due, nothing waits before
it in its queue, and there is a slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..backends.base import Claimed, Draft
from ..backends.changes import Ceiling, Insert, StoredTask
from ..backends.stored import dumps_object, first_claim, micros, stored_pending
from ..models import EventKind, TaskStatus, to_micros
from .commands import requeue
from .limits import Levels, Limits
from .work import Work

PENDING, RUNNING, REJECTED = TaskStatus.PENDING.value, TaskStatus.RUNNING.value, TaskStatus.REJECTED.value
REARMED = (TaskStatus.FAILED, TaskStatus.INTERRUPTED, TaskStatus.REJECTED)
"""What an idempotency key that comes again finds its task in, and runs it again."""


@dataclass(slots=True)
class Admitted:
    """What became of a turn's drafts."""

    existing: set[str] = field(default_factory=set)
    rejected: dict[str, int] = field(default_factory=dict)
    """Task id -> the max_size of its queue."""
    started: list[Claimed] = field(default_factory=list)


def admit(work: Work, limits: Limits | None, levels: Levels) -> Admitted:
    admitted = Admitted()
    unique: dict[str, Draft] = {}
    for draft in work.drafts:
        unique.setdefault(draft.task_id, draft)  # of one key twice in a turn the first is the task, as it is in two
    status = decided(work, unique, limits, levels)
    for task_id, draft in unique.items():
        if (row := work.task(task_id)) is None:
            _store(work, draft, status[task_id], admitted)
        else:
            admitted.existing.add(task_id)
            if draft.key is not None and row.status in REARMED:
                _rearm(work, row, draft, status[task_id], admitted)
    _cap(work, [unique[task_id].queue for task_id in unique], limits)
    return admitted


def decided(work: Work, drafts: Mapping[str, Draft], limits: Limits | None, levels: Levels) -> dict[str, str]:
    """Task id -> the status that it gets, if it is new."""
    status = {task_id: RUNNING for task_id, draft in drafts.items() if draft.here}
    if limits:
        status |= dict.fromkeys(_startable(work, drafts.values(), limits, levels), RUNNING)
    ready = dict(levels.pending)
    for task_id, draft in drafts.items():
        if task_id not in status:
            status[task_id] = _waiting_status(work, draft, ready)
    return status


def _startable(work: Work, drafts: Iterable[Draft], limits: Limits, levels: Levels) -> list[str]:
    due = [draft for draft in drafts if not levels.pending[draft.queue] and is_due(work, draft)]
    if len(due) > 1:
        due.sort(key=lambda draft: (-(draft.priority or 0), draft.run_at, draft.task_id))
    new = (draft for draft in due if work.task(draft.task_id) is None)
    return [draft.task_id for draft in new if limits.take(draft.queue, draft.name)]


def _waiting_status(work: Work, draft: Draft, ready: dict[str, int]) -> str:
    """`ready` are the tasks that each queue holds, counted on."""
    if draft.rejected_by is not None:
        return REJECTED
    if not is_due(work, draft):
        return stored_pending(micros(draft.run_at), work.now)
    state, held = work.snapshot.queues.get(draft.queue), ready.get(draft.queue, 0)
    if state is not None and state.max_size is not None and held >= state.max_size:
        return REJECTED
    ready[draft.queue] = held + 1
    return PENDING


def is_due(work: Work, draft: Draft) -> bool:
    """What is to start as soon as it was added is due, even where the clock was put back since."""
    return draft.run_at <= max(work.turn.now, draft.created_at) and draft.rejected_by is None and not draft.here


def _store(work: Work, draft: Draft, status: str, admitted: Admitted) -> None:
    changes, created_at = work.changes, to_micros(draft.created_at)
    runs = status == RUNNING
    changes.inserts.append(
        Insert(
            draft.task_id,
            draft.name,
            draft.queue,
            draft.priority,
            draft.executor,
            draft.source,
            status,
            int(runs),
            work.turn.instance if runs else None,
            work.now if runs else None,
            draft.max_attempts,
            created_at,
            created_at if draft.run_at is draft.created_at else to_micros(draft.run_at),
            draft.arguments,
            dumps_object(draft.tags),
            int(draft.requeue),
            draft.key,
            draft.retry_of,
            draft.trace,
            draft.schedule,
            draft.run_key,
        )
    )
    changes.move(draft.queue, draft.name, None, status)
    if status == REJECTED:
        changes.event(EventKind.REJECTED, draft.task_id, at=created_at)
        admitted.rejected[draft.task_id] = max_size(work, draft)
        return
    changes.event(EventKind.ACCEPTED, draft.task_id, at=created_at)
    if runs:
        changes.event(EventKind.STARTED, draft.task_id, 1)
        admitted.started.append(first_claim(draft, work.turn.now))


def _rearm(work: Work, row: StoredTask, draft: Draft, status: str, admitted: Admitted) -> None:
    """An idempotency key runs its task again, with what its new caller said."""
    if status == REJECTED:
        admitted.rejected[draft.task_id] = max_size(work, draft)
        return
    requeue(
        work,
        row,
        draft.max_attempts,
        None,
        micros(draft.run_at),
        draft.queue,
        arguments=draft.arguments,
        priority=draft.priority,
        trace=draft.trace,
        run_key=draft.run_key,
        tags=dumps_object(draft.tags),
    )


def max_size(work: Work, draft: Draft) -> int:
    state = work.snapshot.queues.get(draft.queue)
    return draft.rejected_by or (state.max_size if state and state.max_size else 0)


def _cap(work: Work, queues: Sequence[str], limits: Limits | None) -> None:
    """Says which limits must still hold when the changes are written."""
    for queue in dict.fromkeys(queues):
        state = work.snapshot.queues.get(queue)
        if state is not None and state.counted:
            work.changes.ceilings[queue] = Ceiling(state.max_size, state.concurrency if limits else None)
