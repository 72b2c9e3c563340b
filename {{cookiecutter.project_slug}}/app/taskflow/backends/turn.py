"""Writes one turn on an open transaction.

Owns the order of a turn: record what finished, obey, admit what arrived, claim what is next. Called by the backend on
the writer's thread, and for `enqueue(session=...)` inside the caller's transaction.

A turn is first written in the belief that every lease holds and every id is new; the numbers of changed rows prove it.
Where they do not, it raises `Mistaken`, is rolled back, and written once more with `careful=True`, row by row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from ..models import DELAYED, EventKind, QueueState, TaskStatus, from_micros, to_micros
from .base import AttemptId, Claimed, Draft, Finish, LogLine, Progress, Turn, TurnResult
from .cells import is_sound, unreadable, words
from .commands import Commands
from .ledger import Ledger
from .room import Levels, QueueBook, Room
from .rows import dumps_object, first_claim, held_claim, micros, next_claim, stored_status
from .statements import (
    CLAIMED_COLUMNS,
    DRAFT_COLUMNS,
    EXECUTORS,
    FINISH_COLUMNS,
    Cursor,
    Prepared,
    Statements,
    one_column,
)
from .tables import task

Rows = Sequence[Sequence[Any]]
CLAIMED_NAMES = [column.name for column in CLAIMED_COLUMNS]
CREATED_AT = DRAFT_COLUMNS.index(task.c.created_at)
ENDED_AT = FINISH_COLUMNS.index(task.c.finished_at)
REARMED = (TaskStatus.FAILED, TaskStatus.INTERRUPTED, TaskStatus.REJECTED)
"""What an idempotency key that comes again finds its task in, and runs it again."""


class Mistaken(Exception):
    """Fewer rows changed than were to: a lease was lost or an id was there already. Nobody knows yet which."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What became of a turn's drafts."""

    existing: frozenset[str] = frozenset()
    rejected: Mapping[str, int] = field(default_factory=dict)
    started: Sequence[Claimed] = ()


