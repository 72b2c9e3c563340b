"""The app that the task system is a guest of: its lifespan, and what it answers when a route lets an error through.

Called by `TaskManager.init_app` and by `TaskAdmin`. FastAPI itself is not patched: two apps in one process keep apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse
from starlette.websockets import WebSocketState

from .errors import (
    BackendUnavailable,
    InstanceNotFound,
    QueueFullError,
    QueueNotFound,
    ScheduleNotFound,
    TaskArgumentError,
    TaskflowError,
    TaskNotFound,
    TaskStateError,
    TooManyRuns,
    UnknownFunction,
    UnreadableCall,
)

STATUS_CODES: dict[type[TaskflowError], int] = {
    TaskArgumentError: 422,
    QueueFullError: 429,
    TooManyRuns: 429,
    BackendUnavailable: 503,
    TaskNotFound: 404,
    QueueNotFound: 404,
    InstanceNotFound: 404,
    ScheduleNotFound: 404,
    TaskStateError: 400,
    UnknownFunction: 409,
    UnreadableCall: 409,
}

LONGEST_REASON = 123
"""Bytes: what a websocket's close message has room for."""


def join_lifespan(app: FastAPI, lifespan: Callable[[Any], Any]) -> None:
    """Enters `lifespan` inside the app's own: after its start-up, and left before its shutdown."""
    app.include_router(APIRouter(lifespan=lifespan))


def install_error_handlers(app: FastAPI) -> None:
    """What a route lets through becomes the answer its name promises, not a 500; the app's own handlers stay."""
    for error in STATUS_CODES:
        app.exception_handlers.setdefault(error, answer_error)  # type: ignore[arg-type]


async def answer_error(connection: Request | WebSocket, error: Exception) -> JSONResponse | None:
    if isinstance(connection, WebSocket) and connection.application_state is not WebSocketState.CONNECTING:
        await end_talk(connection, error)
        return None
    assert isinstance(error, TaskflowError)
    return JSONResponse({"detail": str(error)}, status_of(error), headers_of(error))


def status_of(error: TaskflowError) -> int:
    return next((code for kind, code in STATUS_CODES.items() if isinstance(error, kind)), 400)


def headers_of(error: TaskflowError) -> dict[str, str]:
    if isinstance(error, BackendUnavailable | QueueFullError | TooManyRuns):
        return {"Retry-After": str(BackendUnavailable.retry_after)}
    return {}


async def end_talk(socket: WebSocket, error: Exception) -> None:
    """1013 is "try again later", 1008 "against the rules"."""
    if socket.application_state is WebSocketState.CONNECTED:
        reason = str(error).encode()[:LONGEST_REASON].decode(errors="ignore")
        await socket.close(1013 if isinstance(error, BackendUnavailable | QueueFullError) else 1008, reason)
