"""CPU-bound work: in a process of its own, which is killed when it takes too long and takes nothing with it."""

from app.taskflow import QueueConfig, TaskManager

task_manager = TaskManager(queues={"images": QueueConfig(concurrency=2)}, max_process_workers=2)


@task_manager.task(executor="process", queue="images", timeout=60, retries=1)
def shrink(pixels: bytes, factor: int) -> bytes:
    """At the top level of a module, so that the worker process finds it."""
    return pixels[::factor]
