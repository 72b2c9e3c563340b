"""Removes what the answers left out, records where the project comes from, prints the next steps.

Standard library only, offline, safe to run again. Nothing here may fail for a valid answer: cookiecutter deletes the
project when a hook fails. A path in the tables that does not exist is a defect of the template and does fail.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ANSWERS: dict[str, Any] = json.loads(r"""{{ cookiecutter | tojson }}""")

REDIS = (
    "app/taskflow/backends/redis.py",
    "app/taskflow/backends/redis.lua",
    "app/taskflow/backends/redis_copies.py",
    "app/taskflow/backends/redis_keys.py",
    "app/taskflow/backends/redis_pages.py",
    "app/taskflow/backends/redis_values.py",
    "tests/taskflow/test_redis*.py",
)
POSTGRES = (
    "app/taskflow/backends/postgres.py",
    "app/taskflow/backends/postgres.sql",
    "tests/taskflow/test_postgres*.py",
)

DELIVERY = (
    "app/taskflow/delivery.py",
    "app/taskflow/delivery_worker.py",
    "app/worker.py",
    "docs/delivery.md",
    "tests/taskflow/brokers.py",
    "tests/taskflow/delivered.py",
    "tests/taskflow/fleet_app.py",
    "tests/taskflow/test_delivery.py",
)

# A pattern stands for all that it matches, one file at least.
REMOVED: dict[tuple[str, object], tuple[str, ...]] = {
    ("backend", "sqlite"): (*REDIS, *POSTGRES),
    ("backend", "redis"): POSTGRES,
    ("backend", "postgres"): REDIS,
    ("delivery", "none"): DELIVERY,
    ("docker", False): ("Dockerfile", "compose.yaml", ".dockerignore"),
    ("ci", "none"): (".github/workflows/ci.yml",),
}

# Files below the directory take the place of the project's files of the same path.
REPLACED: dict[tuple[str, object], str] = {("example_tasks", False): "_bare"}

# Where tasks are kept until TASKFLOW_URL says otherwise, and how to have one there.
SERVERS = {
    "redis": (
        "Redis at redis://localhost:6379/0",
        "docker run --rm -p 127.0.0.1:6379:6379 redis:8 --appendonly yes --appendfsync always",
    ),
    "postgres": (
        "PostgreSQL at postgresql://postgres@localhost/postgres",
        "docker run --rm -p 127.0.0.1:5432:5432 -e POSTGRES_HOST_AUTH_METHOD=trust postgres:18",
    ),
}

# The same bytes in every project.
VENDORED = ("app/taskflow", "tests/taskflow", "tools")

# What tools leave behind when they run inside the template directory.
CACHES = frozenset({"__pycache__", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache"})

# Set while git runs a hook; they would point every command at that repository.
ANOTHER_REPOSITORY = frozenset({"GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"})


def prune() -> None:
    for (key, answer), patterns in REMOVED.items():
        if ANSWERS[key] == answer:
            for pattern in patterns:
                for path in matching(pattern):
                    remove(path)


def matching(pattern: str) -> list[Path]:
    found = list(Path().glob(pattern))
    if not found:
        raise FileNotFoundError(pattern)
    return found


def remove(path: Path) -> None:
    path.unlink()
    for parent in path.parents:
        if parent == Path() or any(parent.iterdir()):
            return
        parent.rmdir()


def replace() -> None:
    for (key, answer), directory in REPLACED.items():
        if ANSWERS[key] == answer:
            for source in files_below(Path(directory)):
                os.replace(source, existing(source.relative_to(directory)))
        shutil.rmtree(directory)


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(path)
    return path


def sweep_caches() -> None:
    for directory, names, _ in os.walk("."):
        for name in CACHES.intersection(names):
            shutil.rmtree(os.path.join(directory, name))
            names.remove(name)
        if ".venv" in names:
            names.remove(".venv")


def git(*arguments: str, cwd: str = ".") -> str | None:
    """The output of a git command, or None when it fails or there is no git."""
    environment = {name: value for name, value in os.environ.items() if name not in ANOTHER_REPOSITORY}
    try:
        done = subprocess.run(["git", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def origin() -> tuple[str, str]:
    """The template's remote and commit; nothing where it is no unchanged clone of one."""
    template = str(ANSWERS["_repo_dir"])
    if git("rev-parse", "--show-prefix", cwd=template) != "" or git("status", "--porcelain", cwd=template) != "":
        return "", ""
    remote = git("remote", "get-url", "origin", cwd=template)
    commit = git("rev-parse", "HEAD", cwd=template)
    return (without_credentials(remote), commit) if remote and commit else ("", "")


