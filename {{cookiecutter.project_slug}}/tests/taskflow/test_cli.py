"""The command line: a worker that drains, a migration, and the commands about tasks, as an operator sees them."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NoReturn

import pytest

from app.taskflow import BackendUnavailable, TaskManager, cli
from app.taskflow.backends.tables import SCHEMA_VERSION
from app.taskflow.cli import LISTED, main
from app.taskflow.testing import drain
from app.taskflow.web.shapes import ShownTask, ShownTaskRecord

from .cli_app import make_manager

PROJECT = Path(__file__).parents[2]
PATIENCE = 20.0
"""Seconds for a program to start, or to end."""


class Terminal:
    """Runs commands on one file: in this process, or as a program of its own."""

    def __init__(self, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file, self.capsys = file, capsys

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, output and errors."""
        self.capsys.readouterr()
        code = main(make_manager(str(self.file)), words)
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.taskflow.cli_app", *words]
        environment = {**os.environ, "TASKS": str(self.file)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=pipe, stderr=pipe, text=True)

    def program(self, *words: str) -> tuple[int, str, str]:
        program = self.start(*words)
        out, err = program.communicate(timeout=PATIENCE)
        return program.returncode, out, err

    def do(self, act: Callable[[TaskManager], Awaitable[Any]], *, runs_tasks: bool = True) -> Any:
        """Lets a service of this process act on the file, and stops it."""

        async def live() -> Any:
            manager = make_manager(str(self.file))
            manager.runs_tasks = runs_tasks
            async with manager.lifespan():
                return await act(manager)

        return asyncio.run(live())

    def add(self, name: str, *args: object, wait: bool = True, **options: Any) -> str:
        async def act(manager: TaskManager) -> str:
            task_id = await manager.enqueue(manager.registry.named(name).function, *args, **options)
            if wait:
                await drain(manager)
            return task_id

        found: str = self.do(act, runs_tasks=wait)
        return found

    def status(self, task_id: str) -> str:
        ((status,),) = self.rows("SELECT status FROM taskflow_task WHERE task_id = ?", task_id)
        return str(status)

    def rows(self, query: str, *values: object) -> list[Any]:
        with closing(sqlite3.connect(self.file, timeout=5)) as connection:
            return connection.execute(query, values).fetchall()


@pytest.fixture(autouse=True)
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.taskflow.manager.START_TIMEOUT", 0.5)
    monkeypatch.setattr("app.taskflow.journal.ACCEPT_TIMEOUT", 0.5)


@pytest.fixture
def terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(tmp_path / "tasks.db", capsys)


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = monotonic() + PATIENCE
    while not condition():
        assert monotonic() < deadline, condition
        sleep(0.02)


# -- worker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_runs_what_waits_and_drains_when_it_is_asked_to_stop(
    terminal: Terminal, tmp_path: Path, number: signal.Signals
) -> None:
    began = tmp_path / "began"
    greeted = terminal.add("greet", "ann", wait=False)
    slow = terminal.add("slow", str(began), 1.0, wait=False)
    later = terminal.add("greet", "later", wait=False, delay_seconds=3_600)
    worker = terminal.start("worker")
    try:
        wait_until(began.exists)
        wait_until(lambda: terminal.status(greeted) == "success")
        worker.send_signal(number)
        _, err = worker.communicate(timeout=PATIENCE)
    finally:
        worker.kill()
    assert worker.returncode == 0
    assert terminal.status(slow) == "success"
    assert terminal.status(later) == "delayed"
    assert "working on" in err
    assert "greet, slow, fail" in err
    assert "Traceback" not in err
    assert terminal.rows("SELECT count(*) FROM taskflow_instance WHERE lease_until > 0") == [(0,)]


# -- migrate


def test_migrating_twice_is_as_good_as_once_and_keeps_what_is_there(terminal: Terminal) -> None:
    assert terminal.program("migrate") == (0, f"sqlite:///{terminal.file} is up to date\n", "")
    task_id = terminal.add("greet", "ann")
    assert terminal.run("migrate") == (0, f"sqlite:///{terminal.file} is up to date\n", "")
    assert terminal.status(task_id) == "success"
    assert terminal.rows("SELECT version FROM taskflow_schema_version") == [(SCHEMA_VERSION,)]


