"""An upload that survives: the file is on the disk before the task is added, and goes when the task is done.

FastAPI reads uploads with `python-multipart`."""

import hashlib
import shutil
from pathlib import Path

import anyio.to_thread
from fastapi import APIRouter, BackgroundTasks, UploadFile
from uuid_utils import uuid7

from app.taskflow import TaskManager

task_manager = TaskManager()  # yours is in app/tasks.py
router = APIRouter()
SPOOL = Path("spool")


def keep(upload: UploadFile) -> Path:
    SPOOL.mkdir(exist_ok=True)
    path = SPOOL / str(uuid7())  # never the name that the client gave
    with path.open("xb") as file:
        shutil.copyfileobj(upload.file, file)
    return path


@task_manager.task(requeue_on_interrupt=True)
def digest(path: Path) -> str:
    """May run again after a crash: it deletes last, and a file that is gone was done."""
    if not path.exists():
        return "done before"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    path.unlink()
    return found


@router.post("/uploads", status_code=202)
async def upload(file: UploadFile, background_tasks: BackgroundTasks) -> dict[str, str]:
    path = await anyio.to_thread.run_sync(keep, file)
    return {"task_id": background_tasks.add_task(digest, path)}
