"""A task's call as a form: one field for each parameter, and back to the arguments that the function takes.

Owns what an operator may type. A value is written as JSON, text as it is where the annotation says text; what is left
empty is left out where there is a default. The arguments are then checked like those of any call. Pure.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .registry import TaskDefinition

KINDS = inspect.Parameter
LONGEST_FIELD = 4_000


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    """As it is posted; `*` and `**` before those that take many."""
    says: str
    """The annotation, in words."""
    text: str
    required: bool
    default: str
    """What the function takes where nothing is typed."""


def fields_of(definition: TaskDefinition, call: tuple[Sequence[Any], Mapping[str, Any]] | None = None) -> list[Field]:
    """Of the call's own values, plain; of an empty form where there is none."""
    args, kwargs = call or ((), {})
    left, named = list(args), dict(kwargs)
    value: Any
    found = []
    for parameter in definition.signature.parameters.values():
        given, value = True, None
        if parameter.kind is KINDS.VAR_POSITIONAL:
            value, left = left, []
        elif parameter.kind is KINDS.VAR_KEYWORD:
            value, named = named, {}
        elif left and parameter.kind is not KINDS.KEYWORD_ONLY:
            value = left.pop(0)
        elif parameter.name in named:
            value = named.pop(parameter.name)
        else:
            given = False
        text = text_of(parameter, value) if given and call is not None else ""
        found.append(
            Field(key_of(parameter), annotation_of(parameter), text, is_required(parameter), default_of(parameter))
        )
    return found


def call_of(definition: TaskDefinition, texts: Mapping[str, str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that were typed, unchecked. Raises ValueError for a list or a dict that is none."""
    parameters = definition.signature.parameters.values()
    rest: list[Any] = []
    for parameter in parameters:
        if parameter.kind is KINDS.VAR_POSITIONAL:
            rest = many(parameter, texts.get(key_of(parameter), "") or "[]", list)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in parameters:
        text = texts.get(key_of(parameter), "")
        by_place = parameter.kind is KINDS.POSITIONAL_ONLY or (rest and parameter.kind is KINDS.POSITIONAL_OR_KEYWORD)
        if parameter.kind is KINDS.VAR_KEYWORD:
            kwargs |= many(parameter, text or "{}", dict)
        elif parameter.kind is KINDS.VAR_POSITIONAL:
            args += rest
        elif text or (is_required(parameter) and is_text(parameter)):
            value = value_of(parameter, text)
            args.append(value) if by_place else kwargs.update({parameter.name: value})
        elif by_place and rest and not is_required(parameter):
            args.append(parameter.default)  # what comes behind it has its own place
    return tuple(args), kwargs


def many(parameter: inspect.Parameter, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise ValueError(f"{key_of(parameter)}: must be a JSON {'list' if kind is list else 'object'}")
    return value


def key_of(parameter: inspect.Parameter) -> str:
    stars: dict[object, str] = {KINDS.VAR_POSITIONAL: "*", KINDS.VAR_KEYWORD: "**"}
    return stars.get(parameter.kind, "") + parameter.name


def is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is KINDS.empty and parameter.kind not in (KINDS.VAR_POSITIONAL, KINDS.VAR_KEYWORD)


def is_text(parameter: inspect.Parameter) -> bool:
    return parameter.annotation in (str, "str", "str | None")


def annotation_of(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    if annotation is KINDS.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def default_of(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is KINDS.empty else repr(parameter.default)[:80]


def text_of(parameter: inspect.Parameter, value: object) -> str:
    return value if is_text(parameter) and isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def value_of(parameter: inspect.Parameter, text: str) -> Any:
    """JSON, or the text itself: a date or a decimal need no quotes."""
    if is_text(parameter):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def changed(before: Sequence[Field], texts: Mapping[str, str]) -> list[str]:
    """The names of the fields in which something else was typed."""
    return [field.name for field in before if texts.get(field.name, "") != field.text]
