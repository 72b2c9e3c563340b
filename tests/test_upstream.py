"""A project that was edited takes a newer version of the template, and loses no edit; with real repositories."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.template import PROJECT, Template, clean_environment, commit_all, copy_of_working_tree, git

Edit = Callable[[Path], None]
ENGINE = "app/taskflow"


@dataclass
class Owner:
    """A project, and the template that it was made from."""

    project: Path
    template: Path

    def tool(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "tools/upstream.py", *arguments],
            cwd=self.project,
            env=clean_environment(),
            text=True,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == code, f"{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def upstream(self, edit: Edit) -> None:
        """A newer version of the template."""
        edit(self.template / PROJECT)
        commit_all(self.template, "Newer")

    def here(self, edit: Edit) -> None:
        edit(self.project)
        commit_all(self.project, "Ours")

    def file(self, path: str) -> Path:
        return self.project / path


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = copy_of_working_tree(tmp_path_factory.mktemp("released"))
    commit_all(directory)
    return directory


@pytest.fixture
def make(released: Path, tmp_path: Path) -> Callable[..., Owner]:
    def make(**answers: str) -> Owner:
        template = tmp_path / "template"
        git(tmp_path, "clone", "--quiet", str(released), str(template))
        baked = Template(f"git+{template.as_uri()}", tmp_path / "home").bake(tmp_path / "out", **answers)
        assert baked.code == 0, baked.output
        commit_all(baked.project, "Start")
        return Owner(baked.project, template)

    return make


@pytest.fixture
def owner(make: Callable[..., Owner]) -> Owner:
    return make()


def replaced(path: str, old: str, new: str) -> Edit:
    def edit(root: Path) -> None:
        text = (root / path).read_text("utf-8")
        assert old in text
        (root / path).write_text(text.replace(old, new, 1), "utf-8")

    return edit


def appended(path: str, text: str) -> Edit:
    def edit(root: Path) -> None:
        with (root / path).open("a", encoding="utf-8") as file:
            file.write(text)

    return edit


def gone(path: str) -> Edit:
    return lambda root: (root / path).unlink()


def written(path: str, content: bytes) -> Edit:
    def edit(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)

    return edit


# -- what you changed


def test_a_fresh_project_is_as_it_was_taken(owner: Owner) -> None:
    assert "files as they were taken" in owner.tool("status")
    assert owner.tool("status", "--quiet") == ""
    assert owner.tool("diff") == ""


def test_each_kind_of_edit_is_named_and_line_ends_are_none(owner: Owner) -> None:
    clock = owner.file(f"{ENGINE}/clock.py")
    clock.write_bytes(clock.read_bytes().replace(b"\n", b"\r\n"))
    assert owner.tool("status", "--quiet") == ""
    owner.file(f"{ENGINE}/retry.py").write_text("edited\n")
    owner.file(f"{ENGINE}/leases.py").unlink()
    owner.file(f"{ENGINE}/ours.py").write_text("")
    owner.file("app/tasks.py").write_text("yours, and not asked about\n")
    told = owner.tool("status")
    assert [line for line in told.splitlines() if "taken" not in line] == [
        f"removed  {ENGINE}/leases.py",
        f"added    {ENGINE}/ours.py",
        f"edited   {ENGINE}/retry.py",
    ]
    assert owner.tool("status", "--quiet", code=1) == ""
    difference = owner.tool("diff", f"{ENGINE}/retry.py")
    assert "+edited" in difference
    assert "ours.py" not in difference


# -- what an update does


def test_nothing_newer_is_nothing_to_do(owner: Owner) -> None:
    assert "nothing to do" in owner.tool("update")


def test_an_edited_project_takes_a_newer_version_and_loses_no_edit(owner: Owner) -> None:
    owner.upstream(replaced(f"{ENGINE}/clock.py", "import", "# newer\nimport"))
    owner.upstream(replaced(f"{ENGINE}/retry.py", '"""', '"""Newer. '))
    owner.upstream(written(f"{ENGINE}/brand_new.py", b"# new\n"))
    owner.upstream(gone(f"{ENGINE}/telemetry.py"))
    owner.upstream(appended(f"{ENGINE}/leases.py", "\n# newer\n"))
    owner.here(appended(f"{ENGINE}/retry.py", "\n# ours\n"))
    owner.here(gone(f"{ENGINE}/leases.py"))
    owner.here(written(f"{ENGINE}/ours.py", b"# ours alone\n"))

    told = owner.tool("update")
    assert "--write does it" in told
    assert git(owner.project, "status", "--porcelain") == ""

    told = owner.tool("update", "--write")
    for what, path in (
        ("updated", "clock.py"),
        ("merged", "retry.py"),
        ("new", "brand_new.py"),
        ("removed", "telemetry.py"),
        ("stays removed; upstream changed it", "leases.py"),
    ):
        assert any(line.startswith(what) and line.endswith(path) for line in told.splitlines()), (what, told)
    retry = owner.file(f"{ENGINE}/retry.py").read_text()
    assert "Newer. " in retry
    assert retry.endswith("# ours\n")
    assert "# newer" in owner.file(f"{ENGINE}/clock.py").read_text()
    assert owner.file(f"{ENGINE}/ours.py").read_text() == "# ours alone\n"
    assert not owner.file(f"{ENGINE}/telemetry.py").exists()
    assert not owner.file(f"{ENGINE}/leases.py").exists()
    record = tomllib.loads(owner.file(f"{ENGINE}/UPSTREAM.toml").read_text())
    assert record["commit"] == git(owner.template, "rev-parse", "HEAD").strip()
    commit_all(owner.project, "Updated")
    assert "nothing to do" in owner.tool("update")
    states = owner.tool("status").splitlines()
    assert states[:-1] == [
        f"removed  {ENGINE}/leases.py",
        f"added    {ENGINE}/ours.py",
        f"edited   {ENGINE}/retry.py",
    ]


def test_conflicts_are_marked_reported_and_keep_both_sides(owner: Owner) -> None:
    first = owner.file(f"{ENGINE}/clock.py").read_text().splitlines()[0]
    owner.upstream(replaced(f"{ENGINE}/clock.py", first, '"""Theirs.'))
    owner.upstream(gone(f"{ENGINE}/telemetry.py"))
    owner.upstream(written(f"{ENGINE}/both.py", b"theirs\n"))
    owner.here(replaced(f"{ENGINE}/clock.py", first, '"""Ours.'))
    owner.here(appended(f"{ENGINE}/telemetry.py", "# ours\n"))
    owner.here(written(f"{ENGINE}/both.py", b"ours\n"))
    told = owner.tool("update", "--write", code=1)
    assert "For you to decide (3)" in told
    clock = owner.file(f"{ENGINE}/clock.py").read_text()
    assert "<<<<<<< yours" in clock
    assert "Ours." in clock
    assert "Theirs." in clock
    assert owner.file(f"{ENGINE}/telemetry.py").read_text().endswith("# ours\n")
    both = owner.file(f"{ENGINE}/both.py").read_text()
    assert "ours" in both
    assert "theirs" in both


