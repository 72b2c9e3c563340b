"""Fan out and collect: one task adds many, and one more that ends when they have. Nobody waits in a slot."""

from app.taskflow import CancelTask, RetryLater, TaskManager, TaskStatus, get_task_context

task_manager = TaskManager()  # yours is in app/tasks.py


@task_manager.task(retries=3, delay=1)
async def measure(url: str) -> int:
    return len(url)


@task_manager.task(requeue_on_interrupt=True)
async def measure_all(urls: list[str]) -> str:
    """May be started again after a crash: its keys make sure that it adds nothing twice."""
    context = get_task_context()
    assert context is not None
    ids = [await task_manager.enqueue(measure, url, idempotency_key=f"{context.task_id}/{url}") for url in urls]
    return await task_manager.enqueue(collect, ids, idempotency_key=context.task_id)


@task_manager.task(requeue_on_interrupt=True)
async def collect(ids: list[str]) -> int:
    """Asks, and comes again in a while: a thousand looks cost no attempt."""
    parts = [await task_manager.store.get(task_id) for task_id in ids]
    if any(not part.status.terminal for part in parts):
        raise RetryLater(0.2)
    if failed := [part.task_id for part in parts if part.status is not TaskStatus.SUCCESS]:
        raise CancelTask(f"{len(failed)} of {len(ids)} parts failed")
    return sum([await task_manager.result(task_id) for task_id in ids])
