"""What operators and housekeeping ask for: cancel, requeue, rescue, queues, one-offs, notes.

Owns how each command changes tasks and queues; what it does to schedules is `timetable.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..backends.base import (
    Answer,
    Cancel,
    CancelScheduled,
    CancelTasks,
    Command,
    DeclareQueues,
    DeclareSchedules,
    DismissTasks,
    EditQueue,
    EditSchedule,
    Fire,
    Moved,
    MoveScheduled,
    Note,
    Purge,
    Record,
    Requeue,
    RequeueTasks,
    Rescue,
    RestoreTasks,
    Revoke,
    RunSchedule,
    Supersede,
)
from ..backends.changes import StoredQueue, StoredTask
from ..backends.stored import WAITS, broken_words, dumps_object, micros, moment, shown_status, stored_pending
from ..failures import failure_of
from ..models import DELAYED, RETRYABLE, EventKind, QueueConfig, TaskStatus, from_micros, to_micros
from ..texts import HERE_ONLY, fields_text
from . import timetable
from .work import Work

CRASH_BUDGET = 3
"""Processes that may die while running one task before it is failed as `crash_loop`."""


def obey(work: Work, command: Command) -> Answer:
    match command:
        case Cancel(task_id, actor):
            return _cancel(work, task_id, actor)
        case Requeue(task_id, max_attempts, actor):
            return _retry(work, task_id, max_attempts, actor)
        case RequeueTasks(task_ids, attempts, note):
            return _many(task_ids, lambda task_id: _retry_known(work, task_id, attempts, note))
        case CancelTasks(task_ids, note):
            return _many(task_ids, lambda task_id: _cancel(work, task_id, None, note).changed)
        case DismissTasks(task_ids, reason, actor):
            return _many(task_ids, lambda task_id: _dismiss(work, task_id, reason, actor))
        case RestoreTasks(task_ids, actor):
            return _many(task_ids, lambda task_id: _restore(work, task_id, actor))
        case Rescue(stamps):
            return _rescue(work, stamps)
        case DeclareQueues(queues):
            return _declare_queues(work, queues)
        case EditQueue():
            return _edit_queue(work, command)
        case Purge():
            work.changes.purges.append(command)
            return Answer()  # the store says what it came to
        case Record():
            work.changes.records.append(command)
            return Answer()
        case Note(kind, actor, detail, task_id, at):
            work.changes.event(kind, task_id, at=micros(at), actor=actor or "", detail=fields_text(detail))
            return Answer(changed=1)
        case Revoke(session_id, expires):
            work.changes.revoked.append((session_id, to_micros(expires)))
            return Answer(changed=1)
        case Supersede():
            return _supersede(work, command)
        case CancelScheduled(run_key, actor):
            return _cancel_scheduled(work, run_key, actor)
        case MoveScheduled():
            return _move_scheduled(work, command)
        case DeclareSchedules(schedules):
            return timetable.declare(work, schedules)
        case Fire(firings):
            return timetable.fire(work, firings)
        case EditSchedule():
            return timetable.edit(work, command)
        case RunSchedule(name, task_id, actor):
            return timetable.run(work, name, task_id, actor)


# -- one task


def _cancel(work: Work, task_id: str, actor: str | None, note: str | None = None) -> Answer:
    row = work.task(task_id)
    if row is None:
        return Answer()
    status = shown_status(row.status)
    if status is TaskStatus.PENDING:
        _withdraw(work, row, actor, note=note)
    elif status is TaskStatus.RUNNING:
        work.put(row, cancel_requested=True)
        if row.instance == work.turn.instance:
            work.stopping.append((task_id, row.attempt))
        work.changes.event(EventKind.CANCEL_REQUESTED, task_id, row.attempt, actor=actor, detail=note)
    return Answer(before=status, changed=int(not status.terminal))


def _withdraw(
    work: Work, row: StoredTask, actor: str | None, reason: str | None = None, note: str | None = None
) -> None:
    """Cancels a task that waits."""
    cancelled = TaskStatus.CANCELLED
    work.put(row, status=cancelled.value, finished_at=work.now, error=reason or row.error)
    work.changes.event(EventKind.CANCELLED, row.task_id, actor=actor, detail=reason or note)
    work.changes.move(row.queue, row.name, row.status, cancelled.value)
    work.changes.ran(row.queue, row.name, cancelled.value, row.started_at, work.now)
    work.moved(row, cancelled, error=reason)


def _retry(work: Work, task_id: str, max_attempts: int, actor: str | None) -> Answer:
    row = work.task(task_id)
    if row is None:
        return Answer()
    before = shown_status(row.status)
    if before in RETRYABLE:
        requeue(work, row, max_attempts, actor)
    return Answer(before=before, changed=int(before in RETRYABLE))


def _retry_known(work: Work, task_id: str, attempts: Mapping[str, int], note: str | None) -> int:
    row = work.task(task_id)
    if row is None or row.name not in attempts or shown_status(row.status) not in RETRYABLE:
        return 0
    requeue(work, row, attempts[row.name], None, note=note)
    return 1


def _dismiss(work: Work, task_id: str, reason: str | None, actor: str | None) -> int:
    row = work.task(task_id)
    if row is None or row.status != TaskStatus.FAILED or row.dismissed_at is not None:
        return 0
    work.put(row, dismissed_at=work.now)
    work.changes.regroup(row.error_key, open=-1, dismissed=1)
    work.changes.event(EventKind.DISMISSED, task_id, actor=actor, detail=reason)
    return 1


def _restore(work: Work, task_id: str, actor: str | None) -> int:
    row = work.task(task_id)
    if row is None or row.dismissed_at is None:
        return 0
    work.put(row, dismissed_at=None)
    work.changes.regroup(row.error_key, open=1, dismissed=-1)
    work.changes.event(EventKind.RESTORED, task_id, actor=actor)
    return 1


def _many(task_ids: Sequence[str], act: Callable[[str], int]) -> Answer:
    changed = [task_id for task_id in dict.fromkeys(task_ids) if act(task_id)]
    return Answer(changed=len(changed), ids=changed)


def requeue(
    work: Work,
    row: StoredTask,
    max_attempts: int,
    actor: str | None,
    run_at: int | None = None,
    queue: str | None = None,
    note: str | None = None,
    **values: object,
) -> None:
    """Makes an ended task wait again, as if it were new. `queue` is another one that it goes to."""
    status, queue = stored_pending(run_at, work.now), queue or row.queue
    work.put(
        row,
        status=status,
        run_at=run_at if status == DELAYED else work.now,
        excused=row.attempt,
        max_attempts=max_attempts,
        crashes=0,
        started_at=None,
        finished_at=None,
        result=None,
        error=None,
        stacktrace=None,
        cancel_requested=False,
        error_key=None,
        dismissed_at=None,
        queue=queue,
        **values,
    )
    work.changes.leave(row.error_key, row.dismissed_at)
    work.changes.event(EventKind.REQUEUED, row.task_id, actor=actor, detail=note)
    work.changes.move(row.queue, row.name, row.status, None)
    work.changes.move(queue, row.name, None, status)
    work.changes.ran(row.queue, row.name, row.status, row.finished_at, row.started_at)  # takes back what it counted


# -- one-offs


def _supersede(work: Work, command: Supersede) -> Answer:
    draft, waiting = command.draft, list(_one_offs(work, command.draft.run_key or ""))
    for row in waiting:
        if row.task_id != draft.task_id:
            _withdraw(work, row, None, f"replaced by {draft.task_id}")
            continue
        # Its idempotency key makes it the same task: it gets the time and the rest of its new description.
        status = stored_pending(to_micros(draft.run_at), work.now)
        work.put(
            row,
            status=status,
            run_at=to_micros(draft.run_at),
            queue=draft.queue,
            priority=draft.priority,
            arguments=draft.arguments,
            tags=dumps_object(draft.tags),
        )
        work.changes.event(EventKind.MOVED, row.task_id, detail=f"to {draft.run_at.isoformat()}")
        work.changes.move(row.queue, row.name, row.status, None)
        work.changes.move(draft.queue, row.name, None, status)
    return Answer(changed=len(waiting))


def _cancel_scheduled(work: Work, run_key: str, actor: str | None) -> Answer:
    waiting = list(_one_offs(work, run_key))
    for row in waiting:
        _withdraw(work, row, None)
        if actor is not None:
            detail = json.dumps({"run_key": run_key})
            work.changes.event(EventKind.CANCEL_SCHEDULED, row.task_id, actor=actor, detail=detail)
    return Answer(changed=len(waiting))


def _move_scheduled(work: Work, move: MoveScheduled) -> Answer:
    waiting = list(_one_offs(work, move.run_key))
    for row in waiting:
        status = stored_pending(to_micros(move.run_at), work.now)
        work.put(row, status=status, run_at=to_micros(move.run_at))
        work.changes.move(row.queue, row.name, row.status, status)
        detail = {"run_key": move.run_key, "from": from_micros(row.run_at).isoformat(), "to": move.run_at.isoformat()}
        actor = move.actor or ""
        work.changes.event(EventKind.MOVE_SCHEDULED, row.task_id, actor=actor, detail=json.dumps(detail))
    return Answer(changed=len(waiting))


def _one_offs(work: Work, run_key: str) -> Iterator[StoredTask]:
    """What waits under that key."""
    for found in work.snapshot.one_offs.get(run_key, ()):
        row = work.latest(found)
        if row.status in WAITS:
            yield row


# -- lost instances


def _rescue(work: Work, stamps: Mapping[str, int]) -> Answer:
    rescued = 0
    for found in work.snapshot.left:
        owner = found.instance or ""
        work.changes.stamps[owner] = stamps.get(owner, 0)
        row = work.latest(found)
        if row.status == TaskStatus.RUNNING:
            rescued += 1
            if row.broken:
                set_aside(work, row)
            else:
                _rescue_task(work, row)
    return Answer(changed=rescued)


def _rescue_task(work: Work, row: StoredTask) -> None:
    crashes, error, error_key = row.crashes + 1, None, None
    if row.cancel_requested:
        kind, status, error = EventKind.CANCELLED, TaskStatus.CANCELLED, "cancelled by an operator"
    elif not row.requeue:
        kind, status, error = EventKind.INTERRUPTED, TaskStatus.INTERRUPTED, reason_of(row.name)
    elif crashes >= CRASH_BUDGET:
        kind, status = EventKind.FAILED, TaskStatus.FAILED
        error = f"crash_loop: its process died {crashes} times while it ran"
        error_key = work.changes.failed(row.name, failure_of(row.name, error, None), work.now)
    else:
        kind, status = EventKind.RESCUED, TaskStatus.PENDING
    work.put(
        row,
        status=status.value,
        crashes=crashes,
        excused=row.excused + 1,
        error=error,
        error_key=error_key,
        run_at=row.run_at if status.terminal else work.now,
        finished_at=work.now if status.terminal else None,
        cancel_requested=False,
    )
    work.changes.event(kind, row.task_id, row.attempt, detail=error or f"left running by {row.instance}")
    work.changes.move(row.queue, row.name, TaskStatus.RUNNING.value, status.value)
    if status.terminal:
        work.changes.ran(row.queue, row.name, status.value, row.started_at, work.now)
    work.moved(row, status, excused=row.excused + 1, started_at=moment(row.started_at), error=error)


def reason_of(name: str) -> str:
    """Why a task of that name was interrupted."""
    if name.endswith(HERE_ONLY):
        return "its process went away, and only that process could run it"
    return "its process went away"


def set_aside(work: Work, row: StoredTask) -> None:
    """Ends a task whose row cannot be read, so that nothing waits behind it."""
    reason = broken_words(row.broken)
    work.changes.aside.append((row.raw_id, row.status, reason))
    work.remember(row, {"status": TaskStatus.FAILED.value})
    work.changes.event(EventKind.FAILED, row.task_id, detail=reason)
    work.changes.move(row.queue, row.name, row.status, TaskStatus.FAILED.value)
    failed = Moved(row.task_id, row.name, {}, TaskStatus.FAILED, work.turn.now, 0, 0, error=reason)
    work.changes.moved.append(failed)


# -- queues


def _declare_queues(work: Work, declared: Mapping[str, QueueConfig]) -> Answer:
    """An operator's edit stays until the code declares something else."""
    for name, config in declared.items():
        limits = {"concurrency": config.concurrency, "max_size": config.max_size}
        text = json.dumps(limits)
        known = work.snapshot.queues.get(name)
        if known is None or known.declared != text:
            _set_queue(work, name, {**limits, "declared": text})
    return Answer()


def _edit_queue(work: Work, edit: EditQueue) -> Answer:
    known = work.snapshot.queues.get(edit.name)
    before = {column: getattr(known, column, None) for column in edit.changes}
    _set_queue(work, edit.name, edit.changes)
    detail = {"queue": edit.name, "before": before, "after": dict(edit.changes), "note": edit.note}
    work.changes.event(edit.kind, "", actor=edit.actor or "", detail=json.dumps(detail))
    return Answer(changed=1)


def _set_queue(work: Work, name: str, values: Mapping[str, Any]) -> None:
    queues = dict(work.snapshot.queues)
    known = queues.get(name, StoredQueue(name, None, None, False, None, None))
    queues[name] = known._replace(**values)
    work.snapshot.queues = queues
    work.changes.queues.append((name, values))
