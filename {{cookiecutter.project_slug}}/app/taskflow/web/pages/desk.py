"""What every screen works with: the site, the feed that wakes open pages, the renderer; and answers that all give."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import ParamSpec
from urllib.parse import urlencode

from fastapi import HTTPException, Request
from fastapi.responses import RedirectResponse, Response

from ...models import Cursor
from ...store import TaskStore
from ..html import HEADERS, Renderer, is_refresh
from ..refreshes import Refreshes
from ..site import Site
from ..stream import Feed

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Desk:
    site: Site
    feed: Feed
    renderer: Renderer
    refreshes: Refreshes

    @property
    def store(self) -> TaskStore:
        return self.site.manager.store

    def now(self) -> datetime:
        return self.site.manager.clock()

    def live(self, page: Callable[P, Awaitable[Response]]) -> Callable[P, Awaitable[Response]]:
        """A page that follows the stream, from the newest event before it was made. Its refreshes are made once for all
        who look at it: they see the same but for the frame, which stays as it is."""

        @wraps(page)
        async def answer(*args: P.args, **asked: P.kwargs) -> Response:
            request = asked["request"]
            assert isinstance(request, Request)
            if is_refresh(request):
                role = getattr(request.state, "taskflow_role", None)
                key = (self.site.base(request), self.site.here(request), role)
                return await self.refreshes.of(request, key, lambda: page(*args, **asked))
            request.state.taskflow_seq = await self.feed.head()
            return await page(*args, **asked)

        return answer

    def go_to(self, request: Request, path: str, **query: str) -> Response:
        """To the page that shows what an action did: `path` is below the dashboard."""
        return seen(f"{self.site.base(request)}/dashboard{path}{'?' if query else ''}{urlencode(query)}")


def seen(address: str) -> Response:
    return RedirectResponse(address, 303, HEADERS)


def cursor_of(before: str | None) -> Cursor | None:
    """Raises HTTPException 422."""
    if before is None:
        return None
    try:
        if "\0" in before:
            raise ValueError("before: must not contain NUL")
        return Cursor.parse(before)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
