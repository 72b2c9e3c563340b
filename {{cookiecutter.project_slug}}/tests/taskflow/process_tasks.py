"""Functions that worker processes import and run, for the tests of the process executor."""

import asyncio
import atexit
import contextvars
import errno
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from pydantic import BaseModel, BeforeValidator, SecretStr

from app.taskflow import CancelTask, RetryLater, get_task_context, task_log

LONG = 600.0
"""Seconds that nobody waits for: what takes so long is killed."""
place: contextvars.ContextVar[str] = contextvars.ContextVar("place", default="nowhere")


@dataclass(frozen=True)
class Point:
    x: int
    y: Decimal


class Delete(BaseModel):
    user: str


class Suspend(BaseModel):
    user: str
    key: SecretStr = SecretStr("k")


def charged(
    cents: Annotated[int, BeforeValidator(lambda euros: euros * 100)], order: Delete | Suspend
) -> tuple[int, str, str, str]:
    return cents, type(order).__name__, order.user, order.key.get_secret_value() if isinstance(order, Suspend) else ""


class ApiError(Exception):
    """Takes other arguments than it passes on, as many do."""

    def __init__(self, status: int, body: str) -> None:
        self.status, self.body = status, body
        self.lock = threading.Lock()
        super().__init__(f"{status}: {body}")


class Unpackable(Exception):
    """Its text depends on what cannot be pickled."""

    def __init__(self, text: str) -> None:
        self.say: Callable[[], str] = lambda: text
        super().__init__()

    def __str__(self) -> str:
        return self.say()


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@dataclass(frozen=True)
class Frozen(Exception):
    code: int


def add(one: int, two: int = 1) -> int:
    return one + two


def pid() -> int:
    return os.getpid()


def describe(point: Point, when: datetime, *names: str, **more: bytes) -> list[Any]:
    return [type(point).__name__, point.x, point.y, when, set(names), more, (1, 2.5, None)]


def leak_context(value: str) -> str:
    before = place.get()
    place.set(value)
    return before


def tell_context() -> list[Any]:
    context = get_task_context()
    assert context is not None
    return [context.task_id, context.func_name, context.attempt, dict(context.tags), context.traceparent]


def trace_below() -> list[str]:
    """With an SDK of this process: what a span of the function's own is below of, and in which trace."""
    with TracerProvider(shutdown_on_exit=False).get_tracer("theirs").start_as_current_span("inside") as span:
        assert isinstance(span, ReadableSpan)
        assert span.parent is not None
        return [f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}"]


async def trace_below_async() -> list[str]:
    return trace_below()


def talk() -> str:
    context = get_task_context()
    assert context is not None
    task_log("first", level="warning", n=1, where=Path("here"))
    context.progress(1, 2, "half")
    circle: dict[str, Any] = {}
    circle["circle"] = circle
    task_log("second", **circle)
    threading.Thread(target=lambda: contextvars.copy_context().run(task_log, "outside a task")).start()
    return "done"


def whisper_later(file: str) -> None:
    """Leaves a thread behind that speaks when the call has ended."""
    context = contextvars.copy_context()

    def whisper() -> None:
        time.sleep(0.05)
        context.run(task_log, "too late")
        Path(file).touch()

    threading.Thread(target=whisper).start()


def return_what_has_no_stored_form() -> object:
    return object()


def return_too_much() -> str:
    return "x" * 1_000_000


def fail(kind: str) -> None:
    match kind:
        case "lookup":
            raise LookupError("gone")
        case "os":
            raise FileNotFoundError(errno.ENOENT, "no such file", "there.txt")
        case "api":
            raise ApiError(503, "busy")
        case "frozen":
            raise Frozen(7)
        case "later":
            raise RetryLater(12.5)
        case "cancel":
            raise CancelTask("not needed any more")
        case "exit":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "cancelled":
            raise asyncio.CancelledError("inside")
        case "noted":
            error = LookupError("noted")
            error.add_note("a note")
            raise error
        case "local":

            class Local(Exception): ...

            raise Local("of a function")
        case "unpackable":
            raise Unpackable("why")
        case "unprintable":
            raise Unprintable
        case "chained":
            try:
                fail("lookup")
            except LookupError as error:
                raise ValueError("after that") from error


def die(how: str) -> None:
    match how:
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "close":
            os.closerange(3, 256)
            time.sleep(LONG)


def meet(folder: str, name: str, others: int) -> int:
    """Returns when so many are here at once."""
    (Path(folder) / name).touch()
    while len(list(Path(folder).iterdir())) < others:
        time.sleep(0.005)
    return os.getpid()


def wait_for(file: str) -> str:
    """Says who it is in the file, and returns when it is gone."""
    Path(file).write_text(f"{os.getpid()}\n")
    while Path(file).exists():
        time.sleep(0.005)
    return "waited"


def hold(how: str, file: str) -> None:
    """Says who it is in the file, and does not end unless it is to be idle."""
    with open(file, "a", buffering=1) as out:
        out.write(f"{os.getpid()}\n")
        match how:
            case "python":
                while True:
                    pass
            case "c":  # backtracks for longer than anybody lives, and never lets go of the interpreter's lock
                re.match(r"(a+)+$", "a" * 200 + "b")
            case "sleep":
                time.sleep(LONG)
            case "program":
                program = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LONG})"])
                out.write(f"{program.pid}\n")
                program.wait()
            case "idle":
                pass


def fork_and_return() -> int:
    if os.fork() == 0:
        task_log("from the fork")
        return -1
    os.wait()
    return os.getpid()


def end_a_fork() -> int | None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(LONG,))
    process.start()
    process.terminate()
    process.join()
    return process.exitcode


def stay_at_exit(file: str, seconds: float) -> int:
    def leave() -> None:
        Path(file).touch()
        time.sleep(seconds)

    atexit.register(leave)
    return os.getpid()


def forbidden(function: Callable[[int], int]) -> Callable[[int], int]:
    @functools.wraps(function)
    def never_runs_as_a_task(number: int) -> int:
        raise AssertionError("the task is what is below")

    return never_runs_as_a_task


@forbidden
def double(number: int) -> int:
    return number * 2


def flaky() -> str:
    context = get_task_context()
    assert context is not None
    task_log(f"attempt {context.attempt}")
    if context.attempt == 0:
        raise ApiError(503, "busy")
    if context.attempt == 1:
        raise RetryLater(0.01)
    return f"attempt {context.attempt}"
