"""The tables, as SQLModel classes, and the schema's numbered steps.

Owns names, columns and indexes; `sql.py` owns every statement over them. The tables have their own metadata and
the prefix `taskflow_`, so that they can live in the same database as the team's models. Times are integer
microseconds since the epoch, JSON is text: both sort and copy the same on every database.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    MetaData,
    Text,
    func,
    inspect,
    literal_column,
    text,
)
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateIndex
from sqlmodel import Field, SQLModel

SCHEMA_VERSION = 7


class Row(SQLModel):
    metadata = MetaData()


class TaskRow(Row, table=True):
    """The present state of a task. Its history is `EventRow`."""

    __tablename__ = "taskflow_task"

    task_id: str = Field(primary_key=True)
    name: str
    queue: str
    priority: int | None = None
    executor: str
    source: str
    status: str
    """A `TaskStatus`, or `DELAYED`."""
    attempt: int = 0
    excused: int = 0
    crashes: int = 0
    max_attempts: int
    created_at: int = Field(sa_type=BigInteger)
    run_at: int = Field(sa_type=BigInteger)
    started_at: int | None = Field(default=None, sa_type=BigInteger)
    finished_at: int | None = Field(default=None, sa_type=BigInteger)
    instance: str | None = None
    requeue: bool = False
    cancel_requested: bool = False
    arguments: str = Field(sa_type=Text)
    result: str | None = Field(default=None, sa_type=Text)
    error: str | None = Field(default=None, sa_type=Text)
    stacktrace: str | None = Field(default=None, sa_type=Text)
    tags: str = Field(default="{}", sa_type=Text)
    progress: str | None = Field(default=None, sa_type=Text)
    idempotency_key: str | None = None
    retry_of: str | None = None
    trace: str | None = None
    schedule: str | None = None
    """The schedule of which it is a run."""
    run_key: str | None = None
    """The replaceable key of a one-off."""
    error_key: str | None = None
    """The group of failures that it belongs to, once it FAILED."""
    dismissed_at: int | None = Field(default=None, sa_type=BigInteger)


class TagRow(Row, table=True):
    """The index of tags, `key:value` of each. Triggers keep it, so that whoever writes a task does: older code, too."""

    __tablename__ = "taskflow_tag"
    __table_args__ = {"sqlite_with_rowid": False}

    tag: str = Field(primary_key=True)
    created_at: int = Field(primary_key=True, sa_type=BigInteger)
    task_id: str = Field(primary_key=True)


class EventRow(Row, table=True):
    """The append-only history of all tasks: timeline, audit trail and the live stream's cursor."""

    __tablename__ = "taskflow_event"
    __table_args__ = {"sqlite_autoincrement": True}

    seq: int | None = Field(default=None, primary_key=True, sa_type=BigInteger().with_variant(Integer, "sqlite"))
    task_id: str
    at: int = Field(sa_type=BigInteger)
    kind: str
    attempt: int | None = None
    instance: str | None = None
    actor: str | None = None
    detail: str | None = Field(default=None, sa_type=Text)


class LogRow(Row, table=True):
    __tablename__ = "taskflow_log"
    __table_args__ = {"sqlite_autoincrement": True}

    seq: int | None = Field(default=None, primary_key=True, sa_type=BigInteger().with_variant(Integer, "sqlite"))
    task_id: str
    at: int = Field(sa_type=BigInteger)
    level: str
    attempt: int
    message: str = Field(sa_type=Text)
    extra: str = Field(default="{}", sa_type=Text)


class CounterRow(Row, table=True):
    """How many tasks there are, kept in the transactions that change them and never counted over the task table."""

    __tablename__ = "taskflow_counter"

    queue: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    status: str = Field(primary_key=True)
    n: int = Field(default=0, sa_type=BigInteger)
    micros: int = Field(default=0, sa_type=BigInteger)
    """Microseconds that the counted tasks ran."""


class FailureRow(Row, table=True):
    """Groups of tasks that FAILED for one cause, and how many there are, kept in the transactions that change them."""

    __tablename__ = "taskflow_failure"

    error_key: str = Field(primary_key=True)
    name: str
    error_type: str
    message: str = Field(sa_type=Text)
    frame: str
    first_at: int = Field(sa_type=BigInteger)
    last_at: int = Field(sa_type=BigInteger)
    open: int = Field(default=0, sa_type=BigInteger)
    dismissed: int = Field(default=0, sa_type=BigInteger)


