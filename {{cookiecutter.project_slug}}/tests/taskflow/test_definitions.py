"""What is wrong where it is written is refused there, by one error; and what is right is what was meant."""

import functools
from collections.abc import Callable
from traceback import format_exception
from typing import Any

import pytest
from fastapi import FastAPI

from app.taskflow import (
    FileLogger,
    QueueConfig,
    QueueFullError,
    StdoutLogger,
    TaskAdmin,
    TaskArgumentError,
    TaskConfig,
    TaskDefinitionError,
    TaskflowError,
    TaskManager,
)


def job() -> None: ...


async def coroutine() -> None: ...


def needs_a_class_nobody_knows(value: "Nobody") -> None: ...  # type: ignore[name-defined]  # noqa: F821


async def judges_later(_error: BaseException) -> bool:
    return True


def annotated_by(annotation: object) -> Callable[..., None]:
    def job(value: Any) -> None: ...

    job.__annotations__ = {"value": annotation}
    return job


@pytest.fixture
def manager() -> TaskManager:
    return TaskManager()


WRONG: dict[str, Callable[[TaskManager], object]] = {
    "retries": lambda manager: manager.task(retries=-1),
    "name": lambda manager: manager.task(name=5),  # type: ignore[call-overload]
    "tags": lambda manager: manager.task(tags=5),  # type: ignore[call-overload]
    "executor": lambda manager: manager.task(executor="fiber"),  # type: ignore[call-overload]
    "executor of a coroutine": lambda manager: manager.task(executor="thread")(coroutine),
    "executor of a local function": lambda manager: manager.task(executor="process")(lambda: None),
    "annotations": lambda manager: manager.task(needs_a_class_nobody_knows),
    "annotations in words": lambda manager: manager.task(annotated_by("the name of a file")),
    "annotations of what a module does not have": lambda manager: manager.task(annotated_by("functools.nothing")),
    "annotations that raise": lambda manager: manager.task(annotated_by("1 / 0")),
    "no signature": lambda manager: manager.task(max),
    "a partial that cannot be called": lambda manager: manager.task(name="p")(functools.partial(job, 1)),  # type: ignore[call-arg]
    "retries that are a yes": lambda manager: manager.task(retries=True),
    "seconds that are a yes": lambda manager: manager.task(timeout=True),
    "seconds beyond all clocks": lambda manager: manager.task(timeout=10**400),
    "a predicate that nobody awaits": lambda manager: manager.task(retry_on=judges_later),  # type: ignore[arg-type]
    "overlap": lambda manager: manager.schedule(every=5, overlap="no"),  # type: ignore[arg-type]
    "a run at the start": lambda manager: manager.schedule(every=5, run_on_startup=1),  # type: ignore[arg-type]
    "arguments by name": lambda manager: manager.schedule(every=5, kwargs=[("a", 1)])(job),  # type: ignore[arg-type]
    "an endless interval": lambda manager: manager.schedule(every=10**400),
    "every and cron": lambda manager: manager.schedule(every=5, cron="* * * * *"),
    "timezone": lambda manager: manager.schedule(cron="* * * * *", timezone="Nowhere/At_All"),
    "misfire": lambda manager: manager.schedule(every=5, misfire="never"),  # type: ignore[arg-type]
    "no arguments by name": lambda manager: manager.schedule(every=5, kwargs=5),  # type: ignore[arg-type]
    "config": lambda _: TaskConfig(timeout=0),
    "queue": lambda _: QueueConfig(concurrency=0),
    "url": lambda _: TaskManager(snapshot_db="mongodb://here/db"),
    "no url": lambda _: TaskManager(snapshot_db="sqlite://["),
    "key": lambda _: TaskManager(encrypt_args_key="short"),
    "observer": lambda _: TaskManager(loggers=[object()]),
    "log level": lambda _: StdoutLogger(min_level="loud"),
    "log file": lambda _: FileLogger("tasks.log", mode="often"),
    "flag": lambda manager: manager.task(eager="yes"),  # type: ignore[call-overload]
    "threads": lambda _: TaskManager(max_sync_threads=0),
    "slots": lambda _: TaskManager(max_concurrent_tasks="many"),  # type: ignore[arg-type]
    "shutdown": lambda _: TaskManager(shutdown_timeout=-1),
    "retention": lambda _: TaskManager(retention_days=float("nan")),
    "queues": lambda _: TaskManager(queues=["a"]),  # type: ignore[arg-type]
    "one queue": lambda _: TaskManager(queues={"a": 5}),  # type: ignore[dict-item]
    "a queue that cannot be stored": lambda _: TaskManager(queues={"\ud800": QueueConfig()}),
    "a queue without a name": lambda _: TaskManager(queues={"": QueueConfig()}),
    "a size that is a yes": lambda _: TaskManager(max_size=True),
    "retention beyond the calendar": lambda _: TaskManager(retention_days=1e9),
    "retention beyond the calendar, here": lambda manager: TaskAdmin(FastAPI(), manager, retention_days=1e9),
    "one observer": lambda _: TaskManager(loggers=StdoutLogger()),  # type: ignore[arg-type]
    "a flag of the manager": lambda _: TaskManager(requeue_pending="no"),  # type: ignore[arg-type]
    "an empty place": lambda _: TaskManager(snapshot_db=""),
    "a place with a NUL": lambda _: TaskManager(snapshot_db="\0"),
    "a key that is no text": lambda _: TaskManager(encrypt_args_key=5),  # type: ignore[arg-type]
    "a time that is no time": lambda _: TaskManager(encrypted_since="2026"),  # type: ignore[arg-type]
    "no path": lambda manager: TaskAdmin(FastAPI(), manager, path=None),  # type: ignore[arg-type]
    "a text for seconds": lambda manager: TaskAdmin(FastAPI(), manager, poll_interval="30"),  # type: ignore[arg-type]
    "a flag of the admin": lambda manager: TaskAdmin(FastAPI(), manager, auto_install="no"),  # type: ignore[arg-type]
    "a secret of bytes": lambda manager: TaskAdmin(FastAPI(), manager, secret_key=b"x"),  # type: ignore[arg-type]
    "path": lambda manager: TaskAdmin(FastAPI(), manager, path="tasks"),
    "auth": lambda manager: TaskAdmin(FastAPI(), manager, auth=("only one",)),  # type: ignore[arg-type]
    "production": lambda manager: TaskAdmin(FastAPI(), manager, environment="production"),
    "expiry": lambda manager: TaskAdmin(FastAPI(), manager, token_expiry=0),
    "expiry in words": lambda manager: TaskAdmin(FastAPI(), manager, token_expiry="1h"),  # type: ignore[arg-type]
    "expiry after the calendar": lambda manager: TaskAdmin(FastAPI(), manager, token_expiry=10**12),
    "the admin's retention": lambda manager: TaskAdmin(FastAPI(), manager, retention_days=1e9),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_where_it_is_written_is_one_error(manager: TaskManager, what: str) -> None:
    with pytest.raises(TaskDefinitionError):
        WRONG[what](manager)


def test_errors_are_what_python_would_have_raised_too() -> None:
    assert issubclass(TaskDefinitionError, TaskflowError)
    assert issubclass(TaskDefinitionError, ValueError)
    assert issubclass(TaskArgumentError, ValueError)
    assert issubclass(QueueFullError, RuntimeError)


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        ("sqlite+aiosqlite:///tasks.db", "sqlite:///tasks.db"),
        ("sqlite+pysqlite:////var/tasks.db", "sqlite:////var/tasks.db"),
        ("sqlite://tasks.db", "sqlite:///tasks.db"),
        ("sqlite://data/tasks.db", "sqlite:///data/tasks.db"),
        ("sqlite:tasks.db", "sqlite:///tasks.db"),
        ("sqlite:/tasks.db", "sqlite:///tasks.db"),
    ],
)
def test_a_near_miss_of_a_url_is_told_what_to_write(url: str, instead: str) -> None:
    with pytest.raises(TaskDefinitionError, match=f"write {instead}$"):
        TaskManager(snapshot_db=url)


