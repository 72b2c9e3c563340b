"""Writes one turn on an open transaction.

Owns the order of a turn (record what finished, admit what arrived, obey, claim what is next) and the history it leaves:
every change of status goes through `_event` and `_move`, which are written last, so that events and counts always
agree with the rows.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from ..models import DELAYED, RETRYABLE, EventKind, TaskStatus, from_micros, to_micros
from .base import (
    Answer,
    Cancel,
    Claimed,
    Command,
    Demand,
    Draft,
    Finish,
    LogLine,
    Progress,
    Requeue,
    Rescue,
    Turn,
    TurnResult,
)
from .rows import claimed_of, dumps_object, first_claim, micros, status_of, stored_status
from .statements import Cursor, Prepared, Statements
from .tables import task

CLAIM_BATCH = 250
"""Tasks of one queue that one turn claims at most: the first run while the next are claimed."""
CRASH_BUDGET = 3
"""Processes that may die while running one task before it is failed as `crash_loop`."""


class Room:
    """What may still be claimed in this turn: free slots of executors and of queues, counted down."""

    def __init__(self, demand: Demand) -> None:
        self._names = demand.names
        self._slots = {kind: free for kind, free in demand.slots.items() if free > 0}
        self._queues = dict(demand.queues)

    def startable(self, names: Collection[str]) -> set[str]:
        """Those names that this instance knows and has a slot for."""
        return {name for name in names if self._names.get(name) in self._slots}

    def free(self, queue: str) -> int:
        return max(0, min(sum(self._slots.values()), self._queues.get(queue, CLAIM_BATCH), CLAIM_BATCH))

    def take(self, queue: str, name: str) -> bool:
        """One slot for a task of that name, if there is one."""
        kind = self._names.get(name, "")
        if self.free(queue) == 0 or kind not in self._slots:
            return False
        self._slots[kind] -= 1
        if self._slots[kind] == 0:
            del self._slots[kind]
        if queue in self._queues:
            self._queues[queue] -= 1
        return True


class TurnWriter:
    def __init__(self, connection: Connection, cursor: Cursor, statements: Statements, turn: Turn) -> None:
        self._connection = connection
        self._cursor = cursor
        self._sql = statements
        self._turn = turn
        self._at = to_micros(turn.now)
        self._events: list[Sequence[Any]] = []
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._micros: Counter[tuple[str, str, str]] = Counter()

    def write(self, rotation: int) -> TurnResult:
        """`rotation` changes from turn to turn, and with it the queue that is served first."""
        turn = self._turn
        room = Room(turn.demand) if turn.demand else None
        refused = self._record(turn.finishes) if turn.finishes else frozenset()
        next_due = self._stage()  # before the arrivals: they must not overtake what has become due
        started: list[Claimed] = []
        existing = self._admit(turn.drafts, room, started) if turn.drafts else frozenset()
        answers = [self._obey(command) for command in turn.commands]
        claimed, more = self._claim(room, rotation) if room else ([], False)
        claimed = started + claimed
        if turn.held is not None:
            claimed += self._orphans(turn.held, {item.task_id for item in claimed})
        self._write_logs(turn.logs)
        self._write_progress(turn.progress)
        self._bulk(self._sql.events, self._events)
        self._write_counts()
        return TurnResult(
            existing=existing,
            refused=refused,
            answers=answers,
            claimed=claimed,
            more=more,
            next_due=self._earliest(next_due, turn.drafts),
        )

    # -- record

    def _record(self, finishes: Sequence[Finish]) -> frozenset[str]:
        ended = [to_micros(finish.at) for finish in finishes]
        rows = [
            (
                finish.task.task_id,
                finish.task.attempt,
                self._turn.instance,
                stored_status(finish.status, finish.run_at, self._turn.now),
                micros(finish.run_at),
                ended[place],
                finish.result,
                finish.error,
                finish.stacktrace,
                int(finish.excused),
            )
            for place, finish in enumerate(finishes)
        ]
        written = dict(self._sql.record.run_rows(self._cursor, rows).fetchall())
        for place, finish in enumerate(finishes):
            item = finish.task
            status = written.get(item.task_id)
            if status is None:
                self._event(EventKind.LEASE_LOST, item.task_id, item.attempt, detail=f"{finish.kind} came too late")
                continue
            kind = EventKind.CANCELLED if status == TaskStatus.CANCELLED else finish.kind
            self._event(kind, item.task_id, item.attempt, at=ended[place], detail=finish.error)
            self._move(item.queue, item.name, TaskStatus.RUNNING, status)
            if status not in (TaskStatus.PENDING, DELAYED):
                self._micros[item.queue, item.name, status] += ended[place] - to_micros(item.started_at)
        return frozenset(finish.task.task_id for finish in finishes if finish.task.task_id not in written)

    # -- admit

    def _admit(self, drafts: Sequence[Draft], room: Room | None, started: list[Claimed]) -> frozenset[str]:
        """Stores the drafts; those for which there is a slot at once are stored as running and appended to `started`."""
        unique = {draft.task_id: draft for draft in drafts}
        at_once = self._startable(unique.values(), room) if room else frozenset()
        status = {
            task_id: TaskStatus.RUNNING
            if task_id in at_once
            else stored_status(TaskStatus.PENDING, draft.run_at, self._turn.now)
            for task_id, draft in unique.items()
        }
        rows = [self._draft_row(draft, status[task_id]) for task_id, draft in unique.items()]
        written = {task_id for (task_id,) in self._sql.admit.run_rows(self._cursor, rows).fetchall()}
        for task_id, draft in unique.items():
            if task_id in written:
                self._event(EventKind.ACCEPTED, task_id, at=to_micros(draft.created_at))
                self._move(draft.queue, draft.name, None, status[task_id])
                if task_id in at_once:
                    self._event(EventKind.STARTED, task_id, 1)
                    started.append(first_claim(draft, self._turn.now))
        existing = unique.keys() - written
        if existing:
            self._rearm([unique[task_id] for task_id in existing])
        return frozenset(existing)

    def _startable(self, drafts: Collection[Draft], room: Room) -> frozenset[str]:
        """Drafts that would be claimed in this very turn: nothing waits before them in their queue."""
        waiting = self._waiting()
        due = [draft for draft in drafts if draft.queue not in waiting and draft.run_at <= self._turn.now]
        due.sort(key=lambda draft: (-(draft.priority or 0), draft.run_at, draft.task_id))
        return frozenset(draft.task_id for draft in due if room.take(draft.queue, draft.name))

    def _draft_row(self, draft: Draft, status: str) -> Sequence[Any]:
        """In the order of DRAFT_COLUMNS."""
        runs = status == TaskStatus.RUNNING
        return (
            draft.task_id,
            draft.name,
            draft.queue,
            draft.priority,
            draft.executor,
            draft.source,
            status,
            int(runs),
            self._turn.instance if runs else None,
            self._at if runs else None,
            draft.max_attempts,
            to_micros(draft.created_at),
            to_micros(draft.run_at),
            draft.arguments,
            dumps_object(draft.tags),
            draft.requeue,
            draft.key,
            draft.retry_of,
            draft.trace,
        )

    def _rearm(self, drafts: Sequence[Draft]) -> None:
        """An idempotency key whose task failed or was interrupted runs that task again, with the new arguments."""
        by_id = {draft.task_id: draft for draft in drafts if draft.key is not None}
        for row in self._rows(list(by_id)):
            if row.status in (TaskStatus.FAILED, TaskStatus.INTERRUPTED):
                draft = by_id[row.task_id]
                self._requeue(row, draft.max_attempts, None, arguments=draft.arguments)

    # -- obey

    def _obey(self, command: Command) -> Answer:
        match command:
            case Cancel(task_id, actor):
                return self._cancel(task_id, actor)
            case Requeue(task_id, max_attempts, actor):
                return self._retry(task_id, max_attempts, actor)
            case Rescue(instances):
                return self._rescue(instances)

    def _cancel(self, task_id: str, actor: str | None) -> Answer:
        row = self._row(task_id)
        if row is None:
            return Answer()
        status = status_of(row)
        if status is TaskStatus.PENDING:
            self._update(task_id, status=TaskStatus.CANCELLED, finished_at=self._at)
            self._event(EventKind.CANCELLED, task_id, actor=actor)
            self._move(row.queue, row.name, row.status, TaskStatus.CANCELLED)
            self._count_time(row, TaskStatus.CANCELLED, self._at)
        elif status is TaskStatus.RUNNING:
            self._update(task_id, cancel_requested=True)
            self._event(EventKind.CANCEL_REQUESTED, task_id, row.attempt, actor=actor)
        return Answer(before=status, changed=int(not status.terminal), instance=row.instance)

    def _retry(self, task_id: str, max_attempts: int, actor: str | None) -> Answer:
        row = self._row(task_id)
        if row is None:
            return Answer()
        before = status_of(row)
        if before in RETRYABLE:
            self._requeue(row, max_attempts, actor)
        return Answer(before=before, changed=int(before in RETRYABLE))

    def _requeue(self, row: Row[Any], max_attempts: int, actor: str | None, **changes: object) -> None:
        self._update(
            row.task_id,
            status=TaskStatus.PENDING,
            run_at=self._at,
            excused=row.attempt,
            max_attempts=max_attempts,
            crashes=0,
            started_at=None,
            finished_at=None,
            result=None,
            error=None,
            stacktrace=None,
            cancel_requested=False,
            **changes,
        )
        self._event(EventKind.REQUEUED, row.task_id, actor=actor)
        self._move(row.queue, row.name, row.status, TaskStatus.PENDING)
        self._count_time(row, row.status, row.finished_at, -1)

    def _rescue(self, instances: Sequence[str]) -> Answer:
        rows = json.dumps([[instance] for instance in instances])
        lost = self._connection.execute(self._sql.lost, {"rows": rows}).all()
        for row in lost:
            crashes = row.crashes + 1
            if row.cancel_requested:
                kind, status, error = EventKind.CANCELLED, TaskStatus.CANCELLED, "cancelled by an operator"
            elif not row.requeue:
                kind, status, error = EventKind.INTERRUPTED, TaskStatus.INTERRUPTED, "its process went away"
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
            self._event(kind, row.task_id, row.attempt, detail=error or f"left running by {row.instance}")
            self._move(row.queue, row.name, TaskStatus.RUNNING, status)
            if status.terminal:
                self._count_time(row, status, self._at)
        return Answer(changed=len(lost))

    # -- claim

    def _stage(self) -> datetime | None:
        """Makes ready what has become due, and says when the next one will."""
        due = self._sql.next_due.run(self._cursor).fetchone()
        if due is not None and due[0] <= self._at:
            for queue, name in self._sql.stage.run(self._cursor, at=self._at).fetchall():
                self._move(queue, name, DELAYED, TaskStatus.PENDING)
            due = self._sql.next_due.run(self._cursor).fetchone()
        return None if due is None else from_micros(due[0])

    def _earliest(self, next_due: datetime | None, drafts: Sequence[Draft]) -> datetime | None:
        later = [draft.run_at for draft in drafts if draft.run_at > self._turn.now]
        return min([*later, next_due] if next_due else later, default=None)

    def _claim(self, room: Room, rotation: int) -> tuple[list[Claimed], bool]:
        """Takes what may start, queue by queue; says whether there may be more that could."""
        waiting = self._waiting()
        queues = sorted(waiting)
        first = rotation % len(queues) if queues else 0
        chosen: list[str] = []
        more = False
        for queue in queues[first:] + queues[:first]:
            names, most = room.startable(waiting[queue]), room.free(queue)
            if names and most:
                candidates = self._ready(queue, names, waiting[queue], most)
                more = more or len(candidates) == most
                chosen += [task_id for task_id, name in candidates if room.take(queue, name)]
        return (self._seize(chosen) if chosen else []), more

    def _waiting(self) -> Mapping[str, Collection[str]]:
        """Queue -> names of which tasks are ready, this turn's own changes included."""
        numbers = Counter({(queue, name): n for queue, name, n in self._sql.waiting.run(self._cursor).fetchall()})
        for (queue, name, status), n in self._counts.items():
            if status == TaskStatus.PENDING:
                numbers[queue, name] += n
        found: defaultdict[str, set[str]] = defaultdict(set)
        for (queue, name), n in numbers.items():
            if n > 0:
                found[queue].add(name)
        return found

    def _ready(self, queue: str, names: set[str], waiting: Collection[str], most: int) -> list[tuple[Any, ...]]:
        if names.issuperset(waiting):
            return self._sql.ready.run(self._cursor, queue=queue, most=most).fetchall()
        listed = json.dumps([[name] for name in sorted(names)])
        return self._sql.ready_named.run(self._cursor, queue=queue, most=most, names=listed).fetchall()

    def _seize(self, chosen: Sequence[str]) -> list[Claimed]:
        """In the order in which they were chosen."""
        rows = [(task_id,) for task_id in chosen]
        seized = self._sql.seize.run_rows(self._cursor, rows, me=self._turn.instance, at=self._at).fetchall()
        claimed = {cells[0]: claimed_of(cells, self._turn.now) for cells in seized}
        for item in claimed.values():
            self._event(EventKind.STARTED, item.task_id, item.attempt)
            self._move(item.queue, item.name, TaskStatus.PENDING, TaskStatus.RUNNING)
        return [claimed[task_id] for task_id in chosen if task_id in claimed]

    def _orphans(self, held: frozenset[str], fresh: Collection[str]) -> list[Claimed]:
        rows = self._sql.held.run(self._cursor, me=self._turn.instance).fetchall()
        return [
            claimed_of(cells, from_micros(started_at))
            for *cells, started_at in map(tuple, rows)
            if cells[0] not in held and cells[0] not in fresh
        ]

    # -- what is written last

    def _write_logs(self, lines: Sequence[LogLine]) -> None:
        rows = [
            (line.task_id, to_micros(line.at), line.level, line.attempt, line.message, dumps_object(line.extra))
            for line in lines
        ]
        self._bulk(self._sql.logs, rows)

    def _write_progress(self, progress: Sequence[Progress]) -> None:
        rows = [(item.task_id, item.attempt, self._turn.instance, dumps_object(item.value)) for item in progress]
        self._bulk(self._sql.progress, rows)

    def _write_counts(self) -> None:
        keys = [key for key in self._counts.keys() | self._micros.keys() if self._counts[key] or self._micros[key]]
        self._bulk(self._sql.count, [(*key, self._counts[key], self._micros[key]) for key in sorted(keys)])

    def _bulk(self, statement: Prepared, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            statement.run_rows(self._cursor, rows)

    # -- helpers

    def _event(
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
        self._events.append((task_id, at or self._at, kind, number, self._turn.instance, actor, detail))

    def _move(self, queue: str, name: str, before: str | None, after: str) -> None:
        if before is not None:
            self._counts[queue, name, before] -= 1
        self._counts[queue, name, after] += 1

    def _count_time(self, row: Row[Any], status: str, until: int, sign: int = 1) -> None:
        """The time from a task's last start to its end counts under the status it ended with."""
        if row.started_at is not None:
            self._micros[row.queue, row.name, status] += sign * (until - row.started_at)

    def _row(self, task_id: str) -> Row[Any] | None:
        found = self._rows([task_id])
        return found[0] if found else None

    def _rows(self, task_ids: Sequence[str]) -> Sequence[Row[Any]]:
        rows = json.dumps([[task_id] for task_id in task_ids])
        return self._connection.execute(self._sql.rows, {"rows": rows}).all()

    def _update(self, task_id: str, **values: object) -> None:
        self._connection.execute(sa.update(task).where(task.c.task_id == task_id).values(values))
