"""APScheduler 3 with its jobs in memory: nothing stored, nothing shared."""

from .apscheduler import schedules_in_memory as schedules

__all__ = ["schedules"]
