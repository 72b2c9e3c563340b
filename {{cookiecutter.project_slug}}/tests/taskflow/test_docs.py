"""The documents are true: every Python block of every page runs, in the order in which it is read.

A page has one namespace, which begins with what every project has: `app`, `task_manager`, and `client`, which asks the
app without a network. The task system is started by the first block that awaits anything. Blocks in HTML comments are
read by nobody but this test; they assert what the page says.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

from app.settings import Settings
from app.taskflow import TaskAdmin, TaskConfig, TaskManager, errors

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


class Reader:
    """Runs the blocks of one page on one event loop."""

    def __init__(self, folder: Path) -> None:
        self.manager = TaskManager(snapshot_db=str(folder / "tasks.db"), shutdown_timeout=0.5)
        self.app = FastAPI()
        TaskAdmin(self.app, self.manager, auto_install=True)
        self.client = httpx2.AsyncClient(transport=httpx2.ASGITransport(self.app), base_url="http://127.0.0.1:8000")
        self.loop = asyncio.Runner()
        self.names: dict[str, Any] = {
            "__name__": "page", "app": self.app, "task_manager": self.manager, "client": self.client
        }  # fmt: skip

    def read(self, example: Example) -> None:
        code = compile(
            "\n" * (example.line + example.parsed.line_offset) + example.parsed,
            example.path,
            "exec",
            flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            dont_inherit=True,
        )
        if code.co_flags & inspect.CO_COROUTINE:
            self.loop.run(self.started())
            self.loop.run(eval(code, self.names))
        else:
            exec(code, self.names)

    async def started(self) -> None:
        await self.manager.startup()

    def close(self) -> None:
        self.loop.run(self.manager.shutdown())
        self.loop.close()


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_providers: None) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    found = Reader(tmp_path)
    yield found
    found.close()


def document(page: Path, reader: Reader | None = None) -> Document:
    evaluator = reader.read if reader else lambda _example: None
    return Sybil([CodeBlockParser("python", evaluator)]).parse(page)


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(DOCS).as_posix() for page in PAGES])
def test_every_block_of_a_page_runs(page: Path, reader: Reader) -> None:
    for example in document(page, reader).examples():
        example.evaluate()


def test_there_are_pages_and_they_have_blocks() -> None:
    assert len(PAGES) >= 10
    assert sum(len(list(document(page).examples())) for page in PAGES) >= 30


# -- the reference misses nothing

REFERENCE = DOCS / "reference.md"


def code_words(section: str) -> set[str]:
    """What stands in backticks in a section of the reference."""
    text = REFERENCE.read_text("utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    assert text, section
    return set(re.findall(r"`([^`]+)`", text))


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}  # type: ignore[arg-type]


def test_every_setting_is_in_the_reference() -> None:
    names = {f"TASKFLOW_{name.upper()}" for name in Settings.model_fields}
    assert code_words("Settings") >= names


@pytest.mark.parametrize("name", ["url", "encryption_key", "env", "run", "retention_days"])
def test_a_setting_that_is_empty_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(f"TASKFLOW_{name.upper()}", "")
    with pytest.raises(ValueError, match=f"TASKFLOW_{name.upper()} is empty"):
        Settings()


def test_a_setting_that_is_refused_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKFLOW_ADMIN_PASSWORD", "hunter2")
    with pytest.raises(ValueError, match="set both TASKFLOW_ADMIN_USERNAME and") as refused:
        Settings()
    assert "hunter2" not in str(refused.value)


def test_every_task_option_is_in_the_reference() -> None:
    assert code_words("Task options") >= set(TaskConfig.__dataclass_fields__)


def test_every_argument_is_in_the_reference() -> None:
    assert code_words("`TaskManager`") >= parameters(TaskManager.__init__)
    assert code_words("`TaskAdmin`") >= parameters(TaskAdmin.__init__)


def test_every_route_is_in_the_reference() -> None:
    app = FastAPI()
    TaskAdmin(app, TaskManager())
    paths = app.openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations}
    assert code_words("Routes") - {"TASKFLOW_PATH", "/docs"} >= routes


def test_every_error_is_in_the_reference() -> None:
    raised = {
        name
        for name, found in vars(errors).items()
        if inspect.isclass(found) and issubclass(found, Exception) and found.__module__ == errors.__name__
    }
    assert code_words("Errors") >= raised - {"TaskflowError"}


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
