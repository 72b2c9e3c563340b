"""The values of the task system: what a task is, may become and did.

Owns the vocabulary that every other module shares: statuses and the transitions between them, event kinds,
the settings of tasks and queues, and the records that pages and callers see. Frozen data, no I/O. Times are
timezone-aware UTC datetimes here; storage keeps them as integer microseconds since the epoch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, TypedDict, TypeVar

from .errors import TaskDefinitionError
from .texts import name_text, tag_texts

T = TypeVar("T")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAST_MICROS = 253_402_128_000_000_000
"""Where the calendar ends, less two days, so that every zone can show it."""
DEFAULT_QUEUE = "default"
LEASE_SECONDS = 30.0
"""How long an instance that does not beat is taken for alive."""
MOST_DAYS = 365_000
"""Far from where the calendar begins and ends."""
MOST_RETRIES = 1_000_000


class TaskStatus(StrEnum):
    PENDING = "pending"
    """Accepted and waiting: for a slot, for its time, or for its next attempt."""
    RUNNING = "running"
    """Claimed by one instance, which holds its lease."""
    SUCCESS = "success"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """Its process went away while it ran; not started again without an operator."""
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    """Its queue was full; kept so that it can be seen and requeued."""

    @property
    def terminal(self) -> bool:
        return self not in (TaskStatus.PENDING, TaskStatus.RUNNING)


DELAYED = "delayed"
"""How a PENDING task is *stored* while its `run_at` lies ahead.

