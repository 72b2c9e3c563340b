"""Instances of the application's own classes, to their stored form and back as what they were.

Owns which classes a function's annotations reach, and how one of their instances is taken apart and put together again.
Nothing is validated on the way: what was validated when the task was added is what the function gets. Nothing is
imported by a name that is stored: only classes that the annotations reach, or subclasses of them that this process
knows by then, are made. `codec` calls `write` for a value that is none of its own types, `read` for what that wrote.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import cached_property, partial
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, NewType, TypeVar, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typing_extensions import TypeAliasType, get_type_hints, is_typeddict

from . import codec
from .codec import EXACT, LIBRARY, PLAIN, SECRETS, CannotStore, Write

UNTOLD = frozenset(("metadata", "serialization", "default", "default_factory", "function"))
"""Parts of a pydantic schema that name no class of a value."""
FACTORIES: Mapping[str, Any] = {kind.__name__: kind for kind in (list, dict, set, int, float, str, bool, bytes, tuple)}
"""What the default of a defaultdict may be."""
FILLED = (OrderedDict, Counter, defaultdict, dict, list, set, deque)
"""Types whose subclasses are made empty, then filled."""
MADE = (str, bytes, float, int, tuple, frozenset, Decimal)
"""Types whose subclasses are made of a plain value."""
READ = (PurePath, *LIBRARY)
"""Types whose subclasses are made of a text."""
HIDDEN: Any = tuple(SECRETS.values())
VARIANTS = (*FILLED, *MADE, *READ, *HIDDEN, datetime)
NOTHING: Mapping[str, Any] = MappingProxyType({})
put = object.__setattr__
"""Past what a class makes of assignments: frozen ones, those that validate."""
MOMENTS = (datetime, date, time, timedelta)
PLAIN_TYPES = frozenset(
    (*FILLED[3:], *MADE, *READ, *HIDDEN, *MOMENTS, UUID, Path, type(Path()), bool, type(None), object)
)
"""What `codec` stores by itself."""


class Changed(ValueError):
    """What is stored does not fit the class of today."""


Way = tuple[str, str, Callable[[str, Any, Write], list[Any]]]
"""Tag, name and writer of a class's instances."""


class Objects:
    """The classes that one function's annotations reach, by name."""

    def __init__(self, reached: Iterable[type]) -> None:
        self._roots = frozenset(reached)
        self._by_name: dict[str, type | None] = {}
        self._how: dict[type, Way] = {}
        self._makers: dict[tuple[str, str], Callable[..., Any]] = {}
        for kind in self._roots:
            name = name_of(kind)
            self._by_name[name] = None if name in self._by_name else kind  # two of one name: neither

    # -- taken apart

    def write(self, value: Any, write: Write) -> Any | None:
        """The tagged form of an instance of a reached class; None for any other value. Raises CannotStore."""
        kind = type(value)
        if kind not in self._how and self._roots.isdisjoint(kind.__mro__):
            return None
        tag, name, writer = self._way_of(kind)
        return {tag: writer(name, value, write)}

    def strictly(self) -> codec.Objects:
        return Strictly(self)

    def _way_of(self, kind: type) -> Way:
        if (known := self._how.get(kind)) is not None:
            return known
        name = name_of(kind)
        with suppress(Changed):
            if self.named(name) is kind:
                self._how[kind] = found = way_of(kind, name)
                return found
        raise CannotStore(f"two classes are called {name}")

    # -- put together

    def read(self, tag: str, stored: Any) -> Any:
        """The instance that `write` stored under this tag. Raises Changed."""
        name, *state = stored
        make = self._makers.get((tag, name)) or self._maker(tag, name)
        try:
            return make(*state)
        except (AttributeError, LookupError) as error:
            raise Changed(f"{name}: {error}") from error

    def _maker(self, tag: str, name: str) -> Callable[..., Any]:
        kind = self.named(name)
        if self._way_of(kind)[0] != tag:
            raise Changed(f"{name} is another kind of class now")
        make = model_maker(kind) if tag == "$model" else partial(MAKERS[tag], kind)
        self._makers[tag, name] = make
        return make

    def named(self, name: str) -> type:
        """A reached class, or a subclass of one; also one that has moved to another module. Raises Changed."""
        found = self._by_name.get(name)
        if found is not None:
            return found
        if name not in self._by_name:
            last = name.partition(":")[2]
            same = {kind for kind in below(self._roots) if name_of(kind) == name} or {
                kind for kind in self._roots if kind.__qualname__ == last
            }
            same = {kind for kind in same if is_current(kind)} or same
            if len(same) == 1:
                self._by_name[name] = found = same.pop()
                return found
        raise Changed(f"{name} is no class of its arguments")


