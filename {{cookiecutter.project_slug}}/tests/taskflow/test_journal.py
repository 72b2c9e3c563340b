"""The single writer: one turn for all that waits, and a promise for each of its three classes of write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from time import monotonic
from typing import Any, cast

import pytest

from app.taskflow import BackendUnavailable, TaskStatus
from app.taskflow import journal as journal_module
from app.taskflow.backends.base import (
    Answer,
    AttemptId,
    Backend,
    Cancel,
    Claimed,
    Demand,
    Draft,
    Finish,
    Turn,
    TurnResult,
)
from app.taskflow.journal import MOST_WAITING, Journal

from .helpers import PATIENCE, START, eventually, make_context, make_draft, make_finish, next_id

pytestmark = pytest.mark.anyio


class FakeBackend:
    """Keeps the turns that were committed. `gate` holds a turn up, `refuse` makes it fail."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.tries = 0
        self.refused = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuse: Callable[[Turn], Exception | None] = lambda turn: None
        self.result: Callable[[Turn], TurnResult] = lambda turn: TurnResult(
            answers=[Answer(TaskStatus.PENDING, 1) for _ in turn.commands]
        )

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def turn(self, turn: Turn) -> TurnResult:
        self.tries += 1
        await self.gate.wait()
        if (error := self.refuse(turn)) is not None:
            self.refused += 1
            raise error
        self.turns.append(turn)
        return self.result(turn)

    def listen(self, wake: Callable[[], None]) -> None: ...

    def announce(self) -> None: ...

    def go_away(self) -> None:
        self.refuse = lambda turn: BackendUnavailable("away")

    def come_back(self) -> None:
        self.refuse = lambda turn: None

    def committed(self, kind: str) -> list[Any]:
        return [item for turn in self.turns for item in getattr(turn, kind)]


class FakeWorker:
    def __init__(self) -> None:
        self.ids: set[AttemptId] = set()
        self.written: list[Finish] = []

    @property
    def running(self) -> int:
        return len(self.ids)

    def demand(self, finishes: Sequence[Finish]) -> Demand | None:
        return None

    def held(self) -> frozenset[AttemptId]:
        return frozenset(self.ids)

    def turned(self, finishes: Sequence[Finish], result: TurnResult) -> None:
        self.written += finishes


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    monkeypatch.setattr(journal_module, "pause_after", lambda failures: 0.002)
    monkeypatch.setattr("app.taskflow.loops.pause_after", lambda failures: 0.002)
    return FakeBackend()


@pytest.fixture
async def journal(backend: FakeBackend) -> AsyncIterator[Journal]:
    journal = Journal(cast(Backend, backend), clock=lambda: START)
    journal.start("me")
    await journal.ready()
    yield journal
    backend.gate.set()
    await journal.stop()


def claimed(task_id: str | None = None) -> Claimed:
    return Claimed(
        task_id=task_id or next_id(),
        name="job",
        queue="default",
        executor="thread",
        attempt=1,
        excused=0,
        max_attempts=1,
        started_at=START,
        arguments="[[],{}]",
        tags={},
        requeue=False,
        trace=None,
        created_at=START,
    )


def success(error: str | None = None) -> Finish:
    return make_finish(claimed(), TaskStatus.SUCCESS, START, error=error)


# -- one turn for all that waits


async def test_when_idle_a_change_is_committed_at_once(journal: Journal, backend: FakeBackend) -> None:
    began = monotonic()
    for _ in range(20):
        await journal.accept([make_draft()])
    assert monotonic() - began < journal_module.POLL_INTERVAL
    assert len(backend.committed("drafts")) == 20


async def test_what_arrives_while_a_turn_is_under_way_shares_the_next_one(
    journal: Journal, backend: FakeBackend
) -> None:
    backend.gate.clear()
    first = asyncio.create_task(journal.accept([make_draft()]))
    await eventually(lambda: backend.tries == 2)
    drafts = [make_draft() for _ in range(300)]
    others = [asyncio.create_task(journal.accept([draft])) for draft in drafts]
    await asyncio.sleep(0)
    assert not any(task.done() for task in (first, *others))
    backend.gate.set()
    await asyncio.gather(first, *others)
    assert list(backend.turns[-1].drafts) == drafts


