"""`Depends` in tasks: which parameters of a function FastAPI resolves, and resolving them for one attempt.

Owns the passage to FastAPI's own solver. The registry asks `dependencies_of` once for each function, the runner calls
`Injector.run` for each attempt of a function that has some. The invariant: what was opened for an attempt is closed
when it has ended, however it ended, before its result is written; and it sees the exception as it would in a route.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from fastapi import FastAPI, Request
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import analyze_param, get_dependant, get_typed_signature, solve_dependencies
from fastapi.exceptions import FastAPIError
from fastapi.params import Depends

from .errors import TaskDefinitionError

T = TypeVar("T")

UNRESOLVABLE = (FastAPIError, AssertionError, RuntimeError, TypeError)
"""What FastAPI raises for a dependency that it does not take."""
LONGEST_CLOSING = 30.0
"""Seconds that an attempt's dependencies have to close, beyond its timeout; then they are cancelled."""


@dataclass(frozen=True, slots=True, eq=False)
class Dependencies:
    """The parameters of one function that are not arguments."""

    function: Callable[..., Any]
    names: frozenset[str]
    wanted: Dependant
    signature: inspect.Signature
    arguments: inspect.Signature
    """The signature without them: what a caller passes."""

    def joined(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], injected: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The whole call, each value at its place. Raises TypeError when the arguments do not fit."""
        passed = self.arguments.bind(*args, **kwargs)
        passed.apply_defaults()
        values = {**passed.arguments, **injected}
        ordered = {name: values[name] for name in self.signature.parameters}
        whole = inspect.BoundArguments(self.signature, ordered)
        return whole.args, whole.kwargs


class Injector:
    """Resolves dependencies. `app` is the application whose `dependency_overrides` hold, once there is one."""

    def __init__(self) -> None:
        self.app: FastAPI | None = None

    async def run(
        self,
        dependencies: Dependencies,
        use: Callable[[Mapping[str, Any]], Awaitable[T]],
        limit: asyncio.Timeout,
        closing: Callable[[], None],
    ) -> T:
        """What `use` returns when it is given the resolved dependencies.

        Resolving and using run under `limit`; `closing` is called when both are over and the dependencies are about to
        be closed. Raises what `use` or a dependency raised: an error that a dependency swallowed is still an error.
        """
        failure: BaseException | None = None
        end = asyncio.timeout(None)
        try:
            async with end, AsyncExitStack() as request_stack, AsyncExitStack() as function_stack:
                try:
                    async with limit:
                        result = await use(await self._resolve(dependencies, request_stack, function_stack))
                except BaseException as error:
                    failure = error
                    raise
                finally:
                    closing()
                    end.reschedule(asyncio.get_running_loop().time() + LONGEST_CLOSING)
        except TimeoutError as error:
            if end.expired():
                raise TimeoutError(f"its dependencies did not close within {LONGEST_CLOSING:g} s") from error
            raise
        if failure is not None:
            raise failure
        return result

    async def _resolve(
        self, dependencies: Dependencies, request_stack: AsyncExitStack, function_stack: AsyncExitStack
    ) -> Mapping[str, Any]:
        app = self.app if self.app is not None and self.app.dependency_overrides else None
        if app is not None:
            refuse_requests(dependencies.function, dependencies.wanted, app.dependency_overrides)
        request = Request(
            {
                "type": "http",
                "headers": (),
                "query_string": b"",
                "fastapi_inner_astack": request_stack,
                "fastapi_function_astack": function_stack,
            }
        )
        solved = await solve_dependencies(
            request=request,
            dependant=dependencies.wanted,
            dependency_overrides_provider=app,
            async_exit_stack=request_stack,
            embed_body_fields=False,
        )
        return solved.values


def dependencies_of(function: Callable[..., Any]) -> Dependencies | None:
    """The function's dependencies; None when it has none.

    Raises TaskDefinitionError when FastAPI cannot resolve them, or one of them, at any depth, needs a request.
    """
    try:
        typed = get_typed_signature(function)
    except Exception:  # noqa: BLE001 - no signature, or annotations that raise: the argument check says so
        return None
    found = [parameter for parameter in typed.parameters.values() if is_dependency(parameter)]
    if not found:
        return None
    wanted = dependant_of(function, found)
    refuse_requests(function, wanted)
    names = frozenset(parameter.name for parameter in found)
    signature = inspect.signature(function)
    rest = [parameter for name, parameter in signature.parameters.items() if name not in names]
    return Dependencies(function, names, wanted, signature, signature.replace(parameters=rest))


def is_dependency(parameter: inspect.Parameter) -> bool:
    annotation = getattr(parameter.annotation, "__value__", parameter.annotation)  # `type X = Annotated[...]`
    extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return isinstance(parameter.default, Depends) or any(isinstance(extra, Depends) for extra in extras)


def dependant_of(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> Dependant:
    """FastAPI's view of a function with these parameters only: the others are arguments, whatever they look like."""

    def task() -> None: ...

    only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    task.__signature__ = inspect.Signature(only)  # type: ignore[attr-defined]
    try:
        return get_dependant(path="", call=task)
    except UNRESOLVABLE as error:
        call, parameter = unresolvable_part(task)
        raise TaskDefinitionError(
            f"{where(function)}: parameter {parameter!r} of {where(function if call is task else call)} "
            f"cannot be resolved for a task: {error}"
        ) from error


