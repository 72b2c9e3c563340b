"""The arguments of one function: checked where they are given, stored, and read back as they were.

Owns the passage between a call and its stored form, `[args, kwargs, shape]`. Annotations are applied once, by pydantic,
when the task is added; what they made of the arguments is what is stored and what the function gets, however often it
is started. Rows without a shape were written before that was so, and are checked when they are read.
"""

from __future__ import annotations

import functools
import inspect
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs
from pydantic_core.core_schema import ArgumentsParameter

from . import codec
from .dependencies import Dependencies, where
from .errors import TaskArgumentError, TaskDefinitionError, text_of
from .objects import Objects, hints_of, reached

MISSING = inspect.Parameter.empty
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Arguments:
    """How one function takes its arguments. Raises TaskDefinitionError where its annotations cannot be checked."""

    def __init__(self, name: str, function: Callable[..., Any], dependencies: Dependencies | None = None) -> None:
        self._name = name
        self._injected = dependencies.names if dependencies else frozenset[str]()
        self._signature = dependencies.arguments if dependencies else signature_of(function)
        taker = taker_of(function, dependencies)
        adapter = adapter_of(function, taker)
        self._check = adapter.validator.validate_python
        self._objects = Objects(reached(adapter.core_schema, hints_of(taker)))
        self._readers = codec.readers_of(self._objects)
        self._shape = shape_of(self._signature)
        taken = arguments_in(adapter.core_schema)
        fields: list[ArgumentsParameter] = taken["arguments_schema"]
        self._names = {alias: field["name"] for field in fields for alias in aliases_of(field)}
        """Alias -> parameter."""
        self._aliases = {field["name"]: alias for field in reversed(fields) for alias in [*aliases_of(field)][:1]}
        self._filled = {field["name"] for field in fields if self._is_filled(field)}
        """Parameters whose default pydantic knows and Python does not."""
        self._parameters = {field["name"] for field in fields}
        self._renames = bool(self._names or self._filled or taken.get("var_kwargs_mode") == "unpacked-typed-dict")
        """True when what pydantic hands on may have other names than what it was given."""
        positions = [at for at, field in enumerate(fields, 1) if self._is_filled(field) and is_positional(field)]
        self._least = max(positions, default=0)

    @property
    def signature(self) -> inspect.Signature:
        """Without what is injected."""
        return self._signature

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The stored form of a call, checked against the signature. Raises TaskArgumentError."""
        for name in self._injected & kwargs.keys():
            rule = "is resolved by Depends when the task runs, it cannot be passed"
            raise TaskArgumentError(self._name, name, kwargs[name], rule)
        args, kwargs = self._checked(args, kwargs)
        try:
            return codec.encode_call(args, kwargs, self._objects, self._shape)
        except Exception as error:  # user code: what its objects do when they are looked at
            raise self._first_refused(args, kwargs, error) from error

    def decode(self, stored: str) -> Call:
        """The call that `encode` stored. Raises ValueError; TypeError where the signature has changed and the call does
        not fit it, TaskArgumentError where a call of before does not."""
        args, kwargs, *shape = codec.decode(stored, self._readers)
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ValueError("the stored arguments are not a call")
        if not shape:
            return self._checked(tuple(args), kwargs)
        if shape[0] != self._shape:
            self._signature.bind(*args, **kwargs)
        return tuple(args), kwargs

    def _checked(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        if self._aliases:  # a caller may also say the parameter's own name, as Python would have it
            kwargs = {self._aliases.get(name, name): value for name, value in kwargs.items()}
        try:
            found, named = self._check(ArgsKwargs(args, dict(kwargs) if kwargs else None))
        except ValidationError as error:
            raise self._refusal(error) from error
        except Exception as error:  # user code: a validator that does not expect the value
            rule = f"its validation raised {type(error).__name__}: {text_of(error)}"
            raise TaskArgumentError(self._name, "", (args, kwargs), rule) from error
        # What the caller left out stays out: a default is the function's own, and need not be storable.
        if not self._renames:
            return found[: len(args)], {name: named[name] for name in kwargs}
        given = {self._names.get(name, name) for name in kwargs} | self._filled | (named.keys() - self._parameters)
        return found[: max(len(args), self._least)], {name: value for name, value in named.items() if name in given}

    def _refusal(self, error: ValidationError) -> TaskArgumentError:
        first = error.errors(include_url=False)[0]
        place, *deeper = list[Any](first["loc"]) or [""]
        rule = first["msg"] + (f" (at {'.'.join(map(str, deeper))})" if deeper else "")
        value = first["input"] if "missing" not in first["type"] else MISSING
        return TaskArgumentError(self._name, self._parameter(place), value, rule)

    def _first_refused(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> TaskArgumentError:
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in places:
            try:
                codec.encode(value, self._objects)
            except Exception as reason:  # noqa: BLE001 - user code, once more
                return TaskArgumentError(self._name, self._parameter(place), value, rule_of(reason))
        return TaskArgumentError(self._name, "", (args, kwargs), rule_of(error))

    def _parameter(self, place: int | str) -> str:
        if isinstance(place, str):
            return place
        names = list(self._signature.parameters)
        return names[place] if place < len(names) else str(place)

    def _is_filled(self, field: ArgumentsParameter) -> bool:
        default = self._signature.parameters[field["name"]].default
        return field["schema"]["type"] == "default" and (default is MISSING or is_field(default))


def rule_of(error: Exception) -> str:
    if isinstance(error, codec.CannotStore | RecursionError):
        return str(error)
    return f"it has no stored form: {type(error).__name__}: {text_of(error)}"


# -- what pydantic makes of a signature


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except Exception as error:  # some that are written in C have none; annotations are user code
        raise TaskDefinitionError(f"{where(function)} has no signature to check arguments against ({error})") from error


def taker_of(function: Callable[..., Any], dependencies: Dependencies | None) -> Callable[..., Call]:
    """A function of the same signature that returns its arguments."""
    injected = dependencies.names if dependencies else frozenset[str]()

    @functools.wraps(function)
    def arguments(*args: Any, **kwargs: Any) -> Call:
        return args, kwargs

    hints = getattr(hinted(function), "__annotations__", {})
    arguments.__annotations__ = {name: hint for name, hint in hints.items() if name not in {"return", *injected}}
    if dependencies is not None:
        arguments.__signature__ = dependencies.arguments  # type: ignore[attr-defined]
    return arguments


def hinted(function: Any) -> Any:
    """What the annotations of a callable of any kind stand on."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__annotations__") else function.__call__


def adapter_of(function: Callable[..., Any], taker: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(taker, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception as error:  # what annotations do when they are looked at is user code
        raise TaskDefinitionError(f"{where(function)}: its annotations cannot be checked ({error})") from error


def arguments_in(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    call = schema["schema"] if schema["type"] == "definitions" else schema
    return call["arguments_schema"]  # type: ignore[no-any-return]


def aliases_of(field: ArgumentsParameter) -> Iterable[str]:
    """The names by which a caller may give a parameter, if they are not its own."""
    alias = field.get("alias")
    if isinstance(alias, str):
        return [alias]
    paths: list[Any] = alias if alias and isinstance(alias[0], list) else [alias] if alias else []
    return [path[0] for path in paths]


def is_positional(field: ArgumentsParameter) -> bool:
    return field.get("mode") == "positional_only"


def is_field(default: object) -> bool:
    return type(default).__name__ == "FieldInfo"


def shape_of(signature: inspect.Signature) -> int:
    """A number that changes when a call that fitted the signature might no longer do so."""
    shape = [(p.name, p.kind, p.default is MISSING) for p in signature.parameters.values()]
    return zlib.crc32(json.dumps(shape).encode())
