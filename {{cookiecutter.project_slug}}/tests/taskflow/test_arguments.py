"""What a function gets is what a direct call, validated once, would have got: never a second validation or a guess."""

from __future__ import annotations

import itertools
import re
from abc import ABC
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum
from fractions import Fraction
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Interface
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    Base64Bytes,
    Base64Str,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    FutureDatetime,
    HttpUrl,
    Json,
    PostgresDsn,
    PrivateAttr,
    RootModel,
    Secret,
    SecretBytes,
    SecretStr,
    SkipValidation,
    computed_field,
    field_validator,
    model_validator,
    validate_call,
)
from typing_extensions import TypeAliasType, TypedDict, Unpack

from app.taskflow import TaskArgumentError, TaskManager
from app.taskflow.codec import encode_call
from app.taskflow.executors import Call
from app.taskflow.models import TaskConfig
from app.taskflow.registry import TaskDefinition, TaskRegistry

from .conftest import StartManager
from .helpers import eventually, make_context

pytestmark = pytest.mark.anyio
T = TypeVar("T")


def task(function: Any) -> TaskDefinition:
    return TaskRegistry().add(function, TaskConfig())


def taking(annotation: Any) -> TaskDefinition:
    """A task with one argument of that type."""

    def job(x: Any) -> None: ...

    job.__annotations__ = {"x": annotation}
    return task(job)


