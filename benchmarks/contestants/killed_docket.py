"""docket under `killed.py`."""

from __future__ import annotations

import asyncio
import os

from docket import Docket  # type: ignore[import-not-found, unused-ignore]

from .killed_job import JOBS, run

tasks = [run]


async def add() -> None:
    async with Docket(name="killed", url=os.environ["KILLED_REDIS"]) as docket:
        for number in range(JOBS):
            await docket.add(run)(number)


if __name__ == "__main__":
    asyncio.run(add())
