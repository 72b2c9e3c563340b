"""`add_task` in routes: one object however it is asked for, durable before the response starts, dropped with a route
that raises."""

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.testclient import TestClient
from starlette.background import BackgroundTask
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.taskflow import ManagedBackgroundTasks, TaskAdmin, TaskArgumentError, TaskflowError, TaskManager

from .helpers import PATIENCE

pytestmark = pytest.mark.usefixtures("quick_refusals")


class Service:
    """An app with a task manager on a file, and what its tasks were called with."""

    def __init__(self, folder: Path, name: str = "tasks", **options: Any) -> None:
        self.file = folder / f"{name}.db"
        self.manager = TaskManager(**{"snapshot_db": str(self.file), "shutdown_timeout": 5.0, **options})
        self.app = FastAPI()
        self.ran: list[str] = []

        @self.manager.task
        def note(word: str) -> str:
            self.ran.append(word)
            return word

        self.note = note

    def install(self) -> None:
        TaskAdmin(self.app, self.manager, auto_install=True)

    def route(self, path: str, *, on: APIRouter | None = None) -> None:
        """A route that adds one task, named like its path, and answers with the id."""

        def add(background_tasks: BackgroundTasks) -> dict[str, Any]:
            task_id: Any = background_tasks.add_task(self.note, path)  # type: ignore[func-returns-value]
            return {"task_id": task_id}

        (on or self.app).post(path)(add)

    @contextmanager
    def client(self, **options: Any) -> Iterator[TestClient]:
        """The app, started; at the end it is stopped as soon as its tasks have run."""
        with TestClient(self.app, **options) as client:
            yield client
            if self.manager.runs_tasks:
                wait_until(lambda: {status for _, status in self.stored()} <= {"success"})

    def stored(self) -> list[tuple[str, str]]:
        """(id, status) of every row, read past the engine."""
        if not self.file.exists():
            return []
        connection = sqlite3.connect(self.file, timeout=5)
        try:
            return connection.execute("SELECT task_id, status FROM taskflow_task ORDER BY task_id").fetchall()
        finally:
            connection.close()


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = monotonic() + PATIENCE
    while not (value := condition()):
        assert monotonic() < deadline, condition
        sleep(0.01)
    return value


