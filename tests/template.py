"""The template as the tests see it: a clean copy of the working tree, and `bake`, which makes a project from it.

Nothing here is imported by the template itself. A copy is made from `git ls-files`, so that a forgotten file or a cache
in the working tree cannot make a test pass or fail.
"""

import ast
import functools
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cookiecutter.main import cookiecutter

ROOT = Path(__file__).parent.parent
PROJECT = "{{cookiecutter.project_slug}}"
PRE_HOOK = "hooks/pre_gen_project.py"

Answer = str | bool
Answers = Mapping[str, Answer]

QUESTIONS = {key: value for key, value in json.loads((ROOT / "cookiecutter.json").read_text()).items() if key[0] != "_"}

BACKENDS: tuple[str, ...] = tuple(QUESTIONS["backend"])

OPTIONS: dict[str, tuple[Answer, ...]] = {
    key: tuple(value) if isinstance(value, list) else (True, False)
    for key, value in QUESTIONS.items()
    if isinstance(value, list | bool)
}


def ready_backends() -> tuple[str, ...]:
    """The one constant of the pre hook that says which backends may be chosen."""
    for node in ast.parse((ROOT / PRE_HOOK).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "READY_BACKENDS":
            return tuple(ast.literal_eval(node.value))
    raise LookupError("READY_BACKENDS")


READY_BACKENDS = ready_backends()


def combinations(**narrowed: Sequence[Answer]) -> list[dict[str, Answer]]:
    """Every combination of the options that are a choice."""
    options = {**OPTIONS, **narrowed}
    every = (dict(zip(options, values, strict=True)) for values in itertools.product(*options.values()))
    return [answers for answers in every if goes_together(answers)]


def goes_together(answers: Answers) -> bool:
    return (answers["backend"], answers["delivery"]) != ("sqlite", "celery")


def pairwise(**narrowed: Sequence[Answer]) -> list[dict[str, Answer]]:
    """A few combinations in which every pair of two options' values occurs."""
    candidates = combinations(**narrowed)
    missing = set().union(*map(pairs, candidates))
    chosen = []
    while missing:
        best = max(candidates, key=lambda candidate: len(pairs(candidate) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def pairs(answers: Answers) -> set[tuple[tuple[str, Answer], tuple[str, Answer]]]:
    return set(itertools.combinations(sorted(answers.items()), 2))


def label(answers: Answers) -> str:
    """A test id: `sqlite-bare-docker-github-MIT`."""
    words = {"example_tasks": ("bare", "examples"), "docker": ("nodocker", "docker")}
    return "-".join(words[key][value] if isinstance(value, bool) else value for key, value in answers.items())


@dataclass(frozen=True)
class Baked:
    """What cookiecutter did: its exit code, what it printed, and the directory it was told to write to."""

    code: int
    output: str
    directory: Path
    slug: str

    @property
    def project(self) -> Path:
        assert self.code == 0, self.output
        return self.directory / self.slug


@dataclass(frozen=True)
class Template:
    """A directory or URL that cookiecutter can read, and a home directory for cookiecutter's own files."""

    source: str
    home: Path

    def bake(self, directory: Path, *options: str, **answers: Answer) -> Baked:
        unknown = answers.keys() - QUESTIONS.keys()
        assert not unknown, f"cookiecutter would silently ignore {unknown}"
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "cookiecutter", self.source, "--no-input", *options]
        command += ["--config-file", str(self.user_config())]
        command += [f"{key}={value}" for key, value in answers.items()]
        environment = {**os.environ, "HOME": str(self.home), "PWD": str(directory), "PYTHONUTF8": "1"}
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, encoding="utf-8")
        slug = str(answers.get("project_slug", "task-service"))
        return Baked(done.returncode, done.stdout + done.stderr, directory, slug)

    def user_config(self) -> Path:
        """cookiecutter's own files go below `home`, not into the home directory of whoever runs the tests."""
        self.home.mkdir(parents=True, exist_ok=True)
        config = self.home / "cookiecutter.yaml"
        config.write_text(json.dumps({"cookiecutters_dir": f"{self.home}/clones", "replay_dir": f"{self.home}/replay"}))
        return config

    def bake_quickly(self, directory: Path, **answers: Answer) -> Path:
        """The same project, by cookiecutter's Python API: five times as fast as a new process."""
        assert not answers.keys() - QUESTIONS.keys()
        with mock.patch.dict(os.environ, {"HOME": str(self.home), "PWD": str(directory)}):
            return Path(
                cookiecutter(
                    self.source,
                    no_input=True,
                    config_file=str(self.user_config()),
                    output_dir=str(directory),
                    extra_context=dict(answers),
                )
            )


def copy_of_working_tree(directory: Path) -> Path:
    for path in git(ROOT, "ls-files", "-co", "--exclude-standard", "-z").split("\0"):
        if path and (ROOT / path).exists():
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, target)
    return directory


def allow_every_backend(template: Path) -> None:
    """What enabling a backend will be: one line of the pre hook."""
    hook = template / PRE_HOOK
    text = hook.read_text()
    changed = text.replace(f"READY_BACKENDS = {READY_BACKENDS!r}".replace("'", '"'), f"READY_BACKENDS = {BACKENDS!r}")
    assert changed != text or READY_BACKENDS == BACKENDS
    hook.write_text(changed)


def git(directory: Path, *arguments: str) -> str:
    return run(["git", *arguments], directory)


IDENTITY = {
    "GIT_AUTHOR_NAME": "Test",
    "GIT_AUTHOR_EMAIL": "test@example.com",
    "GIT_COMMITTER_NAME": "Test",
    "GIT_COMMITTER_EMAIL": "test@example.com",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


def commit_all(directory: Path, message: str = "All") -> None:
    git(directory, "init", "--quiet")
    git(directory, "add", "--all")
    git(directory, "commit", "--quiet", "--message", message)


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment of a user's shell: no virtual environment of ours, no variable of a surrounding git or pytest.

    The servers that tests use are shared with the tests of a baked project.
    """
    ours = ("VIRTUAL_ENV", "GIT_", "PYTEST_", "TASKFLOW_", "MAKE", "MFLAGS", "UV_PROJECT")
    kept = {name: value for name, value in os.environ.items() if name.startswith("TASKFLOW_TEST_")}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**inherited, **kept, **IDENTITY, **changes}


def run(command: Sequence[str] | str, directory: Path, **changes: str) -> str:
    """The standard output of a command that must succeed; a string is run by the shell."""
    done = subprocess.run(
        command,
        cwd=directory,
        shell=isinstance(command, str),
        env=clean_environment(**changes),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_of(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in everything_below(directory) if path.is_file()}


def everything_below(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.relative_to(directory).parts[0] != ".git")


def fresh_location(backend: str, directory: Path) -> AbstractContextManager[str]:
    """The URL of an empty place for tasks, on a real server for those that need one."""
    place: AbstractContextManager[str] = nullcontext(f"sqlite:///{directory / 'tasks.db'}")
    if backend == "redis":
        place = servers().fresh_redis(servers().redis_url())
    elif backend == "postgres":
        place = servers().fresh_postgres(servers().postgres_url())
    return place


@functools.cache
def servers() -> Any:
    """The project's own module that finds and starts them; its package has the same name as this one."""
    path = ROOT / PROJECT / "tests/taskflow/servers.py"
    spec = importlib.util.spec_from_file_location("servers", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def uv() -> str:
    return shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