def test_an_edit_follows_a_file_that_was_renamed_upstream(owner: Owner) -> None:
    def rename(root: Path) -> None:
        (root / ENGINE / "leases.py").rename(root / ENGINE / "tenures.py")

    owner.upstream(rename)
    owner.here(appended(f"{ENGINE}/leases.py", "\n# ours\n"))
    owner.tool("update", "--write")
    assert not owner.file(f"{ENGINE}/leases.py").exists()
    assert owner.file(f"{ENGINE}/tenures.py").read_text().endswith("# ours\n")


def test_line_ends_stay_as_they_are_here(owner: Owner) -> None:
    owner.upstream(appended(f"{ENGINE}/clock.py", "# newer\n"))
    owner.upstream(replaced(f"{ENGINE}/retry.py", '"""', '"""Newer. '))

    def crlf(root: Path) -> None:
        for name in ("clock.py", "retry.py"):
            path = root / ENGINE / name
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        with (root / ENGINE / "retry.py").open("ab") as file:
            file.write(b"# ours\r\n")

    owner.here(crlf)
    owner.tool("update", "--write")
    clock, retry = (owner.file(f"{ENGINE}/{name}").read_bytes() for name in ("clock.py", "retry.py"))
    assert clock.endswith(b"# newer\r\n")
    assert b'"""Newer. ' in retry
    assert retry.endswith(b"# ours\r\n")
    assert retry.count(b"\r\n") == retry.count(b"\n")


