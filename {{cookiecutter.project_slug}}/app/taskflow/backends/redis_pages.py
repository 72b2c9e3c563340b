"""How a filter becomes walks down sorted sets: the ids of tasks, newest first.

Owns the choice of what is walked, and the looks into the other sets. Called by `redis.py`, which reads the rows. The
invariant: only ids are looked at of tasks that some indexed part of the filter leaves out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from heapq import merge
from typing import Any

from redis.asyncio import Redis

from ..models import Cursor, TaskFilter, to_micros
from .redis_keys import Keys
from .redis_values import indexes

MOST_IDS = 4_000
"""That are asked for at a time: a page begins with as many as it shows, and asks for more where few of them belong."""

Item = tuple[int, str]
"""When a task was added, and its id."""


@dataclass(slots=True)
class Descent:
    """How far one set was read, downwards."""

    key: str
    high: int | str
    """The time of the last one that was read, and how many of that time were."""
    skip: int = 0
    waiting: list[Item] = field(default_factory=list)
    """Those that were read and not given."""
    ended: bool = False


class Walk:
    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client: Any = client
        self._keys = keys

    async def ids(self, where: TaskFilter, before: Cursor | None, size: int) -> AsyncIterator[list[str]]:
        """Of tasks that have all indexed parts of a filter, in lists that may be empty. The smallest of their sets is
        walked."""
        walked, *others = await self._smallest_first(indexes(where))
        async for found in self._down(walked, where, before, size):
            for names in others:
                found = await self._in_any(found, names)
            yield found

    async def _smallest_first(self, parts: Sequence[Sequence[str]]) -> list[Sequence[str]]:
        if len(parts) == 1:
            return list(parts)
        async with self._client.pipeline(transaction=False) as pipeline:
            for names in parts:
                for name in names:
                    pipeline.zcard(self._keys(name))
            sizes = iter(await pipeline.execute())
        return sorted(parts, key=lambda names: sum(next(sizes) for _ in names))

    async def _in_any(self, ids: Sequence[str], names: Sequence[str]) -> list[str]:
        """Of these ids, those that one of the sets holds."""
        if not ids:
            return []
        async with self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.zmscore(self._keys(name), ids)
            scores = zip(*await pipeline.execute(), strict=True)
        return [task_id for task_id, found in zip(ids, scores, strict=True) if found.count(None) < len(names)]

    async def _down(
        self, names: Sequence[str], where: TaskFilter, before: Cursor | None, size: int
    ) -> AsyncIterator[list[str]]:
        """Some sets together."""
        ends = [moment for moment in (where.until, before.created_at if before else None) if moment is not None]
        newest = min(map(to_micros, ends), default="+inf")
        oldest = "-inf" if where.since is None else to_micros(where.since)
        place = None if before is None else (to_micros(before.created_at), before.task_id)
        descents = [Descent(self._keys(name), newest) for name in names]
        while True:
            for descent in descents:
                while not (descent.waiting or descent.ended):
                    await self._read_on(descent, oldest, size, place)
            floor = max((descent.waiting[-1] for descent in descents if not descent.ended), default=(-1, ""))
            ready = [item for item in merge(*(each.waiting for each in descents), reverse=True) if item >= floor]
            if not ready:
                return
            place, size = ready[-1], min(2 * size, MOST_IDS)
            for descent in descents:
                descent.waiting = [item for item in descent.waiting if item < place]
            yield [task_id for _, task_id in ready]

    async def _read_on(self, descent: Descent, oldest: int | str, size: int, place: Item | None) -> None:
        """What is not below `place` is left out."""
        rows = await self._client.zrevrangebyscore(
            descent.key, descent.high, oldest, start=descent.skip, num=size, withscores=True
        )
        items = [(int(score), task_id.decode()) for task_id, score in rows]
        if items:
            last, _ = items[-1]
            same = sum(at == last for at, _ in items)
            descent.skip, descent.high = same + (descent.skip if descent.high == last else 0), last
        descent.waiting = [item for item in items if place is None or item < place]
        descent.ended = len(items) < size
