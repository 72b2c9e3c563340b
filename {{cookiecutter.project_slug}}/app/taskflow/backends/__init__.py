"""Where tasks are stored. `open_backend(url)` picks the implementation by the URL's scheme.

Each implementation is imported only when its scheme is asked for, so that only the chosen driver is needed.
"""

from __future__ import annotations

import os
import re
from importlib import import_module

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..errors import TaskDefinitionError
from .base import Backend

IMPLEMENTATIONS = {
    "sqlite": ("sqlite", "SqliteBackend"),
    "postgresql": ("postgres", "PostgresBackend"),
    "redis": ("redis", "RedisBackend"),
    "rediss": ("redis", "RedisBackend"),
}
"""Scheme -> module and class. By name, because a project has the module of the store that it was made for, and
SQLite's."""
SCHEMES = tuple(IMPLEMENTATIONS)


def open_backend(location: str | None) -> Backend:
    """The backend of a URL or of an SQLite file's path; None is a database in memory. Connects later, in `open()`.

    Raises TaskDefinitionError naming the URL when its scheme is not one of SCHEMES, or is that of a store which this
    project was not made for.
    """
    url = parse_location(location)
    scheme = url.get_backend_name()
    if scheme not in IMPLEMENTATIONS:
        raise TaskDefinitionError(f"{url.render_as_string()}: no backend for {scheme!r}, only for {', '.join(SCHEMES)}")
    module, kind = IMPLEMENTATIONS[scheme]
    try:
        found = import_module(f".{module}", __name__)
    except ModuleNotFoundError as error:
        raise TaskDefinitionError(
            f"{url.render_as_string()}: this project has no {error.name}: it was made to keep its tasks elsewhere"
        ) from error
    try:
        backend: Backend = getattr(found, kind)(url)
    except ValueError as error:  # the driver's reading of it
        raise TaskDefinitionError(f"{url.render_as_string()}: {error}") from error
    return backend


def parse_location(location: str | None) -> URL:
    if location is None:
        return URL.create("sqlite")
    if not isinstance(location, str | os.PathLike) or not os.fspath(location):
        raise TaskDefinitionError(f"{location!r}: must be a file path or a URL such as sqlite:///tasks.db")
    location = os.fspath(location)
    if "://" not in location:
        refuse_scheme_of_path(location)
        return URL.create("sqlite", database=location)
    try:
        url = make_url(location)
    except (ArgumentError, ValueError):  # which may quote a part of the password
        shown = re.sub("(?<=://).*@", "***@", location)
        raise TaskDefinitionError(
            f"{shown!r}: not a URL such as postgresql://user:password@host:5432/name, with %40 for an @ in the password"
        ) from None
    if url.drivername == "postgres":  # as hosting services write it
        url = url.set(drivername="postgresql")
    scheme, plus, _ = url.drivername.partition("+")
    if plus and scheme in SCHEMES:
        plain = url.set(drivername=scheme).render_as_string()
        raise TaskDefinitionError(f"{url.render_as_string()}: the driver is chosen for you, write {plain}")
    if scheme == "sqlite":
        refuse_host_of_file(url)
    return url


def refuse_scheme_of_path(location: str) -> None:
    """`sqlite:tasks.db` would be a file of that name."""
    scheme, colon, rest = location.partition(":")
    if colon and scheme in SCHEMES:
        raise TaskDefinitionError(f"{location!r}: write {scheme}:///{rest.lstrip('/')}")


def refuse_host_of_file(url: URL) -> None:
    """`sqlite://tasks.db` names a host, and no file."""
    if url.host or url.port or url.username or url.password:
        path = "/".join(part for part in (url.host, url.database) if part)
        raise TaskDefinitionError(f"{url.render_as_string()}: a file has no host, write sqlite:///{path}")


__all__ = ["Backend", "open_backend", "parse_location"]