def test_a_store_that_was_left_out_stays_out_and_can_be_added(owner: Owner) -> None:
    owner.upstream(appended(f"{ENGINE}/backends/redis.py", "# newer\n"))
    told = owner.tool("update", "--write")
    assert "redis.py" not in told
    commit_all(owner.project, "Updated")
    told = owner.tool("add", "redis")
    assert f"{ENGINE}/backends/redis.lua" in told
    assert "uv add 'redis>=" in told
    assert "'msgpack>=" in told
    assert not owner.file(f"{ENGINE}/backends/redis.py").exists()
    owner.tool("add", "redis", "--write")
    assert owner.file(f"{ENGINE}/backends/redis.py").read_text().endswith("# newer\n")
    assert owner.file("tests/taskflow/test_redis.py").exists()
    assert not owner.file(f"{ENGINE}/backends/postgres.py").exists()
    assert owner.tool("status", "--quiet") == ""
    assert "is here already" in owner.tool("add", "redis", code=2)


def test_what_is_made_from_the_answers_is_named_and_so_is_a_step_of_the_schema(owner: Owner) -> None:
    record = tomllib.loads(owner.file(f"{ENGINE}/UPSTREAM.toml").read_text())
    assert record["stores"] == []
    owner.upstream(appended("Makefile", "\n# newer\n"))
    tables = (owner.template / PROJECT / ENGINE / "backends/tables.py").read_text()
    number = int(tables.partition("SCHEMA_VERSION = ")[2].partition("\n")[0])
    owner.upstream(
        replaced(f"{ENGINE}/backends/tables.py", f"SCHEMA_VERSION = {number}", f"SCHEMA_VERSION = {number + 1}")
    )
    told = owner.tool("update")
    assert "changed upstream too: Makefile" in told
    assert f"The schema goes from {number} to {number + 1}" in told


def test_what_only_the_newer_version_knows_to_be_left_out_stays_out(owner: Owner) -> None:
    def another_store(root: Path) -> None:
        replaced("tools/upstream.py", "(redis|postgres)", "(redis|postgres|mysql)")(root)
        written(f"{ENGINE}/backends/mysql.py", b"# new\n")(root)
        written(f"{ENGINE}/seasons.py", b"# new\n")(root)

    owner.upstream(another_store)
    owner.here(appended("tools/upstream.py", "\n# ours\n"))
    told = owner.tool("update")
    assert "seasons.py" in told
    assert "mysql.py" not in told
    assert not owner.file(f"{ENGINE}/seasons.py").exists()
    owner.tool("update", "--write")
    assert owner.file(f"{ENGINE}/seasons.py").exists()
    assert not owner.file(f"{ENGINE}/backends/mysql.py").exists()
    assert owner.file("tools/upstream.py").read_text().endswith("# ours\n")
    assert "|mysql)" in owner.file("tools/upstream.py").read_text()


def test_an_older_version_whose_tool_updates_its_own_project_only_can_be_taken(owner: Owner) -> None:
    def alone(root: Path) -> None:
        tool = root / "tools/upstream.py"
        tool.write_text(tool.read_text().replace("--project", "--elsewhere"))

    owner.upstream(alone)
    owner.upstream(appended(f"{ENGINE}/clock.py", "# newer\n"))
    owner.tool("update", "--write")
    assert owner.file(f"{ENGINE}/clock.py").read_text().endswith("# newer\n")


def test_another_version_than_the_newest_can_be_taken(owner: Owner) -> None:
    owner.upstream(appended(f"{ENGINE}/clock.py", "# first\n"))
    git(owner.template, "tag", "v1")
    owner.upstream(appended(f"{ENGINE}/clock.py", "# second\n"))
    assert "+# second" in owner.tool("diff", "--theirs")
    owner.tool("update", "--to", "v1", "--write")
    assert owner.file(f"{ENGINE}/clock.py").read_text().endswith("# first\n")
    commit_all(owner.project, "v1")
    assert "the template has no v9" in owner.tool("update", "--to", "v9", code=2)


def test_unsaved_changes_are_not_mixed_with_an_update(owner: Owner) -> None:
    owner.upstream(appended(f"{ENGINE}/clock.py", "# newer\n"))
    owner.file("app/tasks.py").write_text("in the middle of something\n")
    assert "not committed" in owner.tool("update", "--write", code=2)
    assert "updated" in owner.tool("update")


def test_a_project_of_no_repository_says_so(tmp_path: Path, released: Path) -> None:
    directory = copy_of_working_tree(tmp_path / "plain")
    project = Template(str(directory), tmp_path / "home").bake(tmp_path / "out").project
    owner = Owner(project, directory)
    assert owner.tool("status", "--quiet") == ""
    assert "names no template" in owner.tool("update", code=2)
    assert os.fspath(tmp_path) not in owner.file(f"{ENGINE}/UPSTREAM.toml").read_text()
