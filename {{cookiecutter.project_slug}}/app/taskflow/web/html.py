"""How a page leaves this process: its frame, its headers, and what becomes of an error.

Owns the template environment, the page response with its content security policy, and the static files. Called by
every module that answers with HTML. Whatever happens in a page's route, the answer is a page.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import mimetypes
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote
from uuid import uuid4

import jinja2
from fastapi import APIRouter, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..errors import TaskflowError
from ..host import headers_of, status_of
from . import views
from .navigation import NAVIGATION
from .site import Site

logger = logging.getLogger("taskflow")

HERE = Path(__file__).parent
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Vary": "Cookie",
}
ERROR_WORDS = {
    401: "Log in first",
    400: "Not possible now",
    403: "Not allowed",
    404: "Not found",
    405: "Not that way",
    409: "Not possible now",
    413: "Too large",
    422: "Not understood",
    429: "Too many tries",
    500: "Something broke",
    503: "The task backend is away",
}
REQUEST_ID = re.compile(r"[A-Za-z0-9._:=+/-]{1,128}")
PREFERENCES = "taskflow_view"
"""The cookie of what a person chose: a theme, and whether single keys do something."""
THEMES = ("auto", "light", "dark")
LARGEST_FORM = 8_192
MOST_FIELDS = 60
"""As many as a page of tasks has, and a few."""


class Page(HTMLResponse):
    """A page that can always be sent: a lone surrogate in a stored text becomes a question mark, not an error."""

    def render(self, content: Any) -> bytes:
        return str(content).encode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Preferences:
    theme: str = "auto"
    keys: bool = True

    @classmethod
    def of(cls, request: Request) -> Preferences:
        theme, _, keys = request.cookies.get(PREFERENCES, "").partition("-")
        return cls(theme if theme in THEMES else "auto", keys != "off")

    def __str__(self) -> str:
        return f"{self.theme}-{'on' if self.keys else 'off'}"


class Renderer:
    """Fills templates. Every page gets the frame's facts: addresses, who is logged in, preferences."""

    def __init__(self, site: Site, *, asks_for_login: bool) -> None:
        self._site = site
        self._asks_for_login = asks_for_login
        self.assets = Assets(HERE / "static")
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        self._templates.filters.update(views.FILTERS)
        self._templates.globals.update(asset_version=self.assets.version, navigation=NAVIGATION)

    def page(self, request: Request, name: str, status: int = 200, **facts: object) -> Page:
        base = self._site.base(request)
        text = self._templates.get_template(name).render(
            base=base,
            title=self._site.title,
            poll_seconds=max(1, round(self._site.poll_interval)),
            user=getattr(request.state, "taskflow_actor", None) if self._asks_for_login else None,
            preferences=Preferences.of(request),
            here=self._site.here(request),
            is_refresh=is_refresh(request),
            seq=getattr(request.state, "taskflow_seq", None),
            can_operate=getattr(request.state, "taskflow_role", None) == "operate",
            **facts,
        )
        return Page(text, status, HEADERS)

    def error(self, request: Request, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
        heading = ERROR_WORDS.get(status, "Something is wrong")
        name = name_of(request)
        broke = status == 500
        level = logging.ERROR if broke else logging.INFO
        said = (name, request.method, self._site.here(request), status, views.first_line(message))
        logger.log(level, "request %s: %s %s: %d %s", *said, exc_info=broke)
        page = self.page(request, "error.html", status, heading=heading, message=message, code=status, request_id=name)
        page.headers.update({"X-Request-ID": name, **(headers or {})})
        return page

    def to_login(self, request: Request) -> Response:
        """Where a page goes without a session. A refreshing part of a page must not show the login inside it."""
        login = f"{self._site.base(request)}/auth/login"
        if is_refresh(request):
            return Response(status_code=401, headers=HEADERS | {"HX-Redirect": login})
        if request.method == "GET":
            login += f"?next={quote(self._site.here(request), safe='')}"
        return RedirectResponse(login, 302, HEADERS)


def is_refresh(request: Request) -> bool:
    """Whether an open page asks for its part that changes, instead of a person for the page."""
    return "hx-request" in request.headers


def name_of(request: Request) -> str:
    """The id under which a proxy knows this request, or one of our own: the page shows it, the log has it."""
    given = request.headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid4().hex


def page_route(renderer: Renderer) -> type[APIRoute]:
    """The route class of pages: what their functions and dependencies raise is answered as a page."""

    class PageRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def guarded(request: Request) -> Response:
                try:
                    return await answer(request)
                except StarletteHTTPException as error:
                    if error.status_code == 401:
                        return renderer.to_login(request)
                    return renderer.error(request, error.status_code, str(error.detail), error.headers)
                except RequestValidationError as error:
                    return renderer.error(request, 422, "; ".join(str(part["msg"]) for part in error.errors()))
                except TaskflowError as error:
                    return renderer.error(request, status_of(error), str(error), headers_of(error))
                except Exception:  # noqa: BLE001 - a page for whatever its code did; the log has the traceback
                    return renderer.error(request, 500, "This is a fault of the program: the service's log has it.")

            return guarded

    return PageRoute


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a small form; of several with one name the last. Raises HTTPException 413 for a large one."""
    return dict(await fields_of(request))


async def fields_of(request: Request) -> list[tuple[str, str]]:
    """All of them, in their order. Raises HTTPException."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_FORM:
            raise HTTPException(413, "the form is too large")
    try:
        return parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError:
        raise HTTPException(422, "the form has too many fields") from None


# -- static files


@dataclass(frozen=True, slots=True)
class Asset:
    content: bytes
    packed: bytes
    media_type: str
    etag: str


class Assets:
    """The files of `static/`, read once: nothing outside the folder can be asked for, and nothing is packed twice."""

    def __init__(self, folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".css", ".js", ".svg"))
        self._files = {path.relative_to(folder).as_posix(): read_asset(path) for path in files}
        self.version = hashlib.sha256("".join(asset.etag for asset in self._files.values()).encode()).hexdigest()[:12]

    def __getitem__(self, name: str) -> Asset:
        """Raises KeyError."""
        return self._files[name]


def read_asset(path: Path) -> Asset:
    content = path.read_bytes()
    media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    if path.suffix == ".js":
        media_type = "text/javascript"
    return Asset(content, gzip.compress(content, mtime=0), media_type, f'"{hashlib.sha256(content).hexdigest()[:16]}"')


def assets_router(assets: Assets) -> APIRouter:
    """Open to everyone: the login page needs them, and they are the same for all."""
    router = APIRouter()

    @router.get("/dashboard/static/{name:path}", include_in_schema=False)
    async def asset(request: Request, name: str, v: str | None = None) -> Response:
        try:
            found = assets[name]
        except KeyError:
            raise HTTPException(404, "no such file") from None
        headers = {
            "ETag": found.etag,
            "Vary": "Accept-Encoding",
            "X-Content-Type-Options": "nosniff",
            # With a version in the address the content never changes; without one it is asked for again.
            "Cache-Control": "public, max-age=31536000, immutable" if v == assets.version else "no-cache",
        }
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(found.packed, headers=headers | {"Content-Encoding": "gzip"}, media_type=found.media_type)
        return Response(found.content, headers=headers, media_type=found.media_type)

    return router