@pytest.mark.parametrize(
    "url",
    ["redis://:hunter2@host:port/0", "postgresql://ada:hunter2@host:54x2/db", "postgresql://ada:x@hunter:2@host/db"],
)
def test_a_url_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(TaskDefinitionError, match=r"://\*\*\*@host.*: not a URL such as") as refused:
        TaskManager(snapshot_db=url)
    assert "hunter" not in "".join(format_exception(refused.value))


def timed(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_a_decorator_between_a_schedule_and_its_task_leaves_it_its_settings(manager: TaskManager) -> None:
    above = timed(manager.task(retries=2)(job))
    assert manager.schedule(every=5)(above) is above
    assert manager.registry.named("job").max_attempts == 3
    assert "job" in manager.schedules


@pytest.mark.parametrize("outer", [lambda function: function, classmethod, timed])
def test_a_method_is_refused_because_its_object_is_not_stored(manager: TaskManager, outer: Any) -> None:
    with pytest.raises(TaskDefinitionError, match=r"is a method.*@staticmethod"):

        class Mailer:
            @outer  # type: ignore[untyped-decorator]
            @manager.task
            def send(self, text: str) -> None: ...


def test_functions_in_a_class_that_are_no_methods_are_tasks(manager: TaskManager) -> None:
    class Jobs:
        @manager.task
        @staticmethod
        def first(text: str) -> None: ...

        @manager.task
        def second() -> None: ...  # type: ignore[misc]

    @manager.task
    def third(self: str) -> None: ...

    assert {definition.name for definition in manager.registry} == {"first", "second", "third"}


def test_the_method_of_one_object_is_a_task_however_it_is_looked_up(manager: TaskManager) -> None:
    class Mailer:
        def send(self, text: str) -> None: ...

    mailer, other = Mailer(), Mailer()
    manager.task(name="send", retries=3)(mailer.send)
    assert manager.registry.of(mailer.send).max_attempts == 4
    assert manager.registry.known(other.send) is None


def test_a_partial_of_a_task_is_not_that_task(manager: TaskManager) -> None:
    partial = functools.update_wrapper(functools.partial(manager.task(job)), job)
    assert manager.registry.known(partial) is None
    assert manager.registry.known(timed(partial)) is None
