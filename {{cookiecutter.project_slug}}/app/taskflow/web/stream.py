"""Tells open pages which tasks changed, by server-sent events.

Owns the one feed of this process. It looks at the event log when the journal has committed something, and once a
second for what other processes did, however many pages are open. A page has a cursor and no queue: what it is told is
bounded, and when too much happened it is told "more" and asks for itself.

A stream ends by itself after a few seconds and the browser goes on from its last event id: an endless one would keep
the server from ever stopping, and a session that ended would go on listening.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query
from fastapi.responses import Response, StreamingResponse

from ..backends.base import Finish, TurnResult
from ..errors import BackendUnavailable
from ..journal import Journal
from ..store import TaskStore

LIFE = 5.0
"""Seconds after which a stream ends."""
POLL_INTERVAL = 1.0
GATHERING = 0.1
"""Seconds for which news is gathered before the log is looked at, so that a burst is one look and one message."""
MOST_IDS = 100
PAUSE, PAUSE_EACH = 1.0, 0.02
"""Seconds for which nothing is told after news, and for each task that these named; twice as long when there was more.
A page that hears of much asks for itself less often, so that a busy system costs it no more than a calm one."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Nothing between the service and the browser may keep a message."""
WINDOW = 500
"""Newest events the feed remembers, for pages that come back."""


@dataclass(frozen=True, slots=True)
class News:
    seq: int
    ids: Sequence[str]
    more: bool
    """True when tasks changed that are not listed."""


class Feed:
    def __init__(self, store: TaskStore, journal: Journal) -> None:
        self._store = store
        self.recent: deque[tuple[int, str]] = deque(maxlen=WINDOW)
        """The newest events: their number and their task."""
        self._head: int | None = None
        self._floor = 0
        """Events above it are all in `recent`."""
        self._announced = asyncio.Event()
        self._stale = True
        self._looked = 0.0
        self._looking = anyio.Lock()
        journal.listeners.append(self._announce)

    async def head(self) -> int:
        """The number of the newest event. Raises BackendUnavailable."""
        await self._look()
        return self._head or 0

    async def follow(self, cursor: int, deadline: float) -> AsyncIterator[News]:
        """What happens after `cursor`, until the monotonic `deadline`, with a pause after each."""
        while (news := await self.next(cursor, deadline)) is not None:
            yield news
            cursor = news.seq
            pause = PAUSE * (2 if news.more else 1) + PAUSE_EACH * len(news.ids)
            await asyncio.sleep(min(pause, deadline - monotonic()))

    async def next(self, cursor: int, deadline: float) -> News | None:
        """What happened after `cursor`, as soon as something has; None at the monotonic `deadline`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline - monotonic()):  # a store that is silent keeps no stream
                while True:
                    announced = self._announced
                    try:
                        await self._look()
                    except BackendUnavailable:
                        pass  # the page says so itself when it asks; here the next look may succeed
                    else:
                        if (news := self._since(cursor)) is not None:
                            return news
                    with suppress(TimeoutError):
                        async with asyncio.timeout(POLL_INTERVAL):
                            await announced.wait()
                            await asyncio.sleep(GATHERING)
        return None

    def _announce(self, _finishes: Sequence[Finish], _result: TurnResult) -> None:
        self._stale = True
        self._announced.set()
        self._announced = asyncio.Event()

    async def _look(self) -> None:
        """Reads what is new, unless somebody just has. Raises BackendUnavailable."""
        async with self._looking:
            if not self._stale and monotonic() - self._looked < POLL_INTERVAL / 2:
                return
            self._stale = False
            if self._head is None:
                self._skip_to(await self._store.last_seq())
            elif len(events := await self._store.events_after(self._head, WINDOW)) == WINDOW:
                self._skip_to(await self._store.last_seq())  # too much to follow one by one
            elif events:
                for event in events:
                    self._remember(event.seq, event.task_id)
                self._head = events[-1].seq
            self._looked = monotonic()

    def _skip_to(self, seq: int) -> None:
        self.recent.clear()
        self._head = self._floor = seq

    def _remember(self, seq: int, task_id: str) -> None:
        if len(self.recent) == WINDOW:
            self._floor = self.recent[0][0]
        self.recent.append((seq, task_id))

    def _since(self, cursor: int) -> News | None:
        if self._head is None or cursor == self._head:
            return None
        if cursor > self._head:  # the database was replaced by a younger one
            return News(self._head, [], more=True)
        ids = dict.fromkeys(task_id for seq, task_id in self.recent if seq > cursor)
        return News(self._head, [*ids][-MOST_IDS:], more=cursor < self._floor or len(ids) > MOST_IDS)


def stream_router(feed: Feed) -> APIRouter:
    router = APIRouter()

    @router.get("/dashboard/stream", include_in_schema=False)
    async def stream(
        last_event_id: Annotated[str | None, Header()] = None,
        after: Annotated[str | None, Query()] = None,
    ) -> Response:
        news = feed.follow(sequence_number(last_event_id, after), monotonic() + LIFE)
        return StreamingResponse(messages(news), media_type="text/event-stream", headers=HEADERS)

    return router


async def messages(news: AsyncIterator[News]) -> AsyncIterator[str]:
    """As the browser's `EventSource` reads them: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    async for each in news:
        data = json.dumps({"ids": list(each.ids), "more": each.more})
        yield f"event: tasks\nid: {each.seq}\ndata: {data}\n\n"


def sequence_number(*texts: str | None) -> int:
    """The first of these that is a number; -1, before all events, when none is: then everything may have changed."""
    for text in texts:
        if text is not None and text.isascii() and text.isdigit() and len(text) < 19:
            return int(text)
    return -1
