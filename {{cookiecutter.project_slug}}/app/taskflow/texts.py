"""Text that can be stored and shown: which characters, how long, and what stands for values that are none.

Owns the rules of every text that comes from callers and from user code. Keys and tags have a meaning, so what breaks a
rule is refused where it is given; words for people are cleaned and cut instead, and never fail. Pure.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

LONGEST_KEY = 512
"""Characters of an idempotency key or a run key."""
LONGEST_NAME = 256
"""Characters of a task's or a queue's name, of a tag's key and of its value."""
MOST_TAGS = 64
LONGEST_FIELD = 500
"""Characters of one value that are kept of a log line whose values are too long together."""
LONGEST_FIELDS = 8_000
"""Characters of JSON."""
MORE = "…"
HERE_ONLY = "(…)"
"""How the name of a task ends that only the process which accepted it can run."""


# -- words for people


def clean(text: str) -> str:
    """Without what databases refuse in text: NUL and lone surrogates."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")


def cut(text: str, most: int) -> str:
    """The beginning of a text that is longer than that, marked as such."""
    return text if len(text) <= most else text[: most - 1] + MORE


def readable(value: object, most: int = LONGEST_FIELD) -> str:
    """Any value in words. Never raises, whatever its class does."""
    try:
        text = str(value)
    except Exception as error:  # noqa: BLE001 - user code: __str__
        text = f"<{type(value).__name__}, whose text raised {type(error).__name__}>"
    return clean(cut(text, most))


def level_name(level: object) -> str:
    """Of a log line: a word, or one of `logging`'s numbers."""
    if isinstance(level, int) and not isinstance(level, bool):
        return logging.getLevelName(int(level)).lower()
    return readable(level.value if isinstance(level, Enum) else level, 32)


def amount(value: Any) -> float | str:
    """A number that JSON has a word for; anything else in words."""
    try:
        if isinstance(value, str):
            return readable(value)
        number = float(value)
        if math.isfinite(number):
            whole = number.is_integer() and abs(number) < 2**53 and not isinstance(value, float)
            return int(number) if whole else number
    except Exception:  # noqa: BLE001 - user code: __float__
        pass
    return readable(value)


def fields_text(fields: Mapping[str, Any], most: int = LONGEST_FIELDS) -> str:
    """The JSON object of these fields, in ASCII. Never raises: what JSON has no word for is put in words, what is too
    long is cut."""
    if not fields:
        return "{}"
    try:
        text = json.dumps(fields, default=readable, allow_nan=False)
        if len(text) <= most:
            return text
    except Exception:  # noqa: BLE001 - user code: a mapping of its own, keys that are no text, a circle, no number
        pass
    return short_fields_text(fields, most)


def short_fields_text(fields: Mapping[str, Any], most: int) -> str:
    kept: dict[str, Any] = {}
    size = 2
    for place, (key, value) in enumerate(fields.items()):
        name, shown = readable(key, 100), short_value(value)
        size += len(json.dumps({name: shown}))
        if size > most:
            return json.dumps(kept | {MORE: f"{len(fields) - place} more"})
        kept[name] = shown
    return json.dumps(kept)


def short_value(value: object) -> Any:
    try:
        text = json.dumps(value, default=readable, allow_nan=False)
        if len(text) <= LONGEST_FIELD:
            return json.loads(text)
    except Exception:  # noqa: BLE001 - as above
        return readable(value)
    return readable(value if isinstance(value, str) else text)


# -- keys and tags


def checked_text(text: str, longest: int, shortest: int = 1) -> str:
    """Raises ValueError with the rule that it breaks."""
    if not shortest <= len(text) <= longest:
        raise ValueError(f"must have {shortest} to {longest} characters")
    if clean(text) != text:
        raise ValueError("must not contain NUL or half a surrogate pair")
    return text


def exact(value: object) -> str:
    """Its text; of a text of a class of its own the letters, whatever that class makes of `str()`."""
    return str.__str__(value) if isinstance(value, str) else str(value)


def key_text(key: object) -> str:
    """A key as it is stored. Raises ValueError with the rule that it breaks."""
    if isinstance(key, Enum):
        key = key.value
    if isinstance(key, bool) or not isinstance(key, str | int | UUID):
        raise ValueError("must be a string, an int or a UUID")
    return checked_text(exact(key), LONGEST_KEY)


def name_text(name: object) -> str:
    """The name of a task or a queue. Raises ValueError with the rule that it breaks."""
    if not isinstance(name, str):
        raise ValueError("must be a string")
    return checked_text(exact(name), LONGEST_NAME)


def tag_texts(tags: object) -> dict[str, str]:
    """Tags as they are stored. Raises ValueError with the rule that they break."""
    if not isinstance(tags, Mapping):
        raise ValueError("must be a dict of keys and values")
    if len(tags) > MOST_TAGS:
        raise ValueError(f"{len(tags)} tags, more than {MOST_TAGS}")
    return {tag_text(key, "key", 1): tag_text(value, f"value of {key!r:.40}", 0) for key, value in tags.items()}


def tag_text(part: object, what: str, shortest: int) -> str:
    if isinstance(part, Enum):
        part = part.value
    if not isinstance(part, str | int | float | Decimal | UUID):
        raise ValueError(f"{what}: must be a string, a number, a bool, an enum or a UUID, not {type(part).__name__}")
    try:
        return checked_text(exact(part), LONGEST_NAME, shortest)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
