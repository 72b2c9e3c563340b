"""The dashboard's screens, a module each: `facts`, which says what a page shows, and routes that ask for it.

Owns which screens there are and that any other address is a page that says so. A page asks the same store as the API;
`views.py` and `charts.py` turn what they get into words and points, templates into HTML. What changes is told by the
stream; a page then asks for itself and the browser keeps what is the same, so that there is one way to make every part.
"""

from __future__ import annotations

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response

from ..html import Renderer, page_route
from ..refreshes import Refreshes
from ..site import Site
from ..stream import Feed
from . import audit, bulk, dead, overview, queues, run, schedules, task, tasks, workers
from .desk import Desk

SCREENS = (overview, bulk, run, tasks, task, queues, schedules, workers, dead, audit)


def pages_router(site: Site, feed: Feed, renderer: Renderer) -> APIRouter:
    router = APIRouter(route_class=page_route(renderer), include_in_schema=False)
    desk = Desk(site, feed, renderer, Refreshes(feed))
    for screen in SCREENS:
        screen.add_routes(router, desk)

    @router.get("/dashboard/{rest:any}")
    async def nothing_here(rest: str) -> Response:
        raise HTTPException(404, "There is no such page.")

    return router
