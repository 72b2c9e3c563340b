"""The port to storage: one *turn* in, one *turn result* out, and the reads.

Owns the values that cross it and the `Backend` protocol. The journal calls `turn`, everything that shows tasks
calls the reads. The invariant: a turn is one transaction. Either all of it is durable when `turn` returns, or
`BackendUnavailable` is raised and none of it happened. The three values that every task goes through are tuples,
because a frozen dataclass takes five times as long to make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol

from ..failures import Failure
from ..models import (
    AuditFilter,
    Count,
    Cursor,
    ErrorGroup,
    EventKind,
    InstanceRecord,
    LogEntry,
    QueueConfig,
    QueueState,
    ScheduledOnce,
    ScheduleState,
    TaskEvent,
    TaskFilter,
    TaskPage,
    TaskRecord,
    TaskStatus,
    Vitals,
)

KINDS = ("queue", "schedule", "revoked", "failure", "task", "event", "log")
"""What is copied from one store to another, in the order in which it is: events and lines come behind their tasks."""
EVERY_ACT = AuditFilter()
AttemptId = tuple[str, int]
"""One attempt of one task: its task's id and its number, from 1. A process may run two attempts of a task at a time,
when it lost the lease of the first."""


class Draft(NamedTuple):
    """A task as its caller described it, not stored yet."""

    task_id: str
    name: str
    queue: str
    priority: int | None
    executor: str
    max_attempts: int
    created_at: datetime
    run_at: datetime
    arguments: str
    tags: Mapping[str, str]
    requeue: bool
    """Whether it may be started again after its process went away while it ran."""
    source: str = "manual"
    key: str | None = None
    retry_of: str | None = None
    trace: str | None = None
    schedule: str | None = None
    """The schedule of which it is a run."""
    run_key: str | None = None
    """The replaceable key of a one-off."""
    here: bool = False
    """Only the process that accepts it can run it: it is stored as running, whatever is free."""
    rejected_by: int | None = None
    """The max_size of the queue that was full when the task was added: stored as REJECTED, to be seen."""


class Claimed(NamedTuple):
    """A task that this instance holds: its RUNNING row is committed. (attempt, instance) is its fencing token."""

    task_id: str
    name: str
    queue: str
    executor: str
    attempt: int
    excused: int
    max_attempts: int
    started_at: datetime
    arguments: str
    tags: Mapping[str, str]
    requeue: bool
    trace: str | None
    created_at: datetime
    due_at: datetime | None = None
    """When it could have started."""

    @property
    def attempt_id(self) -> AttemptId:
        return self.task_id, self.attempt

    @property
    def attempts_left(self) -> bool:
        return self.attempt - self.excused < self.max_attempts


class Finish(NamedTuple):
    """How one attempt ended, and what the task becomes. Written only if the fencing token still matches."""

    task: Claimed
    kind: EventKind
    status: TaskStatus
    at: datetime
    run_at: datetime | None = None
    """When PENDING: the time of the next attempt."""
    result: str | None = None
    error: str | None = None
    stacktrace: str | None = None
    excused: bool = False
    """True when this attempt does not count against the task's retries."""
    failure: Failure | None = None
    """When FAILED: what it has in common with others."""


@dataclass(frozen=True, slots=True)
class LogLine:
    task_id: str
    at: datetime
    level: str
    attempt: int
    message: str
    extra: str = "{}"
    """A JSON object."""
    func_name: str = ""
    """For observers; neither this nor the tags are stored with the line."""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    task_id: str
    attempt: int
    value: str
    """A JSON object."""

    @property
    def attempt_id(self) -> AttemptId:
        return self.task_id, self.attempt


class GaugeRow(NamedTuple):
    """What one instance did in one bucket of time: see `history.py`."""

    size: int
    """Seconds of the bucket."""
    at: int
    """When it begins, in microseconds."""
    kind: str
    series: str
    sums: str
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class Record:
    """Store what this instance did, in place of what it said of the same buckets before; forget what is older than each
    size of bucket is kept."""

    rows: Sequence[GaugeRow]
    kept: Mapping[int, datetime]
    """Seconds of a bucket -> what began before goes."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Make a pending task CANCELLED; ask the owner of a running one to stop it."""

    task_id: str
    actor: str | None


@dataclass(frozen=True, slots=True)
class Requeue:
    """Make a task of a terminal status PENDING again, with its id, its history and a full set of attempts."""

    task_id: str
    max_attempts: int
    actor: str | None


