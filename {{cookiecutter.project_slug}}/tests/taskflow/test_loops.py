"""Background loops: they survive their own errors, and end when they are told to."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from app.taskflow.errors import BackendUnavailable
from app.taskflow.loops import Loop

from .helpers import eventually

pytestmark = pytest.mark.anyio


async def test_a_round_that_fails_is_followed_by_another(caplog: pytest.LogCaptureFixture) -> None:
    rounds: list[int] = []

    async def fails() -> None:
        rounds.append(1)
        raise OSError("not this time") if len(rounds) % 2 else asyncio.CancelledError

    loop = Loop("busy", fails)
    loop.start()
    await eventually(lambda: len(rounds) > 3)
    await loop.stop()
    assert "busy: a round failed, the loop goes on" in caplog.text


async def test_a_cancellation_that_a_driver_takes_for_an_error_ends_it_all_the_same() -> None:
    began = asyncio.Event()

    async def asks_a_driver() -> None:
        began.set()
        with suppress(BackendUnavailable):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError as error:
                raise BackendUnavailable("connection closed") from error

    loop = Loop("stubborn", asks_a_driver)
    loop.start()
    await began.wait()
    async with asyncio.timeout(5):
        await loop.stop()