class Strictly:
    """The same, for what no annotation speaks of and nobody would expect to come back plain: there an instance of a
    class that is not reached cannot be stored."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def write(self, value: Any, write: Write) -> Any | None:
        found = self._objects.write(value, write)
        if found is None and (isinstance(value, BaseModel | Enum) or dataclasses.is_dataclass(value)):
            raise CannotStore(f"{name_of(type(value))} is no class of its annotations")
        return found

    def strictly(self) -> Strictly:
        return self

    def read(self, tag: str, stored: Any) -> Any:
        return self._objects.read(tag, stored)


def name_of(kind: type) -> str:
    """A script is `__main__`, in its worker processes too."""
    return f"{'__main__' if kind.__module__ == '__mp_main__' else kind.__module__}:{kind.__qualname__}"


def is_current(kind: type) -> bool:
    """True for what a class's module has under its name: a decorator may have made it anew."""
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is kind


def below(kinds: Iterable[type]) -> Iterator[type]:
    """The classes, and all that were derived from them."""
    waiting, seen = list(kinds), set[type]()
    while waiting:
        kind = waiting.pop()
        if kind not in seen:
            seen.add(kind)
            yield kind
            waiting += type.__subclasses__(kind)


def way_of(kind: type, name: str) -> Way:
    if issubclass(kind, BaseModel):
        return ("$row", name, write_row) if is_row(kind) else ("$model", name, write_model)
    if issubclass(kind, Enum):
        return "$enum", name, write_enum
    if dataclasses.is_dataclass(kind):
        return "$data", name, write_data
    if is_named_tuple(kind):
        return "$named", name, write_named
    if issubclass(kind, VARIANTS):
        return "$of", name, write_variant
    raise CannotStore(f"{name} has no stored form")


# -- which classes there are


def reached(*start: Any) -> set[type]:
    """The classes that values of these annotations, and of these pydantic schemas, may have.

    A schema says what pydantic made of the annotations; the hints say what it passes by: private attributes, what is
    not to be validated, and subclasses of plain types.
    """
    waiting, seen, found = list(start), set[int](), set[type]()
    kept = []  # so that no id is seen twice for two things
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        kept.append(item)
        if isinstance(item, dict):
            waiting += [part for key, part in item.items() if key not in UNTOLD]
        elif isinstance(item, list | tuple):
            waiting += item
        elif inner := get_args(item):
            waiting += [*inner, get_origin(item)]
        elif isinstance(item, type):
            if item not in PLAIN_TYPES and not is_typeddict(item):
                found.add(item)
            if is_told(item):
                waiting += hints_of(item)
        else:
            waiting += named_by(item)
    return found


def named_by(item: Any) -> Iterable[Any]:
    """What an alias, a NewType, a TypeVar or a Literal's member stands for."""
    if isinstance(item, TypeAliasType) or type(item).__name__ == "TypeAliasType":
        return [item.__value__]
    if isinstance(item, NewType):
        return [item.__supertype__]
    if isinstance(item, Enum):  # of a Literal
        return [type(item)]
    if isinstance(item, TypeVar):
        return [item.__bound__, *item.__constraints__]
    return []


def hints_of(annotated: Any) -> list[Any]:
    """What the annotations of a class or function say, as far as they can be resolved here."""
    hints: list[Any] = [field.annotation for field in getattr(annotated, "__pydantic_fields__", {}).values()]
    with suppress(Exception):  # names that only their author's scope knows
        hints += getattr(annotated, "__annotations__", {}).values()
        hints += get_type_hints(annotated, include_extras=True).values()
    return hints


def is_told(kind: type) -> bool:
    """True for a class whose annotations say what its instances hold."""
    return issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind) or is_typeddict(kind) or is_named_tuple(kind)


def is_named_tuple(kind: type) -> bool:
    return hasattr(kind, "_fields") and tuple in kind.__mro__


# -- models


def write_model(name: str, model: BaseModel, write: Write) -> list[Any]:
    """`[class, fields, names of those that were set, extra fields, private attributes]`, without what says nothing."""
    known = type(model).__pydantic_fields__
    state = model.__dict__
    if state.keys() != known.keys():  # a cached property; a model that was made without a field
        if missing := known.keys() - state.keys():
            raise CannotStore(f"{name} has no value for its field {min(missing)!r}")
        state = {field: state[field] for field in known}
    fields = {field: value if type(value) in PLAIN else write(value, f".{field}") for field, value in state.items()}
    extra = model.__pydantic_extra__
    given = model.__pydantic_fields_set__
    if not extra and not model.__pydantic_private__:
        return [name, fields] if len(given) == len(known) else [name, fields, sorted(given)]
    return [name, fields, sorted(given), write_extra(extra, write), write_private(model, write)]