def arrived(definition: TaskDefinition, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return definition.decode(definition.encode(args, kwargs))


def brought(annotation: Any, value: Any) -> Any:
    """What a function with a parameter of that type gets, when a caller gave the value."""
    ((found,), _) = arrived(taking(annotation), value)
    return found


def direct(annotation: Any, value: Any) -> Any:
    def call(x: Any) -> Any:
        return x

    call.__annotations__ = {"x": annotation}
    return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(call)(value)


def same(one: Any, other: Any) -> bool:
    """Equal in value, type and hidden state, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, BaseModel):
        mine, theirs = one.__getstate__(), other.__getstate__()
        return all(same(mine[part], theirs[part]) for part in mine)
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(key, match) and same(one[key], other[match]) for key, match in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(same, one, other)) and same(own(one), own(other))
    if hasattr(one, "__dict__") and not isinstance(one, Enum | Path | re.Pattern):
        return same(sorted(vars(one).items()), sorted(vars(other).items())) and one == other
    return bool(one == other)


def own(value: Any) -> Any:
    return getattr(value, "__dict__", None)


# -- validated once


class Account(BaseModel):
    password: str
    history: list[str] = []

    @field_validator("password")
    @classmethod
    def hashed(cls, value: str) -> str:
        return f"hash({value})"


class Suspend(BaseModel):
    user: str


class Delete(BaseModel):
    user: str


class Colour(Enum):
    RED = "red"
    MIX = (1, 2)


class Level(IntEnum):
    LOW = 1
    HIGH = 3


class Word(StrEnum):
    YES = "yes"


class Rights(Flag):
    READ = 1
    WRITE = 2


class Odd(Enum):
    CALL = object()


class Paint(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)
    colour: Colour
    level: Level = Level.LOW


class Names(RootModel[list[str]]): ...


class Options(RootModel[dict[str, Any]]): ...


class Aliased(BaseModel):
    one: int = Field(alias="uno")
    two: int = Field(2, validation_alias="due")
    three: int = Field(3, serialization_alias="tre")
    four: int = Field(4, validation_alias=AliasChoices("quattro", AliasPath("numbers", 0)))


class ByName(BaseModel):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=False)
    one: int = Field(alias="uno")


class Common(BaseModel):
    url: HttpUrl
    dsn: PostgresDsn
    secret: SecretStr
    key: SecretBytes
    wage: Secret[Decimal]
    ip: IPv4Address
    net: IPv4Network
    own: IPv6Interface
    amount: Decimal
    size: ByteSize
    data: Base64Bytes
    payload: Json[dict[str, int]]
    pattern: re.Pattern[str]
    part: Fraction
    last: deque[int]


COMMON = Common.model_validate(
    {
        "url": "https://user:p@example.org/a?b=c#d",
        "dsn": "postgresql://u:p@one:1,two:2/db",
        "secret": "s",
        "key": b"\0",
        "wage": "1.50",
        "ip": "10.0.0.1",
        "net": "10.0.0.0/8",
        "own": "fe80::1/64",
        "amount": "1.10",
        "size": "1MiB",
        "data": "aGVsbG8=",
        "payload": '{"a": 1}',
        "pattern": "a+",
        "part": "1/3",
        "last": [1, 2],
    }
)


class Page(BaseModel, Generic[T]):
    items: list[T]
    following: Page[T] | None = None


class Hidden(BaseModel):
    x: int
    _seen: dict[int, Suspend] = PrivateAttr(default_factory=dict)
    _lock: Any = PrivateAttr(default_factory=object)

    def see(self) -> Hidden:
        self._seen[self.x] = Suspend(user="u")
        return self


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    name: str


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class Square(BaseModel):
    side: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def area(self) -> int:
        return self.side**2

    @cached_property
    def slow(self) -> int:
        return self.side

    def used(self) -> Square:
        assert self.slow
        return self


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    x: int


class Typed(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Suspend]


class Cube(Square):
    depth: int


class Checked(BaseModel):
    model_config = ConfigDict(revalidate_instances="always")
    total: int

    @model_validator(mode="after")
    def doubled(self) -> Checked:
        self.__dict__["total"] *= 2
        return self


class Movie(TypedDict):
    title: str
    by: Suspend


class Pair(NamedTuple):
    left: Suspend
    right: int = 3


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    at: Colour


@dataclass
class Order:
    lines: list[Point]
    total: int = field(init=False)
    note: str = "n"

    def __post_init__(self) -> None:
        self.total = len(self.lines)
        self.beside = {"t": (self.total,)}


@pydantic.dataclasses.dataclass
class Strict:
    n: Annotated[int, BeforeValidator(lambda n: n + 1)]
    who: Delete | Suspend


class Animal(ABC):  # noqa: B024
    """A class that pydantic knows nothing of but its name."""


@dataclass
class Fish(Animal):
    fins: int


@dataclass(slots=True)
class Base:
    x: int


@dataclass(slots=True)
class Slotted(Base):
    """The decorator made this class twice, and the first one may still be there."""

    y: int = 2


class UserId(str):
    """A plain type's subclass."""


class Amounts(list[int]):
    currency = "EUR"


Number = NewType("Number", int)
Who = TypeAliasType("Who", Delete | Suspend)

ZOO: list[tuple[Any, Any]] = [
    (Annotated[int, BeforeValidator(lambda euros: euros * 100)], 5),
    (Annotated[str, AfterValidator(lambda text: f"<{text}>")], "a"),
    (Account, Account(password="p")),
    (Account, {"password": "p"}),
    (list[Account], [{"password": "p"}, Account(password="q", history=["r"])]),
    (Checked, Checked(total=1)),
    (Delete | Suspend, Suspend(user="x")),
    (Delete | Suspend, Delete(user="x")),
    (dict[str, Delete | Suspend], {"a": Suspend(user="x"), "b": Delete(user="y")}),
    (Names, Names(["a"])),
    (Options, Options({"a": 1, "$set": [2]})),
    (Aliased, Aliased.model_validate({"uno": 1, "due": 5, "quattro": 6})),
    (Aliased, {"uno": 1, "numbers": [7]}),
    (ByName, ByName.model_validate({"one": 1})),
    (Common, COMMON),
    (HttpUrl, "https://example.org"),
    (SecretStr, "s"),
    (IPv4Address, "10.0.0.1"),
    (ByteSize, "2KiB"),
    (Json[list[int]], "[1]"),
    (Base64Str, "aGVsbG8="),
    (FutureDatetime, datetime(2999, 1, 1, tzinfo=UTC)),
    (Paint, Paint(colour=Colour.MIX, level=Level.HIGH)),
    (Colour, "red"),
    (Level, 3),
    (Word, Word.YES),
    (dict[Word, Level], {"yes": 1}),
    (Rights, Rights.READ | Rights.WRITE),
    (Odd, Odd.CALL),
    (Literal[Colour.RED], Colour.RED),
    (Page[Suspend], Page[Suspend](items=[Suspend(user="a")], following=Page[Suspend](items=[]))),
    (Page[Page[int]], {"items": [{"items": ["1"]}]}),
    (Annotated[Cat | Dog, Field(discriminator="kind")], {"kind": "dog", "name": "d"}),
    (Square, Square(side=3)),
    (Square, Cube(side=3, depth=4)),
    (BaseModel, Cube(side=3, depth=4)),
    (Open, Open.model_validate({"x": 1, "y": [2], "z": None})),
    (Open, Open.model_validate({"x": 1, "$dict": 2})),
    (Typed, Typed.model_validate({"a": {"user": "u"}})),
    (Movie, {"title": "t", "by": {"user": "u"}}),
    (Pair, (Suspend(user="u"), "4")),
    (Pair, {"left": {"user": "u"}}),
    (Point, Point(1, Colour.RED)),
    (Order, Order([Point(1, Colour.MIX)])),
    (Strict, {"n": 1, "who": Suspend(user="s")}),
    (Strict, Strict(1, Suspend(user="s"))),
    (UserId, UserId("u")),
    (Number, "3"),
    (Who, Suspend(user="w")),
    (list[Who], [Suspend(user="w")]),
    (set[Point], {Point(1, Colour.RED)}),
    (dict[Point, frozenset[Paint]], {Point(1, Colour.RED): frozenset({Paint(colour=Colour.RED)})}),
    (OrderedDict[str, int], {"b": 1, "a": 2}),
    (defaultdict[str, list[int]], {"a": [1]}),
    (Counter[str], {"a": 2}),
    (deque[Suspend], [Suspend(user="a")]),
    (PurePosixPath, PurePosixPath("/a")),
    (Path, "/a"),
    (SkipValidation[Suspend], Suspend(user="s")),
    (tuple[Colour, ...], ["red"]),
    (type(None) | Account, None),
    (list["Suspend"], [Suspend(user="a")]),
    (Annotated[date, AfterValidator(lambda day: day + timedelta(days=1))], date(2026, 1, 1)),
    (UUID, str(UUID(int=1))),
    (ZoneInfo, "Europe/Berlin"),
]


@pytest.mark.parametrize(
    ("annotation", "value"), ZOO, ids=[f"{n}-{type(given).__name__}" for n, (_, given) in enumerate(ZOO)]
)
def test_a_function_gets_what_a_direct_call_would_have_got(annotation: Any, value: Any) -> None:
    assert same(brought(annotation, value), direct(annotation, value))


wholes = st.sampled_from(ZOO)


@settings(max_examples=150, deadline=None)
@given(st.lists(wholes, min_size=1, max_size=4), st.lists(wholes, max_size=3))
def test_any_signature_over_the_zoo_gets_what_a_direct_call_would_have_got(
    positional: list[tuple[Any, Any]], named: list[tuple[Any, Any]]
) -> None:
    names = [f"p{n}" for n in range(len(positional))]
    options = [f"o{n}" for n in range(len(named))]
    space: dict[str, Any] = {"__name__": __name__}
    exec(f"def job({', '.join([*names, '*', *options] if options else names)}): return dict(locals())", space)
    job = space["job"]
    job.__annotations__ = dict(zip([*names, *options], [kind for kind, _ in [*positional, *named]], strict=True))
    args = [value for _, value in positional]
    kwargs = dict(zip(options, [value for _, value in named], strict=True))
    found, given_by_name = arrived(task(job), *args, **kwargs)
    expected = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(job)(*args, **kwargs)
    assert same(job(*found, **given_by_name), expected)


def test_a_private_attribute_without_stored_form_begins_again_from_its_default() -> None:
    given = Hidden(x=1).see()
    found = brought(Hidden, given)
    assert found._seen == {1: Suspend(user="u")}
    assert type(found._lock) is object


class Connected(BaseModel):
    x: int
    _client: Any = None

    def model_post_init(self, context: Any) -> None:
        self._client = object() if self.x else "none"


def test_a_private_attribute_that_the_model_itself_fills_arrives_or_is_refused() -> None:
    assert brought(Connected, Connected(x=0))._client == "none"
    with pytest.raises(TaskArgumentError, match="object has no stored form"):
        taking(Connected).encode((Connected(x=1),), {})


Kind = tuple[Any, st.SearchStrategy[Any]]
"""An annotation, and values for it."""
numbers = itertools.count()
SIMPLE: list[Kind] = [
    (int, st.integers()),
    (str, st.text()),
    (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (date, st.dates()),
    (Colour, st.sampled_from(Colour)),
    (Rights, st.builds(lambda a, b: a | b, st.sampled_from(Rights), st.sampled_from(Rights))),
    (SecretStr, st.text().map(SecretStr)),
    (Delete | Suspend, st.text().flatmap(lambda user: st.sampled_from([Delete(user=user), Suspend(user=user)]))),
    (Account, st.builds(Account, password=st.text())),
    (Names, st.lists(st.text()).map(Names)),
    (Open, st.dictionaries(st.text(), st.integers()).map(lambda extra: Open.model_validate({"$": 1, **extra, "x": 2}))),
    (Point, st.builds(Point, st.integers(), st.sampled_from(Colour))),
    (Base, st.builds(Slotted, st.integers(), st.integers())),
    (Pair, st.builds(Pair, st.builds(Suspend, user=st.text()), st.integers())),
]


def containers(inner: st.SearchStrategy[Kind]) -> st.SearchStrategy[Kind]:
    def made(kinds: list[Kind], shape: str) -> Kind:
        (kind, values), fields = kinds[0], {f"f{n}": kind for n, (kind, _) in enumerate(kinds)}
        by_field = {name: values for name, (_, values) in zip(fields, kinds, strict=True)}
        match shape:
            case "list":
                return list[kind], st.lists(values, max_size=3)  # type: ignore[valid-type]
            case "dict":
                return dict[str, kind], st.dictionaries(st.text(), values, max_size=3)  # type: ignore[valid-type]
            case "tuple":
                return tuple[tuple(fields.values())], st.tuples(*by_field.values())  # type: ignore[misc]
            case "optional":
                return kind | None, st.none() | values
            case "page":
                page = Page[kind]  # type: ignore[valid-type]
                return page, st.builds(page, items=st.lists(values, max_size=2))
            case "dataclass":
                data = make_dataclass(f"Data{next(numbers)}", fields.items(), frozen=True, slots=True)
                return data, st.builds(data, **by_field)
            case _:
                model: Any = later(f"Model{next(numbers)}", **{name: (kind,) for name, kind in fields.items()})
                return model, st.builds(model, **by_field)

    shapes = st.sampled_from(["list", "dict", "tuple", "optional", "page", "dataclass", "model"])
    return st.builds(made, st.lists(inner, min_size=1, max_size=3), shapes)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.recursive(st.sampled_from(SIMPLE), containers, max_leaves=5))
def test_any_type_made_of_others_arrives_as_it_left(data: st.DataObject, kind: Kind) -> None:
    annotation, values = kind
    definition = taking(annotation)
    for value in data.draw(st.lists(values, min_size=1, max_size=3)):
        ((found,), _) = definition.decode(definition.encode((value,), {}))
        assert same(found, direct(annotation, value))


def test_what_a_cached_property_has_kept_is_found_anew() -> None:
    assert brought(Square, Square(side=3).used()).__dict__ == {"side": 3}


@dataclass
class Laden:
    x: int

    def __post_init__(self) -> None:
        self.load = [Suspend(user="b")]


def test_what_no_annotation_speaks_of_arrives_whole_or_is_refused() -> None:
    with pytest.raises(TaskArgumentError, match=r"Suspend is no class of its annotations"):
        taking(Laden).encode((Laden(1),), {})
    assert brought(Laden | Suspend, Laden(1)).load == [Suspend(user="b")]


def test_a_model_made_without_a_field_is_refused_at_the_caller() -> None:
    with pytest.raises(TaskArgumentError, match="no value for its field 'user'"):
        taking(Suspend).encode((Suspend.model_construct(),), {})


def test_a_subclass_arrives_as_what_it_is_whatever_its_base_is() -> None:
    assert same(brought(Animal, Fish(3)), Fish(3))
    assert same(brought(Base, Slotted(1)), Slotted(1))
    with pytest.raises(TaskArgumentError, match="has no stored form"):
        taking(Animal).encode((Animal(),), {})


def test_an_iterable_arrives_as_a_list_of_what_was_validated() -> None:
    assert brought(Iterable[int], ["1", 2]) == [1, 2]
    assert brought(Iterable[Colour], (name for name in ["red"])) == [Colour.RED]
    with pytest.raises(TaskArgumentError, match="valid integer"):
        taking(Iterable[int]).encode((["1", "x"],), {})


# -- signatures


def mixed(a: int, b: Suspend, /, c: Colour = Colour.RED, *rest: Suspend, d: Delete | Suspend, **more: Pair) -> Any:
    return a, b, c, rest, d, more


def test_every_kind_of_parameter_takes_what_the_caller_gave_it() -> None:
    one, two = Suspend(user="1"), Delete(user="2")
    args, kwargs = arrived(task(mixed), "1", one, "red", {"user": "r"}, d=two, e=(one, "5"))
    assert mixed(*args, **kwargs) == (1, one, Colour.RED, (Suspend(user="r"),), two, {"e": Pair(one, 5)})
    assert arrived(task(mixed), 1, one, d=two) == ((1, one), {"d": two})


def aliased(
    user: Annotated[int, Field(alias="userId")],
    place: int = Field(3, validation_alias=AliasChoices("p", "q")),
    kind: Annotated[Colour, Field(default=Colour.RED)] = Colour.MIX,
    size: int = Field(default_factory=lambda: 7),
) -> Any:
    return user, place, kind, size


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((), {"userId": "1"}, (1, 3, Colour.MIX, 7)),
        ((), {"user": 1, "q": "4", "kind": "red"}, (1, 4, Colour.RED, 7)),
        (("1", 2), {"size": 9}, (1, 2, Colour.MIX, 9)),
        ((), {"userId": 1, "place": 5}, (1, 5, Colour.MIX, 7)),
    ],
)
def test_a_parameter_with_an_alias_or_a_field_is_called_by_its_name_with_its_default(
    args: Any, kwargs: Any, expected: Any
) -> None:
    found, named = arrived(task(aliased), *args, **kwargs)
    assert aliased(*found, **named) == expected


