"""An order and its e-mail: both or neither, because the task is part of the order's own transaction."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends
from sqlalchemy import Engine
from sqlmodel import Field, Session, SQLModel, create_engine

from app.taskflow import TaskManager, task_log

task_manager = TaskManager(snapshot_db="sqlite:///shop.db")  # the database that has the orders, too
router = APIRouter()
engine: Engine = create_engine("sqlite:///shop.db")


class Order(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    email: str
    confirmed: bool = False


def get_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@task_manager.task(retries=5, delay=10, backoff=2)
def confirm(order_id: int, session: Annotated[Session, Depends(get_session)]) -> None:
    """Reads the order as it is now: an id goes into a task, not a row."""
    order = session.get_one(Order, order_id)
    if order.confirmed:  # an attempt before this one came so far
        return
    task_log("confirming", address=order.email)
    order.confirmed = True
    session.commit()


@router.post("/orders")
async def place(email: str, session: Annotated[Session, Depends(get_session)]) -> dict[str, int | str | None]:
    session.add(order := Order(email=email))
    session.flush()
    order_id = order.id
    task_id = await task_manager.enqueue(confirm, order_id, session=session)
    session.commit()  # writes the order and the task
    return {"order_id": order_id, "task_id": task_id}
