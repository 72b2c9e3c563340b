"""How a filter becomes walks down sorted sets: the ids of tasks, newest first.

Owns the choice of what is walked. Called by `redis.py`, which reads the rows. The invariant: where several parts of a
filter have an index, the smallest of their sets is walked, and only ids leave the server that all of them hold.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from typing import Any, NamedTuple

from redis.asyncio import Redis

from ..models import Cursor, TaskFilter, to_micros
from .redis_keys import Keys
from .redis_values import indexes

MOST_IDS = 2_000
"""That are looked at in one step, during which the server does nothing else. A page begins with as many as it shows,
and looks at more where few of them belong."""

MOST_COMPARED = 1_000_000
"""Ids of the walked set that are looked for in the others: about a second of the server's, in steps."""

Item = tuple[int, str]
"""When a task was added, and its id."""
Find = Callable[[Mapping[str, Any]], Awaitable[Any]]
"""Asks `find` of the script."""


class Look(NamedTuple):
    number: int
    """That were looked at."""
    same: int
    """Of the same time as the last."""
    last: Item | None
    found: list[Item]


@dataclass(slots=True)
class Descent:
    """How far one set was read, downwards."""

    name: str
    high: int | str
    """The time of the last one that was read, and how many of that time were."""
    size: int
    """How many are looked at next."""
    skip: int = 0
    last: Item = (-1, "")
    waiting: list[Item] = field(default_factory=list)
    """Those that were found and not given."""
    ended: bool = False


class Walk:
    def __init__(self, client: Redis, keys: Keys, find: Find) -> None:
        self._client: Any = client
        self._keys = keys
        self._find = find
        self._others: Sequence[Sequence[str]] = ()
        self._compared = 0

    async def ids(self, where: TaskFilter, before: Cursor | None, size: int) -> AsyncIterator[list[str]]:
        """Of tasks that have all indexed parts of a filter, a few at a time."""
        walked, *self._others = await self._smallest_first(indexes(where))
        ends = [moment for moment in (where.until, before.created_at if before else None) if moment is not None]
        newest = min(map(to_micros, ends), default="+inf")
        oldest = "-inf" if where.since is None else to_micros(where.since)
        place = None if before is None else (to_micros(before.created_at), before.task_id)
        descents = [Descent(name, newest, size) for name in walked]
        while True:
            for descent in descents:
                while not (descent.waiting or descent.ended):
                    await self._read_on(descent, oldest, place)
            floor = max((descent.last for descent in descents if not descent.ended), default=(-1, ""))
            ready = [item for item in merge(*(each.waiting for each in descents), reverse=True) if item >= floor]
            if not ready:
                return
            place = ready[-1]
            for descent in descents:
                descent.waiting = [item for item in descent.waiting if item < place]
            yield [task_id for _, task_id in ready]

    async def _smallest_first(self, parts: Sequence[Sequence[str]]) -> list[Sequence[str]]:
        if len(parts) == 1:
            return list(parts)
        async with self._client.pipeline(transaction=False) as pipeline:
            for names in parts:
                for name in names:
                    pipeline.zcard(self._keys(name))
            sizes = iter(await pipeline.execute())
        return sorted(parts, key=lambda names: sum(next(sizes) for _ in names))

    async def _read_on(self, descent: Descent, oldest: int | str, place: Item | None) -> None:
        """What is not below `place` is left out."""
        look = self._look_into_others if self._others else self._look
        number, same, last, found = await look(descent, oldest)
        if last is not None:
            descent.skip = same + (descent.skip if descent.high == last[0] else 0)
            descent.high, descent.last = last[0], last
        descent.waiting = [item for item in found if place is None or item < place]
        descent.ended = number < descent.size or self._compared >= MOST_COMPARED
        descent.size = min(2 * descent.size, MOST_IDS)

    async def _look(self, descent: Descent, oldest: int | str) -> Look:
        rows = await self._client.zrevrangebyscore(
            self._keys(descent.name), descent.high, oldest, start=descent.skip, num=descent.size, withscores=True
        )
        items = [(int(score), task_id.decode()) for task_id, score in rows]
        last = items[-1] if items else None
        return Look(len(items), sum(at == items[-1][0] for at, _ in items), last, items)

    async def _look_into_others(self, descent: Descent, oldest: int | str) -> Look:
        ends = {"high": str(descent.high), "low": str(oldest), "skip": descent.skip, "most": descent.size}
        number, same, last, found = await self._find({"name": descent.name, "others": self._others, **ends})
        self._compared += number
        return Look(number, same, item_of(last) if last else None, [item_of(pair) for pair in found])


def item_of(pair: Sequence[bytes]) -> Item:
    return int(pair[0]), pair[1].decode()
