"""A task system for FastAPI that lives in your code. See README.md beside this file for the map."""

from .admin import TaskAdmin
from .background import ManagedBackgroundTasks
from .context import TaskContext, get_task_context, task_log
from .errors import (
    BackendUnavailable,
    CancelTask,
    QueueFullError,
    RetryLater,
    TaskArgumentError,
    TaskFailed,
    TaskflowError,
    TaskNotFound,
)
from .manager import TaskManager
from .models import QueueConfig, ScheduledOnce, TaskConfig, TaskRecord, TaskStatus

__all__ = [
    "BackendUnavailable",
    "CancelTask",
    "ManagedBackgroundTasks",
    "QueueConfig",
    "QueueFullError",
    "RetryLater",
    "ScheduledOnce",
    "TaskAdmin",
    "TaskArgumentError",
    "TaskConfig",
    "TaskContext",
    "TaskFailed",
    "TaskManager",
    "TaskNotFound",
    "TaskRecord",
    "TaskStatus",
    "TaskflowError",
    "get_task_context",
    "task_log",
]
