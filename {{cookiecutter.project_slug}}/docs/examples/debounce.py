"""Once it is quiet: each change moves the moment at which the index is rebuilt, and one rebuild remains."""

from datetime import UTC, datetime, timedelta

from fastapi import APIRouter

from app.taskflow import TaskManager

task_manager = TaskManager()  # yours is in app/tasks.py
router = APIRouter()
QUIET = timedelta(seconds=30)


@task_manager.task(requeue_on_interrupt=True, retries=3, delay=5)
async def rebuild_index(site: str) -> str:
    return f"{site} rebuilt"


@router.put("/sites/{site}/pages/{page}", status_code=202)
async def change_page(site: str, page: str) -> dict[str, str]:
    run_at = datetime.now(UTC) + QUIET
    task_id = await task_manager.schedule_once(rebuild_index, site, run_at=run_at, run_key=f"index:{site}")
    return {"page": page, "rebuilt_by": task_id}
