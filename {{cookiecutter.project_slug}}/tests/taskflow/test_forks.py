"""Processes forked from one that has made, used or started a manager, as `gunicorn --preload` forks them."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
PATIENCE = 30.0
"""Seconds for processes to start, to be missed, and to end."""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


class Family:
    """A parent and the two workers that it forked, over one folder."""

    def __init__(self, folder: Path, history: str) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "tests.taskflow.fork_app", history, str(folder)]
        pipe = subprocess.PIPE
        self.parent = subprocess.Popen(command, cwd=PROJECT, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        self._watchdog = threading.Timer(PATIENCE, self._kill)
        self._watchdog.start()

    def _kill(self) -> None:
        """With its workers: a reader that waits for their words is told that there will be none."""
        os.killpg(self.parent.pid, signal.SIGKILL)

    def say(self) -> str:
        assert self.parent.stdout is not None
        return self.parent.stdout.readline().strip()

    def starts(self) -> list[int]:
        file = self.folder / "starts"
        return [int(line) for line in file.read_text().splitlines()] if file.exists() else []

    def rows(self, query: str) -> list[Any]:
        with closing(sqlite3.connect(self.folder / "tasks.db", timeout=5)) as connection:
            return connection.execute(query).fetchall()

    def until(self, condition: Callable[[], object]) -> None:
        deadline = monotonic() + PATIENCE
        while not condition():
            assert monotonic() < deadline, condition
            sleep(0.05)

    def end(self) -> None:
        assert self.parent.stdin is not None
        self.parent.stdin.close()
        try:
            self.parent.wait(PATIENCE)
        finally:
            self._watchdog.cancel()


@pytest.fixture
def family(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Family]:
    family = Family(tmp_path, request.param)
    yield family
    (tmp_path / "release").touch()
    family.end()


@pytest.mark.parametrize("family", ["imported", "used"], indirect=True)
def test_forked_workers_are_instances_of_their_own_and_one_rescues_what_the_other_left(family: Family) -> None:
    words = [family.say().split() for _ in range(2)]
    assert [line[0] for line in words] == ["ready", "ready"]
    pids, instances = {int(line[1]) for line in words}, {line[2] for line in words}
    assert len(pids) == len(instances) == 2
    family.until(family.starts)
    (victim,) = family.starts()
    (survivor,) = pids - {victim}
    os.kill(victim, signal.SIGKILL)
    family.until(lambda: family.starts() == [victim, survivor])
    (family.folder / "release").touch()
    family.until(lambda: family.rows("SELECT status FROM taskflow_task WHERE name = 'again'") == [("success",)])
    assert family.starts() == [victim, survivor]
    owners = family.rows("SELECT DISTINCT instance FROM taskflow_task WHERE name <> 'again'")
    assert instances <= {instance for (instance,) in owners}


@pytest.mark.parametrize("family", ["running"], indirect=True)
def test_what_is_forked_from_a_process_that_serves_is_told_so_when_it_starts(family: Family) -> None:
    for _ in range(2):
        assert "forked" in family.say()
