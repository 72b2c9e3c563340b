"""Random commands, crashes and passing time against a real backend: no state outside the diagram, nothing lost, nothing
started twice that must not be."""

import asyncio
import tempfile
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.taskflow import TaskStatus
from app.taskflow.backends import open_backend
from app.taskflow.backends.base import Claimed, Demand, DismissTasks, RequeueTasks, RestoreTasks
from app.taskflow.models import RETRYABLE, TRANSITIONS, EventKind

from .helpers import IDLE, Bench, all_tasks, assert_counters_match_rows, make_draft

T = TypeVar("T")

ENDS = [TaskStatus.SUCCESS, TaskStatus.FAILED, TaskStatus.CANCELLED, TaskStatus.INTERRUPTED, TaskStatus.PENDING]
LEADS_TO = {
    EventKind.ACCEPTED: TaskStatus.PENDING,
    EventKind.STARTED: TaskStatus.RUNNING,
    EventKind.SUCCEEDED: TaskStatus.SUCCESS,
    EventKind.RETRYING: TaskStatus.PENDING,
    EventKind.FAILED: TaskStatus.FAILED,
    EventKind.CANCELLED: TaskStatus.CANCELLED,
    EventKind.INTERRUPTED: TaskStatus.INTERRUPTED,
    EventKind.RESCUED: TaskStatus.PENDING,
    EventKind.REQUEUED: TaskStatus.PENDING,
}
"""Event -> the status it leaves its task in. The others leave it as it was."""


PLACES = st.integers(0, 1)
PICKS = st.integers(0, 7)


