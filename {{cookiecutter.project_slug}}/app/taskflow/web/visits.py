"""Who came and went: logins in the audit, and sessions that ended before their time.

Owns what the gate writes to the backend and asks of it. The invariant: a backend that is away keeps nobody from logging
in or out. What cannot be written now waits here and is written, with its own time, once the backend answers; whether a
session was revoked elsewhere cannot be known then, and nobody is let in to see or change a task. What this process
itself revoked, it knows without asking; what still waits when the process ends is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic

from ..backends.base import Note, Revoke
from ..errors import BackendUnavailable
from ..journal import Journal
from ..models import EventKind, utc_now
from ..store import TaskStore
from ..texts import clean

logger = logging.getLogger("taskflow")

LOOK_INTERVAL = 1.0
"""Seconds for which a session that was not revoked is believed: how late a logout elsewhere can be noticed."""
PATIENCE = 0.5
"""Seconds that a request waits for the backend to write or to answer."""
ANSWER_TIME = 2.0
"""Seconds that a request waits to hear whether its session was ended elsewhere."""
PAUSE = 1.0
"""Seconds between tries while the backend is away."""
MOST_UNWRITTEN = 1_000
"""Logins that wait to be written; beyond that they are only logged. Revocations always wait."""
MOST_REMEMBERED = 10_000


class Visits:
    def __init__(self, store: TaskStore, journal: Journal, *, clock: Callable[[], float] = monotonic) -> None:
        self._store = store
        self._journal = journal
        self._clock = clock
        self._looked: OrderedDict[str, float] = OrderedDict()
        """Sessions that were not revoked, and when that was asked."""
        self._unwritten: deque[Note | Revoke] = deque()
        self._writing: asyncio.Task[None] | None = None

    async def logged_in(self, username: str, client: str) -> None:
        await self._note(EventKind.LOGIN, username, client)

    async def was_refused(self, username: str, client: str) -> None:
        await self._note(EventKind.LOGIN_FAILED, username, client)

    async def logged_out(self, username: str, client: str, session_id: str, expires: int) -> None:
        """`expires`: seconds since the epoch."""
        self._unwritten.append(Revoke(session_id, datetime.fromtimestamp(expires, UTC)))
        await self._note(EventKind.LOGOUT, username, client)

    async def ended(self, session_id: str) -> bool:
        """Whether a session was revoked by any process, asked at most once per LOOK_INTERVAL.

        Raises BackendUnavailable when the backend does not say in time.
        """
        now = self._clock()
        if now - self._looked.get(session_id, float("-inf")) < LOOK_INTERVAL:
            return False
        if await self._is_revoked(session_id):
            return True
        self._looked[session_id] = now
        self._looked.move_to_end(session_id)
        while len(self._looked) > MOST_REMEMBERED:
            self._looked.popitem(last=False)
        return False

    async def _is_revoked(self, session_id: str) -> bool:
        try:
            async with asyncio.timeout(ANSWER_TIME):
                return await self._store.is_revoked(session_id)
        except TimeoutError as error:
            raise BackendUnavailable("it did not say in time whether this session was ended") from error

    async def _note(self, kind: EventKind, username: str, client: str) -> None:
        if len(self._unwritten) < MOST_UNWRITTEN:
            self._unwritten.append(Note(kind, clean(username), {"client": client}, at=utc_now()))
        else:
            logger.warning("not in the audit, too much waits to be written: %s of %r from %s", kind, username, client)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="taskflow-visits")
        await asyncio.wait([self._writing], timeout=PATIENCE)

    async def _write(self) -> None:
        """Until everything is written; then the task ends."""
        while self._unwritten:
            fact = self._unwritten.popleft()
            try:
                await self._journal.obey(fact)
            except BackendUnavailable:
                self._unwritten.appendleft(fact)
                await asyncio.sleep(PAUSE)
