"""Which version of the application runs, when it began to, and what has become slower or failed more since.

Owns the comparison of before and after. Each start of a process is a sum of the series "version" in `history.py`, so
versions are kept as long as everything else that charts show. Pure, but for the reading of the code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Literal

from .backends.base import GaugeRow
from .history import Sums, loads, quantile
from .models import TaskStatus, from_micros, to_micros

BEGAN = "began"
"""Of processes: what a version's sums count."""
COMPARED = timedelta(minutes=30)
"""Before a version, and from it on."""
FEWEST = 20
"""Attempts on each side, below which nothing is said."""
SLOWER = 1.5
LEAST_SECONDS = 0.01
MORE_FAILED = 0.05
"""Share of all attempts."""
FEWEST_FAILED = 3


@cache
def code_version(application: Path = Path(__file__).parent.parent) -> str:
    """Seven digits of a checksum over the application's Python files: another one as soon as any of them differs."""
    checksum = hashlib.sha256()
    for path in sorted(application.rglob("*.py")):
        try:
            checksum.update(path.relative_to(application).as_posix().encode() + b"\0" + path.read_bytes())
        except OSError:  # an editor's file that is gone by now
            continue
    return checksum.hexdigest()[:7]


@dataclass(frozen=True, slots=True)
class Deploy:
    """The first start of a version after another one ran."""

    at: datetime
    version: str
    before: str


def deploys(rows: Iterable[GaugeRow]) -> list[Deploy]:
    """From rows of the series "version", oldest first. The first version of all is no news."""
    found: list[Deploy] = []
    last = ""
    for at, version in sorted({(row.at, row.series) for row in rows if loads(row.sums).counts[BEGAN]}):
        if last and version != last:
            found.append(Deploy(from_micros(at), version, last))
        last = version
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """What moved for the tasks of one name."""

    name: str
    what: Literal["run", "failed"]
    """The seconds that 95 % of its attempts did not exceed, or the share of them that failed."""
    before: float
    after: float
    attempts: int
    """Since."""

    @property
    def is_better(self) -> bool:
        return self.after < self.before


def split(deploy: Deploy, rows: Iterable[GaugeRow]) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """Rows of names as sums before the deploy and since. Its own bucket has some of both, and counts for neither."""
    before: dict[str, Sums] = {}
    after: dict[str, Sums] = {}
    at, most = to_micros(deploy.at), COMPARED // timedelta(microseconds=1)
    for row in rows:
        side = before if at - most <= row.at < at else after if at < row.at <= at + most else None
        if side is not None:
            side.setdefault(row.series, Sums()).add(loads(row.sums))
    return before, after


def changes(before: Mapping[str, Sums], after: Mapping[str, Sums]) -> list[Change]:
    """What moved by enough to be no accident, the worst first."""
    found = []
    for name in before.keys() & after.keys():
        was, now = before[name], after[name]
        if min(attempts(was), attempts(now)) < FEWEST:
            continue
        slow_before, slow = quantile(was.run, 0.95) or 0.0, quantile(now.run, 0.95) or 0.0
        factor = max(slow, slow_before) / max(min(slow, slow_before), LEAST_SECONDS / 10)
        if factor >= SLOWER and abs(slow - slow_before) >= LEAST_SECONDS:
            found.append(Change(name, "run", slow_before, slow, attempts(now)))
        share_before, share = failed(was) / attempts(was), failed(now) / attempts(now)
        if abs(share - share_before) >= MORE_FAILED and max(failed(was), failed(now)) >= FEWEST_FAILED:
            found.append(Change(name, "failed", share_before, share, attempts(now)))
    return sorted(found, key=lambda change: (change.is_better, change.what == "run", -change.after, change.name))


def attempts(sums: Sums) -> int:
    return sum(sums.run.values())


def failed(sums: Sums) -> int:
    """Attempts, whether or not they were tried again."""
    return sums.counts["retried"] + sums.counts[TaskStatus.FAILED]
