"""Whole rows out of Redis, for a move from one store to another, and the form in which `redis.lua` takes them in.

Owns the walks: tasks down the sets of all statuses, by their rank, which nobody changes in a system that stands still.
No key holds every event, so they come in three parts: what people did, and what is about no task, from the streams;
the rest of each task; the rest of all else. Each event is in exactly one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from redis.asyncio import Redis

from . import tables
from .base import Batch
from .redis_keys import COLUMNS, Keys
from .redis_values import STATUSES, cell, document, group_row, line_row, schedule_row, task_row, texts, unpacked
from .stored import LINE

Row = dict[str, Any]

TABLES: Mapping[str, sa.Table] = {
    "queue": tables.queue,
    "schedule": tables.schedule,
    "failure": tables.failure,
    "task": tables.task,
}
EVENT = ("seq", "at", "kind", "attempt", "instance", "actor", "detail")
"""The cells of a packed event."""
TASK = ("task_id", *COLUMNS[:-4], *COLUMNS[-2:])
AT_ONCE = 200
"""Tasks whose events or lines are asked for together."""


class Reader:
    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client: Any = client
        self._keys = keys

    async def read(self, kind: str, after: str, limit: int) -> Batch:
        """See `Backend.dump`."""
        match kind:
            case "queue" | "schedule" | "failure":
                return await self._documents(kind)
            case "revoked":
                return await self._revoked(int(after or 0), limit)
            case "task":
                ids, end = await self._ids(after, limit)
                return Batch([row_of("task", row) for row in await self._tasks(ids)], end)
            case "event":
                return await self._events(after, limit)
            case _:
                return await self._lines(after, limit)

    async def _documents(self, kind: str) -> Batch:
        known = await self._client.hgetall(self._keys(f"{kind}s"))
        rows = [named(kind, name, value) for name, value in sorted(known.items())]
        return Batch(rows, None)

    async def _revoked(self, rank: int, limit: int) -> Batch:
        found = await self._client.zrange(self._keys("revoked"), rank, rank + limit - 1, withscores=True)
        rows = [{"session_id": session_id.decode(), "expires_at": int(score)} for session_id, score in found]
        return Batch(rows, str(rank + limit) if len(found) == limit else None)

    # -- tasks

    async def _ids(self, after: str, limit: int) -> tuple[list[str], str | None]:
        """From a place, "status:rank" by number, and where the next ones begin."""
        at, rank = map(int, (after or "0:0").split(":"))
        found = await self._client.zrange(self._keys("status", STATUSES[at]), rank, rank + limit - 1)
        if len(found) == limit:
            return texts(found), f"{at}:{rank + limit}"
        return texts(found), f"{at + 1}:0" if at + 1 < len(STATUSES) else None

    async def _tasks(self, ids: Sequence[str]) -> list[Any]:
        values = await self._client.mget([self._keys("task", task_id) for task_id in ids]) if ids else []
        return [task_row(task_id, value) for task_id, value in zip(ids, values, strict=True) if value is not None]

    # -- log lines

    async def _lines(self, after: str, limit: int) -> Batch:
        """The place is that of the task, and the number of its last line."""
        place, _, seq = (after or "0:0/0").partition("/")
        ids, end = await self._ids(place, AT_ONCE)
        rows: list[Row] = []
        for number, lines in enumerate(await self._streams(ids, seq, limit)):
            rows += [vars(line_row(*line)) for line in lines]
            if len(lines) == limit:
                at, rank = place.split(":")
                return Batch(rows, f"{at}:{int(rank) + number}/{rows[-1]['seq']}")
        return Batch(rows, end and f"{end}/0")

    async def _streams(self, ids: Sequence[str], seq: str, limit: int) -> list[Any]:
        """The first lines of each task; of the first one those behind a number."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for number, task_id in enumerate(ids):
                pipeline.xrange(self._keys("logs", task_id), min=f"({'0' if number else seq}-0", count=limit)
            found: list[Any] = await pipeline.execute()
        return found

    # -- events

    async def _events(self, after: str, limit: int) -> Batch:
        part, _, place = (after or "acts/0").partition("/")
        match part:
            case "acts":
                return await self._acts(int(place), limit)
            case "tasks":
                return await self._histories(place)
            case _:
                return await self._subjects(int(place))

    async def _acts(self, seq: int, limit: int) -> Batch:
        """In the order of their numbers, as far as both streams were read."""
        streams = [
            await self._client.xrange(self._keys(name), min=f"({seq}-0", count=limit) for name in ("audit", "feed")
        ]
        end = min((number_of(stream[-1][0]) for stream in streams if len(stream) == limit), default=None)
        found = {row["seq"]: row for row in map(act_row, streams[0])}
        found |= {row["seq"]: row for row in map(act_row, streams[1]) if not row["task_id"]}
        rows = [found[number] for number in sorted(found) if end is None or number <= end]
        return Batch(rows, "tasks/0:0" if end is None else f"acts/{end}")

    async def _histories(self, place: str) -> Batch:
        ids, end = await self._ids(place, AT_ONCE)
        older = await self._lists(ids)
        events = [(task.task_id, event) for task in await self._tasks(ids) for event in task.events]
        return Batch(await self._rest([*older, *events]), "subjects/0" if end is None else f"tasks/{end}")

    async def _subjects(self, start: int) -> Batch:
        names = sorted(texts(await self._client.smembers(self._keys("subjects"))))
        some = names[start : start + AT_ONCE]
        tasks = {task.task_id for task in await self._tasks(some)}  # whose lists came with them
        rows = await self._rest(await self._lists([name for name in some if name not in tasks]))
        return Batch(rows, f"subjects/{start + AT_ONCE}" if len(names) > start + AT_ONCE else None)

    async def _lists(self, ids: Sequence[str]) -> list[tuple[str, Any]]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for task_id in ids:
                pipeline.lrange(self._keys("events", task_id), 0, -1)
            lists = await pipeline.execute()
        return [(task_id, unpacked(event)) for task_id, events in zip(ids, lists, strict=True) for event in events]

    async def _rest(self, events: Sequence[tuple[str, Any]]) -> list[Row]:
        """Those that `_acts` did not show: nobody's, or so old that the stream of acts let them go."""
        oldest = await self._client.xrange(self._keys("audit"), count=1)
        first = number_of(oldest[0][0]) if oldest else inf
        rows = [event_row(*event) for event in events]
        return [row for row in rows if row["actor"] is None or row["seq"] < first]


