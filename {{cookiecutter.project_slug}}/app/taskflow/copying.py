"""From one store to another: all that a stopped system holds, and the proof that it arrived.

Owns what is refused, the order, and the comparison; which rows there are is the stores' business. Called by the command
line. The invariant: rows keep their ids and numbers, and what is there is not stored twice, so that a copy which was
killed is made again from the beginning and ends as if it never had been.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any

import uuid_utils

from .backends.base import KINDS, Backend, Batch, Beat, Pulse
from .backends.stored import shown_status
from .errors import CopyRefused
from .housekeeping import introduce, is_gone, machine_name
from .models import TaskStatus, to_micros

BATCH = 500
"""Rows that are read at a time."""
LARGEST_LOAD = 4_000_000
"""Characters that are written at a time, more or less: one task's arguments may be large."""
LEASES = 2
"""A heartbeat that is younger than so many of its leases is one of the living; clocks differ."""
PROBE_LEASE = timedelta(seconds=5)
MOST_STRANGERS = 1_000
NAMES = {
    "queue": "queues",
    "schedule": "schedules",
    "revoked": "ended sessions",
    "failure": "groups of failures",
    "task": "tasks",
    "event": "events",
    "log": "log lines",
}

Row = Mapping[str, Any]


@dataclass(slots=True)
class Tally:
    """Of the rows of one kind in one store; equal ones were made from equal rows, in whatever order."""

    rows: int = 0
    digest: int = 0
    statuses: Counter[TaskStatus] = field(default_factory=Counter)

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += len(rows)
        self.digest = (self.digest + sum(map(digest_of, rows))) % 2**64
        self.statuses.update(shown_status(row["status"]) for row in rows if "status" in row)


@dataclass(frozen=True, slots=True)
class Line:
    """How many of something were read, how many the target holds, and whether they are the same."""

    name: str
    read: int
    held: int
    same: bool


@dataclass(frozen=True, slots=True)
class Copied:
    lines: Sequence[Line]
    written: int
    """Rows that this run stored."""
    mended: int
    """Rows in which something stands for a cell that could not be read."""

    @property
    def complete(self) -> bool:
        return all(line.same for line in self.lines)


async def copy(
    source: Backend, target: Backend, now: datetime, progressed: Callable[[str, int], object] = lambda name, rows: None
) -> Copied:
    """Copies everything and compares. Raises CopyRefused before anything is written, and BackendUnavailable: then it is
    made again."""
    await refuse(source, target, now)
    read = {kind: Tally() for kind in KINDS}
    written = mended = 0
    for kind, tally in read.items():
        async for batch in batches(source, kind):
            for rows in parts(batch.rows):
                written += await target.load(kind, rows)
            tally.add(batch.rows)
            mended += batch.mended
            progressed(NAMES[kind], tally.rows)
    return Copied(await compare(read, target), written, mended)


async def batches(store: Backend, kind: str) -> AsyncIterator[Batch]:
    place: str | None = ""
    while place is not None:
        batch = await store.dump(kind, place, BATCH)
        place = batch.after
        yield batch


async def has_any(store: Backend, kind: str) -> bool:
    async for batch in batches(store, kind):
        if batch.rows:
            return True
    return False


def parts(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Neither empty nor much larger than LARGEST_LOAD."""
    start, size = 0, 0
    for place, row in enumerate(rows):
        size += sum(len(cell) for cell in row.values() if isinstance(cell, str))
        if size > LARGEST_LOAD or place + 1 == len(rows):
            yield rows[start : place + 1]
            start, size = place + 1, 0


# -- the proof


async def compare(read: Mapping[str, Tally], target: Backend) -> list[Line]:
    """By reading the target, and its own counts of tasks."""
    lines = []
    for kind, tally in read.items():
        held = Tally()
        async for batch in batches(target, kind):
            held.add(batch.rows)
        lines.append(Line(NAMES[kind], tally.rows, held.rows, tally == held))
    counts: Counter[TaskStatus] = Counter()
    for count in await target.counts():
        counts[count.status] += count.n
    found = read["task"].statuses
    for status in TaskStatus:
        lines.append(Line(f"{status} tasks", found[status], counts[status], found[status] == counts[status]))
    return lines


def digest_of(row: Row) -> int:
    text = repr(sorted(row.items()))
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


# -- what is refused


async def refuse(source: Backend, target: Backend, now: datetime) -> None:
    """Raises CopyRefused. The target's schema is brought up, where it has none."""
    if not await source.is_current():
        raise CopyRefused(f"{source.name} has no schema of this version: `python -m app migrate` brings it up")
    for store in (source, target):
        await store.open()
        await refuse_living(store, now)
    await refuse_itself(source, target, now)
    await refuse_strangers(source, target)


async def refuse_living(store: Backend, now: datetime) -> None:
    pulses = await asyncio.to_thread(store.pulses)
    living = [pulse for pulse in pulses if is_living(pulse, now + store.clock_offset)]
    if living:
        names = ", ".join(f"{pulse.instance.host} (pid {pulse.instance.pid})" for pulse in living)
        raise CopyRefused(f"{store.name} is in use by {names}: stop what serves it, then copy")


def is_living(pulse: Pulse, now: datetime) -> bool:
    """Whether it holds a lease and beat not long ago. Of this machine it is known at once who died."""
    recent = to_micros(now) - pulse.stamp < LEASES * pulse.lease * 1e6
    return pulse.lease > 0 and recent and not is_gone(pulse.instance, machine_name())


async def refuse_itself(source: Backend, target: Backend, now: datetime) -> None:
    """One database has many names, so whether it is one is tried: who beats in the target must not be seen in the
    source."""
    probe = introduce(str(uuid_utils.uuid7()), "copy", now)
    await asyncio.to_thread(target.beat, probe, Beat(now, now + PROBE_LEASE, 0, 0))
    try:
        seen = {pulse.instance.instance_id for pulse in await asyncio.to_thread(source.pulses)}
    finally:
        await asyncio.to_thread(target.leave, probe.instance_id)
    if probe.instance_id in seen:
        raise CopyRefused(f"{source.name} and {target.name} are one database")


async def refuse_strangers(source: Backend, target: Backend) -> None:
    """The target may hold what an earlier run copied, and nothing else."""
    strangers: set[str] = set()
    held = 0
    async for batch in batches(target, "task"):
        ids = [row["task_id"] for row in batch.rows]
        held += len(ids)
        strangers |= set(ids) - set(await source.arguments(ids, 0))
        if len(strangers) > MOST_STRANGERS:
            break
    if strangers:  # or their ids were mended on the way
        async for batch in batches(source, "task"):
            strangers -= {row["task_id"] for row in batch.rows}
    if strangers:
        raise CopyRefused(
            f"{target.name} holds tasks that {source.name} has not, {min(strangers)} for one: copy into another"
        )
    if not held and await has_any(target, "event") and await has_any(source, "task"):
        raise CopyRefused(f"{target.name} has a history of its own: copy into another")
