"""Worker processes: what crosses to them and back, how they die, and that none is left behind."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

import pytest
from pydantic import SecretStr

from app.taskflow import CancelTask, RetryLater, TaskFailed, TaskflowError, TaskManager, TaskStatus
from app.taskflow.backends import open_backend
from app.taskflow.context import TaskContext
from app.taskflow.errors import UnreadableCall, WorkerError, WorkerLost
from app.taskflow.executors import Call
from app.taskflow.models import TaskConfig
from app.taskflow.process_worker import Request, definition_of
from app.taskflow.processes import ProcessExecutor
from app.taskflow.registry import TaskRegistry

from . import process_tasks as tasks
from .conftest import StartManager
from .helpers import PATIENCE, Words, eventually, next_id

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
START = 60.0
"""Seconds that a worker may take to start on a busy machine."""


@pytest.fixture(scope="module")
def warm() -> Iterator[ProcessExecutor]:
    """Two workers that the tests share: starting one takes a second."""
    executor = ProcessExecutor(2, shutdown_timeout=5.0)
    yield executor
    executor.close()
    asyncio.run(executor.wait_closed(monotonic() + PATIENCE))


@asynccontextmanager
async def cold(slots: int = 1, shutdown_timeout: float = 5.0) -> AsyncIterator[ProcessExecutor]:
    executor = ProcessExecutor(slots, shutdown_timeout)
    yield executor
    executor.close()
    await executor.wait_closed(monotonic() + PATIENCE)


def call(
    function: Callable[..., Any], *args: Any, sink: Words | None = None, timeout: float | None = None, **kwargs: Any
) -> Call:
    definition = TaskRegistry().add(function, TaskConfig(executor="process", timeout=timeout))
    context = TaskContext(next_id(), function.__name__, 2, {"team": "blue"}, sink or Words(), "00-aa-bb-01")
    return Call(definition, definition.encode(args, kwargs), context)


def running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()
    return state != "Z"


async def none_left(pids: list[int]) -> None:
    await eventually(lambda: not any(running(pid) for pid in pids))


async def pids_in(file: Path, number: int = 1) -> list[int]:
    """What the workers wrote, once there are so many lines."""

    def written() -> list[int]:
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [int(line) for line in lines if line.endswith("\n")] if len(lines) >= number else []

    found: list[int] = await eventually(written, START)
    return found


# -- what may be decorated


def nested() -> Callable[[], None]:
    def inner() -> None: ...

    return inner


class Holder:
    def method(self) -> None: ...


@pytest.mark.parametrize("function", [nested(), lambda: None, Holder().method, print])
def test_a_function_that_a_worker_could_not_import_is_refused_where_it_is_decorated(
    function: Callable[..., Any],
) -> None:
    with pytest.raises(TaskflowError, match="not a function at the top level of a module"):
        TaskManager().task(executor="process", name="job")(function)


def test_a_coroutine_function_is_refused_for_a_process() -> None:
    async def job() -> None: ...

    with pytest.raises(TaskflowError, match="is an async def"):
        TaskManager().task(executor="process")(job)


async def test_a_function_that_its_module_no_longer_has_under_its_name_is_refused(
    warm: ProcessExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = call(tasks.add, 1)
    monkeypatch.setattr(tasks, "add", tasks.pid)
    with pytest.raises(TaskflowError, match=r"process_tasks.add is not what that name stands for"):
        await warm.run(job)


# -- there and back


async def test_arguments_arrive_as_they_are_annotated_and_the_result_keeps_its_types(warm: ProcessExecutor) -> None:
    when = datetime(2026, 1, 1, tzinfo=UTC)
    point = tasks.Point(1, Decimal("2.50"))
    expected = ["Point", 1, Decimal("2.50"), when, {"a", "b"}, {"more": b"\0"}, (1, 2.5, None)]
    assert await warm.run(call(tasks.describe, point, when, "a", "b", more=b"\0")) == expected
    assert await warm.run(call(tasks.die, "not at all")) is None


async def test_arguments_that_were_validated_at_the_caller_are_not_validated_in_the_worker(
    warm: ProcessExecutor,
) -> None:
    order = tasks.Suspend(user="u", key=SecretStr("s"))
    assert await warm.run(call(tasks.charged, 5, order)) == (500, "Suspend", "u", "s")


async def test_stored_arguments_that_are_no_call_of_the_function_fail_for_good(warm: ProcessExecutor) -> None:
    job = call(tasks.add, 1)
    with pytest.raises(UnreadableCall, match="stored arguments cannot be read"):
        await warm.run(Call(job.definition, '[["one"],{}]', job.context))


async def test_a_task_knows_its_context_and_leaves_nothing_of_its_own_to_the_next(warm: ProcessExecutor) -> None:
    job = call(tasks.tell_context)
    told = [job.context.task_id, "tell_context", 2, {"team": "blue"}, "00-aa-bb-01"]
    assert await warm.run(job) == told
    assert {await warm.run(call(tasks.leak_context, "mine")) for _ in range(5)} == {"nowhere"}


async def test_log_lines_and_progress_arrive_in_order_before_the_result(warm: ProcessExecutor) -> None:
    words = Words()
    assert await warm.run(call(tasks.talk, sink=words)) == "done"
    (first, second) = words.lines[:2]
    assert first == ("warning", "first", {"n": 1, "where": "here"})
    assert (second[1], list(second[2])) == ("second", ["circle"])
    assert words.progressed == [{"done": 1, "total": 2, "message": "half"}]


async def test_a_thread_that_outlives_its_call_is_not_heard_in_the_next(warm: ProcessExecutor, tmp_path: Path) -> None:
    words = Words()
    await warm.run(call(tasks.whisper_later, str(tmp_path / "whispered"), sink=words))
    assert await warm.run(call(tasks.meet, str(tmp_path), "next", 2, sink=words))
    assert words.lines == []


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (tasks.return_what_has_no_stored_form, "builtins.object has no stored form"),
        (tasks.return_too_much, "1000002 characters, more than 65536"),
    ],
)
async def test_a_result_that_cannot_be_stored_is_none_with_a_warning_in_the_log(
    warm: ProcessExecutor, function: Callable[..., Any], reason: str
) -> None:
    words = Words()
    assert await warm.run(call(function, sink=words)) is None
    assert words.lines == [("warning", f"the result was not stored: {reason}", {})]


async def test_the_task_is_the_function_that_was_decorated_and_not_what_was_put_around_it(
    warm: ProcessExecutor,
) -> None:
    assert await warm.run(call(inspect.unwrap(tasks.double), 21)) == 42


async def test_a_module_that_a_worker_cannot_import_fails_the_task_with_what_it_raised(
    warm: ProcessExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("only_here")
    exec("def job() -> None: ...", vars(module))
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(ModuleNotFoundError, match="only_here"):
        await warm.run(call(module.job))


@pytest.mark.parametrize(("name", "layers"), [("missing", 0), ("add", 1)])
def test_a_function_that_is_not_in_its_module_is_named(name: str, layers: int) -> None:
    request = Request(tasks.__name__, name, layers, "job", "[[],{}]", {})
    with pytest.raises(TaskflowError, match=f"imported {tasks.__name__} and found no {name} in it"):
        definition_of(request, TaskRegistry())


# -- exceptions


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("lookup", LookupError("gone")),
        ("os", FileNotFoundError(2, "no such file", "there.txt")),
        ("api", tasks.ApiError(503, "busy")),
        ("frozen", tasks.Frozen(7)),
        ("later", RetryLater(12.5)),
        ("cancel", CancelTask("not needed any more")),
        ("exit", SystemExit(3)),
        ("interrupt", KeyboardInterrupt()),
        ("cancelled", asyncio.CancelledError("inside")),
        ("noted", LookupError("noted")),
    ],
)
async def test_what_a_task_raises_comes_back_as_the_type_it_is(
    warm: ProcessExecutor, kind: str, expected: BaseException
) -> None:
    with pytest.raises(type(expected)) as raised:
        await warm.run(call(tasks.fail, kind))
    assert str(raised.value) == str(expected)
    facts = {name: value for name, value in vars(expected).items() if name != "lock"}
    assert facts.items() <= vars(raised.value).items()


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [("local", "fail.<locals>.Local", "of a function"), ("unpackable", "Unpackable", "why")],
)
async def test_an_exception_that_cannot_cross_keeps_its_name_and_its_text(
    warm: ProcessExecutor, kind: str, name: str, text: str
) -> None:
    with pytest.raises(WorkerError) as raised:
        await warm.run(call(tasks.fail, kind))
    assert (raised.value.kind, str(raised.value)) == (name, text)
    assert f"{name.rpartition('.')[2]}: {text}" in str(raised.value.__cause__)


async def test_an_exception_without_words_is_named_by_its_type(warm: ProcessExecutor) -> None:
    with pytest.raises(WorkerError, match=r"^Unprintable$"):
        await warm.run(call(tasks.fail, "unprintable"))


async def test_the_traceback_is_the_worker_s_from_the_user_s_function_on(warm: ProcessExecutor) -> None:
    with pytest.raises(ValueError, match="after that") as raised:
        await warm.run(call(tasks.fail, "chained"))
    trace = str(raised.value.__cause__)
    assert 'raise LookupError("gone")' in trace
    assert "direct cause" in trace
    assert trace.endswith("ValueError: after that")
    assert "process_worker.py" not in trace


async def test_notes_and_the_last_word_of_an_exception_survive(warm: ProcessExecutor) -> None:
    with pytest.raises(LookupError) as raised:
        await warm.run(call(tasks.fail, "noted"))
    assert raised.value.__notes__ == ["a note"]


# -- workers


async def test_workers_start_when_needed_are_kept_and_leave_at_the_end_or_are_killed(tmp_path: Path) -> None:
    async with cold(2, shutdown_timeout=1.0) as executor:
        one = await executor.run(call(tasks.pid))
        assert {await executor.run(call(tasks.pid)) for _ in range(5)} == {one}
        meeting = tmp_path / "meeting"
        meeting.mkdir()
        both = await asyncio.gather(*[executor.run(call(tasks.meet, str(meeting), name, 2)) for name in "ab"])
        assert one in both
        assert len({*both, os.getpid()}) == 3
        assert {await executor.run(call(tasks.pid)) for _ in range(5)} <= set(both)
        stays = [
            call(tasks.stay_at_exit, str(tmp_path / name), seconds)
            for name, seconds in (("quick", 0.0), ("slow", tasks.LONG))
        ]
        assert set(await asyncio.gather(*[executor.run(stay) for stay in stays])) == set(both)
        began = monotonic()
    assert 0.9 < monotonic() - began < PATIENCE
    assert set(os.listdir(tmp_path)) == {"meeting", "quick", "slow"}
    assert not any(running(pid) for pid in both)


@pytest.mark.parametrize("slots", [None, 3])
def test_there_is_a_slot_for_each_worker_and_by_default_a_worker_for_each_cpu(slots: int | None) -> None:
    assert ProcessExecutor(slots).slots == (slots or os.cpu_count())


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("segfault", "its worker process was killed by SIGSEGV"),
        ("close", "its worker process was killed by SIGKILL"),
    ],
)
async def test_a_worker_that_dies_fails_its_own_task_and_is_replaced(
    warm: ProcessExecutor, tmp_path: Path, how: str, error: str
) -> None:
    file = tmp_path / "wait"
    other = asyncio.create_task(warm.run(call(tasks.wait_for, str(file))))
    await pids_in(file)
    with pytest.raises(WorkerLost) as raised:
        await warm.run(call(tasks.die, how))
    assert str(raised.value) == error
    assert await warm.run(call(tasks.add, 1)) == 2
    assert not other.done()
    file.unlink()
    assert await other == "waited"


async def test_a_worker_that_died_while_it_was_idle_costs_no_task(warm: ProcessExecutor) -> None:
    idle = await warm.run(call(tasks.pid))
    os.kill(idle, signal.SIGKILL)
    await eventually(lambda: not running(idle))
    assert await warm.run(call(tasks.pid)) != idle


async def test_a_cancelled_task_s_worker_is_killed_with_the_programs_it_started(
    warm: ProcessExecutor, tmp_path: Path
) -> None:
    file = tmp_path / "pids"
    job = asyncio.create_task(warm.run(call(tasks.hold, "program", str(file))))
    pids = await pids_in(file, 2)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await none_left(pids)


async def test_a_task_that_is_cancelled_before_its_worker_is_there_never_runs(tmp_path: Path) -> None:
    async with cold() as executor:
        job = asyncio.create_task(executor.run(call(tasks.meet, str(tmp_path), "ran", 1)))
        await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
    assert os.listdir(tmp_path) == []


async def test_a_process_that_a_task_forked_is_not_a_second_worker(warm: ProcessExecutor) -> None:
    words = Words()
    results = [await warm.run(call(tasks.fork_and_return, sink=words)) for _ in range(3)]
    assert all(result > 0 for result in results)
    assert words.lines == []


async def test_a_task_may_fork_processes_of_its_own_and_end_them(warm: ProcessExecutor) -> None:
    async with asyncio.timeout(PATIENCE):
        assert await warm.run(call(tasks.end_a_fork)) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_for_all_processes_of_the_service_does_not_end_a_running_task(
    warm: ProcessExecutor, tmp_path: Path, number: int
) -> None:
    file = tmp_path / "wait"
    job = asyncio.create_task(warm.run(call(tasks.wait_for, str(file))))
    (pid,) = await pids_in(file)
    os.kill(pid, number)
    file.unlink()
    assert await job == "waited"


async def test_an_executor_that_was_closed_starts_again(warm: ProcessExecutor) -> None:
    one = await warm.run(call(tasks.pid))
    warm.close()
    await warm.wait_closed(monotonic() + PATIENCE)
    assert not running(one)
    assert await warm.run(call(tasks.pid)) != one


# -- the end of the parent


@contextmanager
def program(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`process_app`, in a session of its own; killed at the end of the test, whatever happened."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.taskflow.process_app", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running_program:
        try:
            yield running_program
        finally:
            running_program.kill()


UNSTOPPABLE = "c" if sys.platform == "linux" else "python"
"""C code that keeps the interpreter's lock is ended by the kernel, where it can be told to."""


