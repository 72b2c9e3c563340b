"""Where a project comes from: recorded for everyone, without secrets, and good enough for cruft to update it."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import Bake
from tests.template import Answer, Baked, Template, commit_all, copy_of_working_tree, files_of, git, run

CRUFT = [sys.executable, "-m", "cruft"]


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A repository with the template in it, to bake from by URL."""
    directory = copy_of_working_tree(tmp_path / "upstream")
    commit_all(directory)
    return directory


@pytest.fixture
def bake_from(upstream: Path, tmp_path: Path) -> Bake:
    template = Template(f"git+{upstream.as_uri()}", tmp_path / "home")

    def bake(*options: str, **answers: Answer) -> Baked:
        return template.bake(tmp_path / "out", *options, **answers)

    return bake


def test_a_bake_from_a_remote_records_it(bake_from: Bake, upstream: Path) -> None:
    project = bake_from(project_slug="orders", example_tasks=False, description='"hi" \\ \N{ROCKET}').project
    record = json.loads((project / ".cruft.json").read_text(encoding="utf-8"))
    assert record["template"] == upstream.as_uri()
    assert record["commit"] == git(upstream, "rev-parse", "HEAD").strip()
    answers = record["context"]["cookiecutter"]
    assert (answers["project_slug"], answers["example_tasks"]) == ("orders", False)
    assert answers["description"] == '"hi" \\ \N{ROCKET}'
    assert os.fspath(project.parent) not in (project / ".cruft.json").read_text()


def test_a_bake_from_a_directory_without_remote_records_nothing(bake: Bake) -> None:
    assert ".cruft.json" not in files_of(bake().project)


def test_a_bake_from_an_edited_clone_records_nothing(upstream: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(upstream), str(clone))
    template = Template(str(clone), tmp_path)
    assert ".cruft.json" in files_of(template.bake(tmp_path / "clean").project)
    (clone / "README.md").write_text("edited")
    assert ".cruft.json" not in files_of(template.bake(tmp_path / "edited").project)


@pytest.mark.parametrize(
    ("remote", "recorded"),
    [
        ("https://user:secret@example.com/org/template", "https://example.com/org/template"),
        ("https://token@example.com/org/template", "https://example.com/org/template"),
        ("https://example.com/org/template@v1", "https://example.com/org/template@v1"),
        ("git@example.com:org/template", "git@example.com:org/template"),
    ],
)
def test_credentials_in_the_remote_are_not_recorded(upstream: Path, tmp_path: Path, remote: str, recorded: str) -> None:
    git(upstream, "remote", "add", "origin", remote)
    project = Template(str(upstream), tmp_path).bake(tmp_path / "out").project
    assert json.loads((project / ".cruft.json").read_text())["template"] == recorded
    assert "secret" not in (project / ".cruft.json").read_text()
    assert "token" not in (project / ".cruft.json").read_text()


def test_a_project_gets_a_repository_of_its_own(bake: Bake) -> None:
    project = bake().project
    assert (project / ".git").is_dir()
    assert git(project, "ls-files") == ""


def test_a_project_inside_a_repository_gets_none(template: Template, tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    baked = template.bake(tmp_path / "services")
    assert not (baked.project / ".git").exists()
    assert "git add" not in baked.output


def test_cruft_updates_an_edited_project(bake_from: Bake, upstream: Path) -> None:
    project = bake_from(docker=False).project
    main, routes = project / "app/main.py", project / "app/routes.py"
    main.write_text(main.read_text() + "# ours\n")
    routes.unlink()
    commit_all(project)
    run([*CRUFT, "check"], project)

    theirs = upstream / "{{cookiecutter.project_slug}}"
    (theirs / "app/settings.py").write_text((theirs / "app/settings.py").read_text() + "# theirs\n")
    (theirs / "app/added.py").write_text('"""New upstream."""\n')
    commit_all(upstream, "Second")

    run([*CRUFT, "update", "--skip-apply-ask"], project)
    assert main.read_text().endswith("# ours\n")
    assert (project / "app/settings.py").read_text().endswith("# theirs\n")
    assert (project / "app/added.py").exists()
    assert not routes.exists()
    assert not (project / "Dockerfile").exists()
    assert not list(project.rglob("*.rej"))
    assert json.loads((project / ".cruft.json").read_text())["commit"] == git(upstream, "rev-parse", "HEAD").strip()
    run([*CRUFT, "check"], project)
