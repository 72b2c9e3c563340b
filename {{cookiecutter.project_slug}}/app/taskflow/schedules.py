"""What schedules there are, and every question and command about them and about one-offs.

Owns the schedules that `@task_manager.schedule` declares: a schedule's name is its task's. The API asks here, the
scheduler fires what it finds here. The invariant: what is in the table but not in this process's code is history. It is
shown, and never fired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from .backends.base import (
    Backend,
    CancelScheduled,
    DeclaredSchedule,
    Draft,
    EditSchedule,
    MoveScheduled,
    RunSchedule,
    Supersede,
)
from .errors import BadSchedule, ScheduleNotFound, TaskDefinitionError, TaskflowError, UnknownFunction
from .journal import Journal
from .models import EventKind, ScheduledOnce, ScheduleState, TaskConfig
from .options import AddOptions, checked, moment
from .registry import TaskFunction, TaskRegistry, name_of, plain
from .store import TaskStore
from .texts import key_text, readable
from .ticks import Misfire, Trigger

ONE_OFF_PAGE = 500


@dataclass(frozen=True, slots=True)
class Plan:
    """When a schedule is due and what it does then, as its decorator says."""

    trigger: Trigger
    timezone: str = "UTC"
    overlap: bool = True
    misfire: Misfire = "once"
    run_on_startup: bool = False
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.args, list | tuple):
            raise BadSchedule("args", self.args, "must be a tuple or a list of the function's arguments")
        if not isinstance(self.kwargs, Mapping | None) or not all(isinstance(name, str) for name in self.kwargs or ()):
            raise BadSchedule("kwargs", self.kwargs, "must be a dict of the function's arguments by name")
        for option, value in (("overlap", self.overlap), ("run_on_startup", self.run_on_startup)):
            if not isinstance(value, bool):
                raise BadSchedule(option, value, "must be True or False")


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule of this process's code. Its arguments are checked and encoded, not yet sealed for a task."""

    name: str
    function: TaskFunction
    plan: Plan
    arguments: str

    @property
    def trigger(self) -> Trigger:
        return self.plan.trigger