async def killed(file: Path, kind: str, number: int) -> None:
    with program(str(file), "stay", kind) as parent:
        pids = await pids_in(file)
        assert running(pids[0])
        os.kill(parent.pid, number)
        await none_left(pids)
        out, err = parent.communicate()  # ends when nobody has the pipes any more
    assert sorted(out.splitlines()) == [f"{kind} begins", "started"]
    assert err == ""


async def left(file: Path, kind: str) -> None:
    with program(str(file), "leave", kind) as parent:
        pids = await pids_in(file)
        _, err = await asyncio.to_thread(parent.communicate, "\n", timeout=START)
        assert (parent.returncode, err) == (5, "")
        await none_left(pids)


async def test_no_worker_is_left_however_its_parent_ends_and_whatever_its_task_does(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as ends:
        ends.create_task(killed(tmp_path / "one", UNSTOPPABLE, signal.SIGKILL))
        ends.create_task(killed(tmp_path / "two", "python", signal.SIGTERM))
        ends.create_task(left(tmp_path / "three", "idle"))


async def test_ctrl_c_in_a_terminal_prints_no_traceback_of_a_worker_even_while_it_starts(tmp_path: Path) -> None:
    with program(str(tmp_path / "pids"), "stop", "sleep") as parent:
        assert parent.stdout is not None
        said = {await asyncio.to_thread(parent.stdout.readline) for _ in range(2)}
        assert said == {"started\n", "a worker starts\n"}
        os.killpg(parent.pid, signal.SIGINT)
        _, err = await asyncio.to_thread(parent.communicate, timeout=START)
    assert parent.returncode == 0
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err


def test_a_main_module_that_starts_its_service_when_it_is_imported_is_told_so_by_its_worker(tmp_path: Path) -> None:
    main = tmp_path / "unguarded.py"
    main.write_text(
        f"""
import asyncio, sys
sys.path.insert(0, {str(ROOT)!r})
from app.taskflow import TaskManager
from tests.taskflow.process_tasks import add

async def main():
    manager = TaskManager(max_process_workers=1)
    manager.task(executor="process")(add)
    async with manager.lifespan():
        try:
            await manager.result(await manager.enqueue(add, 1), {START})
        except Exception as error:
            print(error)

asyncio.run(main())
"""
    )
    ended = subprocess.run([sys.executable, str(main)], capture_output=True, text=True, timeout=2 * START)
    assert ended.stdout.endswith("its worker process ended with exit code 1 before the task began\n")
    assert 'put what starts it below `if __name__ == "__main__":`' in ended.stderr


# -- as tasks


async def test_a_process_task_is_retried_logged_and_its_result_stored_like_any_other(
    start_manager: StartManager,
) -> None:
    manager = await start_manager(
        lambda manager: manager.task(executor="process", retries=1, retry_on=tasks.ApiError)(tasks.flaky),
        max_process_workers=1,
    )
    task_id = await manager.enqueue(tasks.flaky)
    assert await manager.result(task_id, START) == "attempt 2"
    assert [(line.attempt, line.message) for line in await manager.store.logs(task_id)] == [
        (number, f"attempt {number}") for number in range(3)
    ]
    first, _ = [event for event in await manager.store.events(task_id) if event.kind == "retrying"]
    assert first.detail == "503: busy"


async def test_a_process_task_is_killed_by_its_timeout_an_operator_and_the_shutdown(
    start_manager: StartManager, tmp_path: Path
) -> None:
    def define(manager: TaskManager) -> None:
        manager.task(executor="process", timeout=0.2)(tasks.pid)
        manager.task(executor="process", timeout=0.2)(tasks.meet)
        manager.task(executor="process")(tasks.hold)

    (meeting := tmp_path / "meeting").mkdir()
    files = {name: tmp_path / name for name in ("cancelled", "interrupted")}
    manager = await start_manager(define, max_process_workers=3, shutdown_timeout=0.1)
    ids = {name: await manager.enqueue(tasks.hold, "sleep", str(file)) for name, file in files.items()}

    began = monotonic()
    pid = await manager.result(await manager.enqueue(tasks.pid), START)
    assert monotonic() - began > 0.2, "else this says nothing: the time in which its worker starts does not count"
    with pytest.raises(TaskFailed, match=r"timed out after 0.2 s"):
        await manager.result(await manager.enqueue(tasks.meet, str(meeting), "alone", 2), START)
    await none_left([pid])

    pids = {name: (await pids_in(file))[0] for name, file in files.items()}
    await manager.store.cancel(ids["cancelled"])
    with pytest.raises(TaskFailed, match="cancelled by an operator"):
        await manager.result(ids["cancelled"], START)
    await none_left([pids["cancelled"]])

    assert running(pids["interrupted"])
    await manager.shutdown()
    assert not running(pids["interrupted"])
    backend = open_backend(str(tmp_path / "tasks.db"))
    await backend.open()
    record = await backend.get(ids["interrupted"])
    await backend.close()
    assert record is not None
    assert record.status is TaskStatus.INTERRUPTED
