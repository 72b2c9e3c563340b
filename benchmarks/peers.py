"""Other task systems beside ours, in one run: `python -m benchmarks.peers [--jobs N] [NAME ...]`.

Each empties a queue of jobs that do nothing with one worker process, on the same servers and the same two cores;
medians of three rounds in which they take turns. What a job promises differs: with ours its start and its end are on
the disk before anything else happens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from .__main__ import ROOT
from .drain import module_of_the_tests

PEERS = {
    "arq": ("redis", ["arq==0.26.3"]),
    "saq": ("redis", ["saq[redis]", "typing-extensions"]),
    "taskiq": ("redis", ["taskiq", "taskiq-redis"]),
    "celery": ("redis", ["celery[redis]"]),
    "procrastinate": ("postgres", ["procrastinate", "psycopg[binary]"]),
}
"""Name -> store, packages."""
ENVIRONMENTS = ROOT / "build" / "peers"
ROUNDS = 3
SLOW = {"arq": 5, "procrastinate": 5}
"""These get a fifth of the jobs."""


def python_of(name: str, packages: Sequence[str]) -> str:
    """Of an environment with these packages alone: peers' dependencies exclude each other."""
    folder = ENVIRONMENTS / name
    if not (folder / "ready").exists():
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "--quiet", "--clear", str(folder)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python")]
        subprocess.run([*install, *packages], check=True)
        (folder / "ready").touch()
    return str(folder / "bin" / "python")


def drain(name: str, url: str, jobs: int) -> float:
    """Jobs a second, from the first to the last."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "done"
        file.touch()
        command = [python_of(name, PEERS[name][1]), str(Path(__file__).with_name("peer.py")), name]
        subprocess.run([*command, "add", url, str(file), str(jobs)], check=True, cwd=folder)
        with (Path(folder) / "log").open("wb") as log:
            worker = subprocess.Popen([*command, "work", url, str(file), "0"], cwd=folder, stdout=log, stderr=log)
        try:
            began = 0.0
            while (size := os.stat(file).st_size) < jobs:
                if size and not began:
                    began, first = time.perf_counter(), size
                if worker.poll() is not None:
                    raise RuntimeError(f"{name}: {(Path(folder) / 'log').read_text()[-2000:]}")
                time.sleep(0.002)
            return (jobs - first) / (time.perf_counter() - began)
        finally:
            worker.kill()
            worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5_000)
    parser.add_argument("names", nargs="*", default=list(PEERS))
    options = parser.parse_args()
    servers = module_of_the_tests("servers")
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name in options.names:
            jobs = options.jobs // SLOW.get(name, 1)
            if PEERS[name][0] == "redis":
                with servers.RedisServer() as server:
                    found[name].append(drain(name, server.url, jobs))
            else:
                with servers.fresh_postgres(servers.postgres_url()) as url:
                    found[name].append(drain(name, url, jobs))
    for name in options.names:
        print(f"{name:>14} on {PEERS[name][0]:<8} {median(found[name]):>8,.0f} jobs/s")


if __name__ == "__main__":
    main()
