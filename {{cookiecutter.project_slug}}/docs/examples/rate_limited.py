"""A client of somebody else's API: two requests at a time on all instances together, and a pause when it says so."""

from typing import Annotated, Any

import httpx2
from fastapi import Depends

from app.taskflow import QueueConfig, RetryLater, TaskManager

task_manager = TaskManager(queues={"crm": QueueConfig(concurrency=2, max_size=10_000)})


def crm() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url="https://crm.example.com", timeout=10)


@task_manager.task(queue="crm", retries=5, delay=2, backoff=2, jitter=True)
async def push_contact(contact: dict[str, Any], client: Annotated[httpx2.AsyncClient, Depends(crm)]) -> int:
    async with client:
        response = await client.put(f"/contacts/{contact['id']}", json=contact)
        if response.status_code == 429:
            raise RetryLater(float(response.headers.get("Retry-After", 30)))  # its fault, not an attempt of ours
        response.raise_for_status()
        return response.status_code
