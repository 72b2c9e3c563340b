"""Saved views: searches that a person keeps, in a cookie of the browser. Others get one as a link.

Owns what the cookie holds. Called by the list of tasks, which shows them, and by `preferences.py`, which writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote, unquote

from fastapi import HTTPException, Request

COOKIE = "taskflow_saved"
MOST_VIEWS = 12
LARGEST = 3_500
"""Bytes of all of them, as they are sent; browsers take 4,096."""


def saved_views(request: Request) -> list[str]:
    """Searches as they could be typed, the first saved first."""
    found = request.cookies.get(COOKIE, "")[:LARGEST].split("&")
    return [search for search in map(unquote, found) if search][:MOST_VIEWS]


def text_of(searches: Sequence[str]) -> str:
    """The cookie. Raises HTTPException where it would not hold them."""
    text = "&".join(quote(search, safe="", errors="replace") for search in searches)
    if len(searches) > MOST_VIEWS or len(text) > LARGEST:
        raise HTTPException(409, f"no room for another saved view ({MOST_VIEWS} at most): remove one first")
    return text
