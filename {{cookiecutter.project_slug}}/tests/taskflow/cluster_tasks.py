"""What the tests have a Dask cluster do. Its workers import this module."""

from __future__ import annotations

import os
import time
from pathlib import Path

from app.taskflow import CancelTask, RetryLater, TaskManager, get_task_context, task_log


def double(n: int) -> dict[str, int]:
    task_log("doubling", n=n)
    context = get_task_context()
    assert context is not None
    context.progress(1, 2, "half")
    return {"twice": 2 * n, "pid": os.getpid()}


def declines(order: int) -> None:
    raise LookupError(f"no order {order}")


def withdraws() -> None:
    raise CancelTask("not wanted any more")


def later(path: str) -> int:
    context = get_task_context()
    assert context is not None
    if context.attempt == 0:
        raise RetryLater(0.05)
    return context.attempt


def waits(path: str) -> str:
    """Says when it begins and when it is told to stop."""
    context = get_task_context()
    assert context is not None
    with Path(path).open("a") as lines:
        lines.write(f"began {os.getpid()}\n")
    deadline = time.monotonic() + 30
    while not context.cancelled and time.monotonic() < deadline:
        time.sleep(0.02)
    with Path(path).open("a") as lines:
        lines.write("told\n")
    return "told"


def dies(path: str) -> None:
    with Path(path).open("a") as lines:
        lines.write(f"began {os.getpid()}\n")
    os._exit(1)


def burns(seconds: float) -> float:
    """That much of a processor's time."""
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass
    return seconds


def define(manager: TaskManager) -> None:
    for function in (double, declines, withdraws, later, waits, dies, burns):
        manager.task(executor="process")(function)
    manager.task(executor="process", timeout=0.5, name="waits_briefly")(waits)
