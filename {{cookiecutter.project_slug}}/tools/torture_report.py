"""The one page that a torture ends with.

Owns its words. Everything in it was counted by `torture_verdict.py` or measured from outside the task system.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median

from app.taskflow import TaskStatus

from .torture_verdict import (
    Evidence,
    Fault,
    Finding,
    until_rescued,
    until_work_comes_back,
    until_work_goes_on,
)

MOST_FINDINGS = 30
"""Lines about single tasks; there is one page."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What was tortured, and how."""

    store: str
    seconds: float
    seed: int
    instances: int
    ended: datetime


def report(
    setting: Setting, evidence: Evidence, findings: Sequence[Finding], stops: Sequence[float], faults: Sequence[str]
) -> str:
    lines = [
        "# Torture",
        "",
        verdict(findings, faults),
        "",
        *setting_lines(setting),
        "",
        *task_lines(evidence, findings),
        "",
        *recovery_lines(evidence, stops),
        *wrong_lines(findings, faults),
    ]
    return "\n".join(lines) + "\n"


def verdict(findings: Sequence[Finding], faults: Sequence[str]) -> str:
    if not findings and not faults:
        return "**Passed.** Nothing was lost and nothing was doubled."
    numbers = Counter(finding.fault for finding in findings)
    words = [f"{n} {fault}" for fault, n in numbers.items()]
    return f"**Failed.** {', '.join([*words, *([f'{len(faults)} faults'] if faults else [])])}."


def setting_lines(setting: Setting) -> Iterator[str]:
    machine = f"Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores"
    how = f"{setting.instances} instances for {setting.seconds:g} s, seed {setting.seed}"
    yield from table(
        [["store", "machine", "how", "when"], [setting.store, machine, how, f"{setting.ended:%Y-%m-%d %H:%M} UTC"]]
    )


def task_lines(evidence: Evidence, findings: Sequence[Finding]) -> Iterator[str]:
    """Every function and its promised tasks; a task that is lost or doubled counts there too."""
    header = ["task", "accepted", "succeeded", "failed", "interrupted", "other", "lost", "doubled", "left", "starts"]
    names = sorted({*evidence.promised.values(), *(finding.name for finding in findings)})
    rows = [cells(name, name, evidence, findings) for name in names]
    yield from table([header, *rows, cells("**all**", None, evidence, findings)])
    unheard = sum(
        task.status is not TaskStatus.REJECTED for key, task in evidence.stored.items() if key not in evidence.promised
    )
    yield ""
    yield (
        f"{unheard} more were stored that nobody was promised: their caller or the store was killed before the answer "
        f"came, or a task added them. {evidence.refused} were refused. A task is interrupted when its process goes "
        "away while it runs, unless it says `requeue_on_interrupt`."
    )


def cells(label: str, name: str | None, evidence: Evidence, findings: Sequence[Finding]) -> list[str]:
    """A row of one function, or of all."""
    promised = [task_id for task_id, its in evidence.promised.items() if name in (None, its)]
    statuses = Counter(evidence.stored[task_id].status for task_id in promised if task_id in evidence.stored)
    shown = [statuses.pop(status, 0) for status in (TaskStatus.SUCCESS, TaskStatus.FAILED, TaskStatus.INTERRUPTED)]
    faults: Sequence[Fault] = ("lost", "doubled", "left")
    wrong = [sum(item.fault == fault and name in (None, item.name) for item in findings) for fault in faults]
    starts = sum(name in (None, start.name) for start in evidence.starts)
    return [label, *(f"{n:,}" for n in (len(promised), *shown, statuses.total(), *wrong, starts))]


def recovery_lines(evidence: Evidence, stops: Sequence[float]) -> Iterator[str]:
    done = Counter(harm.kind for harm in evidence.harms)
    yield from table(
        [
            ["kills", "clean stops", "freezes", "store cut off"],
            [str(done[k]) for k in ("kill", "stop", "freeze", "cut")],
        ]
    )
    yield ""
    rows = [
        ["from a kill until any task starts", *spread(until_work_goes_on(evidence))],
        ["from a kill until a task that it cut short starts again", *spread(until_rescued(evidence))],
        ["from the store's return until any task starts", *spread(until_work_comes_back(evidence))],
        ["a clean stop", *spread(stops)],
    ]
    yield from table([["recovery", "times", "median", "longest"], *rows])


def spread(seconds: Sequence[float]) -> list[str]:
    if not seconds:
        return ["0", "", ""]
    return [str(len(seconds)), f"{median(seconds):.2f} s", f"{max(seconds):.2f} s"]


def wrong_lines(findings: Sequence[Finding], faults: Sequence[str]) -> Iterator[str]:
    if findings or faults:
        yield from ("", "## What is wrong", "")
        yield from (f"- {fault}" for fault in faults)
        yield from (f"- {item.fault}: {item.name} `{item.task_id}` {item.why}" for item in findings[:MOST_FINDINGS])
        if len(findings) > MOST_FINDINGS:
            yield f"- and {len(findings) - MOST_FINDINGS} more"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    header, *rest = rows
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    yield from (f"| {' | '.join(row)} |" for row in rest)
