"""The live stream: what a page is told, how often the log is read, and that a stream ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from time import monotonic
from typing import Any

import pytest

from app.taskflow.backends.base import TurnResult
from app.taskflow.errors import BackendUnavailable
from app.taskflow.models import TaskEvent
from app.taskflow.web import stream
from app.taskflow.web.stream import Feed, sequence_number

from .web_support import service

pytestmark = pytest.mark.anyio


class Log:
    """An event log that counts who reads it."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.reads = 0
        self.away = False
        self.listeners: list[Any] = []

    def happens(self, *ids: str, announced: bool = True) -> None:
        self.ids += ids
        if announced:
            for listener in self.listeners:
                listener((), TurnResult())

    async def last_seq(self) -> int:
        self._read()
        return len(self.ids)

    async def events_after(self, seq: int, limit: int) -> Sequence[TaskEvent]:
        self._read()
        now = datetime.now(UTC)
        found = enumerate(self.ids[seq : seq + limit], seq + 1)
        return [TaskEvent(n, task_id, now, "started", 0, None, None, None) for n, task_id in found]

    def _read(self) -> None:
        self.reads += 1
        if self.away:
            raise BackendUnavailable("away")


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def feed(log: Log, monkeypatch: pytest.MonkeyPatch) -> Feed:
    monkeypatch.setattr(stream, "GATHERING", 0.01)
    monkeypatch.setattr(stream, "POLL_INTERVAL", 0.1)
    return Feed(log, log)  # type: ignore[arg-type]


def soon() -> float:
    return monotonic() + 2.0


async def test_a_page_is_told_which_tasks_changed_after_what_it_has_seen(log: Log, feed: Feed) -> None:
    cursor = await feed.head()
    log.happens("a", "b", "a")
    news = await feed.next(cursor, soon())
    assert news is not None
    assert (news.seq, list(news.ids), news.more) == (3, ["a", "b"], False)
    log.happens("c")
    news = await feed.next(news.seq, soon())
    assert news is not None
    assert list(news.ids) == ["c"]


async def test_a_commit_wakes_and_the_work_of_others_is_seen_by_looking(log: Log, feed: Feed) -> None:
    cursor = await feed.head()
    waiting = asyncio.create_task(feed.next(cursor, soon()))
    await asyncio.sleep(0)
    log.happens("by-another-process", announced=False)
    news = await waiting
    assert news is not None
    assert list(news.ids) == ["by-another-process"]


async def test_nothing_new_is_no_news_at_the_deadline(feed: Feed) -> None:
    assert await feed.next(await feed.head(), monotonic() + 0.05) is None


async def test_a_page_that_comes_back_is_told_what_it_missed(log: Log, feed: Feed) -> None:
    seen = await feed.head()
    log.happens("a")
    await feed.next(seen, soon())
    log.happens("b")
    news = await feed.next(seen, soon())
    assert news is not None
    assert (list(news.ids), news.more) == (["a", "b"], False)


async def test_many_pages_cost_one_look(log: Log, feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "POLL_INTERVAL", 1.0)
    cursor = await feed.head()
    waiting = [asyncio.create_task(feed.next(cursor, soon())) for _ in range(50)]
    await asyncio.sleep(0.05)
    before = log.reads
    log.happens("a")
    assert all(news is not None and list(news.ids) == ["a"] for news in await asyncio.gather(*waiting))
    assert log.reads - before == 1


async def test_too_much_news_is_more_and_stays_small(log: Log, feed: Feed) -> None:
    cursor = await feed.head()
    log.happens(*(f"t{n}" for n in range(stream.MOST_IDS + 5)))
    news = await feed.next(cursor, soon())
    assert news is not None
    assert (len(news.ids), news.more) == (stream.MOST_IDS, True)
    log.happens(*(f"u{n}" for n in range(stream.WINDOW * 3)))
    flood = await feed.next(news.seq, soon())
    assert flood is not None
    assert (flood.seq, flood.more) == (len(log.ids), True)
    late = await feed.next(cursor, soon())
    assert late is not None
    assert late.more


async def test_after_news_there_is_a_pause_and_a_longer_one_after_much(
    log: Log, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PAUSE", 0.1)
    monkeypatch.setattr(stream, "PAUSE_EACH", 0.01)
    news, began, told = feed.follow(await feed.head(), soon()), monotonic(), []
    for ids in (["a"], ["b"], [f"t{n}" for n in range(40)], ["c"]):
        log.happens(*ids)
        assert list((await anext(news)).ids) == ids
        told.append(monotonic() - began)
    assert told[0] < 0.1, "the first at once"
    assert [round(later - before, 1) for before, later in pairwise(told)] == [0.1, 0.1, 0.5]


async def test_memory_does_not_grow_with_what_happened(log: Log, feed: Feed) -> None:
    cursor = await feed.head()
    for _ in range(20):
        log.happens(*(f"t{n}" for n in range(stream.WINDOW - 1)))
        news = await feed.next(cursor, soon())
        assert news is not None
        cursor = news.seq
    assert len(feed.recent) <= stream.WINDOW


async def test_a_page_that_does_not_say_what_it_has_seen_is_told_that_anything_may_have_changed(
    log: Log, feed: Feed
) -> None:
    log.happens("a")
    news = await feed.next(sequence_number(None, None), soon())
    assert news is not None
    assert (news.seq, news.more) == (1, True)


async def test_a_log_that_began_anew_starts_pages_anew(log: Log, feed: Feed) -> None:
    news = await feed.next(10_000, soon())
    assert news is not None
    assert (news.seq, news.more) == (0, True)


async def test_a_store_that_does_not_answer_keeps_no_stream_beyond_its_deadline(
    log: Log, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    cursor = await feed.head()
    log.happens("a")
    with monkeypatch.context() as silent:
        silent.setattr(log, "events_after", lambda *_: asyncio.sleep(10))
        began = monotonic()
        assert await feed.next(cursor, began + 0.2) is None
        assert monotonic() - began < 2
    news = await feed.next(cursor, soon())
    assert news is not None
    assert news.ids == ["a"]


async def test_a_backend_that_is_away_is_silence_until_it_is_back(log: Log, feed: Feed) -> None:
    cursor = await feed.head()
    log.away = True
    assert await feed.next(cursor, monotonic() + 0.3) is None
    log.away = False
    log.happens("a")
    assert await feed.next(cursor, soon()) is not None


@pytest.mark.parametrize(
    ("texts", "number"),
    [(("7", "3"), 7), ((None, "3"), 3), (("x", "3"), 3), (("", "-1"), -1), (("9" * 30, None), -1), (("٣", None), -1)],
)
def test_the_last_event_id_comes_before_the_address(texts: tuple[str | None, ...], number: int) -> None:
    assert sequence_number(*texts) == number


def messages(text: str) -> list[dict[str, str]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks]


def test_the_stream_over_http_has_the_shape_that_pages_expect_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LIFE", 0.5)
    with service() as running:
        assert running.client.get("/tasks/dashboard").status_code == 200
        task_id = running.run("add_up", 1, 2)
        response = running.client.get("/tasks/dashboard/stream?after=0")
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        (message,) = messages(response.text)
        assert message["event"] == "tasks"
        assert json.loads(message["data"]) == {"ids": [task_id], "more": False}
        again = running.client.get("/tasks/dashboard/stream?after=0", headers={"last-event-id": message["id"]})
        assert messages(again.text) == [], "it goes on from there, and ends by itself"
