"""Random commands, crashes and passing time against a real backend: no state outside the diagram, nothing lost, nothing
started twice that must not be."""

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from app.taskflow import TaskStatus
from app.taskflow.backends import open_backend
from app.taskflow.backends.base import Claimed
from app.taskflow.models import RETRYABLE, TRANSITIONS, EventKind, from_micros, to_micros

from .helpers import IDLE, Bench, all_tasks, assert_counters_match_rows, make_draft, make_finish

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


class Engine(RuleBasedStateMachine):
    """Two instances share one database; `held` is what each believes it runs, even when it was rescued meanwhile."""

    ids = Bundle("ids")
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.backend = open_backend(str(Path(self.folder.name) / "tasks.db"))
        self.do(self.backend.open())
        self.benches = [Bench(self.backend, name) for name in ("one", "two")]
        self.requeue: dict[str, bool] = {}
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

    @initialize()
    def begin(self) -> None:
        self.do(assert_counters_match_rows(self.backend, self.benches[0].now))

    @rule(
        target=ids,
        place=st.integers(0, 1),
        count=st.integers(1, 4),
        requeue=st.sampled_from([True, True, False]),
        delay=st.sampled_from([0, 0, 3]),
        priority=st.sampled_from([None, 0, 5]),
    )
    def accept(self, place: int, count: int, requeue: bool, delay: int, priority: int | None) -> Any:
        bench = self.bench(place)
        run_at = from_micros(to_micros(bench.now) + delay * 1_000_000)
        drafts = [
            make_draft(at=bench.now, run_at=run_at, requeue=requeue, priority=priority, max_attempts=3)
            for _ in range(count)
        ]
        self.do(bench.accept(*drafts))
        self.requeue |= {draft.task_id: requeue for draft in drafts}
        return multiple(*(draft.task_id for draft in drafts))

    @rule(task_id=ids, place=st.integers(0, 1))
    def accept_again(self, task_id: str, place: int) -> None:
        bench = self.bench(place)
        result = self.do(bench.accept(make_draft(task_id=task_id, at=bench.now)))
        assert result.existing == {task_id}

    @rule(target=attempts, place=st.integers(0, 1), slots=st.integers(1, 5))
    def claim(self, place: int, slots: int) -> Any:
        bench = self.bench(place)
        claimed = self.do(bench.claim(slots))
        assert len(claimed) <= slots
        for task in claimed:
            assert task.task_id not in self.owner, "started while it runs elsewhere"
            self.owner[task.task_id] = (task.attempt, bench.instance)
        return multiple(*((task, place) for task in claimed))

    @rule(held=consumes(attempts), status=st.sampled_from(ENDS), wait=st.sampled_from([0, 2]))
    def finish(self, held: tuple[Claimed, int], status: TaskStatus, wait: int) -> None:
        task, place = held
        bench = self.bench(place)
        run_at = from_micros(to_micros(bench.now) + wait * 1_000_000) if status is TaskStatus.PENDING else None
        result = self.do(bench.turn(finishes=[make_finish(task, status, bench.now, run_at=run_at)]))
        mine = self.owner.get(task.task_id) == (task.attempt, bench.instance)
        assert (task.task_id in result.refused) is not mine
        if not mine:
            return
        del self.owner[task.task_id]
        expected = status
        if task.task_id in self.cancelling and status is TaskStatus.PENDING:
            expected = TaskStatus.CANCELLED
        self.cancelling.discard(task.task_id)
        assert self.do(bench.status(task.task_id)) is expected

    @rule(task_id=ids, place=st.integers(0, 1))
    def cancel(self, task_id: str, place: int) -> None:
        bench = self.bench(place)
        before = self.do(bench.status(task_id))
        answer = self.do(bench.cancel(task_id))
        assert answer.before is before
        after = self.do(bench.status(task_id))
        if before is TaskStatus.RUNNING:
            self.cancelling.add(task_id)
            assert after is before
        else:
            assert after is (TaskStatus.CANCELLED if before is TaskStatus.PENDING else before)

    @rule(task_id=ids, place=st.integers(0, 1))
    def requeue_by_operator(self, task_id: str, place: int) -> None:
        bench = self.bench(place)
        before = self.do(bench.status(task_id))
        answer = self.do(bench.requeue(task_id, max_attempts=3))
        assert bool(answer.changed) is (before in RETRYABLE)
        assert self.do(bench.status(task_id)) is (TaskStatus.PENDING if answer.changed else before)

    @rule(dead=st.integers(0, 1), place=st.integers(0, 1))
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
        bench = self.bench(0)
        bench.pass_time(seconds)

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
TestEngine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
