"""Strange things that a task may return or raise, for the tests of what becomes of its attempt.

Both tables are name -> what makes the thing. The functions at the end are the tasks, one for each way to run; a worker
process imports them from here.
"""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Annotated, Any

from fastapi import Depends
from pydantic import BaseModel
from sqlmodel import Field, Session, SQLModel, create_engine

from app.taskflow import CancelTask, RetryLater


def exits(*_: object) -> Any:
    raise SystemExit("from a place where nobody expects it")


class Member(SQLModel, table=True):
    __tablename__ = "strange_member"
    id: int | None = Field(default=None, primary_key=True)
    name: str


def detached_row() -> Member:
    engine = create_engine("sqlite://")
    SQLModel.metadata.tables["strange_member"].create(engine)
    with Session(engine) as session:
        member = Member(name="x")
        session.add(member)
        session.commit()
    engine.dispose()
    return member


class Model(BaseModel):
    name: str = "x"

    def __getattribute__(self, name: str) -> Any:
        if name == "name":
            raise LookupError("gone")
        return super().__getattribute__(name)


@dataclass
class Record:
    number: int = 5

    def __getattribute__(self, name: str) -> Any:
        if name == "number":
            raise KeyboardInterrupt
        return super().__getattribute__(name)


class Endless(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise GeneratorExit

    def __iter__(self) -> Iterator[str]:
        raise asyncio.CancelledError

    def __len__(self) -> int:
        return 1


class Liar:
    __class__ = property(exits)


class Moment(datetime):
    isoformat = exits  # type: ignore[assignment]


class Colour(Enum):
    RED = object()


class Unreadable(datetime):
    def isoformat(self, *_: object) -> str:
        return "yesterday"


def circle() -> list[Any]:
    items: list[Any] = []
    items.append({"items": items})
    return items


RETURNED: Mapping[str, Callable[[], Any]] = {
    "a detached row": detached_row,
    "a model whose attribute raises": Model,
    "a dataclass whose attribute raises": Record,
    "a mapping that raises": Endless,
    "an object that lies about its class": Liar,
    "a datetime that exits": lambda: Moment(2026, 1, 1),
    "a datetime that cannot be read back": lambda: Unreadable(2026, 1, 1),
    "an enum of objects": lambda: Colour.RED,
    "a circle": circle,
    "an object": object,
    "a class": lambda: dict,
    "a function": lambda: exits,
    "a module": lambda: sys,
    "a lock": threading.Lock,
    "a file": io.BytesIO,
    "a generator": lambda: (number for number in range(3)),
    "an exception": lambda: ValueError("returned"),
    "an ellipsis": lambda: ...,
    "a number without end": lambda: 10**5_000,
    "a text without end": lambda: "x" * 1_000_000,
    "a set of a kind that comes back as dicts": lambda: {Frozen(1)},
}
"""None of these can be stored: the task has succeeded all the same."""


@dataclass(frozen=True)
class Frozen:
    number: int


class Mute(Exception):
    """`kind` is raised by whoever asks for its text."""

    kind: type[BaseException] = SystemExit

    def __str__(self) -> str:
        raise self.kind

    __repr__ = __str__


class MuteInterrupt(Mute):
    kind = KeyboardInterrupt


class MuteGenerator(Mute):
    kind = GeneratorExit


class MuteCancelled(Mute):
    kind = asyncio.CancelledError


class MuteForever(Mute):
    def __str__(self) -> str:
        return str(self)


class NoText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


class Text(str):
    encode = __getitem__ = __str__ = __format__ = exits  # type: ignore[assignment]


class OddText(Exception):
    def __str__(self) -> str:
        return Text("odd")


class Wild(Exception):
    __getattribute__ = exits


class Unpicklable(Exception):
    __reduce__ = __reduce_ex__ = exits


class Unpickled(Exception):
    def __setstate__(self, state: object) -> None:
        if multiprocessing.parent_process() is None:
            raise SystemExit

    def __reduce__(self) -> tuple[Any, ...]:
        return Unpickled, self.args, {"a": 1}


class Meta(type):
    __name__ = property(exits)


class Unnamed(Exception, metaclass=Meta): ...


class OwnBase(BaseException): ...


def noted() -> Exception:
    error = ValueError("noted")
    error.__notes__ = [Mute(), 5, None]  # type: ignore[list-item]
    return error


def circular() -> Exception:
    one, two = ValueError("one"), Mute("two")
    one.__cause__, two.__cause__ = two, one
    return one


class Busy(RetryLater):
    """As many write it: without the base's `__init__`."""

    def __init__(self) -> None: ...


class Never(RetryLater):
    def __init__(self, seconds: Any) -> None:
        self.seconds = seconds


class Hidden(RetryLater):
    seconds = property(exits)

    def __init__(self) -> None: ...


RAISED: Mapping[str, Callable[[], BaseException]] = {
    "an error whose text exits": lambda: Mute("x"),
    "an error whose text interrupts": lambda: MuteInterrupt("x"),
    "an error whose text ends a generator": lambda: MuteGenerator("x"),
    "an error whose text cancels": lambda: MuteCancelled("x"),
    "an error whose text never ends": lambda: MuteForever("x"),
    "an error whose text is none": lambda: NoText("x"),
    "an error whose text is odd": lambda: OddText("x"),
    "an error with the arguments of nobody": lambda: ValueError(Mute(), Liar()),
    "an error without attributes": lambda: Wild("x"),
    "an error that cannot be pickled": lambda: Unpicklable("x"),
    "an error that cannot be unpickled": lambda: Unpickled("x"),
    "an error without a name": lambda: Unnamed("x"),
    "an error with strange notes": noted,
    "an error that is its own cause": circular,
    "a group": lambda: BaseExceptionGroup("group", [Mute("x"), OwnBase()]),
    "an own base": lambda: OwnBase("x"),
    "an exit": lambda: SystemExit(5),
    "an interrupt": KeyboardInterrupt,
    "a generator's end": GeneratorExit,
    "an iterator's end": lambda: StopIteration(5),
    "a cancellation": asyncio.CancelledError,
    "a timeout": TimeoutError,
    "retry without seconds": Busy,
    "retry after nan seconds": lambda: Never(float("nan")),
    "retry after endless seconds": lambda: Never(float("inf")),
    "retry before now": lambda: Never(-1),
    "retry after text": lambda: Never("soon"),
    "retry after an endless number": lambda: Never(10**400),
    "retry after hidden seconds": Hidden,
    "retry that cannot be made": lambda: RetryLater(float("nan")),
    "retry that cannot be made of text": lambda: RetryLater("soon"),  # type: ignore[arg-type]
}
"""Each of these fails its attempt."""


class Stop(CancelTask):
    def __init__(self) -> None: ...


class Cut(CancelTask):
    def __init__(self) -> None:
        self.reason = "cut"


CANCELS: Mapping[str, Callable[[], BaseException]] = {
    "cancel for a number": lambda: CancelTask(5),
    "cancel for nothing": lambda: CancelTask(None),
    "cancel for bytes": lambda: CancelTask(b"x"),
    "cancel for what has no text": lambda: CancelTask(Mute()),
    "cancel for an object": lambda: CancelTask(object()),
    "cancel for an empty text": lambda: CancelTask(""),
    "cancel for a long text": lambda: CancelTask("x" * 1_000_000),
    "cancel for what UTF-8 cannot say": lambda: CancelTask("nul \0 and \ud800"),
    "cancel without a reason": Stop,
    "cancel with a reason of its own": Cut,
}
"""Each of these cancels its task."""


def make(name: str) -> Any:
    if name in RETURNED:
        return RETURNED[name]()
    if name in RAISED or name in CANCELS:
        raise (RAISED | CANCELS)[name]()  # type: ignore[operator]
    return name


def nothing() -> None: ...


async def on_the_loop(name: str) -> Any:
    return make(name)


async def on_the_loop_with_dependencies(name: str, _nothing: Annotated[None, Depends(nothing)]) -> Any:
    await asyncio.sleep(0)
    return make(name)


async def out_of_a_future(name: str) -> Any:
    future = asyncio.get_running_loop().create_future()
    try:
        future.set_result(make(name))
    except BaseException as error:  # noqa: BLE001
        future.set_exception(error)
    return await future


def in_a_thread(name: str) -> Any:
    return make(name)


def by_a_coroutine_of_a_thread(name: str) -> Any:
    return on_the_loop(name)


def in_a_thread_with_a_timeout(name: str) -> Any:
    return make(name)


def in_a_process(name: str) -> Any:
    return make(name)