@dataclass(frozen=True, slots=True)
class RequeueTasks:
    """The same of many tasks: those whose status allows it and whose name is in `attempts`. `note` stands in their
    events, which name no actor: one entry of the audit is about all of them."""

    task_ids: Sequence[str]
    attempts: Mapping[str, int]
    """Name -> max_attempts."""
    note: str | None = None


@dataclass(frozen=True, slots=True)
class CancelTasks:
    task_ids: Sequence[str]
    note: str | None = None


@dataclass(frozen=True, slots=True)
class DismissTasks:
    """Somebody has seen to tasks that FAILED: they leave the dead letters, and nothing else changes."""

    task_ids: Sequence[str]
    reason: str | None = None
    actor: str | None = None


@dataclass(frozen=True, slots=True)
class RestoreTasks:
    """Undo it."""

    task_ids: Sequence[str]
    actor: str | None = None


@dataclass(frozen=True, slots=True)
class Rescue:
    """End what these instances left RUNNING: requeue it where it allows that, else mark it INTERRUPTED.

    Only of those whose heartbeat is still the one that was seen: who beats again in the meantime is alive.
    """

    stamps: Mapping[str, int]
    """Instance id -> `Pulse.stamp`."""


@dataclass(frozen=True, slots=True)
class DeclareQueues:
    """The queues that the code declares. An operator's edit stays until the code declares something else."""

    queues: Mapping[str, QueueConfig]


@dataclass(frozen=True, slots=True)
class EditQueue:
    """Change some of a queue's columns: `concurrency`, `max_size`, `paused`, `reason`."""

    name: str
    kind: EventKind
    changes: Mapping[str, int | bool | str | None]
    actor: str | None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Purge:
    """Delete up to `limit` rows of tasks that ended before a time: their log lines, their events, themselves.

    What people did to them stays: an audit that its subjects could delete would be none.
    """

    before: datetime
    limit: int


@dataclass(frozen=True, slots=True)
class Note:
    """Record what somebody did that changes no row of its own. `at` is when, where that is not now."""

    kind: EventKind
    actor: str | None
    detail: Mapping[str, Any]
    task_id: str = ""
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Revoke:
    """End a login session before its time. Forgotten once it would have expired."""

    session_id: str
    expires: datetime


@dataclass(frozen=True, slots=True)
class DeclaredSchedule:
    """A schedule as this process's code has it."""

    name: str
    func_name: str
    trigger: str
    timezone: str
    overlap: bool
    misfire: str
    next_tick: datetime
    at_startup: Draft | None = None
    """The task of `run_on_startup`."""
    startup_window: timedelta = timedelta(0)
    """Instances that start within this time of each other run it once."""


@dataclass(frozen=True, slots=True)
class DeclareSchedules:
    """The schedules that the code declares. One that is new, or whose trigger or time zone changed, begins now; an
    operator's pause stays. Those of other code are left as they are."""

    schedules: Sequence[DeclaredSchedule]


@dataclass(frozen=True, slots=True)
class Firing:
    """What one schedule owes. Written only while its last tick is `since`, from which this was computed: otherwise
    another instance was faster, or an operator resumed it."""

    schedule: str
    since: datetime
    until: datetime
    """Its last tick from now on."""
    next_tick: datetime
    drafts: Sequence[Draft]
    """A task for each tick to fire, oldest first."""
    overlap: bool = True
    """False: no task is made while one of the schedule waits or runs."""
    missed: str | None = None
    """What to record about ticks that are not made up for."""


@dataclass(frozen=True, slots=True)
class Fire:
    """The due ticks of many schedules. Their tasks are admitted in this turn like any that arrives."""

    firings: Sequence[Firing]


@dataclass(frozen=True, slots=True)
class EditSchedule:
    """Pause a schedule or resume it. Resumed, it begins now: a pause is no misfire."""

    name: str
    kind: EventKind
    paused: bool
    reason: str | None
    actor: str | None
    next_tick: datetime | None = None


@dataclass(frozen=True, slots=True)
class RunSchedule:
    """Record that somebody runs a schedule now; the task comes as a draft of the same turn."""

    name: str
    task_id: str
    actor: str | None


@dataclass(frozen=True, slots=True)
class Supersede:
    """Make way for a one-off, which comes as a draft of the same turn: whatever waits under its `run_key` is cancelled,
    or moved when it is the same task (one idempotency key)."""

    draft: Draft


@dataclass(frozen=True, slots=True)
class CancelScheduled:
    """Cancel what waits under a `run_key`."""

    run_key: str
    actor: str | None


@dataclass(frozen=True, slots=True)
class MoveScheduled:
    """Give what waits under a `run_key` another time."""

    run_key: str
    run_at: datetime
    actor: str | None


