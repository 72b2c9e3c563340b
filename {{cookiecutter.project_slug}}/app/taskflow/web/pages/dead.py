"""Dead letters: what FAILED for good and nobody has seen to, by its cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response

from ...models import ErrorGroup, from_micros, to_micros
from .desk import Desk

PAGE_SIZE = 25


def add_routes(router: APIRouter, desk: Desk) -> None:
    @router.get("/dashboard/dead")
    @desk.live
    async def dead(
        request: Request,
        tab: Annotated[str, Query(pattern="^(open|dismissed)$")] = "open",
        before: Annotated[str | None, Query(max_length=100)] = None,
    ) -> Response:
        place = None if before is None else place_of(before)
        dismissed = tab == "dismissed"
        groups = await desk.store.error_groups(dismissed=dismissed, before=place, limit=PAGE_SIZE + 1)
        shown = facts(groups[:PAGE_SIZE], dismissed=dismissed, knows=desk.store.knows)
        more = place_text(groups[PAGE_SIZE - 1]) if len(groups) > PAGE_SIZE else None
        return desk.renderer.page(
            request, "dead.html", now=desk.now(), tab=tab, groups=shown, older=more, newest=before is None
        )


@dataclass(frozen=True, slots=True)
class Row:
    group: ErrorGroup
    n: int
    known: bool
    """Whether this process has the function, and so can retry."""
    search: str


def facts(groups: Sequence[ErrorGroup], *, dismissed: bool, knows: object) -> list[Row]:
    assert callable(knows)
    return [
        Row(
            group,
            group.dismissed if dismissed else group.open,
            bool(knows(group.func_name)),
            f"group:{group.key} is:{'dismissed' if dismissed else 'open'}",
        )
        for group in groups
    ]


def place_text(group: ErrorGroup) -> str:
    return f"{to_micros(group.last_at)}_{group.key}"


def place_of(text: str) -> tuple[datetime, str]:
    """Raises HTTPException 422."""
    micros, _, key = text.partition("_")
    try:
        if not key or "\0" in key:
            raise ValueError
        return from_micros(int(micros)), key
    except (ValueError, OverflowError):
        raise HTTPException(422, f"before={text[:40]!r}: not a place in this list") from None