def field_only(x: int = Field(5), /) -> int:
    return x


def spread(**kwargs: Unpack[Movie]) -> Any:
    return kwargs


def test_positional_fields_and_spread_dicts_arrive() -> None:
    args, kwargs = arrived(task(field_only))
    assert field_only(*args, **kwargs) == 5
    args, kwargs = arrived(task(spread), title="t", by={"user": "u"})
    assert spread(*args, **kwargs) == {"title": "t", "by": Suspend(user="u")}


def unannotated(x, y=None):  # type: ignore[no-untyped-def]
    return x


def test_without_annotation_arguments_are_plain_data() -> None:
    given = (
        Names(["a"]),
        Aliased.model_validate({"uno": 1}),
        Colour.RED,
        Point(1, Colour.RED),
        Pair(Suspend(user="u")),
    )
    assert arrived(task(unannotated), list(given))[0][0] == [
        ["a"],
        {"uno": 1, "due": 2, "three": 3, "quattro": 4},
        "red",
        {"x": 1, "at": "red"},
        ({"user": "u"}, 3),
    ]
    with pytest.raises(TaskArgumentError, match="set"):
        task(unannotated).encode(({Paint(colour=Colour.RED)},), {})
    with pytest.raises(TaskArgumentError, match="as a dict key"):
        task(unannotated).encode(({Point(1, Colour.RED): 1},), {})


