"""`TaskAdmin`: the task system as a guest in an app.

Owns what is added to the app: one router with the API and the dashboard, the lifespan, the error handlers, and with
`auto_install` the dependency that manages `BackgroundTasks` on the app's own routes. FastAPI itself is not patched: two
apps in one process keep apart.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_parameterless_sub_dependant
from fastapi.params import Depends as DependsParam
from fastapi.routing import APIRoute, APIWebSocketRoute, iter_route_contexts
from starlette.routing import Match
from starlette.types import Scope

from .errors import TaskDefinitionError
from .host import install_error_handlers
from .manager import TaskManager
from .models import MOST_DAYS, is_finite, require
from .web.api import api_router
from .web.auth import Auth, Gate, Sessions, auth_backend
from .web.html import Renderer, assets_router
from .web.login import login_router
from .web.operations import operations_router
from .web.pages import pages_router
from .web.pages.preferences import preferences_router
from .web.redaction import Redaction, words_of
from .web.schedules import schedules_router
from .web.site import Site
from .web.stream import Feed, stream_router
from .web.visits import Visits

logger = logging.getLogger("taskflow")

REFUSALS = {
    "429": {"description": "A queue of the tasks that this adds is full; `Retry-After` says when to come again"},
    "503": {"description": "The tasks that this adds cannot be stored now; `Retry-After` says when to come again"},
}
SHORTEST_KEY = 32
"""Bytes of a key that signs sessions in production."""


def manage_present_routes(app: FastAPI, depends: DependsParam) -> None:
    """Puts the dependency first on every route that the app has."""
    for route in app.router.routes:
        if isinstance(route, APIRoute | APIWebSocketRoute):
            route.dependencies.insert(0, depends)
            route.dependant.dependencies.insert(
                0, get_parameterless_sub_dependant(depends=depends, path=route.path_format)
            )
        elif (context := getattr(route, "include_context", None)) is not None:
            manage_included(route.original_router, context.dependencies, depends)  # type: ignore[attr-defined]


def manage_included(router: APIRouter, dependencies: list[DependsParam], depends: DependsParam) -> None:
    """A router that was included earlier keeps a list of what its inclusion adds; what it made of that is remade."""
    dependencies.insert(0, depends)
    router._mark_routes_changed()


def takes_tasks(dependant: Dependant, get_tasks: Callable[..., Any]) -> bool:
    """Whether a route, or anything it depends on, asks for `BackgroundTasks`. Who asks for `get_tasks` has them."""
    return dependant.background_tasks_param_name is not None or any(
        takes_tasks(asked, get_tasks) for asked in dependant.dependencies if asked.call is not get_tasks
    )


def spare_other_routes(app: FastAPI, get_tasks: Callable[..., Any]) -> None:
    """Takes the dependency from the routes that ask for no tasks. A route that comes later keeps it.

    With overrides nobody can say what a route asks for.
    """
    for route in [] if app.dependency_overrides else iter_route_contexts(app.routes):
        dependant = getattr(route, "dependant", None)
        if dependant is not None and not takes_tasks(dependant, get_tasks):
            dependant.dependencies = [
                asked for asked in dependant.dependencies if asked.call is not get_tasks or asked.name is not None
            ]


def document_refusals(app: FastAPI, get_tasks: Callable[..., Any]) -> None:
    """Adds to the app's OpenAPI document what every route that adds tasks may answer: 429 and 503."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        known = app.openapi_schema is not None
        schema = describe()
        for route in [] if known else iter_route_contexts(app.routes):
            dependant = getattr(route, "dependant", None)
            if dependant is not None and adds_tasks(dependant, get_tasks):
                operations = schema["paths"].get(route.path_format, {})
                for operation in operations.values():
                    operation["responses"] = REFUSALS | operation["responses"]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def adds_tasks(dependant: Dependant, get_tasks: Callable[..., Any]) -> bool:
    asks = any(asked.call is get_tasks and asked.name is not None for asked in dependant.dependencies)
    return asks or takes_tasks(dependant, get_tasks)


class RouterBelow(APIRouter):
    """A router of which everything is below one path. Requests for other paths pass it by at once: FastAPI would try
    each of its routes, and the app's own routes would pay for that."""

    def __init__(self, path: str, lifespan: Callable[[Any], Any]) -> None:
        super().__init__(lifespan=lifespan)
        self.path = path

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path, root = scope["path"], scope.get("root_path", "")
        if path.startswith(self.path) or (root and path.startswith(root + self.path)):
            return super().matches(scope)
        return Match.NONE, {}


