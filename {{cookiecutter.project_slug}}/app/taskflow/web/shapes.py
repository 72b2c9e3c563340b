"""The shapes of the API's answers, for OpenAPI and so for /docs.

Owns the names of their fields and their description: `records.py` makes the answers by them, and none is validated on
its way out.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..models import TaskStatus


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ShownTask(Shape):
    """A task in a list."""

    task_id: str
    func_name: str
    status: TaskStatus
    created_at: datetime
    start_time: datetime | None = Field(description="of the last attempt")
    end_time: datetime | None
    duration: float | None = Field(description="seconds from the last start to the end")
    retries_used: int
    error: str | None
    tags: dict[str, str]
    source: str = Field(description="manual or scheduled")
    priority: int | None
    executor: str
    queue: str
    run_at: datetime = Field(description="not before this time")
    attempt: int = Field(description="attempts started so far")
    max_attempts: int
    result: Any = Field(description="what the task returned, as plain JSON")
    progress: dict[str, Any] | None = Field(description="what the task said last: done, total, message")
    instance: str | None = Field(description="the process that ran it last")
    args: list[Any] | None = Field(None, description="only with display_func_args; null when they are encrypted")
    kwargs: dict[str, Any] | None = Field(None, description="only with display_func_args; null when they are encrypted")


class ShownTaskRecord(ShownTask):
    """One task with the texts that can be long."""

    logs: list[str] = Field(examples=[["2026-01-01T12:00:00Z calling the provider", "--- Retry 1 ---"]])
    stacktrace: str | None


class ShownCommand(Shape):
    """What a command made of a task."""

    task_id: str
    task: ShownTaskRecord


class ShownEvent(Shape):
    seq: int
    time: datetime
    kind: str
    attempt: int | None = Field(description="counts from 0")
    instance: str | None
    actor: str | None
    detail: str | None


class ShownLogLine(Shape):
    seq: int
    time: datetime
    level: str
    attempt: int = Field(description="counts from 0")
    message: str
    extra: dict[str, Any]


class ShownMetrics(Shape):
    total: int
    success: int
    failed: int
    running: int
    pending: int
    interrupted: int
    cancelled: int
    rejected: int
    success_rate: float = Field(description="0 to 1")
    avg_duration_seconds: float


class ShownInstance(Shape):
    """A process that serves these tasks."""

    id: str
    host: str
    pid: int
    version: str
    started: datetime
    heartbeat: datetime
    slots: int
    running: int


class ShownQueue(Shape):
    name: str
    concurrency: int | None = Field(description="tasks that may run at once; null: no limit")
    max_size: int | None = Field(description="tasks that may wait to start; null: no limit")
    paused: bool
    reason: str | None = Field(description="why it is paused")
    pending: int = Field(description="waiting to start now, without delayed ones and retry waits")
    running: int
    finished: int
    rejected: int


class ShownSchedule(Shape):
    name: str
    func_name: str
    trigger: str = Field(examples=["every 60 s", "0 2 * * *"])
    timezone: str
    next_run: datetime | None = Field(description="null while it is paused, or is not in this process's code")
    last_run: datetime | None
    last_status: TaskStatus | None
    last_task_id: str | None
    paused: bool
    reason: str | None = Field(description="why it is paused")
    overlap: bool
    misfire: Literal["skip", "once", "all"]


class ShownScheduleRun(ShownSchedule):
    task_id: str = Field(description="of the new task")


class ShownScheduledOnce(Shape):
    """A one-off that waits for its time."""

    run_key: str
    task_id: str
    func_name: str
    fire_at: datetime
    queue: str
    priority: int | None
    tags: dict[str, str]
    created_at: datetime


class ShownCancellation(Shape):
    run_key: str
    cancelled: bool


class ShownRetry(Shape):
    original_task_id: str
    new_task_id: str = Field(description="the same, where a retry replaces the original")


class ShownBulkRetry(Shape):
    dispatched: int
    skipped: int = Field(description="unknown, not to be retried, or without their function in this process")
    results: list[ShownRetry]


class ShownDeletion(Shape):
    deleted: int


class ShownAuditEntry(Shape):
    """Something that a person did."""

    entry_id: str
    action: Literal[
        "retry",
        "bulk_retry",
        "cancel",
        "update_queue",
        "pause_queue",
        "resume_queue",
        "run_schedule",
        "pause_schedule",
        "resume_schedule",
        "cancel_scheduled",
        "delete_history",
        "login",
        "login_failed",
        "logout",
    ]
    task_id: str | None = Field(description="null where it was not about one task")
    actor: str
    timestamp: datetime
    detail: dict[str, Any]


class ShownHealth(Shape):
    status: str


class ShownProblem(Shape):
    detail: str


Responses = dict[int | str, dict[str, Any]]

REFUSALS: Responses = {
    401: {"model": ShownProblem, "description": "Not logged in"},
    403: {"model": ShownProblem, "description": "From another site, or from elsewhere while no login is set up"},
    503: {"model": ShownProblem, "description": "The backend is away; see Retry-After"},
}
"""What every route may answer."""
UNKNOWN: Responses = {404: {"model": ShownProblem, "description": "There is none"}}
COMMANDS: Responses = UNKNOWN | {400: {"model": ShownProblem, "description": "Not in this status"}}
GONE: Responses = {409: {"model": ShownProblem, "description": "Its function or its arguments cannot be had here"}}
