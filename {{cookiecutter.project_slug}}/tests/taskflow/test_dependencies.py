"""`Depends` in tasks: FastAPI resolves them for each attempt, they are closed after it, and none may need a request."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from fastapi import (
    BackgroundTasks,
    Body,
    Cookie,
    Depends,
    FastAPI,
    Form,
    Header,
    HTTPException,
    Query,
    Request,
    Response,
    Security,
    WebSocket,
)
from fastapi import Path as PathParameter
from fastapi.security import HTTPBearer, SecurityScopes
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from app.taskflow import (
    CancelTask,
    RetryLater,
    TaskAdmin,
    TaskArgumentError,
    TaskFailed,
    TaskflowError,
    TaskManager,
    get_task_context,
    task_log,
)
from app.taskflow import dependencies as dependencies_module
from app.taskflow.backends.base import Finish
from app.taskflow.dependencies import dependencies_of
from app.taskflow.models import TaskConfig

from .conftest import StartManager
from .helpers import PATIENCE, eventually

if TYPE_CHECKING:
    OnlyForTypeCheckers = str

pytestmark = pytest.mark.anyio

place: ContextVar[str] = ContextVar("place", default="nowhere")


class Session:
    """What a dependency opens: it knows how it was closed."""

    opened: "list[Session]" = []  # noqa: RUF012 - emptied before each test

    def __init__(self) -> None:
        self.closed = False
        self.saw: BaseException | None = None
        Session.opened.append(self)


@pytest.fixture(autouse=True)
def every_session_is_closed_in_the_end() -> Iterator[None]:
    Session.opened = []
    yield
    assert all(session.closed for session in Session.opened)


async def get_session() -> AsyncIterator[Session]:
    session = Session()
    try:
        yield session
    except BaseException as error:
        session.saw = error
        raise
    finally:
        await asyncio.sleep(0)
        session.closed = True


def get_sync_session() -> Iterator[Session]:
    session = Session()
    try:
        yield session
    except BaseException as error:
        session.saw = error
        raise
    finally:
        session.closed = True


def get_word() -> str:
    return "word"


Open = Annotated[Session, Depends(get_session)]
SyncOpen = Annotated[Session, Depends(get_sync_session)]
Word = Annotated[str, Depends(get_word)]
Overrides = dict[Callable[..., Any], Callable[..., Any]]


def only_session() -> Session:
    (session,) = Session.opened
    return session


def define(function: Callable[..., Any], **options: Any) -> Any:
    return TaskManager().registry.add(function, TaskConfig(**options))


# -- arguments and dependencies


async def test_dependencies_are_resolved_and_arguments_passed_wherever_they_stand(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task
    async def mixed(session: Open, number: int, word: str = Depends(get_word), *more: int, last: str = "") -> list[Any]:
        assert not session.closed
        return [number, word, more, last]

    @manager.task
    def positional(word: Word, number: int = 1, /, *, other: int = 2, **rest: int) -> list[Any]:
        return [word, number, other, rest]

    assert await manager.result(await manager.enqueue(mixed, 1)) == [1, "word", (), ""]
    assert await manager.result(await manager.enqueue(mixed, 1, 2, 3, last="y")) == [1, "word", (2, 3), "y"]
    assert await manager.result(await manager.enqueue(positional)) == ["word", 1, 2, {}]
    assert await manager.result(await manager.enqueue(positional, 5, other=6, extra=7)) == ["word", 5, 6, {"extra": 7}]


async def test_dependencies_are_not_stored_and_arguments_are_checked_as_ever(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task
    async def job(session: Open, number: int) -> int:
        return number + 1

    arguments: list[Any] = ["41"]  # what pydantic makes of it is for pydantic
    task_id = await manager.enqueue(job, *arguments)
    assert await manager.result(task_id) == 42
    assert manager.store.arguments(await manager.store.get(task_id)) == ((41,), {})
    with pytest.raises(TaskArgumentError, match=r"job\(\): argument 'number' = 'x'"):
        await manager.enqueue(job, "x")
    with pytest.raises(TaskArgumentError, match=r"job\(\): argument 'number': Missing"):
        await manager.enqueue(job)


def test_who_passes_a_dependency_is_told_so() -> None:
    async def strict(number: int, word: Word) -> None: ...

    async def lenient(number: int, word: Word, **rest: Any) -> None: ...

    for function in (strict, lenient):
        with pytest.raises(TaskArgumentError, match="'word' = 'mine': is resolved by Depends when the task runs"):
            define(function).encode((1,), {"word": "mine"})
    with pytest.raises(TaskArgumentError, match="argument '1' = 'mine': Unexpected positional argument"):
        define(strict).encode((1, "mine"), {})


def test_a_function_without_depends_has_no_dependencies() -> None:
    def job(number: Annotated[int, "a word"], request: object = None) -> None: ...

    assert dependencies_of(job) is None
    assert define(job).dependencies is None


async def written_as_text(session: "Open", number: "int", word: "Annotated[str, Depends(get_word)]") -> list[Any]:
    return [session.closed, number, word]


class Settings:
    def __init__(self, word: Word) -> None:
        self.word = word


async def test_every_way_of_writing_a_dependency_works(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task
    async def by_class(settings: Annotated[Settings, Depends()], other: Settings = Depends()) -> list[Any]:
        return [settings.word, other is settings]

    @manager.task
    async def for_type_checkers(word: "OnlyForTypeCheckers" = Depends(get_word)) -> str:
        return str(word)

    @manager.task
    async def by_partial(word: Annotated[str, Depends(partial(str.upper, "word"))]) -> str:
        return word

    @manager.task
    async def optional(word: Annotated[str | None, Depends(get_word)] = None) -> str | None:
        return word

    assert await manager.result(await manager.enqueue(written_as_text, 1)) == [False, 1, "word"]
    assert await manager.result(await manager.enqueue(by_class)) == ["word", True]
    assert await manager.result(await manager.enqueue(for_type_checkers)) == "word"
    assert await manager.result(await manager.enqueue(by_partial)) == "WORD"
    assert await manager.result(await manager.enqueue(optional)) == "word"


# -- one attempt


@pytest.mark.parametrize("wanted", [Open, SyncOpen], ids=["async session", "sync session"])
async def test_a_yield_dependency_is_open_while_the_function_runs_and_closed_after_it(
    start_manager: StartManager, wanted: Any
) -> None:
    manager = await start_manager()
    seen: list[bool] = []

    @manager.task
    async def in_loop(session: wanted) -> None:
        seen.append(session.closed)

    @manager.task
    def in_thread(session: wanted) -> None:
        seen.append(session.closed)

    for function in (in_loop, in_thread):
        await manager.result(await manager.enqueue(function))
    assert seen == [False, False]
    assert [session.closed for session in Session.opened] == [True, True]
    assert [session.saw for session in Session.opened] == [None, None]


async def test_it_is_closed_before_the_result_is_written(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = await start_manager()
    closed: list[bool] = []
    finish = manager.journal.finish

    def finish_and_look(finished: Finish) -> None:
        closed.append(only_session().closed)
        finish(finished)

    monkeypatch.setattr(manager.journal, "finish", finish_and_look)

    @manager.task
    async def job(session: Open) -> None: ...

    await manager.result(await manager.enqueue(job))
    assert closed == [True]


@pytest.mark.parametrize("error", [LookupError("gone"), CancelTask("enough"), RetryLater(1_000)])
@pytest.mark.parametrize("wanted", [Open, SyncOpen], ids=["async session", "sync session"])
async def test_what_the_function_raises_is_seen_by_its_dependencies_as_in_a_route(
    start_manager: StartManager, error: Exception, wanted: Any
) -> None:
    manager = await start_manager()

    @manager.task
    async def job(session: wanted) -> None:
        raise error

    await manager.enqueue(job)
    await eventually(lambda: Session.opened and only_session().closed)
    assert only_session().saw is error


async def test_each_attempt_gets_its_own(start_manager: StartManager) -> None:
    manager = await start_manager()

    @manager.task(retries=2)
    async def job(session: Open) -> None:
        raise LookupError(f"session {len(Session.opened)}, open: {sum(not one.closed for one in Session.opened)}")

    with pytest.raises(TaskFailed, match="session 3, open: 1"):
        await manager.result(await manager.enqueue(job))


async def test_one_attempt_resolves_a_shared_dependency_once_unless_it_says_otherwise(
    start_manager: StartManager,
) -> None:
    manager = await start_manager()

    def get_twice(session: Open, again: Open) -> bool:
        return session is again

    fresh = Depends(get_session, use_cache=False)

    @manager.task
    async def job(session: Open, twice: bool = Depends(get_twice), other: Session = fresh) -> list[bool]:
        return [twice, other is session]

    assert await manager.result(await manager.enqueue(job)) == [True, False]
    assert len(Session.opened) == 2


async def test_dependencies_are_closed_in_the_reverse_of_their_order(start_manager: StartManager) -> None:
    manager = await start_manager()
    order: list[str] = []

    def step(name: str) -> Callable[..., Any]:
        async def get() -> AsyncIterator[None]:
            order.append(f"open {name}")
            yield
            order.append(f"close {name}")

        return get

    first = step("first")

    async def second(before: None = Depends(first)) -> AsyncIterator[None]:
        order.append("open second")
        yield
        order.append("close second")

    @manager.task
    async def job(one: None = Depends(second), soon: None = Depends(step("function"), scope="function")) -> None:
        order.append("run")

    await manager.result(await manager.enqueue(job))
    opened = ["open first", "open second", "open function"]
    assert order == [*opened, "run", "close function", "close second", "close first"]


async def test_plain_dependencies_run_in_threads_and_async_ones_on_the_loop_inside_the_task(
    start_manager: StartManager,
) -> None:
    manager = await start_manager()

    def get_thread() -> str:
        task_log("from the dependency")
        return threading.current_thread().name

    async def get_place() -> str:
        context = get_task_context()
        assert context is not None
        place.set(context.func_name)
        return threading.current_thread().name

    @manager.task
    def job(thread: str = Depends(get_thread), loop: str = Depends(get_place)) -> list[Any]:
        return [thread == loop, place.get()]

    task_id = await manager.enqueue(job)
    assert await manager.result(task_id) == [False, "job"]
    assert [line.message for line in await manager.store.logs(task_id)] == ["from the dependency"]


# -- ends


async def test_a_cancelled_task_closes_its_dependencies_however_often_it_is_asked(start_manager: StartManager) -> None:
    manager = await start_manager()
    closing, release = asyncio.Event(), asyncio.Event()

    async def get_slow() -> AsyncIterator[Session]:
        session = Session()
        try:
            yield session
        finally:
            closing.set()
            await release.wait()
            session.closed = True

    @manager.task
    async def endless(session: Annotated[Session, Depends(get_slow)]) -> None:
        await asyncio.Event().wait()

    task_id = await manager.enqueue(endless)
    await eventually(lambda: Session.opened)
    await manager.store.cancel(task_id)
    await asyncio.wait_for(closing.wait(), PATIENCE)
    for _ in range(3):
        manager.dispatcher.cancel((task_id, 1))
        await asyncio.sleep(0)
    release.set()
    with pytest.raises(TaskFailed, match="cancelled by an operator"):
        await manager.result(task_id)


async def test_a_task_that_returned_stays_a_success_when_it_is_cancelled_while_its_dependencies_close(
    start_manager: StartManager,
) -> None:
    manager = await start_manager()
    closing, release = asyncio.Event(), asyncio.Event()

    async def get_slow() -> AsyncIterator[None]:
        yield
        closing.set()
        await release.wait()

    @manager.task
    async def job(slow: None = Depends(get_slow)) -> int:
        return 42

    task_id = await manager.enqueue(job)
    await asyncio.wait_for(closing.wait(), PATIENCE)
    await manager.store.cancel(task_id)
    await asyncio.sleep(0)
    release.set()
    assert await manager.result(task_id) == 42


@pytest.mark.parametrize("wanted", [Open, SyncOpen], ids=["async session", "sync session"])
async def test_a_task_that_times_out_closes_its_dependencies_which_see_the_timeout(
    start_manager: StartManager, wanted: Any
) -> None:
    manager = await start_manager()

    @manager.task(timeout=0.05)
    async def endless(session: wanted) -> None:
        await asyncio.Event().wait()

    with pytest.raises(TaskFailed, match=r"timed out after 0\.05 s"):
        await manager.result(await manager.enqueue(endless))
    assert isinstance(only_session().saw, TimeoutError)


async def test_a_dependency_that_does_not_resolve_counts_into_the_timeout(start_manager: StartManager) -> None:
    manager = await start_manager()

    async def get_stuck(session: Open) -> None:
        await asyncio.Event().wait()

    @manager.task(timeout=0.05)
    async def job(stuck: None = Depends(get_stuck)) -> None: ...

    with pytest.raises(TaskFailed, match=r"timed out after 0\.05 s"):
        await manager.result(await manager.enqueue(job))
    assert only_session().closed


async def test_a_dependency_that_does_not_close_is_given_up_and_its_slot_is_free_again(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependencies_module, "LONGEST_CLOSING", 0.05)
    manager = await start_manager(max_concurrent_tasks=1)

    async def get_stuck(session: Open) -> AsyncIterator[None]:
        yield
        await asyncio.Event().wait()

    @manager.task
    async def job(stuck: None = Depends(get_stuck)) -> None: ...

    for _ in range(2):
        with pytest.raises(TaskFailed, match=r"its dependencies did not close within 0\.05 s"):
            await manager.result(await manager.enqueue(job))
    assert [session.closed for session in Session.opened] == [True, True]


async def test_a_stop_that_interrupts_a_task_closes_its_dependencies(start_manager: StartManager) -> None:
    manager = await start_manager(shutdown_timeout=0.0)

    @manager.task
    async def endless(session: Open) -> None:
        await asyncio.Event().wait()

    await manager.enqueue(endless)
    await eventually(lambda: Session.opened)
    await manager.shutdown()
    assert isinstance(only_session().saw, asyncio.CancelledError)


async def test_a_dependency_that_fails_fails_the_attempt_and_closes_those_before_it(
    start_manager: StartManager,
) -> None:
    manager = await start_manager()
    ran: list[int] = []

    def get_user(session: Open) -> None:
        raise HTTPException(404, "no such user")

    @manager.task(retries=1)
    async def job(user: None = Depends(get_user)) -> None:
        ran.append(1)

    with pytest.raises(TaskFailed, match="404: no such user"):
        await manager.result(await manager.enqueue(job))
    assert not ran
    assert [type(session.saw) for session in Session.opened] == [HTTPException, HTTPException]


async def test_a_dependency_that_fails_while_it_closes_fails_the_attempt(start_manager: StartManager) -> None:
    manager = await start_manager()

    async def get_uncommitted() -> AsyncIterator[None]:
        yield
        raise LookupError("the commit failed")

    @manager.task
    async def job(session: Open, other: None = Depends(get_uncommitted)) -> int:
        return 1

    with pytest.raises(TaskFailed, match="the commit failed"):
        await manager.result(await manager.enqueue(job))


async def test_a_dependency_may_replace_the_error_but_not_swallow_it(start_manager: StartManager) -> None:
    manager = await start_manager()

    async def replace() -> AsyncIterator[None]:
        try:
            yield
        except LookupError as error:
            raise ValueError("another") from error

    async def swallow() -> AsyncIterator[None]:
        with suppress(LookupError):
            yield

    @manager.task
    async def replaced(other: None = Depends(replace)) -> None:
        raise LookupError("the first")

    @manager.task
    async def swallowed(other: None = Depends(swallow)) -> None:
        raise LookupError("the first")

    with pytest.raises(TaskFailed, match="another"):
        await manager.result(await manager.enqueue(replaced))
    with pytest.raises(TaskFailed, match="the first"):
        await manager.result(await manager.enqueue(swallowed))


async def test_arguments_that_cannot_be_read_any_more_fail_for_good_with_dependencies_too(
    start_manager: StartManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = await start_manager()

    @manager.task(retries=3)
    async def job(number: int, session: Open) -> None: ...

    definition = manager.registry.of(job)
    monkeypatch.setattr(type(definition), "decode", lambda self, stored: (("many", "more"), {}))
    task_id = await manager.enqueue(job, 1)
    with pytest.raises(TaskFailed, match="the stored arguments cannot be read"):
        await manager.result(task_id)
    assert (await manager.store.get(task_id)).attempt == 1


# -- overrides


@pytest.mark.parametrize("through", ["TaskAdmin", "init_app"])
def test_overrides_of_the_app_hold_in_tasks_at_any_depth(through: str) -> None:
    app, manager = FastAPI(), TaskManager()
    results: list[str] = []

    def get_deep() -> str:
        return "deep"

    def get_outer(deep: str = Depends(get_deep)) -> str:
        return f"outer {deep}"

    def override(word: Word) -> str:
        return f"override {word}"

    @manager.task
    async def job(outer: str = Depends(get_outer)) -> None:
        results.append(outer)

    @app.post("/jobs")
    async def add(tasks: Any = Depends(manager.get_tasks)) -> str:
        return str(tasks.add_task(job))

    if through == "TaskAdmin":
        TaskAdmin(app, manager)
    else:
        manager.init_app(app)
    deep: Overrides = {get_deep: override}
    words: Overrides = {get_word: lambda: "words"}
    with TestClient(app) as client:
        for overrides in ({}, deep, {**deep, **words}, {}):
            app.dependency_overrides = overrides
            task_id = client.post("/jobs").json()
            assert client.portal is not None
            client.portal.call(manager.result, task_id)
    assert results == ["outer deep", "outer override word", "outer override words", "outer deep"]


async def test_an_override_that_needs_a_request_fails_the_attempt_and_says_so(start_manager: StartManager) -> None:
    manager = await start_manager()
    manager.injector.app = FastAPI()

    def override(request: Request) -> str:
        return str(request.url)

    @manager.task
    async def job(word: Word) -> None: ...

    manager.injector.app.dependency_overrides[get_word] = override
    with pytest.raises(TaskFailed, match=r"its dependency .*override needs a Request \(parameter 'request'\)"):
        await manager.result(await manager.enqueue(job))


async def test_an_override_may_replace_what_would_be_refused_below_it(start_manager: StartManager) -> None:
    manager = await start_manager()
    manager.injector.app = FastAPI()

    def get_agent(request: Request) -> str:
        return request.headers["user-agent"]

    def override(agent: str = Depends(get_agent)) -> str:
        return agent

    @manager.task
    async def job(word: Word) -> str:
        return word

    manager.injector.app.dependency_overrides = {get_word: override, get_agent: lambda: "a robot"}
    assert await manager.result(await manager.enqueue(job)) == "a robot"


# -- refused where it is written


class Item(BaseModel):
    name: str


def needs_request(it: Request) -> None: ...


def needs_websocket(it: WebSocket) -> None: ...


def needs_connection(it: HTTPConnection) -> None: ...


def needs_response(it: Response) -> None: ...


def needs_background_tasks(it: BackgroundTasks) -> None: ...


def needs_scopes(it: SecurityScopes) -> None: ...


def needs_query(it: int = 5) -> None: ...


def needs_declared_query(it: Annotated[list[str], Query()]) -> None: ...


def needs_header(it: Annotated[str, Header()]) -> None: ...


def needs_cookie(it: Annotated[str, Cookie()]) -> None: ...


def needs_body(it: Item) -> None: ...


def needs_declared_body(it: Annotated[int, Body()]) -> None: ...


def needs_form(it: Annotated[str, Form()]) -> None: ...


REFUSED = [
    (needs_request, "a Request"),
    (needs_websocket, "a WebSocket"),
    (needs_connection, "an HTTPConnection"),
    (needs_response, "a Response"),
    (needs_background_tasks, "BackgroundTasks"),
    (needs_scopes, "SecurityScopes"),
    (needs_query, "a query parameter"),
    (needs_declared_query, "a query parameter"),
    (needs_header, "a header"),
    (needs_cookie, "a cookie"),
    (needs_body, "a request body"),
    (needs_declared_body, "a request body"),
    (needs_form, "a request body"),
]


@pytest.mark.parametrize(("dependency", "what"), REFUSED, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("depth", [0, 2])
def test_a_dependency_that_needs_a_request_is_refused_where_the_task_is_written(
    dependency: Callable[..., Any], what: str, depth: int
) -> None:
    needed = dependency
    for _ in range(depth):
        needed = above(needed)

    def job(number: int, needed: Annotated[None, Depends(needed)]) -> None: ...

    manager = TaskManager()
    with pytest.raises(TaskflowError) as refused:
        manager.task(job)
    assert f"job: its dependency {__name__}.{dependency.__name__} needs {what} (parameter 'it')" in str(refused.value)
    assert "job" not in manager.registry


def above(needed: Callable[..., Any]) -> Callable[..., Any]:
    def get(value: Annotated[None, Depends(needed)], session: Open) -> None: ...

    return get


@pytest.mark.parametrize("declared", [Depends(HTTPBearer()), Security(HTTPBearer())], ids=["Depends", "Security"])
def test_a_security_scheme_is_refused_with_its_name(declared: Any) -> None:
    def job(token: Any = declared) -> None: ...

    with pytest.raises(TaskflowError, match=r"its dependency fastapi\.security\.http\.HTTPBearer needs an HTTPConn"):
        define(job)


def test_a_path_parameter_is_refused_by_its_name() -> None:
    def get_item(item_id: Annotated[int, PathParameter()]) -> None: ...

    def job(item: None = Depends(get_item)) -> None: ...

    with pytest.raises(TaskflowError, match=r"get_item.*item_id"):
        define(job)


class Client: ...


def get_client(word: Word, client: Client) -> Client:
    return client


def outlives(inner: Annotated[None, Depends(get_word, scope="function")]) -> Iterator[None]:
    yield


async def twice(word: Word = Depends(get_word)) -> None: ...


async def unknown(number: int, found: Annotated[Any, Depends(above(get_client))]) -> None: ...


async def scoped(found: Annotated[Any, Depends(above(outlives))]) -> None: ...


@pytest.mark.parametrize(
    ("function", "culprit", "parameter"),
    [(twice, twice, "word"), (unknown, get_client, "client"), (scoped, outlives, "inner")],
)
def test_what_fastapi_itself_does_not_take_is_refused_with_the_dependency_and_the_parameter(
    function: Callable[..., Any], culprit: Callable[..., Any], parameter: str
) -> None:
    words = f"{function.__name__}: parameter '{parameter}' of {__name__}.{culprit.__name__} cannot be resolved"
    with pytest.raises(TaskflowError, match=words):
        define(function)


def test_the_process_executor_is_refused_with_dependencies() -> None:
    with pytest.raises(TaskflowError, match=r"executor='process' cannot run a function with Depends \(word\)"):
        define(module_level, executor="process")


def module_level(word: Word) -> None: ...


def test_a_function_that_was_never_decorated_is_refused_when_it_is_added() -> None:
    with pytest.raises(TaskflowError, match="needs a Request"):
        TaskManager().registry.of(undecorated)


def undecorated(needed: Annotated[None, Depends(needs_request)]) -> None: ...