Kept apart from "pending", so that the claim's index and a queue's count hold only what may start now. Readers
never see it: a record says PENDING.
"""

TRANSITIONS: Mapping[TaskStatus | None, frozenset[TaskStatus]] = MappingProxyType(
    {
        None: frozenset({TaskStatus.PENDING, TaskStatus.REJECTED}),
        TaskStatus.PENDING: frozenset({TaskStatus.RUNNING, TaskStatus.CANCELLED}),
        TaskStatus.RUNNING: frozenset(
            {
                TaskStatus.SUCCESS,
                TaskStatus.FAILED,
                TaskStatus.PENDING,
                TaskStatus.CANCELLED,
                TaskStatus.INTERRUPTED,
            }
        ),
        TaskStatus.SUCCESS: frozenset(),
        TaskStatus.FAILED: frozenset({TaskStatus.PENDING}),
        TaskStatus.INTERRUPTED: frozenset({TaskStatus.PENDING}),
        TaskStatus.CANCELLED: frozenset({TaskStatus.PENDING}),
        TaskStatus.REJECTED: frozenset({TaskStatus.PENDING}),
    }
)
"""Every change of status that may ever be written; `None` is a task that does not exist yet."""

RETRYABLE = frozenset(status for status, targets in TRANSITIONS.items() if status and status.terminal and targets)
"""Statuses from which an operator may requeue."""


class EventKind(StrEnum):
    """What an event row records, and the transition it stands for."""

    ACCEPTED = "accepted"  # (nothing) -> PENDING
    REJECTED = "rejected"  # (nothing) -> REJECTED
    STARTED = "started"  # PENDING -> RUNNING
    SUCCEEDED = "succeeded"  # RUNNING -> SUCCESS
    RETRYING = "retrying"  # RUNNING -> PENDING: the attempt failed, or asked to be run later
    FAILED = "failed"  # RUNNING -> FAILED
    CANCEL_REQUESTED = "cancel_requested"  # RUNNING stays, its owner is told
    CANCELLED = "cancelled"  # PENDING or RUNNING -> CANCELLED
    INTERRUPTED = "interrupted"  # RUNNING -> INTERRUPTED
    RESCUED = "rescued"  # RUNNING -> PENDING: its process went away and the task may be started again
    RETURNED = "returned"  # RUNNING -> PENDING: claimed while its instance stopped, given back before it began
    MOVED = "moved"  # PENDING stays: a one-off with an idempotency key was given another time
    REQUEUED = "requeued"  # a terminal status -> PENDING, by an operator
    COPIED = "copied"  # no transition: an operator's retry made a new task of it
    LEASE_LOST = "lease_lost"  # no transition: a result that came too late was refused
    UPDATE_QUEUE = "update_queue"  # of a queue, by an operator
    PAUSE_QUEUE = "pause_queue"
    RESUME_QUEUE = "resume_queue"
    DISMISSED = "dismissed"  # no transition: somebody has seen to a FAILED task, and says why
    RESTORED = "restored"  # no transition: it was not seen to after all
    RUN_BY_HAND = "run_by_hand"  # no transition: an operator made the task, with arguments of their own
    BULK_RETRY = "bulk_retry"  # of many tasks, by an operator
    BULK_CANCEL = "bulk_cancel"
    BULK_DISMISS = "bulk_dismiss"
    BULK_RESTORE = "bulk_restore"
    DELETE_HISTORY = "delete_history"
    TICK_SKIPPED = "tick_skipped"  # of a schedule: a tick, or several that were missed, made no task
    RUN_SCHEDULE = "run_schedule"  # of a schedule, by an operator
    PAUSE_SCHEDULE = "pause_schedule"
    RESUME_SCHEDULE = "resume_schedule"
    CANCEL_SCHEDULED = "cancel_scheduled"  # of a one-off, by an operator
    MOVE_SCHEDULED = "move_scheduled"
    DRAIN_INSTANCE = "drain_instance"  # of a process, by an operator
    LOGIN = "login"  # of no task: people who come and go
    LOGIN_FAILED = "login_failed"
    LOGOUT = "logout"


ExecutorKind = Literal["async", "thread", "process"]
RetryOn = Callable[[BaseException], bool | float] | Collection[type[BaseException]]
"""Exception classes to retry, or a function that says yes, no, or after how many seconds."""


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """How one task function is to be run. Checked where it is written, not when it runs.

    `delay`, `max_delay` and `timeout` are seconds. Retry n (from 0) waits `delay * backoff**n`, at most
    `max_delay`; with `jitter` a random time between 0 and that.
    """

    name: str | None = None
    retries: int = 0
    delay: float = 0.0
    backoff: float = 1.0
    max_delay: float | None = None
    jitter: bool = False
    retry_on: RetryOn | None = None
    timeout: float | None = None
    queue: str | None = None
    priority: int | None = None
    executor: ExecutorKind | None = None
    eager: bool = False
    persist: bool = True
    """Accepted so that existing decorators keep working; every task is stored, whatever it says."""
    requeue_on_interrupt: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option, name in (("name", self.name), ("queue", self.queue)):
            if name is not None:
                _checked(option, name, name_text)
        object.__setattr__(self, "tags", _checked("tags", self.tags, tag_texts))
        require(is_whole(self.retries) and self.retries >= 0, "retries", self.retries, "0 or more")
        require(self.retries <= MOST_RETRIES, "retries", self.retries, f"at most {MOST_RETRIES:,}")
        require(is_finite(self.delay) and self.delay >= 0, "delay", self.delay, "0 or more seconds")
        require(is_finite(self.backoff) and self.backoff > 0, "backoff", self.backoff, "above 0")
        for option, value in (("max_delay", self.max_delay), ("timeout", self.timeout)):
            require(value is None or (is_finite(value) and value > 0), option, value, "None or above 0 seconds")
        require(
            self.executor in (None, "async", "thread", "process"), "executor", self.executor, "async, thread or process"
        )
        for option, value in (
            ("jitter", self.jitter),
            ("eager", self.eager),
            ("persist", self.persist),
            ("requeue_on_interrupt", self.requeue_on_interrupt),
        ):
            require(isinstance(value, bool), option, value, "True or False")
        require(is_retry_policy(self.retry_on), "retry_on", self.retry_on, "exception classes or a function")
        require(
            self.priority is None or (is_whole(self.priority) and abs(self.priority) < 2**31),
            "priority",
            self.priority,
            "None or a 32-bit integer",
        )


class TaskOptions(TypedDict, total=False):
    """The settings of `TaskConfig` as the decorators take them."""

    name: str | None
    retries: int
    delay: float
    backoff: float
    max_delay: float | None
    jitter: bool
    retry_on: RetryOn | type[BaseException] | None
    timeout: float | None
    queue: str | None
    priority: int | None
    executor: ExecutorKind | None
    eager: bool
    persist: bool
    requeue_on_interrupt: bool
    tags: Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """Limits of one named queue: tasks running at once, and tasks waiting to start. None is no limit."""

    concurrency: int | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        for option, value in (("concurrency", self.concurrency), ("max_size", self.max_size)):
            require(value is None or (is_whole(value) and value >= 1), option, value, "None or 1 and more")
            require((value or 0) < 2**31, option, value, "a 32-bit integer")


@dataclass(frozen=True, slots=True)
class QueueState:
    """A queue as it is now: the limits in force, which operators may have edited, and its numbers."""

    name: str
    concurrency: int | None
    max_size: int | None
    paused: bool
    reason: str | None
    """Why it is paused, as the operator said."""
    pending: int = 0
    """Waiting to start now; delayed tasks and retry waits are not counted."""
    running: int = 0
    finished: int = 0
    rejected: int = 0


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One task as it stands in the database. `attempt` is the number of attempts started so far."""

    task_id: str
    func_name: str
    status: TaskStatus
    queue: str
    priority: int | None
    executor: str
    source: str
    tags: Mapping[str, str]
    created_at: datetime
    run_at: datetime
    start_time: datetime | None
    end_time: datetime | None
    attempt: int
    excused: int
    """Started attempts that do not count: ended by an interruption or `RetryLater`, or before an operator's retry."""
    max_attempts: int
    error: str | None
    stacktrace: str | None
    arguments: str | None
    """Encoded arguments, as `codec` wrote them; None where the reader did not ask for them."""
    result: str | None
    progress: Mapping[str, Any] | None
    instance: str | None
    idempotency_key: str | None
    cancel_requested: bool
    retry_of: str | None
    schedule: str | None = None
    """The schedule of which it is a run."""
    run_key: str | None = None
    """The replaceable key of a one-off."""
    error_key: str | None = None
    """The group of failures that it belongs to, once it FAILED."""
    dismissed: bool = False
    """Whether somebody has seen to it that it FAILED."""

    @property
    def duration(self) -> float | None:
        """Seconds from the last start to the end."""
        if self.start_time is None or self.end_time is None:
            return None
        return max(0.0, (self.end_time - self.start_time).total_seconds())

    @property
    def retries_used(self) -> int:
        return max(0, self.attempt - self.excused - 1)


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """One line of a task's history. `attempt` counts from 0; None where no attempt is meant."""

    seq: int
    task_id: str
    time: datetime
    kind: str
    attempt: int | None
    instance: str | None
    actor: str | None
    detail: str | None


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One stored `task_log` line. `attempt` counts from 0."""

    seq: int
    task_id: str
    time: datetime
    level: str
    attempt: int
    message: str
    extra: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks a page shows; every part that is set must hold."""

    statuses: tuple[TaskStatus, ...] = ()
    func_name: str | None = None
    queue: str | None = None
    source: str | None = None
    schedule: str | None = None
    tags: tuple[tuple[str, str], ...] = ()
    since: datetime | None = None
    until: datetime | None = None
    text: str | None = None
    """Words found in the name, the start of the id, the error or a tag."""
    error_key: str | None = None
    """Of one group of failures."""
    dismissed: bool | None = None
    task_id: str | None = None
    """The start of it."""
    key: str | None = None
    """The idempotency key."""
    error: str | None = None
    """Words found in the error."""
    arguments: str | None = None
    """Words found in the stored arguments; none are, where these are sealed."""
    attempts: tuple[Literal["<", "=", ">"], int] | None = None
    """How many were started."""

    @property
    def counted(self) -> bool:
        """Whether the counts alone say how many tasks match."""
        by_counts = TaskFilter(self.statuses, self.func_name, self.queue)
        return self == by_counts

    def counts(self, count: Count) -> bool:
        """Whether the tasks of a count match, as far as counts can tell."""
        return (
            (not self.statuses or count.status in self.statuses)
            and self.func_name in (None, count.name)
            and self.queue in (None, count.queue)
        )


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which acts of people are shown; every part that is set must hold."""

    actor: str | None = None
    kinds: tuple[str, ...] = ()
    subject: str | None = None
    """A task's id, or words of what an act is about otherwise."""
    since: datetime | None = None
    until: datetime | None = None

    @property
    def asks(self) -> bool:
        return self != AuditFilter()


