"""The lanes can fail: each kind of damage to the template is noticed by the check that is there for it."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.checks import Server, lint_complaints, schema_complaints, text_complaints, type_complaints
from tests.template import PROJECT, READY_BACKENDS, Template, copy_of_working_tree


@pytest.fixture
def damaged(tmp_path: Path) -> Template:
    return Template(str(copy_of_working_tree(tmp_path / "template")), tmp_path / "home")


def change(template: Template, path: str, old: str, new: str) -> None:
    file = Path(template.source) / path
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def append(template: Template, path: str, text: str) -> None:
    with (Path(template.source) / PROJECT / path).open("a") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("app/main.py", "# {% if later %}\n", "app/main.py: Jinja is left over"),
        (".env.example", "{{ '{{' }} later\n", ".env.example: Jinja is left over"),
        (".gitignore", "\n\n\nx\n", ".gitignore: has two blank lines in a row"),
        ("app/main.py", "X = 1 \n", "app/main.py: has a trailing space"),
        ("app/main.py", "\n", "app/main.py: must end with one newline"),
        ("app/main.py", "X = 1", "app/main.py: must end with one newline"),
        ("app/main.py", "X = 1\r\n", "app/main.py: has a carriage return"),
        (".github/workflows/ci.yml", "# {{ cookiecutter.ci }}\n", ".github/workflows/ci.yml: Jinja is left over"),
    ],
)
def test_damaged_text(damaged: Template, tmp_path: Path, path: str, text: str, complaint: str) -> None:
    append(damaged, path, text)
    assert complaint in text_complaints(damaged.bake_quickly(tmp_path / "out"))


@pytest.mark.parametrize("text", ["#% endif\n", "{% if later %}\n", "{{ cookiecutter.databse }}\n"])
def test_markup_that_does_not_render(damaged: Template, tmp_path: Path, text: str) -> None:
    append(damaged, "Makefile", text)
    baked = damaged.bake(tmp_path / "out")
    assert baked.code != 0


@pytest.mark.parametrize("line", ["import os\n", "X  =  1\n"])
def test_an_unused_import_or_an_unformatted_line(damaged: Template, tmp_path: Path, line: str) -> None:
    append(damaged, "app/settings.py", line)
    assert "app/settings.py" in lint_complaints(damaged.bake_quickly(tmp_path / "out"))


def test_a_type_error(damaged: Template, tmp_path: Path) -> None:
    project = damaged.bake_quickly(tmp_path / "out")
    (project / "app/settings.py").write_text('"""Settings."""\n\nX: int = "one"\n')
    (project / "pyproject.toml").write_text('[tool.mypy]\nstrict = true\nfiles = ["app/settings.py"]\n')
    assert "Incompatible types" in type_complaints(project, tmp_path / "cache")


def test_an_invalid_workflow(damaged: Template, tmp_path: Path) -> None:
    change(damaged, f"{PROJECT}/.github/workflows/ci.yml", "runs-on:", "runs_on:")
    project = damaged.bake_quickly(tmp_path / "out")
    assert "runs" in schema_complaints("github-workflows", project / ".github/workflows/ci.yml")


def test_an_invalid_compose_file(damaged: Template, tmp_path: Path) -> None:
    change(damaged, f"{PROJECT}/compose.yaml", "    ports:", "    portz:")
    project = damaged.bake_quickly(tmp_path / "out")
    assert "portz" in schema_complaints("compose-spec", project / "compose.yaml")


def test_a_path_of_the_hook_that_is_not_there(damaged: Template, tmp_path: Path) -> None:
    change(damaged, "hooks/post_gen_project.py", '"Dockerfile"', '"Containerfile"')
    baked = damaged.bake(tmp_path / "out", docker=False)
    assert baked.code != 0
    assert "Containerfile" in baked.output
    assert not list(baked.directory.iterdir())


@pytest.mark.parametrize("backend", ["redis", "postgres"])
def test_a_pattern_of_the_hook_that_matches_nothing(damaged: Template, tmp_path: Path, backend: str) -> None:
    for path in (Path(damaged.source) / PROJECT).glob(f"tests/taskflow/test_{backend}*.py"):
        path.unlink()
    baked = damaged.bake(tmp_path / "out")
    assert baked.code != 0
    assert f"tests/taskflow/test_{backend}*.py" in baked.output
    assert not list(baked.directory.iterdir())


def test_a_bare_file_without_a_counterpart(damaged: Template, tmp_path: Path) -> None:
    append(damaged, "_bare/app/other.py", "X = 1\n")
    baked = damaged.bake(tmp_path / "out", example_tasks=False)
    assert baked.code != 0
    assert "app/other.py" in baked.output


def test_an_answer_that_does_not_exist(template: Template, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="databse"):
        template.bake(tmp_path, databse="redis")


@pytest.mark.parametrize("backend", READY_BACKENDS)
def test_a_missing_backend(damaged: Template, tmp_path: Path, backend: str) -> None:
    (Path(damaged.source) / PROJECT / f"app/taskflow/backends/{backend}.py").unlink()
    project = damaged.bake_quickly(tmp_path / "out", backend=backend)
    shutil.copy(project / ".env.example", project / ".env")
    command = f"{shlex.quote(sys.executable)} -m uvicorn app.main:app --port {{port}}"
    missing = rf"No module named .*backends\.{backend}"
    with Server(f"exec {command}", project) as server, pytest.raises(AssertionError, match=missing):
        server.wait_until_ready(seconds=30)


@pytest.mark.parametrize("backend", ["redis", "postgres"])
def test_a_missing_backend_is_missed_by_the_hook_of_the_others(damaged: Template, tmp_path: Path, backend: str) -> None:
    (Path(damaged.source) / PROJECT / f"app/taskflow/backends/{backend}.py").unlink()
    baked = damaged.bake(tmp_path / "out")
    assert baked.code != 0
    assert f"app/taskflow/backends/{backend}.py" in baked.output
