"""Alerts: an observer that hears of every task that failed for good, and tells people; slow or broken, it costs no task
anything."""

import httpx2

from app.taskflow import LifecycleEvent, TaskManager, TaskObserver, TaskStatus


class ChatAlerts(TaskObserver):
    def __init__(self, client: httpx2.AsyncClient) -> None:
        super().__init__()
        self._client = client

    async def on_lifecycle(self, event: LifecycleEvent) -> None:
        if event.status in (TaskStatus.FAILED, TaskStatus.INTERRUPTED):
            text = f"{event.func_name} {event.status} after {event.attempt + 1} attempts: {event.error}"
            await self._client.post("/hooks/tasks", json={"text": text, "task_id": event.task_id})

    async def close(self) -> None:
        await self._client.aclose()


def make_manager(client: httpx2.AsyncClient) -> TaskManager:
    return TaskManager(loggers=[ChatAlerts(client)])
