"""A real Chromium in front of a real server: the one on PATH, or the one that `CHROMIUM=` names.

Without one these tests are skipped, and the last lines of the run say so; with `TASKFLOW_BROWSER=required` they fail.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import axe_playwright_python  # type: ignore[import-untyped]
import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from app.taskflow import TaskAdmin, TaskManager

from .shop import define, fill

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
AXE = next(Path(axe_playwright_python.__file__).parent.rglob("axe.min.js")).read_text("utf-8")
REPORT = "console.error('CSP', e.violatedDirective, e.blockedURI)"
RULES = ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"]
MISSING = "there is no Chromium on PATH, and CHROMIUM= names none"


PATIENCE = 20_000
"""Milliseconds, on a machine that does other things as well."""
expect.set_options(timeout=PATIENCE)


def chromium_path() -> str | None:
    named = os.environ.get("CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For one module: while it is there, its own event loop runs in this thread, and no test can start another."""
    path = chromium_path()
    if path is None:
        if os.environ.get("TASKFLOW_BROWSER") == "required":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Shop:
    """A served app with tasks of every fate."""

    url: str
    manager: TaskManager
    ask: Callable[[Callable[[], Any]], Any]
    """Calls a function that returns a coroutine on the server's event loop."""

    def address(self, path: str = "") -> str:
        return f"{self.url}/tasks/dashboard{path}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    manager = TaskManager(snapshot_db=str(tmp_path_factory.mktemp("shop") / "tasks.db"), shutdown_timeout=0.5)
    define(manager)
    app, loops = FastAPI(), []
    TaskAdmin(app, manager, auto_install=True, display_func_args=True)

    @app.get("/loop")
    async def loop() -> None:
        loops.append(asyncio.get_running_loop())

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    urllib.request.urlopen(f"http://127.0.0.1:{port}/loop").close()

    def ask(function: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(function(), loops[0]).result(30)

    shop = Shop(f"http://127.0.0.1:{port}", manager, ask)
    ask(lambda: fill(manager))
    yield shop
    server.should_exit = True
    thread.join(20)


@dataclass
class Tab:
    """A page that remembers what went wrong in it."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self._hear(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.add_init_script(f"addEventListener('securitypolicyviolation', (e) => {REPORT})")

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(f"{kind}: {text}")

    def axe(self) -> list[str]:
        """What is not accessible, with the first elements concerned."""
        self.page.evaluate(AXE)
        found = self.page.evaluate("(rules) => axe.run(document, {runOnly: rules})", RULES)
        return [
            f"{it['id']}: {it['help']} {[node['html'][:100] for node in it['nodes'][:3]]}" for it in found["violations"]
        ]

    def width(self) -> tuple[int, int]:
        """Of what it shows, and of what it is shown in."""
        wide, room = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        return int(wide), int(room)


def first_of(nodes: list[dict[str, Any]]) -> list[str]:
    return [node["html"][:100] for node in nodes[:3]]


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Tab]]:
    contexts: list[BrowserContext] = []

    def open_tab(**options: Any) -> Tab:
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(PATIENCE)
        return Tab(contexts[-1].new_page())

    yield open_tab
    for context in contexts:
        context.close()
