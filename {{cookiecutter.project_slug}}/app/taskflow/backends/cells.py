"""Cells as they should be, whatever was written into the database behind our back.

Owns which values each column may hold and what stands for one that it may not. SQLite keeps any value in any column,
a disk may damage one, a person may edit one by hand: such a row is shown as broken and ends as FAILED when its turn
comes, and costs no other row anything. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from types import NoneType, SimpleNamespace
from typing import Any

from sqlalchemy import Boolean, Integer
from sqlalchemy.engine import Row as StoredRow

from ..models import LAST_MICROS
from ..texts import clean, readable
from . import tables
from .changes import FACTS, StoredQueue, StoredSchedule, StoredTask

MOMENTS = {
    "at",
    "created_at",
    "run_at",
    "started_at",
    "finished_at",
    "dismissed_at",
    "first_at",
    "last_at",
    "beat_at",
    "lease_until",
    "last_tick",
    "next_tick",
    "last_run",
    "expires_at",
}
"""Columns of microseconds since the epoch."""
HALF_A_PAIR = re.compile("[\ud800-\udfff]")
"""What the driver makes of bytes that are no UTF-8; no text of ours has it."""


def kinds_of_columns() -> dict[str, set[type]]:
    kinds: dict[str, set[type]] = {"owner": {str, NoneType}, "last_status": {str, NoneType}}  # labels of our queries
    for table in tables.Row.metadata.tables.values():
        for column in table.c:
            found = kinds.setdefault(column.name, set())
            found |= {int, bool} if isinstance(column.type, Integer | Boolean) else {str}
            found |= {NoneType} if column.nullable else set()
    return kinds


KINDS = kinds_of_columns()
NEVER_NULL = {c.name for table in tables.Row.metadata.tables.values() for c in table.c if not c.nullable} - {
    "started_at"
}


def unreadable(names: Sequence[str], cells: Iterable[Any]) -> list[str]:
    """Of these columns, those whose cell is not what it should be. It is asked for every row that is read."""
    broken = []
    for (name, kinds, is_moment), cell in zip(rules(tuple(names)), cells, strict=True):
        kind = type(cell)
        if kind is str:
            if not (str in kinds and (cell.isascii() or not HALF_A_PAIR.search(cell))):
                broken.append(name)
        elif kind not in kinds or (is_moment and kind is int and not 0 <= cell <= LAST_MICROS):
            broken.append(name)
    return broken


def is_sound(name: str, cell: object) -> bool:
    return not unreadable((name,), (cell,))


@cache
def rules(names: tuple[str, ...]) -> Sequence[tuple[str, set[type], bool]]:
    """Of each column its name, the types that its cells may have, and whether they are times."""
    return [(name, KINDS[name], name in MOMENTS) for name in names]


def mended(rows: Iterable[StoredRow[Any]], names: Sequence[str]) -> list[Any]:
    """Rows of these columns as they can be shown. One in which something stands for what was found says of which cells,
    in `broken`."""
    return [mended_row(row, names, broken) if (broken := unreadable(names, row)) else row for row in rows]


def mended_row(row: StoredRow[Any], names: Sequence[str], broken: Sequence[str]) -> SimpleNamespace:
    cells = dict(zip(names, row, strict=True))
    return SimpleNamespace(**cells | {name: stand_in(name, cells[name]) for name in broken}, broken=broken)


def stand_in(name: str, cell: object) -> str | int | None:
    kinds = KINDS[name]
    if str in kinds:
        return words(cell)
    if name not in NEVER_NULL:
        return None
    if name in MOMENTS:  # where it stands in the order of the column: text behind all numbers
        return 0 if isinstance(cell, int | float) and cell < 0 else LAST_MICROS
    return 0


def words(cell: object) -> str:
    """A cell as text that can be stored and shown."""
    if isinstance(cell, bytes):
        return clean(cell.decode("utf-8", "replace"))
    return clean(cell) if isinstance(cell, str) else readable(cell)


def raw(cell: object) -> bytes:
    """A text's bytes as they are stored, by which a row with a damaged id is found."""
    return cell if isinstance(cell, bytes) else str(cell).encode("utf-8", "surrogateescape")


def stored_task(cells: Sequence[Any]) -> StoredTask:
    """From the columns of `FACTS`. One that cannot be read says which of them are broken."""
    broken = unreadable(FACTS, cells)
    if not broken:
        return StoredTask(*cells)
    return StoredTask(*whole(FACTS, cells))._replace(broken=broken, raw_id=raw(cells[0]))


def stored_queue(cells: Sequence[Any]) -> StoredQueue:
    """A limit that cannot be read is none."""
    return StoredQueue(*whole(StoredQueue._fields, cells))


def stored_schedule(cells: Sequence[Any]) -> StoredSchedule:
    names = StoredSchedule._fields[:-1]
    return StoredSchedule(*whole(names, cells))._replace(broken=bool(unreadable(names, cells)))


def whole(names: Sequence[str], cells: Sequence[Any]) -> list[Any]:
    """The cells, with something that stands for each that cannot be read."""
    return [cell if is_sound(name, cell) else stand_in(name, cell) for name, cell in zip(names, cells, strict=True)]
