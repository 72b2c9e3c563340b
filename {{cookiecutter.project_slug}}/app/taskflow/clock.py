"""What time it is, for everything that writes times.

Owns the one clock of a task manager, so that a test can stop it. Always timezone-aware UTC.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class Clock:
    """Called, it says the time: the system's, or the one it was frozen at."""

    def __init__(self) -> None:
        self._frozen: datetime | None = None

    def __call__(self) -> datetime:
        return self._frozen or datetime.now(UTC)

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
