from time import monotonic, sleep

from fastapi.testclient import TestClient

from app.main import app


def test_the_service_starts_and_becomes_ready() -> None:
    with TestClient(app) as client:
        deadline = monotonic() + 10
        while client.get("/tasks/ready").status_code != 200:
            assert monotonic() < deadline
            sleep(0.05)
