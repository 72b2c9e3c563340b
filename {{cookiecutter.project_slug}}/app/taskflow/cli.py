"""The command line: `python -m app worker`, `migrate`, and `tasks list|show|retry|cancel|purge`.

Owns how tasks look in a terminal. Every command asks the same `TaskStore` as the API and the pages, and `--json` prints
the API's own records. Answers go to standard output, what went wrong to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from io import TextIOWrapper
from typing import Any

from .backends import open_backend
from .copying import copy
from .errors import TaskflowError
from .manager import START_TIMEOUT, TaskManager
from .models import MOST_DAYS, Cursor, LogEntry, TaskEvent, TaskFilter, TaskRecord, TaskStatus, utc_now
from .texts import clean
from .web import records

MOST_LOG_LINES = 10_000
"""Of the task that is shown; as many as the API's record carries."""
MOST_LISTED = 1_000_000
LISTED = ("STATUS", "TASK", "FUNCTION", "QUEUE", "CREATED", "ATTEMPT", "SECONDS", "ERROR")
Command = Callable[[TaskManager, argparse.Namespace], Coroutine[Any, Any, None]]


def main(manager: TaskManager, arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 with the reason on standard error, 130 when it was interrupted."""
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal or a pipe whose encoding lacks what a text has
        sys.stdout.reconfigure(errors="replace")
    options = make_parser().parse_args(arguments)
    command: Command = options.command
    try:
        asyncio.run(command(manager, options))
        sys.stdout.flush()
    except TaskflowError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has; Python would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app", description="The service's task system.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add(commands, "worker", work, "run tasks without serving HTTP, until interrupted")
    moving = add(commands, "migrate", migrate, "bring the database's schema up to this code, or copy one into another")
    moving.add_argument("--from", dest="source", metavar="URL", help="copy all that this stopped system holds")
    moving.add_argument("--to", dest="target", metavar="URL", help="into this one; run it again if it was interrupted")
    moving.set_defaults(refuse=moving.error)
    tasks = commands.add_parser("tasks", help="look at tasks, or act on them").add_subparsers(
        required=True, metavar="COMMAND"
    )
    listing = add(tasks, "list", list_tasks, "newest first")
    listing.add_argument("--status", action="append", choices=[status.value for status in TaskStatus], default=[])
    listing.add_argument("--name", type=readable, help="of the task function")
    listing.add_argument("--limit", type=positive, default=20)
    listing.add_argument("--before", type=readable, help="continue below this place, as the last page said")
    listing.add_argument("--json", action="store_true", help="the API's records, as one JSON array")
    for name, command, text in (
        ("show", show_task, "one task with its history and its log"),
        ("retry", retry_task, "run it again"),
        ("cancel", cancel_task, "never run it, or ask it to stop"),
    ):
        one = add(tasks, name, command, text)
        one.add_argument("task_id")
        if command is show_task:
            one.add_argument("--json", action="store_true", help="the API's record, as JSON")
    purge = add(tasks, "purge", purge_tasks, "delete tasks that ended long ago")
    purge.add_argument("--days", type=float, required=True, help="keep what ended within so many days")
    return parser


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, command: Command, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    return parser


def positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_LISTED):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1 to {MOST_LISTED:,}")
    return int(text)


def readable(text: str) -> str:
    """Bytes that are no text in this terminal's encoding arrive as halves of surrogate pairs, which no store takes."""
    if clean(text) != text:
        raise argparse.ArgumentTypeError(f"{clean(text)}: must be UTF-8")
    return text


# -- commands


async def work(manager: TaskManager, _options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    manager.runs_tasks = True
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):  # not the event loop's own handlers, which Windows has not
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    async with manager.lifespan():
        names = ", ".join(definition.name for definition in manager.registry) or "no task"
        logging.getLogger("taskflow").info("working on %s: %s", manager.backend_name, names)
        await stop.wait()


async def migrate(manager: TaskManager, options: argparse.Namespace) -> None:
    if options.source or options.target:
        if not (options.source and options.target):
            options.refuse("--from and --to belong together")
        await copy_tasks(options.source, options.target)
        return
    await manager.backend.open()
    await manager.backend.close()
    print(f"{manager.backend_name} is up to date")


async def copy_tasks(source_url: str, target_url: str) -> None:
    """Raises CopyRefused, and TaskflowError when not all of it arrived."""
    source, target = open_backend(source_url), open_backend(target_url)
    try:
        copied = await copy(source, target, utc_now(), tell_progress)
    finally:
        tell_progress("", 0)
        for backend in (source, target):
            await backend.close()
    marks = [(line.name, str(line.read), str(line.held), "" if line.same else "DIFFERS") for line in copied.lines]
    say(table([("", "READ", "HELD", ""), *marks]))
    if copied.mended:
        print(f"{copied.mended} rows have cells that cannot be read: something stands for them, no such task will run")
    if not copied.complete:
        raise TaskflowError(f"{target.name} does not hold what {source.name} has")
    print(f"{target.name} holds all of {source.name}; {copied.written} rows were written")


def tell_progress(name: str, rows: int) -> None:
    """For whoever waits at a terminal: one line, which is gone in the end."""
    if sys.stderr.isatty():
        print(f"\r{f'{rows} {name}' if name else '':<40}", end="" if name else "\r", file=sys.stderr, flush=True)


async def list_tasks(manager: TaskManager, options: argparse.Namespace) -> None:
    where = TaskFilter(statuses=tuple(map(TaskStatus, options.status)), func_name=options.name)
    try:
        before = Cursor.parse(options.before) if options.before else None
    except ValueError as error:
        raise TaskflowError(str(error)) from error
    async with reading(manager):
        page = await manager.store.page(where, before, options.limit)
    if options.json:
        say_json([records.task_row(manager.store, task) for task in page.tasks])
    else:
        say(table([LISTED, *map(cells_of, page.tasks)] if page.tasks else []))
    if page.older:  # apart from the one document, which a program reads
        print(f"more: --before {page.older}", file=sys.stderr if options.json else sys.stdout)


async def show_task(manager: TaskManager, options: argparse.Namespace) -> None:
    async with reading(manager):
        record = await manager.store.get(options.task_id)
        events = await manager.store.events(options.task_id)
        logs = await manager.store.logs(options.task_id, limit=MOST_LOG_LINES)
        why = await manager.store.why(record)
    if options.json:
        say_json(records.task_record(manager.store, record, logs))
        return
    say(table(facts_of(record, records.returned(manager.store, record, listed=True))))
    say(f"waits: {reason}" for reason in why)
    entries: list[TaskEvent | LogEntry] = [*events, *logs]
    say(["", *table([history_of(entry) for entry in sorted(entries, key=lambda entry: entry.time)])])
    if record.stacktrace:
        print(f"\n{printable(record.stacktrace)}")


async def retry_task(manager: TaskManager, options: argparse.Namespace) -> None:
    async with commanding(manager):
        say(table([told(await manager.store.retry(options.task_id, operator()))]))


async def cancel_task(manager: TaskManager, options: argparse.Namespace) -> None:
    async with commanding(manager):
        say(table([told(await manager.store.cancel(options.task_id, operator()))]))


async def purge_tasks(manager: TaskManager, options: argparse.Namespace) -> None:
    if not 0 <= options.days <= MOST_DAYS:
        raise TaskflowError(f"--days {options.days:g}: must be from 0 to {MOST_DAYS:,}")
    async with commanding(manager):
        deleted = await manager.store.delete_history(manager.clock() - timedelta(days=options.days), operator())
    print(f"deleted {deleted} tasks")


@asynccontextmanager
async def reading(manager: TaskManager) -> AsyncIterator[None]:
    """The store alone: looking leaves no trace, and waits for nobody who writes."""
    if not await manager.backend.is_current():
        await manager.backend.open()
    try:
        yield
    finally:
        await manager.backend.close()


@asynccontextmanager
async def commanding(manager: TaskManager) -> AsyncIterator[None]:
    """The writer alone: no instance that others would see, nothing claimed, nothing rescued.

    Raises TaskflowError where the database does not answer.
    """
    async with manager.journal.alone("command line"):
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await manager.journal.ready()
        except TimeoutError as error:
            raise TaskflowError(f"the task backend is away: {manager.journal.last_error or 'no answer'}") from error
        yield


# -- words


def cells_of(record: TaskRecord) -> Sequence[str]:
    """A task as a row of the list; its columns are LISTED."""
    return (
        record.status,
        record.task_id,
        record.func_name,
        record.queue,
        second_of(record.created_at),
        f"{record.attempt}/{record.max_attempts}",
        seconds_of(record),
        (record.error or "").partition("\n")[0],
    )


def told(record: TaskRecord) -> Sequence[str]:
    """What a command made of a task."""
    return record.status, record.task_id, record.func_name


def facts_of(record: TaskRecord, returned: object) -> list[Sequence[str]]:
    """What a task is, a fact a line; without what it has not."""
    facts = {
        "task": record.task_id,
        "function": record.func_name,
        "status": record.status,
        "queue": record.queue,
        "priority": "" if record.priority is None else str(record.priority),
        "attempt": f"{record.attempt} of {record.max_attempts}",
        "created": second_of(record.created_at),
        "runs at": second_of(record.run_at) if record.run_at > record.created_at else "",
        "started": second_of(record.start_time),
        "ended": second_of(record.end_time),
        "seconds": seconds_of(record),
        "tags": ", ".join(f"{key}={value}" for key, value in record.tags.items()),
        "progress": json.dumps(records.plain(record.progress)) if record.progress else "",
        "result": "" if returned is None else json.dumps(returned),
        "error": (record.error or "").partition("\n")[0],
    }
    return [(name, fact) for name, fact in facts.items() if fact]


def history_of(entry: TaskEvent | LogEntry) -> Sequence[str]:
    """A line of a task's history: when, the event or the level, what."""
    time = f"{entry.time:%Y-%m-%d %H:%M:%S.%f}"
    if isinstance(entry, LogEntry):
        return time, entry.level, entry.message
    attempt = "" if entry.attempt is None else f"attempt {entry.attempt + 1}"
    who = f"by {entry.actor}" if entry.actor else ""
    return time, entry.kind, ", ".join(part for part in (attempt, who, entry.detail) if part)


def second_of(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}"


def seconds_of(record: TaskRecord) -> str:
    return "" if record.duration is None else f"{record.duration:.3f}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which the cells of a column stand below each other."""
    shown = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]


def printable(text: str) -> str:
    """Without what a terminal would obey: an error's text may have come from anywhere."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


def say(lines: Iterable[str]) -> None:
    """A terminal would break a line that is longer than it is wide; a file or a pipe gets it whole."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines:
        print(line[:width])


def say_json(document: object) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))


def operator() -> str:
    """Who is named in the audit."""
    try:
        name = getpass.getuser()
    except (OSError, ImportError, KeyError):  # a container's number without a name, a system without such names
        name = "somebody"
    return f"{name} (command line)"
