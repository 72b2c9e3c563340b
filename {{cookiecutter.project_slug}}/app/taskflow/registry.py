"""Which functions are tasks: name -> function, its settings, and how it takes its arguments.

Owns the table that `@task_manager.task` fills. A name belongs to one function for the life of the process; a second
function of the same name is refused where it is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .arguments import Arguments, Call
from .dependencies import Dependencies, dependencies_of
from .errors import TaskDefinitionError, UnknownFunction
from .models import ExecutorKind, TaskConfig

TaskFunction = Callable[..., Any]


@dataclass(frozen=True, slots=True, eq=False)
class TaskDefinition:
    """A task function with everything that is known about it before it is called."""

    name: str
    function: TaskFunction
    config: TaskConfig
    executor: ExecutorKind
    arguments: Arguments = field(repr=False)
    dependencies: Dependencies | None = None
    """Parameters that FastAPI resolves for each attempt: they are no arguments."""

    @property
    def max_attempts(self) -> int:
        return self.config.retries + 1

    @property
    def needs_only_a_thread(self) -> bool:
        """True when nothing but the function itself has to happen: no timeout to watch, no dependency to resolve."""
        return self.executor == "thread" and self.config.timeout is None and self.dependencies is None

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The stored form of a call, checked against the signature. Raises TaskArgumentError."""
        return self.arguments.encode(args, kwargs)

    def decode(self, stored: str) -> Call:
        """The call that `encode` stored. Raises ValueError, TypeError or TaskArgumentError when it cannot be read."""
        return self.arguments.decode(stored)


class TaskRegistry:
    def __init__(self) -> None:
        self._by_name: dict[str, TaskDefinition] = {}
        self._by_function: dict[TaskFunction, TaskDefinition] = {}
        self.executors: dict[str, str] = {}
        """Task name -> executor kind: what a claim needs to know."""

    def add(self, function: TaskFunction, config: TaskConfig, *, replaces: bool = True) -> TaskDefinition:
        """Registers a function. With `replaces` the function is from now on known by this name and these settings;
        otherwise they are a second name of it.

        Raises TaskDefinitionError when its name is taken or its executor cannot run it.
        """
        name = config.name or function.__name__
        taken = self._by_name.get(name)
        if taken is not None and not same_function(taken.function, function):
            raise TaskDefinitionError(
                f"two task functions are named {name!r}: {where(taken.function)} and {where(function)}; "
                "give one of them another name with @task_manager.task(name=...)"
            )
        executor = executor_for(function, config)
        dependencies = dependencies_of(function)
        if dependencies is not None and executor == "process":
            raise TaskDefinitionError(
                f"{where(function)}: executor='process' cannot run a function with Depends "
                f"({', '.join(sorted(dependencies.names))}), because what they open does not cross to another process"
            )
        arguments = Arguments(name, function, dependencies)
        definition = TaskDefinition(name, function, config, executor, arguments, dependencies)
        self._by_name[name] = definition
        if replaces:
            self._by_function[function] = definition
        self.executors[name] = definition.executor
        return definition

    def named(self, name: str) -> TaskDefinition:
        """Raises UnknownFunction."""
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownFunction(name) from None

    def get(self, name: str) -> TaskDefinition | None:
        return self._by_name.get(name)

    def of(self, function: TaskFunction) -> TaskDefinition:
        """The definition of a function; one that was never decorated gets the default settings.

        Raises TaskDefinitionError for a function that could not be found again after a restart.
        """
        definition = self._by_function.get(function)
        if definition is not None:
            return definition
        if not inspect.isfunction(function) or "<" in function.__qualname__:
            raise TaskDefinitionError(
                f"{function!r} cannot be a task: only a function defined in a module or decorated with "
                "@task_manager.task is found again after a restart"
            )
        return self.add(function, TaskConfig())

    def known(self, function: TaskFunction) -> TaskDefinition | None:
        """The definition of a function that is a task already."""
        return self._by_function.get(function)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Any:
        return iter(self._by_name.values())


def executor_for(function: TaskFunction, config: TaskConfig) -> ExecutorKind:
    """Coroutine functions run on the event loop, others in a thread, unless the settings say otherwise."""
    is_async = inspect.iscoroutinefunction(function)
    wanted = config.executor or ("async" if is_async else "thread")
    if is_async and wanted != "async":
        raise TaskDefinitionError(f"{where(function)} is an async def: executor={wanted!r} cannot run it, leave it out")
    if not is_async and wanted == "async":
        raise TaskDefinitionError(f"{where(function)} is a plain def: executor='async' would block the event loop")
    if wanted == "process" and not (inspect.isfunction(function) and function.__qualname__.isidentifier()):
        raise TaskDefinitionError(
            f"{where(function)} is not a function at the top level of a module: executor='process' cannot run it, "
            "because a worker process finds it by importing its module"
        )
    return wanted


def same_function(one: TaskFunction, other: TaskFunction) -> bool:
    """True for a function and its later self: a module that was reloaded, or run as __main__ and imported.

    Two closures that one factory made share their code, and are two functions.
    """
    one, other = inspect.unwrap(one), inspect.unwrap(other)
    if getattr(one, "__closure__", None) and one.__code__ is getattr(other, "__code__", None):
        return one is other
    return (one.__qualname__, inspect.getsourcefile(one)) == (other.__qualname__, inspect.getsourcefile(other))


def where(function: TaskFunction) -> str:
    return f"{function.__module__}.{function.__qualname__}"
