"""What a torture came to: which promised tasks were lost, which ran twice, how long recovery took.

Owns the rules, as functions without I/O. Evidence comes from outside the task system: what instances noted when a
promise was made and when a function began, what was done to them and when, and what the store held in the end. The
invariant: a finding names one task and what is wrong with it; without findings the promise held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

from app.taskflow import TaskStatus

THAW = 1.0
"""Seconds in which a process that goes on may still begin what it had claimed before it was frozen."""

Fault = Literal["lost", "doubled", "left"]


class Start(NamedTuple):
    """One start of a task's function, as its process noted it. Times are of this machine's monotonic clock."""

    task_id: str
    name: str
    attempt: int
    life: int
    """Which process: the number of its start."""
    at: float
    again: bool
    """Whether it may be started again after its process went away: `requeue_on_interrupt`, or its key came again."""
    end: str = ""
    """How its process saw it end: `succeeded`, `failed`, `postponed`, ...; nothing where it did not live to see it."""


class Harm(NamedTuple):
    """What was done, to which process and from when until when."""

    kind: Literal["kill", "stop", "freeze", "cut"]
    life: int
    """0 is the store."""
    at: float
    until: float

    def explains(self, first: Start, second: Start) -> bool:
        """Whether it may have made a task that had started begin again."""
        return self.life == first.life and self.at <= second.at and first.at <= self.until + THAW


class Stored(NamedTuple):
    """A task as the store held it in the end."""

    name: str
    status: TaskStatus
    waits: bool = False
    """PENDING for a time that has not come: a retry that is due later."""


class Finding(NamedTuple):
    fault: Fault
    task_id: str
    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Evidence:
    promised: Mapping[str, str] = field(default_factory=dict)
    """Task id -> name, of each id that a caller was given."""
    starts: Sequence[Start] = ()
    harms: Sequence[Harm] = ()
    stored: Mapping[str, Stored] = field(default_factory=dict)
    refused: int = 0
    """Tasks that could not be accepted, and whose callers were told so."""

    @property
    def starts_of(self) -> Mapping[str, Sequence[Start]]:
        """Task id -> its starts, in the order of its attempts."""
        found: defaultdict[str, list[Start]] = defaultdict(list)
        for start in sorted(self.starts, key=lambda start: (start.attempt, start.at)):
            found[start.task_id].append(start)
        return found


def judge(evidence: Evidence) -> list[Finding]:
    starts_of = evidence.starts_of
    lost = (why_lost(task_id, name, evidence.stored, starts_of) for task_id, name in evidence.promised.items())
    left = (Finding("left", task_id, task.name, f"is still {task.status}") for task_id, task in unended(evidence))
    doubled = (finding for starts in starts_of.values() for finding in doubles(starts, evidence.harms))
    return [*(finding for finding in lost if finding), *left, *doubled]


def why_lost(
    task_id: str, name: str, stored: Mapping[str, Stored], starts_of: Mapping[str, Sequence[Start]]
) -> Finding | None:
    if task_id not in stored:
        return Finding("lost", task_id, name, "was promised, and the store does not have it")
    if stored[task_id].status is TaskStatus.SUCCESS and task_id not in starts_of:
        return Finding("lost", task_id, name, "is a success, and never began")
    return None


def unended(evidence: Evidence) -> Iterator[tuple[str, Stored]]:
    for task_id, task in evidence.stored.items():
        if not task.status.terminal and not task.waits:
            yield task_id, task


def doubles(starts: Sequence[Start], harms: Sequence[Harm]) -> Iterator[Finding]:
    """Starts of one task that nothing allowed. An attempt begins once. The next one may begin when this one failed;
    or, where the task may be started again, when its process was killed, stopped or frozen."""
    for first, second in pairwise(starts):
        if first.attempt == second.attempt:
            yield Finding("doubled", first.task_id, first.name, f"attempt {first.attempt} began twice")
        elif first.end in ("failed", "postponed"):
            continue
        elif not first.again:
            ended = first.end or "no end"
            yield Finding("doubled", first.task_id, first.name, f"began again after attempt {first.attempt}: {ended}")
        elif not any(harm.explains(first, second) for harm in harms):
            yield Finding("doubled", first.task_id, first.name, "began again although nothing had happened to it")


# -- recovery, in seconds


def until_work_goes_on(evidence: Evidence) -> list[float]:
    """From each kill to the next start of any task."""
    times = sorted(start.at for start in evidence.starts)
    return [gap for harm in evidence.harms if harm.kind == "kill" and (gap := gap_after(harm.at, times)) is not None]


def until_work_comes_back(evidence: Evidence) -> list[float]:
    """From each moment at which the store was back to the next start of any task."""
    times = sorted(start.at for start in evidence.starts)
    return [gap for harm in evidence.harms if harm.kind == "cut" and (gap := gap_after(harm.until, times)) is not None]


def until_rescued(evidence: Evidence) -> list[float]:
    """From a kill to the next start of each task that it cut short, where that may be started again."""
    killed = {harm.life: harm for harm in evidence.harms if harm.kind == "kill"}
    return [
        second.at - killed[first.life].at
        for starts in evidence.starts_of.values()
        for first, second in pairwise(starts)
        if first.life in killed and not first.end and second.life != first.life
    ]


def gap_after(moment: float, times: Sequence[float]) -> float | None:
    return next((time - moment for time in times if time > moment), None)
