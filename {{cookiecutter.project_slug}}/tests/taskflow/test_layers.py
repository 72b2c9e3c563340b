"""A module imports only from those above it in the list: no cycle, not even under TYPE_CHECKING."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "app" / "taskflow"
ORDER = [
    "texts",
    "failures",
    "errors",
    "models",
    "clock",
    "options",
    "codec",
    "objects",
    "cipher",
    "retry",
    "waits",
    "ticks",
    "dependencies",
    "arguments",
    "registry",
    "forms",
    "context",
    "loops",
    "backends.base",
    "backends.changes",
    "backends.stored",
    "rules.limits",
    "rules.work",
    "rules.endings",
    "rules.timetable",
    "rules.commands",
    "rules.admission",
    "rules.turns",
    "rules",
    "telemetry",
    "threads",
    "executors",
    "process_worker",
    "processes",
    "cluster",
    "observers",
    "loggers",
    "backends.tables",
    "backends.cells",
    "backends.rows",
    "backends.search",
    "backends.pages",
    "backends.scripts",
    "backends.enlisted",
    "backends.copies",
    "backends.sql",
    "backends.sqlite_turn",
    "backends.neighbours",
    "backends.sqlite",
    "backends.postgres",
    "backends.redis_keys",
    "backends.redis_values",
    "backends.redis_copies",
    "backends.redis_pages",
    "backends.redis",
    "backends",
    "history",
    "deploys",
    "journal",
    "transactions",
    "store",
    "bulk",
    "recorder",
    "schedules",
    "runner",
    "dispatcher",
    "scheduler",
    "leases",
    "housekeeping",
    "copying",
    "background",
    "host",
    "delivery",
    "delivery_worker",
    "manager",
    "testing",
    "web",
    "admin",
    "cli",
    "",
]
"""From the values down to the face; "" is the package itself, `web` is one layer with an order of its own."""


def modules() -> dict[str, Path]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = file
    return found


def layer(module: str) -> str:
    return "web" if module == "web" or module.startswith("web.") else module


def imports(module: str, file: Path) -> Iterator[str]:
    """Modules of this package that a module imports anywhere in it, functions and TYPE_CHECKING blocks included."""
    known = modules()
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    base = [part for part in package if part]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("app.taskflow"):
                    yield alias.name.removeprefix("app.taskflow").removeprefix(".")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                start = base[: len(base) - (node.level - 1)]
            elif (node.module or "").split(".")[:2] == ["app", "taskflow"]:
                start = []
            else:
                continue
            path = (node.module or "").split(".") if node.level else (node.module or "").split(".")[2:]
            target = ".".join([*start, *(part for part in path if part)])
            for alias in node.names:
                inner = f"{target}.{alias.name}".removeprefix(".")
                yield inner if inner in known else target


def test_the_list_of_layers_knows_every_module() -> None:
    assert {layer(module) for module in modules()} <= set(ORDER)


@pytest.mark.parametrize("module", sorted(module for module in modules() if module))
def test_a_module_imports_only_from_above(module: str) -> None:
    place = ORDER.index(layer(module))
    for target in imports(module, modules()[module]):
        if layer(module) == layer(target) == "web":
            continue
        assert target in modules(), f"{module} imports {target}"
        assert ORDER.index(layer(target)) < place, (
            f"{module} imports {target or 'the package itself'}, which is below it"
        )


def test_no_module_is_part_of_a_cycle() -> None:
    graph = {module: set(imports(module, file)) - {module} for module, file in modules().items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_search_for_imports_finds_every_form(tmp_path: Path) -> None:
    file = tmp_path / "turn.py"
    file.write_text(
        "from .. import codec\n"
        "from ..models import TaskStatus\n"
        "from . import tables, base\n"
        "import app.taskflow.retry\n"
        "from app.taskflow.loops import Loop\n"
        "if TYPE_CHECKING:\n    from ..store import TaskStore\n"
        "def late():\n    from .sql import SqlBackend\n"
        "import json\nfrom datetime import date\n"
    )
    assert sorted(imports("backends.turn", file)) == sorted(
        ["codec", "models", "backends.tables", "backends.base", "retry", "loops", "store", "backends.sql"]
    )
