"""Which functions are tasks, and what a bad argument is told."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from pydantic import BeforeValidator

from app.taskflow import TaskArgumentError, TaskflowError, TaskManager
from app.taskflow.errors import UnknownFunction
from app.taskflow.models import TaskConfig
from app.taskflow.registry import TaskRegistry

if TYPE_CHECKING:
    from fractions import Fraction


SOMEWHERE = object()


def job(number: int, word: str = "x", *, ratio: float = 1.0) -> None: ...


def with_defaults(number: int, /, place: Any = SOMEWHERE, *rest: int, word: str = "x", how: Any = print) -> None: ...


async def coroutine(number: int) -> None: ...


def other() -> Callable[..., None]:
    def job() -> None: ...

    return job


@pytest.fixture
def registry() -> TaskRegistry:
    return TaskRegistry()


def test_a_function_is_found_by_its_name_or_by_the_one_it_was_given(registry: TaskRegistry) -> None:
    assert registry.add(job, TaskConfig()) is registry.named("job")
    assert registry.add(coroutine, TaskConfig(name="other name")) is registry.named("other name")
    assert "job" in registry
    assert "coroutine" not in registry
    assert registry.of(coroutine).name == "other name"
    assert [definition.name for definition in registry] == ["job", "other name"]
    with pytest.raises(UnknownFunction, match="'gone'"):
        registry.named("gone")


def test_a_second_function_of_one_name_is_refused_naming_both(registry: TaskRegistry) -> None:
    registry.add(job, TaskConfig())
    with pytest.raises(TaskflowError) as refused:
        registry.add(other(), TaskConfig())
    message = str(refused.value)
    assert "'job'" in message
    assert f"{__name__}.job" in message
    assert "other.<locals>.job" in message
    assert "name=" in message
    assert registry.named("job").function is job


def test_two_functions_that_one_factory_made_do_not_share_a_name(registry: TaskRegistry) -> None:
    def make(word: str) -> Callable[[], str]:
        def made() -> str:
            return word

        return made

    registry.add(make("one"), TaskConfig())
    with pytest.raises(TaskflowError, match="'made'"):
        registry.add(make("two"), TaskConfig())
    assert registry.named("made").function() == "one"


def test_a_module_that_is_loaded_again_brings_its_functions_again(
    registry: TaskRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "reloaded_tasks.py"
    file.write_text("def send() -> str:\n    return 'old'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("reloaded_tasks")
    registry.add(module.send, TaskConfig())
    file.write_text("# moved\n\n\ndef send() -> str:\n    return 'newer'\n")
    importlib.invalidate_caches()
    module = importlib.reload(module)
    registry.add(module.send, TaskConfig(retries=2))
    assert registry.named("send").function() == "newer"
    assert registry.named("send").max_attempts == 3
    del sys.modules["reloaded_tasks"]


@pytest.mark.parametrize(
    ("function", "executor", "kind"),
    [
        (job, None, "thread"),
        (job, "thread", "thread"),
        (job, "process", "process"),
        (coroutine, None, "async"),
        (coroutine, "async", "async"),
    ],
)
def test_the_executor_follows_from_the_function_or_is_what_was_asked_for(
    registry: TaskRegistry, function: Any, executor: Any, kind: str
) -> None:
    definition = registry.add(function, TaskConfig(executor=executor))
    assert definition.executor == kind
    assert registry.executors == {definition.name: kind}


@pytest.mark.parametrize(("function", "executor"), [(job, "async"), (coroutine, "thread"), (coroutine, "process")])
def test_an_executor_that_cannot_run_the_function_is_refused_where_it_is_written(
    registry: TaskRegistry, function: Any, executor: Any
) -> None:
    with pytest.raises(TaskflowError, match=f"{function.__name__}.*{executor}"):
        registry.add(function, TaskConfig(executor=executor))
    assert function.__name__ not in registry


def test_a_function_that_was_never_decorated_gets_the_default_settings(registry: TaskRegistry) -> None:
    definition = registry.of(job)
    assert (definition.name, definition.config) == (f"{__name__}.job", TaskConfig())
    assert registry.of(job) is definition


@pytest.mark.parametrize(
    "function",
    [other(), lambda: None, partial(job, 1), print, "x".upper, TaskManager],
    ids=lambda value: type(value).__name__,
)
def test_a_function_that_could_not_be_found_after_a_restart_is_no_task(registry: TaskRegistry, function: Any) -> None:
    with pytest.raises(TaskflowError, match="restart"):
        registry.of(function)


def test_a_local_function_is_a_task_when_it_is_decorated(registry: TaskRegistry) -> None:
    function = other()
    registry.add(function, TaskConfig())
    assert registry.of(function).name == "job"


@pytest.mark.parametrize(
    ("args", "kwargs", "parameter", "value", "rule"),
    [
        ((), {}, "number", None, "Missing required argument"),
        (("three",), {}, "number", "'three'", "valid integer"),
        ((1, 2), {}, "word", "2", "valid string"),
        ((1,), {"ratio": "much"}, "ratio", "'much'", "valid number"),
        ((1, "x", 0.5), {}, "ratio", "0.5", "Unexpected positional argument"),
        ((1,), {"wrod": "typo"}, "wrod", "'typo'", "Unexpected keyword argument"),
        ((1,), {"number": 2}, "number", "2", "Multiple values"),
    ],
)
def test_an_argument_error_names_function_parameter_value_and_rule(
    registry: TaskRegistry, args: Any, kwargs: Any, parameter: str, value: str | None, rule: str
) -> None:
    definition = registry.add(job, TaskConfig(name="a job"))
    with pytest.raises(TaskArgumentError) as refused:
        definition.encode(args, kwargs)
    assert (refused.value.func_name, refused.value.parameter) == ("a job", parameter)
    assert rule.lower() in refused.value.rule.lower()
    shown = f" = {value}" if value else ""
    assert str(refused.value) == f"a job(): argument {parameter!r}{shown}: {refused.value.rule}"


def test_a_long_value_is_shortened_in_the_message(registry: TaskRegistry) -> None:
    with pytest.raises(TaskArgumentError) as refused:
        registry.add(job, TaskConfig()).encode(("x" * 10_000,), {})
    assert len(str(refused.value)) < 400


def named(name: Annotated[str, BeforeValidator(lambda name: name.strip())]) -> None: ...


def test_a_validator_that_does_not_expect_the_value_is_an_argument_error(registry: TaskRegistry) -> None:
    with pytest.raises(TaskArgumentError, match="its validation raised AttributeError: 'int' object has no"):
        registry.add(named, TaskConfig()).encode((5,), {})


def deep(order: dict[str, list[int]]) -> None: ...


def test_an_error_inside_an_argument_says_where(registry: TaskRegistry) -> None:
    with pytest.raises(TaskArgumentError) as refused:
        registry.add(deep, TaskConfig()).encode((), {"order": {"lines": [1, "two"]}})
    assert refused.value.parameter == "order"
    assert "lines.1" in str(refused.value)


def test_defaults_are_left_to_the_function(registry: TaskRegistry) -> None:
    definition = registry.add(job, TaskConfig())
    assert definition.decode(definition.encode((1,), {})) == ((1,), {})
    unstorable = registry.add(with_defaults, TaskConfig())
    assert unstorable.decode(unstorable.encode((1,), {"word": "y"})) == ((1,), {"word": "y"})


def test_arguments_are_converted_as_the_annotation_says(registry: TaskRegistry) -> None:
    definition = registry.add(job, TaskConfig())
    args, kwargs = definition.decode(definition.encode(("7",), {"ratio": 2}))
    assert (args, kwargs) == ((7,), {"ratio": 2.0})
    assert type(kwargs["ratio"]) is float


def test_stored_arguments_that_no_longer_fit_the_function_are_an_error(registry: TaskRegistry) -> None:
    definition = registry.add(coroutine, TaskConfig())
    with pytest.raises(TaskArgumentError):
        definition.decode('[["not a number"],{}]')


def returns_something_imported_for_types_only() -> "Fraction":
    raise NotImplementedError


def takes_something_imported_for_types_only(value: "Fraction") -> None: ...


def test_only_annotations_of_arguments_have_to_be_known(registry: TaskRegistry) -> None:
    registry.add(returns_something_imported_for_types_only, TaskConfig())
    with pytest.raises(TaskflowError, match="Fraction"):
        registry.add(takes_something_imported_for_types_only, TaskConfig())


def test_checking_arguments_does_not_call_the_function(registry: TaskRegistry) -> None:
    called = []

    def record(word: str) -> None:
        called.append(word)

    definition = registry.add(record, TaskConfig())
    definition.decode(definition.encode(("x",), {}))
    assert called == []
