"""`enqueue(..., session=...)`: a task as part of the caller's own transaction.

Owns the passage from a SQLModel or SQLAlchemy session to the backend's tables: the row is written on the session's
connection, commits and rolls back with it, and the journal looks for work once it is committed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection
from sqlalchemy.orm import Session

from .backends.base import Backend, Draft, Turn
from .backends.sql import SqlBackend
from .errors import QueueFullError, TaskflowError

if TYPE_CHECKING:  # its import needs greenlet, which only those have who use it
    from sqlalchemy.ext.asyncio import AsyncSession


PORTS = {"postgresql": 5432}
LISTENING = "taskflow.listening"
"""Under this key a session remembers who is told of its commits: one listener, however often it is used."""


async def enlist(
    backend: Backend, session: Session | AsyncSession, turn: Turn, *, committed: Callable[[], None]
) -> None:
    """Writes the turn's drafts in the session's transaction. `committed` is called after it commits.

    Raises TaskflowError for a session of another database, QueueFullError when a queue has no place.
    """
    if not isinstance(backend, SqlBackend):
        raise TaskflowError("enqueue(session=...) needs tasks in the session's own SQL database")

    def write(connection: Connection) -> None:
        require_same_database(connection.engine.url, backend.url)
        result = backend.enlist(connection, turn)
        for draft in turn.drafts:
            refuse(draft, result.rejected.get(draft.task_id))

    if isinstance(session, Session):
        write(session.connection())
        tell_after_commit(session, committed)
    else:
        await (await session.connection()).run_sync(write)
        tell_after_commit(session.sync_session, committed)


def refuse(draft: Draft, limit: int | None) -> None:
    if limit is not None:
        raise QueueFullError(draft.queue, limit)


def tell_after_commit(session: Session, committed: Callable[[], None]) -> None:
    """Calls `committed` after each commit of the session from now on, but not when a savepoint is released."""

    def after_commit(session: Session) -> None:
        if not session.in_nested_transaction():
            committed()

    if committed not in session.info.setdefault(LISTENING, []):
        session.info[LISTENING].append(committed)
        event.listen(session, "after_commit", after_commit)


def require_same_database(theirs: URL, ours: URL) -> None:
    if identity(theirs) != identity(ours) or identity(ours)[-1] is None:
        raise TaskflowError(
            f"enqueue(session=...): the session is on {theirs.render_as_string()}, tasks are stored in "
            f"{ours.render_as_string()}: one transaction cannot reach both"
        )


def identity(url: URL) -> tuple[str, str | None, int | None, str | None]:
    """What makes two URLs one database, whatever driver they name. The last part is None for one in memory."""
    kind = url.get_backend_name()
    if kind != "sqlite":
        return kind, url.host or "localhost", url.port or PORTS.get(kind), url.database or url.username
    in_memory = url.database in (None, "", ":memory:")
    return kind, None, None, None if in_memory else str(Path(url.database or "").resolve())