class Schedules:
    def __init__(
        self,
        registry: TaskRegistry,
        backend: Backend,
        journal: Journal,
        store: TaskStore,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._registry = registry
        self._backend = backend
        self._journal = journal
        self._store = store
        self._clock = clock
        self._by_name: dict[str, Schedule] = {}

    # -- what the code declares

    def add(self, function: TaskFunction, plan: Plan, config: TaskConfig | None, name: str | None = None) -> Schedule:
        """Makes a function a task, unless it is one and `config` is None, and a schedule of that task's name.

        Raises TaskDefinitionError where the name is taken, TaskArgumentError where the arguments do not fit.
        """
        function = plain(function)
        task = self._registry.known(function)
        function = function if task is None else task.function
        if config is None and task is not None:
            config = replace(task.config, name=name or task.name)
        config = config or TaskConfig(name=name)
        taken = self._by_name.get(config.name or name_of(function))
        if taken is not None and taken.function is function:
            raise TaskDefinitionError(
                f"two schedules are named {taken.name!r}; give one of them another name with "
                "@task_manager.schedule(name=...)"
            )
        replaces = task is None or task.name == (config.name or name_of(function))
        definition = self._registry.add(function, config, replaces=replaces)
        arguments = definition.encode(tuple(plan.args), plan.kwargs or {})
        schedule = Schedule(definition.name, function, plan, arguments)
        self._by_name[schedule.name] = schedule
        return schedule

    def __iter__(self) -> Iterator[Schedule]:
        return iter(self._by_name.values())

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def named(self, name: str) -> Schedule:
        """Raises ScheduleNotFound."""
        try:
            return self._by_name[name]
        except KeyError:
            raise ScheduleNotFound(name) from None

    def declaration(self, schedule: Schedule) -> DeclaredSchedule:
        """The schedule as the database is told of it."""
        plan = schedule.plan
        return DeclaredSchedule(
            name=schedule.name,
            func_name=schedule.name,
            trigger=plan.trigger.text,
            timezone=plan.timezone,
            overlap=plan.overlap,
            misfire=plan.misfire,
            next_tick=plan.trigger.next_tick(self._clock()),
        )

    def draft(self, schedule: Schedule, tick: datetime | None = None) -> Draft:
        """A run of the schedule: for one of its ticks, or for now."""
        return self._store.run_of(schedule.name, schedule.arguments, tick)

    # -- questions

    async def states(self) -> Sequence[ScheduleState]:
        """By name. What is paused, or not in this process's code, has no next tick."""
        return [self._shown(state) for state in await self._backend.schedules()]

    async def state(self, name: str) -> ScheduleState:
        """Raises ScheduleNotFound."""
        for state in await self.states():
            if state.name == name:
                return state
        raise ScheduleNotFound(name)

    def _shown(self, state: ScheduleState) -> ScheduleState:
        return state if state.name in self and not state.paused else replace(state, next_tick=None)

    # -- commands

    async def pause(self, name: str, actor: str | None = None, reason: str | None = None) -> ScheduleState:
        """Fires nothing more of it, on any instance. Raises ScheduleNotFound."""
        why = None if reason is None else readable(reason)
        return await self._edit(EditSchedule(name, EventKind.PAUSE_SCHEDULE, True, why, actor))

    async def resume(self, name: str, actor: str | None = None) -> ScheduleState:
        """Ticks that came while it was paused are no misfires. Raises ScheduleNotFound."""
        next_tick = self._by_name[name].trigger.next_tick(self._clock()) if name in self else None
        return await self._edit(EditSchedule(name, EventKind.RESUME_SCHEDULE, False, None, actor, next_tick))

    async def _edit(self, edit: EditSchedule) -> ScheduleState:
        await self.state(edit.name)
        await self._journal.obey(edit)
        return await self.state(edit.name)

    async def run(self, name: str, actor: str | None = None) -> ScheduleState:
        """Runs it now, paused or not; its ticks go on as they would. The state's `last_task_id` is the new task.

        Raises ScheduleNotFound, UnknownFunction when this process's code does not have it, QueueFullError.
        """
        if name not in self:
            await self.state(name)
            raise UnknownFunction(name)
        draft = self.draft(self._by_name[name])
        await self._journal.obey(RunSchedule(name, draft.task_id, actor), [draft])
        return await self.state(name)

    # -- one-offs

    async def once(
        self,
        function: TaskFunction,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        run_key: str,
        options: AddOptions,
    ) -> str:
        """The id of a task that waits for its time, in place of whatever waited under its key.

        Raises TaskArgumentError, QueueFullError, BackendUnavailable.
        """
        name = self._registry.of(function).name
        run_at, run_key = checked(name, "run_at", options.run_at, moment), checked(name, "run_key", run_key, key_text)
        draft = self._store.draft(function, args, kwargs, options._replace(run_at=run_at), durable=True)
        draft = draft._replace(source="scheduled", run_key=run_key)
        await self._journal.obey(Supersede(draft), [draft])
        return draft.task_id

    async def cancel_once(self, run_key: str, actor: str | None = None) -> bool:
        """Whether anything waited under that key. It will not run."""
        try:
            key = key_text(run_key)
        except ValueError:
            return False
        return (await self._journal.obey(CancelScheduled(key, actor))).changed > 0

    async def move_once(self, run_key: str, run_at: datetime, actor: str | None = None) -> bool:
        """Gives what waits under that key another time; whether anything did. The call stays as it was stored.

        Raises TaskArgumentError for a time that cannot be, BackendUnavailable.
        """
        run_at = checked(run_key, "run_at", run_at, moment)
        try:
            key = key_text(run_key)
        except ValueError:
            return False
        return (await self._journal.obey(MoveScheduled(key, run_at, actor))).changed > 0

    async def one_offs(
        self, before: datetime | None = None, after: tuple[datetime, str] | None = None, limit: int = ONE_OFF_PAGE
    ) -> Sequence[ScheduledOnce]:
        """A page of those that wait, soonest first: due before a time, and behind a (fire_at, task_id)."""
        return await self._backend.scheduled(before, after, limit)

    async def all_one_offs(self, before: datetime | None = None) -> list[ScheduledOnce]:
        """Those that wait, soonest first. Raises TaskflowError for a time without zone."""
        if before is not None and (not isinstance(before, datetime) or before.tzinfo is None):
            raise TaskflowError(f"before={before!r}: needs a time zone, e.g. datetime.now(UTC)")
        found: list[ScheduledOnce] = []
        place: tuple[datetime, str] | None = None
        while page := await self.one_offs(before, place):
            found += await self._store.with_calls(page)
            place = (page[-1].fire_at, page[-1].task_id)
        return found