Command = (
    Cancel
    | Requeue
    | RequeueTasks
    | CancelTasks
    | DismissTasks
    | RestoreTasks
    | Rescue
    | DeclareQueues
    | EditQueue
    | Purge
    | Note
    | Revoke
    | DeclareSchedules
    | Fire
    | EditSchedule
    | RunSchedule
    | Supersede
    | CancelScheduled
    | MoveScheduled
    | Record
)


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a schedule has come."""

    last_tick: datetime
    paused: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command found and did. `before` is None when there is no such task."""

    before: TaskStatus | None = None
    changed: int = 0
    more: bool = False
    """Whether a limit left something undone."""
    marks: Mapping[str, Mark] = field(default_factory=dict)
    """The schedules that were declared or fired, as they are now; one that is not stored is missing."""
    ids: Sequence[str] = ()
    """Of a command about many tasks: those that it changed."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What this instance can start now: names by executor, and free slots of executors.

    A name that is not listed is never claimed. What a queue allows is in the database.
    """

    names: Mapping[str, str]
    """Task name -> executor kind."""
    slots: Mapping[str, int]
    """Executor kind -> free slots."""
    queues: Mapping[str, int] | None = None
    """How many of which queues' tasks at most; None where that does not matter."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One transaction: record what finished, admit what arrived, obey commands, claim what is next."""

    now: datetime
    instance: str
    finishes: Sequence[Finish] = ()
    drafts: Sequence[Draft] = ()
    commands: Sequence[Command] = ()
    logs: Sequence[LogLine] = ()
    progress: Sequence[Progress] = ()
    demand: Demand | None = None
    turn_id: str = ""
    """The same when it is tried again, other than that of any other turn."""
    held: frozenset[AttemptId] | None = None
    """After a turn of unknown outcome: what this instance knows it runs. Other attempts that carry its lease are
    handed out again, since they were claimed but never started."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A task that a command ended or sent back to wait, without an attempt of this instance. `attempt` is the number of
    started attempts, `started_at` the start of the one that the command ended."""

    task_id: str
    name: str
    tags: Mapping[str, str]
    status: TaskStatus
    at: datetime
    attempt: int
    excused: int
    started_at: datetime | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TurnResult:
    existing: frozenset[str] = frozenset()
    """Drafts whose id was stored before (an idempotency key seen earlier): not admitted again."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Drafts refused by a full queue -> that queue's max_size."""
    refused: frozenset[AttemptId] = frozenset()
    """Finishes whose lease was lost: not written."""
    withdrawn: frozenset[AttemptId] = frozenset()
    """Finishes that would have been PENDING again, but somebody had asked the task to stop: written as CANCELLED."""
    moved: Sequence[Moved] = ()
    answers: Sequence[Answer] = ()
    claimed: Sequence[Claimed] = ()
    stopping: Sequence[AttemptId] = ()
    """What this instance runs that a command of this turn asked to stop."""
    unknown: frozenset[str] = frozenset()
    """Names of waiting tasks that the demand does not have."""
    more: bool = False
    """True when tasks may be waiting that this turn did not claim although slots are free."""
    next_due: datetime | None = None
    """When the next waiting task becomes due."""
    queues: Mapping[str, QueueState] = field(default_factory=dict)
    """Queues that have limits, with `pending` as this turn left it."""
    left: bool = False
    """Whether tasks became ready that this instance did not start: others may want to know."""
    arrived: Mapping[str, int] = field(default_factory=dict)
    """How many tasks this turn made ready, by queue."""


