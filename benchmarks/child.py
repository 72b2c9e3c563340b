"""One measurement of one contestant, in a process of its own: `python -m benchmarks.child CONTESTANT SCENARIO ...`.

Prints one JSON object. The parent interleaves these and takes medians.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, quantiles
from time import perf_counter, process_time
from typing import Any

REQUESTS_AT_ONCE = 100


async def run_tasks(session: Any, kind: str, total: int, per_request: int) -> float:
    """Seconds from the first `add_task` until the last task is recorded as finished."""
    before = await session.finished()
    requests = iter(range(total // per_request))
    started = perf_counter()

    async def client() -> None:
        for _ in requests:
            await session.request(kind, per_request)

    await asyncio.gather(*(client() for _ in range(REQUESTS_AT_ONCE)))
    while await session.finished() < before + total:
        await asyncio.sleep(0.005)
    return perf_counter() - started


async def throughput(contestant: Any, database: str, kind: str, total: int) -> dict[str, float]:
    async with contestant.session(database) as session:
        await run_tasks(session, kind, 1_000, 10)
        gc.freeze()  # as the template's main.py does, for whoever is measured
        return {"tasks_per_second": total / await run_tasks(session, kind, total, 10)}


async def memory(contestant: Any, database: str, total: int) -> dict[str, float]:
    async with contestant.session(database) as session:
        await run_tasks(session, "async", 20_000, 10)
        before = resident_megabytes()
        await run_tasks(session, "async", total, 10)
        return {"megabytes_per_100k": (resident_megabytes() - before) / total * 100_000}


async def schedules(contestant: Any, database: str, count: int, seconds: float) -> dict[str, float]:
    """How late the ticks of so many schedules of one second are, and what they cost."""
    async with contestant.schedules(database, count) as lateness:
        await asyncio.sleep(2.5)
        before, cpu, began = len(await lateness.read()), process_time(), perf_counter()
        await asyncio.sleep(seconds)
        share = (process_time() - cpu) / (perf_counter() - began)
        late = await lateness.read()
    cuts = quantiles(late, n=100)
    return {
        "ticks_fired_percent": (len(late) - before) / (count * seconds) * 100,
        "mean_ms": mean(late) * 1_000,
        "p99_ms": cuts[98] * 1_000,
        "cpu_percent": share * 100,
    }


def resident_megabytes() -> float:
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def load(contestant: str) -> Any:
    return importlib.import_module(f"benchmarks.contestants.{contestant}")


def paths() -> Any:
    return importlib.import_module("benchmarks.paths")


def main() -> None:
    name, scenario, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        database = str(Path(folder) / "tasks.db")
        match scenario:
            case "throughput":
                result = asyncio.run(throughput(load(name), database, rest[0], int(rest[1])))
            case "memory":
                result = asyncio.run(memory(load(name), database, int(rest[0])))
            case "schedules":
                result = asyncio.run(schedules(load(name), database, int(rest[0]), float(rest[1])))
            case "path":
                result = {"tasks_per_second": asyncio.run(paths().path(rest[0], database))}
            case "history":
                result = asyncio.run(paths().history(int(rest[0]), database))
            case _:
                raise SystemExit(f"no scenario {scenario!r}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
