"""What is left of a queue whose workers and servers are killed: `python -m benchmarks.killed [--rounds N] [NAME ...]`.

120 jobs of 0.5 s are added, then two workers with four slots each are started. Two seconds after the first job began
one worker is killed with all its processes, at four seconds the other, each started again a second later; at six
seconds, or once both are at work again, the server is stopped and started again on its port and its data. Then
everybody has 75 s to end what is left. A worker that ends by itself is counted and started again after a second, as a
supervisor would; what taskiq's own supervisor starts again is not counted.

Everyone is set up as its documentation says for work that must not be lost, and a job may run again:
- Celery: late acknowledgement, `reject_on_worker_lost`, prefetch 1, running tasks cancelled when the connection is
  lost, the prefork pool; on RabbitMQ a quorum queue and confirmed messages, on Redis `visibility_timeout`
- taskiq: its worker command, acknowledgement when the result is saved; on RabbitMQ a quorum queue and no more messages
  ahead than slots, on Redis streams `idle_timeout`, a timeout of the lock that a killed worker may hold, one message a
  read
- PgQueuer: `shutdown_on_listener_failure`, which asks for a supervisor; its heartbeat as it comes
- docket: its worker command with `--redelivery-timeout`
- ours: `requeue_on_interrupt`, all else as it comes; in Celery workers both servers are stopped at once. On one machine
  an instance sees at once that a neighbour's process is gone; `ours-apart` is told that each is on another

Where a number of seconds decides when a silent worker's job is another's it is 30, which PgQueuer and ours come with;
the others' defaults, from five minutes to an hour, would leave the job undone here. Servers write to the disk before
they answer.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .__main__ import ROOT, environment
from .contestants.killed_job import CONCURRENCY, JOBS, REDELIVERY
from .drain import module_of_the_tests
from .peers import python_of

FIRST_KILL, SECOND_KILL, RESTART = 2.0, 4.0, 6.0
"""Seconds after the first start of a job."""
BACK_AFTER = 1.0
AT_WORK_WITHIN = 30.0
PATIENCE = 75.0
LINGER = 5.0
"""Seconds in which a job that has ended may still come again."""
HERE = "benchmarks.contestants"


class Contestant(NamedTuple):
    module: str
    """What adds the jobs when it is run."""
    servers: Sequence[str]
    worker: str
    """After `python -m`."""
    packages: Sequence[str] = ()
    """None: it is ours, and runs where this does."""


CELERY = f"worker -n {{name}}@%h --concurrency {CONCURRENCY} --loglevel INFO"
CELERY_PEER = f"celery -A {HERE}.killed_celery {CELERY}"
TASKIQ = f"taskiq worker {HERE}.killed_taskiq:broker --workers 1 --max-async-tasks {CONCURRENCY}"
DOCKET = f"docket worker --docket killed --url {{redis}} --tasks {HERE}.killed_docket:tasks"
CELERY_PACKAGES = ["celery[redis]==5.7.0"]
TASKIQ_PACKAGES = ["taskiq==0.13.0", "taskiq-aio-pika==0.6.1", "taskiq-redis==1.2.4"]

CONTESTANTS = {
    "celery-rabbit": Contestant("killed_celery", ["rabbit"], CELERY_PEER, CELERY_PACKAGES),
    "celery-redis": Contestant("killed_celery", ["redis"], CELERY_PEER, CELERY_PACKAGES),
    "taskiq-rabbit": Contestant("killed_taskiq", ["rabbit"], TASKIQ, TASKIQ_PACKAGES),
    "taskiq-redis": Contestant("killed_taskiq", ["redis"], TASKIQ, TASKIQ_PACKAGES),
    "pgqueuer": Contestant(
        "killed_pgqueuer", ["postgres"], f"{HERE}.killed_pgqueuer work", ["pgqueuer[asyncpg]==1.6.0"]
    ),
    "docket": Contestant(
        "killed_docket",
        ["redis"],
        f"{DOCKET} --concurrency {CONCURRENCY} --redelivery-timeout {REDELIVERY}s",
        ["pydocket==0.27.0"],
    ),
    "ours": Contestant("killed_ours", ["postgres"], f"{HERE}.killed_ours work"),
    "ours-apart": Contestant("killed_ours", ["postgres"], f"{HERE}.killed_ours work apart"),
    "ours-celery": Contestant("killed_ours", ["postgres", "rabbit"], f"celery -A {HERE}.killed_ours {CELERY}"),
}


class Crew:
    """The two workers, and what starts them again."""

    def __init__(self, start: Callable[[str], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._due = dict.fromkeys(("one", "two"), 0.0)
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self.exits = 0

    def __enter__(self) -> Crew:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._watcher.join()
        for name in list(self._running):
            self.kill(name)

    def all_at_work(self, lines: Lines) -> bool:
        with self._lock:
            return len(self._running) == 2 and {str(each.pid) for each in self._running.values()} <= lines.workers()

    def kill(self, name: str) -> None:
        with self._lock:
            if process := self._running.pop(name, None):
                self._end(name, process)

    def _end(self, name: str, process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._due[name] = time.monotonic() + BACK_AFTER

    def _watch(self) -> None:
        while not self._stopping.wait(0.05):
            with self._lock:
                for name, process in list(self._running.items()):
                    if process.poll() is not None:
                        self.exits += 1
                        self._end(name, self._running.pop(name))
                for name, due in list(self._due.items()):
                    if time.monotonic() >= due:
                        del self._due[name]
                        self._running[name] = self._start(name)


class Lines:
    """What the jobs wrote."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def _split(self) -> list[list[str]]:
        return [line.split() for line in self._file.read_text().splitlines()] if self._file.exists() else []

    def count(self, word: str) -> Counter[str]:
        return Counter(job for said, job, _ in self._split() if said == word)

    def workers(self) -> set[str]:
        return {worker for _, _, worker in self._split()}

    def twice(self, word: str) -> int:
        return sum(n > 1 for n in self.count(word).values())


