"""Proof on your own tasks: `make torture MINUTES=1`, or `python -m tools.torture --help`.

Starts instances of the service's task system on a store of their own, kills, stops and freezes them at random, cuts the
store off, and says in one page what became of every task: accepted, lost, doubled, interrupted, how long recovery took.
Its own tasks are called, and yours that `TASKS` of `tests/torture_tasks.py` names, with all that they do. The exit code
is 0 when nothing was lost and nothing ran twice, 1 when something was, 2 when it could not begin or go on.

Owns the processes and what is done to them. The invariant: every process that it started has ended before it does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from app.settings import settings
from app.taskflow import TaskflowError
from app.taskflow.cli import positive
from app.taskflow.models import utc_now
from tests.taskflow.servers import BACKENDS, Server, bound_to_this_process

from .torture_instance import QUIET, NotTortured, read_notes, team_manager, team_offers
from .torture_report import Setting, report
from .torture_store import is_file, lock, store, stored, unfinished
from .torture_verdict import Evidence, Harm, judge

ROOT = Path(__file__).resolve().parents[1]
REST = (0.3, 2.0)
"""Seconds between two harms."""
CUT = (1.0, 3.0)
"""Seconds for which the store is away."""
START_TIMEOUT = 60.0
DRAIN_TIMEOUT = 90.0
"""Seconds for what is left in the end: a retry may wait, and where the system does not say which processes live, a
lease has to lapse."""
STOP_TIMEOUT = 15.0
"""Seconds beyond `shutdown_timeout` after which a clean stop counts as stuck."""


class Life(NamedTuple):
    """One process, from its start to its end."""

    number: int
    process: subprocess.Popen[bytes]


class Torture:
    """The instances on one store, and what was done to them."""

    def __init__(self, url: str, folder: Path, server: Server | None, *, seed: int, stop_timeout: float) -> None:
        self.url, self.folder, self.server = url, folder, server
        self.seed, self.chance = seed, random.Random(seed)
        self.stop_timeout = stop_timeout
        self.lives: list[Life] = []
        self.born = 0
        self.harms: list[Harm] = []
        self.stops: list[float] = []
        """Seconds that clean stops took."""
        self.faults: list[str] = []
        """What instances did that they should not have."""

    # -- instances

    def start(self) -> None:
        """Returns once it accepts and runs tasks."""
        self.born += 1
        command = [sys.executable, "-m", "tools.torture_instance", self.folder, self.born, f"{self.seed}-{self.born}"]
        with (self.folder / f"{self.born}.log").open("wb") as log:
            process = subprocess.Popen(
                [*bound_to_this_process(signal.SIGKILL), *map(str, command)],
                cwd=ROOT,
                env={**os.environ, "TASKFLOW_URL": self.url},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what Ctrl-C ends is the torture; it ends them
            )
        self.lives.append(Life(self.born, process))
        deadline = time.monotonic() + START_TIMEOUT
        while not (self.folder / f"{self.born}.up").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / f"{self.born}.log").read_text(errors="replace")
                raise NotTortured(f"an instance does not come up; it said\n{said[-2000:]}")
            time.sleep(0.02)

    def note_deaths(self) -> None:
        """An instance that ended by itself is a fault; another one takes its place."""
        for life in [life for life in self.lives if life.process.poll() is not None]:
            self.faults.append(f"instance {life.number} ended by itself, with exit code {life.process.returncode}")
            self.lives.remove(life)
            now = time.monotonic()
            self.harms.append(Harm("kill", life.number, now, now))
            self.start()

    def end(self, life: Life) -> None:
        """Stops it in order. One that does not end in time is a fault, and killed."""
        began = time.monotonic()
        life.process.send_signal(signal.SIGTERM)
        try:
            life.process.wait(self.stop_timeout)
        except subprocess.TimeoutExpired:
            self.faults.append(f"instance {life.number} did not end within {self.stop_timeout:g} s of its stop")
            life.process.kill()
            life.process.wait()
        ended = time.monotonic()
        self.stops.append(ended - began)
        self.harms.append(Harm("stop", life.number, began, ended))

    def close(self) -> None:
        for life in self.lives:
            life.process.kill()
            life.process.wait()

    # -- what is done to them

    def kill(self) -> None:
        life = self.victim()
        at = time.monotonic()
        life.process.kill()
        life.process.wait()
        self.harms.append(Harm("kill", life.number, at, time.monotonic()))
        self.replace(life)

    def stop(self) -> None:
        life = self.victim()
        self.end(life)
        self.replace(life)

    def freeze(self, longest: float) -> None:
        life, at = self.victim(), time.monotonic()
        life.process.send_signal(signal.SIGSTOP)
        time.sleep(self.chance.uniform(min(1.0, longest), longest))
        life.process.send_signal(signal.SIGCONT)
        self.harms.append(Harm("freeze", life.number, at, time.monotonic()))

    def cut(self) -> None:
        """Nobody can write: the server is killed and started again, the file is locked."""
        at, seconds = time.monotonic(), self.chance.uniform(*CUT)
        if self.server is not None:
            self.server.kill()
            time.sleep(seconds)
            self.server.start()
        else:
            lock(self.url, seconds)
        self.harms.append(Harm("cut", 0, at, time.monotonic()))

    def victim(self) -> Life:
        return self.chance.choice(self.lives)

    def replace(self, life: Life) -> None:
        self.lives.remove(life)
        time.sleep(self.chance.uniform(0, 1))
        self.start()

    def ordeals(self, longest_freeze: float) -> Iterator[Callable[[], None]]:
        """A kill, and then all of them over and over, each time in another order: none is left out by chance."""
        ordeals: list[Callable[[], None]] = [*[self.kill] * 3, *[self.stop] * 2]
        if longest_freeze > 0:
            ordeals += [lambda: self.freeze(longest_freeze)] * 2
        if self.server is not None or is_file(self.url):
            ordeals.append(self.cut)
        yield self.kill
        while True:
            self.chance.shuffle(ordeals)
            yield from ordeals

    # -- the whole of it

    def run(self, seconds: float, instances: int, longest_freeze: float) -> None:
        for _ in range(instances):
            self.start()
        ordeals, began = self.ordeals(longest_freeze), time.monotonic()
        while (elapsed := time.monotonic() - began) < seconds:
            tell(f"{elapsed:.0f} of {seconds:.0f} s, {len(self.harms)} times something was done to an instance")
            time.sleep(self.chance.uniform(*REST))
            self.note_deaths()
            next(ordeals)()

    def finish(self) -> Evidence:
        """Waits until nothing is added, waits or runs any more, and collects. The store is read before everybody is
        stopped: a task that hangs would end as interrupted by that."""
        (self.folder / QUIET).touch()
        deadline = time.monotonic() + DRAIN_TIMEOUT
        while (left := self.busy() or asyncio.run(unfinished(self.url))) and time.monotonic() < deadline:
            tell(f"the end: {left} are left")
            time.sleep(0.5)
            self.note_deaths()
        held = asyncio.run(stored(self.url))
        for life in self.lives:
            self.end(life)
        tell("")
        promised, starts, refused = read_notes(self.folder)
        return Evidence(promised, starts, self.harms, held, refused)

    def busy(self) -> int:
        """Instances that may still add something."""
        return sum(not (self.folder / f"{life.number}.{QUIET}").exists() for life in self.lives)


# -- the command line


def tell(text: str) -> None:
    """For whoever waits at a terminal: one line, which is gone in the end."""
    if sys.stderr.isatty():
        print(f"\r{text:<78}", end="" if text else "\r", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tools.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["sqlite", *BACKENDS]
    made.add_argument("--minutes", type=float, default=1.0, help="how long instances are tortured (default: 1)")
    made.add_argument("--instances", type=positive, default=3, help="how many run at a time (default: 3)")
    made.add_argument("--seed", type=int, help="of the choices that are made; a report names its own")
    made.add_argument("--freeze", type=float, default=5.0, metavar="SECONDS", help="the longest (default: 5)")
    made.add_argument(
        "--store",
        choices=kinds,
        default=BACKENDS[0] if len(BACKENDS) == 1 else "sqlite",
        help="one of the torture's own, started and deleted by it (default: what the project is made for)",
    )
    made.add_argument(
        "--url",
        default=os.environ.get("TASKFLOW_TORTURE_URL"),
        help="an empty store of yours instead; TASKFLOW_TORTURE_URL says so too. Its rows stay there",
    )
    made.add_argument("--report", type=Path, default=Path("torture.md"), help="where it is written (torture.md)")
    return made


def torture(options: argparse.Namespace, folder: Path) -> bool:
    """Whether the promise held. Raises NotTortured."""
    seed = random.randrange(10**6) if options.seed is None else options.seed
    with store(options.url, options.store, folder) as (url, server):
        settings.url = url  # for this process; the environment is for those that it starts
        manager = team_manager(url)
        place = manager.backend_name if options.url else f"{options.store}, of its own"
        yours = ", ".join(offer.name for offer in team_offers(manager))
        print(f"{options.instances} instances, store: {place}, {options.minutes:g} min, seed {seed}")
        print(
            f"Yours that are really called: {yours or 'none; TASKS of tests/torture_tasks.py names them'}", flush=True
        )
        ordeal = Torture(url, folder, server, seed=seed, stop_timeout=manager.shutdown_timeout + STOP_TIMEOUT)
        try:
            ordeal.run(options.minutes * 60, options.instances, options.freeze)
            evidence = ordeal.finish()
        finally:
            ordeal.close()
    findings = judge(evidence)
    setting = Setting(place, options.minutes * 60, seed, options.instances, utc_now())
    text = report(setting, evidence, findings, ordeal.stops, ordeal.faults)
    options.report.write_text(text, "utf-8")
    print(f"\n{text}\nWritten to {options.report}")
    return not (findings or ordeal.faults)


def main() -> int:
    options = parser().parse_args()
    folder, code = Path(tempfile.mkdtemp(prefix="torture-")), 2
    try:
        code = 0 if torture(options, folder) else 1
    except (NotTortured, TaskflowError) as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped before its end: there is no report", file=sys.stderr)
    finally:
        if code == 1:
            print(f"What every instance noted and logged is in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
