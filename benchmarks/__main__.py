"""Runs every comparison, interleaved, and prints medians: `python -m benchmarks [--rounds N] [NAME ...]`.

Never a test: numbers depend on the machine. The comparison is what counts, so contestants take turns within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from .load import post_repeatedly

ROOT = Path(__file__).parent.parent
PROJECT = ROOT / "{{cookiecutter.project_slug}}"
RIVALS = ROOT / "build" / "rivals"
"""Where the others are installed for the comparison; nothing of ours depends on them."""
RIVAL_PACKAGES = ["fastapi-taskflow==0.12.1", "apscheduler==3.11.3", "tzlocal==5.4.5"]
CONTESTANTS = ["ours", "pypi", "plain"]
SCHEDULERS = ["ours", "apscheduler", "apscheduler_memory"]
ALONE = "alone"
ARRANGEMENTS = [ALONE, "before, auto_install", "after, auto_install", "before", "after"]
"""Where `TaskAdmin` stands in an app, and whether it manages every route: see `routes.py`."""
ROUTES = ["nothing", "async", "plain"]

Result = Mapping[str, float]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, PROJECT, RIVALS)))}


def install_rivals() -> None:
    listed = RIVALS / "packages.txt"
    if not listed.exists() or listed.read_text().split() != RIVAL_PACKAGES:
        uv = ROOT / ".venv" / "bin" / "uv"
        command = [str(uv) if uv.exists() else "uv", "pip", "install", "--quiet", "--no-deps", "--target", str(RIVALS)]
        subprocess.run([*command, *RIVAL_PACKAGES], check=True)
        listed.write_text("\n".join(RIVAL_PACKAGES))


def child(contestant: str, *arguments: str) -> Result:
    command = [sys.executable, "-m", "benchmarks.child", contestant, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contestant} {arguments}:\n{done.stderr[-2000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def signup(contestant: str) -> Result:
    """The sign-up route under 32 connections for 6 seconds."""
    with served("benchmarks.server", contestant) as port:
        asyncio.run(post_repeatedly(port, "/signup?email=a%40example.com", 8, 1.0))
        return asyncio.run(post_repeatedly(port, "/signup?email=a%40example.com", 32, 6.0))


def each_route(arrangement: str) -> Result:
    """Requests a second and the slowest percent of each route of an app, under 32 connections for 3 seconds each."""
    found: dict[str, float] = {}
    with served("benchmarks.routes", arrangement) as port:
        for route in ROUTES:
            asyncio.run(post_repeatedly(port, f"/{route}", 8, 0.5))
            measured = asyncio.run(post_repeatedly(port, f"/{route}", 32, 3.0))
            found |= {route: measured["requests_per_second"], f"{route}_p99": measured["p99_ms"]}
    return found


@contextmanager
def served(module: str, subject: str) -> Iterator[int]:
    """The port of a server in a process of its own, with a new database."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [sys.executable, "-m", module, subject, str(Path(folder) / "tasks.db"), str(port)]
        server = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
        try:
            wait_for(port)
            yield port
        finally:
            server.kill()
            server.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError("the server did not start")


COMPARISONS: dict[str, tuple[str, Callable[[str], Result]]] = {
    "async": ("20,000 async no-op tasks, end to end", lambda name: child(name, "throughput", "async", "20000")),
    "sync": ("20,000 sync no-op tasks, end to end", lambda name: child(name, "throughput", "sync", "20000")),
    "signup": ("POST /signup, 32 connections", signup),
    "schedules": ("1,000 schedules of one second, for 20 seconds", lambda name: child(name, "schedules", "1000", "20")),
    "memory": ("memory growth per 100,000 finished tasks", lambda name: child(name, "memory", "100000")),
}


PATHS = ["async", "thread", "process", "retries", "encryption", "observers", "queues"]
HISTORY = {"empty": "0", "1,000,000 rows": "1000000"}


def alone(title: str, variants: Mapping[str, tuple[str, ...]], rounds: int) -> None:
    """Variants of our own system, taking turns."""
    samples: defaultdict[str, list[Result]] = defaultdict(list)
    for _ in range(rounds):
        for variant, arguments in variants.items():
            samples[variant].append(child("ours", *arguments))
    show(title, samples)


def show(title: str, samples: Mapping[str, list[Result]]) -> None:
    print(f"\n{title}")
    for name, results in samples.items():
        cells = [f"{key} {median(result[key] for result in results):>10,.2f}" for key in results[0]]
        print(f"  {name:<18} " + "   ".join(cells), flush=True)


def compare(name: str, rounds: int) -> None:
    title, measure = COMPARISONS[name]
    samples: defaultdict[str, list[Result]] = defaultdict(list)
    for _ in range(1 if name == "memory" else rounds):
        for contestant in SCHEDULERS if name == "schedules" else CONTESTANTS:
            samples[contestant].append(measure(contestant))
    show(title, samples)


def routes(rounds: int) -> None:
    """What the routes of an app keep when the task system stands in it: their share of what they do alone."""
    samples: defaultdict[str, list[Result]] = defaultdict(list)
    for _ in range(rounds):
        for arrangement in ARRANGEMENTS:
            samples[arrangement].append(each_route(arrangement))
    middle = {
        name: {key: median(result[key] for result in results) for key in results[0]}
        for name, results in samples.items()
    }
    alone = middle[ALONE]
    print("\nRequests a second of an app's routes, 32 connections; in brackets what is kept; slowest 1 % above")
    for name, found in middle.items():
        cells = [
            f"{route} {found[route]:>6,.0f} ({found[route] / alone[route]:4.2f}) {found[route + '_p99']:6.1f} ms"
            for route in ROUTES
        ]
        print(f"  {name:<22} " + "   ".join(cells), flush=True)


def main() -> None:
    everything = [*COMPARISONS, "routes", "paths", "history"]
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(everything)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(everything):
        parser.error(f"no such comparison: {', '.join(sorted(unknown))}")
    install_rivals()
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores; medians of {arguments.rounds} rounds, interleaved"
    )
    for name in arguments.names or everything:
        match name:
            case "routes":
                routes(arguments.rounds)
            case "paths":
                alone("Our own paths", {path: ("path", path) for path in PATHS}, arguments.rounds)
            case "history":
                variants = {title: ("history", rows) for title, rows in HISTORY.items()}
                alone("What finished tasks cost", variants, arguments.rounds)
            case _:
                compare(name, arguments.rounds)


if __name__ == "__main__":
    main()
