"""What a turn reads and what it changes: the language between the rules and a store.

Owns the values of that exchange. The rules say what they have to see (`Wants`), a store shows it (`Snapshot`), the
rules decide (`Changes`), and the store writes all of it or nothing. Times are integer microseconds since the epoch, as
they are stored. The invariant: a store never asks why. It compares fences and moves rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

from ..failures import Failure
from ..models import EventKind, ExecutorKind
from ..texts import readable
from .base import Claimed, LogLine, Moved, Progress, Purge, Record

Level = tuple[str, str, str, int]
"""How many tasks of a queue and a name have a stored status: (queue, name, status, n)."""

LEVEL = ("queue", "name", "status", "n")
TALLY = (*LEVEL, "micros")
"""The columns of a count."""
EXECUTORS: Sequence[str] = get_args(ExecutorKind)

CLAIM_BATCH = 250
"""Tasks of one queue that one turn claims at most: the first run while the next are claimed."""
STAGE_BATCH = 1_000
"""Tasks that one turn makes ready at most."""
RESCUE_BATCH = 500
"""Tasks of lost instances that one turn ends at most."""
PURGE_BATCH = 250
"""Tasks of one status that one purge deletes at most."""


class Stale(Exception):
    """Something is no longer as the changes took for granted. Nothing of them was written: they are decided again, from
    a snapshot that shows every task they are about."""


class StoredTask(NamedTuple):
    """The columns of a task on which rules depend, in the order in which stores read them."""

    task_id: str
    name: str
    queue: str
    priority: int | None
    executor: str
    status: str
    """A `TaskStatus`, or `DELAYED`."""
    attempt: int
    excused: int
    crashes: int
    max_attempts: int
    created_at: int
    run_at: int
    started_at: int | None
    finished_at: int | None
    instance: str | None
    requeue: bool
    cancel_requested: bool
    arguments: str
    tags: str
    error: str | None
    trace: str | None
    error_key: str | None = None
    dismissed_at: int | None = None
    broken: Sequence[str] = ()
    """Columns in which something stands for what could not be read."""
    raw_id: bytes = b""
    """Where the id itself is damaged: its bytes, by which the row is found."""
    revision: int = 0
    """Another one after each change, where the store does not hold the row until the turn is over."""


FACTS = StoredTask._fields[:-3]
"""What a store reads of a task."""


class StoredQueue(NamedTuple):
    name: str
    concurrency: int | None
    max_size: int | None
    paused: bool
    reason: str | None
    declared: str | None

    @property
    def counted(self) -> bool:
        """Whether it matters how many tasks it holds."""
        return self.concurrency is not None or self.max_size is not None


class StoredSchedule(NamedTuple):
    name: str
    func_name: str
    trigger: str
    timezone: str
    overlap: bool
    misfire: str
    paused: bool
    last_tick: int
    next_tick: int | None
    started_at: int | None
    broken: bool = False


@dataclass(slots=True)
class Wants:
    """What a decision has to see. Levels and queues always come with it."""

    now: int
    instance: str
    writes: bool = False
    """Whether the turn brings anything that somebody waits for."""
    stage: bool = False
    """Make ready what is due before anything is read."""
    tasks: list[str] = field(default_factory=list)
    run_keys: list[str] = field(default_factory=list)
    """Of which the one-offs that wait are shown."""
    stamps: dict[str, int] = field(default_factory=dict)
    """Instance id -> heartbeat. Of those whose heartbeat is still that one, what they left running is shown."""
    held: bool = False
    """Show what this instance runs."""
    schedules: list[str] = field(default_factory=list)
    declares: bool = False
    """Somebody declares schedules, which nobody else may do meanwhile."""
    live: list[str] = field(default_factory=list)
    """Schedules of which it must be known whether a task waits or runs."""
    queues: set[str] = field(default_factory=set)
    """Queues that get tasks: their limits have to hold until the turn is over."""


@dataclass(slots=True)
class Snapshot:
    levels: Sequence[Level] = ()
    """Of what is pending and what runs."""
    queues: Mapping[str, StoredQueue] = field(default_factory=dict)
    first_due: int | None = None
    """When the next delayed task becomes due."""
    tasks: dict[str, StoredTask] = field(default_factory=dict)
    one_offs: Mapping[str, Sequence[StoredTask]] = field(default_factory=dict)
    left: Sequence[StoredTask] = ()
    """What the lost instances left running; at most RESCUE_BATCH."""
    held: Sequence[StoredTask] = ()
    schedules: Mapping[str, StoredSchedule] = field(default_factory=dict)
    live: frozenset[str] = frozenset()
    closed: frozenset[str] = frozenset()
    """Limited queues from which this turn may take nothing, because it does not hold their limits."""


class Insert(NamedTuple):
    """A task that must not be there yet. `status` and what follows from it were decided by the rules."""

    task_id: str
    name: str
    queue: str
    priority: int | None
    executor: str
    source: str
    status: str
    attempt: int
    instance: str | None
    started_at: int | None
    max_attempts: int
    created_at: int
    run_at: int
    arguments: str
    tags: str
    requeue: int
    idempotency_key: str | None
    retry_of: str | None
    trace: str | None
    schedule: str | None
    run_key: str | None


class Ending(NamedTuple):
    """The end of an attempt. Holds while the task runs under this (attempt, instance) and, where it would wait again,
    nobody has asked it to stop."""

    task_id: str
    attempt: int
    instance: str
    status: str
    run_at: int | None
    """When it waits again; None: as it was."""
    finished_at: int | None
    result: str | None
    error: str | None
    stacktrace: str | None
    excused: int
    error_key: str | None = None


class Tally(NamedTuple):
    """What a turn changes of a group of failures. Its description is there when a task joins it."""

    error_key: str
    name: str
    error_type: str
    message: str
    frame: str
    at: int | None
    """When the newest of this turn failed; None where none did."""
    open: int
    dismissed: int


class Update(NamedTuple):
    """Other columns of a task that was shown. Holds while it is as it was shown."""

    row: StoredTask
    values: Mapping[str, Any]


class Wish(NamedTuple):
    """Up to `most` ready tasks of a queue, in the order of priority and time, of these names and no others."""

    queue: str
    names: Mapping[str, str]
    """Name -> executor. All that may be started."""
    slots: Mapping[str, int]
    """Executor -> how many of its tasks at most."""
    most: int
    every_name: bool
    """Whether no others wait in that queue, by the counts."""
    ready: int
    """How many tasks of these names wait, by the counts."""

    @property
    def walks(self) -> dict[str, int]:
        """How many of each executor, those of which there may be none included."""
        return {kind: self.slots.get(kind, 0) for kind in EXECUTORS}


class Advance(NamedTuple):
    """How a schedule goes on: None leaves a column as it is. Holds while its last tick is `since`, where that is given,
    and where it is started, while its last start is `before`."""

    name: str
    since: int | None = None
    last_tick: int | None = None
    next_tick: int | None = None
    last_run: int | None = None
    last_task_id: str | None = None
    started_at: int | None = None
    before: int | None = None


class Event(NamedTuple):
    task_id: str
    at: int
    kind: str
    attempt: int | None
    instance: str
    actor: str | None
    detail: str | None


class Ceiling(NamedTuple):
    """What a queue may hold once the changes are made; None: whatever it does."""

    pending: int | None = None
    running: int | None = None


@dataclass(slots=True)
class Changes:
    """All that one turn writes. Whoever changes a row tells the books here, too, so that events and counts always agree
    with the rows."""

    now: int
    instance: str
    inserts: list[Insert] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    updates: dict[str, Update] = field(default_factory=dict)
    aside: list[tuple[bytes, str, str]] = field(default_factory=list)
    """Tasks whose row cannot be read and that end as FAILED: (bytes of the id, status before, error)."""
    wishes: list[Wish] = field(default_factory=list)
    ceilings: dict[str, Ceiling] = field(default_factory=dict)
    """For stores in which others may change a queue between the snapshot and the changes."""
    stamps: dict[str, int] = field(default_factory=dict)
    """Heartbeats of lost instances that must be the same still."""
    events: list[Event] = field(default_factory=list)
    counts: defaultdict[tuple[str, str, str], int] = field(default_factory=lambda: defaultdict(int))
    micros: defaultdict[tuple[str, str, str], int] = field(default_factory=lambda: defaultdict(int))
    """Microseconds that tasks ran, by (queue, name, status) like the counts."""
    logs: Sequence[LogLine] = ()
    progress: Sequence[Progress] = ()
    queues: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """Columns of queues that are set; a queue that is not there is made."""
    schedules: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """The same of schedules. A new one comes with all its columns."""
    advances: list[Advance] = field(default_factory=list)
    revoked: list[tuple[str, int]] = field(default_factory=list)
    purges: list[Purge] = field(default_factory=list)
    groups: dict[str, Tally] = field(default_factory=dict)
    """Groups of failures by their key."""
    records: list[Record] = field(default_factory=list)
    moved: list[Moved] = field(default_factory=list)
    """For those who listen, not for the store: it adds what it had to set aside."""

    def event(
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
        actor = actor and readable(actor)  # as an authentication of the team's own named them
        self.events.append(Event(task_id, at or self.now, kind.value, number, self.instance, actor, detail))

    def move(self, queue: str, name: str, before: str | None, after: str | None) -> None:
        """One task changes its stored status; None is no task."""
        if before is not None:
            self.counts[queue, name, before] -= 1
        if after is not None:
            self.counts[queue, name, after] += 1

    def failed(self, name: str, failure: Failure, at: int) -> str:
        """One more task of a group of failures, whose key this returns."""
        known = self.groups.get(failure.key)
        open_, dismissed = (known.open, known.dismissed) if known else (0, 0)
        facts = (failure.error_type, failure.message, failure.frame)
        self.groups[failure.key] = Tally(failure.key, name, *facts, at, open_ + 1, dismissed)
        return failure.key

    def regroup(self, error_key: str | None, *, open: int = 0, dismissed: int = 0) -> None:
        """Tasks of a group that are counted otherwise from now on."""
        if error_key is not None:
            known = self.groups.get(error_key) or Tally(error_key, "", "", "", "", None, 0, 0)
            self.groups[error_key] = known._replace(open=known.open + open, dismissed=known.dismissed + dismissed)

    def leave(self, error_key: str | None, dismissed_at: int | None) -> None:
        """A task that is no failure any more."""
        self.regroup(error_key, open=-(dismissed_at is None), dismissed=-(dismissed_at is not None))

    def ran(self, queue: str, name: str, status: str, started_at: int | None, ended_at: int | None) -> None:
        """The time from a task's last start to its end counts under the status it ended with."""
        if started_at is not None and ended_at is not None:
            self.micros[queue, name, status] += ended_at - started_at

    def tally(self) -> list[tuple[str, str, str, int, int]]:
        """What the counts change by: (queue, name, status, n, micros), in an order that is the same everywhere."""
        keys = {key for key, n in self.counts.items() if n} | {key for key, n in self.micros.items() if n}
        return [(*key, self.counts.get(key, 0), self.micros.get(key, 0)) for key in sorted(keys)]

    def tally_rows(self) -> list[dict[str, Any]]:
        """The same by the names of the columns."""
        return [dict(zip(TALLY, row, strict=True)) for row in self.tally()]


@dataclass(slots=True)
class Applied:
    """What a store adds to the changes that it wrote."""

    claimed: list[Claimed] = field(default_factory=list)
    purged: list[tuple[int, bool]] = field(default_factory=list)
    """For each purge: how many tasks it deleted, and whether there are more."""
