"""How attempts end: a result counts while its lease holds, and what was asked to stop does not wait again."""

from __future__ import annotations

from collections.abc import Sequence

from ..backends.base import AttemptId, Finish
from ..backends.changes import Ending
from ..backends.stored import WAITS, micros, stored_pending
from ..failures import failure_of
from ..models import EventKind, TaskStatus, to_micros
from .work import Work


class Ended:
    """What became of a turn's finishes."""

    def __init__(self) -> None:
        self.refused: set[AttemptId] = set()
        self.withdrawn: set[AttemptId] = set()


def end(work: Work, finishes: Sequence[Finish]) -> Ended:
    ended = Ended()
    for finish in finishes:
        if holds(work, finish):
            _end(work, finish, ended)
        else:
            task = finish.task
            words = f"{finish.kind} came too late"
            work.changes.event(EventKind.LEASE_LOST, task.task_id, task.attempt, detail=words)
            ended.refused.add(task.attempt_id)
    return ended


def _group(work: Work, finish: Finish) -> str:
    failure = finish.failure or failure_of(finish.task.name, finish.error, finish.stacktrace)
    return work.changes.failed(finish.task.name, failure, to_micros(finish.at))


def holds(work: Work, finish: Finish) -> bool:
    """Whether the task still runs under this lease; that of a task which was not looked at is taken for granted."""
    row = work.task(finish.task.task_id)
    if row is None:
        return not work.careful
    lease = (row.status, row.attempt, row.instance)
    return lease == (TaskStatus.RUNNING, finish.task.attempt, work.turn.instance)


def _end(work: Work, finish: Finish, ended: Ended) -> None:
    task, kind, row, changes = finish.task, finish.kind, work.task(finish.task.task_id), work.changes
    run_at, ended_at = micros(finish.run_at), to_micros(finish.at)
    status = finish.status.value if run_at is None else stored_pending(run_at, work.now)
    if status in WAITS and row is not None and row.cancel_requested:  # it is not started again
        status, kind = TaskStatus.CANCELLED.value, EventKind.CANCELLED
        ended.withdrawn.add(task.attempt_id)
    waits = status in WAITS
    ending = Ending(
        task.task_id,
        task.attempt,
        work.turn.instance,
        status,
        run_at,
        None if waits else ended_at,
        finish.result,
        finish.error,
        finish.stacktrace,
        task.excused + finish.excused,
        _group(work, finish) if status == TaskStatus.FAILED else None,
    )
    changes.endings.append(ending)
    changes.event(kind, task.task_id, task.attempt, at=ended_at, detail=finish.error)
    changes.move(task.queue, task.name, TaskStatus.RUNNING.value, status)
    if not waits:
        changes.ran(task.queue, task.name, status, to_micros(task.started_at), ended_at)
    if row is not None:
        values = ending._asdict() | {"cancel_requested": False}
        work.remember(row, values if run_at is not None else values | {"run_at": row.run_at})