async def test_what_a_busy_event_loop_brings_pass_by_pass_shares_one_turn(
    journal: Journal, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "LONGEST_GATHERING", PATIENCE)
    backend.turns.clear()

    async def request(passes: int) -> None:
        for _ in range(passes):
            await asyncio.sleep(0)
        await journal.accept([make_draft()])

    await asyncio.gather(*(request(2 * number) for number in range(30)))
    assert [len(turn.drafts) for turn in backend.turns] == [30]


async def test_a_turn_begins_in_the_end_although_every_pass_brings_more(
    journal: Journal, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "LONGEST_GATHERING", 0.001)
    requests, deadline = [], monotonic() + PATIENCE
    while not backend.committed("drafts"):
        assert monotonic() < deadline
        requests.append(asyncio.ensure_future(journal.accept([make_draft()])))
        await asyncio.sleep(0)
    await asyncio.gather(*requests)


async def test_accept_returns_after_its_commit_and_not_before(journal: Journal, backend: FakeBackend) -> None:
    backend.gate.clear()
    accepting = asyncio.create_task(journal.accept([make_draft()]))
    await eventually(lambda: backend.tries == 2)
    assert not accepting.done()
    backend.gate.set()
    await accepting
    assert len(backend.turns[-1].drafts) == 1


async def test_a_turn_takes_a_limited_number_of_drafts_and_parts_no_request(
    journal: Journal, backend: FakeBackend
) -> None:
    backend.gate.clear()
    requests = [[make_draft() for _ in range(400)] for _ in range(6)]
    accepting = [asyncio.create_task(journal.accept(drafts)) for drafts in requests]
    await eventually(lambda: backend.tries == 2)
    backend.gate.set()
    await asyncio.gather(*accepting)
    sizes = [len(turn.drafts) for turn in backend.turns if turn.drafts]
    assert all(size % 400 == 0 and size <= 1_200 for size in sizes)
    assert backend.committed("drafts") == [draft for drafts in requests for draft in drafts]


async def test_answers_go_to_those_who_asked(journal: Journal, backend: FakeBackend) -> None:
    backend.result = lambda turn: TurnResult(
        answers=[Answer(TaskStatus.PENDING, place) for place, _ in enumerate(turn.commands)]
    )
    backend.gate.clear()
    hold = asyncio.create_task(journal.accept([make_draft()]))
    await eventually(lambda: backend.tries == 2)
    asking = [
        asyncio.create_task(coroutine)
        for coroutine in (
            journal.obey(Cancel("a", None)),
            journal.accept([make_draft()]),
            journal.obey(Cancel("b", None)),
        )
    ]
    await asyncio.sleep(0)
    backend.gate.set()
    await hold
    first, nothing, second = await asyncio.gather(*asking)
    assert (cast(Answer, first).changed, nothing, cast(Answer, second).changed) == (0, None, 1)


async def test_an_idle_turn_tells_nobody(journal: Journal, backend: FakeBackend) -> None:
    told: list[TurnResult] = []
    journal.listeners.append(lambda finishes, result: told.append(result))
    turns = len(backend.turns)
    journal.wake()
    await eventually(lambda: len(backend.turns) > turns)
    assert told == []
    await journal.accept([make_draft()])
    assert len(told) == 1


# -- accepts fail fast, and what was refused is never written


