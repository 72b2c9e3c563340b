"""A baked service lives: its tests pass, it takes a task and finishes it, shows its dashboard, and stops when told."""

import json
import os
import re
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checks import Server
from tests.template import READY_BACKENDS, Template, files_of, fresh_location, run, uv

SERVE = "uvicorn app.main:app --port {port} --timeout-graceful-shutdown 8"


@pytest.fixture(scope="session", params=READY_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def environment(backend: str, template: Template, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One virtual environment for all projects of a backend: their dependencies are the same."""
    directory = tmp_path_factory.mktemp("environment")
    project = template.bake_quickly(directory, backend=backend)
    run([uv(), "sync", "--quiet"], project)
    return project / ".venv"


@pytest.fixture
def location(backend: str, tmp_path: Path) -> Iterator[str]:
    """Where a service of this test keeps its tasks: the variable wins over the file, as it would for a user."""
    with fresh_location(backend, tmp_path) as location:
        yield location


def test_examples(template: Template, backend: str, environment: Path, location: str, tmp_path: Path) -> None:
    project = template.bake_quickly(tmp_path, backend=backend)
    shutil.copy(project / ".env.example", project / ".env")
    run_your_tests(environment, project)
    with Server(f"exec {shlex.quote(str(environment))}/bin/{SERVE}", project, TASKFLOW_URL=location) as server:
        server.wait_until_ready()
        task_id = json.loads(server.post("/signup?email=a@example.com"))["task_id"]
        assert server.wait_until_done(task_id) == "success"
        assert task_id in server.get("/tasks/dashboard")
        assets = server.assets("/tasks/dashboard")
        assert assets
        assert all(assets.values())
        assert_clean_exit(server)


def test_without_examples(template: Template, backend: str, environment: Path, location: str, tmp_path: Path) -> None:
    project = template.bake_quickly(tmp_path, backend=backend, example_tasks=False)
    run_your_tests(environment, project)
    with Server(f"exec {shlex.quote(str(environment))}/bin/{SERVE}", project, TASKFLOW_URL=location) as server:
        server.wait_until_ready()
        assert list(json.loads(server.get("/openapi.json"))["paths"]).count("/signup") == 0
        assert server.get("/tasks/dashboard")
        assert_clean_exit(server)


def test_the_task_systems_tests_need_no_other_driver(
    template: Template, backend: str, environment: Path, tmp_path: Path
) -> None:
    """All are imported, and those of the contract would run on the backend; they did where the template is tested."""
    project = template.bake_quickly(tmp_path, backend=backend)
    python = [str(environment / "bin/python"), "-m", "pytest", "-q"]
    listed = run([*python, "--collect-only"], project, TASKFLOW_TESTS="all")
    assert set(re.findall(r"conformance\.py::\w+\[(sqlite|redis|postgres)\b", listed)) == {"sqlite", backend}
    files = [
        "tests/taskflow/test_layers.py",
        *([] if backend == "sqlite" else [f"tests/taskflow/test_{backend}_server.py"]),
    ]
    assert " passed" in run([*python, *files, "-k", "cycle or list_of_layers or server"], project)


def test_commands_of_the_readme_for_pip(template: Template, backend: str, location: str, tmp_path: Path) -> None:
    """Plain pip brings everything that serving needs, the driver too."""
    project = template.bake_quickly(tmp_path, backend=backend)
    block = (project / "README.md").read_text().split("```\n")[1]
    install, serve = block.strip().rsplit("\n", 1)
    run(install, project)
    assert serve == ".venv/bin/uvicorn app.main:app"
    with Server(f"exec {serve} --port {{port}}", project, TASKFLOW_URL=location) as server:
        server.wait_until_ready()
        assert_clean_exit(server)
    run([".venv/bin/pip", "wheel", "--quiet", "--no-deps", "."], project)
    (wheel,) = project.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {path for path in files_of(project) if re.match(r"app/(?!.*__pycache__)", path)}


def test_a_fleet_runs_the_tasks(template: Template, tmp_path: Path) -> None:
    """Made with a delivery: the service accepts, a Celery worker runs; without the setting the service does."""
    project = template.bake_quickly(tmp_path, backend="postgres", delivery="celery")
    run([uv(), "sync", "--quiet"], project)
    programs = f"{shlex.quote(str(project / '.venv' / 'bin'))}"
    with fresh_location("postgres", tmp_path) as location, fresh_location("redis", tmp_path) as redis:
        run([uv(), "pip", "install", "--quiet", "--python", str(project / ".venv"), "redis>=8.1.0,<9"], project)
        broker = redis.partition("?")[0]
        settings = {"TASKFLOW_URL": location, "TASKFLOW_DELIVERY": broker}
        with Server(f"exec {programs}/{SERVE}", project, **settings) as server:
            server.wait_until_ready()
            task_id = json.loads(server.post("/signup?email=a@example.com"))["task_id"]
            command = [str(project / ".venv/bin/celery"), "-A", "app.worker", "worker", "--concurrency", "4"]
            environment = {**os.environ, **settings}
            worker = subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.DEVNULL)
            try:
                assert server.wait_until_done(task_id, 60) == "success"
                assert len(json.loads(server.get("/tasks/instances"))) == 2
            finally:
                worker.terminate()
                worker.wait(60)
            assert_clean_exit(server)
        with Server(f"exec {programs}/{SERVE}", project, TASKFLOW_URL=location) as server:
            server.wait_until_ready()
            task_id = json.loads(server.post("/signup?email=b@example.com"))["task_id"]
            assert server.wait_until_done(task_id, 60) == "success"
            assert_clean_exit(server)


def run_your_tests(environment: Path, project: Path) -> None:
    """On the backend that the project was made for."""
    assert " passed" in run([str(environment / "bin/python"), "-m", "pytest", "-q", "--ignore=tests/taskflow"], project)


def assert_clean_exit(server: Server) -> None:
    log = server.stop()
    assert "Application shutdown complete" in log, log
    assert "Traceback" not in log, log
    assert server.process.returncode in {0, -15}
