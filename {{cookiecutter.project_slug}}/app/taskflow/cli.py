"""The command line: `python -m app worker`, `migrate`, and `tasks list|show|retry|cancel|purge`.

Owns how tasks look in a terminal. Every command asks the same `TaskStore` as the API and the pages.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from io import TextIOWrapper
from typing import Any

from .errors import TaskflowError
from .manager import START_TIMEOUT, TaskManager
from .models import Cursor, LogEntry, TaskEvent, TaskFilter, TaskRecord, TaskStatus

GLYPHS = {
    TaskStatus.PENDING: "○",
    TaskStatus.RUNNING: "◐",
    TaskStatus.SUCCESS: "●",
    TaskStatus.FAILED: "✕",
    TaskStatus.INTERRUPTED: "◧",
    TaskStatus.CANCELLED: "⊘",
    TaskStatus.REJECTED: "⊝",
}
Command = Callable[[TaskManager, argparse.Namespace], Coroutine[Any, Any, None]]


def main(manager: TaskManager, arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 with the reason on standard error."""
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal or a pipe whose encoding has no such glyphs
        sys.stdout.reconfigure(errors="replace")
    options = make_parser().parse_args(arguments)
    command: Command = options.command
    try:
        asyncio.run(command(manager, options))
    except TaskflowError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app", description="The service's task system.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add(commands, "worker", work, "run tasks without serving HTTP, until interrupted")
    add(commands, "migrate", migrate, "bring the database's schema up to this code")
    tasks = commands.add_parser("tasks", help="look at tasks, or act on them").add_subparsers(
        required=True, metavar="COMMAND"
    )
    listing = add(tasks, "list", list_tasks, "newest first")
    listing.add_argument("--status", action="append", type=TaskStatus, choices=list(TaskStatus), default=[])
    listing.add_argument("--name", help="of the task function")
    listing.add_argument("--limit", type=positive, default=20)
    listing.add_argument("--before", help="continue below this place, as the last page said")
    for name, command, text in (
        ("show", show_task, "one task with its history and its log"),
        ("retry", retry_task, "run it again"),
        ("cancel", cancel_task, "never run it, or ask it to stop"),
    ):
        add(tasks, name, command, text).add_argument("task_id")
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
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return number


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


async def migrate(manager: TaskManager, _options: argparse.Namespace) -> None:
    await manager.backend.open()
    await manager.backend.close()
    print(f"{manager.backend_name} is up to date")


async def list_tasks(manager: TaskManager, options: argparse.Namespace) -> None:
    where = TaskFilter(statuses=tuple(options.status), func_name=options.name)
    try:
        before = Cursor.parse(options.before) if options.before else None
    except ValueError as error:
        raise TaskflowError(str(error)) from error
    async with reading(manager):
        page = await manager.store.page(where, before, options.limit)
    for record in page.tasks:
        print(line_of(record))
    if page.older:
        print(f"more: --before {page.older}")


async def show_task(manager: TaskManager, options: argparse.Namespace) -> None:
    async with reading(manager):
        record = await manager.store.get(options.task_id)
        events = await manager.store.events(options.task_id)
        logs = await manager.store.logs(options.task_id)
    print(line_of(record))
    entries: list[TaskEvent | LogEntry] = [*events, *logs]
    for entry in sorted(entries, key=lambda entry: entry.time):
        print(f"  {entry.time:%Y-%m-%d %H:%M:%S.%f}  {words_of(entry)}")
    if record.stacktrace:
        print(record.stacktrace)


async def retry_task(manager: TaskManager, options: argparse.Namespace) -> None:
    async with commanding(manager):
        print(line_of(await manager.store.retry(options.task_id, operator())))


async def cancel_task(manager: TaskManager, options: argparse.Namespace) -> None:
    async with commanding(manager):
        print(line_of(await manager.store.cancel(options.task_id, operator())))


async def purge_tasks(manager: TaskManager, options: argparse.Namespace) -> None:
    if options.days < 0:
        raise TaskflowError(f"--days {options.days:g}: must be 0 or more")
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


def line_of(record: TaskRecord) -> str:
    ran = "" if record.duration is None else f"  {record.duration:.3f} s"
    error = f"  {record.error.splitlines()[0][:80]}" if record.error else ""
    return (
        f"{GLYPHS[record.status]} {record.status:<11} {record.task_id}  {record.func_name}  "
        f"{record.created_at:%Y-%m-%d %H:%M:%S}  attempt {record.attempt}{ran}{error}"
    )


def words_of(entry: TaskEvent | LogEntry) -> str:
    if isinstance(entry, LogEntry):
        return f"{entry.level:<9}{entry.message}"
    who = f" by {entry.actor}" if entry.actor else ""
    attempt = "" if entry.attempt is None else f" (attempt {entry.attempt + 1})"
    return f"{entry.kind}{attempt}{who}" + (f": {entry.detail}" if entry.detail else "")


def operator() -> str:
    """Who is named in the audit."""
    try:
        name = getpass.getuser()
    except (OSError, ImportError, KeyError):  # a container's number without a name, a system without such names
        name = "somebody"
    return f"{name} (command line)"