# -- through the whole system

validations: list[Any] = []


def seen(value: Any) -> Any:
    validations.append(value)
    return value


async def test_a_task_that_is_started_three_times_is_validated_once(start_manager: StartManager) -> None:
    got = []

    def flaky(x: Annotated[int, BeforeValidator(seen)], hook: Common) -> Any:
        got.append((x, hook))
        if len(got) < 3:
            raise RuntimeError("again")
        return hook

    manager = await start_manager(lambda manager: manager.task(retries=2)(flaky))
    validations.clear()
    returned = await manager.result(await manager.enqueue(flaky, "7", COMMON), timeout=30)
    assert validations == ["7"]
    assert [x for x, _ in got] == [7, 7, 7]
    assert all(same(hook, COMMON) for _, hook in got)
    assert returned == dict(COMMON)  # nobody says what a result is: it comes back plain


async def test_a_schedule_hands_on_what_was_validated_when_it_was_written(start_manager: StartManager) -> None:
    got = []

    def report(x: Annotated[int, BeforeValidator(lambda x: x * 100)], order: Delete | Suspend) -> None:
        got.append((x, order))

    def define(manager: TaskManager) -> None:
        manager.schedule(every=3600, run_on_startup=True, args=(5,), kwargs={"order": Suspend(user="s")})(report)

    await start_manager(define)
    await eventually(lambda: got)
    assert got == [(500, Suspend(user="s"))]


