"""Every listed type comes back as what it was; anything else is refused with its place named."""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from app.taskflow import TaskArgumentError
from app.taskflow.codec import DEEPEST, CannotStore, decode, decode_call, encode, encode_call
from app.taskflow.models import TaskConfig
from app.taskflow.registry import TaskRegistry

PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
BERLIN = ZoneInfo("Europe/Berlin")
NAIVE = datetime(2026, 10, 25, 2, 30)
Pair = namedtuple("Pair", "left right")


class Colour(Enum):
    RED = "red"
    MIX = (1, 2)


class Level(IntEnum):
    HIGH = 3


class Word(StrEnum):
    YES = "yes"


class Address(BaseModel):
    street: str
    number: int = 1
    since: date | None = None


class Aliased(BaseModel):
    where: Address = Field(alias="address")
    tags: set[str] = set()


@dataclass(frozen=True)
class Point:
    x: int
    when: datetime


def same(one: object, other: object) -> bool:
    """Equal in value and in type, all the way down; NaN equals NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return len(one) == len(other) and all(
            same(key, match) and same(one[key], other[match]) for key, match in zip(one, other, strict=True)
        )
    if isinstance(one, float) and isinstance(other, float):
        return repr(one) == repr(other)
    if isinstance(one, Decimal):
        return str(one) == str(other)
    if isinstance(one, datetime | time) and isinstance(other, datetime | time):
        return one.isoformat() == other.isoformat() and one.fold == other.fold and one.tzinfo == other.tzinfo
    return one == other


def zones() -> st.SearchStrategy[Any]:
    minutes = st.integers(-14 * 60, 14 * 60)
    return st.none() | st.timezones() | minutes.map(lambda value: timezone(timedelta(minutes=value)))


# NUL and lone surrogates too; JSON has no way to tell the two halves of a pair from the character they make.
texts = st.text(st.characters(codec=None, exclude_categories=[])).filter(lambda text: not PAIR.search(text))
keys = (
    texts
    | st.integers()
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False)
    | st.uuids()
    | st.dates()
    | st.tuples(texts, st.integers())
    | st.frozensets(st.integers())
    | st.sampled_from(["$dict", "$tuple", "$datetime", "$", "$float"])
)
scalars = (
    texts
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.none()
    | st.binary()
    | st.decimals()
    | st.uuids()
    | st.dates()
    | st.timedeltas()
    | st.times(timezones=zones())
    | st.datetimes(timezones=zones(), allow_imaginary=False)
    | st.sampled_from([Path("a/b"), Path("/"), Path("."), Path("ä\n")])
)
hashables = texts | st.integers() | st.uuids() | st.tuples(st.integers(), texts)
values = st.recursive(
    scalars | st.sets(hashables) | st.frozensets(hashables),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(st.sampled_from(["$tuple", "$set", "a"]), inner, max_size=2)
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(values)
def test_any_nesting_of_listed_types_comes_back_as_it_was(value: Any) -> None:
    text = encode(value)
    assert same(decode(text), value)
    text.encode("ascii")
    assert "\0" not in text
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


@settings(max_examples=50, deadline=None)
@given(st.lists(values, max_size=3), st.dictionaries(texts, values, max_size=3))
def test_a_call_comes_back_with_its_positional_and_named_arguments(args: list[Any], kwargs: dict[str, Any]) -> None:
    found = decode_call(encode_call(tuple(args), kwargs))
    assert same(found, (tuple(args), kwargs))


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        -math.inf,
        math.nan,
        -0.0,
        5e-324,
        2**64,
        -(10**4_000),
        "\0",
        "\ud800",
        "\u2028",
        "",
        b"\0\xff",
        {1: "int", "1": "str", 1.5: "float", None: "none", (1, 2): "tuple", frozenset({1}): "frozen"},
        {True: "bool"},
        {"$tuple": [1]},
        {"$dict": [["a", 1]]},
        {"$": 1, "b": {"$set": []}},
        {},
        [],
        (),
        set(),
        ((), [()], {(): ()}),
        datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=0),
        datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1),
        NAIVE.replace(fold=1),
        datetime(2026, 3, 29, 2, 30, tzinfo=BERLIN),
        NAIVE.min,
        datetime.max.replace(tzinfo=UTC),
        datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=45, seconds=7))),
        time(1, 30, tzinfo=UTC, fold=1),
        time(1, 30, tzinfo=BERLIN),
        timedelta.min,
        timedelta.max,
        timedelta(microseconds=-1),
        Decimal("1.10"),
        Decimal("-0"),
        Decimal("Infinity"),
        Decimal("NaN"),
        Decimal("1E+1000"),
        UUID(int=0),
        Path("/srv/ä b"),
    ],
    ids=repr,
)
def test_values_at_the_edge_come_back_as_they_were(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_the_two_half_past_ones_of_a_long_night_stay_two_moments() -> None:
    first, second = (datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=fold) for fold in (0, 1))
    assert [decode(encode(moment)).utcoffset() for moment in (first, second)] == [
        timedelta(hours=2),
        timedelta(hours=1),
    ]


# -- values that come back plain, unless the annotation says their type


class Itself(str):
    """As template engines mark text that is safe."""

    def __str__(self) -> str:
        return self


class Other(str):
    def __str__(self) -> str:
        return "other"


class Seven(int):
    def __int__(self) -> int:
        return 7


class Half(float):
    def __float__(self) -> float:
        return 0.5


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Colour.RED, "red"),
        (Colour.MIX, (1, 2)),
        (Level.HIGH, 3),
        (Word.YES, "yes"),
        ({Word.YES: 1}, {"yes": 1}),
        (Address(street="a", since=date(2026, 1, 1)), {"street": "a", "number": 1, "since": date(2026, 1, 1)}),
        (Aliased(address=Address(street="b")), {"address": {"street": "b", "number": 1, "since": None}, "tags": set()}),
        (Point(1, NAIVE), {"x": 1, "when": NAIVE}),
        (Pair(1, [2]), (1, [2])),
        (OrderedDict(a=1), {"a": 1}),
        (PurePosixPath("/a"), Path("/a")),
        (Itself("a"), "a"),
        ([{"a": Itself("b")}], [{"a": "b"}]),
        (Other("a"), "a"),
        (Seven(1), 1),
        (Half(1.5), 1.5),
    ],
    ids=repr,
)
def test_without_annotation_rich_values_come_back_plain(value: Any, plain: Any) -> None:
    assert same(decode(encode(value)), plain)


def annotated(
    colour: Colour, level: Level, word: Word, home: Address, aliased: Aliased, point: Point, path: Path, pair: Pair
) -> None: ...


def test_with_annotation_rich_values_come_back_as_the_annotated_type() -> None:
    definition = TaskRegistry().add(annotated, TaskConfig())
    given = {
        "colour": Colour.MIX,
        "level": Level.HIGH,
        "word": Word.YES,
        "home": Address(street="a", since=date(2026, 1, 1)),
        "aliased": Aliased(address=Address(street="b"), tags={"x"}),
        "point": Point(1, datetime(2026, 1, 1, tzinfo=UTC)),
        "path": Path("a"),
        "pair": Pair(1, 2),
    }
    args, kwargs = definition.decode(definition.encode((), given))
    assert args == ()
    assert same(kwargs, given)


def mixed(number: int, when: datetime, ids: set[UUID], by_day: dict[date, list[Decimal]], more: Any = None) -> None: ...


@settings(max_examples=50, deadline=None)
@given(
    st.integers(),
    st.datetimes(timezones=st.timezones(), allow_imaginary=False),
    st.sets(st.uuids(), max_size=3),
    st.dictionaries(st.dates(), st.lists(st.decimals(allow_nan=False, allow_infinity=False), max_size=3), max_size=3),
)
def test_annotated_arguments_come_back_exactly(number: int, when: datetime, ids: set[UUID], by_day: Any) -> None:
    definition = TaskRegistry().add(mixed, TaskConfig())
    args, kwargs = definition.decode(definition.encode((number,), {"when": when, "ids": ids, "by_day": by_day}))
    assert same(args, (number,))
    assert same(kwargs, {"when": when, "ids": ids, "by_day": by_day})


# -- what has no stored form


class Secret:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def loop() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Secret(),
        print,
        Secret,
        range(3),
        iter([]),
        1j,
        bytearray(b"x"),
        memoryview(b"x"),
        ValueError("x"),
        ...,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_type_that_is_not_listed_is_refused_with_its_name_and_place(value: Any) -> None:
    with pytest.raises(CannotStore) as refused:
        encode({"outer": [0, value]})
    assert type(value).__qualname__ in str(refused.value)
    assert "['outer'][1]" in str(refused.value)


@pytest.mark.parametrize("value", [loop(), 10**5_000], ids=["a loop", "a number of more digits than Python reads"])
def test_a_value_that_could_not_be_read_back_is_refused(value: Any) -> None:
    with pytest.raises(CannotStore):
        encode(value)


def test_nesting_has_a_bound_that_both_sides_keep() -> None:
    def nested(levels: int) -> Any:
        value: Any = "deep"
        for level in range(levels):
            value = (value,) if level % 2 else [value]
        return value

    assert same(decode(encode(nested(DEEPEST))), nested(DEEPEST))
    with pytest.raises(CannotStore, match="nested deeper"):
        encode(nested(DEEPEST + 2))


@pytest.mark.parametrize(
    "text", ["", "{", "[1,2]", '{"a":1}', "null", "[[],[]]", "[{},[]]", '[[{"$datetime":"x"}],{}]']
)
def test_a_text_that_is_no_stored_call_is_an_error_and_not_a_call(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode_call(text)


def test_the_stored_form_of_plain_json_is_that_json() -> None:
    assert encode([1, "a", None, True, 1.5, {"k": [2]}]) == '[1,"a",null,true,1.5,{"k":[2]}]'


def one_argument(value: Any) -> None: ...


@pytest.mark.parametrize(
    "value",
    [object(), Secret(), 10**5_000, loop(), {"k": [print]}],
    ids=["object", "no repr", "huge", "loop", "inside"],
)
def test_an_argument_without_stored_form_is_an_argument_error_that_names_it(value: Any) -> None:
    definition = TaskRegistry().add(one_argument, TaskConfig())
    for args, kwargs in (((value,), {}), ((), {"value": value})):
        with pytest.raises(TaskArgumentError) as refused:
            definition.encode(args, kwargs)
        assert (refused.value.func_name, refused.value.parameter) == ("one_argument", "value")
        assert len(str(refused.value)) < 1_000