def post(service: Service, path: str) -> Any:
    with service.client() as client:
        answer = client.post(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- three injections


def test_the_three_ways_to_ask_for_the_tasks_give_the_same_object(service: Service) -> None:
    service.install()

    given: list[BackgroundTasks] = []

    def plain(tasks: BackgroundTasks) -> None:
        given.append(tasks)

    def managed(tasks: ManagedBackgroundTasks) -> None:
        given.append(tasks)

    @service.app.post("/add", dependencies=[Depends(plain), Depends(managed)])
    async def add(tasks: Annotated[ManagedBackgroundTasks, Depends(service.manager.get_tasks)]) -> list[str]:
        given.append(tasks)
        return [tasks.add_task(service.note, str(place)) for place in range(3)]

    ids = post(service, "/add")
    assert len(given) == 3
    assert given[0] is given[1] is given[2]
    assert service.stored() == [(task_id, "success") for task_id in sorted(ids)]


@pytest.mark.parametrize("kind", [BackgroundTasks, ManagedBackgroundTasks])
def test_a_route_asks_for_its_tasks_by_either_class(service: Service, kind: Any) -> None:
    service.install()

    @service.app.post("/add")
    def add(tasks: kind) -> Any:
        assert isinstance(tasks, ManagedBackgroundTasks)
        return tasks.add_task(service.note, "x")

    task_id = post(service, "/add")
    assert service.stored() == [(task_id, "success")]


def test_depends_works_without_auto_install_and_leaves_other_routes_plain(service: Service) -> None:
    TaskAdmin(service.app, service.manager)

    @service.app.post("/asked")
    def asked(tasks: Annotated[ManagedBackgroundTasks, Depends(service.manager.get_tasks)]) -> str:
        return tasks.add_task(service.note, "asked")

    @service.app.post("/plain")
    def plain(tasks: BackgroundTasks) -> str:
        return type(tasks).__name__

    with service.client() as client:
        task_id = client.post("/asked").json()
        assert client.post("/plain").json() == "BackgroundTasks"
    assert service.stored() == [(task_id, "success")]


def test_an_injection_in_a_nested_dependency_is_the_route_s_object(service: Service) -> None:
    service.install()
    seen = []

    def audit(tasks: BackgroundTasks) -> None:
        seen.append(tasks)
        tasks.add_task(service.note, "from a dependency")

    @service.app.post("/add", dependencies=[Depends(audit)])
    def add(tasks: BackgroundTasks) -> None:
        seen.append(tasks)

    post(service, "/add")
    assert seen[0] is seen[1]
    assert service.ran == ["from a dependency"]


def test_def_and_async_def_routes_both_add_tasks(service: Service) -> None:
    service.install()

    @service.app.post("/def")
    def sync(tasks: BackgroundTasks) -> Any:
        return tasks.add_task(service.note, "def")

    @service.app.post("/async")
    async def coroutine(tasks: BackgroundTasks) -> Any:
        return tasks.add_task(service.note, "async")

    with service.client() as client:
        ids = [client.post(path).json() for path in ("/def", "/async")]
    assert service.stored() == [(task_id, "success") for task_id in sorted(ids)]
    assert sorted(service.ran) == ["async", "def"]


# -- every route is managed, wherever and whenever it was added


def test_routes_added_before_and_after_are_managed(service: Service) -> None:
    service.route("/before")
    service.install()
    service.route("/after")
    with service.client() as client:
        for path in ("/before", "/after"):
            assert client.post(path).json()["task_id"]
    assert sorted(service.ran) == ["/after", "/before"]


@pytest.mark.parametrize("included", ["before", "after"])
@pytest.mark.parametrize("routed", ["before", "after"])
def test_routers_included_before_and_after_are_managed(service: Service, included: str, routed: str) -> None:
    inner, outer = APIRouter(), APIRouter(prefix="/outer")

    def fill() -> None:
        service.route("/inner", on=inner)
        service.route("/own", on=outer)

    if routed == "before":
        fill()
    outer.include_router(inner, prefix="/nested")
    if included == "before":
        service.app.include_router(outer)
    service.install()
    if included == "after":
        service.app.include_router(outer)
    if routed == "after":
        fill()
    with service.client() as client:
        answers = [client.post(path) for path in ("/outer/own", "/outer/nested/inner")]
    assert [answer.json().get("task_id") for answer in answers] == [task_id for task_id, _ in service.stored()]


def test_a_route_added_while_the_app_runs_is_managed(service: Service) -> None:
    router = APIRouter()
    service.app.include_router(router, prefix="/included")
    service.install()
    with service.client() as client:
        service.route("/own")
        service.route("/add", on=router)
        ids = [client.post(path).json()["task_id"] for path in ("/own", "/included/add")]
    assert service.stored() == [(task_id, "success") for task_id in ids]


def test_a_dependency_s_override_that_asks_for_tasks_gets_managed_ones(service: Service) -> None:
    service.install()

    async def notify() -> None: ...

    @service.app.post("/add")
    async def add(_: Annotated[None, Depends(notify)]) -> None: ...

    def add_task(tasks: BackgroundTasks) -> None:
        tasks.add_task(service.note, "from an override")

    service.app.dependency_overrides[notify] = add_task
    post(service, "/add")
    assert service.ran == ["from an override"]
    assert [status for _, status in service.stored()] == ["success"]


def test_a_task_is_accepted_once_however_often_its_router_is_included(service: Service) -> None:
    router = APIRouter()
    service.route("/add", on=router)
    service.app.include_router(router, prefix="/a")
    service.install()
    service.app.include_router(router, prefix="/b")
    with service.client() as client:
        ids = [client.post(path).json()["task_id"] for path in ("/a/add", "/b/add")]
    assert [task_id for task_id, _ in service.stored()] == sorted(ids)
    assert service.ran == ["/add", "/add"]


def test_two_apps_of_one_process_keep_apart_and_a_third_stays_plain(tmp_path: Path) -> None:
    one, two, plain = Service(tmp_path, "one"), Service(tmp_path, "two"), FastAPI()
    for service in (one, two):
        service.install()
        service.route("/add")
    done: list[str] = []

    @plain.post("/add")
    def add(tasks: BackgroundTasks) -> str:
        tasks.add_task(done.append, "plain")
        return type(tasks).__name__

    with one.client() as first, two.client() as second, TestClient(plain) as third:
        ids = [client.post("/add").json()["task_id"] for client in (first, second)]
        assert third.post("/add").json() == "BackgroundTasks"
    assert one.stored() == [(ids[0], "success")]
    assert two.stored() == [(ids[1], "success")]
    assert done == ["plain"]


def test_a_request_may_bring_tasks_of_two_managers(tmp_path: Path) -> None:
    one, two = Service(tmp_path, "one"), Service(tmp_path, "two")
    one.install()
    two.manager.init_app(one.app)

    @one.app.post("/add")
    def add(
        background_tasks: BackgroundTasks,
        first: Annotated[ManagedBackgroundTasks, Depends(one.manager.get_tasks)],
        second: Annotated[ManagedBackgroundTasks, Depends(two.manager.get_tasks)],
    ) -> list[str]:
        assert first is background_tasks
        return [first.add_task(one.note, "one"), second.add_task(two.note, "two")]

    with one.client() as client:
        ids = client.post("/add").json()
        wait_until(lambda: two.ran)
    assert one.stored() == [(ids[0], "success")]
    assert two.stored() == [(ids[1], "success")]


def test_what_the_app_runs_before_every_route_adds_managed_tasks_before_ours_too(service: Service) -> None:
    def audit(background_tasks: BackgroundTasks) -> None:
        managed: Any = background_tasks
        assert managed.add_task(service.note, "audited", tags={"by": "app"})

    service.app.router.dependencies.append(Depends(audit))
    service.install()
    with service.client() as client:
        assert client.get("/tasks").status_code == 200
    assert service.ran == ["audited"]


# -- before the response, or not at all


class Watch:
    """Middleware that looks into the database at the moment the response starts."""

    def __init__(self, app: ASGIApp, look: Callable[[], Any], seen: list[Any]) -> None:
        self.app, self.look, self.seen = app, look, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watching(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.seen.append(self.look())
            await send(message)

        await self.app(scope, receive, watching if scope["type"] == "http" else send)


def test_the_row_is_committed_before_the_response_starts(service: Service) -> None:
    service.manager.runs_tasks = False
    service.install()
    service.route("/add")
    seen: list[Any] = []
    service.app.add_middleware(Watch, look=service.stored, seen=seen)
    task_id = post(service, "/add")["task_id"]
    assert seen == [[(task_id, "pending")]]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("bug"), 500), (HTTPException(418, "teapot"), 418)], ids=["bug", "http"]
)
def test_a_route_that_raises_drops_its_tasks(service: Service, error: Exception, status: int) -> None:
    service.install()

    @service.app.post("/add")
    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(service.note, "dropped")
        raise error

    service.route("/good")
    with service.client(raise_server_exceptions=False) as client:
        assert client.post("/add").status_code == status
        kept = client.post("/good").json()["task_id"]
    assert service.stored() == [(kept, "success")]