async def test_an_accept_that_cannot_be_written_in_time_is_refused_and_never_written(
    journal: Journal, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "ACCEPT_TIMEOUT", 0.15)
    backend.go_away()
    began = monotonic()
    with pytest.raises(BackendUnavailable, match="away"):
        await journal.accept([make_draft(task_id="refused")])
    with pytest.raises(BackendUnavailable):
        await journal.obey(Cancel("refused too", None))
    assert 0.3 <= monotonic() - began < 2
    backend.come_back()
    await journal.accept([make_draft(task_id="later")])
    assert [draft.task_id for draft in backend.committed("drafts")] == ["later"]
    assert backend.committed("commands") == []


async def test_an_accept_whose_turn_is_under_way_is_answered_by_that_turn_however_long_it_takes(
    journal: Journal, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "ACCEPT_TIMEOUT", 0.05)
    backend.gate.clear()
    accepting = asyncio.create_task(journal.accept([make_draft()]))
    waiting = asyncio.create_task(journal.accept([make_draft()]))
    await eventually(lambda: backend.tries == 2)
    await asyncio.wait([accepting, waiting], timeout=0.2)
    assert not accepting.done()
    backend.gate.set()
    await asyncio.gather(accepting, waiting)
    assert len(backend.committed("drafts")) == 2


async def test_a_short_outage_is_not_noticed_by_callers(journal: Journal, backend: FakeBackend) -> None:
    backend.go_away()
    accepting = asyncio.create_task(journal.accept([make_draft()]))
    await eventually(lambda: backend.tries > 4)
    assert journal.last_error == "away"
    backend.come_back()
    await accepting
    assert journal.last_error is None
    assert len(backend.committed("drafts")) == 1


async def test_beyond_the_bound_accepts_are_refused_at_once_while_the_database_is_away(
    journal: Journal, backend: FakeBackend
) -> None:
    backend.go_away()
    journal.wake()
    await eventually(lambda: journal.last_error)
    draft = make_draft()
    waiting = asyncio.create_task(journal.accept([draft] * MOST_WAITING))
    await asyncio.sleep(0)
    began = monotonic()
    with pytest.raises(BackendUnavailable, match="are not taken"):
        await journal.accept([draft])
    assert monotonic() - began < 0.5
    backend.come_back()
    await waiting
    await journal.accept([draft])
    assert len(backend.committed("drafts")) == MOST_WAITING + 1


async def test_a_caller_that_goes_away_does_not_disturb_the_others(journal: Journal, backend: FakeBackend) -> None:
    backend.gate.clear()
    gone, stays = [asyncio.create_task(journal.accept([make_draft()])) for _ in range(2)]
    await eventually(lambda: backend.tries == 2)
    gone.cancel()
    await asyncio.wait([gone])
    backend.gate.set()
    await stays
    await journal.accept([make_draft()])


async def test_before_the_start_and_after_the_stop_everything_is_refused_at_once(backend: FakeBackend) -> None:
    journal = Journal(cast(Backend, backend), clock=lambda: START)
    for _ in range(2):
        async with asyncio.timeout(1):
            with pytest.raises(BackendUnavailable, match="not started"):
                await journal.accept([make_draft()])
            with pytest.raises(BackendUnavailable, match="not started"):
                await journal.obey(Cancel("x", None))
        journal.start("me")
        await journal.accept([make_draft()])
        await journal.stop()


async def test_a_stop_tells_those_who_still_wait(journal: Journal, backend: FakeBackend) -> None:
    backend.go_away()
    accepting = asyncio.create_task(journal.accept([make_draft()]))
    await eventually(lambda: backend.tries > 2)
    await journal.stop()
    with pytest.raises(BackendUnavailable, match="stopped"):
        await accepting


async def test_a_flush_writes_what_waits_and_gives_up_at_its_deadline(journal: Journal, backend: FakeBackend) -> None:
    journal.finish(success())
    journal.log(make_context(), "info", "last words", {})
    await journal.flush(monotonic() + 5)
    assert len(backend.committed("finishes")) == 1
    assert len(backend.committed("logs")) == 1
    backend.go_away()
    journal.finish(success())
    began = monotonic()
    await journal.flush(began + 0.1)
    assert 0.1 <= monotonic() - began < 1


