"""What your tests share: a client of the running service, on a database of its own."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

# Before the first import of the app: its tasks must never be written to the development database.
os.environ["TASKFLOW_URL"] = f"sqlite:///{Path(tempfile.mkdtemp()) / 'tasks.db'}"
os.environ["TASKFLOW_ENV"] = "development"


@pytest.fixture
def client() -> Iterator[TestClient]:
    """Entered, so that the service starts and stops with it."""
    from app.main import app

    with TestClient(app) as client:
        yield client
