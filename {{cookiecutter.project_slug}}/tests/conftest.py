"""What your tests share: a client of the running service, on a database of its own."""

import os
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from .taskflow.selection import pytest_configure, pytest_ignore_collect
from .taskflow.servers import own_location

__all__ = ["client", "pytest_configure", "pytest_ignore_collect"]

# Before the first import of the app: its tasks must never be written to the development database.
os.environ["TASKFLOW_URL"] = own_location()
os.environ["TASKFLOW_ENV"] = "development"


@pytest.fixture
def client() -> Iterator[TestClient]:
    """Entered, so that the service starts and stops with it."""
    from app.main import app

    with TestClient(app) as client:
        yield client
