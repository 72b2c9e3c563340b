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
    TaskDefinitionError,
    TaskFailed,
    TaskflowError,
    TaskNotFound,
)
from .loggers import FileLogger, InMemoryLogger, StdoutLogger
from .manager import TaskManager
from .models import QueueConfig, ScheduledOnce, TaskConfig, TaskRecord, TaskStatus
from .observers import LifecycleEvent, LogEvent, TaskObserver
from .web.auth import TaskAuthBackend

__all__ = [
    "BackendUnavailable",
    "CancelTask",
    "FileLogger",
    "InMemoryLogger",
    "LifecycleEvent",
    "LogEvent",
    "ManagedBackgroundTasks",
    "QueueConfig",
    "QueueFullError",
    "RetryLater",
    "ScheduledOnce",
    "StdoutLogger",
    "TaskAdmin",
    "TaskArgumentError",
    "TaskAuthBackend",
    "TaskConfig",
    "TaskContext",
    "TaskDefinitionError",
    "TaskFailed",
    "TaskManager",
    "TaskNotFound",
    "TaskObserver",
    "TaskRecord",
    "TaskStatus",
    "TaskflowError",
    "get_task_context",
    "task_log",
]
