"""Where tasks are stored. `open_backend(url)` picks the implementation by the URL's scheme.

Each implementation is imported only when its scheme is asked for, so that only the chosen driver is needed.
"""

from __future__ import annotations

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..errors import TaskflowError
from .base import Backend

SCHEMES = ("sqlite",)


def open_backend(location: str | None) -> Backend:
    """The backend of a URL or of an SQLite file's path; None is a database in memory. Connects later, in `open()`.

    Raises TaskflowError naming the URL when its scheme is not one of SCHEMES.
    """
    url = parse_location(location)
    match url.get_backend_name():
        case "sqlite":
            from .sqlite import SqliteBackend

            return SqliteBackend(url)
        case scheme:
            raise TaskflowError(f"{url.render_as_string()}: no backend for {scheme!r}, only for {', '.join(SCHEMES)}")


def parse_location(location: str | None) -> URL:
    if location is None:
        return URL.create("sqlite")
    if "://" not in location:
        return URL.create("sqlite", database=location)
    try:
        return make_url(location)
    except ArgumentError as error:
        raise TaskflowError(f"{location!r}: not a database URL ({error})") from error


__all__ = ["Backend", "open_backend", "parse_location"]
