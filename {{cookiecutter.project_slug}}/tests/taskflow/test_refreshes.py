"""Refreshes of pages: made once for all who look, never older than the news, and no more than what changes."""

from __future__ import annotations

import asyncio
import gzip
from time import monotonic

import pytest
from fastapi import Request
from fastapi.responses import Response

from app.taskflow.web import refreshes
from app.taskflow.web.refreshes import Refreshes

from .web_support import page, service

pytestmark = pytest.mark.anyio


class Feed:
    def __init__(self) -> None:
        self.seq = 7

    async def head(self) -> int:
        return self.seq


class Page:
    """Says at which event it was made, and counts how often."""

    def __init__(self, feed: Feed) -> None:
        self.feed, self.began, self.broken = feed, list[float](), False

    async def __call__(self) -> Response:
        self.began.append(monotonic())
        seen = self.feed.seq
        await asyncio.sleep(0.02)
        if self.broken:
            raise LookupError("no such task")
        return Response(f"as of {seen}", headers={"Vary": "Cookie"})


def asked(*headers: tuple[bytes, bytes]) -> Request:
    return Request({"type": "http", "headers": list(headers)})


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Feed:
    monkeypatch.setattr(refreshes, "GAP", 0.2)
    return Feed()


async def test_who_look_at_the_same_are_served_by_one(feed: Feed) -> None:
    shared, made = Refreshes(feed), Page(feed)  # type: ignore[arg-type]
    answers = await asyncio.gather(*(shared.of(asked(), "overview", made) for _ in range(100)))
    assert {bytes(answer.body) for answer in answers} == {b"as of 7"}
    assert len({id(answer) for answer in answers}) == 100, "what sends an answer may change its headers"
    await shared.of(asked(), "overview", made)
    assert len(made.began) == 1, "nothing has happened since"
    await shared.of(asked(), "tasks", made)
    assert len(made.began) == 2


async def test_nobody_is_given_what_is_older_than_the_news_and_nothing_is_made_twice_in_a_gap(feed: Feed) -> None:
    shared, made = Refreshes(feed), Page(feed)  # type: ignore[arg-type]
    first = asyncio.create_task(shared.of(asked(), "overview", made))
    await asyncio.sleep(0.01)
    feed.seq = 8  # while it is made
    after = await asyncio.gather(*(shared.of(asked(), "overview", made) for _ in range(20)))
    assert {bytes(answer.body) for answer in after} == {b"as of 8"}
    assert bytes((await first).body) == b"as of 7"
    assert len(made.began) == 2
    assert made.began[1] - made.began[0] >= 0.19


async def test_it_is_forgotten_when_nobody_looks(feed: Feed) -> None:
    shared, made = Refreshes(feed), Page(feed)  # type: ignore[arg-type]
    await shared.of(asked(), "overview", made)
    await asyncio.sleep(0.3)
    assert not shared._makings
    await shared.of(asked(), "overview", made)
    assert len(made.began) == 2, "instances and ages change without an event"


async def test_an_error_is_everybody_s_and_who_gave_up_takes_nothing_from_others(feed: Feed) -> None:
    shared, made = Refreshes(feed), Page(feed)  # type: ignore[arg-type]
    first = asyncio.create_task(shared.of(asked(), "overview", made))
    second = asyncio.create_task(shared.of(asked(), "overview", made))
    await asyncio.sleep(0.01)
    first.cancel()
    assert bytes((await second).body) == b"as of 7"
    feed.seq, made.broken = 8, True
    found = await asyncio.gather(*(shared.of(asked(), "overview", made) for _ in range(3)), return_exceptions=True)
    assert [str(error) for error in found] == ["no such task"] * 3


async def test_it_is_packed_for_who_takes_that(feed: Feed) -> None:
    shared, made = Refreshes(feed), Page(feed)  # type: ignore[arg-type]
    packed = await shared.of(asked((b"accept-encoding", b"br, gzip")), "overview", made)
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(bytes(packed.body)) == b"as of 7"
    assert int(packed.headers["content-length"]) == len(packed.body)
    assert packed.headers["vary"] == "Cookie"


PAGES = ["", "/tasks", "/queues", "/schedules", "/schedules/once", "/workers", "/dead", "/audit"]


@pytest.mark.parametrize("address", PAGES)
def test_a_refresh_is_the_page_s_part_without_its_frame(address: str) -> None:
    with service() as running:
        running.run("add_up", 1, 2)
        running.run("charge_card", 3)
        whole = running.client.get(f"/tasks/dashboard{address}")
        part = running.client.get(f"/tasks/dashboard{address}", headers={"HX-Request": "true"})
        target = next(value for _, name, value in page(whole).attributes if name == "hx-select")
        assert f'id="{target.removeprefix("#")}"' in part.text
        assert "<html" not in part.text
        assert 'class="rail"' not in part.text
        for name in ("content-security-policy", "cache-control", "x-content-type-options"):
            assert part.headers[name] == whole.headers[name]
        assert part.headers["content-encoding"] == "gzip"


def test_who_may_only_read_is_not_given_what_operators_see() -> None:
    auth = [("ada", "a long password", "operate"), ("bob", "another long one", "read")]
    with service(auth=auth, secret_key="k" * 32) as running:
        parts = {}
        for name, password, _role in auth:
            running.client.cookies.clear()
            refused = running.client.get("/tasks/dashboard/workers", headers={"HX-Request": "true"})
            assert refused.status_code == 401
            running.client.post("/tasks/auth/login", data={"username": name, "password": password})
            parts[name] = running.client.get("/tasks/dashboard/workers", headers={"HX-Request": "true"}).text
        assert "Drain" in parts["ada"]
        assert "Drain" not in parts["bob"]
