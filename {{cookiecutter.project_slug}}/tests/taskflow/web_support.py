"""What the tests of the web side share: a service with tasks of every fate, and a reader of pages.

A page is read as a person reads it: by its text, its links and its forms, not by its markup.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from html.parser import HTMLParser
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response

from app.taskflow import BackendUnavailable, QueueConfig, TaskAdmin, TaskFailed, TaskManager, get_task_context, task_log
from app.taskflow.backends.base import Turn, TurnResult

VOID = frozenset({"meta", "link", "input", "br", "hr", "img"})


@dataclass
class Form:
    method: str
    action: str
    fields: dict[str, str] = field(default_factory=dict)
    buttons: list[str] = field(default_factory=list)


class Document(HTMLParser):
    """Text, links, forms and attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: dict[str, str] = {}
        self.forms: list[Form] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self._words: list[str] = []
        self._open: list[str] = []
        self._link: tuple[str, list[str]] | None = None
        self._button: list[str] | None = None
        self.feed(html)
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in given.items()]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "a":
            self._link = (given.get("href", ""), [])
        elif tag == "form":
            self.forms.append(Form(given.get("method", "get"), given.get("action", "")))
        elif tag == "input" and self.forms:
            self.forms[-1].fields[given.get("name", "")] = given.get("value", "")
        elif tag == "button":
            self._button = []

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "a" and self._link is not None:
            self.links.setdefault(" ".join("".join(self._link[1]).split()), self._link[0])
            self._link = None
        elif tag == "button" and self._button is not None and self.forms:
            self.forms[-1].buttons.append(" ".join("".join(self._button).split()))
            self._button = None

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style", "title"):
            return
        self._words.append(data)
        for collected in (self._link and self._link[1], self._button):
            if collected is not None:
                collected.append(data)

    def form(self, button: str) -> Form:
        """The form whose button says so."""
        return next(form for form in self.forms if any(said.startswith(button) for said in form.buttons))


def page(response: Response, status: int = 200) -> Document:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    return Document(response.text)


class Declined(Exception):
    pass


@dataclass
class Service:
    """A service under test. `gate` lets the tasks that wait for it go on."""

    app: FastAPI
    manager: TaskManager
    admin: TaskAdmin
    client: TestClient
    gate: threading.Event

    def add(self, name: str, *args: Any, **options: Any) -> str:
        """The id of a new task of the function of that name."""
        function = self.manager.registry.named(name).function
        return str(self.client.portal.call(lambda: self.manager.enqueue(function, *args, **options)))  # type: ignore[union-attr]

    def once(self, name: str, *args: Any, run_key: str, seconds: float = 3_600.0) -> str:
        """The id of a one-off of that function."""
        function = self.manager.registry.named(name).function
        run_at = self.manager.clock() + timedelta(seconds=seconds)
        once = self.manager.schedule_once
        return str(self.client.portal.call(lambda: once(function, *args, run_at=run_at, run_key=run_key)))  # type: ignore[union-attr]

    def run(self, name: str, *args: Any, **options: Any) -> str:
        """The id of a new task that has ended."""
        return self.ended(self.add(name, *args, **options))

    @contextmanager
    def disk_full(self) -> Iterator[None]:
        """While it lasts, nothing can be written; reading goes on."""

        async def refuse(_turn: Turn) -> TurnResult:
            raise BackendUnavailable("disk full")

        writes = self.manager.backend.turn
        self.manager.backend.turn = refuse  # type: ignore[method-assign, assignment]
        while self.client.get(f"{self.admin.path}/ready").status_code == 200:
            pass  # until the journal has tried, a second at most
        yield
        self.manager.backend.turn = writes  # type: ignore[method-assign]

    def ended(self, task_id: str) -> str:
        with contextlib.suppress(TaskFailed):
            self.client.portal.call(lambda: self.manager.result(task_id, 10))  # type: ignore[union-attr]
        return task_id


def make_manager(gate: threading.Event, **options: Any) -> TaskManager:
    manager = TaskManager(queues={"sums": QueueConfig(), "billing": QueueConfig()}, **options)

    @manager.task(queue="sums", tags={"team": "numbers"})
    async def add_up(a: int, b: int) -> dict[str, int]:
        task_log("adding", a=a, b=b)
        return {"sum": a + b}

    @manager.task(retries=2, delay=0.01, queue="billing")
    async def charge_card(order: int) -> None:
        task_log("calling the provider", order=order)
        task_log("it said no", level="warning")
        raise Declined(f"insufficient funds for order {order}")

    @manager.task
    async def wait_for_gate() -> None:
        context = get_task_context()
        assert context is not None
        context.progress(1, 4, "first of four")
        task_log("waiting")
        while not gate.is_set():
            await asyncio.sleep(0.005)

    @manager.schedule(cron="0 3 * * *", timezone="Europe/London", overlap=False)
    async def tidy() -> None: ...

    @manager.task(retries=3, delay=3_600)
    async def fail_slowly() -> None:
        raise OSError("the disk is full")

    return manager


@contextmanager
def service(
    *, manager: TaskManager | None = None, base_url: str = "http://testserver", root_path: str = "", **options: Any
) -> Iterator[Service]:
    """A started service with its dashboard; `options` are `TaskAdmin`'s."""
    gate = threading.Event()
    manager = manager or make_manager(gate)
    app = FastAPI()
    admin = TaskAdmin(app, manager, **options)
    with TestClient(app, base_url=base_url, root_path=root_path, follow_redirects=False) as client:
        try:
            yield Service(app, manager, admin, client, gate)
        finally:
            gate.set()