@pytest.mark.parametrize("command", [("migrate",), ("tasks", "list")])
def test_a_newer_schema_is_refused_and_left_alone(terminal: Terminal, command: tuple[str, ...]) -> None:
    terminal.run("migrate")
    with closing(sqlite3.connect(terminal.file)) as connection, connection:
        connection.execute("UPDATE taskflow_schema_version SET version = version + 1")
    code, out, err = terminal.run(*command)
    assert (code, out) == (1, "")
    assert f"has schema version {SCHEMA_VERSION + 1}" in err
    assert "deploy the newer code" in err
    assert terminal.rows("SELECT version FROM taskflow_schema_version") == [(SCHEMA_VERSION + 1,)]


def test_a_service_on_a_newer_schema_takes_nothing_and_says_why(terminal: Terminal) -> None:
    terminal.run("migrate")
    with closing(sqlite3.connect(terminal.file)) as connection, connection:
        connection.execute("UPDATE taskflow_schema_version SET version = version + 1")
    with pytest.raises(BackendUnavailable, match=f"schema version {SCHEMA_VERSION + 1}"):
        terminal.add("greet", "ann", wait=False)
    assert terminal.rows("SELECT count(*) FROM taskflow_task") == [(0,)]


def test_one_database_is_copied_into_another_and_counted(terminal: Terminal, tmp_path: Path) -> None:
    done = terminal.add("greet", "ann", tags={"a": "b"})
    waits = terminal.add("greet", "bob", wait=False)
    new = Terminal(tmp_path / "new.db", terminal.capsys)
    command = ("migrate", "--from", f"sqlite:///{terminal.file}", "--to", f"sqlite:///{new.file}")
    code, out, err = terminal.program(*command)
    assert (code, err) == (0, "")
    head, *lines, last = out.splitlines()
    assert head.split() == ["READ", "HELD"]
    counts = {tuple(line.rsplit(maxsplit=2)[0].split()): line.split()[-2:] for line in lines}
    assert counts[("tasks",)] == ["2", "2"]
    assert counts[("events",)] == ["4", "4"]
    for name in ("log lines", "success tasks", "pending tasks"):
        assert counts[tuple(name.split())] == ["1", "1"]
    assert last.startswith(f"sqlite:///{new.file} holds all of sqlite:///{terminal.file}; ")
    for words in (("list",), ("show", done), ("show", waits), ("list", "--json")):
        assert new.run("tasks", *words) == terminal.run("tasks", *words)
    assert terminal.program(*command)[0] == 0
    new.do(drain)
    assert (new.status(waits), terminal.status(waits)) == ("success", "pending")
    code, out, err = terminal.program(*command)
    assert code == 1
    assert err == f"sqlite:///{new.file} does not hold what sqlite:///{terminal.file} has\n"
    assert re.search(r"^pending tasks +1 +0 +DIFFERS$", out, re.MULTILINE)


def test_a_copy_that_would_be_none_is_refused_with_code_1(terminal: Terminal, tmp_path: Path) -> None:
    terminal.add("greet", "ann")
    here = f"sqlite:///{terminal.file}"
    (tmp_path / "link.db").symlink_to(terminal.file)
    for target, reason in (
        (f"sqlite:///{tmp_path}/link.db", "are one database"),
        ("mysql://host/tasks", "no backend for 'mysql'"),
        ("sqlite:////nowhere/tasks.db", "unable to open database file"),
    ):
        code, out, err = terminal.run("migrate", "--from", here, "--to", target)
        assert (code, out) == (1, "")
        assert reason in err
    code, out, err = terminal.run("migrate", "--from", f"sqlite:///{tmp_path}/empty.db", "--to", here)
    assert (code, out) == (1, "")
    assert "has no schema of this version" in err


# -- tasks


