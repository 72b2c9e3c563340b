"""Log files, standard output and memory: one line per event, none lost on the way, and no task waits for a disk."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from app.taskflow import FileLogger, InMemoryLogger, LifecycleEvent, LogEvent, StdoutLogger, TaskStatus, task_log
from app.taskflow import loggers as loggers_module
from app.taskflow.loggers import TRANSITIONS, LineLogger, LogFile, WatchedFile, lifecycle_line, log_line

from .conftest import StartManager
from .helpers import PATIENCE, eventually

pytestmark = pytest.mark.anyio

NOON = datetime(2026, 1, 1, 12, 0, 0, 123_456, tzinfo=UTC)


def said(message: str, level: str = "info", **extra: Any) -> LogEvent:
    return LogEvent("the-id", "send", message, level, NOON, 0, {}, extra)


def became(
    status: TaskStatus, *, duration: float | None = None, attempt: int = 0, error: str | None = None
) -> LifecycleEvent:
    return LifecycleEvent("the-id", "send", status, NOON, attempt, attempt, duration, error)


async def write(logger: FileLogger, *messages: str) -> None:
    for message in messages:
        await logger.on_log(said(message))
    await logger.flush()


def lines(path: Path) -> list[str]:
    """What was said in each line of a file."""
    return [line.split(" the-id ")[1] for line in path.read_text("utf-8").splitlines()]


def logs_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.log*"))


# -- the language


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (said("connecting"), "· send the-id connecting"),
        (said("slow", "warning", host="mx1", ms=12), "· send the-id warning: slow host='mx1' ms=12"),
        (became(TaskStatus.RUNNING), "▶ send the-id started"),
        (became(TaskStatus.RUNNING, attempt=2), "▶ send the-id started (retry 2)"),
        (became(TaskStatus.SUCCESS, duration=0.0204), "✓ send the-id succeeded after 0.020 s"),
        (
            became(TaskStatus.PENDING, duration=1.5, attempt=1, error="no route"),
            "↻ send the-id will be tried again after 1.500 s (retry 1): no route",
        ),
        (became(TaskStatus.FAILED, duration=1.5, error="no route"), "✗ send the-id failed after 1.500 s: no route"),
        (became(TaskStatus.CANCELLED), "⊘ send the-id cancelled"),
        (became(TaskStatus.INTERRUPTED, duration=3.0), "‖ send the-id interrupted after 3.000 s"),
    ],
)
def test_each_event_has_its_line(event: LogEvent | LifecycleEvent, line: str) -> None:
    made = log_line(event) if isinstance(event, LogEvent) else lifecycle_line(event)
    assert made == f"2026-01-01T12:00:00.123Z {line}"


def test_each_transition_has_a_glyph_of_its_own() -> None:
    glyphs = [glyph for glyph, _, _ in TRANSITIONS.values()]
    assert len(set(glyphs)) == len(glyphs)
    assert TRANSITIONS.keys() == set(TaskStatus) - {TaskStatus.REJECTED}


def test_times_are_written_in_utc() -> None:
    event = LogEvent("the-id", "send", "", "info", NOON.astimezone(timezone(timedelta(hours=5))), 0)
    assert log_line(event).startswith("2026-01-01T12:00:00.123Z ")


def test_a_message_of_several_lines_is_indented_so_that_nobody_forges_an_event() -> None:
    forged = "real\n2026-01-01T12:00:00.123Z ✓ send the-id succeeded\r\nend"
    first, *rest = log_line(said(forged)).split("\n")
    assert first.endswith("the-id real")
    assert rest == ["    2026-01-01T12:00:00.123Z ✓ send the-id succeeded", "    end"]


def test_characters_that_steer_a_terminal_are_replaced() -> None:
    assert log_line(said("\x1b[31mred\x07\ttab")).endswith(
        "the-id \N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER}\ttab"
    )
    assert "\n" not in log_line(LogEvent("the-id", "a\nname", "words", "info", NOON, 0))


# -- files


async def test_a_file_gets_log_lines_and_with_log_lifecycle_changes_of_status_too(
    start_manager: StartManager, tmp_path: Path
) -> None:
    plain, full = tmp_path / "plain.log", tmp_path / "full.log"
    manager = await start_manager(loggers=[FileLogger(plain)], log_file=str(full), log_lifecycle=True)

    @manager.task
    def send() -> None:
        task_log("connecting")
        task_log("details", level="debug")
        raise LookupError("no route")

    task_id = await manager.enqueue(send)
    await eventually(lambda: full.read_text("utf-8").count("\n") == 3)
    words = [line.split(" ", 1)[1] for line in full.read_text("utf-8").splitlines()]
    assert words[:2] == [f"▶ send {task_id} started", f"· send {task_id} connecting"]
    assert words[2].startswith(f"✗ send {task_id} failed after 0.")
    assert [line.split(" ", 1)[1] for line in plain.read_text("utf-8").splitlines()] == words[1:2]


async def test_the_managers_settings_reach_the_file(start_manager: StartManager, tmp_path: Path) -> None:
    path = tmp_path / "tasks.log"
    manager = await start_manager(log_file=str(path), log_file_max_bytes=400, log_file_backup_count=2)

    @manager.task
    def job() -> None:
        for n in range(20):
            task_log(f"line {n}")

    await manager.enqueue(job)
    await eventually(lambda: path.exists() and "line 19" in path.read_text("utf-8"))
    assert logs_in(tmp_path) == ["tasks.log", "tasks.log.1", "tasks.log.2"]


async def test_a_file_is_rotated_before_it_exceeds_its_size_and_no_line_is_torn_or_lost(tmp_path: Path) -> None:
    path = tmp_path / "tasks.log"
    logger = FileLogger(path, max_bytes=1_000, backup_count=99)
    messages = [f"line {n} {'ü' * (n % 30)}" for n in range(200)]
    for start in range(0, 200, 7):
        await write(logger, *messages[start : start + 7])
    await logger.close()
    count = len(logs_in(tmp_path))
    files = [tmp_path / f"tasks.log.{number}" for number in range(count - 1, 0, -1)] + [path]
    assert count > 5
    assert [line for file in files for line in lines(file)] == messages
    assert all(700 < file.stat().st_size <= 1_000 for file in files[:-1])


async def test_only_so_many_rotated_files_are_kept(tmp_path: Path) -> None:
    logger = FileLogger(tmp_path / "tasks.log", max_bytes=100, backup_count=2)
    await write(logger, *(f"{n} {'x' * 80}" for n in range(6)))
    await logger.close()
    assert logs_in(tmp_path) == ["tasks.log", "tasks.log.1", "tasks.log.2"]
    assert [lines(tmp_path / name)[0][0] for name in logs_in(tmp_path)] == ["5", "4", "3"]


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"max_bytes": 100, "backup_count": 0}])
async def test_a_file_without_a_limit_is_never_rotated(tmp_path: Path, limits: dict[str, Any]) -> None:
    logger = FileLogger(tmp_path / "tasks.log", **limits)
    await write(logger, *(f"{n} {'x' * 80}" for n in range(6)))
    await logger.close()
    assert logs_in(tmp_path) == ["tasks.log"]


async def test_a_file_that_is_there_already_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "tasks.log"
    for message in ("before", "after"):
        logger = FileLogger(path)
        await write(logger, message)
        await logger.close()
    assert lines(path) == ["before", "after"]


@pytest.mark.parametrize("removed", [False, True])
async def test_a_watched_file_is_opened_anew_when_it_was_moved_or_removed(tmp_path: Path, removed: bool) -> None:
    path, moved = tmp_path / "tasks.log", tmp_path / "tasks.log.1"
    logger = FileLogger(path, mode="watched", max_bytes=10)
    await write(logger, "one")
    await write(logger, "two")
    path.unlink() if removed else path.rename(moved)
    await write(logger, "three")
    await logger.close()
    assert lines(path) == ["three"]
    assert removed or lines(moved) == ["one", "two"]


def test_writers_that_share_a_watched_file_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "tasks.log"

    def work(letter: str) -> None:
        file = WatchedFile(path)
        for _ in range(50):
            file.write([letter * 5_000] * 5)
        file.close()

    threads = [threading.Thread(target=work, args=[letter]) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    written = path.read_text().splitlines()
    assert len(written) == 1_000
    assert {(len(line), len(set(line))) for line in written} == {(5_000, 1)}


@pytest.mark.parametrize(
    "options", [{"mode": "weekly"}, {"max_bytes": -1}, {"backup_count": -1}, {"min_level": "loud"}]
)
def test_a_setting_that_cannot_be_is_refused_and_touches_no_file(tmp_path: Path, options: dict[str, Any]) -> None:
    (option,) = options
    with pytest.raises(ValueError, match=f"{option}="):
        FileLogger(tmp_path / "tasks.log", **options)
    FileLogger(tmp_path / "tasks.log")
    assert not list(tmp_path.iterdir())


async def test_a_path_that_cannot_be_opened_is_said_at_the_start_and_tasks_run(
    start_manager: StartManager, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = await start_manager(log_file=str(tmp_path / "missing" / "tasks.log"))

    @manager.task
    async def job() -> int:
        task_log("said")
        return 42

    await eventually(lambda: "observer FileLogger: startup raised FileNotFoundError" in caplog.text)
    assert await manager.result(await manager.enqueue(job)) == 42


async def test_text_that_is_not_unicode_is_written_escaped(tmp_path: Path) -> None:
    path = tmp_path / "tasks.log"
    logger = FileLogger(path)
    await write(logger, "half \ud83d")
    await logger.close()
    assert lines(path) == [r"half \ud83d"]


async def test_a_disk_that_stalls_holds_up_no_task_and_no_line_is_written_twice_or_out_of_order(
    start_manager: StartManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stalled, release = tmp_path / "tasks.log", threading.Event(), threading.Event()
    append = LogFile._append

    def slowly(file: LogFile, content: bytes) -> None:
        if content:
            stalled.set()
            assert release.wait(PATIENCE)
        append(file, content)

    monkeypatch.setattr(LogFile, "_append", slowly)
    manager = await start_manager(log_file=str(path))

    @manager.task
    async def job(n: int) -> int:
        task_log(f"line {n}")
        return n

    assert await manager.result(await manager.enqueue(job, 0)) == 0
    await eventually(stalled.is_set)
    assert [await manager.result(await manager.enqueue(job, n)) for n in range(1, 20)] == list(range(1, 20))
    assert path.read_text() == ""
    release.set()
    await eventually(lambda: len(path.read_text().splitlines()) == 20)
    assert [line.rsplit(" ", 1)[1] for line in path.read_text().splitlines()] == [str(n) for n in range(20)]


async def test_a_write_that_hangs_is_not_joined_by_a_second_one_and_what_waits_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loggers_module, "MOST_WAITING", 3)
    release, written = threading.Event(), list[Sequence[str]]()

    def hang(batch: Sequence[str]) -> None:
        written.append(batch)
        release.wait(PATIENCE)

    logger = LineLogger(hang, log_lifecycle=True, min_level="info")
    await logger.on_log(said("0"))
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(logger.flush(), 0.02)
        await logger.on_log(said("more"))
    with pytest.raises(BufferError, match="3 lines wait to be written, this one is dropped"):
        await logger.on_log(said("too much"))
    assert len(written) == 1
    release.set()
    await logger.flush()
    assert [len(batch) for batch in written] == [1, 3]


# -- standard output


async def test_standard_output_gets_every_event_at_or_above_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    logger = StdoutLogger(min_level="warning")
    for status in TRANSITIONS:
        await logger.on_lifecycle(became(status))
    await logger.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[1] for line in printed] == ["↻", "✗", "⊘", "‖"]


async def test_standard_output_that_knows_no_glyphs_gets_them_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    logger = StdoutLogger()
    await logger.on_lifecycle(became(TaskStatus.SUCCESS))
    await logger.close()
    assert terminal.getvalue() == b"2026-01-01T12:00:00.123Z \\u2713 send the-id succeeded\n"


async def test_standard_output_can_do_without_changes_of_status(
    start_manager: StartManager, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = await start_manager(loggers=[StdoutLogger(log_lifecycle=False)])

    @manager.task
    async def job() -> None:
        task_log("said")

    await manager.result(await manager.enqueue(job))
    await manager.shutdown()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(" said")


# -- memory


async def test_memory_keeps_what_it_was_told_until_it_is_cleared() -> None:
    memory = InMemoryLogger()
    await memory.on_log(said("one"))
    await memory.on_lifecycle(became(TaskStatus.RUNNING))
    assert [event.message for event in memory.log_events] == ["one"]
    assert [event.status for event in memory.lifecycle_events] == [TaskStatus.RUNNING]
    memory.clear()
    assert not memory.log_events
    assert not memory.lifecycle_events
