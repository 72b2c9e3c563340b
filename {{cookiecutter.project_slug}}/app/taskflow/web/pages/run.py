"""Running a task by hand: any function, or one task again with other arguments, field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response

from ...errors import TaskArgumentError
from ...forms import Field, call_of, changed, fields_of
from ...models import TaskRecord
from .. import records
from ..api import checked_id
from ..auth import actor_of
from ..html import form_of
from ..redaction import FRANK, Redaction, unmasked
from .desk import Desk

HIDDEN = "Arguments are hidden here: TaskAdmin(display_func_args=True) shows them, and lets them be changed."
SEALED = "Its arguments are encrypted, or cannot be read: it can be retried as it is."


def add_routes(router: APIRouter, desk: Desk) -> None:
    store = desk.store

    @router.get("/dashboard/run")
    async def choose(request: Request, name: Annotated[str, Query(max_length=512)] = "") -> Response:
        if not name:
            return desk.renderer.page(request, "functions.html", functions=store.functions())
        return form(request, name, fields_of(store.definition(name)))

    @router.post("/dashboard/run")
    async def run(request: Request) -> Response:
        texts = await form_of(request)
        name = texts.get("/name", "")
        return await start(request, name, fields_of(store.definition(name)), texts, None)

    @router.get("/dashboard/tasks/{task_id}/again")
    async def again(request: Request, task_id: str) -> Response:
        task = await store.get(checked_id(task_id))
        return form(request, task.func_name, fields_like(task, desk.site.redaction), task)

    @router.post("/dashboard/tasks/{task_id}/again")
    async def run_again(request: Request, task_id: str) -> Response:
        task = await store.get(checked_id(task_id))
        shown, stored = fields_like(task, desk.site.redaction), fields_like(task, FRANK)
        texts = await form_of(request)
        behind = {
            it.name: unmasked(texts.get(it.name, ""), it.text, own.text) for it, own in zip(shown, stored, strict=True)
        }
        return await start(request, task.func_name, shown, texts, task, behind)

    def fields_like(task: TaskRecord, redaction: Redaction) -> Sequence[Field]:
        """Raises HTTPException where nobody may see them."""
        if not desk.site.display_func_args:
            raise HTTPException(403, HIDDEN)
        definition = store.definition(task.func_name)
        try:
            args, kwargs = store.arguments(task)
        except records.UNREADABLE:
            raise HTTPException(409, SEALED) from None
        given = redaction.call(definition.signature.parameters, records.plain(args, redaction))
        return fields_of(definition, (given, records.plain(kwargs, redaction)))

    def form(
        request: Request, name: str, fields: Sequence[Field], task: TaskRecord | None = None, **said: object
    ) -> Response:
        facts: dict[str, Any] = {"func_name": name, "fields": fields, "task": task, "problem": "", "at": "", **said}
        return desk.renderer.page(request, "run.html", 422 if said else 200, **facts)

    async def start(
        request: Request,
        name: str,
        fields: Sequence[Field],
        texts: Mapping[str, str],
        task: TaskRecord | None,
        behind: Mapping[str, str] | None = None,
    ) -> Response:
        """What was typed comes back with what is wrong with it; `behind` says what it means where some is hidden."""
        typed = [Field(it.name, it.says, texts.get(it.name, ""), it.required, it.default) for it in fields]
        try:
            args, kwargs = call_of(store.definition(name), behind or texts)
            fresh = await store.run_by_hand(
                name, args, kwargs, actor_of(request), like=task, changed=changed(fields, texts)
            )
        except TaskArgumentError as error:
            hidden = desk.site.redaction.hides(error.parameter)
            problem = f"argument {error.parameter!r}: {error.rule}" if hidden else str(error)
            return form(request, name, typed, task, problem=problem, at=error.parameter)
        except ValueError as error:
            return form(request, name, typed, task, problem=str(error), at=str(error).partition(":")[0])
        return desk.go_to(request, f"/tasks/{fresh}")
