"""A webhook: checked by its signature, answered at once, delivered once, retried as the receiver wishes."""

import hashlib
import hmac
from typing import Annotated, Any

import httpx2
from fastapi import APIRouter, BackgroundTasks, Depends, Header, HTTPException, Request

from app.taskflow import TaskManager

task_manager = TaskManager()  # yours is in app/tasks.py
router = APIRouter()
SECRET = b"from your settings"


def outgoing() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url="https://crm.example.com", timeout=10)


def as_the_receiver_wishes(error: BaseException) -> bool | float:
    """Retry-After where it is said, the task's own delay for what may pass, no second try for what never will."""
    if isinstance(error, httpx2.HTTPStatusError):
        wish = error.response.headers.get("Retry-After", "")
        return float(wish) if wish.isdecimal() else error.response.status_code >= 500
    return isinstance(error, httpx2.TransportError)


@task_manager.task(retries=8, delay=5, backoff=2, max_delay=3600, jitter=True, retry_on=as_the_receiver_wishes)
async def forward(event: dict[str, Any], client: Annotated[httpx2.AsyncClient, Depends(outgoing)]) -> int:
    async with client:
        response = await client.post("/events", json=event)
        response.raise_for_status()
        return response.status_code


@router.post("/webhook", status_code=202)
async def webhook(
    request: Request, background_tasks: BackgroundTasks, x_signature: Annotated[str, Header()]
) -> dict[str, str]:
    body = await request.body()
    if not hmac.compare_digest(hmac.new(SECRET, body, hashlib.sha256).hexdigest(), x_signature):
        raise HTTPException(401, "the signature does not match")
    event = await request.json()
    # The sender repeats an event until it is answered: its id makes it one task.
    background_tasks.add_task(forward, event, idempotency_key=event["id"])
    return {"accepted": event["id"]}
