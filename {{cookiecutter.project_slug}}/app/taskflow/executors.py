"""Where user code runs: on the event loop, in a thread, or in a process.

Owns the workers and the way a call gets to them and comes back. An executor returns what the function returned and
raises what it raised; it decides nothing about the task.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from types import AsyncGeneratorType, GeneratorType, MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar

from .context import TaskContext
from .errors import TaskArgumentError, UnreadableCall
from .models import ExecutorKind
from .registry import TaskDefinition
from .threads import Crew, Job

DEFAULT_ASYNC_SLOTS = 1_000
DEFAULT_THREADS = 200
"""Calls at once. Short ones share a few threads; those that wait for somebody else's server have one each."""

E = TypeVar("E", bound=BaseException)

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Call(NamedTuple):
    """One call of a task function: what to run, with the arguments as they are stored."""

    definition: TaskDefinition
    arguments: str
    context: TaskContext
    injected: Mapping[str, Any] = NOTHING
    """Keyword arguments that are not stored: what the function's dependencies resolved to for this attempt."""
    limit: asyncio.Timeout | None = None
    """Its timeout, already running: an executor that has to start a worker first holds it until the function begins."""

    def hold(self) -> None:
        """Its timeout waits for its beginning."""
        if self.limit is not None:
            self.limit.reschedule(None)

    def begin(self) -> None:
        """Its timeout runs from now."""
        if self.limit is not None and (seconds := self.definition.config.timeout) is not None:
            self.limit.reschedule(asyncio.get_running_loop().time() + seconds)

    def bound(self) -> Callable[[], Any]:
        """The function with its arguments, decoded and checked. Raises UnreadableCall."""
        try:
            args, kwargs = self.definition.decode(self.arguments)
            if self.definition.dependencies is not None:
                args, kwargs = self.definition.dependencies.joined(args, kwargs, self.injected)
        except (ValueError, TypeError, ArithmeticError, RecursionError, TaskArgumentError) as error:
            raise UnreadableCall(self.definition.name, error) from error
        return partial(self.definition.function, *args, **kwargs)


class Executor(Protocol):
    kind: ExecutorKind
    slots: int
    """How many calls may run at once."""

    def start(self) -> None: ...

    async def run(self, call: Call) -> Any:
        """The function's result. Raises what it raised; CancelledError when the awaiting task is cancelled."""

    def close(self) -> None:
        """Lets go of the workers. Whatever still runs in a thread is abandoned to the end of the process."""

    async def wait_closed(self, deadline: float) -> None:
        """After `close`: returns when every worker that can be ended has; from the monotonic `deadline` on by force."""


class AsyncExecutor:
    kind: ExecutorKind = "async"

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots or DEFAULT_ASYNC_SLOTS

    def start(self) -> None: ...

    async def run(self, call: Call) -> Any:
        return await awaited(call.bound()())

    def close(self) -> None: ...

    async def wait_closed(self, deadline: float) -> None: ...


class ThreadExecutor:
    """Runs each call in a thread of its crew."""

    kind: ExecutorKind = "thread"

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots or DEFAULT_THREADS
        self._crew: Crew | None = None

    def start(self) -> None: ...

    async def run(self, call: Call) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        job = self.submit(call.bound(), contextvars.copy_context(), partial(settle, done), loop)
        try:
            value = await done
        except asyncio.CancelledError:
            self.abandon(job)
            raise
        return await awaited(value)

    def submit(
        self,
        function: Callable[[], Any],
        context: contextvars.Context,
        deliver: Callable[[Job], None],
        loop: asyncio.AbstractEventLoop,
    ) -> Job:
        """Has a thread call the function in that context; `deliver` gets the job, on the event loop, once it ended."""
        if self._crew is None or self._crew.loop is not loop:
            self.close()
            self._crew = Crew(loop, self.slots)
        return self._crew.take(function, context, deliver)

    def abandon(self, job: Job) -> None:
        """What the job still brings is dropped, and its slot is free at once."""
        job.crew.abandon(job)

    def close(self) -> None:
        if self._crew is not None:
            self._crew.dismiss()
            self._crew = None

    async def wait_closed(self, deadline: float) -> None: ...


async def awaited(value: Any) -> Any:
    """What a call gave in the end. Some functions return a coroutine although nothing about them says so."""
    while is_awaitable(value):
        value = await value
    return consumed(value)


def completed(value: Any, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> Any:
    """The same off the event loop: `run` brings a coroutine to its end."""
    return run(awaited(value)) if is_awaitable(value) else consumed(value)


def done_on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any]) -> Any:
    """What the event loop makes of it, in the context of the calling thread, which waits."""
    context = contextvars.copy_context()

    async def within() -> tuple[Any, BaseException | None]:
        return await loop.create_task(told(work), context=context)

    value, error = asyncio.run_coroutine_threadsafe(within(), loop).result()
    if error is not None:
        raise error
    return value


async def told(work: Coroutine[Any, Any, Any]) -> tuple[Any, BaseException | None]:
    """What it gave, or what it raised: an exit that left an asyncio task would end the event loop."""
    try:
        return await work, None
    except BaseException as error:  # noqa: BLE001 - user code: raised where it was called
        return None, error


def is_awaitable(value: object) -> bool:
    """Asks the type only, because an object of user code may lie or raise."""
    return hasattr(type(value), "__await__")


def consumed(value: Any) -> Any:
    """The value. Raises TypeError for what a generator function gives: nothing of it has run, and nobody would."""
    kind = type(value)
    if kind is AsyncGeneratorType or (kind is GeneratorType and value.gi_code.co_name != "<genexpr>"):
        raise TypeError("the task returned a generator: nothing of it has run")
    return value


def settle(done: asyncio.Future[Any], job: Job) -> None:
    """What the job brought, for whoever awaits it; the awaiting task may have been cancelled meanwhile."""
    if done.cancelled():
        return
    if job.error is None:
        done.set_result(job.result)
    else:
        done.set_exception(carried(job.error))


def carried(error: BaseException) -> BaseException:
    """The error in a form that futures and coroutines can carry: they use two of them for purposes of their own."""
    if not is_a(error, StopIteration) and not is_a(error, GeneratorExit):
        return error
    wrapped = RuntimeError(f"the task raised {type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped


def is_a(error: BaseException, kind: type[E]) -> TypeGuard[E]:
    """As an `except` clause sees it: asks the type only, because an error of user code may lie or raise."""
    return issubclass(type(error), kind)
