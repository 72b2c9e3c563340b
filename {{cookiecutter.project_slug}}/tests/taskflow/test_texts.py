"""What becomes of texts, and of values that are none, before they are stored or shown."""

from __future__ import annotations

import json
import logging
from decimal import Decimal
from enum import Enum, StrEnum
from typing import Any
from uuid import UUID

import pytest

from app.taskflow import texts
from app.taskflow.texts import amount, clean, cut, fields_text, key_text, level_name, readable, tag_texts


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__

    def __float__(self) -> float:
        raise RuntimeError("no number")


class Colour(Enum):
    RED = "red"
    SEVEN = 7


class Word(StrEnum):
    ONE = "one"


LOOP: dict[str, Any] = {}
LOOP["self"] = LOOP
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
EXTRAS: list[Any] = [
    Broken(),
    LOOP,
    DEEP,
    float("nan"),
    [float("inf")],
    {("a", "tuple"): 1},
    {Broken(): Broken()},
    b"\xff\x00",
    "half \ud800 a pair",
    "NUL \0",
    10**5_000,
    "x" * 10_000_000,
    ["y" * 1_000] * 10_000,
    {f"key {n}": n for n in range(100_000)},
    {1, 2},
    Colour.RED,
    object(),
    type,
    "\N{SNAKE}" * 100_000,
]


@pytest.mark.parametrize("value", EXTRAS, ids=[f"{n}-{type(value).__name__}" for n, value in enumerate(EXTRAS)])
def test_fields_of_any_value_become_json_of_a_bounded_size(value: Any) -> None:
    text = fields_text({"good": 1, "value": value, "last": "word"})
    found = json.loads(text)
    assert len(text) <= texts.LONGEST_FIELDS
    assert text.isascii()
    assert (found["good"], found["last"]) == (1, "word")
    json.dumps(found["value"], allow_nan=False).encode()


def test_too_many_fields_say_how_many_are_missing() -> None:
    found = json.loads(fields_text({f"field {n}": "x" * 400 for n in range(1_000)}))
    assert found["field 0"] == "x" * 400
    assert found[texts.MORE] == f"{1_001 - len(found)} more"


def test_fields_that_fit_are_what_they_were() -> None:
    fields = {"code": 7, "data": {"list": [1, None, "ü"]}, "flag": True, "text": "x" * 3_000}
    assert json.loads(fields_text(fields)) == fields


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (7, 7),
        (7.5, 7.5),
        (2**60, float(2**60)),
        (Decimal("2.5"), 2.5),
        (True, 1),
        ("half", "half"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (None, "None"),
        pytest.param(10**5_000, "<int, whose text raised ValueError>", id="digits"),
        (Broken(), "<Broken, whose text raised RuntimeError>"),
    ],
)
def test_an_amount_is_a_number_where_it_can_be_one(value: Any, shown: Any) -> None:
    assert amount(value) == shown
    assert type(amount(value)) is type(shown)


@pytest.mark.parametrize(
    ("level", "name"),
    [
        ("warning", "warning"),
        (logging.ERROR, "error"),
        (17, "level 17"),
        (Word.ONE, "one"),
        (None, "None"),
        ("x" * 100, "x" * 31 + "…"),
        ("\ud800", "?"),
    ],
)
def test_a_level_is_a_word(level: Any, name: str) -> None:
    assert level_name(level) == name


def test_words_are_cleaned_and_cut_and_never_fail() -> None:
    assert clean("a\0b\ud800c ü") == "a\ufffdb?c ü"
    assert cut("x" * 10, 10) == "x" * 10
    assert cut("x" * 11, 10) == "x" * 9 + "…"
    assert readable(Broken()) == "<Broken, whose text raised RuntimeError>"


@pytest.mark.parametrize(
    ("key", "text"),
    [("order 7", "order 7"), (7, "7"), (UUID(int=7), str(UUID(int=7))), (Word.ONE, "one"), (Colour.SEVEN, "7")],
)
def test_a_key_may_be_what_names_things(key: Any, text: str) -> None:
    assert key_text(key) == text
    assert type(key_text(key)) is str


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("", "1 to 512 characters"),
        ("x" * 513, "1 to 512 characters"),
        ("a\0b", "NUL"),
        ("a\ud800", "half a surrogate pair"),
        (True, "a string, an int or a UUID"),
        (7.5, "a string, an int or a UUID"),
        (b"key", "a string, an int or a UUID"),
        pytest.param(10**5_000, "integer string conversion", id="digits"),
    ],
)
def test_a_key_that_cannot_be_is_refused_with_the_rule(key: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        key_text(key)


def test_tags_become_text_where_their_text_is_plain() -> None:
    tags = {"n": 7, "ratio": 2.5, "on": True, "colour": Colour.RED, "id": UUID(int=7), 5: Word.ONE, "empty": ""}
    assert tag_texts(tags) == {
        "n": "7",
        "ratio": "2.5",
        "on": "True",
        "colour": "red",
        "id": str(UUID(int=7)),
        "5": "one",
        "empty": "",
    }


@pytest.mark.parametrize(
    ("tags", "rule"),
    [
        ({"a": None}, "value of 'a': must be a string"),
        ({"a": ["b"]}, "not list"),
        ({None: "b"}, "key: must be a string"),
        ({"": "b"}, "key: must have 1 to 256"),
        ({"a": "x" * 257}, "value of 'a': must have 0 to 256"),
        ({"a": "\ud800"}, "half a surrogate pair"),
        ({"a\0": "b"}, "NUL"),
        ({str(n): "x" for n in range(65)}, "65 tags, more than 64"),
        (["a"], "must be a dict"),
        ({"a": Broken()}, "not Broken"),
    ],
)
def test_tags_that_cannot_be_are_refused_with_the_rule(tags: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        tag_texts(tags)
