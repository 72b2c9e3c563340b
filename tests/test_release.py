"""A release is made from a clean repository, and what it makes can be baked as it is."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.template import Template, clean_environment, commit_all, copy_of_working_tree, git

Run = Callable[..., str]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    directory = copy_of_working_tree(tmp_path / "template")
    commit_all(directory)
    return directory


@pytest.fixture
def run(repository: Path) -> Run:
    def run(*arguments: str, code: int = 0) -> str:
        command = [sys.executable, "release.py", *arguments]
        done = subprocess.run(command, cwd=repository, env=clean_environment(), text=True, capture_output=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_a_release_is_tagged_dated_and_can_be_baked(repository: Path, run: Run, tmp_path: Path) -> None:
    assert "git push --follow-tags" in run("7.0.0")
    assert git(repository, "status", "--porcelain") == ""
    assert git(repository, "tag", "--points-at", "HEAD").strip() == "v7.0.0"
    assert 'version = "7.0.0"' in (repository / "pyproject.toml").read_text()
    changelog = (repository / "CHANGELOG.md").read_text()
    assert changelog.index("## Unreleased\n\n## 7.0.0 (20") > 0
    archive = repository / "dist" / "taskflow-template-7.0.0.zip"
    checksum, name = (repository / "dist" / f"{archive.name}.sha256").read_text().split()
    assert (checksum, name) == (hashlib.sha256(archive.read_bytes()).hexdigest(), archive.name)
    baked = Template(str(archive), tmp_path / "home").bake(tmp_path / "out")
    assert (baked.project / "app" / "main.py").exists()
    assert "Unreleased" in run("7.0.1", code=1)  # says nothing new


@pytest.mark.parametrize(
    ("version", "reason"),
    [("", "no version"), ("1.0", "no version"), ("v1.0.0", "no version"), ("0.0.1", "come after")],
)
def test_what_is_no_newer_version_is_refused(repository: Path, run: Run, version: str, reason: str) -> None:
    assert reason in run(version, code=1)
    assert git(repository, "status", "--porcelain") == ""


def test_changes_that_are_not_committed_and_a_tag_that_is_there_are_refused(repository: Path, run: Run) -> None:
    git(repository, "tag", "v7.0.0")
    assert "there is a tag v7.0.0" in run("7.0.0", code=1)
    (repository / "README.md").write_text("changed")
    assert "not committed" in run("7.0.1", code=1)