class TaskAdmin:
    """Adds the task system to an app: API and dashboard under `path`, start and stop with the app.

    With `auto_install` every `BackgroundTasks` of the app's routes is managed, whether a route was added before or
    comes later; routes that ask for none are left alone once the app has started. `auth` is a (username, password), a
    list of them, or a `TaskAuthBackend`; without it the admin answers this machine only, and not at all in production.
    `token_expiry` is the seconds a login lasts, `secret_key` signs it: give all processes the same. `poll_interval` is
    the seconds after which an open page refreshes itself although it was told of no change. `redact` names arguments
    and keys whose values are shown to nobody, besides passwords, tokens and the like (`web/redaction.py`).
    """

    def __init__(
        self,
        app: FastAPI,
        task_manager: TaskManager,
        path: str = "/tasks",
        display_func_args: bool = False,
        auto_install: bool = False,
        auth: Auth | None = None,
        token_expiry: int = 86400,
        secret_key: str | None = None,
        poll_interval: float = 30.0,
        title: str = "Taskflow",
        retention_days: float | None = None,
        environment: str = "development",
        redact: Iterable[str] = (),
    ) -> None:
        """Raises TaskDefinitionError where a setting cannot be, or is not safe in production."""
        check_path(path)
        check_amount("token_expiry", token_expiry, MOST_DAYS * 86_400)
        check_amount("poll_interval", poll_interval, MOST_DAYS * 86_400)
        for option, flag in (("display_func_args", display_func_args), ("auto_install", auto_install)):
            require(isinstance(flag, bool), option, flag, "True or False")
        require(isinstance(title, str), "title", title, "a text")
        if not isinstance(secret_key, str | None):
            raise TaskDefinitionError(f"secret_key: must be a text, not {type(secret_key).__name__}")
        backend = auth_backend(auth)
        check_environment(environment, logs_in=backend is not None, secret_key=secret_key)
        if retention_days is not None:
            check_amount("retention_days", retention_days, MOST_DAYS)
            task_manager.retention_days = retention_days
        task_manager.injector.app = app
        self.task_manager = task_manager
        self.path = path
        self._is_open = backend is None
        site = Site(task_manager, path, title, display_func_args, poll_interval, checked_redaction(redact))
        visits = Visits(task_manager.store, task_manager.journal)
        router = web_router(site, Gate(backend, Sessions(secret_key or None, token_expiry), visits), self._lifespan)
        self._managed_app = app if auto_install else None
        depends = Depends(task_manager.get_tasks)
        if auto_install:
            manage_present_routes(app, depends)
            app.router.dependencies.insert(0, depends)  # ours bring no tasks, but what the app runs before them may
        app.include_router(router)
        install_error_handlers(app)
        document_refusals(app, task_manager.get_tasks)

    @asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        if self._is_open:
            logger.warning("%s/dashboard is open to this machine without a login: set TaskAdmin(auth=...)", self.path)
        if self._managed_app is not None:
            spare_other_routes(self._managed_app, self.task_manager.get_tasks)
        async with self.task_manager.lifespan(app):
            yield


def web_router(site: Site, gate: Gate, lifespan: Callable[[Any], Any]) -> APIRouter:
    """Everything below the path."""
    router = RouterBelow(site.path, lifespan)
    feed = Feed(site.manager.store, site.manager.journal)
    renderer = Renderer(site, asks_for_login=gate.asks_for_login)
    session = [Depends(gate.admit)]
    router.include_router(assets_router(renderer.assets), prefix=site.path)
    router.include_router(login_router(site, gate, renderer), prefix=site.path)
    router.include_router(stream_router(feed), prefix=site.path, dependencies=session)
    reader = [Depends(gate.admit_reader)]
    router.include_router(preferences_router(site, renderer), prefix=site.path, dependencies=reader)
    router.include_router(pages_router(site, feed, renderer), prefix=site.path, dependencies=session)
    for api in (operations_router(site), schedules_router(site), api_router(site)):
        router.include_router(api, prefix=site.path, dependencies=session, tags=[site.title])
    return router


def checked_redaction(names: Iterable[str]) -> Redaction:
    """Raises TaskDefinitionError: one text would be taken for its letters, and an empty name for all names."""
    known = [] if isinstance(names, str) else list(names)
    if isinstance(names, str) or not all(isinstance(name, str) and words_of(name) for name in known):
        raise TaskDefinitionError(f"redact={names!r}: must be a list of names of arguments")
    return Redaction(known)


def check_path(path: str) -> None:
    if not isinstance(path, str) or not re.fullmatch(r"(/[^/{}?#\s]+)+", path):
        raise TaskDefinitionError(
            f"path={path!r}: must start with a slash, not end with one, and hold no braces, ? or #"
        )


def check_amount(setting: str, value: float, most: float) -> None:
    require(is_finite(value) and 0 < value <= most, setting, value, f"above 0 and at most {most:,}")


def check_environment(environment: str, *, logs_in: bool, secret_key: str | None) -> None:
    """Production is closed, and stays so when it is restarted or has several processes."""
    if environment not in ("development", "production"):
        raise TaskDefinitionError(f"environment={environment!r}: must be 'development' or 'production'")
    if environment == "development":
        return
    if missing := [name for name, there in (("auth", logs_in), ("secret_key", secret_key)) if not there]:
        raise TaskDefinitionError(f"environment='production': the task admin needs {' and '.join(missing)}")
    if len((secret_key or "").encode()) < SHORTEST_KEY:
        raise TaskDefinitionError(
            f"environment='production': secret_key is shorter than {SHORTEST_KEY} bytes, so it could be guessed; make "
            "one with `python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
        )