async def test_a_flush_with_nothing_to_write_does_not_wait_for_a_database_that_is_away(
    journal: Journal, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "pause_after", lambda failures: 0.05)
    backend.go_away()
    journal.wake()
    await eventually(lambda: journal.last_error)
    began = monotonic()
    await journal.flush(began + 5)
    assert monotonic() - began < 1


# -- finishes are retried for ever


async def test_a_finish_is_tried_until_it_is_written_and_told_once(journal: Journal, backend: FakeBackend) -> None:
    worker = FakeWorker()
    journal.attach(worker)
    backend.go_away()
    finish = success()
    journal.finish(finish)
    await eventually(lambda: backend.tries > 10)
    assert worker.written == []
    backend.come_back()
    await eventually(lambda: worker.written)
    await journal.accept([make_draft()])
    assert backend.committed("finishes") == [finish]
    assert worker.written == [finish]


async def test_tasks_that_end_together_are_written_together(journal: Journal, backend: FakeBackend) -> None:
    worker = FakeWorker()
    worker.ids = {("task", number) for number in range(20)}
    journal.attach(worker)
    before = len(backend.turns)
    for _ in range(15):
        journal.finish(success())
        await asyncio.sleep(0)  # one event loop round each, as threads report them
    await eventually(lambda: len(worker.written) == 15)
    written = [len(turn.finishes) for turn in backend.turns[before:] if turn.finishes]
    assert written[0] >= 10, written


async def test_a_task_that_ends_alone_is_written_although_others_run_on(journal: Journal, backend: FakeBackend) -> None:
    worker = FakeWorker()
    worker.ids = {("task", number) for number in range(20)}
    journal.attach(worker)
    finish = success()
    journal.finish(finish)
    await eventually(lambda: worker.written == [finish])


async def test_a_caller_does_not_wait_for_tasks_to_end(
    journal: Journal, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "LINGER", PATIENCE)
    worker = FakeWorker()
    worker.ids = {("task", number) for number in range(20)}
    journal.attach(worker)
    journal.finish(success())
    await asyncio.sleep(0.01)
    assert worker.written == []
    await journal.accept([make_draft()])
    assert len(worker.written) == 1


async def test_after_a_turn_of_unknown_outcome_the_next_one_says_what_runs_here(
    journal: Journal, backend: FakeBackend
) -> None:
    worker = FakeWorker()
    worker.ids = {("known", 1)}
    journal.attach(worker)
    await journal.accept([make_draft()])
    assert backend.turns[-1].held is None
    backend.go_away()
    journal.wake()
    await eventually(lambda: journal.last_error)
    backend.come_back()
    await eventually(lambda: journal.last_error is None)
    assert backend.turns[-1].held == {("known", 1)}
    await journal.accept([make_draft()])
    assert backend.turns[-1].held is None


# -- words: the newest are kept


async def test_of_too_many_log_lines_the_newest_are_kept(journal: Journal, backend: FakeBackend) -> None:
    backend.go_away()
    context = make_context()
    for number in range(MOST_WAITING + 50):
        journal.log(context, "info", str(number), {})
    backend.come_back()
    await eventually(lambda: len(backend.committed("logs")) == MOST_WAITING)
    assert [line.message for line in backend.committed("logs")] == [str(n) for n in range(50, MOST_WAITING + 50)]


async def test_log_lines_that_could_not_be_written_make_way_for_newer_ones(
    journal: Journal, backend: FakeBackend
) -> None:
    context = make_context()
    backend.gate.clear()
    for number in range(MOST_WAITING):
        journal.log(context, "info", str(number), {})
    await eventually(lambda: backend.tries == 2)
    for number in range(MOST_WAITING, MOST_WAITING + 10):
        journal.log(context, "info", str(number), {})
    backend.go_away()
    backend.gate.set()
    await eventually(lambda: journal.last_error)
    backend.come_back()
    await eventually(lambda: backend.committed("logs"))
    assert [line.message for line in backend.committed("logs")][-1] == str(MOST_WAITING + 9)
    assert len(backend.committed("logs")) == MOST_WAITING


