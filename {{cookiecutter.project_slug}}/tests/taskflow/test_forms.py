"""A task run by hand: what an operator types is what the function gets, checked like any call."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any

import pytest
from fastapi import Depends
from pydantic import BaseModel

from app.taskflow import TaskManager, TaskStatus
from app.taskflow.forms import call_of, changed, fields_of

from .web_support import Service, page, service


class Colour(StrEnum):
    RED = "red"


class Item(BaseModel):
    name: str
    price: Decimal


def get_session() -> Iterator[None]:
    yield None


def order(
    item: Item,
    text: str,
    count: int = 1,
    /,
    *rest: int,
    when: date,
    colour: Colour = Colour.RED,
    note: str = "none",
    session: Annotated[None, Depends(get_session)] = None,
    **more: bool,
) -> Any: ...


@pytest.fixture
def manager() -> TaskManager:
    manager = TaskManager()
    manager.task(order)
    return manager


def test_a_form_has_a_field_for_each_argument_and_none_for_a_dependency(manager: TaskManager) -> None:
    fields = fields_of(manager.registry.named("order"))
    assert [field.name for field in fields] == ["item", "text", "count", "*rest", "when", "colour", "note", "**more"]
    assert [field.name for field in fields if field.required] == ["item", "text", "when"]
    assert fields[2].default == "1"
    assert fields[1].says == "str"


def test_what_was_shown_is_the_same_call_when_it_is_posted(manager: TaskManager) -> None:
    definition = manager.registry.named("order")
    call = ([{"name": "a", "price": "1.50"}, "7", 3, 4, 5], {"when": "2026-01-02", "note": "null", "loud": True})
    fields = fields_of(definition, call)
    texts = {field.name: field.text for field in fields}
    assert texts["text"] == "7"
    assert texts["*rest"] == "[4, 5]"
    args, kwargs = call_of(definition, texts)
    assert (list(args), kwargs) == call
    assert changed(fields, texts) == []
    assert changed(fields, texts | {"when": "2026-01-03"}) == ["when"]
    stored = definition.decode(definition.encode(args, kwargs))
    assert stored == (
        (Item(name="a", price=Decimal("1.50")), "7", 3, 4, 5),
        {"when": date(2026, 1, 2), "note": "null", "loud": True},
    )


def test_what_comes_behind_a_default_keeps_its_place() -> None:
    def spread(first: int, second: int = 7, *rest: int) -> None: ...

    manager = TaskManager()
    manager.task(spread)
    definition = manager.registry.named("spread")
    assert call_of(definition, {"first": "1", "*rest": "[3, 4]"}) == ((1, 7, 3, 4), {})
    assert call_of(definition, {"first": "1"}) == ((), {"first": 1})
    assert call_of(definition, {}) == ((), {})


@pytest.mark.parametrize(("key", "text"), [("*rest", "{}"), ("*rest", "4,5"), ("**more", "[]"), ("**more", "x")])
def test_a_list_or_a_dict_that_is_none_is_refused_by_its_name(manager: TaskManager, key: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"^\*+(rest|more): must be a JSON"):
        call_of(manager.registry.named("order"), {"item": "{}", "text": "", "when": "2026-01-02", key: text})


@pytest.fixture
def running() -> Iterator[Service]:
    with service(display_func_args=True) as running:
        yield running


def test_a_task_is_run_again_with_changed_arguments_and_the_audit_says_which(running: Service) -> None:
    first = running.run("add_up", 2, 3)
    document = page(running.client.get(f"/tasks/dashboard/tasks/{first}/again"))
    form = document.form("Run add_up")
    assert form.fields == {"a": "2", "b": "3"}
    response = running.client.post(form.action, data=form.fields | {"b": "40"})
    fresh = response.headers["location"].rpartition("/")[2]
    running.ended(fresh)
    task = running.client.get(f"/tasks/{fresh}").json()
    assert (task["result"], task["queue"], task["tags"]) == ({"sum": 42}, "sums", {"team": "numbers"})
    assert first[-8:] in page(running.client.get(f"/tasks/dashboard/tasks/{fresh}")).text
    (entry,) = [act for act in running.client.get("/tasks/audit").json() if act["action"] == "run_by_hand"]
    assert entry["detail"] == {"func_name": "add_up", "like": first, "changed": ["b"]}


def test_a_wrong_argument_comes_back_with_what_was_typed_and_what_is_wrong(running: Service) -> None:
    first = running.run("add_up", 2, 3)
    response = running.client.post(f"/tasks/dashboard/tasks/{first}/again", data={"a": "many", "b": "3"})
    document = page(response, 422)
    assert "valid integer" in document.text
    assert document.form("Run add_up").fields == {"a": "many", "b": "3"}
    assert ("input", "aria-invalid", "true") in document.attributes


def test_any_function_can_be_run_by_hand(running: Service) -> None:
    document = page(running.client.get("/tasks/dashboard/run"))
    form = page(running.client.get(document.links["add_up"])).form("Run add_up")
    response = running.client.post(form.action, data=form.fields | {"a": "1", "b": "1"})
    fresh = response.headers["location"].rpartition("/")[2]
    assert running.client.get(f"/tasks/{running.ended(fresh)}").json()["status"] == TaskStatus.SUCCESS
    assert running.client.get("/tasks/dashboard/run?name=nobody").status_code == 409
    assert running.client.post("/tasks/dashboard/run", data={"/name": "add_up"}).status_code == 422


def test_arguments_that_are_hidden_are_not_shown_to_be_changed() -> None:
    with service() as running:
        first = running.run("add_up", 2, 3)
        assert running.client.get(f"/tasks/dashboard/tasks/{first}/again").status_code == 403
        assert "Run again with changes" not in page(running.client.get(f"/tasks/dashboard/tasks/{first}")).text