def write_extra(extra: dict[str, Any] | None, write: Write) -> Any:
    """Extra fields may have any name, a tag's too: that is why they are written whole."""
    return write(extra, "") if extra else None


def write_private(model: BaseModel, write: Write) -> dict[str, Any]:
    """Private attributes; one that has no stored form begins again from its default, if nobody else gave it a value."""
    written = {}
    defaults = type(model).__private_attributes__
    for name, value in (model.__getstate__()["__pydantic_private__"] or {}).items():
        try:
            written[name] = write(value, f".{name}", True)
        except CannotStore:
            if not has_default(defaults.get(name)) or has_post_init(type(model)):
                raise
    return written


def has_post_init(kind: type[BaseModel]) -> bool:
    """True for a model with a `model_post_init` of its own; pydantic gives one to those with private attributes."""
    return kind.model_post_init.__name__ != "init_private_attributes"


def has_default(field: Any) -> bool:
    return field is not None and (field.default_factory is not None or field.default is not PydanticUndefined)


def model_maker(kind: type[BaseModel]) -> Callable[..., BaseModel]:
    """Makes instances of one class: lists have thousands of them."""
    known = kind.__pydantic_fields__.keys()
    policy = kind.model_config.get("extra")
    has_more, has_private, new = not kind.__pydantic_root_model__, bool(kind.__private_attributes__), kind.__new__

    def make(
        fields: dict[str, Any],
        given: list[str] | None = None,
        extra: dict[str, Any] | None = None,
        private: Mapping[str, Any] = NOTHING,
    ) -> BaseModel:
        named = set(fields if given is None else given)
        if fields.keys() != known:
            fields, gone = fitted(kind, fields)
            if gone and policy == "forbid":
                raise Changed(f"{name_of(kind)} has no field {min(gone)!r}")
            named -= gone.keys()
        model = new(kind)
        put(model, "__dict__", fields)
        put(model, "__pydantic_fields_set__", named)
        if has_more:
            put(model, "__pydantic_extra__", {} if extra is None and policy == "allow" else extra)
            put(model, "__pydantic_private__", private_of(kind, private, fields) if has_private else None)
        return model

    return make


