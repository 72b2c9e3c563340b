"""The route class of the JSON API: what is wrong with a request is answered as 422, whatever the request holds.

Called by the routers of `api.py`, `operations.py` and `schedules.py`. FastAPI's own answer repeats the input, and fails
on what JSON has no word for (NaN, a lone surrogate); this one says where the problem is and what is wrong there.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from .records import Json

LARGEST_BODY = 512 * 1_024
"""Bytes; more is 413, before it is read."""


class AnyText(PathConvertor):
    """`{name:any}`: names may hold newlines, too. Starlette's `path` ends where a line does: such a key would have no
    route, or that of a shorter key."""

    regex = "(?s:.*)"


register_url_convertor("any", AnyText())


class ApiRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                refuse_large(said_size(request.headers.get("content-length", "")))
                return await answer(Request(request.scope, limited(request.receive)))
            except RequestValidationError as error:
                return Json({"detail": [problem(part) for part in error.errors()]}, 422)
            except HTTPException as error:
                if error.status_code == 400 and isinstance(error.__cause__, ValueError | RecursionError):
                    # JSON that cannot be read although its syntax is right: digits or brackets without end, no UTF-8
                    return Json({"detail": str(error.detail)}, 422)
                raise

        return guarded


def said_size(length: str) -> float:
    """Bytes, as the header says; 0 where it says no number, which the server itself refuses."""
    if len(length) >= 20:
        return float("inf")
    return int(length) if length.isdecimal() else 0


def refuse_large(size: float) -> None:
    """Raises HTTPException 413."""
    if size > LARGEST_BODY:
        raise HTTPException(413, f"the body is larger than {LARGEST_BODY:,} bytes")


def limited(receive: Receive) -> Receive:
    """The body as it comes, but for what is too large although nobody said so before."""
    size = 0

    async def receive_some() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        refuse_large(size)
        return message

    return receive_some


def problem(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": part["type"], "loc": list(part["loc"]), "msg": part["msg"]}
