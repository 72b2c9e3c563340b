"""Your routes. `add_task` of their `BackgroundTasks` returns an id that is durable before the response starts."""

from fastapi import APIRouter

router = APIRouter()