def private_of(kind: type[BaseModel], stored: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    values = dict(stored)
    for name, field in kind.__private_attributes__.items():
        if name not in stored and has_default(field):
            values[name] = field.get_default(call_default_factory=True, validated_data=fields)
    return values


def fitted(kind: type[BaseModel], fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that the class has today, new ones with their defaults; and those that it has no more. Raises Changed
    for a new field without default."""
    known = kind.__pydantic_fields__
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name in fields:
            values[name] = fields[name]
        elif field.is_required():
            raise Changed(f"{name_of(kind)} has a field {name!r} now, which has no default")
        else:
            values[name] = field.get_default(call_default_factory=True, validated_data=values)
    return values, {name: value for name, value in fields.items() if name not in known}


# -- rows of the application's own tables


def is_row(kind: type) -> bool:
    return hasattr(kind, "__mapper__")


def write_row(name: str, row: Any, write: Write) -> list[Any]:
    """`[class, columns, whether it is in the database, what was set]`; what it is related to stays behind."""
    from sqlalchemy import inspect  # the application has imported it: the row's class needs it

    columns = {}
    for field in type(row).__pydantic_fields__:
        try:
            columns[field] = write(getattr(row, field), f".{field}")
        except CannotStore:
            raise
        except Exception as error:  # the database, and user code
            raise CannotStore(
                f"{field!r} of this {type(row).__name__} cannot be loaded ({type(error).__name__}): refresh the row "
                "before its session ends, or pass its key"
            ) from error
    return [name, columns, inspect(row).key is not None, sorted(row.__pydantic_fields_set__)]


def make_row(kind: Any, columns: dict[str, Any], stored: bool, said: list[str]) -> Any:
    """A row that is in the database comes back detached: `session.add` and `merge` take it, and what it is related to
    is not read as nothing."""
    from sqlalchemy.orm import make_transient_to_detached
    from sqlalchemy.orm.attributes import manager_of_class, set_committed_value

    values, _gone = fitted(kind, columns)
    row = manager_of_class(kind).new_instance()
    for name, value in values.items():
        set_committed_value(row, name, value)
    if stored:
        make_transient_to_detached(row)
    put(row, "__pydantic_fields_set__", set(said))
    return row


# -- dataclasses, enums, named tuples, subclasses of plain types


def write_data(name: str, value: Any, write: Write) -> list[Any]:
    fields, beside = state_of(value)
    state = {field: write(item, f".{field}") for field, item in fields.items()}
    return [name, state | {field: write(item, f".{field}", True) for field, item in beside.items()}]


def state_of(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields, and what the dataclass's own code has put beside them."""
    kind = type(value)
    names = [field.name for field in dataclasses.fields(value)]
    fields = {name: getattr(value, name) for name in names if hasattr(value, name)}
    beside = {name: item for name, item in getattr(value, "__dict__", {}).items() if name not in fields}
    return fields, {k: v for k, v in beside.items() if not isinstance(getattr(kind, k, None), cached_property)}


def make_data(kind: type, state: dict[str, Any]) -> Any:
    made: Any = object.__new__(kind)
    for field in dataclasses.fields(kind):
        if field.name not in state:
            state[field.name] = default_of(kind, field)
    for name, value in state.items():
        put(made, name, value)
    return made


def default_of(kind: type, field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if field.default is not dataclasses.MISSING:
        return field.default
    raise Changed(f"{name_of(kind)} has a field {field.name!r} now, which has no default")


def write_enum(name: str, member: Enum, write: Write) -> list[Any]:
    """`[class, name, value]`: the value is for readers that do not have the class, and for a combination of flags."""
    known = type(member).__members__.get(member.name) is member if member.name else False
    try:
        value = write(member.value, ".value")
    except CannotStore:
        if not known:
            raise
        return [name, member.name]
    return [name, member.name if known else None, value]


def make_enum(kind: Any, member: str | None, *value: Any) -> Any:
    return kind(*value) if member is None else kind[member]


def write_named(name: str, value: Any, write: Write) -> list[Any]:
    return [name, {field: write(item, f".{field}") for field, item in zip(value._fields, value, strict=True)}]


def make_named(kind: Any, items: dict[str, Any]) -> Any:
    if gone := items.keys() - set(kind._fields):
        raise Changed(f"{name_of(kind)} has no field {min(gone)!r}")
    return tuple.__new__(kind, [items[n] if n in items else kind._field_defaults[n] for n in kind._fields])


def write_variant(name: str, value: Any, write: Write) -> list[Any]:
    """`[class, plain value, own attributes]`."""
    base = next(base for base in VARIANTS if isinstance(value, base))
    attributes = {} if base in (*READ, *HIDDEN) else dict(getattr(value, "__dict__", None) or {})
    if base is defaultdict:
        factory = getattr(value.default_factory, "__name__", "")
        if value.default_factory is not None and FACTORIES.get(factory) is not value.default_factory:
            raise CannotStore(f"{name} with the default {value.default_factory!r} has no stored form")
        return [name, write(dict(value), ""), write(attributes, ""), factory]
    return [name, write(plain_of(base, value), ""), *([write(attributes, "")] if attributes else [])]


def plain_of(base: Any, value: Any) -> Any:
    if base in HIDDEN:
        return base(value.get_secret_value())
    if base in READ:
        return str(value)
    if base is datetime:
        return datetime.combine(value.date(), value.timetz())
    if issubclass(base, dict):
        return dict(value)
    return [*value] if base is deque else EXACT.get(base, base)(value)


def make_variant(kind: Any, value: Any, attributes: Mapping[str, Any] | None = None, factory: str = "") -> Any:
    base: Any = next(base for base in VARIANTS if issubclass(kind, base))
    if base in HIDDEN:
        made = kind(value.get_secret_value())
    elif base in READ:
        made = kind(value)
    elif base is datetime:
        made = kind.combine(value.date(), value.timetz())
    elif base in MADE:
        made = base.__new__(kind, value)
    else:
        made = base.__new__(kind)
        (base.update if issubclass(base, dict | set) else base.extend)(made, value)
    if factory:
        made.default_factory = FACTORIES[factory]
    for name, item in (attributes or {}).items():
        put(made, name, item)
    return made


MAKERS: Mapping[str, Callable[..., Any]] = {
    "$row": make_row,
    "$data": make_data,
    "$enum": make_enum,
    "$named": make_named,
    "$of": make_variant,
}
