"""What an operator does to all tasks that match a search, while it runs: how far it is, and a way to stop it.

Owns the runs of this process: each is one loop around `TaskStore.act`, which writes the audit. Pages start them here
and look at them; the manager stops what is left when the service stops. The newest are remembered, and no more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from .errors import TaskflowError, TooManyRuns
from .models import TaskFilter
from .store import Act, Acted, TaskStore

logger = logging.getLogger("taskflow")

MOST_REMEMBERED = 50
MOST_RUNNING = 5
"""At a time, in one process: each of them keeps the writer busy."""


@dataclass(slots=True, eq=False)
class BulkRun:
    act: Act
    words: str
    """What it was asked for."""
    expected: str
    """How many matched when it began."""
    run_id: str = field(default_factory=lambda: uuid4().hex)
    acted: Acted = field(default_factory=Acted)
    state: Literal["running", "done", "stopped", "failed"] = "running"
    error: str | None = None
    task: asyncio.Task[None] | None = None


class BulkRuns:
    def __init__(self, store: TaskStore) -> None:
        self._store = store
        self._runs: OrderedDict[str, BulkRun] = OrderedDict()

    def start(self, run: BulkRun, where: TaskFilter, actor: str, reason: str | None) -> BulkRun:
        """Raises TooManyRuns."""
        if sum(known.state == "running" for known in self._runs.values()) >= MOST_RUNNING:
            raise TooManyRuns(MOST_RUNNING)
        while len(self._runs) >= MOST_REMEMBERED:
            self._forget_one()
        self._runs[run.run_id] = run
        run.task = asyncio.create_task(self._run(run, where, actor, reason), name=f"taskflow-bulk-{run.run_id}")
        return run

    def get(self, run_id: str) -> BulkRun | None:
        return self._runs.get(run_id)

    async def stop(self, run_id: str) -> None:
        """After the batch under way."""
        run = self._runs.get(run_id)
        if run is not None and run.state == "running":
            run.state = "stopped"

    async def stop_all(self) -> None:
        for run in self._runs.values():
            await self.stop(run.run_id)
        left = [run.task for run in self._runs.values() if run.task is not None and not run.task.done()]
        if left:
            await asyncio.wait(left, timeout=5.0)

    async def _run(self, run: BulkRun, where: TaskFilter, actor: str, reason: str | None) -> None:
        acting: Any = self._store.act(run.act, where, actor, reason)
        try:
            async for run.acted in acting:
                if run.state == "stopped":
                    break
            else:
                run.state = "done"
        except TaskflowError as error:
            run.state, run.error = "failed", str(error)
            logger.warning("%s of all that match %s: %s", run.act, run.words, error)
        finally:
            await acting.aclose()

    def _forget_one(self) -> None:
        oldest = next((key for key, run in self._runs.items() if run.state != "running"), next(iter(self._runs)))
        del self._runs[oldest]
