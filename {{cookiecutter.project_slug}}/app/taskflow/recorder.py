"""Writes down what this instance did, for the charts, and looks now and then at how much waits.

Owns the two rhythms: sums are stored every ten seconds while there are any, levels are sampled every
`snapshot_interval`. Both go through the journal like everything else; what cannot be written is added up further.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from time import monotonic

from .backends.base import GaugeRow, Record
from .errors import BackendUnavailable
from .history import KEPT, WHOLE, Book, Series
from .journal import Journal
from .loops import Loop
from .models import Count, TaskStatus
from .store import TaskStore

INTERVAL = 10.0
"""Seconds between writings."""
MOST_ROWS = 2_000
"""That one turn carries."""
LEVELS = (TaskStatus.PENDING, TaskStatus.RUNNING)


class Recorder:
    def __init__(
        self, book: Book, store: TaskStore, journal: Journal, *, clock: Callable[[], datetime], sample_every: float
    ) -> None:
        self._book = book
        self._store = store
        self._journal = journal
        self._clock = clock
        self._sample_every = sample_every
        self._sampled = float("-inf")
        self._left: list[GaugeRow] = []
        self._loop = Loop("recorder", self._round)

    def start(self) -> None:
        self._loop.start()

    async def stop(self) -> None:
        await self._loop.stop()
        with contextlib.suppress(BackendUnavailable, TimeoutError):
            async with asyncio.timeout(1.0):
                await self.write()

    async def _round(self) -> None:
        await asyncio.sleep(INTERVAL)
        with contextlib.suppress(BackendUnavailable):
            if monotonic() - self._sampled >= self._sample_every:
                await self.sample()
            await self.write()

    async def sample(self) -> None:
        """Raises BackendUnavailable."""
        self._sampled = monotonic()
        counts, now = await self._store.counts(), self._clock()
        oldest = await self._store.oldest(sorted({count.queue for count in counts if count.n > count.delayed}))
        self._book.sampled(now, levels_of(counts, oldest, now))

    async def write(self) -> None:
        """Raises BackendUnavailable."""
        rows = latest([*self._left, *self._book.rows()])
        self._left = rows
        now = self._clock()
        kept = {size: now - keep for size, keep in KEPT.items()}
        while self._left:
            await self._journal.obey(Record(self._left[:MOST_ROWS], kept))
            self._left = self._left[MOST_ROWS:]


def latest(rows: Sequence[GaugeRow]) -> list[GaugeRow]:
    """Of several about one bucket the last one, which says all."""
    return list({row[:-1]: row for row in rows}.values())


def levels_of(
    counts: Sequence[Count], oldest: Mapping[str, datetime], now: datetime
) -> Mapping[Series, Mapping[str, float]]:
    """What waits and runs in all and in each queue, and for how many seconds the oldest could have started."""
    found: defaultdict[Series, Counter[str]] = defaultdict(Counter)
    for count in counts:
        if count.status in LEVELS:
            for series in (WHOLE, ("queue", count.queue)):
                found[series][count.status] += count.n - count.delayed
                found[series]["delayed"] += count.delayed
    levels: dict[Series, dict[str, float]] = {series: dict(numbers) for series, numbers in found.items()}
    ages = {queue: max(0.0, (now - since).total_seconds()) for queue, since in oldest.items()}
    for queue, age in ages.items():
        levels.setdefault(("queue", queue), {})["oldest"] = age
    levels.setdefault(WHOLE, {})["oldest"] = max(ages.values(), default=0.0)
    return levels
