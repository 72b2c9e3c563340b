"""One process of a torture: it accepts tasks and runs them, as the service does, until something ends it.

Owns the tasks of the torture's own, and the notes that it is judged by: a line for each promise after its commit, for
each refusal, and for each start and end of a function. A line is written past the task system, by one `write`, and
stays when the process is killed. The invariant: no schedule of the team's fires here, and of its functions only those
are called that it named in `tests/torture_tasks.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from app.taskflow import TaskflowError, TaskManager, get_task_context
from app.taskflow.backends import open_backend
from app.taskflow.backends.base import Finish
from app.taskflow.registry import TaskDefinition
from app.taskflow.runner import Attempt, Outcome

from .torture_verdict import Start

TEAM = "tests.torture_tasks"
"""Has `TASKS`: functions, or partials that give them their arguments."""
PAUSE = 0.05
"""Seconds between two times at which an instance adds tasks."""
BURSTS = (1, 1, 1, 1, 1, 1, 1, 15)
"""How many it adds at such a time."""
MOST_WAITING = 50
"""Tasks of one name that wait: more are not added, so that what is slow is not waited for in the end."""
LOOK = 0.5
"""Seconds between two looks at how many wait."""
KEYED = "torture_keyed"
QUIET = "quiet"
"""The file that says: add nothing more. An instance answers with one of its own: it will not."""


class NotTortured(Exception):
    """Something that has to be different first; the message says what."""


# -- what is called


async def quick() -> None: ...


def plain() -> None:
    time.sleep(random.uniform(0, 0.05))


async def slow() -> None:
    await asyncio.sleep(random.uniform(0.1, 1.0))


async def again() -> None:
    await asyncio.sleep(random.uniform(0.1, 1.0))


def again_plain() -> None:
    time.sleep(random.uniform(0.1, 1.0))


async def flaky() -> None:
    context = get_task_context()
    if context is not None and context.attempt < 2:
        raise ConnectionError("not yet")


async def keyed() -> None: ...


class Offer(NamedTuple):
    """A task that is added again and again."""

    name: str
    function: Callable[..., object]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


def own_offers(manager: TaskManager) -> Sequence[Offer]:
    """The torture's own, which become tasks here."""
    manager.task(name="torture_quick")(quick)
    manager.task(name="torture_plain")(plain)
    manager.task(name="torture_slow")(slow)
    manager.task(name="torture_again", requeue_on_interrupt=True)(again)
    manager.task(name="torture_again_plain", requeue_on_interrupt=True)(again_plain)
    manager.task(name="torture_flaky", retries=2, delay=0.1)(flaky)
    manager.task(name=KEYED)(keyed)
    own = (quick, plain, slow, again, again_plain, flaky, keyed)
    return [Offer(manager.registry.of(function).name, function) for function in own]


def team_offers(manager: TaskManager) -> Iterator[Offer]:
    """What the team named. Raises NotTortured where that cannot be called."""
    try:
        tasks: Sequence[Callable[..., object]] = import_module(TEAM).TASKS
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == TEAM:  # nothing is named
            return
        raise NotTortured(f"{TEAM} cannot be imported: {error}") from error
    for task in tasks:
        call = task if isinstance(task, partial) else partial(task)
        try:
            definition = manager.registry.of(call.func)
            definition.encode(call.args, call.keywords)
        except TaskflowError as error:
            raise NotTortured(f"TASKS of {TEAM}: {error}") from error
        yield Offer(definition.name, call.func, call.args, call.keywords)


def team_manager(url: str) -> TaskManager:
    """The team's, on the store that is tortured: TASKFLOW_URL names it by now. Raises NotTortured."""
    manager: TaskManager = import_module("app.tasks").task_manager
    if manager.backend_name != (wanted := open_backend(url).name):
        raise NotTortured(
            f"the tasks of app/tasks.py are kept in {manager.backend_name} and not in {wanted}: it must take its store "
            "from `settings.url`, or the torture would write to your own"
        )
    return manager


# -- what is noted