class TurnWriter:
    def __init__(
        self,
        connection: Connection,
        cursor: Cursor,
        statements: Statements,
        book: QueueBook,
        turn: Turn,
        *,
        careful: bool,
    ) -> None:
        self._cursor = cursor
        self._sql = statements
        self._book = book
        self._turn = turn
        self._careful = careful
        self._at = to_micros(turn.now)
        levels, self._version, self._first_due = self._look()
        self._ledger = Ledger(cursor, statements, turn.instance, turn.now, levels)
        self._commands = Commands(connection, cursor, statements, self._ledger, turn.instance, turn.now)
        self._withdrawn: list[AttemptId] = []
        self._unknown: set[str] = set()

    def write(self, rotation: int) -> TurnResult:
        """`rotation` changes from turn to turn, and with it the queue that is served first."""
        turn = self._turn
        self._write_progress(turn.progress)  # while the task still runs: it may end in this very turn
        refused = self._record(turn.finishes) if turn.finishes else frozenset()
        answers = [self._commands.obey(command) for command in turn.commands]
        if turn.commands:
            self._look_again()
        self._book.refresh(self._version, self._cursor, self._sql)
        if turn.demand:
            self._stage()  # before the arrivals, which must not overtake what is due
        levels = self._ledger.levels()
        room = Room(turn.demand, self._book.queues, levels) if turn.demand else None
        arrivals = [*turn.drafts, *self._commands.drafts]
        admitted = self._admit(arrivals, room, levels) if arrivals else Admitted()
        claimed, more = self._claim(room, rotation) if room else ([], False)
        claimed = [*admitted.started, *claimed]
        if turn.held is not None:
            claimed += self._orphans(turn.held.union(item.attempt_id for item in claimed))
        self._write_logs(turn.logs)
        self._ledger.write()
        return TurnResult(
            existing=admitted.existing,
            rejected=admitted.rejected,
            refused=refused,
            answers=answers,
            claimed=claimed,
            withdrawn=frozenset(self._withdrawn),
            moved=self._commands.moved,
            stopping=self._commands.stopping,
            unknown=frozenset(self._unknown),
            more=more or bool(admitted.existing),  # they may have held slots that others wait for
            next_due=self._next_due(arrivals) if turn.demand else None,
            queues=self._queues_now(),
        )

    def _look_again(self) -> None:
        """After changes to the limits of queues, or to what is delayed."""
        _, self._version, self._first_due = self._look()

    def _look(self) -> tuple[Rows, int | None, int | None]:
        levels, version, first_due = self._sql.look(self._cursor)
        sound = [row for row in levels if not unreadable(("queue", "name", "status", "n"), row)]
        return sound, version, first_due if is_sound("run_at", first_due) else None  # text: only that is delayed

    def _queues_now(self) -> Mapping[str, QueueState]:
        if not self._book.queues:
            return {}
        pending = self._ledger.levels().pending
        return {name: replace(state, pending=pending[name]) for name, state in self._book.queues.items()}

    # -- record

    def _record(self, finishes: Sequence[Finish]) -> frozenset[AttemptId]:
        rows = [self._finish_row(finish) for finish in finishes]
        written = self._recorded(rows)
        for finish, row in zip(finishes, rows, strict=True):
            item, kind, ended = finish.task, finish.kind, row[ENDED_AT]
            status = written.get(item.attempt_id)
            if status is None:
                self._ledger.event(EventKind.LEASE_LOST, item.task_id, item.attempt, detail=f"{kind} came too late")
                continue
            if status == TaskStatus.CANCELLED and finish.status is not TaskStatus.CANCELLED:
                kind = EventKind.CANCELLED
                self._withdrawn.append(item.attempt_id)
            self._ledger.event(kind, item.task_id, item.attempt, at=ended, detail=finish.error)
            self._ledger.move(item.queue, item.name, TaskStatus.RUNNING, status)
            if status not in (TaskStatus.PENDING, DELAYED):
                self._ledger.ran(item.queue, item.name, status, to_micros(item.started_at), ended)
        return frozenset(finish.task.attempt_id for finish in finishes if finish.task.attempt_id not in written)

    def _finish_row(self, finish: Finish) -> Sequence[Any]:
        """In the order of FINISH_COLUMNS."""
        item, _, status, at, run_at, result, error, stacktrace, excused = finish
        return (
            item.task_id,
            item.attempt,
            self._turn.instance,
            str(status) if run_at is None else str(stored_status(status, run_at, self._turn.now)),
            micros(run_at),
            to_micros(at),
            result,
            error,
            stacktrace,
            int(excused),
        )

    def _recorded(self, rows: Sequence[Sequence[Any]]) -> Mapping[AttemptId, str]:
        """What was written -> its status. One that would wait again may have been asked to stop meanwhile."""
        if self._careful or any(status in (TaskStatus.PENDING, DELAYED) for _, _, _, status, *_ in rows):
            written = self._sql.record_each.change_each(self._cursor, rows)
            return {(task_id, attempt): status for task_id, attempt, status in written}
        if self._sql.record.change(self._cursor, rows) != len(rows):
            raise Mistaken
        return {(row[0], row[1]): row[3] for row in rows}

    # -- admit

    def _admit(self, drafts: Sequence[Draft], room: Room | None, levels: Levels) -> Admitted:
        """Stores the drafts. Those for which there is a slot at once are stored as running, those for which their
        queue has no place are stored as rejected."""
        unique: dict[str, Draft] = {}
        for draft in drafts:
            unique.setdefault(draft.task_id, draft)  # of one key twice in a turn the first is the task, as it is in two
        at_once = frozenset(draft.task_id for draft in drafts if draft.here)
        if room:
            at_once |= self._startable(unique.values(), room, levels)
        status: dict[str, str] = dict.fromkeys(at_once, TaskStatus.RUNNING)
        waiting = [draft for draft in unique.values() if draft.task_id not in at_once]
        status |= self._waiting_status(waiting, levels)
        rows = [self._draft_row(draft, status[task_id]) for task_id, draft in unique.items()]
        written = self._stored(rows, new=not any(draft.key for draft in drafts))
        for draft, row in zip(unique.values(), rows, strict=True):
            if draft.task_id in written:
                self._admitted(draft, status[draft.task_id], created_at=row[CREATED_AT])
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

    def _stored(self, rows: Sequence[Sequence[Any]], *, new: bool) -> Collection[str]:
        """The ids that were not there before."""
        if self._careful or not new:
            return {task_id for (task_id,) in self._sql.admit_each.change_each(self._cursor, rows)}
        if self._sql.admit.change(self._cursor, rows) != len(rows):
            raise Mistaken
        return {row[0] for row in rows}

    def _admitted(self, draft: Draft, status: str, created_at: int) -> None:
        rejected = status == TaskStatus.REJECTED
        kind = EventKind.REJECTED if rejected else EventKind.ACCEPTED
        self._ledger.event(kind, draft.task_id, at=created_at)
        if status == TaskStatus.RUNNING:
            self._ledger.event(EventKind.STARTED, draft.task_id, 1)
        self._ledger.move(draft.queue, draft.name, None, status)

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
        """What is to start as soon as it was added is due, even where the clock was put back since."""
        return draft.run_at <= max(self._turn.now, draft.created_at) and draft.rejected_by is None and not draft.here

    def _max_size(self, draft: Draft) -> int:
        state = self._book.queues.get(draft.queue)
        return draft.rejected_by or (state.max_size if state and state.max_size else 0)

    def _draft_row(self, draft: Draft, status: str) -> Sequence[Any]:
        """In the order of DRAFT_COLUMNS."""
        runs = status == TaskStatus.RUNNING
        created_at = to_micros(draft.created_at)
        return (
            draft.task_id,
            draft.name,
            draft.queue,
            draft.priority,
            draft.executor,
            draft.source,
            str(status),
            int(runs),
            self._turn.instance if runs else None,
            self._at if runs else None,
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

    def _rearm(self, drafts: Sequence[Draft], status: Mapping[str, str]) -> set[str]:
        """An idempotency key whose task is one of REARMED runs that task again, with what its new caller said. Returns
        those for which the queue has no place this time."""
        by_id = {draft.task_id: draft for draft in drafts if draft.key is not None}
        refused: set[str] = set()
        for row in self._commands.rows(list(by_id)):
            if row.status not in REARMED:
                continue
            draft = by_id[row.task_id]
            if status[row.task_id] == TaskStatus.REJECTED:
                refused.add(row.task_id)
            else:
                said = {
                    "arguments": draft.arguments,
                    "priority": draft.priority,
                    "trace": draft.trace,
                    "run_key": draft.run_key,
                }
                self._commands.requeue(
                    row, draft.max_attempts, None, draft.run_at, draft.queue, tags=dumps_object(draft.tags), **said
                )
        return refused

    # -- claim

    def _stage(self) -> None:
        """Makes ready what has become due."""
        if self._first_due is not None and self._first_due <= self._at:
            for queue, name in self._sql.stage.run(self._cursor, at=self._at).fetchall():
                self._ledger.move(words(queue), words(name), DELAYED, TaskStatus.PENDING)
            self._look_again()

    def _next_due(self, arrivals: Sequence[Draft]) -> datetime | None:
        """When the next delayed task becomes due: one that was stored before, or one of this turn."""
        now = self._turn.now
        times = [draft.run_at for draft in arrivals if draft.run_at > now]
        times += [finish.run_at for finish in self._turn.finishes if finish.run_at is not None and finish.run_at > now]
        if self._first_due is not None:
            times.append(from_micros(self._first_due))
        return min(times, default=None)

    def _claim(self, room: Room, rotation: int) -> tuple[list[Claimed], bool]:
        """Takes what may start, queue by queue; says whether there may be more that could."""
        levels = self._ledger.levels()
        queues = levels.queues()
        first = rotation % len(queues) if queues else 0
        chosen: list[Claimed] = []
        more = False
        for queue in queues[first:] + queues[:first]:
            waiting = levels.waiting(queue)
            self._unknown |= waiting - room.names.keys()
            names = room.startable(waiting)
            most = room.free(queue, names)
            if names and most:
                candidates = self._ready(queue, names, levels, room, most)
                sound = self._sound(candidates, TaskStatus.PENDING)
                chosen += [next_claim(cells, self._turn.now) for cells in sound if room.take(queue, cells[1])]
                more = more or (len(candidates) == most and bool(room.startable(names)))
        if chosen:
            self._seize(chosen)
        return chosen, more

    def _ready(self, queue: str, names: set[str], levels: Levels, room: Room, most: int) -> Rows:
        """Ready tasks of these names: first those of the executors that the names have now, and where the counts say
        that this is not all, those that were stored when a name had another."""
        found = self._walk(queue, names, levels, dict.fromkeys(EXECUTORS, 0) | dict.fromkeys(room.kinds(names), most))
        if len(found) < min(most, levels.ready(queue, names)):
            found = self._walk(queue, names, levels, dict.fromkeys(EXECUTORS, most))
        return found

    def _walk(self, queue: str, names: set[str], levels: Levels, limits: Mapping[str, int]) -> Rows:
        most = max(limits.values())
        if names.issuperset(levels.waiting(queue)):
            return self._sql.ready.rows(self._cursor, queue=queue, most=most, **limits)
        listed = one_column(sorted(names))
        return self._sql.ready_named.rows(self._cursor, queue=queue, most=most, names=listed, **limits)

    def _seize(self, chosen: Sequence[Claimed]) -> None:
        """What was chosen is locked, by the transaction or row by row: all of it can be had."""
        rows = [(item.task_id,) for item in chosen]
        self._sql.seize.change(self._cursor, rows, me=self._turn.instance, at=self._at)
        for item in chosen:
            self._ledger.event(EventKind.STARTED, item.task_id, item.attempt)
            self._ledger.move(item.queue, item.name, TaskStatus.PENDING, TaskStatus.RUNNING)

    def _orphans(self, held: Collection[AttemptId]) -> list[Claimed]:
        rows = self._sound(self._sql.held.rows(self._cursor, me=self._turn.instance), TaskStatus.RUNNING)
        return [item for item in map(held_claim, rows) if item.attempt_id not in held]

    def _sound(self, rows: Rows, status: TaskStatus) -> Rows:
        """Those that can be run; the others end here."""
        sound = []
        for cells in rows:
            if broken := unreadable(CLAIMED_NAMES, cells):
                self._commands.set_aside(cells[0], cells[2], cells[1], status, broken)
            else:
                sound.append(cells)
        return sound

    # -- what is written last

    def _write_logs(self, lines: Sequence[LogLine]) -> None:
        rows = [
            (line.task_id, to_micros(line.at), line.level, line.attempt, line.message, line.extra) for line in lines
        ]
        self._bulk(self._sql.logs, rows)

    def _write_progress(self, progress: Sequence[Progress]) -> None:
        rows = [(item.task_id, item.attempt, self._turn.instance, item.value) for item in progress]
        self._bulk(self._sql.progress, rows)

    def _bulk(self, statement: Prepared, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            statement.change(self._cursor, rows)
