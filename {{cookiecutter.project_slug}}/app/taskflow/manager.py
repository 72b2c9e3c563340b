"""`TaskManager`: what a team writes against, and the place where the parts are put together.

Owns the decorators and the lifecycle. It holds no logic of its own: it builds the graph (backend, journal, runner,
dispatcher, store), starts it in order and stops it in reverse.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from importlib import import_module
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast, overload

import uuid_utils
from fastapi import FastAPI
from sqlalchemy.orm import Session

from .backends import Backend, open_backend
from .backends.base import Turn
from .background import request_dependency
from .bulk import BulkRuns
from .cipher import make_cipher
from .clock import Clock
from .cluster import ClusterExecutor
from .context import CarriedContexts
from .dependencies import Injector
from .deploys import BEGAN, code_version
from .dispatcher import Delivery, Dispatcher
from .errors import TaskDefinitionError, TaskflowError
from .executors import AsyncExecutor, Executor, ThreadExecutor
from .history import Book
from .host import install_error_handlers, join_lifespan
from .housekeeping import Housekeeping, introduce
from .journal import Journal
from .loggers import FileLogger
from .models import (
    DEFAULT_QUEUE,
    LEASE_SECONDS,
    MOST_DAYS,
    ExecutorKind,
    QueueConfig,
    RetryOn,
    ScheduledOnce,
    TaskConfig,
    TaskOptions,
    is_finite,
    is_whole,
    require,
)
from .observers import ObserverChain
from .options import AddOptions
from .processes import ProcessExecutor, refuse_in_starting_worker
from .recorder import Recorder
from .registry import TaskRegistry
from .runner import Runner
from .scheduler import PeriodicScheduler
from .schedules import Plan, Schedules
from .store import TaskStore
from .telemetry import Meters
from .texts import name_text
from .ticks import Misfire, checked_misfire, make_trigger
from .transactions import enlist

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger("taskflow")

F = TypeVar("F", bound=Callable[..., Any])

STANDSTILL = 10.0
"""Seconds without a committed turn after which this process is not ready. An idle one makes a turn every second."""
START_TIMEOUT = 2.0
"""Seconds that a starting service waits for its database before it serves without it, not ready."""
LAST_WRITES = 1.5
"""Seconds that a stopping service has, beyond its drain, to write what its tasks returned."""


class TaskManager:
    """The task system of one application.

    `snapshot_db` is a file path or the URL of any backend; `snapshot_backend` an opened backend; without either, tasks
    live in memory through the same code. `shutdown_timeout` is how many seconds a clean stop waits for running tasks.
    `cluster` is the address of a Dask scheduler, on which `executor="process"` runs.
    """

    def __init__(
        self,
        *,
        snapshot_db: str | None = None,
        snapshot_backend: Backend | None = None,
        snapshot_interval: float = 60.0,
        requeue_pending: bool = True,
        loggers: Iterable[object] | None = None,
        log_file: str | None = None,
        log_file_max_bytes: int = 10 * 1024 * 1024,
        log_file_backup_count: int = 5,
        log_file_mode: str = "rotate",
        log_lifecycle: bool = False,
        encrypt_args_key: str | bytes | list[str | bytes] | None = None,
        encrypted_since: datetime | None = None,
        max_concurrent_tasks: int | None = None,
        max_sync_threads: int | None = None,
        max_process_workers: int | None = None,
        process_shutdown_timeout: float = 30.0,
        shutdown_timeout: float = 30.0,
        retention_days: float | None = None,
        queues: Mapping[str, QueueConfig] | None = None,
        max_size: int | None = None,
        retry_replaces_original: bool = True,
        cluster: str | None = None,
    ) -> None:
        for option, limit in (
            ("max_concurrent_tasks", max_concurrent_tasks),
            ("max_sync_threads", max_sync_threads),
            ("max_process_workers", max_process_workers),
        ):
            require(limit is None or (is_whole(limit) and limit >= 1), option, limit, "None or 1 and more")
        for option, seconds in (
            ("shutdown_timeout", shutdown_timeout),
            ("process_shutdown_timeout", process_shutdown_timeout),
            ("snapshot_interval", snapshot_interval),
        ):
            require(is_finite(seconds) and seconds >= 0, option, seconds, "a finite number, 0 or more")
        require(
            retention_days is None or (is_finite(retention_days) and 0 <= retention_days <= MOST_DAYS),
            "retention_days",
            retention_days,
            f"None or a number from 0 to {MOST_DAYS:,}",
        )
        for option, flag in (
            ("log_lifecycle", log_lifecycle),
            ("requeue_pending", requeue_pending),
            ("retry_replaces_original", retry_replaces_original),
        ):
            require(isinstance(flag, bool), option, flag, "True or False")
        require(loggers is None or isinstance(loggers, Iterable), "loggers", loggers, "a list of observers")
        self.snapshot_interval = snapshot_interval
        self.shutdown_timeout = shutdown_timeout
        self.registry = TaskRegistry()
        self.backend = snapshot_backend or open_backend(snapshot_db)
        self._in_memory = snapshot_backend is None and snapshot_db is None
        self.instance_id = ""
        """Who this process is to the others. Given by `startup`, anew each time: processes fork after they imported."""
        self.clock = clock = Clock(lambda: self.backend.clock_offset)
        executors: dict[str, Executor] = {
            "async": AsyncExecutor(max_concurrent_tasks),
            "thread": ThreadExecutor(max_sync_threads),
            "process": (
                ClusterExecutor(cluster, max_process_workers)
                if cluster
                else ProcessExecutor(max_process_workers, process_shutdown_timeout)
            ),
        }
        self.journal = Journal(self.backend, clock=clock)
        cipher = make_cipher(encrypt_args_key, encrypted_since)
        self.carried = carried = CarriedContexts()
        self.queues = declared_queues(queues, max_size)
        self.injector = Injector()
        self.runner = Runner(self.registry, executors, self.journal, clock, cipher, self.injector)
        self.dispatcher = Dispatcher(self.registry, executors, self.runner, self.journal, carried)
        self.journal.attach(self.dispatcher)
        self.store = TaskStore(
            self.registry,
            self.backend,
            self.journal,
            carried,
            clock=clock,
            cipher=cipher,
            queues=self.queues,
            retry_replaces_original=retry_replaces_original,
        )
        self.bulk = BulkRuns(self.store)
        self.book = Book()
        self.journal.listeners.append(self.book.turned)
        self.meters = Meters(self.journal.listeners, lambda: self.book.levels)
        self.recorder = Recorder(self.book, self.store, self.journal, clock=clock, sample_every=snapshot_interval)
        self.schedules = Schedules(self.registry, self.backend, self.journal, self.store, clock=clock)
        self.scheduler = PeriodicScheduler(self.schedules, self.journal, clock=clock)
        observers = list(loggers or ())
        if log_file is not None:
            observers.append(
                FileLogger(
                    log_file,
                    max_bytes=log_file_max_bytes,
                    backup_count=log_file_backup_count,
                    mode=log_file_mode,
                    log_lifecycle=log_lifecycle,
                )
            )
        self.observers = ObserverChain(observers)
        if self.observers:
            self.journal.listeners.append(self.observers.turned)
            self.journal.log_listeners.append(self.observers.logged)
        self.lease_seconds = LEASE_SECONDS
        self.retention_days = retention_days
        self.requeue_pending = requeue_pending
        self.runs_tasks = True
        """False in a process that only accepts: its tasks are run by others."""
        self.version = ""
        """What this process runs, as a release is named; without, a checksum of the application's code."""
        self.get_tasks = request_dependency(self.store)
        self._housekeeping: Housekeeping | None = None

    @property
    def backend_name(self) -> str:
        """Where tasks are stored, without its password."""
        return self.backend.name

    # -- decorators

    @overload
    def task(self, function: F, /) -> F: ...

    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        retries: int = 0,
        delay: float = 0.0,
        backoff: float = 1.0,
        max_delay: float | None = None,
        jitter: bool = False,
        retry_on: RetryOn | type[BaseException] | None = None,
        timeout: float | None = None,
        queue: str | None = None,
        priority: int | None = None,
        executor: ExecutorKind | None = None,
        eager: bool = False,
        persist: bool = True,
        requeue_on_interrupt: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> Callable[[F], F]: ...

    def task(
        self,
        function: F | None = None,
        /,
        *,
        name: str | None = None,
        retries: int = 0,
        delay: float = 0.0,
        backoff: float = 1.0,
        max_delay: float | None = None,
        jitter: bool = False,
        retry_on: RetryOn | type[BaseException] | None = None,
        timeout: float | None = None,
        queue: str | None = None,
        priority: int | None = None,
        executor: ExecutorKind | None = None,
        eager: bool = False,
        persist: bool = True,
        requeue_on_interrupt: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> F | Callable[[F], F]:
        """Makes a function a task and returns it unchanged. See `TaskConfig` for what the options mean.

        Raises TaskDefinitionError where an option cannot be.
        """
        config = task_config(
            name=name,
            retries=retries,
            delay=delay,
            backoff=backoff,
            max_delay=max_delay,
            jitter=jitter,
            retry_on=retry_on,
            timeout=timeout,
            queue=queue,
            priority=priority,
            executor=executor,
            eager=eager,
            persist=persist,
            requeue_on_interrupt=requeue_on_interrupt,
            tags=tags,
        )

        def register(function: F) -> F:
            self.registry.add(function, config)
            return function

        return register if function is None else register(function)

    def schedule(
        self,
        *,
        every: float | timedelta | None = None,
        cron: str | None = None,
        timezone: str = "UTC",
        run_on_startup: bool = False,
        overlap: bool = True,
        misfire: Misfire = "once",
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[TaskOptions],
    ) -> Callable[[F], F]:
        """Runs a function every so many seconds, or when a cron expression says so in a time zone.

        The function is a task, too: `options` are those of `task`; without any, a function that is a task keeps its
        own. `overlap=False` skips a tick while one of its tasks waits or runs. `misfire` says what becomes of ticks
        that were missed: "skip", "once" makes up for the newest, "all" for the newest hundred.

        Raises TaskDefinitionError where the schedule or an option cannot be, TaskArgumentError where the
        arguments do not fit the function.
        """
        trigger = make_trigger(every, cron, timezone)
        plan = Plan(trigger, timezone, overlap, checked_misfire(misfire), run_on_startup, args, kwargs)
        name = options.get("name")
        config = task_config(**options) if options.keys() - {"name"} else None

        def register(function: F) -> F:
            self.schedules.add(function, plan, config, name)
            return function

        return register

    # -- outside a request

    async def enqueue(
        self,
        func: Callable[..., Any],
        *args: Any,
        idempotency_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        priority: int | None = None,
        queue: str | None = None,
        delay_seconds: float | None = None,
        run_at: datetime | None = None,
        session: Session | AsyncSession | None = None,
        **kwargs: Any,
    ) -> str:
        """Stores a task and returns its id once it is durable; with `session`, once it is part of that session's
        transaction, which then commits or rolls back both.

        Raises TaskArgumentError, QueueFullError or BackendUnavailable; then nothing will run.
        """
        options = AddOptions(idempotency_key, tags, priority, queue, delay_seconds, run_at)
        draft = self.store.draft(func, args, kwargs, options, durable=session is not None)
        if session is None:
            await self.store.accept([draft])
        else:
            turn = Turn(now=self.clock(), instance=self.instance_id, drafts=[draft])
            await enlist(self.backend, session, turn, committed=self.journal.wake)
        return draft.task_id

    def enqueue_sync(
        self,
        func: Callable[..., Any],
        *args: Any,
        idempotency_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        priority: int | None = None,
        queue: str | None = None,
        delay_seconds: float | None = None,
        run_at: datetime | None = None,
        **kwargs: Any,
    ) -> str:
        """`enqueue` for plain code: a plain task, a thread, a script that has started nothing. Blocks until the task is
        durable.

        Raises what `enqueue` raises, and TaskflowError on the event loop that it would block.
        """
        if self._in_memory and self.journal.event_loop is None:
            raise TaskflowError("tasks in memory last as long as the task manager is started, and it is not")
        options = AddOptions(idempotency_key, tags, priority, queue, delay_seconds, run_at)
        draft = self.store.draft(func, args, kwargs, options, durable=self.journal.event_loop is None)
        self.store.accept_from_thread([draft])
        return draft.task_id

    async def schedule_once(
        self,
        func: Callable[..., Any],
        *args: Any,
        run_at: datetime,
        run_key: str,
        idempotency_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        priority: int | None = None,
        queue: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Stores a task for one moment and returns its id. It replaces whatever waits under the same `run_key`, on any
        instance: that is how a deadline is moved.

        Raises TaskArgumentError, QueueFullError or BackendUnavailable, and TaskflowError for a time without zone.
        """
        options = AddOptions(idempotency_key, tags, priority, queue, None, run_at)
        return await self.schedules.once(func, args, kwargs, run_key, options)

    async def cancel_scheduled(self, run_key: str) -> bool:
        """Whether a one-off waited under that key; it will not run."""
        return await self.schedules.cancel_once(run_key)

    async def list_scheduled(self, before: datetime | None = None) -> list[ScheduledOnce]:
        """The one-offs that wait, soonest first; those due before a time, where it is given."""
        return await self.schedules.all_one_offs(before)

    async def result(self, task_id: str, timeout: float | None = None) -> Any:
        """What the task returned, once it has. Raises TaskFailed, TimeoutError, TaskNotFound."""
        return await self.store.result(task_id, timeout)

    # -- lifecycle

    def init_app(self, app: FastAPI) -> None:
        """Runs with this app's lifespan, after its own start-up and until before its own shutdown. Adds no routes."""
        self.injector.app = app
        join_lifespan(app, self.lifespan)
        install_error_handlers(app)

    def deliver_by(self, delivery: Delivery | str | None) -> None:
        """Tasks are announced to an engine that runs a fleet of workers, and this process takes those only that it is
        handed. Given a broker's URL, by the engine that the project was made with; None: by nobody.

        Raises TaskDefinitionError where it was made with none.
        """
        if isinstance(delivery, str):
            try:
                module = import_module(".delivery", __package__)
            except ModuleNotFoundError as error:
                raise TaskDefinitionError("TASKFLOW_DELIVERY: this project was made without a delivery") from error
            delivery = cast("Delivery", module.CeleryDelivery(self, delivery))
        self.dispatcher.delivery = delivery

    @asynccontextmanager
    async def lifespan(self, _app: Any = None) -> AsyncIterator[None]:
        await self.startup()
        try:
            yield
        finally:
            await self.shutdown()

    async def startup(self) -> None:
        """Waits a moment for the database; one that is away does not keep the app from starting.

        Raises TaskflowError in a process that was forked from one which serves.
        """
        if self._housekeeping is not None:
            self._housekeeping.refuse_in_fork()
            return
        refuse_in_starting_worker()
        self.instance_id = str(uuid_utils.uuid7())
        me = introduce(self.instance_id, self.version or code_version(), self.clock())
        self._housekeeping = Housekeeping(
            self.backend,
            self.journal,
            self.dispatcher,
            me,
            clock=self.clock,
            store=self.store,
            queues=self.queues,
            runs_tasks=self.runs_tasks,
            requeue_pending=self.requeue_pending,
            retention_days=self.retention_days,
            lease_seconds=self.lease_seconds,
            lost=self.book.lost,
        )
        self.carried.used = self.runs_tasks
        self.observers.start()
        self.meters.start()
        self.journal.start(self.instance_id)
        self._housekeeping.start()
        self.book.began(self.clock(), me.version, BEGAN)
        self.recorder.start()
        if self.dispatcher.delivery is not None:
            self.dispatcher.delivery.start()
        self.scheduler.start(self._housekeeping.introduced, fires=self.runs_tasks)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT):
                await self.scheduler.declared.wait()

    @property
    def rescued(self) -> int:
        """Tasks of lost instances that this process rescued since it started."""
        return self._housekeeping.rescued if self._housekeeping is not None else 0

    def unready(self) -> str | None:
        """Why this process should get no traffic now; None when it should."""
        if self._housekeeping is None:
            return "the service is not started, or stopping"
        if self.journal.last_error is not None:
            return f"the task backend is away: {self.journal.last_error}"
        if self.journal.last_turn is None or monotonic() - self.journal.last_turn > STANDSTILL:
            return "the writer stands still"
        if self.runs_tasks and self.dispatcher.retired:
            return "this instance drains: it starts no more tasks"
        if self.runs_tasks and not self.dispatcher.claiming:
            return "this instance does not claim tasks yet"
        return None

    async def shutdown(self) -> None:
        """Takes no more tasks, waits for running ones up to `shutdown_timeout`, writes everything, lets go."""
        if self._housekeeping is None:
            return
        housekeeping, self._housekeeping = self._housekeeping, None
        deadline = monotonic() + self.shutdown_timeout
        self.dispatcher.retire()
        await self.bulk.stop_all()
        await self.scheduler.stop()
        await housekeeping.stop()
        await self.journal.turned(deadline)
        await self.dispatcher.drain(deadline)
        last = deadline + LAST_WRITES
        await self.recorder.stop()
        await self.journal.flush(last)
        if self.dispatcher.delivery is not None:
            await self.dispatcher.delivery.stop()
        await housekeeping.sign_off(last)
        await self.journal.stop(last)
        self.meters.stop()
        await self.observers.stop(last)
        await self.dispatcher.wait_closed(last)


def task_config(**options: Unpack[TaskOptions]) -> TaskConfig:
    """The settings of a task as its decorator gives them. Raises TaskDefinitionError where one cannot be."""
    given: dict[str, Any] = {**options, "tags": options.get("tags") or {}}
    if isinstance(retry_on := options.get("retry_on"), type):
        given["retry_on"] = (retry_on,)
    return TaskConfig(**given)


def declared_queues(queues: Mapping[str, QueueConfig] | None, max_size: int | None) -> dict[str, QueueConfig]:
    """Named queues, and the default one where `max_size` limits it. Raises TaskDefinitionError."""
    require(queues is None or isinstance(queues, Mapping), "queues", queues, "a dict of names and QueueConfigs")
    declared = dict(queues or {})
    for name, queue in declared.items():
        try:
            name_text(name)
        except ValueError as error:
            raise TaskDefinitionError(f"queues: the name {name!r:.80} {error}") from error
        require(isinstance(queue, QueueConfig), f"queues[{name!r}]", queue, "a QueueConfig under a name")
    if max_size is not None:
        declared.setdefault(DEFAULT_QUEUE, QueueConfig(max_size=max_size))
    return declared
