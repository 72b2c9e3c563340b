from collections.abc import Callable
from pathlib import Path

import pytest

from tests.template import Answer, Baked, Template, allow_every_backend, copy_of_working_tree

Bake = Callable[..., Baked]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """The template as it is."""
    return Template(str(copy_of_working_tree(tmp_path_factory.mktemp("template"))), tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def template_of_every_backend(tmp_path_factory: pytest.TempPathFactory) -> Template:
    """The template with every backend enabled: their files must render well before their code is there."""
    directory = copy_of_working_tree(tmp_path_factory.mktemp("template"))
    allow_every_backend(directory)
    return Template(str(directory), tmp_path_factory.mktemp("home"))


@pytest.fixture
def bake(template: Template, tmp_path: Path) -> Bake:
    def bake(*options: str, **answers: Answer) -> Baked:
        return template.bake(tmp_path / "out", *options, **answers)

    return bake