def record_provenance() -> None:
    """Writes what `cruft check`, `cruft diff` and `cruft update` read, when the template came from a git remote; and
    the checksums of what is vendored, for `tools/upstream.py`."""
    remote, commit = origin()
    if remote:
        text = json.dumps(provenance(remote, commit), ensure_ascii=False, indent=2)
        Path(".cruft.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    stores = [ANSWERS["backend"]] if ANSWERS["backend"] in SERVERS else []
    stores += [ANSWERS["delivery"]] if ANSWERS["delivery"] != "none" else []
    lines = [
        "# What was taken from the template; `tools/upstream.py` reads and writes it.",
        f"template = {json.dumps(remote)}",
        f"commit = {json.dumps(commit)}",
        f"stores = {json.dumps(stores)}",
        "",
        "[files]",
        *(f'"{path}" = "{digest}"' for path, digest in vendored()),
    ]
    Path("app/taskflow/UPSTREAM.toml").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def vendored() -> list[tuple[str, str]]:
    paths = sorted(path.as_posix() for tree in VENDORED for path in files_below(Path(tree)))
    return [(path, hashlib.sha256(Path(path).read_bytes()).hexdigest()) for path in paths]


def provenance(remote: str, commit: str) -> dict[str, Any]:
    answers = {key: value for key, value in ANSWERS.items() if not key.startswith("_")}
    return {
        "template": remote,
        "commit": commit,
        "checkout": ANSWERS["_checkout"],
        "context": {"cookiecutter": {**answers, "_template": remote, "_commit": commit}},
        "directory": None,
    }


def without_credentials(remote: str) -> str:
    return re.sub(r"^(https?://)[^/@]*@", r"\1", remote)


def start_repository() -> bool:
    """True when the project has a repository of its own."""
    if git("rev-parse", "--is-inside-work-tree") is None:
        git("init", "--quiet")
    return Path(".git").exists()


def next_steps(own_repository: bool) -> str:
    rows = [
        ("Run it", f"cd {shlex.quote(project_path())}", ""),
        ("", "make run", "http://127.0.0.1:8000/tasks/dashboard"),
    ]
    if ANSWERS["example_tasks"]:
        rows.append(("Try it", 'curl -X POST "http://127.0.0.1:8000/signup?email=a@example.com"', ""))
    rows.append(("Test it", "make test", ""))
    if own_repository:
        rows.append(("Keep it", 'git add -A && git commit -m "Start from taskflow-template"', ""))
    lines = [f"  {bold(f'{label:<10}')} {command:<31} {note}".rstrip() for label, command, note in rows]
    return "\n".join(
        [
            "",
            f"  {bold(ANSWERS['project_name'])} is in {project_path()}/",
            "",
            *lines,
            "",
            *server_lines(),
            "  Your tasks go in app/tasks.py. The task system is app/taskflow/: yours to edit.",
            "  uv run tools/upstream.py status   shows your edits; update takes newer versions.",
            "",
        ]
    )


def server_lines() -> list[str]:
    if ANSWERS["backend"] not in SERVERS:
        return []
    place, command = SERVERS[ANSWERS["backend"]]
    return [
        f"  Tasks are kept in {place}.",
        "  If yours is elsewhere: cp .env.example .env, and say so there. One to try it with:",
        f"  {command}",
        "",
        *fleet_lines(),
    ]


def fleet_lines() -> list[str]:
    if ANSWERS["delivery"] == "none":
        return []
    return [
        "  Tasks run in the service until TASKFLOW_DELIVERY names a broker; then a fleet runs them:",
        "  docker run --rm -p 127.0.0.1:5672:5672 rabbitmq:4",
        "  make worker",
        "",
    ]


def project_path() -> str:
    """The project as seen from the shell that cookiecutter was started in."""
    path = os.path.relpath(Path.cwd(), os.environ.get("PWD") or Path.cwd().parent)
    return str(Path.cwd()) if path.startswith("..") else path


def bold(text: str) -> str:
    on_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[1m{text}\033[0m" if on_terminal else text


def main() -> None:
    sweep_caches()
    prune()
    replace()
    # cruft bakes into scratch directories, keeps its own record and compares the results: leave nothing else in them.
    if "_output_dir" not in ANSWERS:
        return
    record_provenance()
    text = next_steps(own_repository=start_repository())
    print(text.encode("ascii", "replace").decode("ascii"))


if __name__ == "__main__":
    main()