async def test_a_log_line_is_written_no_later_than_the_finish_that_followed_it(
    journal: Journal, backend: FakeBackend
) -> None:
    for _ in range(20):
        journal.log(make_context(), "info", "before the end", {})
        journal.finish(success())
        await journal.accept([make_draft()])
        assert len(backend.committed("logs")) >= len(backend.committed("finishes"))


async def test_only_the_newest_progress_of_a_task_is_written(journal: Journal, backend: FakeBackend) -> None:
    context = make_context()
    for done in range(100):
        journal.progress(context, {"done": done})
    await eventually(lambda: backend.committed("progress"))
    assert [item.value for item in backend.committed("progress")] == ['{"done": 99}']


async def test_words_from_other_threads_arrive(journal: Journal, backend: FakeBackend) -> None:
    context = make_context()
    await asyncio.to_thread(journal.log, context, "info", "from a thread", {})
    await eventually(lambda: [line.message for line in backend.committed("logs")] == ["from a thread"], 0.9)


# -- one broken value does not hold up the others


def breaks(marker: str) -> Callable[[Turn], Exception | None]:
    """A backend that chokes on any turn with this word in it."""
    return lambda turn: ValueError(f"cannot write {marker}") if marker in repr(turn) else None


async def test_a_draft_that_cannot_be_written_fails_its_own_caller_alone(
    journal: Journal, backend: FakeBackend
) -> None:
    backend.refuse = breaks("poison")
    backend.gate.clear()
    hold = asyncio.create_task(journal.accept([make_draft()]))
    await eventually(lambda: backend.tries == 2)
    drafts = [make_draft("poison" if place == 7 else "job") for place in range(20)]
    accepting = [asyncio.create_task(journal.accept([draft])) for draft in drafts]
    finish = success()
    journal.finish(finish)
    await asyncio.sleep(0)
    backend.gate.set()
    outcomes = await asyncio.gather(hold, *accepting, return_exceptions=True)
    assert [place for place, outcome in enumerate(outcomes[1:]) if outcome is not None] == [7]
    assert isinstance(outcomes[8], ValueError)
    await eventually(lambda: backend.committed("finishes") == [finish])
    await eventually(lambda: journal.last_error is None)


async def test_a_result_text_that_cannot_be_written_is_left_out_and_the_end_still_recorded(
    journal: Journal, backend: FakeBackend
) -> None:
    backend.refuse = breaks("poison")
    finish = make_finish(claimed(), TaskStatus.FAILED, START, error="poison", result="poison")
    journal.finish(finish)
    (written,) = await eventually(lambda: backend.committed("finishes"))
    assert (written.task, written.status, written.kind) == (finish.task, finish.status, finish.kind)
    assert written.result is None
    assert written.error
    assert "poison" not in written.error


async def test_a_finish_that_can_never_be_written_does_not_hold_up_the_others(
    journal: Journal, backend: FakeBackend
) -> None:
    backend.refuse = breaks("poison")
    journal.finish(make_finish(claimed("poison"), TaskStatus.SUCCESS, START))
    others = [success() for _ in range(5)]
    for finish in others:
        journal.finish(finish)
    await eventually(lambda: len(backend.committed("finishes")) == 5)
    await journal.accept([make_draft()])


@pytest.mark.parametrize("kind", ["logs", "progress"])
async def test_words_that_cannot_be_written_are_dropped(journal: Journal, backend: FakeBackend, kind: str) -> None:
    backend.refuse = breaks("poison")
    context = make_context()
    if kind == "logs":
        journal.log(context, "info", "poison", {})
    else:
        journal.progress(context, {"message": "poison"})
    journal.log(context, "info", "good", {})
    await eventually(lambda: [line.message for line in backend.committed("logs")] == ["good"])
    await eventually(lambda: journal.last_error is None)
    refused = backend.refused
    await journal.accept([make_draft()])
    assert backend.refused == refused


