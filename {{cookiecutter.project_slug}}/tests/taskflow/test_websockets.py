"""`add_task` in websocket routes: what was sent exists, and a client that leaves takes nothing with it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, WebSocket
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from app.taskflow import ManagedBackgroundTasks

from .test_background import Service, wait_until

pytestmark = pytest.mark.usefixtures("quick_refusals")


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """Stores tasks and does not run them."""
    service = Service(tmp_path)
    service.manager.runs_tasks = False
    return service


def talk_on(service: Service, router: Any, path: str) -> None:
    """A route that adds a task for each text and answers with its id, but not to a text that begins with "!"."""

    async def talk(socket: WebSocket, tasks: BackgroundTasks) -> None:
        await socket.accept()
        while True:
            word = await socket.receive_text()
            task_id: Any = tasks.add_task(service.note, word)  # type: ignore[func-returns-value]
            if not word.startswith("!"):
                await socket.send_text(task_id)

    router.websocket(path)(talk)


@contextmanager
def talking(client: TestClient) -> Iterator[WebSocketTestSession]:
    """A conversation that the client ends; the route hears of it as it does from a server."""
    with suppress(WebSocketDisconnect), client.websocket_connect("/talk") as socket:
        yield socket


def last_words(client: TestClient, text: str) -> WebSocketDisconnect:
    """How the route ended the conversation after the client had said this."""
    with client.websocket_connect("/talk") as socket:
        socket.send_text(text)
        with pytest.raises(WebSocketDisconnect) as told:
            socket.receive_text()
    return told.value


@pytest.mark.parametrize("place", ["app", "router", "late"])
def test_an_id_that_a_client_has_seen_is_stored(service: Service, place: str) -> None:
    router = APIRouter() if place == "router" else service.app
    if place != "late":
        talk_on(service, router, "/talk")
    if isinstance(router, APIRouter):
        service.app.include_router(router)
    service.install()
    if place == "late":
        talk_on(service, router, "/talk")
    stored = []
    with service.client() as client, talking(client) as socket:
        for number in range(20):
            socket.send_text(str(number))
            stored.append(socket.receive_text() in dict(service.stored()))
    assert stored == [True] * 20


def test_a_client_that_leaves_loses_nothing_that_was_added_before(service: Service) -> None:
    service.install()
    talk_on(service, service.app, "/talk")
    with service.client() as client:
        with talking(client) as socket:
            for number in range(50):
                socket.send_text(f"!{number}")
            socket.send_text("last")
            socket.receive_text()
        assert len(service.stored()) == 51


def test_tasks_of_an_open_websocket_start_before_it_closes(service: Service) -> None:
    service.manager.runs_tasks = True

    @service.app.websocket("/talk")
    async def talk(
        socket: WebSocket, tasks: Annotated[ManagedBackgroundTasks, Depends(service.manager.get_tasks)]
    ) -> None:
        await socket.accept()
        tasks.add_task(service.note, "silent")
        await socket.receive_text()

    service.manager.init_app(service.app)
    with service.client() as client, client.websocket_connect("/talk") as socket:
        wait_until(lambda: service.ran == ["silent"])
        socket.send_text("bye")


def test_what_could_not_be_stored_is_not_sent_and_the_client_is_told_to_come_again(tmp_path: Path) -> None:
    service = Service(tmp_path / "missing")
    service.install()
    talk_on(service, service.app, "/talk")
    with service.client() as client:
        assert last_words(client, "x").code == 1013
        service.file.parent.mkdir()
        wait_until(lambda: client.get("/tasks/ready").status_code == 200)
    assert service.ran == []


def test_a_bad_argument_ends_the_conversation_with_its_reason(service: Service) -> None:
    service.install()

    @service.app.websocket("/talk")
    async def talk(socket: WebSocket, tasks: BackgroundTasks) -> None:
        await socket.accept()
        tasks.add_task(service.note, word=["no", "string"])  # type: ignore[arg-type]

    with service.client() as client:
        told = last_words(client, "x")
    assert told.code == 1008
    assert "note" in told.reason
    assert service.stored() == []
