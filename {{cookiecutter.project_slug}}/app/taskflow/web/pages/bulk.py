"""Acting on all that match: how many there are, said before; then how far it is, and a way to stop it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response

from ...bulk import BulkRun
from ...store import Act
from .. import views
from ..auth import actor_of
from ..html import form_of
from .desk import Desk

WORDS = {
    Act.RETRY: "Retry",
    Act.CANCEL: "Cancel",
    Act.DISMISS: "Dismiss",
    Act.RESTORE: "Restore",
}
NEEDS_REASON = (Act.DISMISS,)


def add_routes(router: APIRouter, desk: Desk) -> None:
    runs, store = desk.site.manager.bulk, desk.store

    @router.get("/dashboard/bulk")
    async def ask(request: Request, act: Act, q: Annotated[str, Query(max_length=512)] = "") -> Response:
        search, now = understood(q, desk), desk.now()
        n, exact = await store.count_matching(search.filter(now))
        return desk.renderer.page(
            request,
            "ask.html",
            act=act,
            word=WORDS[act],
            search=search,
            n=amount(n, exact),
            none=n == 0,
            needs_reason=act in NEEDS_REASON,
        )

    @router.post("/dashboard/bulk")
    async def start(request: Request) -> Response:
        form = await form_of(request)
        act = act_of(form.get("act", ""))
        search, reason = understood(form.get("q", ""), desk), form.get("reason", "").strip()
        if act in NEEDS_REASON and not reason:
            raise HTTPException(422, f"reason: say why, to {act} them")
        run = BulkRun(act, str(search) or "everything", form.get("n", "")[:20])
        runs.start(run, search.filter(desk.now()), actor_of(request), reason or None)
        return desk.go_to(request, f"/bulk/{run.run_id}")

    @router.get("/dashboard/bulk/{run_id}")
    async def progress(request: Request, run_id: str) -> Response:
        run = known(run_id)
        return desk.renderer.page(request, "bulk.html", run=run, word=WORDS[run.act])

    @router.post("/dashboard/bulk/{run_id}/stop")
    async def stop(request: Request, run_id: str) -> Response:
        await runs.stop(known(run_id).run_id)
        return desk.go_to(request, f"/bulk/{run_id}")

    def known(run_id: str) -> BulkRun:
        run = runs.get(run_id)
        if run is None:
            raise HTTPException(404, "This process knows of no such run; the audit has those that have ended.")
        return run


def understood(q: str, desk: Desk) -> views.Search:
    """A search without a doubt: nobody acts on more than was meant. Raises HTTPException 422."""
    search = views.parse_search(q, desk.now())
    if search.problems:
        raise HTTPException(422, "; ".join(search.problems))
    return search


def act_of(text: str) -> Act:
    """Raises HTTPException 422."""
    try:
        return Act(text)
    except ValueError:
        raise HTTPException(422, f"act={text[:20]!r}: is one of {', '.join(Act)}") from None


def amount(n: int, exact: bool) -> str:
    return views.number(n) + ("" if exact else "+")
