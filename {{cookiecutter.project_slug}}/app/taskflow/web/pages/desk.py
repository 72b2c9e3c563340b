"""What every screen works with: the site, the feed that wakes open pages, the renderer; and answers that all give."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlencode

from fastapi import HTTPException, Request
from fastapi.responses import RedirectResponse, Response

from ...models import Cursor
from ...store import TaskStore
from ..html import HEADERS, Renderer
from ..site import Site
from ..stream import Feed


@dataclass(frozen=True, slots=True)
class Desk:
    site: Site
    feed: Feed
    renderer: Renderer

    @property
    def store(self) -> TaskStore:
        return self.site.manager.store

    def now(self) -> datetime:
        return self.site.manager.clock()

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
