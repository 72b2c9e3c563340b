"""The code that teams have: any callable that FastAPI takes runs, or is refused where it is written."""

import asyncio
import functools
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, FastAPI
from fastapi.testclient import TestClient
from pydantic import Field

from app.taskflow import TaskAdmin, TaskDefinitionError, TaskManager, TaskStatus
from app.taskflow.errors import UnknownFunction
from app.taskflow.registry import imported

from .conftest import StartManager
from .helpers import PATIENCE, eventually

pytestmark = pytest.mark.anyio

RAN: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    RAN.clear()


def plain(word: str = "plain") -> str:
    RAN.append(word)
    return word


async def waiting(word: str = "waiting") -> str:
    await asyncio.sleep(0)
    RAN.append(word)
    return word


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def unnamed(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def later() -> Awaitable[str]:
    return waiting("later")


class Sender:
    def send(self, word: str) -> str:
        return plain(word)

    async def send_async(self, word: str) -> str:
        return await waiting(word)

    async def __call__(self, word: str = "called") -> str:
        return await waiting(word)


class Unstorable:
    def __init__(self) -> None:
        self.lock = threading.Lock()


def takes_anything(value: Any) -> str:
    return plain(type(value).__name__)


def with_priority(text: str, priority: int = 0, tags: Any = None) -> str:
    return plain(f"{text} {priority} {tags}")


def numbers() -> Iterator[int]:
    RAN.append("generated")
    yield 1


async def more_numbers() -> AsyncIterator[int]:
    RAN.append("generated")
    yield 1


def annotated_in_words(word: "the word to be said") -> str:  # type: ignore[valid-type]  # noqa: F722
    return plain(word)


def annotated_for_readers(word: "functools.Nothing") -> str:  # type: ignore[name-defined]
    return plain(word)


def annotated_against_pydantic(word: Annotated[str, Field(multiple_of=5)]) -> str:
    return plain(word)


UNDECORATED: dict[str, tuple[Callable[..., Any], list[Any], str]] = {
    "a function": (plain, ["one"], "one"),
    "a coroutine function": (waiting, ["one"], "one"),
    "a bound method": (Sender().send, ["one"], "one"),
    "a bound coroutine method": (Sender().send_async, ["one"], "one"),
    "an object with an async call": (Sender(), [], "called"),
    "a partial": (functools.partial(plain, "one"), [], "one"),
    "a partial of a coroutine function": (functools.partial(waiting, "one"), [], "one"),
    "a lambda": (lambda: plain("one"), [], "one"),
    "a coroutine function behind a plain wrapper": (timed(waiting), ["one"], "one"),
    "one behind a wrapper without a name": (unnamed(waiting), ["one"], "one"),
    "a function that returns a coroutine": (later, [], "later"),
    "what cannot be stored": (takes_anything, [Unstorable()], "Unstorable"),
    "a function with a description for an annotation": (annotated_in_words, ["one"], "one"),
    "a function whose annotation nobody can resolve": (annotated_for_readers, ["one"], "one"),
    "a function whose annotation cannot be checked": (annotated_against_pydantic, ["one"], "one"),
    "a built-in": (RAN.append, ["one"], "one"),
}


@pytest.mark.parametrize("name", UNDECORATED)
def test_whatever_fastapi_takes_runs_in_a_managed_route(tmp_path: Path, name: str) -> None:
    function, args, said = UNDECORATED[name]
    app, manager = FastAPI(), TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    TaskAdmin(app, manager, auto_install=True)

    @app.post("/add")
    async def add(background_tasks: BackgroundTasks) -> str:
        tasks: Any = background_tasks
        return str(tasks.add_task(function, *args))

    with TestClient(app) as client:
        answer = client.post("/add")
        assert answer.status_code == 200, answer.text
        record = client.portal.call(ended, manager, answer.json())  # type: ignore[union-attr]
    assert record.status is TaskStatus.SUCCESS, record.error
    assert [said] == RAN


async def ended(manager: TaskManager, task_id: str) -> Any:
    async def over() -> Any:
        record = await manager.store.get(task_id)
        return record if record.status.terminal else None

    return await eventually(over)


@pytest.mark.parametrize("executor", [None, "thread"])
@pytest.mark.parametrize("function", [timed(waiting), unnamed(waiting), later, Sender(), functools.partial(waiting)])
async def test_what_is_a_coroutine_in_the_end_is_awaited(
    start_manager: StartManager, function: Callable[..., Any], executor: Any
) -> None:
    manager = await start_manager()
    try:
        manager.task(name="odd", executor=executor, timeout=PATIENCE)(function)
    except TaskDefinitionError:
        assert executor == "thread"
        return
    await manager.result(await manager.enqueue(function), PATIENCE)
    assert len(RAN) == 1


@pytest.mark.parametrize("function", [numbers, more_numbers, timed(numbers)])
async def test_a_generator_is_refused_where_it_is_written_and_never_a_success(
    start_manager: StartManager, function: Callable[..., Any]
) -> None:
    manager = await start_manager()
    with pytest.raises(TaskDefinitionError, match="generator"):
        manager.task(function)
    record = await ended(manager, await manager.enqueue(unnamed(function)))
    assert (record.status, RAN) == (TaskStatus.FAILED, [])
    assert "generator" in record.error


# -- names


def test_two_functions_never_share_a_name() -> None:
    manager = TaskManager()
    manager.task(plain)
    with pytest.raises(TaskDefinitionError, match="name="):
        manager.task(lambda: None)
    for other in (timed(plain), functools.wraps(plain)(lambda: None)):
        with pytest.raises(TaskDefinitionError, match="two task functions"):
            manager.task(other)
    manager.task(plain)

    def make(number: int = 0) -> Callable[..., Any]:
        def job(number: int = number) -> int:
            return number

        return job

    manager.task(make(1))
    with pytest.raises(TaskDefinitionError, match="two task functions"):
        manager.task(make(2))


def test_a_module_that_is_reloaded_may_define_its_tasks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loaded_again.py").write_text("def job():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("loaded_again")
    manager = TaskManager()
    manager.task(module.job)
    manager.task(importlib.reload(module).job)
    assert manager.registry.named("job").function is module.job


@pytest.mark.parametrize("name", ["idempotency_key", "tags", "eager", "priority", "queue", "delay_seconds", "run_at"])
def test_a_parameter_named_like_an_option_is_refused_with_a_way_out(name: str) -> None:
    manager, space = TaskManager(), dict[str, Any]()
    exec(f"def clashing(title, {name}=None): ...\ndef apart(title, {name}, /): ...", space)
    with pytest.raises(TaskDefinitionError, match=f"{name}.*positional-only"):
        manager.task(space["clashing"])
    manager.task(space["apart"])


def test_an_undecorated_function_keeps_parameters_that_are_named_like_options(tmp_path: Path) -> None:
    app, manager = FastAPI(), TaskManager(snapshot_db=str(tmp_path / "tasks.db"))
    TaskAdmin(app, manager, auto_install=True)

    @app.post("/add")
    def add(background_tasks: BackgroundTasks) -> str:
        tasks: Any = background_tasks
        return str(tasks.add_task(with_priority, "mail", priority=3, tags={"a": "b"}))

    with TestClient(app) as client:
        record = client.portal.call(ended, manager, client.post("/add").json())  # type: ignore[union-attr]
    assert (record.status, record.priority, RAN) == (TaskStatus.SUCCESS, None, ["mail 3 {'a': 'b'}"])


# -- durable by their place


async def test_an_undecorated_function_is_known_by_its_module_and_others_by_no_name_that_can_be_found(
    start_manager: StartManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = await start_manager()
    names = {}
    for name, (function, args, _) in UNDECORATED.items():
        for _ in range(2):
            names[name] = (await ended(manager, await manager.enqueue(function, *args))).func_name
    assert names["a function"] == f"{__name__}.plain"
    durable = {name for name, found in names.items() if not found.endswith("(…)")}
    assert durable == {"a function", "a coroutine function", "a function that returns a coroutine"}
    warned = [record.args for record in caplog.records if "runs in this process only" in record.message]
    assert len(warned) == len(set(warned)) == len({found for found in names.values() if found.endswith("(…)")})


async def test_what_only_one_process_could_run_is_not_run_again(start_manager: StartManager) -> None:
    manager = await start_manager()
    record = await ended(manager, await manager.enqueue(unnamed(numbers)))
    with pytest.raises(UnknownFunction, match="only the process that accepted it"):
        await manager.store.retry(record.task_id)


async def test_a_call_for_this_process_waits_for_its_time_and_is_interrupted_by_a_stop(
    start_manager: StartManager,
) -> None:
    manager = await start_manager(shutdown_timeout=0.1)
    soon = await manager.enqueue(lambda: plain("soon"), delay_seconds=0.3)
    late = await manager.enqueue(lambda: plain("late"), delay_seconds=3600)
    assert RAN == []
    assert (await ended(manager, soon)).status is TaskStatus.SUCCESS
    await manager.shutdown()
    await manager.startup()
    assert (await manager.store.get(late)).status is TaskStatus.INTERRUPTED
    assert RAN == ["soon"]


MODULE = """
import asyncio, os, sys
from app.taskflow import TaskManager

manager = TaskManager(snapshot_db=os.environ["TASKS"])

async def main():
    async with manager.lifespan():
        if sys.argv[1] == "add":
            import their_jobs
            print(await manager.enqueue(their_jobs.note, sys.argv[2], delay_seconds=0.5))
            print(await manager.enqueue(lambda: asyncio.run(asyncio.sleep(3600))), flush=True)
            os.kill(os.getpid(), 9)
        print(await manager.result(sys.argv[2], 20))
        print((await manager.store.get(sys.argv[3])).status, (await manager.store.get(sys.argv[3])).error)

asyncio.run(main())
"""


def test_after_a_kill_a_function_of_a_module_is_found_again_and_a_lambda_interrupted(tmp_path: Path) -> None:
    (tmp_path / "their_jobs.py").write_text("def note(word):\n    return word + ' noted'\n")
    (tmp_path / "program.py").write_text(textwrap.dedent(MODULE))

    def run(*words: str) -> tuple[int, list[str]]:
        paths = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
        environment = {**os.environ, "TASKS": str(tmp_path / "tasks.db"), "PYTHONPATH": paths}
        command = [sys.executable, str(tmp_path / "program.py"), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout.splitlines()

    code, (durable, held) = run("add", "x")
    assert code == -signal.SIGKILL
    code, said = run("look", durable, held)
    assert (code, said[0]) == (0, "x noted")
    assert said[1] == "interrupted its process went away, and only that process could run it"


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.call",
        "shutil.rmtree",
        "uvicorn.run",
        "builtins.exec",
        "their_module_that_is_not_there.job",
        f"{__name__}.Sender.send",
        f"{__name__}.UNDECORATED",
        f"{__name__}.subprocess.call",
        f"{__name__}.eventually",
        "no dots",
        "..",
        "a b.c",
        "",
    ],
)
def test_a_stored_name_calls_nothing_but_a_function_of_that_name_in_the_application(name: str) -> None:
    assert imported(name) is None
    assert name not in TaskManager().registry


async def test_names_of_the_database_are_sought_once_and_not_for_ever(start_manager: StartManager) -> None:
    manager = await start_manager()
    assert imported(f"{__name__}.plain") is plain
    for number in range(2_000):
        assert f"unknown.number_{number}" not in manager.registry
    assert len(manager.registry._sought) <= 1_000
