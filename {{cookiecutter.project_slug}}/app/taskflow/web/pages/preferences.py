"""What a person chose: theme and keys. For browsers without JavaScript; with it, `app.js` writes the same cookie."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..html import PREFERENCES, THEMES, Preferences, form_of
from ..login import own_page
from .desk import Desk, seen

A_YEAR = 365 * 86_400


def add_routes(router: APIRouter, desk: Desk) -> None:
    @router.post("/dashboard/view")
    async def choose(request: Request) -> Response:
        form = await form_of(request)
        base = desk.site.base(request)
        response = seen(own_page(base, form.get("next", "")))
        chosen = str(chosen_view(form, Preferences.of(request)))
        response.set_cookie(PREFERENCES, chosen, max_age=A_YEAR, path=base, samesite="lax")
        return response


def chosen_view(form: dict[str, str], old: Preferences) -> Preferences:
    theme = form.get("theme", old.theme)
    return Preferences(theme if theme in THEMES else old.theme, form.get("keys", "on" if old.keys else "off") != "off")
