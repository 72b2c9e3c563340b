"""Your routes, with the tasks they add run to their end."""

import pytest
from fastapi.testclient import TestClient

from app.taskflow.testing import drain, instant_retries
from app.tasks import task_manager


def run_tasks(client: TestClient) -> None:
    """Runs what the last request added, without sleeping."""
    assert client.portal is not None
    client.portal.call(drain, task_manager)


def test_signing_up_sends_an_email(client: TestClient) -> None:
    task_id = client.post("/signup", params={"email": "user@example.com"}).json()["task_id"]
    run_tasks(client)
    task = client.get(f"/tasks/{task_id}").json()
    assert task["status"] == "success"
    assert "sending to user@example.com" in task["logs"][0]


def test_a_webhook_is_processed_and_its_result_is_stored(client: TestClient) -> None:
    task_id = client.post("/webhook", json={"event": "paid", "order": 7}).json()["task_id"]
    run_tasks(client)
    assert client.get(f"/tasks/{task_id}").json()["result"] == 2


def test_a_failing_email_is_tried_four_times(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: str) -> None:
        raise ConnectionError("the mail server is away")

    monkeypatch.setattr("app.tasks.task_log", refuse)
    with instant_retries(task_manager):
        task_id = client.post("/signup", params={"email": "user@example.com"}).json()["task_id"]
        run_tasks(client)
    task = client.get(f"/tasks/{task_id}").json()
    assert (task["status"], task["attempt"], task["error"]) == ("failed", 4, "the mail server is away")
