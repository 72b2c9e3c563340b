"""Which functions are tasks: name -> function, its settings, and how it takes its arguments.

Owns the table that `@task_manager.task` fills. A name belongs to one function for the life of the process; a second
function of the same name is refused where it is written. A function that nobody decorated has the name under which any
process can import it; a callable that has none is kept here for the one call, and only this process can make it.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import logging
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import codec
from .arguments import Arguments, Call
from .dependencies import Dependencies, dependencies_of, where
from .errors import TaskDefinitionError, UnknownFunction, text_of
from .models import ExecutorKind, TaskConfig
from .texts import HERE_ONLY, LONGEST_NAME, cut, readable

logger = logging.getLogger("taskflow")

TaskFunction = Callable[..., Any]
ADD_TASK_OPTIONS = frozenset({"idempotency_key", "tags", "eager", "priority", "queue", "delay_seconds", "run_at"})
MOST_SOUGHT = 1_000
"""Names of the database that a process looks for in the application's modules."""
MOST_LAYERS = 100
INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})


@dataclass(frozen=True, slots=True, eq=False)
class TaskDefinition:
    """A task function with everything that is known about it before it is called."""

    name: str
    function: TaskFunction
    config: TaskConfig
    executor: ExecutorKind
    arguments: Arguments | HeldArguments = field(repr=False)
    dependencies: Dependencies | None = None
    """Parameters that FastAPI resolves for each attempt: they are no arguments."""

    @property
    def max_attempts(self) -> int:
        return self.config.retries + 1

    @property
    def signature(self) -> inspect.Signature:
        """The parameters that are arguments."""
        return self.arguments.signature if isinstance(self.arguments, Arguments) else inspect.Signature()

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


class HeldCall(NamedTuple):
    """A call that only this process can make, not before a monotonic time."""

    definition: TaskDefinition
    due: float


class TaskRegistry:
    def __init__(self) -> None:
        self._by_name: dict[str, TaskDefinition] = {}
        self._by_function: dict[object, TaskDefinition] = {}
        """By the identity of the function: callable objects need not be hashable."""
        self._here: dict[str, HeldCall] = {}
        """By task id."""
        self._sought: set[str] = set()
        self.executors: dict[str, str] = {}
        """Task name -> executor kind: what a claim needs to know."""

    def add(self, function: TaskFunction, config: TaskConfig, *, replaces: bool = True) -> TaskDefinition:
        """Registers a function. With `replaces` the function is from now on known by this name and these settings;
        otherwise they are a second name of it.

        Raises TaskDefinitionError when it cannot be a task, or its name is another's.
        """
        function = plain(function)
        name = config.name or name_of(function)
        if clashing := ADD_TASK_OPTIONS & arguments_by_name(function).keys():
            raise TaskDefinitionError(
                f"{where(function)}: its parameter {min(clashing)!r} is also an option of add_task(), which would take "
                f"the value; call the parameter something else, or make it positional-only"
            )
        return self._add(name, function, config, replaces=replaces)

    def _add(self, name: str, function: TaskFunction, config: TaskConfig, *, replaces: bool = True) -> TaskDefinition:
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
            self._by_function[identity(function)] = definition
        self.executors[name] = definition.executor
        return definition

    def named(self, name: str) -> TaskDefinition:
        """Raises UnknownFunction."""
        definition = self.get(name)
        if definition is None:
            raise UnknownFunction(name)
        return definition

    def get(self, name: str) -> TaskDefinition | None:
        return self._by_name.get(name) or self._found(name)

    def of(self, function: TaskFunction) -> TaskDefinition:
        """The definition of a function that is found again after a restart: decorated, or at the top level of a module.

        Raises TaskDefinitionError for any other.
        """
        definition = self.known(function) or self.adopted(function)
        if definition is None:
            raise TaskDefinitionError(
                f"{described(function)} cannot be a task here: only a function that is decorated with "
                "@task_manager.task, or stands at the top level of a module of ours, is found again after a restart"
            )
        return definition

    def known(self, function: TaskFunction) -> TaskDefinition | None:
        """The definition of a function that is a task already, whatever decorators lie on top of it."""
        if (definition := self._by_function.get(identity(function))) is not None:
            return definition
        for layer in layers_of(function):
            if (definition := self._by_function.get(identity(layer))) is not None:
                return definition
            if isinstance(layer, functools.partial):  # it calls what it wraps with more arguments
                break
        return None

    # -- what nobody decorated

    def adopted(self, function: TaskFunction) -> TaskDefinition | None:
        """The definition of an undecorated function at the top level of a module of the application, by the name under
        which any process finds it; None for any other callable."""
        if (name := import_name(function)) is None:
            return None
        definition = self._by_name.get(name)
        if definition is not None and definition.function is function:
            return definition
        return self._add(name, function, TaskConfig(), replaces=False) if imported(name) is function else None

    def _found(self, name: str) -> TaskDefinition | None:
        """The function that a stored name says, if it is one that `adopted` would take; each name is sought once."""
        if name in self._sought or len(self._sought) >= MOST_SOUGHT:
            return None
        self._sought.add(name)
        function = imported(name)
        return None if function is None else self.adopted(function)

    def find(self, names: Iterable[str]) -> bool:
        """Whether any of these names, which this process did not know, is known now."""
        return sum(self.get(name) is not None for name in names) > 0  # each of them is looked for

    def keep(self, task_id: str, call: TaskDefinition, due: float) -> None:
        """A call that only this process can make, not before a monotonic time; kept until `forget`."""
        self._here[task_id] = HeldCall(call, due)

    def forget(self, task_id: str) -> None:
        self._here.pop(task_id, None)

    def is_here(self, task_id: str) -> bool:
        return task_id in self._here

    def due(self, task_id: str) -> float:
        """The monotonic time before which a task must not start; that of most is stored, and has come."""
        call = self._here.get(task_id)
        return call.due if call else 0.0

    def for_task(self, task_id: str, name: str) -> TaskDefinition | None:
        call = self._here.get(task_id)
        return call.definition if call else self._by_name.get(name)

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __iter__(self) -> Any:
        return iter(self._by_name.values())


