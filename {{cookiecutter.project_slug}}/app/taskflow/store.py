"""Every question and every command about tasks.

Owns what "accept", "cancel", "retry" and "show" mean; the API, the pages and the command line all ask here, so that
they agree. Questions go to the backend, commands through the journal. It keeps no task in memory: only who waits for a
result.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import accumulate
from time import monotonic
from typing import Any, Literal
from uuid import UUID, uuid5

import uuid_utils

from . import codec, waits
from .backends.base import (
    EVERY_ACT,
    Backend,
    Cancel,
    CancelTasks,
    DismissTasks,
    Draft,
    EditQueue,
    Finish,
    GaugeRow,
    Note,
    Purge,
    Requeue,
    RequeueTasks,
    RestoreTasks,
    Revoke,
    TurnResult,
)
from .cipher import Cipher, Place, PlainText
from .context import CarriedContexts
from .deploys import COMPARED, Change, Deploy, changes, deploys, split
from .errors import (
    BackendUnavailable,
    InstanceNotFound,
    QueueFullError,
    QueueNotFound,
    TaskArgumentError,
    TaskDefinitionError,
    TaskFailed,
    TaskflowError,
    TaskNotFound,
    TaskStateError,
    UnknownFunction,
    UnreadableCall,
)
from .history import SPANS, Bar, Kind, Lost, Span, Sums, bars, by_series, lost
from .journal import Journal
from .models import (
    DEFAULT_QUEUE,
    RETRYABLE,
    AuditFilter,
    Count,
    Cursor,
    ErrorGroup,
    EventKind,
    InstanceRecord,
    LogEntry,
    QueueConfig,
    QueueState,
    ScheduledOnce,
    TaskEvent,
    TaskFilter,
    TaskPage,
    TaskRecord,
    TaskStatus,
    to_micros,
)
from .options import NO_OPTIONS, AddOptions, key_of, priority_of, queue_of, start_of, tags_of
from .registry import ADD_TASK_OPTIONS, TaskDefinition, TaskFunction, TaskRegistry, arguments_by_name, held
from .telemetry import current_traceparent, sent_traceparent
from .texts import key_text, readable

logger = logging.getLogger("taskflow")

KEY_NAMESPACE = UUID("6f2d7c1e-3b0a-5c0e-9a53-1d5f0f6a8f11")
"""Ids of tasks with an idempotency key are uuid5 of this and "name:key": equal keys meet in one row, everywhere. In the
name "%" is written "%25" and ":" is written "%3A", so that no two names share an id."""
TICK_NAMESPACE = UUID("0d9b6c2f-51c4-5a7e-8f0a-7c3e2b9d4a61")
"""Ids of a schedule's ticks are uuid5 of this and "name:microseconds"; what follows the last colon is the number."""
RESULT_POLL = 1.0
"""Seconds between looks at a task that may run in another process."""
MOST_NOTED_IDS = 100
LOOP_POLL = 1.0
"""Seconds between looks whether the event loop that a thread waits for is still there."""
BATCH = 500
"""Tasks that one turn acts on."""
MOST_COUNTED = 10_000
"""Tasks that are looked for to know how many match."""
WHOLE = 2**31 - 1
"""Characters: all there are."""
MOST_LOGGED = 2_000_000
"""Characters of log lines that are read at a time."""
LONGEST_LIFE = timedelta(days=365)
"""Of a process that was told to start no more tasks."""
PURGE_BATCH = 2_000
"""Rows of every kind."""
MOST_WARNED = 1_000
MOST_UNKNOWN_QUEUES = 100
"""Names of undeclared queues that are remembered, each warned about once."""


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry of many did: old id -> new id (the same one, where a retry replaces the original)."""

    new_ids: Mapping[str, str]
    skipped: int

    def __add__(self, other: Retried) -> Retried:
        return Retried({**self.new_ids, **other.new_ids}, self.skipped + other.skipped)


class Act(StrEnum):
    """What is done to all that match."""

    RETRY = "retry"
    CANCEL = "cancel"
    DISMISS = "dismiss"
    RESTORE = "restore"


ACTS: Mapping[Act, EventKind] = {
    Act.RETRY: EventKind.BULK_RETRY,
    Act.CANCEL: EventKind.BULK_CANCEL,
    Act.DISMISS: EventKind.BULK_DISMISS,
    Act.RESTORE: EventKind.BULK_RESTORE,
}


@dataclass(frozen=True, slots=True)
class Acted:
    """How far it is: tasks that were changed, and those whose state did not allow it."""

    done: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Metrics:
    """Numbers over all stored tasks. `success_rate` is over those that succeeded, failed or were interrupted."""

    total: int
    by_status: Mapping[TaskStatus, int]
    success_rate: float
    avg_duration_seconds: float


class TaskStore:
    def __init__(
        self,
        registry: TaskRegistry,
        backend: Backend,
        journal: Journal,
        carried: CarriedContexts,
        *,
        clock: Callable[[], datetime],
        cipher: Cipher | None = None,
        queues: Collection[str] = (),
        retry_replaces_original: bool = True,
    ) -> None:
        self._registry = registry
        self._backend = backend
        self._journal = journal
        self._carried = carried
        self._cipher = cipher or PlainText()
        self._declared = {DEFAULT_QUEUE, *queues}
        self._unknown: set[str] = set()
        self._alone = threading.Lock()
        """One thread at a time writes without a started journal."""
        self._warned: set[str] = set()
        self._clock = clock
        self._retry_replaces_original = retry_replaces_original
        self._awaited: dict[str, list[asyncio.Future[None]]] = {}
        journal.listeners.append(self._tell)

    # -- accepting

    def draft(
        self,
        function: TaskFunction,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: AddOptions,
        *,
        durable: bool = False,
    ) -> Draft:
        """A task as its caller wants it, checked and encoded.

        With `durable` any process must be able to run it; otherwise a callable that nobody decorated may be a task that
        only this one can. Raises TaskArgumentError, and TaskDefinitionError for what cannot be a task.
        """
        definition = self._registry.known(function) or (self._registry.of(function) if durable else None)
        if definition is None:
            return self._undecorated(function, args, kwargs, options)
        return self._drafted(definition, definition.encode(args, kwargs), options)

    def _undecorated(
        self, function: TaskFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: AddOptions
    ) -> Draft:
        with contextlib.suppress(TaskDefinitionError, TaskArgumentError):  # then it is a call for this process alone
            if (definition := self._registry.adopted(function)) is not None:
                return self._drafted(definition, definition.encode(args, kwargs), options)
        definition = held(function, args, kwargs)
        if definition.name not in self._warned and len(self._warned) < MOST_WARNED:
            self._warned.add(definition.name)
            logger.warning(
                "%s runs in this process only and is interrupted when that ends: to make it durable, decorate a "
                "function at the top level of a module with @task_manager.task and give it what can be stored",
                definition.name,
            )
        draft = self._drafted(definition, definition.encode(args, kwargs), options)._replace(here=True)
        wait = (draft.run_at - draft.created_at).total_seconds()
        self._registry.keep(draft.task_id, definition, monotonic() + wait)
        return draft

    def _drafted(self, definition: TaskDefinition, arguments: str, options: AddOptions) -> Draft:
        key = key_of(definition.name, options)
        task_id = new_id() if key is None else key_id(definition.name, key)
        draft = self._describe(definition, task_id, arguments, options, key)
        self._carried.keep(task_id)
        return draft

    def forget(self, drafts: Sequence[Draft]) -> None:
        """What was not accepted after all."""
        for draft in drafts:
            self._carried.forget(draft.task_id)
            if draft.here:
                self._registry.forget(draft.task_id)

    def run_of(self, schedule: str, arguments: str, tick: datetime | None) -> Draft:
        """A run of a schedule, for one of its ticks or for now. Equal ticks have equal ids, on every instance.

        Its `run_at` is the tick and its `created_at` the time it was fired: the list of tasks stays in order, and the
        difference from tick to start is how late it was.
        """
        task_id = new_id() if tick is None else tick_id(schedule, tick)
        definition = self._registry.named(schedule)
        return self._describe(definition, task_id, arguments, NO_OPTIONS, schedule=schedule, tick=tick)

    def _describe(
        self,
        definition: TaskDefinition,
        task_id: str,
        arguments: str,
        options: AddOptions,
        key: str | None = None,
        *,
        schedule: str | None = None,
        tick: datetime | None = None,
    ) -> Draft:
        name, config, now = definition.name, definition.config, self._clock()
        queue = self._known_queue(queue_of(name, options) or config.queue or DEFAULT_QUEUE)
        return Draft(
            task_id=task_id,
            name=name,
            queue=queue,
            priority=priority_of(name, options, config.priority),
            executor=definition.executor,
            max_attempts=definition.max_attempts,
            created_at=now,
            run_at=tick or start_of(name, options, now),
            arguments=self._cipher.seal(arguments, Place(task_id, name, "arguments", now)),
            tags=tags_of(name, options, config.tags),
            requeue=config.requeue_on_interrupt,
            source="manual" if schedule is None else "scheduled",
            schedule=schedule,
            key=key,
            trace=sent_traceparent(name, task_id, queue, definition.executor, options.traceparent)
            if schedule is None
            else current_traceparent(),  # nobody sends it: each instance drafts every tick, and one draft is taken
        )

    def _known_queue(self, name: str) -> str:
        if name in self._declared or name in self._journal.queues:
            return name
        if name not in self._unknown and len(self._unknown) < MOST_UNKNOWN_QUEUES:
            self._unknown.add(name)
            logger.warning(
                "queue %r is not declared in TaskManager(queues=...): its tasks go to %r", name, DEFAULT_QUEUE
            )
        return DEFAULT_QUEUE

    def refusal(self, draft: Draft, siblings: Sequence[Draft]) -> QueueFullError | None:
        """The error of a draft for whose queue the committed tasks and its own siblings leave no place.

        Exact only inside the turn: another process may take the last place, then `accept` raises the same error.
        """
        state = self._journal.queues.get(draft.queue)
        if state is None or state.max_size is None or draft.run_at > draft.created_at:
            return None
        taken = sum(other.queue == draft.queue and other.rejected_by is None for other in siblings)
        return QueueFullError(draft.queue, state.max_size) if state.pending + taken >= state.max_size else None

    def is_eager(self, function: TaskFunction) -> bool:
        definition = self._registry.known(function)
        return definition is not None and definition.config.eager

    def parameters_named_as_options(self, function: TaskFunction) -> Collection[str]:
        """Of a function that nobody decorated, those that `add_task` must leave to it."""
        if self._registry.known(function) is not None:
            return ()
        return ADD_TASK_OPTIONS & arguments_by_name(function).keys()

    async def accept(self, drafts: Sequence[Draft]) -> None:
        """Returns once they are durable. Raises BackendUnavailable or QueueFullError."""
        try:
            await self._journal.accept(drafts)
        except BackendUnavailable:
            self.forget(drafts)
            raise

    def accept_from_thread(self, drafts: Sequence[Draft]) -> None:
        """The same for plain code, which it blocks. Without a started journal it starts one for this moment.

        Raises TaskflowError where it would block the event loop that it waits for.
        """
        with self._alone:
            loop, here = self._journal.event_loop, running_loop()
            if here is not None and loop in (here, None):
                raise TaskflowError("enqueue_sync() would block this event loop: use `await task_manager.enqueue(...)`")
            if loop is None:
                asyncio.run(self._accept_alone(drafts))
                return
        wait_for(self.accept(drafts), loop)

    async def _accept_alone(self, drafts: Sequence[Draft]) -> None:
        async with self._journal.alone("script"):
            await self.accept(drafts)

    # -- questions

    async def get(self, task_id: str) -> TaskRecord:
        """Raises TaskNotFound."""
        record = await self._backend.get(known_id(task_id))
        if record is None:
            raise TaskNotFound(task_id)
        return record

    async def page(self, where: TaskFilter, before: Cursor | None = None, limit: int = 50) -> TaskPage:
        """Newest first."""
        return await self._backend.page(where, before, limit)

    async def with_arguments(self, tasks: Sequence[TaskRecord], most: int) -> Sequence[TaskRecord]:
        """The same tasks with the first `most` characters of their stored arguments, which a page leaves out."""
        found = await self._backend.arguments([task.task_id for task in tasks], most)
        return [replace(task, arguments=found.get(task.task_id)) for task in tasks]

    async def events(self, task_id: str) -> Sequence[TaskEvent]:
        """Oldest first. Raises TaskNotFound."""
        record = await self.get(task_id)
        return await self._backend.events(record.task_id)

    async def logs(self, task_id: str, after: int = 0, limit: int = 1_000) -> Sequence[LogEntry]:
        """Oldest first, those with a higher `seq` than `after`; fewer than there are where they are long together.
        Raises TaskNotFound."""
        record = await self.get(task_id)
        found = await self._backend.logs(record.task_id, after, limit)
        size = accumulate(len(line.message) + sum(len(str(value)) for value in line.extra.values()) for line in found)
        return [
            line
            for place, (line, total) in enumerate(zip(found, size, strict=True))
            if not place or total < MOST_LOGGED
        ]

    async def events_after(self, seq: int, limit: int = 1_000) -> Sequence[TaskEvent]:
        """Of all tasks, oldest first."""
        return await self._backend.events_after(seq, limit)

    async def last_seq(self) -> int:
        return await self._backend.last_seq()

    async def audit(
        self, before: int | None = None, limit: int = 50, where: AuditFilter = EVERY_ACT
    ) -> Sequence[TaskEvent]:
        """What people did, newest first; below the event number `before` where it is given."""
        return await self._backend.audit(before, limit, where)

    async def error_groups(
        self, *, dismissed: bool = False, before: tuple[datetime, str] | None = None, limit: int = 50
    ) -> Sequence[ErrorGroup]:
        """Failures by their cause, the last to fail first; below a (last_at, key)."""
        return await self._backend.groups(dismissed=dismissed, before=before, limit=limit)

    async def why(self, task: TaskRecord) -> list[str]:
        """Why a pending task does not start, in words; nothing where it is simply next."""
        if task.status is not TaskStatus.PENDING:
            return []
        queues, instances = await asyncio.gather(self.queues(), self.instances())
        now = self._clock()
        alive = [item for item in instances if item.alive(now)]
        facts = waits.Facts(
            now=now,
            known=self.knows(task.func_name),
            queue=next((queue for queue in queues if queue.name == task.queue), None),
            instances=len(alive),
            busy=sum(item.running for item in alive),
            slots=sum(item.slots for item in alive),
        )
        return waits.reasons(task, facts)

    async def history(self, span: Span, kind: Kind = "all", series: str = "") -> list[Bar]:
        """What was done in a part of the past, bar by bar: of everything, or of one queue or name."""
        start = span.start(self._clock())
        return bars(span, start, await self._backend.gauges(span.size, kind, start, series))

    async def histories(self, kind: Kind) -> dict[str, list[Bar]]:
        """The last hour of each queue or name."""
        span = SPANS["1h"]
        start = span.start(self._clock())
        rows: dict[str, list[GaugeRow]] = {}
        for row in await self._backend.gauges(span.size, kind, start):
            rows.setdefault(row.series, []).append(row)
        return {series: bars(span, start, found) for series, found in rows.items()}

    async def deploys(self, span: Span) -> list[Deploy]:
        """When versions of the application began to run, in a part of the past."""
        now = self._clock()
        start = span.start(now)
        looked_back = min(start - span.step * 24, now - timedelta(days=1))  # to whatever ran before
        found = deploys(await self._backend.gauges(span.size, "version", looked_back))
        return [deploy for deploy in found if deploy.at >= start]

    async def lost(self) -> list[Lost]:
        """Processes that went without a word in the last day, the newest first, with how many tasks they had left."""
        found = lost(await self._backend.gauges(60, "lost", self._clock() - timedelta(days=1)))
        return sorted(found, key=lambda item: item.at, reverse=True)

    async def changed_since(self, deploy: Deploy) -> list[Change]:
        """What has become slower, quicker, or fails more or less often than before it."""
        rows = await self._backend.gauges(60, "name", deploy.at - COMPARED)
        return changes(*split(deploy, rows))

    async def lately(self, kind: Kind) -> dict[str, Sums]:
        """Of each queue or name, since the beginning of the hour before this one."""
        hour = self._clock().replace(minute=0, second=0, microsecond=0)
        return by_series(await self._backend.gauges(3_600, kind, hour - timedelta(hours=1)))

    async def oldest(self, queues: Sequence[str]) -> Mapping[str, datetime]:
        """Of each of these queues in which tasks could start: since when the one that waits longest could."""
        return await self._backend.oldest(queues)

    async def is_revoked(self, session_id: str) -> bool:
        """Whether that login session was ended before its time, here or elsewhere."""
        return await self._backend.is_revoked(session_id)

    async def counts(self) -> Sequence[Count]:
        return await self._backend.counts()

    async def due(self) -> int:
        """Tasks whose time has come but which no turn has made ready yet."""
        return await self._backend.due(self._clock())

    async def instances(self) -> Sequence[InstanceRecord]:
        return await self._backend.instances()

    async def metrics(self) -> Metrics:
        counts = await self.counts()
        by_status = {status: sum(count.n for count in counts if count.status is status) for status in TaskStatus}
        ended = [TaskStatus.SUCCESS, TaskStatus.FAILED, TaskStatus.INTERRUPTED]
        finished = sum(by_status[status] for status in ended)
        seconds = sum(count.seconds for count in counts if count.status in ended)
        return Metrics(
            total=sum(by_status.values()),
            by_status=by_status,
            success_rate=by_status[TaskStatus.SUCCESS] / finished if finished else 0.0,
            avg_duration_seconds=seconds / finished if finished else 0.0,
        )

    def knows(self, name: str) -> bool:
        """Whether this process has the function of that name."""
        return name in self._registry

    def executor_of(self, name: str) -> str | None:
        """Where this process runs the function of that name; None where it does not have it."""
        return self._registry.executors.get(name)

    async def result(self, task_id: str, timeout: float | None = None) -> Any:
        """What the task returned, once it has. Raises TaskFailed, TimeoutError, TaskNotFound."""
        async with asyncio.timeout(timeout):
            record = await self._ended(task_id)
        if record.status is not TaskStatus.SUCCESS:
            raise TaskFailed(task_id, record.status, record.error)
        return self.returned(record)

    async def _ended(self, task_id: str) -> TaskRecord:
        loop = asyncio.get_running_loop()
        while True:
            told = loop.create_future()
            self._awaited.setdefault(task_id, []).append(told)
            try:
                record = await self.get(task_id)
                if record.status.terminal:
                    return record
                await asyncio.wait([told], timeout=RESULT_POLL)
            finally:
                self._forget(task_id, told)

    def _forget(self, task_id: str, told: asyncio.Future[None]) -> None:
        waiting = self._awaited.get(task_id, [])
        if told in waiting:
            waiting.remove(told)
        if not waiting:
            self._awaited.pop(task_id, None)

    def _tell(self, finishes: Sequence[Finish], _result: TurnResult) -> None:
        if self._awaited:
            for finish in finishes:
                for told in self._awaited.pop(finish.task.task_id, ()):
                    told.set_result(None)

    # -- commands

    async def cancel(self, task_id: str, actor: str | None = None) -> TaskRecord:
        """A pending task never runs afterwards; a running one is asked to stop, wherever it runs.

        Raises TaskNotFound, TaskStateError when it has ended, BackendUnavailable.
        """
        answer = await self._journal.obey(Cancel(known_id(task_id), actor))
        if answer.before is None:
            raise TaskNotFound(task_id)
        if answer.before.terminal:
            raise TaskStateError(task_id, answer.before, "cancelled")
        return await self.get(task_id)

    async def retry(self, task_id: str, actor: str | None = None) -> TaskRecord:
        """The task as it waits to run again: itself, or a new one that points back (`retry_replaces_original=False`).

        Raises TaskNotFound, TaskStateError, UnknownFunction when its function is gone, BackendUnavailable.
        """
        record = await self.get(task_id)
        if record.status not in RETRYABLE:
            raise TaskStateError(task_id, record.status, "retried")
        definition = self._registry.named(record.func_name)
        if not self._retry_replaces_original:
            return await self._retry_as_new(record, definition, actor)
        answer = await self._journal.obey(Requeue(record.task_id, definition.max_attempts, actor))
        if not answer.changed:
            raise TaskStateError(task_id, answer.before or record.status, "retried")
        return await self.get(task_id)

    async def _retry_as_new(self, record: TaskRecord, definition: TaskDefinition, actor: str | None) -> TaskRecord:
        now = self._clock()
        draft = Draft(
            task_id=new_id(),
            name=record.func_name,
            queue=record.queue,
            priority=record.priority,
            executor=definition.executor,
            max_attempts=definition.max_attempts,
            created_at=now,
            run_at=now,
            arguments=record.arguments or codec.NO_ARGUMENTS,
            tags=record.tags,
            requeue=definition.config.requeue_on_interrupt,
            retry_of=record.task_id,
        )
        await self.accept([self._resealed(draft, record)])
        if actor is not None:
            detail = {"new_task_id": draft.task_id}
            await self._journal.obey(Note(EventKind.COPIED, actor, detail, record.task_id))
        return await self.get(draft.task_id)

    def _resealed(self, draft: Draft, record: TaskRecord) -> Draft:
        """The draft with the record's arguments under its own id. Raises TaskflowError when they cannot be read."""
        try:
            arguments = self._cipher.open(draft.arguments, place_of(record, "arguments"))
        except ValueError as error:
            raise UnreadableCall(record.func_name, error) from error
        place = Place(draft.task_id, draft.name, "arguments", draft.created_at)
        return draft._replace(arguments=self._cipher.seal(arguments, place))

    def functions(self) -> list[str]:
        """The names of the tasks that this process can run."""
        return sorted(definition.name for definition in self._registry)

    def parameters(self, name: str) -> list[str]:
        """Of a function, in their order; none where this process does not have it."""
        definition = self._registry.get(name)
        return [] if definition is None else list(definition.signature.parameters)

    def definition(self, name: str) -> TaskDefinition:
        """Raises UnknownFunction."""
        return self._registry.named(name)

    async def run_by_hand(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        actor: str,
        *,
        like: TaskRecord | None = None,
        changed: Sequence[str] = (),
    ) -> str:
        """The id of a new task with these arguments, checked as any caller's; otherwise as another one, if it is like
        that. The audit says which arguments were changed, and not to what.

        Raises UnknownFunction, TaskArgumentError, QueueFullError, BackendUnavailable.
        """
        definition = self._registry.named(name)
        options = NO_OPTIONS if like is None else AddOptions(tags=like.tags, priority=like.priority, queue=like.queue)
        draft = self._drafted(definition, definition.encode(args, kwargs), options)
        if like is not None:
            draft = draft._replace(retry_of=like.task_id)
        await self.accept([draft])
        detail = {"func_name": name, "like": like.task_id if like else None, "changed": list(changed)}
        await self._journal.obey(Note(EventKind.RUN_BY_HAND, actor, detail, draft.task_id))
        return draft.task_id

    async def retry_many(self, task_ids: Sequence[str], actor: str | None = None) -> Retried:
        """Retries those that can be, each once; one entry in the audit."""
        unique = list(dict.fromkeys(task_ids))
        retried = Retried({}, 0)
        for start in range(0, len(unique), BATCH):
            found = await asyncio.gather(*(self._find(task_id) for task_id in unique[start : start + BATCH]))
            tasks = [task for task in found if task is not None]
            retried += await self._retry_batch(tasks) + Retried({}, len(found) - len(tasks))
        await self._note_retried(actor, retried, {"task_ids": unique[:MOST_NOTED_IDS]})
        return retried

    async def retry_failed(
        self, since: datetime | None, func_name: str | None = None, actor: str | None = None
    ) -> Retried:
        """Retries every FAILED task added after `since`; None is all of them."""
        where = TaskFilter(statuses=(TaskStatus.FAILED,), since=since, func_name=func_name, until=self._clock())
        retried = Retried({}, 0)
        cursor: Cursor | None = None
        while True:
            page = await self.page(where, cursor, BATCH)
            retried += await self._retry_batch(page.tasks)
            if (cursor := page.older) is None:
                break
        window = {"since": since.isoformat() if since else "all", "func_name": func_name}
        await self._note_retried(actor, retried, window)
        return retried

    async def _find(self, task_id: str) -> TaskRecord | None:
        try:
            return await self.get(task_id)
        except TaskNotFound:
            return None

    async def _retry_batch(self, tasks: Sequence[TaskRecord], note: str | None = None) -> Retried:
        """One turn for all of them, unless a retry is a new task."""
        ids = [task.task_id for task in tasks]
        if not self._retry_replaces_original:
            return await self._retry_each(ids)
        if not ids:
            return Retried({}, 0)
        known = {name: self._registry.get(name) for name in {task.func_name for task in tasks}}
        attempts = {name: definition.max_attempts for name, definition in known.items() if definition is not None}
        answer = await self._journal.obey(RequeueTasks(ids, attempts, note))
        return Retried({task_id: task_id for task_id in answer.ids}, len(ids) - answer.changed)

    # -- all that match

    async def act(
        self, act: Act, where: TaskFilter, actor: str | None = None, reason: str | None = None
    ) -> AsyncIterator[Acted]:
        """Does one thing to every task that matches now, a batch at a time, and tells how far it is after each.

        Whoever stops asking stops it. What it did is one entry in the audit, also where it was stopped or failed; the
        tasks' own events name no actor. Raises BackendUnavailable.
        """
        where = replace(where, until=min(filter(None, (where.until, self._clock()))))
        acted, cursor, ended = Acted(), None, False
        try:
            while not ended:
                page = await self.page(where, cursor, BATCH)
                done = await self._act_on(act, page.tasks, reason) if page.tasks else 0
                acted = Acted(acted.done + done, acted.skipped + len(page.tasks) - done)
                cursor, ended = page.older, page.older is None
                yield acted
        finally:
            facts = {"matching": words_of(where), "done": acted.done, "skipped": acted.skipped, "reason": reason}
            detail = {**facts, "stopped": None if ended else "before the end"}
            await self._journal.obey(Note(ACTS[act], actor, {key: it for key, it in detail.items() if it is not None}))

    async def _act_on(self, act: Act, tasks: Sequence[TaskRecord], reason: str | None) -> int:
        note = f"with all that matched: {reason}" if reason else "with all that matched"
        ids = [task.task_id for task in tasks]
        match act:
            case Act.RETRY:
                return len((await self._retry_batch(tasks, note)).new_ids)
            case Act.CANCEL:
                command: CancelTasks | DismissTasks | RestoreTasks = CancelTasks(ids, note)
            case Act.DISMISS:
                command = DismissTasks(ids, note)
            case Act.RESTORE:
                command = RestoreTasks(ids)
        return (await self._journal.obey(command)).changed

    async def dismiss(self, task_id: str, reason: str, actor: str | None = None) -> TaskRecord:
        """Says that somebody has seen to a FAILED task. Raises TaskNotFound, TaskStateError, BackendUnavailable."""
        return await self._settled(task_id, DismissTasks([known_id(task_id)], readable(reason), actor), "dismissed")

    async def restore(self, task_id: str, actor: str | None = None) -> TaskRecord:
        """Undoes it. Raises as `dismiss` does."""
        return await self._settled(task_id, RestoreTasks([known_id(task_id)], actor), "restored")

    async def _settled(self, task_id: str, command: DismissTasks | RestoreTasks, word: str) -> TaskRecord:
        answer = await self._journal.obey(command)
        record = await self.get(task_id)
        if not answer.changed:
            raise TaskStateError(task_id, record.status, word)
        return record

    async def count_matching(self, where: TaskFilter) -> tuple[int, bool]:
        """How many tasks match, and whether that is all: where counts cannot tell, it is looked for, MOST_COUNTED at
        most."""
        if where.counted:
            counts = [count for count in await self.counts() if where.counts(count)]
            return sum(count.n for count in counts), True
        found, cursor = 0, None
        while found < MOST_COUNTED:
            page = await self.page(where, cursor, BATCH)
            found += len(page.tasks)
            if (cursor := page.older) is None:
                return found, True
        return found, False

    async def _retry_each(self, task_ids: Sequence[str]) -> Retried:
        answers = await asyncio.gather(*(self._try_retry(task_id) for task_id in task_ids))
        new_ids = {old: new for old, new in zip(task_ids, answers, strict=True) if new is not None}
        return Retried(new_ids, len(task_ids) - len(new_ids))

    async def _try_retry(self, task_id: str) -> str | None:
        try:
            return (await self.retry(task_id)).task_id
        except (TaskNotFound, TaskStateError, UnknownFunction, UnreadableCall):
            return None

    async def _note_retried(self, actor: str | None, retried: Retried, detail: Mapping[str, Any]) -> None:
        numbers = {"dispatched": len(retried.new_ids), "skipped": retried.skipped}
        await self._journal.obey(Note(EventKind.BULK_RETRY, actor, {**detail, **numbers}))

    async def delete_history(self, before: datetime, actor: str | None = None) -> int:
        """Deletes what ended before that time, a batch at a time; says how many tasks. One entry in the audit."""
        deleted = await self.prune(before)
        await self._journal.obey(
            Note(EventKind.DELETE_HISTORY, actor, {"before": before.isoformat(), "deleted": deleted})
        )
        return deleted

    async def prune(self, before: datetime) -> int:
        """Deletes what ended before that time. Other writes go on between the batches."""
        deleted = 0
        while True:
            answer = await self._journal.obey(Purge(before, PURGE_BATCH))
            deleted += answer.changed
            if not answer.more:
                return deleted

    # -- queues

    async def queues(self) -> Sequence[QueueState]:
        """By name. The default one is always there."""
        states = {DEFAULT_QUEUE: QueueState(DEFAULT_QUEUE, None, None, False, None)}
        states |= {state.name: state for state in await self._backend.queues()}
        return [states[name] for name in sorted(states)]

    async def drain_instance(self, instance_id: str, actor: str | None = None) -> InstanceRecord:
        """Has a process start no more tasks, within a second or two and for the rest of its life; what it runs goes on.

        Raises InstanceNotFound.
        """
        found = next((item for item in await self.instances() if item.instance_id == instance_id), None)
        if found is None:
            raise InstanceNotFound(instance_id)
        detail = {"instance": instance_id, "process": f"{found.host}:{found.pid}"}
        await self._journal.obey(Revoke(right_to_claim(instance_id), self._clock() + LONGEST_LIFE))
        await self._journal.obey(Note(EventKind.DRAIN_INSTANCE, actor, detail))
        return found

    async def is_drained(self, instance_id: str) -> bool:
        """Whether somebody had it start no more tasks."""
        return await self._backend.is_revoked(right_to_claim(instance_id))

    async def edit_queue(
        self, name: str, changes: Mapping[str, int | None], actor: str | None = None, note: str | None = None
    ) -> QueueState:
        """Sets `concurrency` and `max_size` (None: unlimited), at once and for all instances; what is absent stays.

        Raises QueueNotFound, and ValueError for a limit below 1.
        """
        QueueConfig(**changes)
        return await self._change_queue(name, EventKind.UPDATE_QUEUE, changes, actor, note)

    async def pause_queue(self, name: str, actor: str | None = None, reason: str | None = None) -> QueueState:
        """Starts nothing more of it; what runs goes on. Raises QueueNotFound."""
        why = None if reason is None else readable(reason)
        return await self._change_queue(name, EventKind.PAUSE_QUEUE, {"paused": True, "reason": why}, actor, why)

    async def resume_queue(self, name: str, actor: str | None = None) -> QueueState:
        """Raises QueueNotFound."""
        return await self._change_queue(name, EventKind.RESUME_QUEUE, {"paused": False, "reason": None}, actor, None)

    async def _change_queue(
        self,
        name: str,
        kind: EventKind,
        changes: Mapping[str, int | bool | str | None],
        actor: str | None,
        note: str | None,
    ) -> QueueState:
        if name not in self._declared and name not in {state.name for state in await self.queues()}:
            raise QueueNotFound(name)
        if changes:
            await self._journal.obey(EditQueue(name, kind, changes, actor, note))
        found = (state for state in await self.queues() if state.name == name)
        return next(found, QueueState(name, None, None, False, None))

    def arguments(self, record: TaskRecord) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The stored call of a record, as plain values. Raises ValueError when it cannot be read, or is encrypted:
        what was sealed is for the task alone."""
        return codec.decode_call(record.arguments or codec.NO_ARGUMENTS)

    async def with_calls(self, one_offs: Sequence[ScheduledOnce]) -> list[ScheduledOnce]:
        """The same one-offs with what their functions will get; with nothing where that cannot be read."""
        found = await self._backend.arguments([item.task_id for item in one_offs], WHOLE)
        return [self._with_call(item, found.get(item.task_id)) for item in one_offs]

    def _with_call(self, item: ScheduledOnce, arguments: str | None) -> ScheduledOnce:
        definition = self._registry.get(item.func_name)
        try:
            text = self._cipher.open(arguments or "", Place(item.task_id, item.func_name, "arguments", item.created_at))
            args, kwargs = codec.decode_call(text) if definition is None else definition.decode(text)
        except Exception:  # noqa: BLE001 - user code: its classes may refuse what they once were
            return item
        return replace(item, args=args, kwargs=kwargs)

    def returned(self, record: TaskRecord) -> Any:
        """What the task of a record returned; None while there is nothing. Raises ValueError when it cannot be read."""
        text = self.result_text(record)
        return None if text is None else codec.decode(text)

    def result_text(self, record: TaskRecord) -> str | None:
        """What it returned, as `codec` wrote it. Raises ValueError when it cannot be read."""
        return None if record.result is None else self._cipher.open(record.result, place_of(record, "result"))


def right_to_claim(instance_id: str) -> str:
    """The name of what a drain takes from an instance. It ends before its time, as a login does."""
    return f"claims of {instance_id}"


def running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def wait_for(work: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
    """Blocks this thread until the event loop of another has done it. Raises BackendUnavailable when that ends."""
    try:
        future = asyncio.run_coroutine_threadsafe(work, loop)
    except RuntimeError:
        work.close()
        raise BackendUnavailable("the service stopped") from None
    while not wait([future], LOOP_POLL).done:
        if not loop.is_running():
            raise BackendUnavailable("the service stopped")
    if future.cancelled():
        raise BackendUnavailable("the service stopped")
    future.result()


def place_of(record: TaskRecord, column: Literal["arguments", "result"]) -> Place:
    return Place(record.task_id, record.func_name, column, record.created_at)


def known_id(task_id: object) -> str:
    """An id as it would be stored. Raises TaskNotFound for what cannot be one."""
    try:
        return key_text(task_id)
    except ValueError:
        raise TaskNotFound(readable(task_id)) from None


def words_of(where: TaskFilter) -> str:
    """A filter as the audit says it."""
    parts = {field.name: getattr(where, field.name) for field in fields(where)}
    return ", ".join(f"{name} {plain_words(value)}" for name, value in parts.items() if value not in (None, ()))


def plain_words(value: object) -> str:
    match value:
        case datetime():
            return value.isoformat(timespec="seconds")
        case tuple():
            return " ".join(map(plain_words, value))
        case _:
            return str(value)


def new_id() -> str:
    return str(uuid_utils.uuid7())


def key_id(name: str, key: str) -> str:
    return str(uuid5(KEY_NAMESPACE, f"{name.replace('%', '%25').replace(':', '%3A')}:{key}"))


def tick_id(schedule: str, tick: datetime) -> str:
    return str(uuid5(TICK_NAMESPACE, f"{schedule}:{to_micros(tick)}"))
