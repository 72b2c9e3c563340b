"""What failures have in common: a key for those with one cause, whatever numbers and ids their messages name.

Owns what makes two failures the same: the task's name, the exception's class, its message without what changes from
one to the next, and the innermost frame of the application. It reads texts only, so that it is the same for every
executor. The runner and the rules ask when a task becomes FAILED, pages when they show one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

CHANGES = re.compile(
    r"[0-9a-f]{8}-[0-9a-f-]{27}"  # a UUID
    r"|0x[0-9a-f]+"
    r"|\b(?=[0-9a-f]*\d)[0-9a-f]{12,}\b"  # a digest
    r"|\d+(?:[.,:]\d+)*",
    re.IGNORECASE,
)
"""What differs between messages of one cause."""
FRAME = re.compile(r'  File "(?P<path>[^"]+)", line (?P<line>\d+)(?:, in (?P<where>.+))?')
FOREIGN = ("site-packages", "/lib/python", "/taskflow/", "<frozen", "<string>")
LONGEST_MESSAGE = 300
KEY_DIGITS = 16


class Failure(NamedTuple):
    """Why a task failed, as far as others fail for the same reason."""

    key: str
    error_type: str
    """The exception's class; "" where none is known."""
    message: str
    """Its first line."""
    frame: str
    """`function in file` of the application's innermost frame; "" where there is none."""


@dataclass(frozen=True, slots=True)
class Frame:
    path: str
    line: str
    where: str
    code: str


def failure_of(name: str, error: str | None, stacktrace: str | None) -> Failure:
    message, kind = first_line(error), error_type(stacktrace)
    frames = own_frames(stacktrace)
    frame = f"{frames[0].where} in {frames[0].path.rpartition('/')[2]}" if frames else ""
    facts = "\0".join((name, kind, masked(message), frame))
    return Failure(hashlib.sha256(facts.encode()).hexdigest()[:KEY_DIGITS], kind, message, frame)


def first_line(text: str | None, limit: int = LONGEST_MESSAGE) -> str:
    line = (text or "").strip().partition("\n")[0]
    return line if len(line) <= limit else line[: limit - 1] + "…"


def masked(message: str) -> str:
    return CHANGES.sub("#", message)


def own_frames(stacktrace: str | None, root: str = "") -> Sequence[Frame]:
    """The frames of the team's own code, the innermost first; paths below `root` without it."""
    lines = (stacktrace or "").splitlines()
    frames = []
    for index, text in enumerate(lines):
        match = FRAME.fullmatch(text)
        if match and not any(part in match["path"].replace("\\", "/") for part in FOREIGN):
            code = lines[index + 1].strip() if index + 1 < len(lines) and lines[index + 1].startswith("    ") else ""
            path = match["path"].replace("\\", "/").removeprefix(root).lstrip("/")
            frames.append(Frame(path, match["line"], match["where"] or "", code))
    return frames[::-1]


def error_type(stacktrace: str | None) -> str:
    """The exception's class, without its module."""
    return error_class(stacktrace).rpartition(".")[2]


def error_class(stacktrace: str | None) -> str:
    """The exception's class, as the traceback's last line names it; "" where none is known."""
    for line in reversed((stacktrace or "").splitlines()):
        if match := re.match(r"([A-Za-z_][\w.]*)(?::|$)", line):
            return match[1]
    return ""
