"""What must hold for every baked project. A check returns its complaints, so that `test_sabotage` can ask for them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from urllib.parse import urljoin

from tests.template import clean_environment, files_of

WORKFLOW_EXPRESSION = re.compile(r"\$\{\{ [a-z.-]+ \}\}")
JINJA = re.compile(r"\{\{[-\s]|\{%|%\}|^\s*#%", re.MULTILINE)
MODULE = [sys.executable, "-m"]


def text_complaints(project: Path) -> list[str]:
    return [f"{path}: {fault}" for path in sorted(files_of(project)) for fault in faults(project / path)]


def faults(path: Path) -> Iterator[str]:
    content = path.read_bytes()
    if b"\0" in content or not content or path.name.endswith((".min.js", ".min.css")):  # as their authors ship them
        return
    text = content.decode()
    if path.name == "ci.yml":
        text = WORKFLOW_EXPRESSION.sub("expression", text)
    if path.suffix not in {".html", ".css", ".js"} and JINJA.search(text):
        yield "Jinja is left over"
    if "cookiecutter." in text and path.name != "upstream.py":  # which reads the template itself
        yield "names cookiecutter"
    if "\r" in text:
        yield "has a carriage return"
    if re.search(r"[ \t]$", text, re.MULTILINE):
        yield "has a trailing space"
    if "\n\n\n" in text and path.suffix not in {".py", ".md"}:  # Markdown shows Python
        yield "has two blank lines in a row"
    if not text.endswith("\n") or text.endswith("\n\n"):
        yield "must end with one newline"


def lint_complaints(project: Path) -> str:
    return failure([*MODULE, "ruff", "check", "--no-cache", "."], project) + failure(
        [*MODULE, "ruff", "format", "--no-cache", "--check", "."], project
    )


def type_complaints(project: Path, cache: Path) -> str:
    return failure([*MODULE, "mypy", "--cache-dir", str(cache)], project)


def schema_complaints(schema: str, path: Path) -> str:
    return failure([*MODULE, "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(path)], path.parent)


def failure(command: Sequence[str], directory: Path) -> str:
    """What a command said, when it failed."""
    done = subprocess.run(command, cwd=directory, env=clean_environment(), capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{done.stdout}{done.stderr}" or f"exit code {done.returncode}"


class Server:
    """A server process on a free port, reached over HTTP; it must stop by itself after one SIGTERM."""

    def __init__(self, command: str, directory: Path, **changes: str) -> None:
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.log = directory / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command.format(port=self.port),
                shell=True,
                cwd=directory,
                env=clean_environment(PORT=str(self.port), **changes),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_until_ready(self, seconds: float = 60, path: str = "/tasks/ready") -> None:
        deadline = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            with contextlib.suppress(OSError):
                self.get(path)
                return
            time.sleep(0.1)

    def get(self, path: str) -> str:
        return self.request("GET", path)

    def post(self, path: str) -> str:
        return self.request("POST", path)

    def request(self, method: str, path: str) -> str:
        request = urllib.request.Request(urljoin(self.base, path), method=method)
        with urllib.request.urlopen(request, timeout=10) as response:
            return str(response.read().decode())

    def wait_until_done(self, task_id: str, seconds: float = 30) -> str:
        """The status of a task that is neither pending nor running any more."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = str(json.loads(self.get(f"/tasks/{task_id}"))["status"])
            if status not in {"pending", "running"}:
                return status
            time.sleep(0.1)
        return "not done in time"

    def assets(self, path: str) -> dict[str, int]:
        """The page's style sheets, scripts and icons, and the size of each."""
        links = re.findall(r"""<(?:link|script|img)\b[^>]*?\b(?:href|src)=["']([^"']+)["']""", self.get(path))
        return {link: len(self.get(urljoin(urljoin(self.base, path), link))) for link in links}

    def stop(self, seconds: float = 20) -> str:
        """Its whole output, after SIGTERM to the server and everything that started it."""
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(timeout=seconds)
        deadline = time.monotonic() + seconds
        while "Finished server process" not in self.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.log.read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
