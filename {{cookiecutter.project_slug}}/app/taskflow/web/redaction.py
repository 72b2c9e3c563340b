"""What is secret by its name, and is shown nowhere: neither in the API nor on a page nor at the terminal.

Owns the words that make a name secret, and the mark that stands for such a value. Pure. What a function's own text
says, in an error or a log line, is not looked through.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MASK = "•••"
WORDS = (
    "password",
    "passwd",
    "pwd",
    "passphrase",
    "passcode",
    "secret",
    "credential",
    "authorization",
    "cookie",
    "cvv",
    "cvc",
    "ssn",
    "api_key",
    "apikey",
    "access_key",
    "private_key",
    "signing_key",
    "encryption_key",
    "access_token",
    "auth_token",
    "refresh_token",
)
LAST = ("token",)
"""Secret at the end of a name only: `csrf_token`, and not `token_count`."""
HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
NO_LETTER = re.compile(r"[^a-z0-9]+")


def words_of(name: str) -> str:
    """`apiKey`, `API-Key` and `api_key` are one name."""
    return NO_LETTER.sub("_", HUMP.sub("_", name).lower()).strip("_")


class Redaction:
    """The names that are secret: those that are so everywhere, and a team's own."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        anywhere = "|".join(map(re.escape, (*WORDS, *map(words_of, names))))
        self._secret = re.compile(rf"(?:^|_)(?:(?:{anywhere})s?(?:_|$)|(?:{'|'.join(LAST)})$)")

    def hides(self, name: object) -> bool:
        return isinstance(name, str) and self._secret.search(words_of(name)) is not None

    def shown(self, name: object, value: Any) -> Any:
        """The value, or the mark. That there is none, or that something is on or off, is no secret."""
        return MASK if self.hides(name) and value is not None and not isinstance(value, bool) else value

    def call(self, parameters: Iterable[str], args: Sequence[Any]) -> list[Any]:
        """Arguments given by place, under the names of the function's parameters."""
        names = list(parameters)[: len(args)]
        return [*(self.shown(*pair) for pair in zip(names, args, strict=False)), *args[len(names) :]]


class Frank(Redaction):
    """Hides nothing: for what is never shown, but compared with what is."""

    def hides(self, name: object) -> bool:
        return False


DEFAULT, FRANK = Redaction(), Frank()


def unmasked(text: str, shown: str, stored: str) -> str:
    """A form's field as it is meant: where it holds the mark, the stored value stands behind it."""
    if MASK not in text:
        return text
    if text == shown:
        return stored
    try:
        return json.dumps(restored(json.loads(text), json.loads(stored)), ensure_ascii=False)
    except ValueError:
        return text


def restored(typed: Any, stored: Any) -> Any:
    """What was typed in a form, with the values that stood behind the mark where it was left as it is."""
    if typed == MASK:
        return stored
    match typed, stored:
        case Mapping(), Mapping():
            known = {str(key): value for key, value in stored.items()}
            return {key: restored(value, known[key]) if key in known else value for key, value in typed.items()}
        case list(), list() | tuple() if len(typed) == len(stored):
            return [restored(*pair) for pair in zip(typed, stored, strict=True)]
        case _:
            return typed
