"""The documents of a project: every command that a page shows is run, as it stands, beside the served project."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.checks import Server
from tests.template import PROJECT, ROOT, Template, clean_environment, files_of

DOCS = ROOT / PROJECT / "docs"
SERVES = "make run"
"""Is served already."""
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands_of(page: Path) -> list[str]:
    return [block.strip() for block in COMMANDS.findall(page.read_text("utf-8"))]


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if set(commands_of(page)) - {SERVES}]


@pytest.fixture(scope="module")
def project(template: Template, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return template.bake_quickly(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(project: Path, tmp_path: Path, page: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {"PATH": path, "TASKFLOW_URL": f"sqlite:///{tmp_path}/tasks.db"}
    with Server("exec uvicorn app.main:app --port {port}", project, **settings) as server:
        server.wait_until_ready()
        for command in commands_of(page):
            if command != SERVES and (shutil.which("curl") or "curl" not in command):
                said = answer(command.replace(":8000", f":{server.port}"), project, settings)
                assert '"detail"' not in said, said


def answer(command: str, project: Path, settings: dict[str, str]) -> str:
    done = subprocess.run(
        command, shell=True, cwd=project, env=clean_environment(**settings), text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_there_are_commands_to_run() -> None:
    assert len(PAGES) >= 3


def test_every_page_is_in_the_navigation(project: Path) -> None:
    named = tomllib.loads((project / "zensical.toml").read_text())["project"]["nav"]
    listed = {path for entry in named for path in entry.values()}
    assert listed == {path for path in files_of(project / "docs") if path.endswith(".md")}


def test_the_site_builds(project: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(project, tmp_path / "project")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean"], cwd=copy, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Quick start" in (copy / "site/index.html").read_text()
    assert (copy / "site/examples/index.html").exists()


def test_asynchronous_tests_run_as_a_page_shows_them(project: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "testing.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    shown = [block for block in blocks if "async def test_" in block]
    (tmp_path / "test_shown.py").write_text("\n".join(shown), "utf-8")
    said = answer(f"{sys.executable} -m pytest -q -p no:cacheprovider -c pyproject.toml {tmp_path}", project, {})
    assert f"{len(shown)} passed" in said
