"""`TaskAdmin`: the task system as a guest in an app.

Owns what is added to the app: one router with the API and the dashboard, the lifespan, the error handlers, and with
`auto_install` the dependency that manages `BackgroundTasks` on the app's own routes. FastAPI itself is not patched: two
apps in one process keep apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.params import Depends as DependsParam
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from .errors import (
    BackendUnavailable,
    QueueFullError,
    TaskArgumentError,
    TaskflowError,
    TaskNotFound,
    TaskStateError,
    UnknownFunction,
)
from .manager import TaskManager

STATUS_CODES: dict[type[TaskflowError], int] = {
    TaskArgumentError: 422,
    QueueFullError: 429,
    BackendUnavailable: 503,
    TaskNotFound: 404,
    TaskStateError: 400,
    UnknownFunction: 409,
}


def join_lifespan(app: FastAPI, lifespan: Callable[[Any], Any]) -> None:
    """Enters `lifespan` inside the app's own: after its start-up, and left before its shutdown."""
    app.include_router(APIRouter(lifespan=lifespan))


def install_error_handlers(app: FastAPI) -> None:
    """What a route lets through becomes the answer its name promises, not a 500."""
    for error in STATUS_CODES:
        app.add_exception_handler(error, answer_error)


def answer_error(_request: Request, error: Exception) -> JSONResponse:
    headers = {}
    if isinstance(error, BackendUnavailable | QueueFullError):
        headers["Retry-After"] = str(BackendUnavailable.retry_after)
    status = next(code for kind, code in STATUS_CODES.items() if isinstance(error, kind))
    return JSONResponse({"detail": str(error)}, status, headers)


def manage_routes(app: FastAPI, dependency: Callable[..., Any]) -> None:
    """Puts the dependency first on every route of the app: those it has and those still to come."""
    depends = Depends(dependency, scope="function")
    for route in app.router.routes:
        if isinstance(route, APIRoute):
            route.dependencies.insert(0, depends)
            route.dependant.dependencies.insert(
                0, get_parameterless_sub_dependant(depends=depends, path=route.path_format)
            )
        elif (context := getattr(route, "include_context", None)) is not None:
            manage_included(route.original_router, context.dependencies, depends)  # type: ignore[attr-defined]
    app.router.dependencies.insert(0, depends)


def manage_included(router: APIRouter, dependencies: list[DependsParam], depends: DependsParam) -> None:
    """A router that was included earlier keeps a list of what its inclusion adds; what it made of that is remade."""
    dependencies.insert(0, depends)
    router._mark_routes_changed()


class TaskAdmin:
    """Adds the task system to an app: API and dashboard under `path`, start and stop with the app.

    With `auto_install` every `BackgroundTasks` of the app's routes is managed, whether a route was added before or
    comes later.
    """

    def __init__(
        self,
        app: FastAPI,
        task_manager: TaskManager,
        path: str = "/tasks",
        display_func_args: bool = False,
        auto_install: bool = False,
        auth: Any = None,
        token_expiry: int = 86400,
        secret_key: str | None = None,
        poll_interval: float = 30.0,
        title: str = "Taskflow",
        retention_days: float | None = None,
        environment: str = "development",
    ) -> None:
        self.task_manager = task_manager
        app.include_router(APIRouter(lifespan=task_manager.lifespan))
        install_error_handlers(app)
        if auto_install:
            manage_routes(app, task_manager.accept_tasks)
