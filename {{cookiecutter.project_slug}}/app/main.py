"""The application: `uvicorn app.main:app`."""

import gc

from fastapi import FastAPI

from app.routes import router
from app.settings import secret, settings
from app.taskflow import TaskAdmin
from app.tasks import task_manager

app = FastAPI()
app.include_router(router)

task_manager.runs_tasks = settings.run
task_manager.version = settings.version
task_manager.deliver_by(secret(settings.delivery))
# auto_install manages the BackgroundTasks of every route: their signatures stay as they are.
TaskAdmin(
    app,
    task_manager,
    path=settings.path,
    auto_install=True,
    auth=settings.auth,
    secret_key=secret(settings.secret_key),
    environment=settings.env,
)

# What is loaded by now stays: else every full garbage collection walks through all of it.
gc.freeze()
