"""A turn: record what finished, obey, admit what arrived, claim what is next.

Owns that order, and what a decision has to see. A store calls `wants`, shows it, calls `decide` and applies the
changes; where they do not hold any more it does so again, with everything shown (`careful`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from ..backends.base import (
    Answer,
    Cancel,
    CancelScheduled,
    CancelTasks,
    Claimed,
    DeclareSchedules,
    DismissTasks,
    EditSchedule,
    Fire,
    MoveScheduled,
    Purge,
    Requeue,
    RequeueTasks,
    Rescue,
    RestoreTasks,
    RunSchedule,
    Supersede,
    Turn,
    TurnResult,
)
from ..backends.changes import Applied, Changes, Snapshot, Wants
from ..backends.stored import claim_of
from ..models import QueueState, TaskStatus, from_micros, to_micros
from .admission import Admitted, admit
from .commands import obey, set_aside
from .endings import Ended, end
from .limits import Limits
from .work import Work


def wants(turn: Turn, *, careful: bool) -> Wants:
    """What has to be seen. A task with an id that nobody else can have made, and a lease, are taken for granted until
    the store says otherwise."""
    writes = bool(turn.finishes or turn.drafts or turn.commands)
    demands, asks = turn.demand is not None, turn.held is not None
    seen = Wants(to_micros(turn.now), turn.instance, writes=writes, stage=demands, held=asks)
    seen.tasks += [draft.task_id for draft in turn.drafts if careful or draft.key is not None]
    seen.queues |= {draft.queue for draft in turn.drafts}
    if careful:
        seen.tasks += [finish.task.task_id for finish in turn.finishes]
    for command in turn.commands:
        match command:
            case Cancel(task_id) | Requeue(task_id):
                seen.tasks.append(task_id)
            case RequeueTasks(ids) | CancelTasks(ids) | DismissTasks(ids) | RestoreTasks(ids):
                seen.tasks += ids
            case Rescue(stamps):
                seen.stamps |= stamps
            case Supersede(draft):
                seen.run_keys.append(draft.run_key or "")
            case CancelScheduled(run_key) | MoveScheduled(run_key):
                seen.run_keys.append(run_key)
            case Fire(firings):
                seen.schedules += [firing.schedule for firing in firings]
                seen.live += [firing.schedule for firing in firings if not firing.overlap]
                drafts = [draft for firing in firings for draft in firing.drafts]
                seen.queues |= {draft.queue for draft in drafts}
                seen.tasks += [draft.task_id for draft in drafts if careful]
            case DeclareSchedules(schedules):
                seen.declares = True
                seen.schedules += [item.name for item in schedules]
                seen.live += [item.name for item in schedules if item.at_startup and not item.overlap]
                seen.queues |= {item.at_startup.queue for item in schedules if item.at_startup}
            case RunSchedule(name) | EditSchedule(name):
                seen.schedules.append(name)
    return seen


@dataclass(slots=True)
class Decision:
    """What to write, and what is known of the turn's result before the store has added what it claimed."""

    turn: Turn
    changes: Changes
    ended: Ended
    answers: list[Answer]
    admitted: Admitted
    orphans: list[Claimed]
    stopping: Collection[tuple[str, int]]
    unknown: frozenset[str]
    more: bool
    next_due: datetime | None
    queues: dict[str, QueueState]

    def result(self, applied: Applied) -> TurnResult:
        claimed = [*self.admitted.started, *applied.claimed]
        known = {item.attempt_id for item in claimed}
        arrived = self._arrived()
        claimed += [item for item in self.orphans if item.attempt_id not in known]
        return TurnResult(
            existing=frozenset(self.admitted.existing),
            rejected=self.admitted.rejected,
            refused=frozenset(self.ended.refused),
            withdrawn=frozenset(self.ended.withdrawn),
            moved=self.changes.moved,
            answers=self._answers(applied),
            claimed=claimed,
            stopping=list(self.stopping),
            unknown=self.unknown,
            more=(self.more and bool(claimed)) or bool(self.admitted.existing),  # which may have held others' slots
            next_due=self.next_due,
            queues=self.queues,
            left=sum(arrived.values()) > len(applied.claimed),
            arrived=arrived,
        )

    def _arrived(self) -> dict[str, int]:
        """How many tasks this turn made ready, by queue."""
        ready, changes = TaskStatus.PENDING.value, self.changes
        queues = [item.queue for item in changes.inserts if item.status == ready]
        if again := {item.task_id for item in changes.endings if item.status == ready}:
            queues += [finish.task.queue for finish in self.turn.finishes if finish.task.task_id in again]
        queues += [
            update.values.get("queue", update.row.queue)
            for update in changes.updates.values()
            if update.values.get("status") == ready
        ]
        return Counter(queues)

    def _answers(self, applied: Applied) -> list[Answer]:
        if not applied.purged:
            return self.answers
        purged = iter(applied.purged)
        pairs = zip(self.turn.commands, self.answers, strict=True)
        return [Answer(None, *next(purged)) if isinstance(command, Purge) else answer for command, answer in pairs]


def decide(turn: Turn, snapshot: Snapshot, *, careful: bool, rotation: int = 0) -> Decision:
    """`rotation` changes from turn to turn, and with it the queue that is served first."""
    work = Work(turn, snapshot, careful=careful)
    ended = end(work, turn.finishes)
    answers = [obey(work, command) for command in turn.commands]
    levels = work.levels()
    limits = Limits(turn.demand, snapshot.queues, snapshot.closed, levels) if turn.demand else None
    admitted = admit(work, limits, levels) if work.drafts else Admitted()
    orphans = _orphans(work) if turn.held is not None else []
    levels = work.levels() if limits else levels
    if limits:
        work.changes.wishes = limits.wishes(rotation, levels)
    return Decision(
        turn=turn,
        changes=work.changes,
        ended=ended,
        answers=answers,
        admitted=admitted,
        orphans=orphans,
        stopping=work.stopping,
        unknown=frozenset(limits.unknown) if limits else frozenset(),
        more=limits.more if limits else False,
        next_due=_next_due(work) if limits else None,
        queues=_queues(work) if snapshot.queues else {},
    )


def _orphans(work: Work) -> list[Claimed]:
    """What carries this instance's lease although it was never started: the answer to its claim was lost."""
    held = work.turn.held or frozenset()
    found: list[Claimed] = []
    for seen in work.snapshot.held:
        row = work.latest(seen)
        if row.status != seen.status:
            continue
        if row.broken:
            set_aside(work, row)
        elif (row.task_id, row.attempt) not in held:
            found.append(claim_of(row))
    return found


def _next_due(work: Work) -> datetime | None:
    """When the next delayed task becomes due: one that was stored before, or one of this turn."""
    now = work.turn.now
    times = [draft.run_at for draft in work.drafts if draft.run_at > now]
    times += [finish.run_at for finish in work.turn.finishes if finish.run_at is not None and finish.run_at > now]
    times += [
        from_micros(update.values["run_at"])
        for update in work.changes.updates.values()
        if update.values.get("run_at", 0) > work.now
    ]
    if work.snapshot.first_due is not None:
        times.append(from_micros(work.snapshot.first_due))
    return min(times, default=None)


def _queues(work: Work) -> dict[str, QueueState]:
    """Those that have limits, as this turn leaves them."""
    pending = work.levels().pending
    return {
        name: QueueState(name, state.concurrency, state.max_size, state.paused, state.reason, pending=pending[name])
        for name, state in work.snapshot.queues.items()
    }
