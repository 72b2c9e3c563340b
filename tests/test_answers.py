"""Answers: every choice bakes, bad ones are refused with the rule and leave nothing behind, hostile ones stay data."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import Bake
from tests.template import BACKENDS, OPTIONS, PRE_HOOK, QUESTIONS, READY_BACKENDS, ROOT, Answer, Template

HOSTILE = [
    pytest.param('say "hello" to \\n and C:\\temp\\', id="quotes and backslashes"),
    pytest.param("it's \"\"\"three\"\"\" or '''three'''", id="triple quotes"),
    pytest.param("queues \N{ROCKET} and \N{FAMILY} mail", id="emoji"),
    pytest.param("\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET} \N{RIGHT-TO-LEFT OVERRIDE}abc", id="right to left"),
    pytest.param("__import__('os').system('exit 1') # $(exit 1) `exit 1` ${HOME} %s", id="code"),
    pytest.param("a #% if: {a} } }} %} <b>&amp;</b> [x](y) | *", id="markup"),
    pytest.param("key: value, - item, !!tag &anchor *alias", id="yaml"),
    pytest.param("[table] = 'x' \\u0041", id="toml"),
]

REFUSED = [
    ("project_name", "", "must not be empty"),
    ("project_name", 'Say "Hi"', "quotes, backslashes or braces"),
    ("project_name", "It's", "quotes, backslashes or braces"),
    ("project_name", "a\\b", "quotes, backslashes or braces"),
    ("project_name", "a{b}", "quotes, backslashes or braces"),
    ("project_name", "two\nlines", "one line"),
    ("project_name", " padded", "start or end with a space"),
    ("project_slug", "", "lower-case letters"),
    ("project_slug", "Orders", "lower-case letters"),
    ("project_slug", "orders_service", "lower-case letters"),
    ("project_slug", "orders-", "lower-case letters"),
    ("project_slug", "9orders", "lower-case letters"),
    ("project_slug", "orders\n", "lower-case letters"),
    ("project_slug", "fastapi", "name of a package"),
    ("project_slug", "redis", "name of a package"),
    ("project_slug", "pydantic--core", "name of a package"),
    ("project_slug", "app", "own directories"),
    ("project_slug", "tests", "own directories"),
    ("project_slug", "nul", "Windows device"),
    ("project_slug", "com7", "Windows device"),
    ("description", "", "must not be empty"),
    ("description", "two\nlines", "one line"),
    ("description", "two\N{LINE SEPARATOR}lines", "one line"),
    ("description", "tab\there", "one line"),
    ("description", "{{ '{{' }} later }}", "template markup"),
    ("description", "{{ '#' }}% if x", "template markup"),
    ("description", "trailing ", "start or end with a space"),
    ("author_name", "A\r\nB", "one line"),
    ("author_name", "{{ '{%' }} x %}", "template markup"),
    ("delivery", "celery", "backend 'sqlite' is a file of one"),
    *(("backend", backend, "not available") for backend in BACKENDS if backend not in READY_BACKENDS),
]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OPTIONS.items() for value in values])
def test_every_choice_bakes_or_says_that_it_is_not_there_yet(bake: Bake, key: str, value: Answer) -> None:
    baked = bake(**({"backend": "postgres", key: value} if key == "delivery" else {key: value}))
    assert (baked.code == 0) == (key != "backend" or value in READY_BACKENDS), baked.output


@pytest.mark.parametrize(("key", "value", "rule"), REFUSED)
def test_a_bad_answer_is_refused_with_its_rule_and_leaves_nothing_behind(
    bake: Bake, key: str, value: str, rule: str
) -> None:
    baked = bake(**{"project_slug": "orders", key: value})
    assert baked.code != 0
    assert not list(baked.directory.iterdir())
    if (key, value) != ("project_slug", ""):  # cookiecutter itself refuses: the project would be its own parent
        assert f"{key} " in baked.output
        assert rule in baked.output
        assert "would pass" in baked.output


@pytest.mark.parametrize("slug", ["Orders Service", "9lives", "redis", "app", "nul", "---", "\N{SNOWMAN}"])
def test_the_suggested_slug_passes(bake: Bake, slug: str) -> None:
    refusal = bake(project_slug=slug)
    suggestion = refusal.output.split("' would pass.")[0].rsplit("'", 1)[1]
    assert bake(project_slug=suggestion).code == 0


def test_every_problem_is_reported_at_once_in_ascii(bake: Bake) -> None:
    baked = bake(project_name="caf\u00e9 {x}", project_slug="Caf\u00e9", description="a\nb")
    refusal = baked.output[baked.output.index("No project was made") : baked.output.index("b' must") + 200]
    assert [key for key in ("project_name", "project_slug", "description") if f"{key} '" in refusal] == [
        "project_name",
        "project_slug",
        "description",
    ]
    assert refusal.split("Stopping generation")[0].isascii()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_data(bake: Bake, text: str) -> None:
    project = bake(description=text, author_name=text).project
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["description"] == text
    assert metadata["authors"] == [{"name": text}]
    assert f"\n{text}\n" in (project / "README.md").read_text(encoding="utf-8")
    assert f"Copyright (c) {text}\n" in (project / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["Bestell\u00fcbersicht", "\u6ce8\u6587", "A (b) & <c> #1: 50%", "--help"])
def test_unusual_names_stay_data(bake: Bake, name: str) -> None:
    project = bake(project_name=name, project_slug="orders").project
    assert (project / "README.md").read_text(encoding="utf-8").splitlines()[0] == f"# {name}"


def test_the_slug_follows_from_the_name(bake: Bake) -> None:
    assert (bake(project_name="Orders & Returns").directory / "orders-returns" / "app").is_dir()


def test_an_answer_outside_its_choices_is_refused(bake: Bake) -> None:
    for key in OPTIONS:
        baked = bake(**{key: "mystery"})
        assert baked.code != 0
        assert "mystery" in baked.output
        assert not list(baked.directory.iterdir())


@pytest.mark.parametrize(("description", "code"), [("Plain \N{ROCKET} words", 0), ("{{ '{{' }} 7 * 7 }}", 1)])
def test_typed_answers(template: Template, tmp_path: Path, description: str, code: int) -> None:
    """Somebody at the prompts: cookiecutter does not evaluate what is typed, so the markup arrives and is refused."""
    typed = "\n".join(["Orders", "", description.replace("{{ '{{' }}", "{{"), *[""] * len(QUESTIONS)])
    command = [sys.executable, "-m", "cookiecutter", template.source, "--default-config"]
    environment = {**os.environ, "HOME": str(template.home), "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, input=typed, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "orders/pyproject.toml").exists() == (code == 0)
    assert ("template markup" in done.stderr) == (code == 1)


def test_an_old_cookiecutter_is_refused(template: Template, tmp_path: Path) -> None:
    """The pre hook as cookiecutter runs it, beside the metadata of an older cookiecutter."""
    metadata = tmp_path / "cookiecutter-2.5.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cookiecutter\nVersion: 2.5.0\n")
    answers = {"project_name": "A", "project_slug": "a", "description": "a", "author_name": "a", "backend": "sqlite"}
    hook = (ROOT / PRE_HOOK).read_text().replace("{{ cookiecutter | tojson }}", json.dumps(answers))
    (tmp_path / "hook.py").write_text(hook)
    done = subprocess.run([sys.executable, "hook.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cookiecutter 2.5.0 is too old: 2.6 or newer is needed" in done.stderr


def test_the_answers_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    table = [line.split("|")[1].strip(" `") for line in readme.splitlines() if line.startswith("| `")]
    questions = json.loads((ROOT / "cookiecutter.json").read_text())
    assert table == [key for key in questions if not key.startswith("_")]
    assert set(questions["__prompts__"]) == set(table)


def test_prompt_and_readme_say_which_backends_are_there() -> None:
    prompts = json.loads((ROOT / "cookiecutter.json").read_text())["__prompts__"]["backend"]
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `backend`")]
    for backend in BACKENDS:
        ready = backend in READY_BACKENDS
        assert ("not available yet" in prompts[backend]) != ready
        assert (f"`{backend}`" in row.partition("refused:")[2]) != ready
