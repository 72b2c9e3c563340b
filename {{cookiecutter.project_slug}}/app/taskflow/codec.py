"""Arguments and results to JSON text and back, with their types.

Owns the stored form of every value a task takes or returns. JSON carries str, int, float, bool, None, list and
string-keyed dict as they are; everything else is an object with the one key `$type`-name, so that it comes back as what
it was. Nothing is ever pickled, and a type that is not listed here is refused where the task is added.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic_core
from pydantic import BaseModel

from .errors import text_of

MARK = "$"
"""Keys of tagged objects start with it; a dict whose own key does is written as pairs."""
PLAIN = frozenset((str, int, bool, type(None)))
"""Types that JSON has words for, whatever the value."""
DEEPEST = 100
"""Levels of nesting that are stored."""
LONGEST_NUMBER = 4_300
"""Digits of an int that Python reads back; the fast encoder would write more."""
LARGEST_RESULT = 64 * 1024
"""Characters of JSON."""


class CannotStore(ValueError):
    """A value with no stored form; the message says which and where."""


def encode(value: object) -> str:
    """JSON text of a value. Raises CannotStore."""
    try:
        return dumps(to_json(value))
    except CannotStore:
        raise
    except ValueError as error:  # an int with more digits than Python would read back
        raise CannotStore(str(error)) from error


def dumps(value: object) -> str:
    """JSON text of plain values, in ASCII: the fast way, where it can be taken."""
    try:
        text = pydantic_core.to_json(value)
    except pydantic_core.PydanticSerializationError:  # a lone surrogate, which the standard library escapes
        return _encoder.encode(value)
    return text.decode() if len(text) < LONGEST_NUMBER and text.isascii() else _encoder.encode(value)


def decode(text: str) -> Any:
    """The value of a JSON text that `encode` wrote. Raises ValueError when it did not."""
    if MARK in text or "\\" in text:  # a tag, or an escape that may stand for a lone surrogate
        return _decoder.decode(text)
    return pydantic_core.from_json(text)


def encode_result(value: object) -> str | None:
    """The stored form of what a task returned; None for None. Raises CannotStore and nothing else, also for what is too
    large."""
    if value is None:
        return None
    try:
        text = encode(value)
    except CannotStore:
        raise
    except BaseException as error:  # user code: the attributes and methods of what was returned
        raise CannotStore(f"{type(error).__name__}: {text_of(error)}") from error
    if len(text) > LARGEST_RESULT:
        raise CannotStore(f"{len(text)} characters, more than {LARGEST_RESULT}")
    return text


def encode_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The stored form of a call: `[args, kwargs]`."""
    return encode([list(args), dict(kwargs)])


