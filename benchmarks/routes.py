"""What the system costs the routes of an app: none of its own, one task by an async route, one by a plain route.

`python -m benchmarks.routes ARRANGEMENT DATABASE PORT` serves one arrangement. The routes stand in a router of their
own, as in a real app, and `TaskAdmin` "before" or "after" it, also with ", auto_install"; "alone" has no task system.
"""

import gc
import sys
from typing import Annotated, Any

import uvicorn
from app.taskflow import TaskAdmin, TaskManager
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI


async def async_noop(number: int) -> None: ...


def plain_noop(number: int) -> None: ...


def make_app(arrangement: str, database: str) -> FastAPI:
    place, _, option = arrangement.partition(", ")
    auto_install = bool(option)
    manager = TaskManager(snapshot_db=database)
    manager.task(async_noop)
    manager.task(plain_noop)
    asks: Any = Annotated[Any, Depends(manager.get_tasks)] if place != "alone" and not auto_install else BackgroundTasks
    router = APIRouter()

    @router.post("/nothing")
    async def nothing() -> dict[str, int]:
        return {"answer": 1}

    @router.post("/async")
    async def add_async(background_tasks: asks) -> dict[str, str]:
        return {"task_id": str(background_tasks.add_task(async_noop, 1))}

    @router.post("/plain")
    def add_plain(background_tasks: asks) -> dict[str, str]:
        return {"task_id": str(background_tasks.add_task(plain_noop, 1))}

    app = FastAPI()
    if place == "before":
        TaskAdmin(app, manager, auto_install=auto_install)
    app.include_router(router)
    if place == "after":
        TaskAdmin(app, manager, auto_install=auto_install)
    return app


def main() -> None:
    arrangement, database, port = sys.argv[1:]
    app = make_app(arrangement, database)
    gc.freeze()  # as the template's main.py does, for whoever is measured
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main()