def test_a_dependency_that_raises_after_the_route_drops_nothing_that_was_answered(service: Service) -> None:
    """Exit code of a function-scoped dependency that was entered later runs before the tasks are accepted."""
    service.install()

    async def picky() -> AsyncIterator[None]:
        yield
        raise HTTPException(409, "conflict")

    @service.app.post("/add", dependencies=[Depends(picky, scope="function")])
    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(service.note, "dropped")

    with service.client() as client:
        assert client.post("/add").status_code == 409
    assert service.stored() == []


def test_a_response_with_its_own_background_does_not_lose_the_tasks(service: Service) -> None:
    service.install()
    after: list[str] = []

    @service.app.post("/add")
    def add(tasks: BackgroundTasks) -> PlainTextResponse:
        task_id: Any = tasks.add_task(service.note, "managed")  # type: ignore[func-returns-value]
        return PlainTextResponse(task_id, background=BackgroundTask(after.append, "own"))

    with service.client() as client:
        task_id = client.post("/add").text
    assert service.stored() == [(task_id, "success")]
    assert after == ["own"]


def test_add_task_after_the_response_has_started_is_refused(service: Service) -> None:
    service.install()
    kept: list[BackgroundTasks] = []

    @service.app.post("/keep")
    def keep(tasks: BackgroundTasks) -> None:
        kept.append(tasks)

    with service.client() as client:
        client.post("/keep")
        with pytest.raises(TaskflowError, match=r"after the response has started.*enqueue"):
            kept[0].add_task(service.note, "late")
    assert service.stored() == []


