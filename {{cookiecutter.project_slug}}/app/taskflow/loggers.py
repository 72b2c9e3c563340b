"""Three observers to start with: a log file, standard output, and memory for tests.

Owns the language of the lines that tasks leave in a file or on a terminal: time, one glyph per transition, function,
id, then what happened. The chain in `observers` calls them. The invariant: an event cannot look like two; what follows
a line break in a message is indented.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from .errors import TaskDefinitionError
from .models import TaskStatus
from .observers import MOST_WAITING, InOrder, LifecycleEvent, LogEvent, TaskObserver, rank

LOG_LINE = "·"
TRANSITIONS: Mapping[TaskStatus, tuple[str, str, str]] = {
    TaskStatus.RUNNING: ("▶", "started", "info"),
    TaskStatus.SUCCESS: ("✓", "succeeded", "info"),
    TaskStatus.PENDING: ("↻", "will be tried again", "warning"),
    TaskStatus.FAILED: ("✗", "failed", "error"),
    TaskStatus.CANCELLED: ("⊘", "cancelled", "warning"),
    TaskStatus.INTERRUPTED: ("‖", "interrupted", "warning"),
}
"""Status -> its glyph, its words, and the level that `min_level` compares."""
CONTROLS = dict.fromkeys([*range(9), *range(10, 32), *range(127, 160), 0x2028, 0x2029], "\N{REPLACEMENT CHARACTER}")
"""Characters that could begin a line or steer a terminal."""


class LineLogger(TaskObserver):
    """Makes lines of events and hands them, many at a time, to `write`, which runs in a thread: a disk or a pipe that
    stalls holds up nobody else."""

    def __init__(self, write: Callable[[Sequence[str]], None], *, log_lifecycle: bool, min_level: str) -> None:
        super().__init__(min_level)
        self.log_lifecycle = log_lifecycle
        self._write = write
        self._lines: deque[str] = deque()
        self._in_order = InOrder()

    async def on_log(self, event: LogEvent) -> None:
        self._keep(log_line(event))

    async def on_lifecycle(self, event: LifecycleEvent) -> None:
        if rank(TRANSITIONS[event.status][2]) >= rank(self.min_level):
            self._keep(lifecycle_line(event))

    async def flush(self) -> None:
        if self._lines:
            await self._in_order.run(self._write_waiting)

    def _keep(self, line: str) -> None:
        if len(self._lines) >= MOST_WAITING:
            raise BufferError(f"{len(self._lines)} lines wait to be written, this one is dropped")
        self._lines.append(line)

    def _write_waiting(self) -> None:
        self._write([self._lines.popleft() for _ in range(len(self._lines))])


class FileLogger(LineLogger):
    """Appends to a text file.

    With mode "rotate" the file is renamed to `path.1` before it would exceed `max_bytes`, and `backup_count` such files
    are kept; 0 of either never rotates. That is for one process; where several write the same file, use "watched": the
    file is left to a tool like logrotate and opened anew when it was moved.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = 10 * 1024 * 1024,
        backup_count: int = 5,
        mode: str = "rotate",
        log_lifecycle: bool = False,
        min_level: str = "info",
    ) -> None:
        for option, value in (("max_bytes", max_bytes), ("backup_count", backup_count)):
            if value < 0:
                raise TaskDefinitionError(f"{option}={value!r}: must be 0 or more")
        files = {"rotate": RotatedFile(Path(path), max_bytes, backup_count), "watched": WatchedFile(Path(path))}
        if mode not in files:
            raise TaskDefinitionError(f"mode={mode!r}: must be 'rotate' or 'watched'")
        self._file = files[mode]
        super().__init__(self._file.write, log_lifecycle=log_lifecycle, min_level=min_level)

    async def startup(self) -> None:
        """Opens the file now, so that a wrong path is said at the start. Raises OSError."""
        await self._in_order.run(self._file.write, ())

    async def close(self) -> None:
        await self.flush()
        await self._in_order.run(self._file.close)


class StdoutLogger(LineLogger):
    """Prints to standard output."""

    def __init__(self, *, log_lifecycle: bool = True, min_level: str = "info") -> None:
        super().__init__(print_lines, log_lifecycle=log_lifecycle, min_level=min_level)

    async def close(self) -> None:
        await self.flush()


class InMemoryLogger(TaskObserver):
    """Keeps every event, for tests to look at. It grows until `clear`."""

    def __init__(self, *, min_level: str = "debug") -> None:
        super().__init__(min_level)
        self.log_events: list[LogEvent] = []
        self.lifecycle_events: list[LifecycleEvent] = []

    async def on_log(self, event: LogEvent) -> None:
        self.log_events.append(event)

    async def on_lifecycle(self, event: LifecycleEvent) -> None:
        self.lifecycle_events.append(event)

    def clear(self) -> None:
        self.log_events.clear()
        self.lifecycle_events.clear()


# -- the language


def log_line(event: LogEvent) -> str:
    level = "" if event.level == "info" else f"{event.level}: "
    extra = "".join(f" {key}={value!r}" for key, value in event.extra.items())
    return line_of(event.timestamp, LOG_LINE, event.func_name, event.task_id, f"{level}{event.message}{extra}")


def lifecycle_line(event: LifecycleEvent) -> str:
    glyph, words, _ = TRANSITIONS[event.status]
    duration = "" if event.duration is None else f" after {event.duration:.3f} s"
    retry = f" (retry {event.attempt})" if event.attempt else ""
    error = f": {event.error}" if event.error else ""
    return line_of(event.timestamp, glyph, event.func_name, event.task_id, f"{words}{duration}{retry}{error}")


def line_of(moment: datetime, glyph: str, name: str, task_id: str, words: str) -> str:
    time = moment.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
    first, *rest = words.splitlines() or [""]
    lines = [f"{name} {task_id} {first}", *rest]
    return f"{time}Z {glyph} " + "\n    ".join(line.translate(CONTROLS) for line in lines)


# -- where lines go


class LogFile:
    """A file that lines are appended to, each batch with one write: processes that share it do not mix their lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def write(self, lines: Sequence[str]) -> None:
        """Raises OSError; then the lines are lost."""
        self._append(encoded(lines))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - open until it is rotated or closed
        return self._file

    def _append(self, content: bytes) -> None:
        file = self._open()
        while content:
            content = content[file.write(content) :]


class RotatedFile(LogFile):
    def __init__(self, path: Path, max_bytes: int, backup_count: int) -> None:
        super().__init__(path)
        self._max_bytes = max_bytes
        self._backup_count = backup_count

    def write(self, lines: Sequence[str]) -> None:
        if not (self._max_bytes and self._backup_count):
            return super().write(lines)
        size = self._open().tell()
        fitting = bytearray()
        for line in lines:
            piece = encoded([line])
            if size and size + len(piece) > self._max_bytes:
                self._append(bytes(fitting))
                fitting.clear()
                self._rotate()
                size = 0
            fitting += piece
            size += len(piece)
        self._append(bytes(fitting))

    def _rotate(self) -> None:
        self.close()
        for number in range(self._backup_count, 0, -1):
            newer = self._path.with_name(f"{self._path.name}.{number - 1}") if number > 1 else self._path
            with contextlib.suppress(FileNotFoundError):
                newer.replace(self._path.with_name(f"{self._path.name}.{number}"))


class WatchedFile(LogFile):
    def _open(self) -> BinaryIO:
        if self._file is not None and not self._is_at_its_path(self._file):
            self.close()
        return super()._open()

    def _is_at_its_path(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False


def encoded(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


def print_lines(lines: Sequence[str]) -> None:
    stream = sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(encoded(lines).decode("utf-8").encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
