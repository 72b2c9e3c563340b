"""The child's side of the process executor: one call at a time, from a pipe and back to it.

Owns everything that happens inside a worker process; `processes.py` starts it and speaks with it. The invariant: a
worker never outlives its parent, whatever its task does, and it hears no signal but SIGKILL: a Ctrl-C or a supervisor
that stops every process of the service asks the parent, who waits for running tasks before it ends its workers.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import importlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from . import codec
from .context import TaskContext, current
from .errors import TaskflowError, UnknownFunction, signal_of, text_of, trace_text
from .executors import Call, completed
from .models import TaskConfig
from .registry import TaskDefinition, TaskRegistry
from .telemetry import restored
from .texts import fields_text

LONGEST_TRACE = 32_000
"""Characters; the end of a traceback says most."""
PR_SET_PDEATHSIG = 1


# -- what crosses the pipe


class Request(NamedTuple):
    """One call: where the function is, and what to call it with."""

    module: str
    function: str
    layers: int
    """How many `__wrapped__` lie between the module's attribute and the function that was decorated as a task."""
    name: str
    arguments: str
    context: Mapping[str, Any]
    """Fields of the TaskContext, without its sink."""
    trace: str | None = None
    """The span of the attempt, as a W3C traceparent."""


class Began(NamedTuple):
    """The next step is the user's function: a worker that dies from here on has run it."""


class Said(NamedTuple):
    level: str
    message: str
    extra: str
    """JSON."""


class Progressed(NamedTuple):
    value: Mapping[str, Any]


class Returned(NamedTuple):
    result: str | None


class Raised(NamedTuple):
    kind: str
    text: str
    trace: str
    pickled: bytes | None
    """None where it would not come out of the pipe as what it was."""


# -- the worker


def work(pipe: Connection, parent: int) -> None:
    """What a worker process does from its start until its parent closes the pipe."""
    settle_in(pipe, parent)
    registry = TaskRegistry()
    with suppress(EOFError, OSError):
        while True:
            request: Request = pipe.recv()
            pipe.send(contextvars.copy_context().run(answer, request, pipe, registry))
            del request


class Outlet(Protocol):
    """Where a call's words go to: a pipe, or what stands for one."""

    def send(self, message: Any) -> None: ...


def answer(request: Request, pipe: Outlet, registry: TaskRegistry) -> Returned | Raised:
    """Runs one call to its end. What it sets in context variables ends with it."""
    sink = PipeSink(pipe)
    context = TaskContext(**request.context, sink=sink)
    current.set(context)
    try:
        with restored(request.trace):
            function = Call(definition_of(request, registry), request.arguments, context).bound()
            pipe.send(Began())
            return Returned(stored(completed(function(), asyncio.run), context))
    except BaseException as error:  # noqa: BLE001 - user code: SystemExit is that task's failure
        return raised(error)
    finally:
        sink.close()


def definition_of(request: Request, registry: TaskRegistry) -> TaskDefinition:
    """The task of that name; the first call imports its module. Raises TaskflowError, or what the import raises."""
    with suppress(UnknownFunction):
        return registry.named(request.name)
    function = getattr(importlib.import_module(request.module), request.function, None)
    for _ in range(request.layers):
        function = getattr(function, "__wrapped__", None)
    if function is None:
        raise TaskflowError(
            f"a worker process imported {request.module} and found no {request.function} in it: "
            'a task with executor="process" is defined when its module is imported'
        )
    return registry.add(function, TaskConfig(name=request.name, executor="process"))


def stored(result: Any, context: TaskContext) -> str | None:
    try:
        return codec.encode_result(result)
    except codec.CannotStore as error:
        context.sink.log(context, "warning", f"the result was not stored: {error}", {})
        return None


class PipeSink:
    """Sends a task's words to the parent while its call lasts; a thread that it left behind is not heard."""

    def __init__(self, pipe: Outlet) -> None:
        self.pid = os.getpid()
        self._pipe: Outlet | None = pipe
        self._lock = threading.Lock()

    def log(self, context: TaskContext, level: str, message: str, extra: Mapping[str, Any]) -> None:
        self._send(Said(level, message, fields_text(extra)))

    def progress(self, context: TaskContext, value: Mapping[str, Any]) -> None:
        self._send(Progressed(value))

    def close(self) -> None:
        with self._lock:
            self._pipe = None

    def _send(self, message: Said | Progressed) -> None:
        if os.getpid() != self.pid:  # a process that the task forked
            return
        with self._lock:
            if self._pipe is not None:
                self._pipe.send(message)


# -- exceptions


def raised(error: BaseException) -> Raised:
    meant = error
    with suppress(BaseException):  # a signal whose own attributes raise crosses like any error, and is one
        meant = signal_of(error) or error
    return Raised(type(error).__qualname__, text_of(error), trace_of(error), packed(meant))


def trace_of(error: BaseException) -> str:
    """As Python prints it, from the user's function on."""
    return trace_text(error, without_ours)[-LONGEST_TRACE:]


def without_ours(frames: TracebackType | None) -> TracebackType | None:
    while frames is not None and frames.tb_next and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return frames


def packed(error: BaseException) -> bytes | None:
    """The pickled exception, if it comes back as the same type and text."""
    for form in (error, WithoutInit(error)):
        try:
            data = pickle.dumps(form)
            copy = pickle.loads(data)
            if type(copy) is type(error) and str(copy) == str(error):
                return data
        except BaseException:  # noqa: BLE001 - user code: __reduce__, __init__, __str__
            continue
    return None


class WithoutInit:
    """Pickles an exception whose `__init__` takes other arguments than it passed on: by its state, leaving out what
    cannot be pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[Any, ...]]:
        state = {name: value for name, value in vars(self.error).items() if can_cross(value)}
        return revive, (type(self.error), self.error.args, state)


def revive(kind: type[BaseException], args: tuple[Any, ...], state: Mapping[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def can_cross(value: object) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except BaseException:  # noqa: BLE001 - user code: __reduce__
        return False
    return True


# -- living and dying


def settle_in(pipe: Connection, parent: int) -> None:
    end_with_parent(parent)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what a task printed is not lost when it is killed
    if sys.platform == "win32":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    os.set_inheritable(pipe.fileno(), False)  # held open by a program that the task started, it would hide our death
    with suppress(OSError):
        os.setpgid(0, 0)  # a group of its own: what the task started can be killed with it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs that the task starts would inherit
    os.register_at_fork(before=hold_signals, after_in_parent=release_signals, after_in_child=partial(part, pipe))
    release_signals()


def part(pipe: Connection) -> None:
    """In a process that a task forked: without the pipe it is no second worker, and it ends like any other."""
    pipe.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    release_signals()


def hold_signals() -> None:
    """For this thread and the process it starts, until that has settled what they mean to it."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def release_signals() -> None:
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def end_with_parent(parent: int) -> None:
    """The kernel kills this process with its parent where it can, even in C code that keeps the GIL; a thread does it
    elsewhere, and takes along what the task started."""
    threading.Thread(target=watch_parent, name="taskflow-watch", daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)


def watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        if sys.platform != "win32":
            with suppress(OSError):
                os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)