class Notes:
    """A file of this process, a JSON array a line."""

    def __init__(self, folder: Path, life: int) -> None:
        self._file = os.open(folder / f"{life}.notes", os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)

    def write(self, *words: object) -> None:
        """Kept when the process is killed in the next moment; not by a machine that loses its power, which ends the
        torture too."""
        os.write(self._file, f"{json.dumps(words)}\n".encode())

    def watch(self, manager: TaskManager) -> None:
        """Notes every attempt that begins or ends, around the runner: behind it is the function, before it the rest."""
        runner = manager.runner
        run, run_here, ended, broken = runner.run, runner.run_here, runner.ended, runner.broken

        def began(attempt: Attempt) -> None:
            task = attempt.task
            self.write("began", *task.attempt_id, task.name, time.monotonic(), task.requeue or task.name == KEYED)

        async def noted_run(attempt: Attempt) -> Finish:
            began(attempt)
            return await run(attempt)

        def noted_run_here(attempt: Attempt, definition: TaskDefinition, loop: asyncio.AbstractEventLoop) -> Finish:
            began(attempt)
            return run_here(attempt, definition, loop)

        def noted_end(attempt: Attempt, config: Any, outcome: Outcome) -> Finish:
            self.write("ended", *attempt.task.attempt_id, type(outcome).__name__.lower())
            return ended(attempt, config, outcome)

        def noted_break(attempt: Attempt, error: BaseException) -> Finish:
            self.write("ended", *attempt.task.attempt_id, "broken")
            return broken(attempt, error)

        for name, noted in (
            ("run", noted_run),
            ("run_here", noted_run_here),
            ("ended", noted_end),
            ("broken", noted_break),
        ):
            setattr(runner, name, noted)


class Read(NamedTuple):
    """What all instances noted."""

    promised: Mapping[str, str]
    starts: Sequence[Start]
    refused: int


def read_notes(folder: Path) -> Read:
    promised: dict[str, str] = {}
    starts: dict[tuple[int, int], Start] = {}
    refused = 0
    for path in folder.glob("*.notes"):
        life = int(path.stem)
        open_starts: dict[tuple[str, int], tuple[int, int]] = {}
        for number, line in enumerate(path.read_text().splitlines()):
            match json.loads(line):
                case ["promised", task_id, name]:
                    promised[task_id] = name
                case ["began", task_id, attempt, name, at, may_again]:
                    open_starts[task_id, attempt] = life, number
                    starts[life, number] = Start(task_id, name, attempt, life, at, may_again)
                case ["ended", task_id, attempt, end] if (key := open_starts.get((task_id, attempt))) is not None:
                    starts[key] = starts[key]._replace(end=end)
                case ["refused"]:
                    refused += 1
    return Read(promised, list(starts.values()), refused)


# -- the life of one


class Caller:
    """Adds tasks until it is told to be quiet, and notes what it was promised."""

    def __init__(self, manager: TaskManager, notes: Notes, folder: Path, chance: random.Random) -> None:
        self.manager, self.notes, self.folder, self.chance = manager, notes, folder, chance
        self.offers = [*own_offers(manager), *team_offers(manager)]
        self.waiting: dict[str, int] = {}

    async def call(self) -> None:
        looked = 0.0
        while not (self.folder / QUIET).exists():
            if time.monotonic() - looked > LOOK:
                await self.look()
                looked = time.monotonic()
            wanted = [self.chance.choice(self.offers) for _ in range(self.chance.choice(BURSTS))]
            await asyncio.gather(*map(self.add, wanted))
            await asyncio.sleep(PAUSE)

    async def look(self) -> None:
        try:
            counts = await self.manager.store.counts()
        except TaskflowError:
            return
        self.waiting = {offer.name: 0 for offer in self.offers}
        for count in counts:
            if not count.status.terminal and count.name in self.waiting:
                self.waiting[count.name] += count.n

    async def add(self, offer: Offer) -> None:
        if self.waiting.get(offer.name, 0) >= MOST_WAITING:
            return
        key = f"{time.monotonic():.0f}" if offer.name == KEYED else None  # the same for all instances in that second
        try:
            task_id = await self.manager.enqueue(offer.function, *offer.args, idempotency_key=key, **offer.kwargs)
        except TaskflowError:
            self.notes.write("refused")
        else:
            self.notes.write("promised", task_id, offer.name)


def fire_nothing(manager: TaskManager) -> None:
    """The team's schedules are known to the store, and no tick of them makes a task."""
    start = manager.scheduler.start

    def start_idle(introduced: asyncio.Event, *, fires: bool) -> None:
        start(introduced, fires=False)

    vars(manager.scheduler)["start"] = start_idle


async def live(folder: Path, life: int, seed: str) -> None:
    manager = team_manager(os.environ["TASKFLOW_URL"])
    manager.runs_tasks = True
    fire_nothing(manager)
    notes = Notes(folder, life)
    notes.watch(manager)
    caller = Caller(manager, notes, folder, random.Random(seed))
    stop = asyncio.Event()

    def called(done: asyncio.Task[None]) -> None:
        if not done.cancelled() and done.exception() is None:
            (folder / f"{life}.{QUIET}").touch()
        else:  # an error ends this process, which is seen
            stop.set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with manager.lifespan():
        while manager.unready() and not stop.is_set():
            await asyncio.sleep(0.02)
        calling = asyncio.create_task(caller.call())
        calling.add_done_callback(called)
        (folder / f"{life}.up").touch()
        await stop.wait()
        calling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await calling


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.torture_instance", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("life", type=int)
    parser.add_argument("seed")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(live(options.folder, options.life, options.seed))


if __name__ == "__main__":
    main()
