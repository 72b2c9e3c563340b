"""Many tenants: one invoice run per tenant and month whoever asks, found by tag, no tenant before its turn for long."""

from fastapi import APIRouter, BackgroundTasks

from app.taskflow import QueueConfig, TaskManager

task_manager = TaskManager(
    queues={"invoices": QueueConfig(concurrency=4), "invoices-large": QueueConfig(concurrency=1)}
)
router = APIRouter()
LARGE = {"acme"}


@task_manager.task(retries=2, delay=30)
async def invoice(tenant: str, month: str) -> str:
    return f"{tenant} {month}"


@router.post("/tenants/{tenant}/invoices/{month}", status_code=202)
def start(tenant: str, month: str, background_tasks: BackgroundTasks) -> dict[str, str]:
    task_id = background_tasks.add_task(
        invoice,
        tenant,
        month,
        idempotency_key=f"{tenant}/{month}",  # a second click is the same task
        tags={"tenant": tenant},  # the dashboard finds it: tag.tenant:acme
        queue="invoices-large" if tenant in LARGE else "invoices",
    )
    return {"task_id": task_id}
