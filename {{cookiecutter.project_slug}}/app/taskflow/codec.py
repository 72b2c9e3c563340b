"""Arguments and results to JSON text and back, with their types.

Owns the stored form of every value a task takes or returns. JSON carries str, int, float, bool, None, list and
string-keyed dict as they are; everything else is an object with the one key `$type`-name, so that it comes back as what
it was. Nothing is ever pickled, and a type that is not listed here is refused where the task is added. Instances of an
application's own classes are told by `Objects`, where the reader has them; without, they are read as plain data.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path, PurePath
from typing import Any, Protocol
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic
import pydantic_core
from pydantic import AliasChoices, BaseModel, Secret, SecretBytes, SecretStr

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


class Write(Protocol):
    """Writes a part of a value."""

    def __call__(self, part: Any, place: str, strict: bool = False, /) -> Any:
        """`place` is where in the value it is; a strict one has nothing in it that comes back plain."""


Readers = Mapping[str, Callable[[Any], Any]]
"""By tag: makes the value of what is stored under it."""


class CannotStore(ValueError):
    """A value with no stored form; the message says which and where."""


class Objects(Protocol):
    """The classes that a reader of the stored form has, and their instances' stored forms."""

    def write(self, value: Any, write: Write, /) -> Any | None: ...
    def strictly(self) -> Objects: ...
    def read(self, tag: str, stored: Any, /) -> Any: ...


def encode(value: object, objects: Objects | None = None) -> str:
    """JSON text of a value. Raises CannotStore."""
    try:
        return dumps(to_json(value, objects=objects))
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


def decode(text: str, readers: Readers | None = None) -> Any:
    """The value of a JSON text that `encode` wrote; its objects too, with `readers_of` them. Raises ValueError when it
    did not."""
    stored = json.loads(text) if "\\" in text else pydantic_core.from_json(text)  # it may stand for a lone surrogate
    return from_json(stored, readers or READERS) if MARK in text else stored


def readers_of(objects: Objects) -> Readers:
    return {**READERS} | {tag: partial(objects.read, tag) for tag in OBJECT_TAGS}


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


NO_ARGUMENTS = "[[],{}]"
"""The stored form of a call without any."""


def encode_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], objects: Objects | None = None, *more: int) -> str:
    """The stored form of a call: `[args, kwargs, *more]`. Raises CannotStore and other ValueErrors."""
    return dumps(
        [
            [item if type(item) in PLAIN else to_json(item, f"[{at}]", 1, objects) for at, item in enumerate(args)],
            dict_to_json(dict(kwargs), "", 1, objects) if kwargs else {},
            *more,
        ]
    )


