"""The login page: where a session begins and ends.

Owns the two routes below `/auth`. The only pages that need no session; a logout is a POST and revokes.
"""

from __future__ import annotations

import contextlib
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import RedirectResponse, Response

from ..errors import BackendUnavailable
from .auth import COOKIE, Gate
from .html import HEADERS, Renderer, form_of, page_route
from .site import Site


def login_router(site: Site, gate: Gate, renderer: Renderer) -> APIRouter:
    router = APIRouter(
        route_class=page_route(renderer), dependencies=[Depends(gate.admit_origin)], include_in_schema=False
    )

    @router.get("/auth/login")
    async def login_page(request: Request, next: Annotated[str, Query()] = "") -> Response:
        with contextlib.suppress(BackendUnavailable):  # whether there is a session cannot be told: the page is for all
            if not gate.asks_for_login or await gate.session(request) is not None:
                return RedirectResponse(f"{site.base(request)}/dashboard", 302, HEADERS)
        return renderer.page(request, "login.html", next=next, username="", wrong=False)

    @router.post("/auth/login")
    async def log_in(request: Request) -> Response:
        form = await form_of(request)
        username, target = form.get("username", "")[:256], form.get("next", "")
        token = await gate.log_in(request, username, form.get("password", "")[:1_024])
        if token is None:
            return renderer.page(request, "login.html", 401, next=target, username=username, wrong=True)
        response = RedirectResponse(own_page(site.base(request), target), 303, HEADERS)
        set_cookie(site, request, response, token, gate.sessions.seconds)
        return response

    @router.post("/auth/logout", dependencies=[Depends(gate.admit_reader)])
    async def log_out(request: Request) -> Response:
        await gate.log_out(request)
        response = RedirectResponse(f"{site.base(request)}/auth/login", 303, HEADERS)
        set_cookie(site, request, response, "", 0)
        return response

    return router


def set_cookie(site: Site, request: Request, response: Response, token: str, seconds: int) -> None:
    response.set_cookie(
        COOKIE,
        token,
        max_age=seconds,
        path=site.base(request),
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )


def own_page(base: str, target: str) -> str:
    """Where to go after the login: only to a page below `base`, never to another site."""
    if target.startswith(f"{base}/dashboard") and "\\" not in target and target.isprintable():
        return target
    return f"{base}/dashboard"
