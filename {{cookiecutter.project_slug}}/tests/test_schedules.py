"""Your schedules, on a clock that your tests move."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from fastapi.testclient import TestClient

from app.taskflow.testing import advance, next_ticks
from app.tasks import task_manager


@pytest.fixture(autouse=True)
def frozen_clock() -> Iterator[None]:
    """The service's clock stands still until a test moves it."""
    task_manager.clock.freeze()
    yield
    task_manager.clock.resume()


def test_the_digest_is_due_at_three_in_summer_and_in_winter() -> None:
    task_manager.clock.freeze(datetime(2026, 10, 24, 12, tzinfo=UTC))
    assert next_ticks(task_manager, "send_digest", 2) == [
        datetime(2026, 10, 25, 3, tzinfo=UTC),  # the clocks went back that night
        datetime(2026, 10, 26, 3, tzinfo=UTC),
    ]
    task_manager.clock.freeze(datetime(2026, 7, 1, 12, tzinfo=UTC))
    assert next_ticks(task_manager, "send_digest") == [datetime(2026, 7, 2, 2, tzinfo=UTC)]


def test_the_digest_is_sent_when_it_is_due(client: TestClient) -> None:
    assert client.portal is not None
    tick = next_ticks(task_manager, "send_digest")[0]
    client.portal.call(advance, task_manager, (tick - task_manager.clock()).total_seconds())
    digest = client.get("/tasks", params={"func_name": "send_digest"}).json()[0]
    assert (digest["status"], digest["source"]) == ("success", "scheduled")
    assert datetime.fromisoformat(digest["run_at"]) == tick
