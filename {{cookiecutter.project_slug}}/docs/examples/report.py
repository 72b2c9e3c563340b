"""A long report: progress while it runs, the file as its result, a route that says how far it is."""

import csv
from pathlib import Path
from typing import Any

from fastapi import APIRouter, BackgroundTasks, HTTPException
from fastapi.responses import FileResponse

from app.taskflow import TaskManager, TaskStatus, get_task_context

task_manager = TaskManager()  # yours is in app/tasks.py
router = APIRouter()
FOLDER = Path("reports")


@task_manager.task(timeout=600, retries=1)
def build_report(year: int) -> Path:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{year}.csv"
    context = get_task_context()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        for month in range(1, 13):
            if context and context.cancelled:  # a thread is told, not stopped
                break
            writer.writerow([year, month, month * 1000])
            if context:
                context.progress(month, 12, f"month {month}")
    return path


@router.post("/reports/{year}", status_code=202)
def start(year: int, background_tasks: BackgroundTasks) -> dict[str, str]:
    return {"task_id": background_tasks.add_task(build_report, year)}


@router.get("/reports/by-task/{task_id}", response_model=None)
async def fetch(task_id: str) -> FileResponse | dict[str, Any]:
    task = await task_manager.store.get(task_id)
    if task.status is TaskStatus.SUCCESS:
        return FileResponse(await task_manager.result(task_id))
    if task.status.terminal:
        raise HTTPException(409, task.error or str(task.status))
    return {"status": task.status, "progress": task.progress}
