"""Writes one turn on an open transaction.

Owns the order of a turn (record what finished, admit what arrived, obey, claim what is next) and the history it leaves:
every change of status goes through `_event` and `_move`, which are written last, so that events and counts always
agree with the rows.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import chain
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from ..models import DELAYED, RETRYABLE, EventKind, QueueConfig, QueueState, TaskStatus, from_micros, to_micros
from .base import (
    Answer,
    Cancel,
    Claimed,
    Command,
    DeclareQueues,
    Demand,
    Draft,
    EditQueue,
    Finish,
    LogLine,
    Moved,
    Note,
    Progress,
    Purge,
    Requeue,
    Rescue,
    Turn,
    TurnResult,
)
from .rows import claimed_of, dumps_object, first_claim, micros, moment, moved_of, status_of, stored_status
from .statements import Cursor, Prepared, Statements
from .tables import queue as queue_table
from .tables import task

CLAIM_BATCH = 250
"""Tasks of one queue that one turn claims at most: the first run while the next are claimed."""
REARMED = (TaskStatus.FAILED, TaskStatus.INTERRUPTED, TaskStatus.REJECTED)
"""What a task may have become for its idempotency key to run it again."""
CRASH_BUDGET = 3
"""Processes that may die while running one task before it is failed as `crash_loop`."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What became of a turn's drafts."""

    existing: frozenset[str] = frozenset()
    rejected: Mapping[str, int] = field(default_factory=dict)
    started: Sequence[Claimed] = ()


class QueueBook:
    """The queues' limits, remembered between turns and read again when their version has changed."""

    def __init__(self) -> None:
        self._version: int | None = None
        self.queues: Mapping[str, QueueState] = {}

    def refresh(self, cursor: Cursor, statements: Statements) -> None:
        row = statements.queue_version.run(cursor).fetchone()
        version = row[0] if row else None
        if version != self._version:
            rows = statements.queues.run(cursor).fetchall()
            self.queues = {
                name: QueueState(name, concurrency, max_size, bool(paused), reason)
                for name, concurrency, max_size, paused, reason in rows
            }
            self._version = version


class Levels:
    """How many tasks are ready and running, by queue and name, at one moment of a turn."""

    def __init__(self, counts: Iterable[tuple[str, str, str, int]]) -> None:
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

    def queues(self) -> list[str]:
        return sorted(queue for queue, n in self.pending.items() if n > 0)


class Room:
    """What may still be claimed in this turn: free slots of executors, and what each queue allows, counted down."""

    def __init__(self, demand: Demand, queues: Mapping[str, QueueState], levels: Levels) -> None:
        self._names = demand.names
        self._slots = {kind: free for kind, free in demand.slots.items() if free > 0}
        self._queues = queues
        self._running = Counter(levels.running)

    def startable(self, names: Collection[str]) -> set[str]:
        """Those names that this instance knows and has a slot for."""
        return {name for name in names if self._names.get(name) in self._slots}

    def free(self, queue: str) -> int:
        return max(0, min(sum(self._slots.values()), self._allowed(queue), CLAIM_BATCH))

    def take(self, queue: str, name: str) -> bool:
        """One slot for a task of that name, if there is one."""
        kind = self._names.get(name, "")
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