class GaugeRow(Row, table=True):
    """What each instance did in each bucket of time, for charts: see `history.py`."""

    __tablename__ = "taskflow_gauge"

    size: int = Field(primary_key=True)
    """Seconds of the bucket."""
    kind: str = Field(primary_key=True)
    at: int = Field(primary_key=True, sa_type=BigInteger)
    series: str = Field(primary_key=True)
    instance: str = Field(primary_key=True)
    sums: str = Field(sa_type=Text)


class QueueRow(Row, table=True):
    """Limits of named queues. `declared` is what the code said when the limits were last taken from it."""

    __tablename__ = "taskflow_queue"

    name: str = Field(primary_key=True)
    concurrency: int | None = None
    max_size: int | None = None
    paused: bool = False
    reason: str | None = None
    declared: str | None = None
    version: int = Field(index=True)
    """Higher than any before it, with every change: tells instances that what they remember is old."""


class ScheduleRow(Row, table=True):
    """Schedules that any code declared, and how far each has come: up to `last_tick` everything is settled."""

    __tablename__ = "taskflow_schedule"

    name: str = Field(primary_key=True)
    func_name: str
    trigger: str
    timezone: str
    overlap: bool
    misfire: str
    paused: bool = False
    reason: str | None = None
    last_tick: int = Field(sa_type=BigInteger)
    next_tick: int | None = Field(default=None, sa_type=BigInteger)
    last_run: int | None = Field(default=None, sa_type=BigInteger)
    last_task_id: str | None = None
    started_at: int | None = Field(default=None, sa_type=BigInteger)
    """When `run_on_startup` last made a task."""


class InstanceRow(Row, table=True):
    """Processes that serve this database. The lease of all they run holds until `lease_until`."""

    __tablename__ = "taskflow_instance"

    instance_id: str = Field(primary_key=True)
    host: str
    machine: str
    pid: int
    birth: str
    version: str
    started_at: int = Field(sa_type=BigInteger)
    beat_at: int = Field(sa_type=BigInteger)
    lease_until: int = Field(sa_type=BigInteger)
    slots: int = 0
    running: int = 0
    vitals: str | None = None


class RevokedRow(Row, table=True):
    """Login sessions that ended before their time, until they would have ended anyway."""

    __tablename__ = "taskflow_revoked"

    session_id: str = Field(primary_key=True)
    expires_at: int = Field(sa_type=BigInteger, index=True)


class SchemaRow(Row, table=True):
    __tablename__ = "taskflow_schema_version"

    version: int = Field(primary_key=True)


task = TaskRow.__table__  # type: ignore[attr-defined]
tag = TagRow.__table__  # type: ignore[attr-defined]
event = EventRow.__table__  # type: ignore[attr-defined]
log = LogRow.__table__  # type: ignore[attr-defined]
counter = CounterRow.__table__  # type: ignore[attr-defined]
failure = FailureRow.__table__  # type: ignore[attr-defined]
gauge = GaugeRow.__table__  # type: ignore[attr-defined]
queue = QueueRow.__table__  # type: ignore[attr-defined]
schedule = ScheduleRow.__table__  # type: ignore[attr-defined]
instance = InstanceRow.__table__  # type: ignore[attr-defined]
revoked = RevokedRow.__table__  # type: ignore[attr-defined]
schema_version = SchemaRow.__table__  # type: ignore[attr-defined]

rank = func.coalesce(task.c.priority, literal_column("0"))
"""What the claim sorts by. The zero is a literal: an index on an expression is only used for the same expression."""


WAITING = "status || '' IN ('pending', 'delayed')"
LIVE = "status || '' IN ('pending', 'delayed', 'running')"
"""Conditions of partial indexes; a statement that shows the same words is answered from them. The status is compared as
an expression, because SQLite would otherwise prefer the index of all statuses."""


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


def _only(status: str) -> dict[str, Any]:
    return _where(f"status = '{status}'")


