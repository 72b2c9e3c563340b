"""Facts that callers can act on, and the signals a task may raise.

Owns every exception type of the system. Each is built from facts and composes its own message, so that a
test, a log line and an HTTP answer all read the same.
"""

from __future__ import annotations

import inspect
import math
import signal
import traceback
from collections.abc import Callable
from types import TracebackType

from .texts import HERE_ONLY, cut

LONGEST_PART = 4_000
"""Characters of one message in a traceback."""


class TaskflowError(Exception):
    """Anything this package refuses; the message says which value broke which rule."""


class TaskDefinitionError(TaskflowError, ValueError):
    """Something that cannot be as it is written: an option, an executor, a queue, a schedule, a URL, a name."""


class TaskArgumentError(TaskflowError, ValueError):
    """An argument that cannot be stored or does not fit its annotation. Answered as 422."""

    def __init__(self, func_name: str, parameter: str, value: object, rule: str) -> None:
        self.func_name, self.parameter, self.rule = func_name, parameter, rule
        shown = "" if value is inspect.Parameter.empty else f" = {_shorten(value)}"
        super().__init__(f"{func_name}(): argument {parameter!r}{shown}: {rule}")


class QueueFullError(TaskflowError, RuntimeError):
    """A queue that already holds as many waiting tasks as it may. Answered as 429."""

    def __init__(self, queue: str, limit: int) -> None:
        self.queue, self.limit = queue, limit
        super().__init__(f"queue {queue!r} is full: {limit} tasks are waiting, which is its max_size")


class TaskNotFound(TaskflowError):
    """No task has this id. Answered as 404."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        super().__init__(f"no task has the id {task_id!r}")


class QueueNotFound(TaskflowError):
    """No queue has this name. Answered as 404."""

    def __init__(self, queue: str) -> None:
        self.queue = queue
        super().__init__(f"no queue is named {queue!r}")


class InstanceNotFound(TaskflowError):
    """No process that serves these tasks has this id. Answered as 404."""

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        super().__init__(f"no instance has the id {instance_id!r}")


class TaskStateError(TaskflowError):
    """A command that the task's present status does not allow. Answered as 400."""

    def __init__(self, task_id: str, status: str, command: str) -> None:
        self.task_id, self.status, self.command = task_id, status, command
        super().__init__(f"task {task_id} is {status}: it cannot be {command}")


class UnknownFunction(TaskflowError):
    """A stored task whose function this process does not have. Answered as 409."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name.endswith(HERE_ONLY):
            super().__init__(f"{name}: only the process that accepted it could run it; decorate a function instead")
        else:
            super().__init__(f"no task function is registered as {name!r} in this process")


class UnreadableCall(TaskflowError):
    """Stored arguments that are no longer a call of the function: it fails for good, and alone."""

    def __init__(self, name: str, reason: object) -> None:
        self.name = name
        super().__init__(f"{name}(): the stored arguments cannot be read: {reason}")


class BackendUnavailable(TaskflowError):
    """The database did not take or answer in time; nothing was written. Answered as 503 with Retry-After."""

    retry_after = 2
    """Seconds a client should wait before it asks again."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the task backend is unavailable: {reason}")


class OutcomeUnknown(BackendUnavailable):
    """The database went away while it committed: it will say later whether it did."""


class CopyRefused(TaskflowError):
    """A copy from one store to another that would not be one. Nothing was written."""


class Contended(BackendUnavailable):
    """Other processes changed the same tasks each time that a turn was about to."""

    def __init__(self) -> None:
        super().__init__("others change the same tasks all the time")


class BadSchedule(TaskDefinitionError):
    """A schedule that cannot be: refused where it is written."""

    def __init__(self, option: str, value: object, rule: str) -> None:
        self.option, self.value, self.rule = option, value, rule
        super().__init__(f"{option}={_shorten(value)}: {rule}")


class ScheduleNotFound(TaskflowError):
    """No schedule has this name. Answered as 404."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"no schedule is named {name!r}")


class TooManyRuns(TaskflowError):
    """So many acts on all that match are under way that another would only wait. Answered as 429."""

    def __init__(self, most: int) -> None:
        super().__init__(f"{most} acts on all that match are under way: wait for one, or stop it")


class TaskFailed(TaskflowError):
    """`result()` of a task that ended in anything but success."""

    def __init__(self, task_id: str, status: str, error: str | None) -> None:
        self.task_id, self.status, self.error = task_id, status, error
        super().__init__(f"task {task_id} is {status}" + (f": {error}" if error else ""))


class WorkerLost(TaskflowError):
    """The worker process of a task ended without an answer. It fails that task's attempt and nothing else."""

    def __init__(self, exit_code: int | None, *, began: bool) -> None:
        self.exit_code, self.began = exit_code, began
        super().__init__(f"its worker process {_ending(exit_code)}" + ("" if began else " before the task began"))


class WorkerError(TaskflowError):
    """Stands in for an exception of a worker process that cannot be had in this one: it reads the same."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        super().__init__(text or kind)


class RetryLater(Exception):
    """Raised by a task to be started again after `seconds`; spends no attempt."""

    def __init__(self, seconds: float) -> None:
        try:
            self.seconds = float(seconds)
        except (TypeError, ValueError, OverflowError):
            self.seconds = math.nan
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"RetryLater(seconds={_shorten(seconds)}): seconds must be finite and not negative")
        super().__init__(f"retry in {self.seconds:g} s")


class CancelTask(Exception):
    """Raised by a task to end itself as CANCELLED, whatever retries it has left. The reason is kept as its text."""

    def __init__(self, reason: object = "cancelled by the task") -> None:
        self.reason = text_of(reason)
        super().__init__(self.reason)


def signal_of(error: BaseException) -> RetryLater | CancelTask | None:
    """What a task meant by raising this, if it is a signal: a class of its own may have an `__init__` of its own.

    Raises ValueError for seconds that cannot be, and whatever its attributes raise.
    """
    if issubclass(type(error), RetryLater):
        return RetryLater(getattr(error, "seconds", None))  # type: ignore[arg-type]
    if issubclass(type(error), CancelTask):
        return CancelTask(getattr(error, "reason", error))
    return None


def text_of(value: object) -> str:
    """`str(value)`, or the name of its type where that says nothing. Raises nothing, whatever `__str__` does."""
    try:
        return str.__str__(str(value)) or type(value).__name__
    except BaseException:  # noqa: BLE001 - user code: __str__
        return type.__dict__["__name__"].__get__(type(value))  # type: ignore[no-any-return]


def trace_text(error: BaseException, begin: Callable[[TracebackType | None], TracebackType | None]) -> str:
    """As Python prints it, from the frame on that `begin` picks; long messages are cut, because the frames above them
    say more. Raises nothing, whatever the error's class does."""
    try:
        parts = traceback.format_exception(type(error), error, begin(error.__traceback__))
        return "".join(part if len(part) <= LONGEST_PART else cut(part, LONGEST_PART) + "\n" for part in parts)
    except BaseException as broken:  # noqa: BLE001 - user code: an error class whose own attributes raise
        return f"the traceback cannot be shown: {type(broken).__name__}\n"


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "ended"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


def _shorten(value: object) -> str:
    try:
        text = repr(value)
    except BaseException as error:  # noqa: BLE001 - a broken __repr__ must not hide the error that names the value
        text = f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
    return text if len(text) <= 120 else text[:117] + "..."
