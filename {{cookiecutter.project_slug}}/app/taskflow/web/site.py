"""What the web side knows about itself: which manager it shows, where it is, and what it may show.

Owns the settings that `TaskAdmin` was given, in one frozen value that every router gets. It has no logic but addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import HTTPConnection

from ..manager import TaskManager
from .redaction import DEFAULT, Redaction


@dataclass(frozen=True, slots=True)
class Site:
    manager: TaskManager
    path: str
    """Below which everything is, as the app sees it."""
    title: str = "Taskflow"
    display_func_args: bool = False
    poll_interval: float = 30.0
    """Seconds after which a page refreshes itself although nothing was announced."""
    redaction: Redaction = DEFAULT

    def base(self, request: HTTPConnection) -> str:
        """`path` as the browser sees it: behind a proxy's prefix, or inside a mounted app."""
        return quote(root_of(request) + self.path)

    def here(self, request: HTTPConnection) -> str:
        """The address of this request as the browser sees it, with its query."""
        root, path = root_of(request), str(request.scope["path"])
        query = request.scope.get("query_string", b"").decode("latin-1")
        return quote(path if path.startswith(f"{root}/") else root + path) + (f"?{query}" if query else "")


def root_of(request: HTTPConnection) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/")