def row_of(kind: str, stored: Any) -> Row:
    """As an SQL database has it; a column that the document lacks is empty."""
    row = {column.name: getattr(stored, column.name, None) for column in TABLES[kind].c}
    return row | {name: bool(row[name]) for name in flags_of(kind)}


def flags_of(kind: str) -> list[str]:
    return [column.name for column in TABLES[kind].c if isinstance(column.type, sa.Boolean)]


def named(kind: str, name: bytes, value: bytes) -> Row:
    if kind == "schedule":
        return row_of(kind, schedule_row(name, value))
    if kind == "failure":
        return row_of(kind, group_row(name.decode(), value))
    return row_of(kind, SimpleNamespace(**{"version": 0, **document(value), "name": name.decode()}))


def number_of(key: bytes) -> int:
    """Of a stream's entry."""
    return int(key.split(b"-")[0])


def act_row(entry: tuple[bytes, Mapping[bytes, bytes]]) -> Row:
    task_id, cells = unpacked(entry[1][b"e"])
    return event_row(task_id.decode(), cells)


def event_row(task_id: str, cells: Sequence[Any]) -> Row:
    return {"task_id": task_id, **dict(zip(EVENT, map(cell, cells), strict=True))}


def argument(kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `load` of the script takes."""
    return {"kind": kind, "rows": [FORMS[kind](row) for row in rows]}


def cells_of(row: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """`false` stands for NULL, so a flag is a number."""
    return [int(row[name]) if isinstance(row[name], bool) else row[name] for name in names]


def document_of(row: Mapping[str, Any], key: str = "name") -> list[Any]:
    names = [name for name in row if name != key]
    return [row[key], dict(zip(names, cells_of(row, names), strict=True))]


FORMS: Mapping[str, Any] = {
    "queue": document_of,
    "schedule": document_of,
    "failure": lambda row: document_of(row, "error_key"),
    "revoked": lambda row: [row["session_id"], row["expires_at"]],
    "task": lambda row: cells_of(row, TASK),
    "event": lambda row: [row["task_id"], cells_of(row, EVENT)],
    "log": lambda row: [row["seq"], cells_of(row, LINE)],
}
