"""Refreshes of open pages, made once for all who look at the same page.

Owns the parts of pages that are being made or were just made. A part is made anew at most once in a second, however
many tabs ask for it: who asks in between waits for the next one. It begins after the question, so that nobody is given
one that is older than the news which had him ask.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

from fastapi import Request
from fastapi.responses import Response

from .stream import Feed

GAP = 1.0
"""Seconds between two beginnings."""
LEVEL = 4
"""Of compression: a fifth of the bytes in a third of a millisecond."""


@dataclass(frozen=True, slots=True)
class Part:
    """What was made, for whoever asks: each answer is another object, because what sends it may change its headers."""

    response: Response
    packed: bytes

    def answer(self, request: Request) -> Response:
        headers = {name: value for name, value in self.response.headers.items() if name != "content-length"}
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self.response.body, self.response.status_code, headers)
        return Response(self.packed, self.response.status_code, headers | {"content-encoding": "gzip"})


@dataclass(slots=True, eq=False)
class Making:
    due: float
    """Monotonic time at which it begins."""
    part: asyncio.Task[Part] = field(init=False)
    seq: int | None = None
    """The newest event when it began; None until then."""

    def serves(self, head: int) -> bool:
        """Whether it shows all that somebody can know who asks now."""
        return self.seq is None or (self.seq >= head and monotonic() < self.due + GAP)


class Refreshes:
    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._makings: dict[Hashable, Making] = {}

    async def of(self, request: Request, key: Hashable, make: Callable[[], Awaitable[Response]]) -> Response:
        """What `make` answers, or just has answered to somebody else with the same key. Raises what it raises."""
        head = await self._feed.head()
        making = self._makings.get(key)
        if making is None or not making.serves(head):
            now = monotonic()
            making = self._makings[key] = Making(now if making is None else max(now, making.due + GAP))
            making.part = asyncio.create_task(self._made(making, make))
            making.part.add_done_callback(partial(self._forget_later, key, making))
        return (await asyncio.shield(making.part)).answer(request)

    async def _made(self, making: Making, make: Callable[[], Awaitable[Response]]) -> Part:
        await asyncio.sleep(making.due - monotonic())
        making.seq = await self._feed.head()
        response = await make()
        return Part(response, gzip.compress(bytes(response.body), LEVEL))

    def _forget_later(self, key: Hashable, making: Making, part: asyncio.Task[Part]) -> None:
        if not part.cancelled():
            part.exception()  # whoever waited has heard of it
        asyncio.get_running_loop().call_later(GAP, self._forget, key, making)

    def _forget(self, key: Hashable, making: Making) -> None:
        if self._makings.get(key) is making:
            del self._makings[key]
