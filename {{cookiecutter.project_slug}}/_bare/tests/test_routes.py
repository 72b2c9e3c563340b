from fastapi.testclient import TestClient

from app.main import app


def test_the_service_starts_and_is_ready() -> None:
    with TestClient(app) as client:
        assert client.get("/tasks/ready").status_code == 200