@dataclass(frozen=True, slots=True)
class HeldArguments:
    """Arguments that stay as they are, in this process."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def encode(self, _args: tuple[Any, ...], _kwargs: Mapping[str, Any]) -> str:
        return codec.NO_ARGUMENTS

    def decode(self, _stored: str) -> Call:
        return self.args, dict(self.kwargs)


def held(function: TaskFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TaskDefinition:
    """The one call of a callable that no other process could find, or with arguments that cannot be stored."""
    kind: ExecutorKind = "async" if is_async(function) else "thread"
    return TaskDefinition(described(function), function, TaskConfig(), kind, HeldArguments(args, kwargs))


def executor_for(function: TaskFunction, config: TaskConfig) -> ExecutorKind:
    """Coroutine functions run on the event loop, others in a thread, unless the settings say otherwise."""
    if any(inspect.isgeneratorfunction(layer) or inspect.isasyncgenfunction(layer) for layer in layers_of(function)):
        raise TaskDefinitionError(f"{where(function)} is a generator: calling it runs nothing; let it consume itself")
    waits = is_async(function)
    wanted = config.executor or ("async" if waits else "thread")
    if waits and wanted != "async":
        raise TaskDefinitionError(f"{where(function)} is an async def: executor={wanted!r} cannot run it, leave it out")
    if not waits and wanted == "async":
        raise TaskDefinitionError(f"{where(function)} is a plain def: executor='async' would block the event loop")
    if wanted == "process" and not (inspect.isfunction(function) and function.__qualname__.isidentifier()):
        raise TaskDefinitionError(
            f"{where(function)} is not a function at the top level of a module: executor='process' cannot run it, "
            "because a worker process finds it by importing its module"
        )
    return wanted


def same_function(one: TaskFunction, other: TaskFunction) -> bool:
    """True for a function and its later self: a module that was reloaded, or run as __main__ and imported.

    One function under two decorators is two, and so are two that one factory made.
    """
    if one is other:
        return True
    one, other = inspect.unwrap(one), inspect.unwrap(other)
    code, other_code = getattr(one, "__code__", None), getattr(other, "__code__", None)
    if one is other or code is None or other_code is None or code is other_code:
        return False
    if (one.__qualname__, code.co_filename) != (other.__qualname__, other_code.co_filename):
        return False
    return code.co_firstlineno == other_code.co_firstlineno or not stands_in_its_file(one)


def stands_in_its_file(function: TaskFunction) -> bool:
    """Whether a function is still where it was defined: not when its file was edited and loaded again."""
    code = function.__code__
    try:
        tree = ast.parse(Path(code.co_filename).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name == function.__name__
        and min(part.lineno for part in [node, *node.decorator_list]) == code.co_firstlineno
        for node in ast.walk(tree)
    )


# -- looking at callables


def plain(function: TaskFunction) -> TaskFunction:
    """The function below @staticmethod. Raises TaskDefinitionError for what cannot be called as it is."""
    if isinstance(function, staticmethod):
        return function.__func__
    if isinstance(function, classmethod):
        raise TaskDefinitionError(f"{where(function.__func__)} is a classmethod: write @staticmethod below @task")
    if not callable(function) or isinstance(function, type):
        raise TaskDefinitionError(f"{described(function)} cannot be a task: it is no function")
    if is_method(function):
        raise TaskDefinitionError(
            f"{where(function)} is a method, and its object is not stored: write @staticmethod below @task, or make "
            "the method of one object a task where that is made: task_manager.task(name=...)(it.method)"
        )
    return function


def is_method(function: TaskFunction) -> bool:
    """Whether a function stands in a class and is called with an instance, or with the class."""
    if not inspect.isfunction(function):
        return False
    stands_in_class = "." in function.__qualname__.rpartition("<locals>.")[2]
    return stands_in_class and next(iter(arguments_by_name(function)), "") in ("self", "cls")


def identity(function: object) -> object:
    """What stands for a callable. Bound methods are made anew whenever they are looked up."""
    return (id(function.__self__), id(function.__func__)) if inspect.ismethod(function) else id(function)


def name_of(function: TaskFunction) -> str:
    """The name that a task has when nobody gives it one. Raises TaskDefinitionError where that would be none."""
    name = getattr(function, "__name__", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise TaskDefinitionError(f"{described(function)} has no name of its own: give it one with name=...")
    return name


def layers_of(function: object) -> Iterator[TaskFunction]:
    """The function, and what its decorators, partials and bindings lie on, from the outermost in."""
    for _ in range(MOST_LAYERS):
        if not callable(function):
            return
        yield function
        if isinstance(function, functools.partial):
            function = function.func
        elif (wrapped := getattr(function, "__wrapped__", None)) is not None:
            function = wrapped
        elif inspect.isroutine(function) or isinstance(function, type):
            return
        else:
            function = getattr(type(function), "__call__", None)  # noqa: B004 - what calling it runs


def is_async(function: TaskFunction) -> bool:
    """Whether calling it gives a coroutine, as far as its own text tells."""
    return any(inspect.iscoroutinefunction(layer) for layer in layers_of(function))


def arguments_by_name(function: TaskFunction) -> Mapping[str, inspect.Parameter]:
    """The parameters that a keyword may fill."""
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in found.items() if parameter.kind in kinds}


def described(function: object) -> str:
    """A callable of any kind, in words that stand for no function that could be imported."""
    return cut(readable(where(function)), LONGEST_NAME - len(HERE_ONLY)) + HERE_ONLY


# -- functions by their stored names


def import_name(function: object) -> str | None:
    """`module.function` of a function at the top level of a module; None for any other callable."""
    if not inspect.isfunction(function) or not function.__qualname__.isidentifier():
        return None
    name = f"{function.__module__}.{function.__qualname__}"
    return name if len(name) <= LONGEST_NAME else None


def imported(name: str) -> TaskFunction | None:
    """The function that stands under that name in a module of the application.

    A name comes from the database, and whoever can write there must not be able to call whatever is installed: modules
    of the standard library and of installed packages are left alone, and so is what is no function of that very name.
    """
    module_name, _, function_name = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")) or not is_ours(module_name):
        return None
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:  # noqa: BLE001 - user code: a module that cannot be imported
        logger.warning("task name %r: its module cannot be imported: %s", name, text_of(error))
        return None
    return function if import_name(function) == name else None


def is_ours(module_name: str) -> bool:
    """Whether a module is the application's own: neither the standard library's nor an installed package's."""
    top = module_name.partition(".")[0]
    if not top or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return top == "__main__" == module_name
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # without a spec: __main__
        return module_name == "__main__"
    if spec is None:
        return False
    places = [spec.origin or "", *(spec.submodule_search_locations or ())]
    return not any(place.startswith(INSTALLED) for place in places)
