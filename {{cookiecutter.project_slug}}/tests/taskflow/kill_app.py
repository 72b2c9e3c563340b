"""A process with tasks that dies at a named point: `python -m tests.taskflow.kill_app`.

For each line on its standard input, `[point, kind, folder, lease_seconds]`, it forks a process that adds the tasks of
`kind` and, where `point` says, kills itself for real; then it prints the pid and, when that process has ended, its exit
code. The points are put around the engine's public methods from outside. In the folder, `starts` gets a line for each
start of a task, `accepted` one for each id that was accepted; while `hold-N` is there, attempt N does not end.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from app.taskflow import TaskManager, get_task_context
from app.taskflow.backends.base import Draft, Finish, Rescue, Turn, TurnResult

MOST_SECONDS = 20.0


def note(folder: str, file: str, *words: str) -> None:
    place = os.open(Path(folder, file), os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(place, "".join(f"{word}\n" for word in words).encode())
    os.close(place)


def begin(folder: str) -> int:
    """Notes the start; the attempt's number."""
    context = get_task_context()
    assert context is not None
    note(folder, "starts", context.task_id)
    return context.attempt


def held(folder: str, attempt: int) -> bool:
    return Path(folder, f"hold-{attempt}").exists()


async def once_async(folder: str) -> int:
    attempt = begin(folder)
    while held(folder, attempt):
        await asyncio.sleep(0.01)
    return os.getpid()


async def again_async(folder: str) -> int:
    return await once_async(folder)


def once(folder: str) -> int:
    attempt = begin(folder)
    deadline = time.monotonic() + MOST_SECONDS
    while held(folder, attempt) and time.monotonic() < deadline:
        time.sleep(0.01)
    return os.getpid()


def again(folder: str) -> int:
    return once(folder)


def once_flaky(folder: str) -> int:
    if begin(folder) == 0:
        raise ConnectionError("at first")
    return os.getpid()


def again_flaky(folder: str) -> int:
    return once_flaky(folder)


async def once_blocking(folder: str) -> int:
    """Blocks the event loop, as nobody should."""
    begin(folder)
    time.sleep(2.5)  # noqa: ASYNC251
    return os.getpid()


async def again_blocking(folder: str) -> int:
    begin(folder)
    return os.getpid()


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "async": (once_async, again_async),
    "thread": (once, again),
    "process": (once, again),
    "flaky": (once_flaky, again_flaky),
    "blocking": (once_blocking, again_blocking),
}
"""Kind -> a task that is not to be started again after a crash, and one that is."""


def define(manager: TaskManager, kind: str) -> None:
    first, second = PAIRS[kind]
    executor: Any = "process" if kind == "process" else None
    retries = 2 if kind == "flaky" else 0
    manager.task(executor=executor, retries=retries)(first)
    manager.task(executor=executor, retries=retries, requeue_on_interrupt=True)(second)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_accept(manager: TaskManager) -> None:
    accept = manager.journal.accept

    async def accept_and_die(drafts: Sequence[Draft]) -> None:
        await accept(drafts)
        note_accepted(manager, drafts)
        die()

    manager.runs_tasks = False  # accepted, and nothing else
    replace(manager.journal, "accept", accept_and_die)


def die_after_claim(manager: TaskManager) -> None:
    turned = manager.dispatcher.turned

    def turned_and_die(finishes: Sequence[Finish], result: TurnResult) -> None:
        if result.claimed:
            die()
        turned(finishes, result)

    replace(manager.dispatcher, "turned", turned_and_die)


def die_before_finish(manager: TaskManager) -> None:
    def finish_and_die(_finish: Finish) -> None:
        die()

    replace(manager.journal, "finish", finish_and_die)


def die_before_the_commit_of(carries: Callable[[Turn], bool]) -> Callable[[TaskManager], None]:
    """Inside the transaction of the first turn of that kind, when everything in it is written."""

    def prepare(manager: TaskManager) -> None:
        turn = manager.backend.turn
        dies = False

        async def turn_and_die(wanted: Turn) -> TurnResult:
            nonlocal dies
            dies = carries(wanted)
            return await turn(wanted)

        def before_commit(_connection: Connection) -> None:
            if dies:
                die()

        replace(manager.backend, "turn", turn_and_die)
        sa.event.listen(Engine, "commit", before_commit)

    return prepare


def stay(_manager: TaskManager) -> None: ...


POINTS: dict[str, Callable[[TaskManager], None]] = {
    "after-accept": die_after_accept,
    "after-claim": die_after_claim,
    "mid-run": stay,  # the test kills it
    "before-finish": die_before_finish,
    "inside-finish": die_before_the_commit_of(lambda turn: bool(turn.finishes)),
    "inside-retry": die_before_the_commit_of(lambda turn: bool(turn.finishes)),
    "inside-rescue": die_before_the_commit_of(lambda turn: any(isinstance(item, Rescue) for item in turn.commands)),
}


def replace(thing: Any, name: str, method: Callable[..., Any]) -> None:
    assert callable(getattr(thing, name))
    setattr(thing, name, method)


def note_accepted(manager: TaskManager, drafts: Sequence[Draft]) -> None:
    folder = Path(manager.backend_name.removeprefix("sqlite:///")).parent
    note(str(folder), "accepted", *(draft.task_id for draft in drafts))


async def live(point: str, kind: str, folder: str, lease_seconds: float) -> None:
    manager = TaskManager(snapshot_db=str(Path(folder, "tasks.db")))
    manager.lease_seconds = lease_seconds
    define(manager, kind)
    keep_word(manager)
    POINTS[point](manager)
    async with manager.lifespan():
        if point != "inside-rescue":
            first, second = PAIRS[kind]
            await asyncio.gather(manager.enqueue(first, folder), manager.enqueue(second, folder))
        await asyncio.sleep(3_600)


def keep_word(manager: TaskManager) -> None:
    """Notes what was committed before anything else can happen."""
    accept: Callable[[Sequence[Draft]], Awaitable[None]] = manager.journal.accept

    async def accept_and_note(drafts: Sequence[Draft]) -> None:
        await accept(drafts)
        note_accepted(manager, drafts)

    replace(manager.journal, "accept", accept_and_note)


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            asyncio.run(live(*json.loads(line)))
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
