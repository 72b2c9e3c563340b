"""When a failed task is started again.

Owns the policy and nothing else: pure functions of a `TaskConfig`, the error and a random number. The runner asks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

from .models import TaskConfig


def seconds_until_retry(
    config: TaskConfig,
    error: BaseException,
    retries_used: int,
    *,
    uniform: Callable[[float, float], float] = random.uniform,
) -> float | None:
    """Seconds to wait before retry number `retries_used` (from 0), or None when this error is not retried.

    A `retry_on` function may answer with seconds, which then replace the computed delay: a server's Retry-After.
    """
    verdict = wants_retry(config, error)
    if verdict is False:
        return None
    if verdict is not True:
        return min(verdict, LONGEST_DELAY)
    return backoff_delay(config, retries_used, uniform=uniform)


def wants_retry(config: TaskConfig, error: BaseException) -> bool | float:
    """Whether the error is one to retry; a number is "yes, after so many seconds"."""
    policy = config.retry_on
    if policy is None:
        return True
    if isinstance(policy, Collection):
        return isinstance(error, tuple(policy))
    verdict = policy(error)
    if isinstance(verdict, bool) or verdict is None:
        return bool(verdict)
    return max(0.0, float(verdict))


def backoff_delay(
    config: TaskConfig, retries_used: int, *, uniform: Callable[[float, float], float] = random.uniform
) -> float:
    """`delay * backoff ** retries_used`, at most `max_delay`; with jitter, a random time between 0 and that."""
    try:
        seconds = config.delay and config.delay * config.backoff**retries_used
    except OverflowError:
        seconds = LONGEST_DELAY
    seconds = min(seconds, config.max_delay or LONGEST_DELAY, LONGEST_DELAY)
    return uniform(0.0, seconds) if config.jitter else seconds


LONGEST_DELAY = 365 * 86_400.0
"""Seconds; a backoff that has grown beyond a year waits a year."""
