"""The first minute: what a bake prints is what works, typed as printed, on a machine without uv on PATH."""

import contextlib
import json
import os
import re
import shlex
import shutil
import sqlite3
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.checks import Server
from tests.conftest import Bake
from tests.template import READY_BACKENDS, Template, clean_environment, fresh_location, git, run, uv

# `make test` has just run the task system's tests in place, on the same bytes; `make test FULL=1` runs them here too.
YOUR_TESTS = "" if "FULL" in os.environ else "--ignore=tests/taskflow"


@pytest.fixture(scope="module")
def path_without_uv(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with every command of PATH but uv."""
    commands = tmp_path_factory.mktemp("bin")
    for directory in reversed(os.environ["PATH"].split(os.pathsep)):
        if Path(directory).is_dir():
            for command in Path(directory).iterdir():
                if command.name not in {"uv", "uvx"} and os.access(command, os.X_OK) and not command.is_dir():
                    (commands / command.name).unlink(missing_ok=True)
                    (commands / command.name).symlink_to(command)
    return str(commands)


def printed_commands(output: str) -> dict[str, list[str]]:
    """Label -> commands, from the indented lines that a bake prints."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        if match := re.fullmatch(r"  (\w+ it|) {3,}(\S.*?)(?: {3,}http\S+)?", line):
            label = match[1] or list(found)[-1]
            found.setdefault(label, []).append(match[2])
    return found


def test_the_printed_text_is_for_the_answers(bake: Bake) -> None:
    full = bake(project_name="Caf\u00e9 Orders", project_slug="orders")
    assert full.output.isascii()
    assert "\033" not in full.output
    assert printed_commands(full.output) == {
        "Run it": ["cd orders", "make run"],
        "Try it": ['curl -X POST "http://127.0.0.1:8000/signup?email=a@example.com"'],
        "Test it": ["make test"],
        "Keep it": ['git add -A && git commit -m "Start from taskflow-template"'],
    }
    bare = bake(project_slug="bare", example_tasks=False)
    assert list(printed_commands(bare.output)) == ["Run it", "Test it", "Keep it"]


@pytest.mark.parametrize("backend", READY_BACKENDS)
def test_a_server_that_has_to_be_there_first_is_named_with_its_url_and_a_command_that_starts_it(
    bake: Bake, backend: str
) -> None:
    baked = bake(backend=backend)
    assert ("  Tasks are kept in " in baked.output) == (backend != "sqlite")
    if backend != "sqlite":
        (url,) = re.findall(r"  Tasks are kept in \w+ at (\S+)\.\n", baked.output)
        assert f"\nTASKFLOW_URL={url}\n" in (baked.project / ".env.example").read_text()
        (command,) = re.findall(r"^  (docker run .*)$", baked.output, re.MULTILINE)
        assert f"\n```\n{command}\n```\n" in (baked.project / "README.md").read_text()
        assert f" {compose_image(baked.project, backend)} " in f"{command} "


def compose_image(project: Path, service: str) -> str:
    return str(yaml.safe_load((project / "compose.yaml").read_text())["services"][service]["image"])


def test_the_printed_path_leads_there_from_where_the_user_is(template: Template, tmp_path: Path) -> None:
    baked = template.bake(tmp_path / "here", "--output-dir", "my services")
    (change, _) = printed_commands(baked.output)["Run it"]
    assert run(f"{change} && pwd -P", tmp_path / "here").strip() == str(
        (tmp_path / "here/my services/task-service").resolve()
    )


def test_the_printed_commands_and_the_workflow_run_as_printed(bake: Bake, path_without_uv: str) -> None:
    baked = bake()
    steps = printed_commands(baked.output)
    change, serve = steps["Run it"]
    directory, project = baked.directory, baked.project
    assert shutil.which("uv", path=path_without_uv) is None

    with Server(f"{change} && {serve}", directory, PATH=path_without_uv) as server:
        server.wait_until_ready(seconds=120)
        (attempt,) = steps["Try it"]
        answer = json.loads(say(attempt.replace(":8000", f":{server.port}"), directory))
        assert server.wait_until_done(answer["task_id"]) == "success"
        log = server.stop()
        assert f"http://127.0.0.1:{server.port}/tasks/dashboard" in log
        assert "Application shutdown complete" in log

    (test,) = steps["Test it"]
    assert " passed" in run(f"{change} && {test}", directory, PATH=path_without_uv, PYTEST_ADDOPTS=YOUR_TESTS)

    (keep,) = steps["Keep it"]
    run(f"{change} && {keep}", directory, PATH=path_without_uv)
    kept = git(project, "ls-files").splitlines()
    assert {"uv.lock", "app/main.py", ".gitignore"} <= set(kept)
    assert not [path for path in kept if path.endswith(".db") or path.startswith(".venv/")]

    for step in workflow_steps(project):
        if step.startswith(test):
            assert " passed" in run(step, project, PATH=path_without_uv, PYTEST_ADDOPTS=YOUR_TESTS)
        else:
            checked = run(step, project, PATH=path_without_uv)
            assert checked.count("Passed") == 3, checked
            assert "Skipped" not in checked
    assert git(project, "status", "--porcelain") == "", "pre-commit changed a fresh project"


def test_an_environment_of_another_interpreter_is_made_anew_and_not_mixed_into(
    bake: Bake, path_without_uv: str
) -> None:
    project = bake().project
    another = project / ".venv" / "bin" / "python"
    another.parent.mkdir(parents=True)
    another.write_text("#!/bin/sh\necho '(3, 9)'\n")
    another.chmod(0o755)
    (project / ".venv" / "lib").mkdir()
    (project / ".venv" / "lib" / "of_another").touch()
    said = run("make .venv/bin/uv", project, PATH=path_without_uv)
    assert "it is made anew" in said
    assert not (project / ".venv" / "lib" / "of_another").exists()
    assert run(".venv/bin/uv --version", project).startswith("uv ")
    (project / ".venv" / "bin" / "uv").unlink()
    assert "it is made anew" not in run("make .venv/bin/uv", project, PATH=path_without_uv)


@pytest.mark.parametrize("backend", [backend for backend in READY_BACKENDS if backend != "sqlite"])
def test_the_printed_commands_run_on_a_server(bake: Bake, path_without_uv: str, tmp_path: Path, backend: str) -> None:
    baked = bake(backend=backend)
    steps = printed_commands(baked.output)
    change, serve = steps["Run it"]
    with (
        fresh_location(backend, tmp_path) as location,
        Server(f"{change} && {serve}", baked.directory, PATH=path_without_uv, TASKFLOW_URL=location) as server,
    ):
        server.wait_until_ready(seconds=120)
        assert (baked.project / ".env").read_text() == (baked.project / ".env.example").read_text()
        (attempt,) = steps["Try it"]
        answer = json.loads(say(attempt.replace(":8000", f":{server.port}"), baked.directory))
        assert server.wait_until_done(answer["task_id"]) == "success"
        assert "Application shutdown complete" in server.stop()
    (test,) = steps["Test it"]
    assert " passed" in run(f"{change} && {test}", baked.directory, PATH=path_without_uv, PYTEST_ADDOPTS=YOUR_TESTS)


def workflow_steps(project: Path) -> list[str]:
    (job,) = yaml.safe_load((project / ".github/workflows/ci.yml").read_text())["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps
    return steps


def say(command: str, directory: Path) -> str:
    """What curl prints; the same request is made without it where there is no curl."""
    if shutil.which("curl"):
        return run(command, directory)
    _, _, method, url = shlex.split(command)
    with urllib.request.urlopen(urllib.request.Request(url, method=method)) as response:
        return str(response.read().decode())


def test_the_container_installs_and_starts_as_written(bake: Bake, tmp_path: Path) -> None:
    """No engine here: the Dockerfile's own install and start commands, outside a container."""
    project = bake().project
    lines = (project / "Dockerfile").read_text().splitlines()
    (install,) = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN uv ")]
    (start,) = [json.loads(line.removeprefix("CMD ")) for line in lines if line.startswith("CMD ")]
    path = os.pathsep.join([str(project / ".venv/bin"), os.path.dirname(uv()), os.environ["PATH"]])
    run(install, project, PATH=path)
    assert not (project / ".venv/bin/pytest").exists()
    command = shlex.join(start).replace("0.0.0.0", "127.0.0.1").replace("--port 8000", "--port {port}")
    settings = container_settings(lines) | {"TASKFLOW_URL": f"sqlite:///{tmp_path}/tasks.db", "PATH": path}
    with pytest.raises(AssertionError, match="needs auth and secret_key"):
        run(f"timeout 20 {command.format(port=1)}", project, **settings)
    secrets = dict.fromkeys(["TASKFLOW_ADMIN_USERNAME", "TASKFLOW_ADMIN_PASSWORD", "TASKFLOW_SECRET_KEY"], "x" * 32)
    with Server(f"exec {command}", project, **settings, **secrets) as server:
        server.wait_until_ready(path="/openapi.json")
        task_id = json.loads(server.post("/signup?email=a@example.com"))["task_id"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.get(f"/tasks/{task_id}")
        assert stored_status(tmp_path / "tasks.db", task_id) == "success"
        assert "Application shutdown complete" in server.stop()


def container_settings(lines: list[str]) -> dict[str, str]:
    text = " ".join(lines).replace("\\", " ")
    return dict(re.findall(r"(TASKFLOW_\w+)=(\S+)", text))


def stored_status(database: Path, task_id: str) -> str:
    """Once it is final."""
    deadline = time.monotonic() + 20
    while True:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            rows = connection.execute("SELECT status FROM taskflow_task WHERE task_id = ?", [task_id]).fetchall()
        if rows[0][0] not in ("pending", "running") or time.monotonic() > deadline:
            return str(rows[0][0])
        time.sleep(0.05)


def test_the_environment_of_these_tests_is_a_users() -> None:
    assert "VIRTUAL_ENV" not in clean_environment()