@dataclass(frozen=True, slots=True)
class ErrorGroup:
    """Failures with one cause: see `failures.py`."""

    key: str
    func_name: str
    error_type: str
    message: str
    """Of the newest."""
    frame: str
    first_at: datetime
    last_at: datetime
    open: int
    """Tasks that FAILED for it, and that nobody has dismissed."""
    dismissed: int


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the list of tasks, newest first: the page continues below it."""

    created_at: datetime
    task_id: str

    def __str__(self) -> str:
        return f"{to_micros(self.created_at)}_{self.task_id}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Raises ValueError naming the text when it is not a cursor this API gave out."""
        micros, _, task_id = text.partition("_")
        try:
            if not task_id:
                raise ValueError
            return cls(from_micros(int(micros)), task_id)
        except (ValueError, OverflowError):
            raise ValueError(f"before={text!r}: not a cursor of this list") from None


@dataclass(frozen=True, slots=True)
class TaskPage:
    tasks: Sequence[TaskRecord]
    older: Cursor | None
    """Where the next page starts; None on the last one."""


@dataclass(frozen=True, slots=True)
class Count:
    """How many tasks of one name in one queue have one status, and the seconds they ran."""

    queue: str
    name: str
    status: TaskStatus
    n: int
    seconds: float
    delayed: int = 0
    """Of PENDING ones, those that wait for a time ahead."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """How a process was at its last heartbeat."""

    busy: Mapping[str, tuple[int, int]]
    """Executor -> calls under way, and how many it takes at once."""
    backlog: int = 0
    """Tasks, commands, ends and log lines that waited to be written."""
    commit: float | None = None
    """Seconds that its last commit took; None before the first."""
    memory: int | None = None
    """Bytes; None where the system does not say."""


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """One process that serves this backend, or did."""

    instance_id: str
    host: str
    pid: int
    version: str
    started: datetime
    heartbeat: datetime
    slots: int
    running: int
    vitals: Vitals | None = None
    """None of a process whose code says nothing of that."""

    def alive(self, now: datetime) -> bool:
        return now - self.heartbeat < timedelta(seconds=LEASE_SECONDS)


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """A schedule as it stands in the database: what the code last said about it, and how far it has come."""

    name: str
    func_name: str
    trigger: str
    """As people read it: the cron expression, or `every 60 s`."""
    timezone: str
    overlap: bool
    misfire: str
    paused: bool
    reason: str | None
    """Why it is paused, as the operator said."""
    last_tick: datetime
    """The newest tick that was fired, skipped or dropped; for a new schedule, when it became known."""
    next_tick: datetime | None
    last_run: datetime | None
    """The tick of its last task, or when an operator ran it."""
    last_task_id: str | None
    last_status: TaskStatus | None
    """None before the first run, and once its task was deleted."""


@dataclass(frozen=True, slots=True)
class ScheduledOnce:
    """A one-off task that waits for its time under a replaceable key."""

    run_key: str
    task_id: str
    func_name: str
    fire_at: datetime
    queue: str
    priority: int | None
    tags: Mapping[str, str]
    created_at: datetime
    args: tuple[Any, ...] = ()
    """What its function will get; nothing where the reader did not ask for it."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def schedule_subject(name: str) -> str:
    """What stands for a task's id in events that are about a schedule."""
    return f"schedule:{name}"


def is_retry_policy(policy: object) -> bool:
    if policy is None:
        return True
    if callable(policy) and not isinstance(policy, type):
        return not (inspect.iscoroutinefunction(policy) or inspect.isasyncgenfunction(policy))  # nobody would await it
    return isinstance(policy, Collection) and all(
        isinstance(kind, type) and issubclass(kind, BaseException) for kind in policy
    )


def utc_now() -> datetime:
    return datetime.now(UTC)


def to_micros(moment: datetime) -> int:
    """Integer microseconds since the epoch, exact for every datetime."""
    since = moment - EPOCH  # spelled out: a division by timedelta(microseconds=1) takes three times as long
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def from_micros(micros: int) -> datetime:
    return EPOCH + timedelta(microseconds=micros)


def _checked(option: str, value: object, rule: Callable[[object], T]) -> T:
    try:
        return rule(value)
    except ValueError as error:
        raise TaskDefinitionError(f"{option}={value!r}: {error}") from error


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether it is a number that a clock can be asked for."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require(holds: bool, option: str, value: object, rule: str) -> None:
    if not holds:
        raise TaskDefinitionError(f"{option}={value!r}: must be {rule}")
