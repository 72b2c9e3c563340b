"""The documents are true: every Python block of every page runs, in the order in which it is read.

A page has one namespace, which begins with what every project has: `app`, `task_manager`, and `client`, which asks the
app without a network. The task system is started by the first block that awaits anything. Blocks in HTML comments are
read by nobody but this test; they assert what the page says.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

from app.taskflow import TaskAdmin, TaskManager

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
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
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
    assert sum(len(list(document(page).examples())) for page in PAGES) >= 40