def test_the_list_shows_each_task_on_a_line_newest_first_in_columns(terminal: Terminal) -> None:
    succeeded = terminal.add("greet", "ann")
    failed = terminal.add("fail", "no\nway")
    waiting = terminal.add("greet", "bob", wait=False, delay_seconds=3_600)
    code, out, err = terminal.program("tasks", "list")
    assert (code, err) == (0, "")
    assert out.isascii()
    head, *lines = out.splitlines()
    assert tuple(head.split()) == LISTED
    places = [head.index(name) for name in LISTED]
    rows = [[line[a:b].strip() for a, b in zip(places, [*places[1:], None], strict=True)] for line in lines]
    assert [row[:4] for row in rows] == [
        ["pending", waiting, "greet", "default"],
        ["failed", failed, "fail", "default"],
        ["success", succeeded, "greet", "default"],
    ]
    assert [row[5] for row in rows] == ["0/1", "1/1", "1/1"]
    assert [row[7] for row in rows] == ["", "no", ""]
    assert re.fullmatch(r"\d+\.\d{3}", rows[2][6])


def test_a_table_is_cut_to_the_width_of_the_terminal_and_a_pipe_gets_it_whole(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.add("fail", "x" * 300)
    assert "x" * 300 in terminal.run("tasks", "list")[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "72")
    assert [len(line) <= 72 for line in terminal.run("tasks", "list")[1].splitlines()] == [True, True]


def test_what_a_terminal_would_obey_is_not_printed(terminal: Terminal) -> None:
    task_id = terminal.add("fail", "\x1b[2Jgone")
    for words in (("list",), ("show", task_id)):
        out = terminal.run("tasks", *words)[1]
        assert "\x1b" not in out
        assert "[2Jgone" in out


def test_json_is_the_api_s_own_record(terminal: Terminal) -> None:
    greeted, failed = terminal.add("greet", "ann"), terminal.add("fail", "no")
    code, out, err = terminal.run("tasks", "list", "--json")
    assert (code, err) == (0, "")
    listed = json.loads(out)
    assert [ShownTask.model_validate(row).task_id for row in listed] == [failed, greeted]
    assert [row["result"] for row in listed] == [None, "ann"]
    shown = json.loads(terminal.run("tasks", "show", failed, "--json")[1])
    assert ShownTaskRecord.model_validate(shown).stacktrace
    assert {name: shown[name] for name in listed[0]} == listed[0]
    assert json.loads(terminal.run("tasks", "show", greeted, "--json")[1])["logs"][0].endswith(" hello ann")


def test_json_stays_one_document_where_there_is_more(terminal: Terminal) -> None:
    terminal.run("migrate")
    assert terminal.run("tasks", "list", "--json") == (0, "[]\n", "")
    ids = [terminal.add("greet", str(number)) for number in range(3)]
    code, out, err = terminal.run("tasks", "list", "--json", "--limit", "2")
    assert [row["task_id"] for row in json.loads(out)] == ids[:0:-1]
    assert (code, err.split()[:2]) == (0, ["more:", "--before"])
    (last,) = json.loads(terminal.run("tasks", "list", "--json", *err.split()[1:])[1])
    assert last["task_id"] == ids[0]


def test_the_list_is_narrowed_and_continued(terminal: Terminal) -> None:
    async def act(manager: TaskManager) -> list[str]:
        greet, fail = (manager.registry.named(name).function for name in ("greet", "fail"))
        ids = [await manager.enqueue(greet, str(number)) for number in range(5)]
        await manager.enqueue(fail, "no")
        await drain(manager)
        return ids

    ids = terminal.do(act)
    failed = terminal.run("tasks", "list", "--status", "failed")[1].splitlines()
    assert [line.split()[0] for line in failed] == ["STATUS", "failed"]
    seen: list[str] = []
    before: tuple[str, ...] = ()
    for _ in range(3):
        code, out, _ = terminal.run("tasks", "list", "--name", "greet", "--limit", "2", *before)
        _, *lines, last = out.splitlines()
        if last.startswith("more: "):
            before = tuple(last.removeprefix("more: ").split())
        else:
            lines.append(last)
        seen += [line.split()[1] for line in lines]
        assert code == 0
    assert seen == ids[::-1]


def test_looking_waits_for_nobody_who_writes(terminal: Terminal) -> None:
    task_id = terminal.add("greet", "ann")
    with closing(sqlite3.connect(terminal.file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for words in (("list",), ("show", task_id)):
            code, out, err = terminal.run("tasks", *words)
            assert (code, err) == (0, "")
            assert task_id in out
        assert "locked" in terminal.run("tasks", "purge", "--days", "1")[2]


def test_a_terminal_without_the_letters_still_shows_the_list(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.add("fail", "unmöglich ✕")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code, out, err = terminal.program("tasks", "list")
    assert (code, err) == (0, "")
    assert out.rstrip().endswith("unm?glich ?")


def test_an_empty_list_is_no_error(terminal: Terminal) -> None:
    assert terminal.run("tasks", "list") == (0, "", "")


def test_looking_and_commanding_runs_nothing(terminal: Terminal) -> None:
    task_id = terminal.add("greet", "ann", wait=False)
    for words in (("tasks", "list"), ("tasks", "show", task_id), ("tasks", "purge", "--days", "1")):
        assert terminal.run(*words)[0] == 0
    assert terminal.status(task_id) == "pending"


@pytest.mark.parametrize("requeue_pending", [True, False])
def test_looking_and_commanding_leaves_no_instance_and_cancels_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, requeue_pending: bool
) -> None:
    other, one = terminal.add("fail", "first"), terminal.add("greet", "second", wait=False)
    monkeypatch.setattr(make_manager, "__kwdefaults__", {"requeue_pending": requeue_pending})
    before = terminal.rows("SELECT * FROM taskflow_event ORDER BY seq")
    for words in (("list",), ("show", one)):
        assert terminal.run("tasks", *words)[0] == 0
    assert terminal.rows("SELECT * FROM taskflow_event ORDER BY seq") == before
    assert terminal.run("tasks", "retry", other)[0] == 0
    assert terminal.rows("SELECT * FROM taskflow_instance") == []
    assert terminal.status(one) == "pending"


def test_one_task_is_shown_with_its_history_its_log_and_its_traceback(terminal: Terminal) -> None:
    greeted = terminal.add("greet", "ann", tags={"who": "ann", "a": "b"}, priority=3)
    code, out, err = terminal.run("tasks", "show", greeted)
    assert (code, err) == (0, "")
    facts, history = out.split("\n\n")
    shown = dict(line.split(maxsplit=1) for line in facts.splitlines())
    for name in ("created", "started", "ended", "seconds"):
        assert shown.pop(name)
    assert shown == {
        "task": greeted,
        "function": "greet",
        "status": "success",
        "queue": "default",
        "priority": "3",
        "attempt": "1 of 1",
        "tags": "who=ann, a=b",
        "result": '"ann"',
    }
    words = [" ".join(line.split()[2:]) for line in history.splitlines()]
    assert words == ["accepted", "started attempt 1", "info hello ann", "succeeded attempt 1"]
    code, out, _ = terminal.run("tasks", "show", terminal.add("fail", "no way"))
    assert code == 0
    assert "attempt 1, no way" in out
    assert "ValueError: no way" in out.splitlines()


def test_a_retry_runs_when_a_worker_comes_and_names_the_operator(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ann")
    failed = terminal.add("fail", "no")
    code, out, err = terminal.run("tasks", "retry", failed)
    assert (code, err) == (0, "")
    assert out.split() == ["pending", failed, "fail"]
    assert terminal.status(failed) == "pending"
    assert terminal.rows("SELECT actor FROM taskflow_event WHERE kind = 'requeued'") == [("ann (command line)",)]
    terminal.do(drain)
    assert terminal.rows("SELECT status, attempt FROM taskflow_task") == [("failed", 2)]


@pytest.mark.parametrize("error", [KeyError("uid not found: 1234"), OSError("no username set"), ImportError("pwd")])
def test_an_operator_whom_the_system_does_not_name_can_act(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def nameless() -> str:
        raise error

    monkeypatch.setattr("getpass.getuser", nameless)
    failed = terminal.add("fail", "no")
    assert terminal.run("tasks", "retry", failed)[0] == 0
    assert terminal.rows("SELECT actor FROM taskflow_event WHERE kind = 'requeued'") == [("somebody (command line)",)]


def test_a_cancelled_task_never_runs(terminal: Terminal) -> None:
    task_id = terminal.add("greet", "ann", wait=False)
    code, out, _ = terminal.run("tasks", "cancel", task_id)
    assert (code, out.split()) == (0, ["cancelled", task_id, "greet"])
    terminal.do(drain)
    assert terminal.status(task_id) == "cancelled"


def test_a_purge_deletes_what_ended_long_ago_and_is_audited(terminal: Terminal) -> None:
    old, new, waiting = terminal.add("greet", "a"), terminal.add("greet", "b"), terminal.add("greet", "c", wait=False)
    with closing(sqlite3.connect(terminal.file)) as connection, connection:
        connection.execute(
            "UPDATE taskflow_task SET created_at = created_at - 864000000000, finished_at = finished_at - 864000000000 "
            "WHERE task_id = ?",
            [old],
        )
    assert terminal.run("tasks", "purge", "--days", "7") == (0, "deleted 1 tasks\n", "")
    assert {task_id for (task_id,) in terminal.rows("SELECT task_id FROM taskflow_task")} == {new, waiting}
    assert terminal.run("tasks", "purge", "--days", "0") == (0, "deleted 1 tasks\n", "")
    assert terminal.rows("SELECT count(*) FROM taskflow_event WHERE kind = 'delete_history'") == [(2,)]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("tasks", "show", "nothing"), "no task has the id 'nothing'"),
        (("tasks", "retry", "nothing"), "no task has the id 'nothing'"),
        (("tasks", "cancel", "nothing"), "no task has the id 'nothing'"),
        (("tasks", "list", "--before", "nonsense"), "before='nonsense': not a cursor of this list"),
        (("tasks", "purge", "--days", "-1"), "--days -1: must be from 0 to 365,000"),
        (("tasks", "purge", "--days", "nan"), "--days nan: must be from 0 to 365,000"),
        (("tasks", "purge", "--days", "inf"), "--days inf: must be from 0 to 365,000"),
        (("tasks", "purge", "--days", "1000000"), "--days 1e+06: must be from 0 to 365,000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said_on_standard_error_with_code_1(
    terminal: Terminal, words: tuple[str, ...], reason: str
) -> None:
    terminal.run("migrate")
    assert terminal.run(*words) == (1, "", f"{reason}\n")


def test_a_task_that_succeeded_is_neither_retried_nor_cancelled(terminal: Terminal) -> None:
    task_id = terminal.add("greet", "ann")
    for command, done in (("retry", "retried"), ("cancel", "cancelled")):
        reason = f"task {task_id} is success: it cannot be {done}\n"
        assert terminal.run("tasks", command, task_id) == (1, "", reason)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "required: COMMAND"),
        (("tasks",), "required: COMMAND"),
        (("dance",), "invalid choice: 'dance'"),
        (("tasks", "list", "--limit", "0"), "0: must be a whole number from 1 to 1,000,000"),
        (("tasks", "list", "--limit", "many"), "many: must be a whole number from 1 to 1,000,000"),
        (("tasks", "list", "--limit", "9" * 20), f"{'9' * 20}: must be a whole number from 1 to 1,000,000"),
        (("tasks", "list", "--status", "odd"), "invalid choice: 'odd' (choose from"),
        (("tasks", "list", "--name", "\udcff"), "argument --name: ?: must be UTF-8"),
        (("tasks", "list", "--before", "1_\udcff"), "argument --before: 1_?: must be UTF-8"),
        (("migrate", "--from", "sqlite:///tasks.db"), "--from and --to belong together"),
        (("migrate", "--to", "sqlite:///tasks.db"), "--from and --to belong together"),
    ],
)
def test_a_command_that_is_none_is_refused_with_code_2(
    terminal: Terminal, words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        terminal.run(*words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "usage:" in said
    assert reason in said


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(terminal: Terminal) -> None:
    terminal.add("greet", "ann")
    with terminal.start("tasks", "list") as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        assert program.stderr.read() == ""
    assert program.returncode == 1


def test_an_interrupted_command_ends_without_a_word(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_manager: TaskManager) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "reading", interrupt)
    assert terminal.run("tasks", "list") == (130, "", "")


def test_a_database_that_is_away_is_said_so_and_no_traceback(terminal: Terminal, tmp_path: Path) -> None:
    missing = Terminal(tmp_path / "missing" / "tasks.db", terminal.capsys)
    for words in (("migrate",), ("tasks", "list")):
        code, out, err = missing.run(*words)
        assert (code, out) == (1, "")
        assert "unable to open database file" in err
