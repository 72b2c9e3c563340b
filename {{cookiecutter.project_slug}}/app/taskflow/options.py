"""What a caller may say about one task beyond its arguments, checked where it is said.

Owns the rules of keys, tags, priorities, queues and times. The store asks for every draft, so that a turn carries only
what can be stored: an option that cannot be costs its own caller a `TaskArgumentError`, and nobody else anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

from .errors import TaskArgumentError
from .texts import key_text, name_text, tag_texts

T = TypeVar("T")

LARGEST_PRIORITY = 2**31 - 1
LONGEST_DELAY = timedelta(days=10 * 366)
LATEST_YEAR = 9998
"""One short of the calendar's end, so that a time can be shown in any zone."""


class AddOptions(NamedTuple):
    """As the caller gave them. None means: as the decorator says."""

    idempotency_key: str | None = None
    tags: Mapping[str, str] | None = None
    priority: int | None = None
    queue: str | None = None
    delay_seconds: float | None = None
    run_at: datetime | None = None
    traceparent: str | None = None


NO_OPTIONS = AddOptions()


def checked(func_name: str, option: str, value: object, rule: Callable[[Any], T]) -> T:
    """The value as it is stored. Raises TaskArgumentError with the rule that it breaks."""
    try:
        return rule(value)
    except ValueError as error:
        raise TaskArgumentError(func_name, option, value, str(error)) from error


def priority_of(func_name: str, options: AddOptions, default: int | None) -> int | None:
    found = options.priority
    return default if found is None else checked(func_name, "priority", found, priority)


def key_of(func_name: str, options: AddOptions) -> str | None:
    found = options.idempotency_key
    return None if found is None else checked(func_name, "idempotency_key", found, key_text)


def queue_of(func_name: str, options: AddOptions) -> str | None:
    return None if options.queue is None else checked(func_name, "queue", options.queue, name_text)


def tags_of(func_name: str, options: AddOptions, defaults: Mapping[str, str]) -> Mapping[str, str]:
    """The decorator's, which were checked there, and the caller's over them."""
    found = options.tags
    return defaults if found is None else {**defaults, **checked(func_name, "tags", found, tag_texts)}


def start_of(func_name: str, options: AddOptions, now: datetime) -> datetime:
    """When the task may start."""
    if options.run_at is not None:
        if options.delay_seconds is not None:
            rule = "run_at and delay_seconds exclude each other"
            raise TaskArgumentError(func_name, "run_at", options.run_at, rule)
        return max(now, checked(func_name, "run_at", options.run_at, moment))
    found = options.delay_seconds
    return now if found is None else now + checked(func_name, "delay_seconds", found, delay)


# -- rules


def priority(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or abs(int(value)) > LARGEST_PRIORITY:
        raise ValueError("must be None or a 32-bit integer")
    return int(value)


def moment(value: object) -> datetime:
    """In UTC."""
    if not isinstance(value, datetime) or value.utcoffset() is None:
        raise ValueError("needs a time zone: a datetime such as datetime.now(UTC)")
    try:
        found = value.astimezone(UTC)
    except OverflowError:
        raise ValueError("is no time in UTC") from None
    if found.year > LATEST_YEAR:
        raise ValueError(f"must not be later than the year {LATEST_YEAR}")
    return found


def delay(value: Any) -> timedelta:
    if isinstance(value, bool) or not isinstance(value, Real | Decimal):
        raise ValueError("must be a number of seconds")
    try:
        found = timedelta(seconds=float(value))
        if timedelta(0) <= found <= LONGEST_DELAY:
            return found
    except (OverflowError, ValueError):  # more than a timedelta holds, or nan
        pass
    raise ValueError("must be between 0 seconds and ten years")
