"""Which of the task system's tests run when nobody says which: yours, and a core of these, in seconds.

All of them run for `make test-all`, for `TASKFLOW_TESTS=all pytest`, for whatever is named on the command line, and for
`make test` once `app/taskflow/` differs from what was taken. `tests/conftest.py` has the two hooks.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CORE = {
    f"test_{name}.py"
    for name in (
        "charts",
        "clock",
        "codec",
        "definitions",
        "forms",
        "idempotency",
        "layers",
        "leases",
        "options",
        "queues",
        "retry",
        "rules",
        "testing_support",
        "texts",
        "timeout",
        "views",
        "waits",
    )
}
CHOICE = "TASKFLOW_TESTS"
"""`core` or `all`; the processes of one run agree by it."""


def pytest_configure(config: pytest.Config) -> None:
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    os.environ.setdefault(CHOICE, "all" if named else "core")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if os.environ.get(CHOICE) != "core" or HERE not in collection_path.parents:
        return None
    if collection_path.is_dir() or collection_path.name.startswith("test_"):
        return collection_path.name not in CORE
    return None