# -- what was stored before


def test_a_row_of_before_is_checked_when_it_is_read() -> None:
    definition = task(mixed)
    text = encode_call((1, {"user": "b"}, "red"), {"d": Delete(user="2")})
    assert text == '[[1,{"user":"b"},"red"],{"d":{"user":"2"}}]'
    assert definition.decode(text) == ((1, Suspend(user="b"), Colour.RED), {"d": Delete(user="2")})
    with pytest.raises(TaskArgumentError):
        definition.decode("[[],{}]")


# -- classes and functions that changed meanwhile


def later(name: str, base: Any = BaseModel, **fields: Any) -> Any:
    """The class of that name, as another version of the program has it."""
    made: Any = type(
        name,
        (base,),
        {"__module__": __name__, "__annotations__": {k: v[0] for k, v in fields.items()}}
        | {k: v[1] for k, v in fields.items() if len(v) > 1},
    )
    return made


def test_a_new_field_gets_its_default_and_a_field_that_went_is_left_out() -> None:
    stored = taking(later("Ticket", a=(int,), gone=(str, "g"))).encode(({"a": 1},), {})
    new = later("Ticket", a=(int,), b=(list[int], [2]), c=(str, Field(default_factory=lambda: "c")))
    ((found,), _) = taking(new).decode(stored)
    assert type(found) is new
    assert found.model_dump() == {"a": 1, "b": [2], "c": "c"}
    assert found.model_fields_set == {"a"}


