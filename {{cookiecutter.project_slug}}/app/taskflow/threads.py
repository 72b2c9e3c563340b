"""A crew of threads that runs jobs for one event loop.

Owns the threads: started when they are needed, never more than the crew may have, parked while there is nothing to do.
The thread executor brings the jobs and takes them back, both on the event loop. The invariant: while jobs wait, one
thread that has none is on its way to them, and it calls the next one before it begins. So a hundred short jobs are done
by a few threads that are awake anyway, and a hundred that wait for somebody else's server have a thread each.

Not `concurrent.futures`: its threads are joined at the interpreter's exit, so one job that hangs would keep the process
from ever ending, and it wakes a thread for every job.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("taskflow")


@dataclass(slots=True, eq=False)
class Job:
    """One call on its way through a thread."""

    function: Callable[[], Any]
    context: Context
    deliver: Callable[[Job], None]
    """Called on the event loop when the job has ended; must not raise."""
    crew: Crew
    running: bool = False
    abandoned: bool = False
    """Nobody waits for it: the result is dropped, and a function that has not begun never does."""
    result: Any = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.context.run(self.function)
        except BaseException as error:  # noqa: BLE001 - user code: SystemExit in a thread is that task's failure
            self.error = error


class Crew:
    def __init__(self, loop: asyncio.AbstractEventLoop, most: int) -> None:
        self.loop = loop
        self._most = most
        self._lock = threading.Lock()
        """Held for every change of what follows, and for nothing that takes long."""
        self._waiting: deque[Job] = deque()
        self._ended: list[Job] = []
        self._told = False
        """Whether the event loop is about to collect what has ended."""
        self._threads = 0
        self._busy = 0
        """Threads that have a job."""
        self._parked: list[threading.Lock] = []
        """A lock for each thread that waits for it to be released; the last to come is the first to go."""
        self._dismissed = False

    # -- on the event loop

    def take(self, function: Callable[[], Any], context: Context, deliver: Callable[[Job], None]) -> Job:
        job = Job(function, context, deliver, self)
        with self._lock:
            self._waiting.append(job)
            self._summon()
        return job

    def abandon(self, job: Job) -> None:
        """Drops what the job still brings. The thread that hangs in it is none of the crew any more."""
        with self._lock:
            job.abandoned = True
            if job.running:
                self._threads -= 1
                self._busy -= 1
                self._summon()

    def dismiss(self) -> None:
        """Every thread ends once it has no job."""
        with self._lock:
            self._dismissed = True
            while self._parked:
                self._parked.pop().release()

    def _deliver(self) -> None:
        with self._lock:
            ended, self._ended, self._told = self._ended, [], False
        for job in ended:
            if not job.abandoned:
                job.deliver(job)

    # -- in the threads

    def _work(self) -> None:
        place = threading.Lock()
        place.acquire()
        while (job := self._next(place)) is not None:
            job.run()
            if not self._end(job):
                return
            del job  # a parked thread must not keep the last result alive

    def _next(self, place: threading.Lock) -> Job | None:
        """A job, as soon as there is one; None when there will be no more."""
        while True:
            with self._lock:
                if self._dismissed:
                    return None
                if self._waiting:
                    job = self._waiting.popleft()
                    if job.abandoned:
                        continue
                    job.running = True
                    self._busy += 1
                    self._summon()
                    return job
                self._parked.append(place)
            place.acquire()

    def _end(self, job: Job) -> bool:
        """Whether the thread still belongs to the crew."""
        with self._lock:
            if job.abandoned:
                return False
            job.running = False
            self._busy -= 1
            self._ended.append(job)
            if self._told:  # one wake-up of the event loop collects all that ended meanwhile
                return True
            self._told = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the event loop is closed: nobody waits for results any more
            return False
        return True

    # -- with the lock held

    def _summon(self) -> None:
        """Calls a thread, unless one is on its way."""
        on_the_way = self._threads - self._busy - len(self._parked)
        if not self._waiting or on_the_way:
            return
        if self._parked:
            self._parked.pop().release()
        elif self._threads < self._most:
            self._threads += 1
            name = f"taskflow-thread-{self._threads}"
            try:
                threading.Thread(target=self._work, name=name, daemon=True).start()
            except RuntimeError as error:  # the system has no thread to give: those that are there do the work
                self._threads -= 1
                logger.warning("no further thread for tasks: %s", error)
