"""What a person chose: theme, keys, and searches to keep.

A theme and keys come here from browsers without JavaScript; with it, `app.js` writes the same cookie.
"""

from __future__ import annotations

from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..html import PREFERENCES, THEMES, Preferences, Renderer, form_of, page_route
from ..login import own_page
from ..saved import COOKIE, saved_views, text_of
from ..site import Site
from ..views import parse_search
from .desk import seen

A_YEAR = 365 * 86_400


def preferences_router(site: Site, renderer: Renderer) -> APIRouter:
    router = APIRouter(route_class=page_route(renderer), include_in_schema=False)

    @router.post("/dashboard/view")
    async def choose(request: Request) -> Response:
        form = await form_of(request)
        base = site.base(request)
        response = seen(own_page(base, form.get("next", "")))
        chosen = str(chosen_view(form, Preferences.of(request)))
        response.set_cookie(PREFERENCES, chosen, max_age=A_YEAR, path=base, samesite="lax")
        return response

    @router.post("/dashboard/tasks/view")
    async def keep(request: Request) -> Response:
        """Saves a search, or removes one that is saved."""
        form = await form_of(request)
        base, search = site.base(request), str(parse_search(form.get("q", ""), site.manager.clock()))
        others = [view for view in saved_views(request) if view != search]
        kept = [*others, search] if search and form.get("save") == "on" else others
        response = seen(f"{base}/dashboard/tasks?{urlencode({'q': search})}")
        response.set_cookie(COOKIE, text_of(kept), max_age=A_YEAR, path=base, samesite="lax", httponly=True)
        return response

    return router


def chosen_view(form: dict[str, str], old: Preferences) -> Preferences:
    theme = form.get("theme", old.theme)
    return Preferences(theme if theme in THEMES else old.theme, form.get("keys", "on" if old.keys else "off") != "off")