@pytest.mark.parametrize(
    "new",
    [
        later("Ticket", a=(int,), needed=(int,)),
        later("Ticket", b=(int,)),
        type("Ticket", (BaseModel,), {"__module__": __name__, "model_config": ConfigDict(extra="forbid")}),
        later("Bill", a=(int,)),
        dataclass(later("Ticket", object, a=(int,))),
        type("Ticket", (list,), {"__module__": __name__}),
        type("Ticket", (), {"__module__": __name__}),
        int,
    ],
)
def test_what_no_longer_fits_its_class_cannot_be_read(new: Any) -> None:
    stored = taking(later("Ticket", a=(int,))).encode(({"a": 1},), {})
    with pytest.raises(Exception, match="stored arguments cannot be read") as refused:
        Call(taking(new), stored, make_context()).bound()
    assert type(refused.value).__name__ == "UnreadableCall"


def test_a_class_that_moved_to_another_module_is_found() -> None:
    stored = taking(later("Ticket", a=(int,))).encode(({"a": 1},), {}).replace(__name__, "elsewhere")
    assert type(taking(later("Ticket", a=(int,))).decode(stored)[0][0]).__name__ == "Ticket"


def test_dataclasses_and_named_tuples_take_new_fields_with_defaults() -> None:
    old = dataclass(later("Spot", object, a=(int,)))
    new = dataclass(later("Spot", object, a=(int,), b=(int, 2)))
    assert taking(new).decode(taking(old).encode((old(1),), {}))[0][0] == new(1)

    pair: Any = namedtuple("Trio", "a")  # type: ignore[name-match]
    triple: Any = namedtuple("Trio", "a b", defaults=[2])  # type: ignore[name-match]
    assert taking(triple).decode(taking(pair).encode((pair(1),), {}))[0][0] == triple(1, 2)


def test_nothing_is_made_that_the_annotations_do_not_reach() -> None:
    stored = taking(Suspend).encode((Suspend(user="x"),), {})
    for name in ("os:system", "subprocess:Popen", f"{__name__}:Delete", "builtins:object"):
        with pytest.raises(ValueError, match="no class of its arguments"):
            taking(Suspend).decode(stored.replace(f"{__name__}:Suspend", name))


def test_a_function_whose_signature_changed_cannot_be_called_with_what_does_not_fit() -> None:
    def job(a: int, b: int) -> None: ...

    stored = task(job).encode((1,), {"b": 2})

    def job(a: int, c: int) -> None: ...  # type: ignore[no-redef]

    with pytest.raises(Exception, match=r"unexpected keyword argument 'b'|missing a required argument: 'c'"):
        Call(task(job), stored, make_context()).bound()

    def job(a: int, b: int, c: int = 3) -> None: ...  # type: ignore[no-redef]

    assert task(job).decode(stored) == ((1,), {"b": 2})


def test_two_classes_of_one_name_are_not_mistaken_for_one_another() -> None:
    one, other = later("Ticket", a=(int,)), later("Ticket", a=(int,))
    with pytest.raises(TaskArgumentError, match="two classes are called"):
        taking(one | other).encode((other(a=1),), {})