# One index for each question that is asked, and no other. The partial ones repeat the status, which makes SQLite
# prefer them to the index of all statuses.
claim_index = Index(
    "taskflow_claim",
    task.c.queue,
    task.c.executor,
    rank.desc(),
    task.c.run_at,
    task.c.task_id,
    task.c.name,
    **_only("pending"),
)
Index("taskflow_due", task.c.status, task.c.run_at, **_only("delayed"))
Index("taskflow_lease", task.c.status, task.c.instance, **_only("running"))
Index("taskflow_recent", task.c.created_at, task.c.task_id)
Index("taskflow_by_status", task.c.status, task.c.created_at, task.c.task_id)
Index("taskflow_by_name", task.c.name, task.c.created_at, task.c.task_id)
Index("taskflow_by_queue", task.c.queue, task.c.created_at, task.c.task_id)
Index("taskflow_event_task", event.c.task_id, event.c.seq)
audit_index = Index("taskflow_audit", event.c.seq, **_where("actor IS NOT NULL"))
Index("taskflow_log_task", log.c.task_id, log.c.seq)
runs_index = Index(
    "taskflow_runs", task.c.schedule, task.c.created_at, task.c.task_id, **_where("schedule IS NOT NULL")
)
live_runs_index = Index("taskflow_live_runs", task.c.schedule, **_where(f"schedule IS NOT NULL AND {LIVE}"))
run_key_index = Index("taskflow_run_key", task.c.run_key, **_where(f"run_key IS NOT NULL AND {WAITING}"))
one_offs_index = Index(
    "taskflow_one_offs", task.c.run_at, task.c.task_id, **_where(f"run_key IS NOT NULL AND {WAITING}")
)
skips_index = Index("taskflow_skips", event.c.at, **_where("kind = 'tick_skipped'"))

by_error_index = Index(
    "taskflow_by_error", task.c.error_key, task.c.created_at, task.c.task_id, **_where("error_key IS NOT NULL")
)
Index("taskflow_open_failures", failure.c.last_at, failure.c.error_key, **_where("open > 0"))
Index("taskflow_dismissed_failures", failure.c.last_at, failure.c.error_key, **_where("dismissed > 0"))

Index("taskflow_old_gauges", gauge.c.size, gauge.c.at)

TAG_INDEX = ("tag_new_tasks", "tag_changed_tasks", "tag_gone_tasks", "tag_old_tasks")
"""Statements of each dialect: the triggers of the same names, and the tasks that were there before them."""
TRIGGERS: Mapping[str, str] = {
    "sqlite": "SELECT name FROM sqlite_master WHERE type = 'trigger'",
    "postgresql": "SELECT tgname FROM pg_trigger WHERE tgrelid = 'taskflow_task'::regclass",
}

Step = Callable[[Connection], object]


def missing(connection: Connection) -> list[str]:
    """Tables, columns and triggers that should be there."""
    schema = inspect(connection)
    found = {name: {column["name"] for column in schema.get_columns(name)} for name in schema.get_table_names()}
    gone = [f"table {name}" for name in Row.metadata.tables if name not in found]
    for name, table in Row.metadata.tables.items():
        gone += [
            f"column {name}.{column.name}" for column in table.c if name in found and column.name not in found[name]
        ]
    if task.name in found:
        triggers = connection.execute(text(TRIGGERS[connection.dialect.name])).scalars().all()
        gone += [f"trigger taskflow_{name}" for name in TAG_INDEX[:-1] if f"taskflow_{name}" not in triggers]
    return gone


def add_column(column: Column[Any]) -> Step:
    """Adds a column that may be null, where the table does not have it yet."""

    def step(connection: Connection) -> None:
        names = {found["name"] for found in inspect(connection).get_columns(column.table.name)}
        if column.name not in names:
            kind = column.type.compile(connection.dialect)
            connection.execute(text(f"ALTER TABLE {column.table.name} ADD COLUMN {column.name} {kind}"))

    return step


def add_index(index: Index) -> Step:
    return lambda connection: connection.execute(CreateIndex(index, if_not_exists=True))


def drop_index(name: str) -> Step:
    return lambda connection: connection.execute(text(f"DROP INDEX IF EXISTS {name}"))


STEPS: Mapping[int, Sequence[Step]] = {
    2: (add_index(audit_index),),
    3: (
        add_column(task.c.schedule),
        add_column(task.c.run_key),
        *map(add_index, (runs_index, live_runs_index, run_key_index, one_offs_index, skips_index)),
    ),
    4: (drop_index("taskflow_ready"), add_index(claim_index)),
    5: (add_column(task.c.error_key), add_column(task.c.dismissed_at), add_index(by_error_index)),
    6: (add_column(instance.c.vitals),),
    7: (),  # the index of tags
}
"""Schema version -> what brings an older schema to it; each may run twice. New tables come by themselves, that of tags
with its triggers."""