def unresolvable_part(call: Callable[..., Any]) -> tuple[Callable[..., Any], str]:
    """Which parameter of which dependency it is that FastAPI refuses, at or below one that it refuses."""
    name = ""
    for name, parameter in get_typed_signature(call).parameters.items():
        try:
            found = analyze_param(
                param_name=name, annotation=parameter.annotation, value=parameter.default, path_param_names=set()
            )
        except UNRESOLVABLE:
            return call, name
        below = found.depends.dependency if found.depends is not None else None
        if below is not None:
            try:
                get_dependant(path="", call=below)
            except UNRESOLVABLE:
                return unresolvable_part(below)
    return call, name


def refuse_requests(
    function: Callable[..., Any],
    dependant: Dependant,
    overrides: Mapping[Callable[..., Any], Callable[..., Any]] = MappingProxyType({}),
) -> None:
    """Raises TaskDefinitionError for what the solver could only fill from a request, overrides too."""
    for needed in dependant.dependencies:
        assert needed.call is not None
        if needed.call in overrides:
            needed = get_dependant(path="", call=overrides[needed.call])
        for what, parameter in request_parts(needed):
            raise TaskDefinitionError(
                f"{where(function)}: its dependency {where(needed.call)} needs {what} "
                f"(parameter {parameter!r}), and a task has no request"
            )
        refuse_requests(function, needed, overrides)


def request_parts(dependant: Dependant) -> Iterator[tuple[str, str]]:
    """What a dependency wants of a request: what it is, and the parameter."""
    named = {
        "a Request": dependant.request_param_name,
        "a WebSocket": dependant.websocket_param_name,
        "an HTTPConnection": dependant.http_connection_param_name,
        "a Response": dependant.response_param_name,
        "BackgroundTasks": dependant.background_tasks_param_name,
        "SecurityScopes": dependant.security_scopes_param_name,
    }
    yield from ((what, parameter) for what, parameter in named.items() if parameter is not None)
    fields = {
        "a path parameter": dependant.path_params,
        "a query parameter": dependant.query_params,
        "a header": dependant.header_params,
        "a cookie": dependant.cookie_params,
    }
    yield from ((what, field.name) for what, some in fields.items() for field in some)
    yield from (("a request body", field.name) for field in dependant.body_params)


def where(call: object) -> str:
    """Where a callable of any kind is written, for messages."""
    while isinstance(call, functools.partial):
        call = call.func
    named = call if hasattr(call, "__qualname__") else type(call)
    return f"{getattr(named, '__module__', None)}.{getattr(named, '__qualname__', '?')}"
