"""The job of `killed.py`, which every contestant runs: a line at its start and one at its end, and a wait between."""

from __future__ import annotations

import asyncio
import os
import time

JOBS, SECONDS, CONCURRENCY = 120, 0.5, 4
REDELIVERY = 30
"""Seconds after which a job of a silent worker is another's, for those who ask for a number: ours and PgQueuer's."""


def note(word: str, number: int) -> None:
    """The worker is told by its process group, which is the first of its processes."""
    file = os.open(os.environ["KILLED_FILE"], os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(file, f"{word} {number} {os.getpgrp()}\n".encode())
    os.close(file)


async def run(number: int) -> None:
    note("start", number)
    await asyncio.sleep(SECONDS)
    note("end", number)


def run_plainly(number: int) -> None:
    note("start", number)
    time.sleep(SECONDS)
    note("end", number)
