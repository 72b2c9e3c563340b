"""The JSON API's third part: schedules, and one-offs that wait for their time.

Owns the routes of contract section 4 that are about them. Included before `api.py`, whose `/{task_id}` would take their
addresses. It asks the manager's `Schedules`; errors are left to the app's handlers.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, HTTPException, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from ..models import Cursor
from . import records, shapes
from .api import Text, invalid_query, next_link
from .auth import actor_of
from .operations import Pause
from .records import Json
from .route import ApiRoute
from .site import Site


class OneOffQuery(BaseModel, extra="forbid"):
    limit: int = Field(500, ge=1, le=500)
    after: Text | None = Field(None, description="the cursor in the `Link` header of the page before")

    def cursor(self) -> Cursor | None:
        """Raises ValueError."""
        return None if self.after is None else Cursor.parse(self.after)


def schedules_router(site: Site) -> APIRouter:
    router = APIRouter(route_class=ApiRoute, default_response_class=Json, responses=shapes.REFUSALS)
    add_schedule_routes(router, site)
    add_one_off_routes(router, site)
    return router


def add_schedule_routes(router: APIRouter, site: Site) -> None:
    """A name may hold slashes: see `operations.add_queue_routes`."""
    schedules = site.manager.schedules

    @router.get("/schedules", response_model=list[shapes.ShownSchedule], summary="Schedules, by name")
    async def show() -> Response:
        return Json([records.schedule_row(state) for state in await schedules.states()])

    @router.post(
        "/schedules/{name:any}/run",
        response_model=shapes.ShownScheduleRun,
        summary="Run a schedule now, besides its ticks",
        responses=shapes.UNKNOWN | shapes.GONE,
    )
    async def run(request: Request, name: str) -> Response:
        state = await schedules.run(name, actor_of(request))
        return Json(records.schedule_row(state) | {"task_id": state.last_task_id})

    @router.post(
        "/schedules/{name:any}/pause",
        response_model=shapes.ShownSchedule,
        summary="Fire nothing more of a schedule",
        responses=shapes.UNKNOWN,
    )
    async def pause(request: Request, name: str, why: Annotated[Pause | None, Body()] = None) -> Response:
        reason = why.reason if why else None
        return Json(records.schedule_row(await schedules.pause(name, actor_of(request), reason)))

    @router.post(
        "/schedules/{name:any}/resume",
        response_model=shapes.ShownSchedule,
        summary="Fire a schedule again, from now on",
        responses=shapes.UNKNOWN,
    )
    async def resume(request: Request, name: str) -> Response:
        return Json(records.schedule_row(await schedules.resume(name, actor_of(request))))


def add_one_off_routes(router: APIRouter, site: Site) -> None:
    schedules = site.manager.schedules

    @router.get(
        "/scheduled", response_model=list[shapes.ShownScheduledOnce], summary="One-offs that wait, soonest first"
    )
    async def show(request: Request, query: Annotated[OneOffQuery, Query()]) -> Response:
        try:
            cursor = query.cursor()
        except ValueError as error:
            raise invalid_query(str(error)) from None
        place = (cursor.created_at, cursor.task_id) if cursor else None
        found = await schedules.one_offs(after=place, limit=query.limit + 1)
        page = found[: query.limit]
        rows = [records.shown(shapes.ShownScheduledOnce, one_off) for one_off in page]
        if len(found) == len(page):
            return Json(rows)
        last = Cursor(page[-1].fire_at, page[-1].task_id)
        return Json(rows, headers={"Link": next_link(f"{site.base(request)}/scheduled", request, last, "after")})

    @router.delete(
        "/scheduled/{run_key:any}",
        response_model=shapes.ShownCancellation,
        summary="Cancel what waits under a key",
        responses=shapes.UNKNOWN,
    )
    async def cancel(request: Request, run_key: str) -> Response:
        if not await schedules.cancel_once(run_key, actor_of(request)):
            raise HTTPException(404, f"nothing waits under the run_key {run_key[:80]!r}")
        return Json({"run_key": run_key, "cancelled": True})
