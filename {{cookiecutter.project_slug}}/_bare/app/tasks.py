"""Your tasks: functions that run after the response, survive restarts and are retried when they fail.

    @task_manager.task(retries=3, delay=1.0, backoff=2.0)
    def send_email(address: str) -> None: ...

Call them from a route with `background_tasks.add_task(send_email, address=...)`, from anywhere else with
`await task_manager.enqueue(send_email, address=...)`.
"""

from app.settings import secret, settings
from app.taskflow import TaskManager

task_manager = TaskManager(
    snapshot_db=settings.url,
    snapshot_interval=30.0,
    encrypt_args_key=secret(settings.encryption_key),
    encrypted_since=settings.encrypted_since,
    retention_days=settings.retention_days,
    cluster=settings.cluster,
)
