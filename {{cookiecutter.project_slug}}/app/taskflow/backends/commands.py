"""What operators and housekeeping ask for, inside a turn: cancel, requeue, rescue, queues, one-offs, purge.

Owns how each command changes rows. They are few and seldom, so they go through SQLAlchemy one row at a time; what they
change they tell the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from ..models import DELAYED, RETRYABLE, EventKind, QueueConfig, TaskStatus, to_micros
from ..texts import HERE_ONLY, fields_text
from .base import (
    Answer,
    AttemptId,
    Cancel,
    CancelScheduled,
    Command,
    DeclareQueues,
    DeclareSchedules,
    Draft,
    EditQueue,
    EditSchedule,
    Fire,
    Moved,
    Note,
    Purge,
    Requeue,
    Rescue,
    Revoke,
    RunSchedule,
    Supersede,
)
from .cells import broken_words, is_sound, mended, raw, words
from .ledger import Ledger
from .rows import dumps_object, micros, moment, moved_of, status_of, stored_status
from .statements import Cursor, Statements, one_column
from .tables import instance, revoked, task
from .tables import queue as queue_table
from .timetable import Timetable

CRASH_BUDGET = 3
"""Processes that may die while running one task before it is failed as `crash_loop`."""
PURGED_TASKS = 250
"""Tasks of one status that one purge deletes at most."""


class Commands:
    def __init__(
        self,
        connection: Connection,
        cursor: Cursor,
        statements: Statements,
        ledger: Ledger,
        instance: str,
        now: datetime,
    ) -> None:
        self._connection = connection
        self._cursor = cursor
        self._sql = statements
        self._ledger = ledger
        self._instance = instance
        self._now = now
        self._at = to_micros(now)
        self._timetable = Timetable(connection, cursor, statements, ledger, now)
        self.drafts: Sequence[Draft] = self._timetable.drafts
        """Tasks that commands brought, to be admitted like any that arrives."""
        self.stopping: list[AttemptId] = []
        """What this instance runs that was asked to stop."""
        self.moved: list[Moved] = []
        """Tasks whose status a command changed."""

    def obey(self, command: Command) -> Answer:
        match command:
            case Cancel(task_id, actor):
                return self._cancel(task_id, actor)
            case Requeue(task_id, max_attempts, actor):
                return self._retry(task_id, max_attempts, actor)
            case Rescue(stamps):
                return self._rescue(stamps)
            case DeclareQueues(queues):
                return self._declare_queues(queues)
            case EditQueue(name, kind, changes, actor, note):
                return self._edit_queue(name, kind, changes, actor, note)
            case Purge(before, limit):
                return self._purge(to_micros(before), limit)
            case Note(kind, actor, detail, task_id, at):
                self._ledger.event(kind, task_id, at=micros(at), actor=actor or "", detail=fields_text(detail))
                return Answer(changed=1)
            case Revoke(session_id, expires):
                return self._revoke(session_id, to_micros(expires))
            case DeclareSchedules(schedules):
                return self._timetable.declare(schedules)
            case Fire(firings):
                return self._timetable.fire(firings)
            case EditSchedule():
                return self._timetable.edit(command)
            case RunSchedule(name, task_id, actor):
                return self._timetable.run(name, task_id, actor)
            case Supersede(draft):
                return self._supersede(draft)
            case CancelScheduled(run_key, actor):
                return self._cancel_scheduled(run_key, actor)

    def _cancel(self, task_id: str, actor: str | None) -> Answer:
        row = self._row(task_id)
        if row is None:
            return Answer()
        status = status_of(row)
        if status is TaskStatus.PENDING:
            self._withdraw(row, actor)
        elif status is TaskStatus.RUNNING:
            self._update(task_id, cancel_requested=True)
            if row.instance == self._instance:
                self.stopping.append((task_id, row.attempt))
            self._ledger.event(EventKind.CANCEL_REQUESTED, task_id, row.attempt, actor=actor)
        return Answer(before=status, changed=int(not status.terminal))

    def _withdraw(self, row: Row[Any], actor: str | None, reason: str | None = None) -> None:
        """Cancels a task that waits."""
        self._update(row.task_id, status=TaskStatus.CANCELLED, finished_at=self._at, error=reason or row.error)
        self._ledger.event(EventKind.CANCELLED, row.task_id, actor=actor, detail=reason)
        self._ledger.move(row.queue, row.name, row.status, TaskStatus.CANCELLED)
        self._ledger.ran(row.queue, row.name, TaskStatus.CANCELLED, row.started_at, self._at)
        self.moved.append(moved_of(row, TaskStatus.CANCELLED, self._now, error=reason))

    def _supersede(self, draft: Draft) -> Answer:
        waiting = self._one_offs(draft.run_key or "")
        for row in waiting:
            if row.task_id == draft.task_id:
                self._move(row, draft)
            else:
                self._withdraw(row, None, f"replaced by {draft.task_id}")
        return Answer(changed=len(waiting))

    def _move(self, row: Row[Any], draft: Draft) -> None:
        """A one-off whose idempotency key makes it the same task gets the time and the rest of its new description."""
        status = stored_status(TaskStatus.PENDING, draft.run_at, self._now)
        self._update(
            row.task_id,
            status=status,
            run_at=to_micros(draft.run_at),
            queue=draft.queue,
            priority=draft.priority,
            arguments=draft.arguments,
            tags=dumps_object(draft.tags),
        )
        self._ledger.event(EventKind.MOVED, row.task_id, detail=f"to {draft.run_at.isoformat()}")
        self._ledger.move(row.queue, row.name, row.status, None)
        self._ledger.move(draft.queue, row.name, None, status)

    def _cancel_scheduled(self, run_key: str, actor: str | None) -> Answer:
        waiting = self._one_offs(run_key)
        for row in waiting:
            self._withdraw(row, None)
            if actor is not None:
                detail = json.dumps({"run_key": run_key})
                self._ledger.event(EventKind.CANCEL_SCHEDULED, row.task_id, actor=actor, detail=detail)
        return Answer(changed=len(waiting))

    def _one_offs(self, run_key: str) -> Sequence[Row[Any]]:
        """What waits under that key."""
        found = self._connection.execute(self._sql.waiting_one_offs, {"run_key": run_key}).all()
        return [mended(row)[0] for row in found]

    def _retry(self, task_id: str, max_attempts: int, actor: str | None) -> Answer:
        row = self._row(task_id)
        if row is None:
            return Answer()
        before = status_of(row)
        if before in RETRYABLE:
            self.requeue(row, max_attempts, actor)
        return Answer(before=before, changed=int(before in RETRYABLE))

    def requeue(
        self,
        row: Row[Any],
        max_attempts: int,
        actor: str | None,
        run_at: datetime | None = None,
        queue: str | None = None,
        **changes: object,
    ) -> None:
        """`queue` is another one that it goes to."""
        status = stored_status(TaskStatus.PENDING, run_at, self._now)
        self._update(
            row.task_id,
            status=status,
            run_at=micros(run_at) if status == DELAYED else self._at,
            excused=row.attempt,
            max_attempts=max_attempts,
            crashes=0,
            started_at=None,
            finished_at=None,
            result=None,
            error=None,
            stacktrace=None,
            cancel_requested=False,
            queue=queue or row.queue,
            **changes,
        )
        self._ledger.event(EventKind.REQUEUED, row.task_id, actor=actor)
        self._ledger.move(row.queue, row.name, row.status, None)
        self._ledger.move(queue or row.queue, row.name, None, status)
        self._ledger.ran_no_more(row)

    def _rescue(self, stamps: Mapping[str, int]) -> Answer:
        beats = sa.select(instance.c.instance_id, instance.c.beat_at).where(instance.c.instance_id.in_(stamps))
        now = {row.instance_id: row.beat_at for row in self._connection.execute(beats)}
        dead = [instance_id for instance_id, stamp in stamps.items() if now.get(instance_id, 0) == stamp]
        lost = self._connection.execute(self._sql.lost, {"rows": one_column(dead)}).all()
        for stored in lost:
            row, broken = mended(stored)
            if broken:
                self.set_aside(stored.task_id, stored.queue, stored.name, TaskStatus.RUNNING, broken)
                continue
            crashes = row.crashes + 1
            if row.cancel_requested:
                kind, status, error = EventKind.CANCELLED, TaskStatus.CANCELLED, "cancelled by an operator"
            elif not row.requeue:
                kind, status, error = EventKind.INTERRUPTED, TaskStatus.INTERRUPTED, reason_of(row.name)
            elif crashes >= CRASH_BUDGET:
                kind, status = EventKind.FAILED, TaskStatus.FAILED
                error = f"crash_loop: its process died {crashes} times while it ran"
            else:
                kind, status, error = EventKind.RESCUED, TaskStatus.PENDING, None
            self._update(
                row.task_id,
                status=status,
                crashes=crashes,
                excused=row.excused + 1,
                error=error,
                run_at=self._at if status is TaskStatus.PENDING else row.run_at,
                finished_at=self._at if status.terminal else None,
                cancel_requested=False,
            )
            self._ledger.event(kind, row.task_id, row.attempt, detail=error or f"left running by {row.instance}")
            self._ledger.move(row.queue, row.name, TaskStatus.RUNNING, status)
            facts = {"excused": row.excused + 1, "started_at": moment(row.started_at), "error": error}
            self.moved.append(moved_of(row, status, self._now, **facts))
            if status.terminal:
                self._ledger.ran(row.queue, row.name, status, row.started_at, self._at)
        return Answer(changed=len(lost))

    def set_aside(
        self, task_id: object, queue: object, name: object, before: TaskStatus, broken: Sequence[str]
    ) -> None:
        """Ends a task whose row cannot be read, so that nothing waits behind it. Its cells are as they were found."""
        reason = broken_words(broken)
        values = {"before": str(before), "raw_id": raw(task_id), "reason": reason, "at": self._at}
        self._sql.set_aside.run(self._cursor, **values)
        shown_id, shown_name = words(task_id), words(name)
        self._ledger.event(EventKind.FAILED, shown_id, detail=reason)
        self._ledger.move(words(queue), shown_name, before, TaskStatus.FAILED)
        self.moved.append(Moved(shown_id, shown_name, {}, TaskStatus.FAILED, self._now, 0, 0, error=reason))

    def _declare_queues(self, declared: Mapping[str, QueueConfig]) -> Answer:
        known = {row.name: row.declared for row in self._connection.execute(sa.select(queue_table)).all()}
        for name, config in declared.items():
            limits = {"concurrency": config.concurrency, "max_size": config.max_size}
            text = json.dumps(limits)
            if known.get(name) != text:
                self._set_queue(name, {**limits, "declared": text})
        return Answer()

    def _edit_queue(
        self, name: str, kind: EventKind, changes: Mapping[str, Any], actor: str | None, note: str | None
    ) -> Answer:
        row = self._connection.execute(sa.select(queue_table).where(queue_table.c.name == name)).first()
        before = {column: getattr(row, column, None) for column in changes}
        self._set_queue(name, changes)
        detail = {"queue": name, "before": before, "after": dict(changes), "note": note}
        self._ledger.event(kind, "", actor=actor or "", detail=json.dumps(detail))
        return Answer(changed=1)

    def _set_queue(self, name: str, changes: Mapping[str, Any]) -> None:
        newest = self._connection.execute(sa.select(sa.func.max(queue_table.c.version))).scalar() or 0
        values = {"paused": False, **changes, "name": name, "version": newest + 1}
        statement = self._sql.insert(queue_table).values(values)
        update = {**changes, "version": newest + 1}
        self._connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=update))

    def _revoke(self, session_id: str, expires: int) -> Answer:
        self._connection.execute(revoked.delete().where(revoked.c.expires_at <= self._at))
        row = {"session_id": session_id, "expires_at": expires}
        self._connection.execute(self._sql.insert(revoked).values(row).on_conflict_do_nothing())
        return Answer(changed=1)

    def _purge(self, before: int, limit: int) -> Answer:
        """Rows of every kind count, so that no purge holds the writer for long: a task may have a thousand lines."""
        deleted, room = 0, limit
        for status in (status for status in TaskStatus if status.terminal):
            values = {"status": str(status), "before": before, "most": min(room, PURGED_TASKS)}
            ids = [task_id for (task_id,) in self._sql.old.run(self._cursor, **values).fetchall()]
            listed = [(task_id,) for task_id in ids if is_sound("task_id", task_id)]
            for words_of in (self._sql.purge_logs, self._sql.purge_events):
                if listed and room:
                    room -= words_of.change(self._cursor, listed, most=room)
            gone = list(self._sql.purge.change_each(self._cursor, listed[:room])) if listed and room else []
            for damaged in (task_id for task_id in ids if not is_sound("task_id", task_id)):
                values = {"status": str(status), "raw_id": raw(damaged)}
                gone += self._sql.purge_damaged.run(self._cursor, **values).fetchall()
            for queue, name, started_at, finished_at in gone:
                self._ledger.move(words(queue), words(name), status, None)
                if is_sound("at", started_at) and is_sound("at", finished_at):
                    self._ledger.ran(words(queue), words(name), status, finished_at, started_at)
            deleted += len(gone)
            room -= len(gone)
            if room <= 0 or len(ids) == PURGED_TASKS:
                return Answer(changed=deleted, more=True)
        skips = self._sql.purge_skips.run(self._cursor, before=before, most=room).rowcount
        return Answer(changed=deleted, more=skips == room)

    # -- rows

    def _row(self, task_id: str) -> Row[Any] | None:
        found = self.rows([task_id])
        return found[0] if found else None

    def rows(self, task_ids: Sequence[str]) -> Sequence[Row[Any]]:
        """Those that are broken as well as they can be read."""
        found = self._connection.execute(self._sql.rows, {"rows": one_column(task_ids)}).all()
        return [mended(row)[0] for row in found]

    def _update(self, task_id: str, **values: object) -> None:
        self._connection.execute(sa.update(task).where(task.c.task_id == task_id).values(values))


def reason_of(name: str) -> str:
    """Why a task of that name was interrupted."""
    if name.endswith(HERE_ONLY):
        return "its process went away, and only that process could run it"
    return "its process went away"