async def test_one_broken_value_among_a_thousand_costs_a_few_turns(journal: Journal, backend: FakeBackend) -> None:
    backend.refuse = breaks("poison")
    context = make_context()
    for number in range(1_000):
        journal.log(context, "info", "poison" if number == 700 else str(number), {})
    accepts = [asyncio.create_task(journal.accept([make_draft()])) for _ in range(100)]
    for accept in accepts:
        await accept
    await eventually(lambda: len(backend.committed("logs")) == 999)
    assert backend.tries < 40


async def test_who_is_not_in_a_turn_that_hangs_is_refused_in_time_and_who_is_hears_the_truth(
    journal: Journal, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "ACCEPT_TIMEOUT", 0.3)
    tries = backend.tries
    backend.gate.clear()
    inside = asyncio.create_task(journal.accept([make_draft(task_id="inside")]))
    await eventually(lambda: backend.tries > tries)
    began = monotonic()
    with pytest.raises(BackendUnavailable):
        await journal.accept([make_draft(task_id="outside")])
    assert monotonic() - began < 3
    assert not inside.done()
    backend.gate.set()
    await inside
    assert [draft.task_id for draft in backend.committed("drafts")] == ["inside"]


async def test_what_a_caller_gave_up_is_not_stored_unless_its_turn_has_begun(
    journal: Journal, backend: FakeBackend
) -> None:
    tries = backend.tries
    backend.gate.clear()
    inside = asyncio.create_task(journal.accept([make_draft(task_id="inside")]))
    await eventually(lambda: backend.tries > tries)
    for task_id in ("outside", "inside too late"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await journal.accept([make_draft(task_id=task_id)])
    inside.cancel()
    backend.gate.set()
    await journal.accept([make_draft(task_id="last")])
    assert [draft.task_id for draft in backend.committed("drafts")] == ["inside", "last"]


async def test_a_cancellation_that_comes_out_of_the_driver_does_not_end_the_journal(
    journal: Journal, backend: FakeBackend
) -> None:
    tries = backend.tries

    def cancelled(turn: Turn) -> Exception | None:
        if backend.tries == tries + 1:
            raise asyncio.CancelledError
        return None

    backend.refuse = cancelled
    await journal.accept([make_draft(task_id="one")])
    journal.finish(success())
    await eventually(lambda: backend.committed("finishes"))
    assert [draft.task_id for draft in backend.committed("drafts")] == ["one"]


async def test_a_stop_waits_for_the_turn_under_way(backend: FakeBackend) -> None:
    journal = Journal(cast(Backend, backend), clock=lambda: START)
    journal.start("me")
    await journal.ready()
    tries = backend.tries
    backend.gate.clear()
    accept = asyncio.create_task(journal.accept([make_draft()]))
    await eventually(lambda: backend.tries > tries)
    stop = asyncio.create_task(journal.stop(monotonic() + PATIENCE))
    await asyncio.sleep(0.05)
    assert not stop.done()
    backend.gate.set()
    await stop
    await accept


async def test_a_listener_sees_each_committed_finish_once(journal: Journal, backend: FakeBackend) -> None:
    seen: list[str] = []
    journal.listeners.append(lambda finishes, result: seen.extend(finish.task.task_id for finish in finishes))
    finishes = [success() for _ in range(30)]
    for place, finish in enumerate(finishes):
        if place % 10 == 5:
            backend.go_away()
            asyncio.get_running_loop().call_later(0.02, backend.come_back)
        journal.finish(finish)
        await asyncio.sleep(0)
    await eventually(lambda: len(seen) >= 30)
    assert seen == [finish.task.task_id for finish in finishes]


async def test_a_draft_without_anything_to_say_still_waits_for_a_commit(journal: Journal, backend: FakeBackend) -> None:
    drafts: list[Draft] = []
    await journal.accept(drafts)
    assert backend.turns
