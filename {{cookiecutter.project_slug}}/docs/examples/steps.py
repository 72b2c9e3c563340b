"""Steps of a booking: each adds the next, once; what fails for good undoes what was done before it."""

from app.taskflow import CancelTask, TaskManager

task_manager = TaskManager()  # yours is in app/tasks.py
booked: dict[str, set[str]] = {}


@task_manager.task(retries=3, delay=5, requeue_on_interrupt=True)
async def book_flight(trip: str, seats: int) -> None:
    booked.setdefault(trip, set()).add("flight")
    await task_manager.enqueue(book_hotel, trip, seats, idempotency_key=f"{trip}/hotel")


@task_manager.task(retries=3, delay=5, requeue_on_interrupt=True)
async def book_hotel(trip: str, seats: int) -> None:
    if seats > 4:  # no use in trying again
        await task_manager.enqueue(cancel_flight, trip, idempotency_key=f"{trip}/cancel-flight")
        raise CancelTask(f"no hotel for {seats}")
    booked[trip].add("hotel")


@task_manager.task(retries=20, delay=5, backoff=2, max_delay=3600, requeue_on_interrupt=True)
async def cancel_flight(trip: str) -> None:
    booked[trip].discard("flight")