class Engine(RuleBasedStateMachine):
    """Two instances share one database. `attempts` is what they were ever given to run, and may still bring back an end
    for, whatever has become of it meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.backend = open_backend(str(Path(self.folder.name) / "tasks.db"))
        self.do(self.backend.open())
        self.benches = [Bench(self.backend, name) for name in ("one", "two")]
        self.requeue: dict[str, bool] = {}
        self.attempts: list[tuple[Claimed, int]] = []
        self.owner: dict[str, tuple[int, str]] = {}
        """Task -> (attempt, instance) that the model thinks holds it."""
        self.cancelling: set[str] = set()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.do(self.backend.close())
        self.loop.close()
        self.folder.cleanup()

    def bench(self, place: int) -> Bench:
        bench = self.benches[place]
        bench.now = max(other.now for other in self.benches)
        return bench

    def pick(self, number: int) -> str:
        """A task; low numbers are the newest of those that run."""
        ids = [*reversed(self.owner), *reversed(self.requeue)]
        return ids[number % len(ids)]

    def started(self, claimed: Sequence[Claimed], place: int) -> None:
        for task in claimed:
            assert task.task_id not in self.owner, "started while it runs elsewhere"
            self.owner[task.task_id] = (task.attempt, self.benches[place].instance)
            self.attempts.append((task, place))

    @rule(
        place=PLACES,
        count=st.integers(1, 3),
        requeue=st.sampled_from([True, True, False]),
        delay=st.sampled_from([0, 0, 3]),
        priority=st.sampled_from([None, 5]),
        slots=st.sampled_from([0, 2]),
    )
    def accept(self, place: int, count: int, requeue: bool, delay: int, priority: int | None, slots: int) -> None:
        bench = self.bench(place)
        run_at = bench.now + timedelta(seconds=delay)
        drafts = [
            make_draft(at=bench.now, run_at=run_at, requeue=requeue, priority=priority, max_attempts=3)
            for _ in range(count)
        ]
        self.requeue |= {draft.task_id: requeue for draft in drafts}
        demand = Demand({"job": "thread"}, {"thread": slots}) if slots else None
        self.started(self.do(bench.turn(drafts=drafts, demand=demand)).claimed, place)

    @precondition(lambda self: self.requeue)
    @rule(number=PICKS, place=PLACES)
    def accept_again(self, number: int, place: int) -> None:
        bench = self.bench(place)
        task_id = self.pick(number)
        demand = Demand({"job": "thread"}, {"thread": 1})
        result = self.do(bench.turn(drafts=[make_draft(task_id=task_id, at=bench.now)], demand=demand))
        assert result.existing == {task_id}
        self.started(result.claimed, place)

    @precondition(lambda self: self.requeue)
    @rule(place=PLACES, slots=st.integers(1, 4))
    def claim(self, place: int, slots: int) -> None:
        claimed = self.do(self.bench(place).claim(slots))
        assert len(claimed) <= slots
        self.started(claimed, place)

    def holds(self, task: Claimed, place: int) -> bool:
        return self.owner.get(task.task_id) == (task.attempt, self.benches[place].instance)

    @precondition(lambda self: self.owner)
    @rule(number=PICKS, status=st.sampled_from([*ENDS, TaskStatus.PENDING]), wait=st.sampled_from([0, 2]))
    def finish(self, number: int, status: TaskStatus, wait: int) -> None:
        held = [(task, place) for task, place in self.attempts if self.holds(task, place)]
        task, place = held[number % len(held)]
        bench = self.bench(place)
        run_at = bench.now + timedelta(seconds=wait) if status is TaskStatus.PENDING else None
        assert self.do(bench.finish(task, status, run_at=run_at))
        del self.owner[task.task_id]
        withdrawn = task.task_id in self.cancelling and status is TaskStatus.PENDING
        self.cancelling.discard(task.task_id)
        assert self.do(bench.status(task.task_id)) is (TaskStatus.CANCELLED if withdrawn else status)

    @precondition(lambda self: len(self.attempts) > len(self.owner))
    @rule(number=PICKS, status=st.sampled_from(ENDS))
    def come_back_late(self, number: int, status: TaskStatus) -> None:
        lost = [(task, place) for task, place in reversed(self.attempts) if not self.holds(task, place)]
        task, place = lost[number % len(lost)]
        bench = self.bench(place)
        before = self.do(bench.get(task.task_id))
        run_at = bench.now if status is TaskStatus.PENDING else None
        assert not self.do(bench.finish(task, status, run_at=run_at))
        assert self.do(bench.get(task.task_id)) == before

    @precondition(lambda self: self.requeue)
    @rule(number=PICKS, place=PLACES)
    def cancel(self, number: int, place: int) -> None:
        bench = self.bench(place)
        task_id = self.pick(number)
        before = self.do(bench.status(task_id))
        answer = self.do(bench.cancel(task_id))
        assert answer.before is before
        after = self.do(bench.status(task_id))
        if before is TaskStatus.RUNNING:
            self.cancelling.add(task_id)
            assert after is before
        else:
            assert after is (TaskStatus.CANCELLED if before is TaskStatus.PENDING else before)

    @precondition(lambda self: len(self.requeue) > len(self.owner))
    @rule(number=PICKS, place=PLACES)
    def requeue_by_operator(self, number: int, place: int) -> None:
        bench = self.bench(place)
        task_id = self.pick(len(self.owner) + number)
        before = self.do(bench.status(task_id))
        answer = self.do(bench.requeue(task_id, max_attempts=3))
        assert bool(answer.changed) is (before in RETRYABLE)
        assert self.do(bench.status(task_id)) is (TaskStatus.PENDING if answer.changed else before)

    @precondition(lambda self: self.requeue)
    @rule(numbers=st.lists(PICKS, min_size=1, max_size=4), place=PLACES, back=st.booleans())
    def dismiss(self, numbers: list[int], place: int, back: bool) -> None:
        bench = self.bench(place)
        ids = [self.pick(number) for number in numbers]
        before = {task_id: self.do(bench.get(task_id)) for task_id in ids}
        command = RestoreTasks(ids, "ada") if back else DismissTasks(ids, "seen", "ada")
        answer = self.do(bench.obey(command))
        can = {key for key, task in before.items() if task.status is TaskStatus.FAILED and task.dismissed is back}
        assert set(answer.ids) == can
        for task_id, task in before.items():
            assert self.do(bench.get(task_id)).dismissed is (task.dismissed if task_id not in can else not back)

    @precondition(lambda self: len(self.requeue) > len(self.owner))
    @rule(numbers=st.lists(PICKS, min_size=1, max_size=4), place=PLACES)
    def requeue_many(self, numbers: list[int], place: int) -> None:
        bench = self.bench(place)
        ids = [self.pick(len(self.owner) + number) for number in numbers]
        before = {task_id: self.do(bench.status(task_id)) for task_id in ids}
        answer = self.do(bench.obey(RequeueTasks(ids, {"job": 3})))
        assert set(answer.ids) == {task_id for task_id, status in before.items() if status in RETRYABLE}

    @precondition(lambda self: self.owner)
    @rule(dead=PLACES, place=PLACES)
    def instance_dies(self, dead: int, place: int) -> None:
        """It may be only slow: what it still brings back later must be refused."""
        bench, lost = self.bench(place), self.benches[dead].instance
        mine = {task_id for task_id, (_, owner) in self.owner.items() if owner == lost}
        assert self.do(bench.rescue(lost)).changed == len(mine)
        for task_id in mine:
            status = self.do(bench.status(task_id))
            if task_id in self.cancelling:
                assert status is TaskStatus.CANCELLED
            elif self.requeue[task_id]:
                assert status in (TaskStatus.PENDING, TaskStatus.FAILED)
            else:
                assert status is TaskStatus.INTERRUPTED
            self.cancelling.discard(task_id)
            del self.owner[task_id]

    @rule(seconds=st.sampled_from([0.001, 1, 5]))
    def time_passes(self, seconds: float) -> None:
        self.bench(0).pass_time(seconds)

    @invariant()
    def nothing_is_lost_and_the_counters_are_right(self) -> None:
        bench = self.bench(0)
        self.do(bench.turn(demand=IDLE))  # what is due is made ready by whoever could start something
        records = self.do(all_tasks(self.backend, limit=500))
        assert {record.task_id for record in records} == self.requeue.keys()
        running = {r.task_id: (r.attempt, r.instance) for r in records if r.status is TaskStatus.RUNNING}
        assert running == self.owner
        self.do(assert_counters_match_rows(self.backend, bench.now))

    @invariant()
    def every_history_is_a_path_through_the_diagram(self) -> None:
        status: dict[str, TaskStatus] = {}
        starts: dict[str, int] = {}
        for event in self.do(self.backend.events_after(0, 100_000)):
            after = LEADS_TO.get(EventKind(event.kind))
            if after is None:
                continue
            before = status.get(event.task_id)
            assert after in TRANSITIONS[before], (event, before)
            status[event.task_id] = after
            if after is TaskStatus.RUNNING:
                assert event.attempt == starts.get(event.task_id, 0)
                starts[event.task_id] = event.attempt + 1
            if event.kind == EventKind.RESCUED:
                assert self.requeue[event.task_id]


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