def decode_call(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = decode(text)
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError("the stored arguments are not a call")
    return tuple(args), kwargs


def to_json(value: Any, where: str = "", depth: int = 0) -> Any:
    """The value in terms of JSON, tagged where JSON has no word for it."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if depth > DEEPEST:
        raise CannotStore(f"nested deeper than {DEEPEST} levels{where}")
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list:
        return [
            item if type(item) in PLAIN else to_json(item, f"{where}[{index}]", depth + 1)
            for index, item in enumerate(value)
        ]
    if kind is dict:
        return dict_to_json(value, where, depth)
    if tag := TAGS.get(kind):
        return {tag.name: tag.write(value, where, depth)}
    return rich_to_json(value, where, depth)


def dict_to_json(value: dict[Any, Any], where: str, depth: int) -> Any:
    if not value:
        return value
    if all(type(key) is str and not key.startswith(MARK) for key in value):
        return {key: to_json(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    pairs = []
    for key, item in value.items():
        if isinstance(key, list | dict | set):
            raise CannotStore(f"{type(key).__name__} as a dict key{at(where)}")
        pairs.append([to_json(key, f"{where} key", depth + 1), to_json(item, f"{where}[{key!r}]", depth + 1)])
    return {"$dict": pairs}


def rich_to_json(value: object, where: str, depth: int) -> Any:
    """Values that come back as plain data unless the parameter's annotation says their type."""
    if isinstance(value, Enum):
        return to_json(value.value, where, depth + 1)
    if isinstance(value, BaseModel):
        return dict_to_json(model_fields(value), where, depth)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dict_to_json(fields, where, depth)
    for kind, tag in TAGS.items():  # subclasses: a PosixPath is a Path, a StrictInt an int
        if isinstance(value, kind):
            return {tag.name: tag.write(value, where, depth)}
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return to_json(plain(value), where, depth)
    if isinstance(value, list | Mapping):
        return to_json(list(value) if isinstance(value, list) else dict(value), where, depth)
    raise CannotStore(f"{type(value).__module__}.{type(value).__qualname__} has no stored form{at(where)}")


def model_fields(model: BaseModel) -> dict[str, Any]:
    """Under the names by which the model can be validated again."""
    fields = {
        field.validation_alias if isinstance(field.validation_alias, str) else name: getattr(model, name)
        for name, field in type(model).model_fields.items()
    }
    return fields | (model.model_extra or {})


def untag(found: dict[str, Any]) -> Any:
    """JSON's object hook: a tagged object becomes its value, any other stays a dict."""
    if len(found) == 1:
        ((name, stored),) = found.items()
        if (read := READERS.get(name)) is not None:
            return read(stored)
    return found


def at(where: str) -> str:
    return f" (at {where.strip()})" if where else ""


# -- the types that JSON has no word for


@dataclasses.dataclass(frozen=True, slots=True)
class Tag:
    name: str
    write: Callable[[Any, str, int], Any]
    read: Callable[[Any], Any]


def scalar(name: str, write: Callable[[Any], Any], read: Callable[[Any], Any]) -> Tag:
    return Tag(name, lambda value, _where, _depth: write(value), read)


def items(name: str, kind: Callable[[list[Any]], Any]) -> Tag:
    def write(value: Any, where: str, depth: int) -> list[Any]:
        return [to_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]

    return Tag(name, write, kind)


def write_moment(value: datetime | time) -> Any:
    """ISO text keeps the offset; a named zone and the second 01:30 of a long night need their own words."""
    zone = value.tzinfo.key if isinstance(value.tzinfo, ZoneInfo) else None
    if zone is None and not value.fold:
        return value.isoformat()
    naive = value.replace(tzinfo=None, fold=0) if zone else value.replace(fold=0)
    return [naive.isoformat(), zone, value.fold]


def read_moment(kind: type[datetime] | type[time]) -> Callable[[Any], Any]:
    def read(stored: Any) -> Any:
        if isinstance(stored, str):
            return kind.fromisoformat(stored)
        text, zone, fold = stored
        value = kind.fromisoformat(text).replace(fold=fold)
        return value.replace(tzinfo=ZoneInfo(zone)) if zone else value

    return read


TAGS: dict[type, Tag] = {
    tuple: items("$tuple", tuple),
    set: items("$set", set),
    frozenset: items("$frozenset", frozenset),
    datetime: scalar("$datetime", write_moment, read_moment(datetime)),
    date: scalar("$date", date.isoformat, date.fromisoformat),
    time: scalar("$time", write_moment, read_moment(time)),
    timedelta: scalar(
        "$timedelta", lambda v: [v.days, v.seconds, v.microseconds], lambda v: timedelta(v[0], v[1], v[2])
    ),
    Decimal: scalar("$decimal", str, Decimal),
    UUID: scalar("$uuid", str, UUID),
    bytes: scalar("$bytes", lambda v: base64.b64encode(v).decode(), base64.b64decode),
    PurePath: scalar("$path", str, Path),
}
READERS: dict[str, Callable[[Any], Any]] = {
    **{tag.name: tag.read for tag in TAGS.values()},
    "$float": float,
    "$dict": dict,
}

_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_decoder = json.JSONDecoder(object_hook=untag)