class TurnWriter:
    def __init__(
        self, connection: Connection, cursor: Cursor, statements: Statements, book: QueueBook, turn: Turn
    ) -> None:
        self._connection = connection
        self._cursor = cursor
        self._sql = statements
        self._book = book
        self._turn = turn
        self._at = to_micros(turn.now)
        self._counts_before: Sequence[tuple[str, str, str, int]] = ()
        self._stopping: list[str] = []
        self._withdrawn: list[str] = []
        self._moved: list[Moved] = []
        self._events: list[Sequence[Any]] = []
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._micros: Counter[tuple[str, str, str]] = Counter()

    def write(self, rotation: int) -> TurnResult:
        """`rotation` changes from turn to turn, and with it the queue that is served first."""
        turn = self._turn
        self._counts_before = self._sql.levels.run(self._cursor).fetchall()
        refused = self._record(turn.finishes) if turn.finishes else frozenset()
        answers = [self._obey(command) for command in turn.commands]
        self._book.refresh(self._cursor, self._sql)
        next_due = self._stage() if turn.demand else None  # before the arrivals, which must not overtake what is due
        levels = self._levels()
        room = Room(turn.demand, self._book.queues, levels) if turn.demand else None
        admitted = self._admit(turn.drafts, room, levels) if turn.drafts else Admitted()
        claimed, more = self._claim(room, rotation) if room else ([], False)
        claimed = [*admitted.started, *claimed]
        if turn.held is not None:
            claimed += self._orphans(turn.held, {item.task_id for item in claimed})
        self._write_logs(turn.logs)
        self._write_progress(turn.progress)
        self._bulk(self._sql.events, self._events)
        self._write_counts()
        return TurnResult(
            existing=admitted.existing,
            rejected=admitted.rejected,
            refused=refused,
            answers=answers,
            claimed=claimed,
            withdrawn=frozenset(self._withdrawn),
            moved=self._moved,
            stopping=self._stopping,
            more=more or bool(admitted.existing),  # they may have held slots that others wait for
            next_due=self._earliest(next_due) if turn.demand else None,
            queues=self._queues_now(),
        )

    def _queues_now(self) -> Mapping[str, QueueState]:
        if not self._book.queues:
            return {}
        pending = self._levels().pending
        return {name: replace(state, pending=pending[name]) for name, state in self._book.queues.items()}

    def _levels(self) -> Levels:
        """This turn's own changes included."""
        changes = ((queue, name, status, n) for (queue, name, status), n in self._counts.items())
        return Levels(chain(self._counts_before, changes))

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
            kind = finish.kind
            if status == TaskStatus.CANCELLED and finish.status is not TaskStatus.CANCELLED:
                kind = EventKind.CANCELLED
                self._withdrawn.append(item.task_id)
            self._event(kind, item.task_id, item.attempt, at=ended[place], detail=finish.error)
            self._move(item.queue, item.name, TaskStatus.RUNNING, status)
            if status not in (TaskStatus.PENDING, DELAYED):
                self._micros[item.queue, item.name, status] += ended[place] - to_micros(item.started_at)
        return frozenset(finish.task.task_id for finish in finishes if finish.task.task_id not in written)

    # -- admit

    def _admit(self, drafts: Sequence[Draft], room: Room | None, levels: Levels) -> Admitted:
        """Stores the drafts. Those for which there is a slot at once are stored as running, those for which their
        queue has no place are stored as rejected."""
        unique: dict[str, Draft] = {}
        for draft in drafts:
            unique.setdefault(draft.task_id, draft)  # of one key twice in a turn the first is the task, as it is in two
        at_once = self._startable(unique.values(), room, levels) if room else frozenset()
        status: dict[str, str] = dict.fromkeys(at_once, TaskStatus.RUNNING)
        waiting = [draft for draft in unique.values() if draft.task_id not in at_once]
        status |= self._waiting_status(waiting, levels)
        rows = [self._draft_row(draft, status[task_id]) for task_id, draft in unique.items()]
        written = {task_id for (task_id,) in self._sql.admit.run_rows(self._cursor, rows).fetchall()}
        for task_id, draft in unique.items():
            if task_id in written:
                self._admitted(draft, status[task_id])
        existing = unique.keys() - written
        refused = {task_id for task_id in written if status[task_id] == TaskStatus.REJECTED}
        if existing:
            refused |= self._rearm([unique[task_id] for task_id in existing], status)
        return Admitted(
            existing=frozenset(existing),
            rejected={task_id: self._max_size(unique[task_id]) for task_id in refused},
            started=[
                first_claim(draft, self._turn.now)
                for task_id, draft in unique.items()
                if task_id in at_once and task_id in written
            ],
        )

    def _admitted(self, draft: Draft, status: str) -> None:
        rejected = status == TaskStatus.REJECTED
        kind = EventKind.REJECTED if rejected else EventKind.ACCEPTED
        self._event(kind, draft.task_id, at=to_micros(draft.created_at))
        if status == TaskStatus.RUNNING:
            self._event(EventKind.STARTED, draft.task_id, 1)
        self._move(draft.queue, draft.name, None, status)

    def _startable(self, drafts: Collection[Draft], room: Room, levels: Levels) -> frozenset[str]:
        """Drafts that would be claimed in this very turn: nothing waits before them in their queue."""
        due = [draft for draft in drafts if self._is_due(draft) and not levels.pending[draft.queue]]
        due.sort(key=lambda draft: (-(draft.priority or 0), draft.run_at, draft.task_id))
        return frozenset(draft.task_id for draft in due if room.take(draft.queue, draft.name))

    def _waiting_status(self, drafts: Sequence[Draft], levels: Levels) -> dict[str, str]:
        """Pending, delayed, or rejected where the queue already holds its `max_size` of ready tasks."""
        status: dict[str, str] = {}
        ready = Counter(levels.pending)
        for draft in drafts:
            state = self._book.queues.get(draft.queue)
            if draft.rejected_by is not None:
                status[draft.task_id] = TaskStatus.REJECTED
            elif not self._is_due(draft):
                status[draft.task_id] = stored_status(TaskStatus.PENDING, draft.run_at, self._turn.now)
            elif state and state.max_size is not None and ready[draft.queue] >= state.max_size:
                status[draft.task_id] = TaskStatus.REJECTED
            else:
                status[draft.task_id] = TaskStatus.PENDING
                ready[draft.queue] += 1
        return status

    def _is_due(self, draft: Draft) -> bool:
        return draft.run_at <= self._turn.now and draft.rejected_by is None

    def _max_size(self, draft: Draft) -> int:
        state = self._book.queues.get(draft.queue)
        return draft.rejected_by or (state.max_size if state and state.max_size else 0)

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

    def _rearm(self, drafts: Sequence[Draft], status: Mapping[str, str]) -> set[str]:
        """An idempotency key whose task failed, was interrupted or found its queue full runs that task again, with what
        its new caller said. Returns those for which the queue has no place this time."""
        by_id = {draft.task_id: draft for draft in drafts if draft.key is not None}
        refused: set[str] = set()
        for row in self._rows(list(by_id)):
            if row.status not in REARMED:
                continue
            draft = by_id[row.task_id]
            if status[row.task_id] == TaskStatus.REJECTED:
                refused.add(row.task_id)
            else:
                said = {"arguments": draft.arguments, "priority": draft.priority, "trace": draft.trace}
                self._requeue(row, draft.max_attempts, None, draft.run_at, tags=dumps_object(draft.tags), **said)
        return refused

    # -- obey

    def _obey(self, command: Command) -> Answer:
        match command:
            case Cancel(task_id, actor):
                return self._cancel(task_id, actor)
            case Requeue(task_id, max_attempts, actor):
                return self._retry(task_id, max_attempts, actor)
            case Rescue(instances):
                return self._rescue(instances)
            case DeclareQueues(queues):
                return self._declare_queues(queues)
            case EditQueue(name, kind, changes, actor, note):
                return self._edit_queue(name, kind, changes, actor, note)
            case Purge(before, limit):
                return self._purge(to_micros(before), limit)
            case Note(kind, actor, detail):
                self._event(kind, "", actor=actor or "", detail=json.dumps(detail))
                return Answer(changed=1)

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
            self._moved.append(moved_of(row, TaskStatus.CANCELLED, self._turn.now))
        elif status is TaskStatus.RUNNING:
            self._update(task_id, cancel_requested=True)
            if row.instance == self._turn.instance:
                self._stopping.append(task_id)
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

    def _requeue(
        self, row: Row[Any], max_attempts: int, actor: str | None, run_at: datetime | None = None, **changes: object
    ) -> None:
        status = stored_status(TaskStatus.PENDING, run_at, self._turn.now)
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
            **changes,
        )
        self._event(EventKind.REQUEUED, row.task_id, actor=actor)
        self._move(row.queue, row.name, row.status, status)
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
            facts = {"excused": row.excused + 1, "started_at": moment(row.started_at), "error": error}
            self._moved.append(moved_of(row, status, self._turn.now, **facts))
            if status.terminal:
                self._count_time(row, status, self._at)
        return Answer(changed=len(lost))

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
        self._event(kind, "", actor=actor or "", detail=json.dumps(detail))
        return Answer(changed=1)

    def _set_queue(self, name: str, changes: Mapping[str, Any]) -> None:
        newest = self._connection.execute(sa.select(sa.func.max(queue_table.c.version))).scalar() or 0
        values = {"paused": False, **changes, "name": name, "version": newest + 1}
        statement = self._sql.insert(queue_table).values(values)
        update = {**changes, "version": newest + 1}
        self._connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=update))

    def _purge(self, before: int, limit: int) -> Answer:
        deleted = 0
        for status in (status for status in TaskStatus if status.terminal):
            values = {"status": status, "before": before, "most": limit - deleted}
            rows = self._sql.purge.run(self._cursor, **values).fetchall() if deleted < limit else []
            for _, queue, name, started_at, finished_at in rows:
                self._counts[queue, name, status] -= 1
                if started_at is not None and finished_at is not None:
                    self._micros[queue, name, status] -= finished_at - started_at
            gone = [(task_id,) for task_id, *_ in rows]
            self._bulk(self._sql.purge_events, gone)
            self._bulk(self._sql.purge_logs, gone)
            deleted += len(rows)
        return Answer(changed=deleted)

    # -- claim

    def _stage(self) -> datetime | None:
        """Makes ready what has become due, and says when the next one will."""
        due = self._sql.next_due.run(self._cursor).fetchone()
        if due is not None and due[0] <= self._at:
            for queue, name in self._sql.stage.run(self._cursor, at=self._at).fetchall():
                self._move(queue, name, DELAYED, TaskStatus.PENDING)
            due = self._sql.next_due.run(self._cursor).fetchone()
        return None if due is None else from_micros(due[0])

    def _earliest(self, next_due: datetime | None) -> datetime | None:
        """With what arrived after the look at what is due."""
        later = [draft.run_at for draft in self._turn.drafts if draft.run_at > self._turn.now]
        return min([*later, next_due] if next_due else later, default=None)

    def _claim(self, room: Room, rotation: int) -> tuple[list[Claimed], bool]:
        """Takes what may start, queue by queue; says whether there may be more that could."""
        levels = self._levels()
        queues = levels.queues()
        first = rotation % len(queues) if queues else 0
        chosen: list[str] = []
        more = False
        for queue in queues[first:] + queues[:first]:
            waiting = levels.waiting(queue)
            names, most = room.startable(waiting), room.free(queue)
            if names and most:
                candidates = self._ready(queue, names, waiting, most)
                more = more or len(candidates) == most
                chosen += [task_id for task_id, name in candidates if room.take(queue, name)]
        return (self._seize(chosen) if chosen else []), more

    def _ready(self, queue: str, names: set[str], waiting: Collection[str], most: int) -> Sequence[Any]:
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
