"""Rows of the application's own tables as arguments. No `from __future__`: SQLModel reads its annotations at once."""

from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
from sqlalchemy.orm import registry
from sqlmodel import Field, Relationship, Session, SQLModel, create_engine, select

from app.taskflow import TaskArgumentError
from app.taskflow.models import TaskConfig
from app.taskflow.registry import TaskDefinition, TaskRegistry


def taking(annotation: Any) -> TaskDefinition:
    def job(x: Any) -> None: ...

    job.__annotations__ = {"x": annotation}
    return TaskRegistry().add(job, TaskConfig())


def brought(annotation: Any, value: Any) -> Any:
    definition = taking(annotation)
    ((found,), _) = definition.decode(definition.encode((value,), {}))
    return found


class Base(SQLModel, registry=registry()): ...


class Team(Base, table=True):
    __tablename__ = "arguments_team"
    id: int | None = Field(default=None, primary_key=True)
    name: str
    heroes: list["Hero"] = Relationship(back_populates="team")


class Hero(Base, table=True):
    __tablename__ = "arguments_hero"
    id: int | None = Field(default=None, primary_key=True)
    name: str
    born: date | None = None
    team_id: int | None = Field(default=None, foreign_key="arguments_team.id")
    team: Team | None = Relationship(back_populates="heroes")


class Plain(SQLModel):
    name: str
    born: date


@pytest.fixture
def session() -> Iterator[Session]:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as opened:
        yield opened
    engine.dispose()


def test_a_row_arrives_as_a_detached_row_that_a_session_takes(session: Session) -> None:
    hero = Hero(name="h", born=date(2026, 1, 1), team=Team(name="t"))
    session.add(hero)
    session.commit()  # expires it: its columns are loaded again when they are asked for
    found = brought(Hero, hero)
    session.expunge_all()
    assert (type(found), found.id, found.name, found.born) == (Hero, 1, "h", date(2026, 1, 1))
    with pytest.raises(Exception, match="not bound to a Session"):
        _ = found.team
    found.name = "changed"
    session.add(found)
    session.commit()
    assert found.team.name == "t"
    assert [row.name for row in session.exec(select(Hero)).all()] == ["changed"]


def test_a_new_row_arrives_as_a_new_row(session: Session) -> None:
    found = brought(list[Hero], [Hero(name="n")])[0]
    assert (found.id, found.name, found.team) == (None, "n", None)
    session.add(found)
    session.commit()
    assert session.exec(select(Hero)).one().name == "n"


@pytest.mark.parametrize("annotation", [Hero, Any])
def test_a_row_that_cannot_be_loaded_any_more_is_refused_at_the_caller(session: Session, annotation: Any) -> None:
    hero = Hero(name="h")
    session.add(hero)
    session.commit()
    session.expunge_all()
    with pytest.raises(TaskArgumentError, match="DetachedInstanceError"):
        taking(annotation).encode((hero,), {})


def test_a_model_without_a_table_arrives_as_it_was() -> None:
    given = Plain(name="n", born=date(2026, 1, 1))
    found = brought(Plain, given)
    assert (found, found.model_fields_set, type(found)) == (given, {"name", "born"}, Plain)
