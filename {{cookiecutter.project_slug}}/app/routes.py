"""Your routes. `add_task` returns an id that is durable before the response starts.

FastAPI's own `BackgroundTasks` works as well; ours says in its types that `add_task` returns an id.
"""

from typing import Any

from fastapi import APIRouter

from app.taskflow import ManagedBackgroundTasks as BackgroundTasks
from app.tasks import process_webhook, send_email

router = APIRouter()


@router.post("/signup")
def signup(email: str, background_tasks: BackgroundTasks) -> dict[str, str]:
    task_id = background_tasks.add_task(send_email, address=email)
    return {"task_id": task_id}


@router.post("/webhook")
async def webhook(payload: dict[str, Any], background_tasks: BackgroundTasks) -> dict[str, str]:
    task_id = background_tasks.add_task(process_webhook, payload)
    return {"task_id": task_id}