def decode_call(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A stored call in plain values, for readers that do not have its classes. Raises ValueError."""
    args, kwargs, *_ = decode(text)
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError("the stored arguments are not a call")
    return tuple(args), kwargs


def to_json(value: Any, where: str = "", depth: int = 0, objects: Objects | None = None) -> Any:
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
            item if type(item) in PLAIN else to_json(item, f"{where}[{index}]", depth + 1, objects)
            for index, item in enumerate(value)
        ]
    if kind is dict:
        return dict_to_json(value, where, depth, objects)
    if tag := TAGS.get(kind):
        return {tag.name: tag.write(value, where, depth, objects)}
    if objects is not None:

        def write(part: Any, place: str, strict: bool = False) -> Any:
            return to_json(part, where + place, depth + 1, objects.strictly() if strict else objects)

        found = objects.write(value, write)
        if found is not None:
            return found
    return rich_to_json(value, where, depth, objects)


def dict_to_json(value: dict[Any, Any], where: str, depth: int, objects: Objects | None = None) -> Any:
    if not value:
        return value
    if all(type(key) is str and not key.startswith(MARK) for key in value):
        return {
            key: item if type(item) in PLAIN else to_json(item, f"{where}[{key!r}]", depth + 1, objects)
            for key, item in value.items()
        }
    pairs = []
    for key, item in value.items():
        written = to_json(key, f"{where} key", depth + 1, objects)
        if is_unhashable(written):
            raise CannotStore(f"{type(key).__name__} as a dict key{at(where)}")
        pairs.append([written, to_json(item, f"{where}[{key!r}]", depth + 1, objects)])
    return {"$dict": pairs}


def is_unhashable(written: Any) -> bool:
    """True for a stored form that is read as a list, a dict or a set."""
    if isinstance(written, dict):
        return len(written) != 1 or next(iter(written)) in ("$dict", "$set") or not next(iter(written)).startswith(MARK)
    return isinstance(written, list)


def rich_to_json(value: object, where: str, depth: int, objects: Objects | None = None) -> Any:
    """Values that come back as plain data: no annotation says their type."""
    if isinstance(value, Enum):
        return to_json(value.value, where, depth + 1, objects)
    if isinstance(value, pydantic.RootModel):
        return to_json(value.root, where, depth + 1, objects)
    if isinstance(value, BaseModel):
        return dict_to_json(model_fields(value), where, depth, objects)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dict_to_json(fields, where, depth, objects)
    for kind, tag in TAGS.items():  # subclasses: a PosixPath is a Path, a StrictInt an int
        if isinstance(value, kind):
            return {tag.name: tag.write(value, where, depth, objects)}
    for plain, exact in EXACT.items():
        if isinstance(value, plain):
            return to_json(exact(value), where, depth)
    if isinstance(value, VALIDATED):
        return to_json(list(value), where, depth, objects)
    if isinstance(value, list | Mapping):
        return to_json(list(value) if isinstance(value, list) else dict(value), where, depth, objects)
    raise CannotStore(f"{type(value).__module__}.{type(value).__qualname__} has no stored form{at(where)}")


def model_fields(model: BaseModel) -> dict[str, Any]:
    """Under the names by which the model can be validated again."""
    fields = {}
    for name, field in type(model).model_fields.items():
        alias = field.validation_alias
        if isinstance(alias, AliasChoices):
            alias = next((choice for choice in alias.choices if isinstance(choice, str)), None)
        fields[alias if isinstance(alias, str) else name] = getattr(model, name)
    return fields | (model.model_extra or {})


def from_json(stored: Any, readers: Readers) -> Any:
    """What `to_json` wrote, as the value that it was; lists and dicts are filled where they are."""
    if type(stored) is list:
        for index, item in enumerate(stored):
            kind = type(item)
            if kind is list or kind is dict:
                stored[index] = from_json(item, readers)
    elif type(stored) is dict:
        for name, item in stored.items():
            kind = type(item)
            if kind is dict or kind is list:
                stored[name] = from_json(item, readers)
        if len(stored) == 1:
            ((name, inner),) = stored.items()
            if (read := readers.get(name)) is not None:
                return read(inner)
    return stored


def at(where: str) -> str:
    return f" (at {where.strip()})" if where else ""


# -- the types that JSON has no word for


@dataclasses.dataclass(frozen=True, slots=True)
class Tag:
    name: str
    write: Callable[[Any, str, int, Objects | None], Any]
    read: Callable[[Any], Any]


def scalar(name: str, write: Callable[[Any], Any], read: Callable[[Any], Any]) -> Tag:
    return Tag(name, lambda value, _where, _depth, _objects: write(value), read)


def items(name: str, kind: Callable[[list[Any]], Any]) -> Tag:
    hashes = kind in (set, frozenset)

    def write(value: Any, where: str, depth: int, objects: Objects | None) -> list[Any]:
        found = [to_json(item, f"{where}[{index}]", depth + 1, objects) for index, item in enumerate(value)]
        if hashes and any(map(is_unhashable, found)):
            raise CannotStore(f"a {kind} of what is stored as dicts or lists{at(where)}")
        return found

    return Tag(name, write, kind)


def parts(name: str, take: Callable[[Any], list[Any]], read: Callable[..., Any]) -> Tag:
    """A value that is stored as a few others."""

    def write(value: Any, where: str, depth: int, objects: Objects | None) -> list[Any]:
        return [to_json(item, where, depth + 1, objects) for item in take(value)]

    return Tag(name, write, lambda stored: read(*stored))


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


EXACT: Mapping[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}
"""A plain value of a subclass's instance, whatever that class makes of `str()` and the like."""
VALIDATED = type(pydantic.TypeAdapter(Iterable[Any]).validate_python(()))
"""What pydantic makes of an argument that is annotated as Iterable: it validates each item when it is asked for it."""
LIBRARY: dict[type, str] = {
    kind: kind.__name__
    for kind in (
        *(IPv4Interface, IPv4Network, IPv4Address, IPv6Interface, IPv6Network, IPv6Address, Fraction),
        *(getattr(pydantic, name) for name in pydantic.__all__ if name.endswith(("Url", "Dsn", "DSN"))),
    )
}
"""Types that come with Python and pydantic, and are made of a text."""
_by_text = {name: kind for kind, name in LIBRARY.items()}
_text = parts("$text", lambda v: [LIBRARY[type(v)], str(v)], lambda name, text: _by_text[name](text))


def secret(kind: Callable[[Any], Any]) -> Tag:
    name = kind.__name__
    return parts("$secret", lambda v: [name, v.get_secret_value()], lambda name, value: SECRETS[name](value))


SECRETS: dict[str, Callable[[Any], Any]] = {"SecretStr": SecretStr, "SecretBytes": SecretBytes, "Secret": Secret}

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
    ZoneInfo: scalar("$zone", str, ZoneInfo),
    bytes: scalar("$bytes", lambda v: base64.b64encode(v).decode(), base64.b64decode),
    PurePath: scalar("$path", str, Path),
    deque: parts("$deque", lambda v: [list(v), v.maxlen], deque),
    re.Pattern: parts("$pattern", lambda v: [v.pattern, v.flags], re.compile),
    SecretStr: secret(SecretStr),
    SecretBytes: secret(SecretBytes),
    Secret: secret(Secret),
    **dict.fromkeys(LIBRARY, _text),
}
OBJECT_TAGS = ("$model", "$row", "$data", "$enum", "$named", "$of")
"""What `Objects` writes: `[class, state, ...]`."""
READERS: Readers = {
    **{tag.name: tag.read for tag in TAGS.values()},
    "$float": float,
    "$dict": dict,
    "$model": lambda stored: stored[1] | (stored[3] or {} if stored[3:] else {}),
    "$row": lambda stored: stored[1],
    "$data": lambda stored: stored[1],
    "$enum": lambda stored: stored[-1],
    "$named": lambda stored: tuple(stored[1].values()),
    "$of": lambda stored: stored[1],
}

_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
