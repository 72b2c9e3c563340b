"""What time it is, for everything that writes times.

Owns the one clock of a task manager, so that a test can stop it, and so that instances on several machines go by one:
that of the store which they share. Always timezone-aware UTC.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

LEAST_OFFSET = timedelta(milliseconds=50)
"""Less is what asking takes."""


class Clock:
    """Called, it says the time: the store's, as far as it differs from the system's, or the one it was frozen at."""

    def __init__(self, offset: Callable[[], timedelta] = timedelta) -> None:
        """`offset`: how far the store's clock is ahead of the system's."""
        self._frozen: datetime | None = None
        self._offset = offset

    def __call__(self) -> datetime:
        return self._frozen or datetime.now(UTC) + self._offset()

    def freeze(self, at: datetime | None = None) -> None:
        """Stands still, at that time or now. Raises ValueError for a time without zone."""
        if at is not None and at.tzinfo is None:
            raise ValueError(f"freeze(at={at!r}): needs a time zone")
        self._frozen = at.astimezone(UTC) if at else datetime.now(UTC)

    def advance(self, seconds: float) -> None:
        """Moves a frozen clock. Raises ValueError when it is not frozen."""
        if self._frozen is None:
            raise ValueError("advance() needs a frozen clock: call freeze() first")
        self._frozen += timedelta(seconds=seconds)

    def resume(self) -> None:
        self._frozen = None


def offset_of(known: timedelta, began: datetime, told: datetime, ended: datetime) -> timedelta:
    """What becomes of a known offset when another clock, asked between `began` and `ended`, told a time. It stays where
    the answer says nothing else for sure."""
    found = told - (began + (ended - began) / 2)
    sure = LEAST_OFFSET + (ended - began) / 2
    if abs(found) <= sure:
        return timedelta(0) if abs(known) > sure else known
    return found if abs(found - known) > sure else known