def test_a_thousand_tasks_of_one_request_are_accepted_together(service: Service) -> None:
    service.install()

    @service.app.post("/add")
    def add(tasks: ManagedBackgroundTasks) -> list[Any]:
        return [tasks.add_task(service.note, str(number)) for number in range(1_500)]

    with service.client() as client:
        ids = client.post("/add").json()
    assert service.stored() == [(task_id, "success") for task_id in sorted(ids)]


# -- what the caller did wrong, and a database that is away


def test_a_bad_argument_is_answered_with_422_naming_function_parameter_value_and_rule(service: Service) -> None:
    service.install()

    @service.app.post("/add")
    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(service.note, "good")
        tasks.add_task(service.note, word=["no", "string"])  # type: ignore[arg-type]

    with service.client() as client:
        answer = client.post("/add")
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    for part in ("note", "'word'", "['no', 'string']", "valid string"):
        assert part in detail
    assert service.stored() == []


def test_an_argument_without_stored_form_is_answered_with_422(service: Service) -> None:
    service.install()

    @service.manager.task
    def anything(value: Any) -> None: ...

    @service.app.post("/add")
    def add(tasks: BackgroundTasks, request: Request) -> None:
        tasks.add_task(anything, request)

    with service.client() as client:
        answer = client.post("/add")
    assert answer.status_code == 422
    assert "'value'" in answer.json()["detail"]


def test_while_the_database_is_away_the_answer_is_503_and_nothing_runs(tmp_path: Path) -> None:
    service = Service(tmp_path / "missing")
    service.install()
    service.route("/add")
    with service.client() as client:
        answer = client.post("/add")
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        assert "unavailable" in answer.json()["detail"]
        service.file.parent.mkdir()
        wait_until(lambda: client.get("/tasks/ready").status_code == 200)
        assert service.stored() == []
        task_id = client.post("/add").json()["task_id"]
    assert service.stored() == [(task_id, "success")]
    assert service.ran == ["/add"]


def test_a_client_without_with_gets_a_503_that_says_what_to_do(service: Service) -> None:
    service.install()
    service.route("/add")
    answer = TestClient(service.app).post("/add")
    assert answer.status_code == 503
    assert "with TestClient(app)" in answer.json()["detail"]


# -- lifespans


def test_an_app_with_its_own_lifespan_keeps_it_around_the_manager_s(tmp_path: Path) -> None:
    service = Service(tmp_path)
    order: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        order.append(f"up, claiming {service.manager.dispatcher.claiming}")
        yield {"pool": "a pool"}
        order.append(f"down, claiming {service.manager.dispatcher.claiming}")

    service.app = FastAPI(lifespan=lifespan)
    service.route("/add")
    service.install()

    @service.app.get("/state")
    def state(request: Request) -> str:
        return f"{request.state.pool}, claiming {service.manager.dispatcher.claiming}"

    with service.client() as client:
        assert client.get("/state").json() == "a pool, claiming True"
        client.post("/add")
    assert order == ["up, claiming False", "down, claiming False"]
    assert service.ran == ["/add"]


def test_init_app_gives_the_lifecycle_and_the_error_answers_without_routes(service: Service) -> None:
    service.manager.init_app(service.app)

    @service.app.post("/add")
    def add(tasks: Annotated[ManagedBackgroundTasks, Depends(service.manager.get_tasks)], word: Any = None) -> str:
        return tasks.add_task(service.note, word)

    with service.client() as client:
        assert client.post("/add", params={"word": "x"}).status_code == 200
        assert client.post("/add").status_code == 422
        assert client.get("/tasks").status_code == 404
    assert service.ran == ["x"]


@pytest.mark.parametrize("first", ["app", "ours"])
def test_the_app_s_own_answer_to_an_error_wins(service: Service, first: str) -> None:
    def answer(_request: Any, _error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "mine"}, 418)

    if first == "app":
        service.app.add_exception_handler(TaskArgumentError, answer)
    service.install()
    if first == "ours":
        service.app.add_exception_handler(TaskArgumentError, answer)

    @service.app.post("/add")
    def add(tasks: BackgroundTasks) -> None:
        tasks.add_task(service.note, None)  # type: ignore[arg-type]

    with service.client() as client:
        assert client.post("/add").json() == {"detail": "mine"}


def test_an_app_can_be_started_again(service: Service) -> None:
    service.install()
    service.route("/add")
    for _ in range(3):
        post(service, "/add")
    assert service.ran == ["/add"] * 3
    assert [status for _, status in service.stored()] == ["success"] * 3