@dataclass(frozen=True, slots=True)
class Instance:
    """This process, as it introduces itself. `birth` and `machine` tell a live process from a reused pid."""

    instance_id: str
    host: str
    machine: str
    pid: int
    birth: str
    version: str
    started: datetime


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat: the lease of `instance_id` holds until `lease_until`."""

    at: datetime
    lease_until: datetime
    slots: int
    running: int
    vitals: Vitals | None = None


class Pulse(NamedTuple):
    """What one look found of an instance."""

    instance: Instance
    stamp: int
    """Another one after each heartbeat; 0 when there is no row of this instance."""
    lease: float
    """Seconds that its heartbeat asked for; 0 when it signed off, or has no row."""

    @property
    def signed_off(self) -> bool:
        return self.stamp != 0 and self.lease == 0


class Batch(NamedTuple):
    """Rows of one kind on their way from one store to another."""

    rows: Sequence[Mapping[str, Any]]
    """With the columns of `tables.py` as keys, whatever the store."""
    after: str | None
    """The place where the next ones begin; None behind the last row."""
    mended: int = 0
    """Rows in which something stands for a cell that could not be read."""


class Backend(Protocol):
    """Storage of tasks. Every method raises `BackendUnavailable` when the database does not answer in time."""

    @property
    def name(self) -> str:
        """Where it stores, for people: no password."""

    @property
    def clock_offset(self) -> timedelta:
        """How far its clock is ahead of this system's, when it was last asked: with `open` and each `beat`."""

    async def open(self) -> None:
        """Connect and bring the schema up. Callable again after a failure."""

    async def is_current(self) -> bool:
        """Whether the schema is there as this code has it: then it can be read without `open`. Writes nothing.

        Raises TaskflowError when it is of newer code.
        """

    async def close(self) -> None: ...

    async def turn(self, turn: Turn) -> TurnResult:
        """Raises OutcomeUnknown where it cannot be told whether it was made: until it can, only the same turn may be
        tried again."""

    # -- news: a convenience under which a poll always goes on
    def listen(self, wake: Callable[[], None]) -> None:
        """Has `wake` called, from any thread, when another process may have left work. Ends with `close`."""

    def announce(self) -> None:
        """Tells the other processes that there is work. Never waits."""

    # -- instances: called from the heartbeat's own thread, on a connection of its own
    def beat(self, instance: Instance, beat: Beat) -> None: ...

    def pulses(self) -> Sequence[Pulse]:
        """Of every instance that holds a lease or owns RUNNING tasks."""

    def leave(self, instance_id: str, stamp: int | None = None) -> None:
        """Sign an instance off. With `stamp`: only if its heartbeat is still that one. Its row goes, unless it owns
        RUNNING tasks."""

    # -- reads
    async def get(self, task_id: str) -> TaskRecord | None: ...

    async def page(self, where: TaskFilter, before: Cursor | None, limit: int) -> TaskPage: ...

    async def events(self, task_id: str) -> Sequence[TaskEvent]: ...

    async def events_after(self, seq: int, limit: int) -> Sequence[TaskEvent]: ...

    async def audit(self, before: int | None, limit: int, where: AuditFilter = EVERY_ACT) -> Sequence[TaskEvent]:
        """Events with an actor, newest first; below the number `before` where it is given. A filter looks at the newest
        SEARCH_WINDOW of them."""

    async def is_revoked(self, session_id: str) -> bool: ...

    async def last_seq(self) -> int:
        """The number of the newest event; 0 when there is none."""

    async def logs(self, task_id: str, after: int, limit: int) -> Sequence[LogEntry]: ...

    async def counts(self) -> Sequence[Count]: ...

    async def queues(self) -> Sequence[QueueState]:
        """Every queue that is declared, was edited, or has tasks; by name."""

    async def schedules(self) -> Sequence[ScheduleState]:
        """Every schedule that any code ever declared, by name."""

    async def scheduled(
        self, before: datetime | None, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[ScheduledOnce]:
        """One-offs that wait, soonest first: due before a time, and behind a (fire_at, task_id), where given."""

    async def groups(self, *, dismissed: bool, before: tuple[datetime, str] | None, limit: int) -> Sequence[ErrorGroup]:
        """Groups of failures with open tasks, or with dismissed ones; the last to fail first, below (last_at, key)."""

    async def gauges(self, size: int, kind: str, since: datetime, series: str | None = None) -> Sequence[GaugeRow]:
        """What instances did in buckets of that size that began at a time or later: of one series or of all."""

    async def oldest(self, queues: Sequence[str]) -> Mapping[str, datetime]:
        """Of each of these queues in which tasks could start: since when the one that waits longest could."""

    async def due(self, now: datetime) -> int:
        """Delayed tasks whose time has come; bounded by what one turn makes ready."""

    async def instances(self) -> Sequence[InstanceRecord]: ...

    async def cancels(self, instance_id: str) -> Sequence[AttemptId]:
        """What this instance runs that somebody asked to stop."""

    async def arguments(self, task_ids: Sequence[str], most: int) -> Mapping[str, str]:
        """The first `most` characters of these tasks' encoded arguments, by id; at most a page's worth of ids."""

    # -- copies: of a system that stands still
    async def dump(self, kind: str, after: str, limit: int) -> Batch:
        """About so many rows of one of KINDS, each row once, in an order that stays the same. `after` is a place that
        another batch named; "" is the beginning."""

    async def load(self, kind: str, rows: Sequence[Mapping[str, Any]]) -> int:
        """Stores those that are not there yet, with the counts and whatever they are found by, and says how many. The
        next number is behind those of the events and lines. A queue or a schedule that is there becomes as it comes."""