def comes(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in that time."""
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return true


def surroundings(contestant: Contestant, told: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Its Python and the environment of its processes."""
    if contestant.packages:
        return python_of(contestant.module, contestant.packages), {**os.environ, "PYTHONPATH": str(ROOT), **told}
    return sys.executable, environment() | told


def ordeal(contestant: Contestant, servers: dict[str, Any], folder: Path, logs: Path) -> str:
    urls = {kind: server.url for kind, server in servers.items()}
    told = {f"KILLED_{kind.upper()}": url for kind, url in urls.items()} | {"KILLED_FILE": str(logs / "lines")}
    python, env = surroundings(contestant, told)
    subprocess.run([python, "-m", f"{HERE}.{contestant.module}"], cwd=folder, env=env, check=True)

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [python, "-m", *contestant.worker.format(name=name, **urls).split()]
        with (logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)

    lines = Lines(logs / "lines")
    with Crew(start) as crew:
        torment(crew, lines, list(servers.values()))
        return outcome(crew, lines)


def outcome(crew: Crew, lines: Lines) -> str:
    began = time.monotonic()
    finished = comes(lambda: len(lines.count("end")) == JOBS, PATIENCE)
    seconds = f"{time.monotonic() - began:5.1f} s" if finished else "never"
    time.sleep(LINGER)
    done = len(lines.count("end"))
    return (
        f"{done:>4} done {JOBS - done:>4} undone {lines.twice('start'):>4} started twice "
        f"{lines.twice('end'):>4} ended twice {crew.exits:>4} exits   {seconds:>8}"
    )


def torment(crew: Crew, lines: Lines, servers: Sequence[Any]) -> None:
    if not comes(lambda: bool(lines.workers()), AT_WORK_WITHIN):
        raise RuntimeError("no job has begun")
    began = time.monotonic()
    for at, name in ((FIRST_KILL, "one"), (SECOND_KILL, "two")):
        time.sleep(began + at - time.monotonic())
        crew.kill(name)
    time.sleep(began + RESTART - time.monotonic())
    if not comes(lambda: crew.all_at_work(lines), AT_WORK_WITHIN):
        raise RuntimeError("who was killed did not come back to work")
    for server in servers:
        server.stop()
    if len(lines.count("end")) == JOBS:
        raise RuntimeError("nothing was left for the restart")
    for server in servers:
        server.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="keep what workers and jobs wrote below this folder")
    options = parser.parse_args()
    servers, brokers = map(module_of_the_tests, ("servers", "brokers"))
    kinds = {"redis": servers.RedisServer, "postgres": servers.PostgresServer, "rabbit": brokers.RabbitServer}
    for turn in range(options.rounds):
        for name in options.names:
            with ExitStack() as places:
                folder = Path(places.enter_context(tempfile.TemporaryDirectory()))
                logs = options.logs.absolute() / f"{name}-{turn}" if options.logs else folder
                logs.mkdir(parents=True, exist_ok=True)
                started = {kind: places.enter_context(kinds[kind]()) for kind in CONTESTANTS[name].servers}
                print(f"{name:>14} {ordeal(CONTESTANTS[name], started, folder, logs)}", flush=True)


if __name__ == "__main__":
    main()
