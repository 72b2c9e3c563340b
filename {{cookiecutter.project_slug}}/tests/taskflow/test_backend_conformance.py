"""The contract of `Backend`, over every backend: whoever passes this file can carry the task system.

Each test drives a backend turn by turn through a `Bench`, with a clock of its own. Nothing here knows SQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import pytest

from app.taskflow import BackendUnavailable, TaskStatus
from app.taskflow.backends import Backend, open_backend
from app.taskflow.backends.base import (
    Beat,
    Claimed,
    DeclareQueues,
    Demand,
    EditQueue,
    LogLine,
    Progress,
    Requeue,
    Rescue,
)
from app.taskflow.models import RETRYABLE, TRANSITIONS, Cursor, EventKind, QueueConfig, TaskFilter, Vitals

from .helpers import (
    IDLE,
    START,
    Bench,
    all_tasks,
    assert_counters_match_rows,
    make_draft,
    make_finish,
    make_instance,
    next_id,
)

pytestmark = pytest.mark.anyio

ENDED = [status for status in TaskStatus if status.terminal and status is not TaskStatus.REJECTED]


# -- a turn is one transaction


async def test_a_turn_whose_one_part_fails_writes_nothing(bench: Bench) -> None:
    await bench.add()
    running = await bench.claim_one()
    pending = await bench.add()
    events_before = await bench.backend.last_seq()
    parts = {
        "finishes": [make_finish(running, TaskStatus.SUCCESS, bench.now)],
        "drafts": [make_draft(task_id="new")],
        "commands": [],
        "demand": Demand({"job": "thread"}, {"thread": 5}),
        "progress": [Progress(running.task_id, 1, '{"done": 1}')],
    }
    with pytest.raises(UnicodeEncodeError):
        await bench.turn(**parts, logs=[LogLine(running.task_id, bench.now, "info", 0, "half a pair: \ud800")])

    assert await bench.status(running.task_id) is TaskStatus.RUNNING
    assert await bench.status(pending) is TaskStatus.PENDING
    assert await bench.backend.get("new") is None
    assert await bench.backend.last_seq() == events_before
    await assert_counters_match_rows(bench.backend, bench.now)

    result = await bench.turn(**parts)
    assert await bench.status(running.task_id) is TaskStatus.SUCCESS
    assert {task.task_id for task in result.claimed} == {pending, "new"}


async def test_a_turn_holds_together_while_the_heartbeat_writes_from_its_own_thread(bench: Bench) -> None:
    beats, stop, failures = 0, threading.Event(), []

    def beat() -> None:
        nonlocal beats
        while not stop.is_set():
            try:
                bench.beat()
                bench.backend.pulses()
                beats += 1
            except BackendUnavailable as error:
                if "locked" not in error.reason:  # waiting for the other's transaction may take too long
                    failures.append(error)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        for _ in range(60):
            await bench.accept(*[make_draft() for _ in range(5)])
            for task in await bench.claim():
                await bench.finish(task)
    finally:
        stop.set()
        heart.join()
    assert not failures
    assert beats
    await assert_counters_match_rows(bench.backend, bench.now)
    assert len(await all_tasks(bench.backend, TaskFilter(statuses=(TaskStatus.SUCCESS,)))) == 300


async def test_what_one_turn_admits_it_can_also_claim(bench: Bench) -> None:
    draft = make_draft()
    result = await bench.turn(drafts=[draft], demand=Demand({"job": "thread"}, {"thread": 1}))
    assert [task.task_id for task in result.claimed] == [draft.task_id]
    assert await bench.kinds(draft.task_id) == ["accepted", "started"]


async def test_a_place_that_nobody_has_prepared_yet_is_away_or_empty(shared_location: str) -> None:
    """As it is for a service that serves before its database has answered."""
    early = open_backend(shared_location)
    for ask in (lambda: early.page(TaskFilter(), None, 5), early.counts, lambda: early.get("one")):
        with contextlib.suppress(BackendUnavailable):
            found = await ask()
            assert not getattr(found, "tasks", found)
    await early.close()


async def test_committed_tasks_are_there_when_the_backend_is_opened_again(shared_location: str) -> None:
    first = open_backend(shared_location)
    await first.open()
    bench = Bench(first)
    ids = [await bench.add() for _ in range(3)]
    await first.close()
    second = open_backend(shared_location)
    await second.open()
    assert {task.task_id for task in await all_tasks(second)} == set(ids)
    await second.close()


async def test_a_closed_backend_can_be_opened_again(shared_location: str) -> None:
    backend = open_backend(shared_location)
    for _ in range(2):
        await backend.open()
        await Bench(backend).add()
        await backend.close()
    await backend.open()
    assert len(await all_tasks(backend)) == 2
    await backend.close()


# -- accept


async def test_an_accepted_task_is_stored_as_its_draft_says(bench: Bench) -> None:
    draft = make_draft("resize", queue="images", priority=-3, executor="async", max_attempts=4, requeue=True)
    draft = draft._replace(
        arguments='[[1,"zwei \\u00fc"],{"x":null}]',
        tags={"tenant": "ä\u2028'\"\\", "k": ""},
        source="scheduled",
        key="a key",
        retry_of="another",
    )
    await bench.accept(draft)
    record = await bench.get(draft.task_id)
    assert (record.func_name, record.queue, record.priority, record.executor) == ("resize", "images", -3, "async")
    assert (record.max_attempts, record.attempt, record.excused) == (4, 0, 0)
    assert (record.arguments, record.tags) == (draft.arguments, draft.tags)
    assert (record.source, record.idempotency_key, record.retry_of) == ("scheduled", "a key", "another")
    assert (record.created_at, record.run_at) == (START, START)
    assert record.status is TaskStatus.PENDING
    assert (record.start_time, record.end_time, record.error, record.result, record.instance) == (None,) * 5


async def test_accepting_an_id_twice_stores_it_once_and_says_so(bench: Bench) -> None:
    draft = make_draft(arguments='[["first"],{}]')
    assert (await bench.accept(draft)).existing == frozenset()
    again = draft._replace(arguments='[["second"],{}]')
    assert (await bench.accept(again, other := make_draft())).existing == {draft.task_id}
    assert (await bench.get(draft.task_id)).arguments == draft.arguments
    assert await bench.kinds(draft.task_id) == ["accepted"]
    assert await bench.status(other.task_id) is TaskStatus.PENDING
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_one_id_twice_in_one_turn_is_one_task(bench: Bench) -> None:
    draft = make_draft()
    await bench.accept(draft, draft)
    assert await bench.kinds(draft.task_id) == ["accepted"]
    await assert_counters_match_rows(bench.backend, bench.now)


@pytest.mark.parametrize("status", [TaskStatus.FAILED, TaskStatus.INTERRUPTED])
async def test_an_idempotency_key_runs_a_lost_task_again_with_the_new_arguments(
    bench: Bench, status: TaskStatus
) -> None:
    task_id = await bench.become(status, key="k")
    again = make_draft(task_id=task_id, key="k", arguments='[["new"],{}]', max_attempts=3)
    assert task_id in (await bench.accept(again)).existing
    (task,) = await bench.claim()
    assert (task.task_id, task.arguments, task.attempt, task.excused) == (task_id, again.arguments, 2, 1)
    assert task.max_attempts == 3
    assert (await bench.kinds(task_id))[-2:] == ["requeued", "started"]
    await assert_counters_match_rows(bench.backend, bench.now)


@pytest.mark.parametrize("status", [TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.SUCCESS, TaskStatus.CANCELLED])
async def test_an_idempotency_key_leaves_any_other_task_alone(bench: Bench, status: TaskStatus) -> None:
    task_id = await bench.become(status, key="k")
    before = await bench.get(task_id)
    await bench.accept(make_draft(task_id=task_id, key="k", arguments='[["new"],{}]'))
    assert await bench.get(task_id) == before
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_an_id_without_key_is_never_run_again_by_accepting_it_twice(bench: Bench) -> None:
    task_id = await bench.become(TaskStatus.FAILED)
    await bench.accept(make_draft(task_id=task_id))
    assert await bench.status(task_id) is TaskStatus.FAILED


# -- claim


async def test_claims_go_by_priority_then_by_time_then_by_arrival(bench: Bench) -> None:
    def draft(task_id: str, priority: int | None, second: int) -> Any:
        at = START + timedelta(seconds=second)
        return make_draft(task_id=task_id, at=at, priority=priority)

    bench.pass_time(10)
    await bench.accept(
        draft("low", -1, 0),
        draft("late", None, 3),
        draft("b", 0, 1),
        draft("a", None, 1),
        draft("high", 5, 9),
        draft("higher", 6, 9),
    )
    order = []
    while claimed := await bench.claim(1):
        order += [task.task_id for task in claimed]
    assert order == ["higher", "high", "a", "b", "late", "low"]


async def test_one_claim_hands_tasks_out_in_their_order(bench: Bench) -> None:
    drafts = [make_draft(priority=priority) for priority in (1, 3, 2, None, 3)]
    await bench.accept(*drafts)
    order = [drafts[place].task_id for place in (1, 4, 2, 0, 3)]
    assert [task.task_id for task in await bench.claim()] == order


async def test_a_claimed_task_is_running_under_its_instance_before_anybody_can_start_it(bench: Bench) -> None:
    task_id = await bench.add(arguments="[[7],{}]", tags={"a": "b"}, max_attempts=2, requeue=True)
    bench.pass_time(5)
    task = await bench.claim_one()
    assert (task.task_id, task.name, task.queue, task.executor) == (task_id, "job", "default", "thread")
    assert (task.attempt, task.excused, task.max_attempts, task.started_at) == (1, 0, 2, bench.now)
    assert (task.arguments, task.tags, task.requeue) == ("[[7],{}]", {"a": "b"}, True)
    record = await bench.get(task_id)
    assert (record.status, record.attempt, record.instance) == (TaskStatus.RUNNING, 1, "one")
    assert record.start_time == bench.now
    assert await bench.claim() == []


@pytest.mark.parametrize("waiting", ["ready", "due"])
async def test_what_arrives_does_not_overtake_what_waits(bench: Bench, waiting: str) -> None:
    first = await bench.add(run_at=bench.now + timedelta(seconds=1) if waiting == "due" else None)
    bench.pass_time(1)
    result = await bench.turn(drafts=[make_draft(at=bench.now)], demand=Demand({"job": "thread"}, {"thread": 1}))
    assert [task.task_id for task in result.claimed] == [first]


async def test_of_several_arrivals_the_most_urgent_start_first(bench: Bench) -> None:
    drafts = [make_draft(priority=priority) for priority in (None, 2, 1)]
    later = make_draft(run_at=bench.now + timedelta(seconds=1), priority=9)
    result = await bench.turn(drafts=[later, *drafts], demand=Demand({"job": "thread"}, {"thread": 2}))
    assert [task.task_id for task in result.claimed] == [drafts[1].task_id, drafts[2].task_id]
    assert result.next_due == later.run_at
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_arrivals_are_started_only_under_names_and_slots_that_this_instance_has(bench: Bench) -> None:
    drafts = [make_draft(name) for name in ("unknown", "quick", "job", "job")]
    result = await bench.turn(drafts=drafts, demand=Demand({"job": "thread", "quick": "async"}, {"thread": 1}))
    assert [task.task_id for task in result.claimed] == [drafts[2].task_id]
    assert await bench.status(drafts[0].task_id) is TaskStatus.PENDING
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_an_id_seen_before_is_not_started_again_by_the_turn_that_brings_it_back(bench: Bench) -> None:
    task_id = await bench.become(TaskStatus.SUCCESS)
    result = await bench.turn(drafts=[make_draft(task_id=task_id)], demand=Demand({"job": "thread"}, {"thread": 5}))
    assert result.claimed == []
    assert result.existing == {task_id}


async def test_a_turn_without_demand_claims_nothing(bench: Bench) -> None:
    await bench.add()
    assert (await bench.turn()).claimed == []


async def test_no_more_is_claimed_than_an_executor_has_slots_for(bench: Bench) -> None:
    names = {"slow": "thread", "quick": "async"}
    await bench.accept(*[make_draft(name) for name in ("slow", "quick") * 10])
    slots = {"thread": 3, "async": 4, "process": 0}
    while claimed := await bench.claim(slots, names=names):
        for task in claimed:
            slots[names[task.name]] -= 1
        assert min(slots.values()) >= 0
    assert slots == {"thread": 0, "async": 0, "process": 0}
    assert {task.name for task in await bench.claim({"thread": 2}, names=names)} == {"slow"}


@pytest.mark.parametrize("number", [1, 2, 3, 5, 64, 65, 512, 513, 1_100])
async def test_a_turn_of_any_size_writes_each_of_its_rows_once(bench: Bench, number: int) -> None:
    drafts = [make_draft() for _ in range(number)]
    await bench.accept(*drafts)
    claimed: list[Claimed] = []
    while found := await bench.claim(number - len(claimed)) if len(claimed) < number else []:
        claimed += found
    assert {task.task_id for task in claimed} == {draft.task_id for draft in drafts}
    result = await bench.turn(finishes=[make_finish(task, TaskStatus.SUCCESS, bench.now) for task in claimed])
    assert result.refused == frozenset()
    for draft in (drafts[0], drafts[-1]):
        assert await bench.kinds(draft.task_id) == ["accepted", "started", "succeeded"]
    assert len(await bench.backend.events_after(0, 10_000)) == 3 * number
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_demand_is_met_over_several_turns_however_much_waits(bench: Bench) -> None:
    await bench.accept(*[make_draft(queue=f"q{number % 3}") for number in range(900)])
    claimed: list[Claimed] = []
    more = True
    while more:
        result = await bench.turn(demand=Demand({"job": "thread"}, {"thread": 800 - len(claimed)}))
        claimed += result.claimed
        more = result.more
        assert result.claimed or not more
        assert len(claimed) <= 800
    assert len(claimed) == 800
    assert len({task.task_id for task in claimed}) == 800


async def test_a_long_queue_does_not_starve_a_short_one(bench: Bench) -> None:
    await bench.accept(*[make_draft(queue="long") for _ in range(400)], *[make_draft(queue="short") for _ in range(2)])
    claimed: list[Claimed] = []
    for _ in range(4):
        claimed += await bench.claim(50)
    assert Counter(task.queue for task in claimed)["short"] == 2


async def test_tasks_of_one_executor_do_not_hold_up_those_of_another(bench: Bench) -> None:
    names = {"slow": "thread", "quick": "async"}
    await bench.accept(*[make_draft("slow", priority=9) for _ in range(30)], make_draft("quick"))
    claimed: list[Claimed] = []
    for _ in range(3):
        used = Counter(names[task.name] for task in claimed)
        claimed += await bench.claim({"thread": 1 - used["thread"], "async": 5 - used["async"]}, names=names)
    assert Counter(task.name for task in claimed) == {"slow": 1, "quick": 1}


async def test_a_name_this_instance_does_not_know_is_never_claimed(bench: Bench) -> None:
    await bench.accept(*[make_draft("of_a_newer_deploy", priority=9) for _ in range(20)], make_draft("job"))
    assert [task.name for task in await bench.claim(5)] == ["job"]
    assert await bench.claim(5) == []
    assert [task.name for task in await bench.claim(1, names={"of_a_newer_deploy": "thread"})] == ["of_a_newer_deploy"]


# -- queues


def declared(**queues: QueueConfig) -> dict[str, Any]:
    return {"commands": [DeclareQueues(queues)]}


async def edit(bench: Bench, name: str, kind: EventKind = EventKind.UPDATE_QUEUE, **changes: Any) -> None:
    await bench.turn(commands=[EditQueue(name, kind, changes, None)])


async def test_no_more_tasks_of_a_queue_run_than_it_allows_on_all_instances_together(bench: Bench) -> None:
    await bench.turn(**declared(mail=QueueConfig(concurrency=3)))
    await bench.accept(*[make_draft(queue=queue) for queue in ("mail", "free") * 6])
    here = await bench.claim(6)
    other = Bench(bench.backend, "two", now=bench.now)
    there = await other.claim(50)
    assert Counter(task.queue for task in [*here, *there]) == {"mail": 3, "free": 6}
    assert await bench.claim() == []
    mail = next(task for task in here if task.queue == "mail")
    await bench.finish(mail)
    assert [task.queue for task in await other.claim()] == ["mail"]
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_a_queue_of_one_runs_its_tasks_strictly_in_their_order(bench: Bench) -> None:
    await bench.turn(**declared(strict=QueueConfig(concurrency=1)))
    drafts = [make_draft(queue="strict") for _ in range(5)]
    order = []
    result = await bench.turn(drafts=drafts, demand=Demand({"job": "thread"}, {"thread": 9}))
    while result.claimed:
        (task,) = result.claimed
        order.append(task.task_id)
        result = await bench.turn(
            finishes=[make_finish(task, TaskStatus.SUCCESS, bench.now)],
            demand=Demand({"job": "thread"}, {"thread": 9}),
        )
    assert order == [draft.task_id for draft in drafts]


async def test_a_full_queue_rejects_and_keeps_what_it_rejected(bench: Bench) -> None:
    await bench.turn(**declared(small=QueueConfig(max_size=2)))
    drafts = [make_draft(queue="small") for _ in range(4)]
    result = await bench.accept(*drafts)
    assert result.rejected == {draft.task_id: 2 for draft in drafts[2:]}
    assert [await bench.status(draft.task_id) for draft in drafts] == ["pending"] * 2 + ["rejected"] * 2
    assert await bench.kinds(drafts[3].task_id) == ["rejected"]
    assert [task.task_id for task in await bench.claim()] == [draft.task_id for draft in drafts[:2]]
    assert (await bench.accept(make_draft(queue="small"))).rejected == {}
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_delayed_tasks_and_retries_take_no_place_in_a_full_queue(bench: Bench) -> None:
    await bench.turn(**declared(small=QueueConfig(max_size=1)))
    for _ in range(3):
        assert not (await bench.accept(make_draft(queue="small", run_at=bench.now + timedelta(hours=1)))).rejected
    await bench.add(queue="small", max_attempts=2)
    task = await bench.claim_one()
    await bench.finish(task, TaskStatus.PENDING, run_at=bench.now + timedelta(hours=1))
    assert not (await bench.accept(make_draft(queue="small"))).rejected
    assert (await bench.accept(make_draft(queue="small"))).rejected


async def test_what_starts_at_once_takes_no_place_in_its_queue(bench: Bench) -> None:
    await bench.turn(**declared(small=QueueConfig(max_size=1)))
    drafts = [make_draft(queue="small") for _ in range(4)]
    result = await bench.turn(drafts=drafts, demand=Demand({"job": "thread"}, {"thread": 2}))
    assert [task.task_id for task in result.claimed] == [draft.task_id for draft in drafts[:2]]
    assert set(result.rejected) == {drafts[3].task_id}
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_an_operator_can_requeue_what_a_full_queue_rejected(bench: Bench) -> None:
    await bench.turn(**declared(small=QueueConfig(max_size=1)))
    drafts = [make_draft(queue="small") for _ in range(2)]
    await bench.accept(*drafts)
    assert (await bench.requeue(drafts[1].task_id)).before is TaskStatus.REJECTED
    assert [task.task_id for task in await bench.claim()] == [draft.task_id for draft in drafts]
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_a_paused_queue_takes_tasks_and_starts_none_until_it_is_resumed(bench: Bench) -> None:
    await edit(bench, "mail", EventKind.PAUSE_QUEUE, paused=True, reason="maintenance")
    result = await bench.turn(
        drafts=[draft := make_draft(queue="mail")], demand=Demand({"job": "thread"}, {"thread": 9})
    )
    assert result.claimed == []
    assert await bench.claim() == []
    (state,) = await bench.backend.queues()
    assert (state.name, state.paused, state.reason, state.pending) == ("mail", True, "maintenance", 1)
    await edit(bench, "mail", EventKind.RESUME_QUEUE, paused=False, reason=None)
    assert [task.task_id for task in await bench.claim()] == [draft.task_id]


async def test_an_edit_of_a_busy_queue_takes_effect_at_once_and_never_freezes_it(bench: Bench) -> None:
    await bench.turn(**declared(mail=QueueConfig(concurrency=4)))
    await bench.accept(*[make_draft(queue="mail") for _ in range(9)])
    running = list(await bench.claim())
    assert len(running) == 4
    await edit(bench, "mail", concurrency=1)
    while len(running) > 1:
        await bench.finish(running.pop())
        assert await bench.claim() == []
    await bench.finish(running.pop())
    assert len(await bench.claim()) == 1
    await edit(bench, "mail", concurrency=None)
    assert len(await bench.claim()) == 4


async def test_an_operator_s_edit_outlives_a_restart_until_the_code_says_something_else(bench: Bench) -> None:
    async def concurrency() -> int | None:
        return next(state.concurrency for state in await bench.backend.queues() if state.name == "mail")

    await bench.turn(**declared(mail=QueueConfig(concurrency=4)))
    await edit(bench, "mail", concurrency=9)
    await bench.turn(**declared(mail=QueueConfig(concurrency=4)))
    assert await concurrency() == 9
    await bench.turn(**declared(mail=QueueConfig(concurrency=5)))
    assert await concurrency() == 5


async def test_another_instance_s_edit_is_seen_by_the_next_turn(shared_location: str) -> None:
    here, there = open_backend(shared_location), open_backend(shared_location)
    await here.open()
    await there.open()
    one, two = Bench(here, "one"), Bench(there, "two")
    await one.turn(**declared(mail=QueueConfig(concurrency=1)))
    await two.accept(*[make_draft(queue="mail") for _ in range(3)])
    assert len(await two.claim()) == 1
    await edit(one, "mail", concurrency=2)
    assert len(await two.claim()) == 1
    assert await one.claim() == []
    await here.close()
    await there.close()


# -- tasks for later


async def test_a_delayed_task_is_not_claimed_before_its_time_and_is_when_due(bench: Bench) -> None:
    due = START + timedelta(seconds=60, microseconds=1)
    task_id = await bench.add(run_at=due)
    assert await bench.status(task_id) is TaskStatus.PENDING
    await assert_counters_match_rows(bench.backend, bench.now)
    bench.now = due - timedelta(microseconds=1)
    assert await bench.claim() == []
    bench.now = due
    assert [task.task_id for task in await bench.claim()] == [task_id]
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_next_due_is_when_the_next_waiting_task_may_start(bench: Bench) -> None:
    assert (await bench.turn(demand=IDLE)).next_due is None
    soon, later = START + timedelta(seconds=5), START + timedelta(days=400)
    await bench.add(run_at=later)
    assert (await bench.turn(drafts=[make_draft(run_at=soon)], demand=IDLE)).next_due == soon
    assert (await bench.turn(drafts=[make_draft(run_at=later)], demand=IDLE)).next_due == soon
    bench.now = soon
    assert (await bench.turn(demand=IDLE)).next_due == later
    bench.now = later
    assert (await bench.turn(demand=IDLE)).next_due is None


async def test_any_number_of_tasks_may_become_due_at_once(bench: Bench) -> None:
    due = START + timedelta(seconds=1)
    await bench.accept(*[make_draft(run_at=due) for _ in range(2_500)])
    bench.now = due
    turns = 0
    assert await bench.backend.due(bench.now) > 0
    while (result := await bench.turn(demand=IDLE)).next_due is not None:
        assert result.next_due <= due
        turns += 1
        assert turns < 10
    await assert_counters_match_rows(bench.backend, bench.now)
    assert sum(count.delayed for count in await bench.backend.counts()) == 0


async def test_a_cancelled_delayed_task_never_becomes_due(bench: Bench) -> None:
    task_id = await bench.add(run_at=START + timedelta(seconds=5))
    await bench.cancel(task_id)
    assert (await bench.turn(demand=IDLE)).next_due is None
    bench.pass_time(10)
    assert await bench.claim() == []
    await assert_counters_match_rows(bench.backend, bench.now)


# -- finish


@pytest.mark.parametrize("status", ENDED)
async def test_a_finish_is_stored_with_what_it_brings(bench: Bench, status: TaskStatus) -> None:
    task_id = await bench.add(requeue=True)
    task = await bench.claim_one()
    bench.pass_time(2.5)
    assert await bench.finish(task, status, result='{"$tuple":[1]}', error="why", excused=True)
    record = await bench.get(task_id)
    assert (record.status, record.result, record.error) == (status, '{"$tuple":[1]}', "why")
    assert (record.end_time, record.duration, record.excused) == (bench.now, 2.5, 1)
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_a_retry_keeps_the_row_and_counts_the_attempts(bench: Bench) -> None:
    task_id = await bench.add(max_attempts=2)
    first = await bench.claim_one()
    due = bench.now + timedelta(seconds=7)
    assert await bench.finish(first, TaskStatus.PENDING, run_at=due, error="boom")
    record = await bench.get(task_id)
    assert (record.status, record.attempt, record.run_at, record.error) == (TaskStatus.PENDING, 1, due, "boom")
    assert record.end_time is None
    assert await bench.claim() == []
    bench.now = due
    second = await bench.claim_one()
    assert (second.task_id, second.attempt, second.attempts_left) == (task_id, 2, False)
    assert len(await all_tasks(bench.backend)) == 1
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_a_retry_without_wait_is_ready_at_once(bench: Bench) -> None:
    await bench.add(max_attempts=2)
    task = await bench.claim_one()
    retry = make_finish(task, TaskStatus.PENDING, bench.now, run_at=bench.now)
    result = await bench.turn(finishes=[retry], demand=Demand({"job": "thread"}, {"thread": 1}))
    assert [again.attempt for again in result.claimed] == [2]


@pytest.mark.parametrize("wrong", ["attempt", "instance", "status", "gone"])
async def test_a_finish_that_lost_its_lease_is_refused_reported_and_logged(bench: Bench, wrong: str) -> None:
    task_id = await bench.add(max_attempts=3)
    task = await bench.claim_one()
    late = Bench(bench.backend, "two" if wrong == "instance" else "one", now=bench.now)
    if wrong == "attempt":
        await bench.finish(task, TaskStatus.PENDING, run_at=bench.now)
        await bench.claim_one()
    elif wrong == "status":
        await bench.finish(task, TaskStatus.FAILED)
    elif wrong == "gone":
        task = task._replace(task_id="never-stored")
    before = await bench.backend.get(task.task_id)

    result = await late.turn(finishes=[make_finish(task, TaskStatus.SUCCESS, late.now, result='"stale"')])

    assert result.refused == {task.attempt_id}
    assert await bench.backend.get(task.task_id) == before
    assert (await bench.kinds(task.task_id))[-1] == "lease_lost"
    await assert_counters_match_rows(bench.backend, bench.now)
    assert await bench.status(task_id) is not TaskStatus.SUCCESS


async def test_refused_finishes_do_not_hold_up_the_others_of_their_turn(bench: Bench) -> None:
    await bench.accept(make_draft(), make_draft())
    one, two = await bench.claim()
    result = await bench.turn(
        finishes=[
            make_finish(one._replace(attempt=7), TaskStatus.SUCCESS, bench.now),
            make_finish(two, TaskStatus.SUCCESS, bench.now),
        ]
    )
    assert result.refused == {(one.task_id, 7)}
    assert await bench.status(two.task_id) is TaskStatus.SUCCESS


@pytest.mark.parametrize(
    "text",
    [
        "nul \0 inside",
        "lone \ud800 surrogate",
        "emoji \N{SNAKE} \N{MATHEMATICAL FRAKTUR CAPITAL U}",
        "\u2028",
        "x" * 100_000,
        "",
    ],
)
async def test_a_text_that_was_stored_can_be_read_again(bench: Bench, text: str) -> None:
    task_id = await bench.add(tags={"text": text[:200]})
    task = await bench.claim_one()
    stored = text.replace("\0", "\ufffd").replace("\ud800", "?")
    await bench.turn(logs=[LogLine(task_id, bench.now, "info", 0, stored, json.dumps({"text": text}))])
    await bench.finish(task, TaskStatus.FAILED, error=stored)
    record = await bench.get(task_id)
    assert record.error == stored
    assert record.tags == {"text": text[:200]}
    (line,) = await bench.backend.logs(task_id, 0, 10)
    assert (line.message, line.extra) == (stored, {"text": text})


# -- counters and events


async def test_counters_equal_a_recount_after_every_kind_of_change(bench: Bench) -> None:
    async def check() -> None:
        await assert_counters_match_rows(bench.backend, bench.now)

    for status in ENDED:
        bench.pass_time(1)
        task_id = await bench.add(requeue=status is TaskStatus.CANCELLED, queue=str(status), max_attempts=2)
        task = await bench.claim_one()
        bench.pass_time(1)
        await bench.finish(task, TaskStatus.PENDING, run_at=bench.now + timedelta(seconds=3))
        await check()
        bench.pass_time(3)
        (task,) = await bench.claim()
        bench.pass_time(0.25)
        await bench.finish(task, status)
        await check()
        await bench.requeue(task_id)
        await check()
        await bench.cancel(task_id)
        await check()


@pytest.mark.parametrize("requeue", [True, False])
async def test_seconds_run_are_counted_once_through_rescue_and_requeue(bench: Bench, requeue: bool) -> None:
    task_id = await bench.add(requeue=requeue)
    for _ in range(3):
        await bench.claim()
        bench.pass_time(2)
        await bench.rescue("one")
        await assert_counters_match_rows(bench.backend, bench.now)
    bench.pass_time(1)
    await bench.requeue(task_id)
    await assert_counters_match_rows(bench.backend, bench.now)
    assert all(count.seconds >= 0 for count in await bench.backend.counts())


async def test_a_task_that_is_cancelled_while_it_waits_for_its_retry_keeps_the_counters_right(bench: Bench) -> None:
    task_id = await bench.add(max_attempts=2)
    task = await bench.claim_one()
    bench.pass_time(2)
    await bench.finish(task, TaskStatus.PENDING, run_at=bench.now + timedelta(seconds=30))
    bench.pass_time(5)
    await bench.cancel(task_id)
    await assert_counters_match_rows(bench.backend, bench.now)
    await bench.requeue(task_id)
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_each_transition_leaves_one_event_in_order_with_its_attempt_and_instance(bench: Bench) -> None:
    other = Bench(bench.backend, "two", now=bench.now)
    task_id = await bench.add(max_attempts=2, requeue=True)
    first = await bench.claim_one()
    await bench.finish(first, TaskStatus.PENDING, run_at=bench.now, error="boom")
    await bench.claim_one()
    await other.rescue("one")
    third = await other.claim_one()
    await other.cancel(task_id, actor="ann")
    await other.finish(third, TaskStatus.CANCELLED, error="stopped")
    await bench.requeue(task_id, actor="bob")
    fourth = await bench.claim_one()
    await bench.finish(fourth)
    await bench.finish(fourth)
    events = await bench.backend.events(task_id)
    assert [(event.kind, event.attempt, event.instance, event.actor) for event in events] == [
        ("accepted", None, "one", None),
        ("started", 0, "one", None),
        ("retrying", 0, "one", None),
        ("started", 1, "one", None),
        ("rescued", 1, "two", None),
        ("started", 2, "two", None),
        ("cancel_requested", 2, "two", "ann"),
        ("cancelled", 2, "two", None),
        ("requeued", None, "one", "bob"),
        ("started", 3, "one", None),
        ("succeeded", 3, "one", None),
        ("lease_lost", 3, "one", None),
    ]
    assert events[2].detail == "boom"
    assert [event.seq for event in events] == sorted({event.seq for event in events})


async def test_the_events_of_one_turn_follow_the_order_of_its_parts(bench: Bench) -> None:
    drafts = [make_draft() for _ in range(30)]
    await bench.accept(*drafts)
    tasks = await bench.claim()
    await bench.turn(finishes=[make_finish(task, TaskStatus.SUCCESS, bench.now) for task in tasks])
    ids = [draft.task_id for draft in drafts]
    events = await bench.backend.events_after(0, 1_000)
    assert [(event.kind, event.task_id) for event in events] == [
        (kind, task_id) for kind in ("accepted", "started", "succeeded") for task_id in ids
    ]


async def test_the_event_feed_goes_on_after_any_number_and_misses_none(bench: Bench) -> None:
    assert await bench.backend.last_seq() == 0
    ids = [await bench.add() for _ in range(7)]
    seen = []
    seq = 0
    while events := await bench.backend.events_after(seq, 3):
        assert len(events) <= 3
        seen += [event.task_id for event in events]
        seq = events[-1].seq
    assert seen == ids
    assert seq == await bench.backend.last_seq()


# -- cancel


async def test_a_pending_task_that_is_cancelled_is_never_claimed(bench: Bench) -> None:
    task_id = await bench.add()
    answer = await bench.cancel(task_id, actor="ann")
    assert (answer.before, answer.changed) == (TaskStatus.PENDING, 1)
    assert await bench.claim() == []
    record = await bench.get(task_id)
    assert (record.status, record.end_time) == (TaskStatus.CANCELLED, bench.now)
    (_, event) = await bench.backend.events(task_id)
    assert (event.kind, event.actor) == ("cancelled", "ann")
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_the_owner_of_a_running_task_is_told_that_it_was_cancelled(bench: Bench) -> None:
    task_id = await bench.add()
    bystander = await bench.add()
    await bench.claim()
    other = Bench(bench.backend, "two", now=bench.now)
    answer = await other.cancel(task_id)
    assert (answer.before, answer.changed) == (TaskStatus.RUNNING, 1)
    assert await bench.status(task_id) is TaskStatus.RUNNING
    assert (await bench.get(task_id)).cancel_requested
    assert list(await bench.backend.cancels("one")) == [(task_id, 1)]
    assert list(await bench.backend.cancels("two")) == []
    assert not (await bench.get(bystander)).cancel_requested


@pytest.mark.parametrize("outcome", ["retry", "rescue"])
async def test_a_running_task_that_was_cancelled_is_never_started_again(bench: Bench, outcome: str) -> None:
    task_id = await bench.add(max_attempts=5, requeue=True)
    task = await bench.claim_one()
    await bench.cancel(task_id)
    if outcome == "retry":
        await bench.finish(task, TaskStatus.PENDING, run_at=bench.now, error="boom")
    else:
        await bench.rescue("one")
    bench.pass_time(60)
    assert await bench.claim() == []
    assert await bench.status(task_id) is TaskStatus.CANCELLED
    assert (await bench.kinds(task_id))[-1] == "cancelled"
    assert (await bench.get(task_id)).end_time is not None
    await assert_counters_match_rows(bench.backend, bench.now)


@pytest.mark.parametrize("outcome", [TaskStatus.SUCCESS, TaskStatus.FAILED])
async def test_a_task_that_ended_before_it_heard_of_its_cancel_keeps_its_end(bench: Bench, outcome: TaskStatus) -> None:
    task_id = await bench.add()
    task = await bench.claim_one()
    await bench.cancel(task_id)
    await bench.finish(task, outcome)
    record = await bench.get(task_id)
    assert (record.status, record.cancel_requested) == (outcome, False)


@pytest.mark.parametrize("status", ENDED)
async def test_a_task_that_has_ended_cannot_be_cancelled(bench: Bench, status: TaskStatus) -> None:
    task_id = await bench.become(status)
    before = await bench.get(task_id)
    answer = await bench.cancel(task_id)
    assert (answer.before, answer.changed) == (status, 0)
    assert await bench.get(task_id) == before


async def test_commands_on_an_unknown_id_find_nothing_and_change_nothing(bench: Bench) -> None:
    for answer in (await bench.cancel("nobody"), await bench.requeue("nobody")):
        assert (answer.before, answer.changed) == (None, 0)
    assert await bench.backend.last_seq() == 0


# -- requeue


@pytest.mark.parametrize("status", sorted(RETRYABLE - {TaskStatus.REJECTED}))
async def test_a_requeued_task_starts_with_a_full_set_of_attempts_and_its_history(
    bench: Bench, status: TaskStatus
) -> None:
    task_id = await bench.become(status, max_attempts=1)
    started = (await bench.get(task_id)).attempt
    bench.pass_time(30)
    answer = await bench.requeue(task_id, max_attempts=3, actor="ann")
    assert (answer.before, answer.changed) == (status, 1)
    record = await bench.get(task_id)
    assert (record.status, record.run_at, record.max_attempts) == (TaskStatus.PENDING, bench.now, 3)
    assert (record.error, record.result, record.stacktrace, record.end_time) == (None,) * 4
    for number in range(3):
        task = await bench.claim_one()
        assert task.attempt == started + number + 1
        assert task.attempts_left is (number < 2)
        await bench.finish(task, TaskStatus.PENDING, run_at=bench.now)
    assert (await bench.kinds(task_id))[0] == "accepted"
    await assert_counters_match_rows(bench.backend, bench.now)


@pytest.mark.parametrize("status", sorted(set(TaskStatus) - RETRYABLE))
async def test_a_task_that_waits_runs_or_succeeded_is_not_requeued(bench: Bench, status: TaskStatus) -> None:
    task_id = await bench.become(status)
    before = await bench.get(task_id)
    answer = await bench.requeue(task_id)
    assert (answer.before, answer.changed) == (status, 0)
    assert await bench.get(task_id) == before


async def test_two_requeues_in_one_turn_requeue_once(bench: Bench) -> None:
    task_id = await bench.become(TaskStatus.FAILED)
    answers = (await bench.turn(commands=[Requeue(task_id, 1, None)] * 2)).answers
    assert [answer.changed for answer in answers] == [1, 0]
    await assert_counters_match_rows(bench.backend, bench.now)


def test_what_may_be_requeued_is_what_the_transitions_allow() -> None:
    assert {status for status in TaskStatus if TaskStatus.PENDING in TRANSITIONS[status]} == RETRYABLE | {
        TaskStatus.RUNNING
    }
    assert TRANSITIONS[TaskStatus.SUCCESS] == frozenset()


# -- rescue


async def test_what_a_lost_instance_left_running_is_interrupted_or_requeued_as_it_allows(bench: Bench) -> None:
    plain = await bench.add()
    again = await bench.add(requeue=True)
    await bench.claim()
    mine = Bench(bench.backend, "two", now=bench.now)
    survivor = await mine.add()
    await mine.claim_one()
    mine.pass_time(40)

    assert (await mine.rescue("one", "never-heard-of")).changed == 2

    record = await bench.get(plain)
    assert (record.status, record.end_time) == (TaskStatus.INTERRUPTED, mine.now)
    assert await bench.status(again) is TaskStatus.PENDING
    assert await bench.status(survivor) is TaskStatus.RUNNING
    assert (await bench.kinds(plain))[-1] == "interrupted"
    assert (await bench.kinds(again))[-1] == "rescued"
    assert (await mine.rescue("one")).changed == 0
    assert [task.task_id for task in await mine.claim()] == [again]
    await assert_counters_match_rows(bench.backend, mine.now)


async def test_a_rescue_spends_no_attempt(bench: Bench) -> None:
    await bench.add(requeue=True, max_attempts=1)
    await bench.claim_one()
    await bench.rescue("one")
    task = await bench.claim_one()
    assert (task.attempt, task.excused) == (2, 1)


async def test_a_task_whose_process_died_three_times_is_a_crash_loop(bench: Bench) -> None:
    task_id = await bench.add(requeue=True, max_attempts=50)
    for death in range(3):
        assert [task.task_id for task in await bench.claim()] == [task_id], death
        await bench.rescue("one")
    record = await bench.get(task_id)
    assert record.status is TaskStatus.FAILED
    assert record.error is not None
    assert record.error.startswith("crash_loop")
    assert (await bench.kinds(task_id))[-1] == "failed"
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_an_operator_gives_a_crash_loop_a_new_budget(bench: Bench) -> None:
    task_id = await bench.add(requeue=True)
    for _ in range(3):
        await bench.claim_one()
        await bench.rescue("one")
    await bench.requeue(task_id)
    for _ in range(2):
        await bench.claim_one()
        await bench.rescue("one")
    assert await bench.status(task_id) is TaskStatus.PENDING


async def test_a_result_that_comes_after_the_rescue_is_refused(bench: Bench) -> None:
    task_id = await bench.add(requeue=True)
    task = await bench.claim_one()
    await Bench(bench.backend, "two", now=bench.now).rescue("one")
    assert not await bench.finish(task)
    assert await bench.status(task_id) is TaskStatus.PENDING


async def test_a_rescue_of_thousands_is_complete_when_it_says_so(bench: Bench) -> None:
    await bench.accept(*[make_draft() for _ in range(1_200)])
    while await bench.claim(1_200):
        pass
    rescued = 0
    while (answer := await bench.rescue("one")).changed:
        rescued += answer.changed
    assert rescued == 1_200
    await assert_counters_match_rows(bench.backend, bench.now)


async def test_tasks_that_were_claimed_but_never_handed_out_are_handed_out_again(bench: Bench) -> None:
    await bench.accept(*[make_draft() for _ in range(3)])
    known, *lost = await bench.claim()
    stranger = Bench(bench.backend, "two", now=bench.now)
    await stranger.add()
    await stranger.claim_one()

    result = await bench.turn(held=frozenset({known.attempt_id}))

    assert sorted(result.claimed, key=lambda task: task.task_id) == sorted(lost, key=lambda task: task.task_id)
    assert (await bench.turn()).claimed == []


async def test_what_a_turn_claims_is_not_taken_for_lost_by_the_same_turn(bench: Bench) -> None:
    task_id = await bench.add()
    result = await bench.turn(held=frozenset(), demand=Demand({"job": "thread"}, {"thread": 1}))
    assert [task.task_id for task in result.claimed] == [task_id]


# -- pages


async def stock(bench: Bench) -> None:
    """Forty tasks of two names in two queues, all sorts of statuses, some of the same moment."""
    for number in range(40):
        if number % 3 == 0:
            bench.pass_time(60)
        await bench.add(
            name=("job", "mail")[number % 2],
            queue=("default", "slow")[number // 2 % 2],
            tags={"tenant": f"t{number % 4}", "odd": 'a"b\\%_' if number % 5 == 0 else "plain"}
            | ({"aws:region": "eu"} if number == 13 else {}),
            source="scheduled" if number % 7 == 0 else "manual",
            run_at=bench.now + timedelta(hours=9) if number % 8 == 0 else None,
        )
    claimed = await bench.claim(20, names={"job": "thread", "mail": "thread"})
    for number, task in enumerate(claimed):
        if number % 4:
            status = (TaskStatus.SUCCESS, TaskStatus.FAILED, TaskStatus.CANCELLED)[number % 3]
            await bench.finish(task, status, error=f"Broken pipe {number}" if status is TaskStatus.FAILED else None)


WHERE: dict[str, tuple[TaskFilter, Any]] = {
    "everything": (TaskFilter(), lambda r: True),
    "one status": (TaskFilter(statuses=(TaskStatus.SUCCESS,)), lambda r: r.status == "success"),
    "pending, delayed ones too": (TaskFilter(statuses=(TaskStatus.PENDING,)), lambda r: r.status == "pending"),
    "two statuses": (
        TaskFilter(statuses=(TaskStatus.RUNNING, TaskStatus.FAILED)),
        lambda r: r.status in ("running", "failed"),
    ),
    "a status named twice": (
        TaskFilter(statuses=(TaskStatus.SUCCESS, TaskStatus.SUCCESS)),
        lambda r: r.status == "success",
    ),
    "name": (TaskFilter(func_name="mail"), lambda r: r.func_name == "mail"),
    "queue": (TaskFilter(queue="slow"), lambda r: r.queue == "slow"),
    "name and queue": (TaskFilter(func_name="job", queue="slow"), lambda r: r.func_name == "job" and r.queue == "slow"),
    "status, name and queue": (
        TaskFilter(statuses=(TaskStatus.PENDING,), func_name="mail", queue="default"),
        lambda r: r.status == "pending" and r.func_name == "mail" and r.queue == "default",
    ),
    "source": (TaskFilter(source="scheduled"), lambda r: r.source == "scheduled"),
    "tag": (TaskFilter(tags=(("tenant", "t1"),)), lambda r: r.tags["tenant"] == "t1"),
    "odd tag": (TaskFilter(tags=(("odd", 'a"b\\%_'),)), lambda r: r.tags["odd"] == 'a"b\\%_'),
    "two tags": (
        TaskFilter(tags=(("tenant", "t0"), ("odd", "plain"))),
        lambda r: r.tags == {"tenant": "t0", "odd": "plain"},
    ),
    "tag in another case": (TaskFilter(tags=(("tenant", "T1"),)), lambda r: False),
    "tag with colons in its key": (TaskFilter(tags=(("aws", "region:eu"),)), lambda r: "aws:region" in r.tags),
    "no such tag": (TaskFilter(tags=(("tenant", "t"),)), lambda r: False),
    "since": (TaskFilter(since=START + timedelta(minutes=5)), lambda r: r.created_at >= START + timedelta(minutes=5)),
    "until": (TaskFilter(until=START + timedelta(minutes=5)), lambda r: r.created_at <= START + timedelta(minutes=5)),
    "since and status": (
        TaskFilter(since=START + timedelta(minutes=3), statuses=(TaskStatus.SUCCESS,)),
        lambda r: r.created_at >= START + timedelta(minutes=3) and r.status == "success",
    ),
    "text in the name": (TaskFilter(text="mai"), lambda r: "mai" in r.func_name),
    "text in the error": (TaskFilter(text="roken pip"), lambda r: r.error is not None),
    "text in a tag": (TaskFilter(text="t2"), lambda r: r.tags["tenant"] == "t2"),
    "text with wildcards": (TaskFilter(text="\\%_"), lambda r: "%" in r.tags["odd"]),
    "text that is nowhere": (TaskFilter(text="%"), lambda r: "%" in r.tags["odd"]),
}


@pytest.mark.parametrize("case", WHERE)
async def test_pages_show_what_their_filter_says_each_task_once_newest_first(bench: Bench, case: str) -> None:
    await stock(bench)
    everything = await all_tasks(bench.backend, limit=500)
    assert len(everything) == 40
    where, belongs = WHERE[case]
    expected = [record for record in everything if belongs(record)]
    for limit in (1, 7, 500):
        found = await all_tasks(bench.backend, where, limit)
        assert [record.task_id for record in found] == [record.task_id for record in expected]
    order = [(record.created_at, record.task_id) for record in expected]
    assert order == sorted(order, reverse=True)


async def test_a_task_is_found_by_the_start_of_its_id(bench: Bench) -> None:
    await bench.accept(make_draft(task_id="0199-abc"), make_draft(task_id="0199-abd"), make_draft(task_id="x-0199"))
    found = await all_tasks(bench.backend, TaskFilter(text="0199-ab"))
    assert {record.task_id for record in found} == {"0199-abc", "0199-abd"}


async def test_a_walk_through_the_pages_is_complete_while_tasks_are_added(bench: Bench) -> None:
    old = {await bench.add() for _ in range(30)}
    seen: list[str] = []
    before: Cursor | None = None
    while True:
        page = await bench.backend.page(TaskFilter(), before, 4)
        seen += [record.task_id for record in page.tasks]
        bench.pass_time(1)
        await bench.add()
        if (before := page.older) is None:
            break
    assert len(seen) == len(set(seen))
    assert set(seen) == old


async def test_pages_part_tasks_of_the_same_moment_cleanly(bench: Bench) -> None:
    ids = [make_draft() for _ in range(25)]
    await bench.accept(*ids)
    found = [record.task_id for record in await all_tasks(bench.backend, limit=3)]
    assert found == sorted((draft.task_id for draft in ids), reverse=True)


async def test_a_page_that_holds_everything_says_that_nothing_is_older(bench: Bench) -> None:
    for _ in range(3):
        await bench.add()
    assert (await bench.backend.page(TaskFilter(), None, 3)).older is None
    page = await bench.backend.page(TaskFilter(), None, 2)
    assert page.older is not None
    assert Cursor.parse(str(page.older)) == page.older


async def test_a_page_leaves_out_what_only_one_task_s_own_page_needs(bench: Bench) -> None:
    task_id = await bench.add(arguments='[["long"],{}]')
    (listed,) = (await bench.backend.page(TaskFilter(), None, 5)).tasks
    assert listed == replace(await bench.get(task_id), arguments=None, stacktrace=None)


# -- logs and progress


async def test_log_lines_keep_their_order_and_are_read_on_from_any_of_them(bench: Bench) -> None:
    task_id = await bench.add()
    lines = [LogLine(task_id, bench.now, "info", 0, f"line {n}", json.dumps({"n": n})) for n in range(5)]
    await bench.turn(logs=lines[:3])
    await bench.turn(logs=[*lines[3:], LogLine("another", bench.now, "error", 1, "not mine")])
    first = await bench.backend.logs(task_id, 0, 2)
    rest = await bench.backend.logs(task_id, first[-1].seq, 10)
    assert [line.message for line in [*first, *rest]] == [f"line {n}" for n in range(5)]
    assert (rest[0].extra, rest[0].level, rest[0].attempt, rest[0].time) == ({"n": 2}, "info", 0, bench.now)


async def test_progress_is_shown_while_its_attempt_runs_and_only_from_its_owner(bench: Bench) -> None:
    task_id = await bench.add(max_attempts=3)
    task = await bench.claim_one()
    await bench.turn(progress=[Progress(task_id, 1, '{"done": 3, "total": 9}')])
    assert (await bench.get(task_id)).progress == {"done": 3, "total": 9}
    await Bench(bench.backend, "two", now=bench.now).turn(progress=[Progress(task_id, 1, '{"done": 4}')])
    await bench.turn(progress=[Progress(task_id, 2, '{"done": 5}')])
    assert (await bench.get(task_id)).progress == {"done": 3, "total": 9}
    await bench.finish(task, TaskStatus.PENDING, run_at=bench.now)
    await bench.claim_one()
    assert (await bench.get(task_id)).progress is None


# -- instances


async def test_an_instance_is_seen_with_its_lease_and_with_another_stamp_after_each_heartbeat(bench: Bench) -> None:
    me = make_instance("one", machine="here", pid=77, birth="b")
    stamps = []
    for seconds in (0, 20, 0, 0, -3600):  # the clock stands still, then is put back
        bench.pass_time(seconds)
        bench.beat(30, me)
        (pulse,) = bench.backend.pulses()
        assert (pulse.instance, round(pulse.lease, 3), pulse.signed_off) == (me, 30.0, False)
        stamps.append(pulse.stamp)
    assert len({*stamps}) == len(stamps)
    (shown,) = await bench.backend.instances()
    assert (shown.instance_id, shown.pid, shown.started, shown.heartbeat) == ("one", 77, START, bench.now)
    assert (shown.slots, shown.running, shown.vitals) == (4, 0, None)


async def test_how_an_instance_is_comes_with_its_heartbeat(bench: Bench) -> None:
    for vitals in (Vitals({"async": (3, 1_000)}, 7, 0.002, 84_000_000), Vitals({}), None):
        bench.pass_time(10)
        bench.backend.beat(make_instance("one"), Beat(bench.now, bench.now + timedelta(seconds=30), 4, 3, vitals))
        (shown,) = await bench.backend.instances()
        assert shown.vitals == vitals


async def test_nothing_stays_of_an_instance_that_left_and_it_may_come_again(bench: Bench) -> None:
    bench.beat()
    bench.backend.leave("one")
    assert bench.backend.pulses() == []
    assert await bench.backend.instances() == []
    bench.beat()
    assert [pulse.signed_off for pulse in bench.backend.pulses()] == [False]


async def test_an_instance_that_left_tasks_running_is_seen_until_they_are_rescued(bench: Bench) -> None:
    bench.beat()
    await bench.add()
    await bench.claim_one()
    bench.backend.leave("one")
    assert [(pulse.instance.instance_id, pulse.signed_off) for pulse in bench.backend.pulses()] == [("one", True)]
    await bench.rescue("one")
    assert bench.backend.pulses() == []


async def test_an_instance_without_a_row_is_seen_by_what_it_runs(bench: Bench) -> None:
    await bench.add()
    await bench.claim_one()
    (pulse,) = bench.backend.pulses()
    assert (pulse.instance.instance_id, pulse.stamp, pulse.lease, pulse.signed_off) == ("one", 0, 0, False)
    assert (await bench.rescue("one")).changed == 1


async def test_who_beats_again_before_the_rescue_is_alive(bench: Bench) -> None:
    bench.beat()
    task_id = await bench.add()
    await bench.claim_one()
    (seen,) = bench.backend.pulses()
    bench.beat()
    assert (await bench.obey(Rescue({"one": seen.stamp}))).changed == 0
    bench.backend.leave("one", seen.stamp)
    assert await bench.status(task_id) is TaskStatus.RUNNING
    assert len(await bench.backend.instances()) == 1


# -- several instances


async def test_what_was_added_before_the_clock_was_put_back_does_not_wait_for_that_time_to_come_again(
    bench: Bench,
) -> None:
    draft = make_draft(at=bench.now)
    bench.pass_time(-3600)
    await bench.accept(draft)
    assert (await bench.claim_one()).task_id == draft.task_id


async def test_a_second_instance_sees_what_the_first_has_written(shared_location: str) -> None:
    here, there = open_backend(shared_location), open_backend(shared_location)
    await here.open()
    await there.open()
    task_id = await Bench(here).add()
    assert (await Bench(there).get(task_id)).task_id == task_id
    await Bench(there).cancel(task_id)
    assert await Bench(here).status(task_id) is TaskStatus.CANCELLED
    await here.close()
    await there.close()


async def claim_all(location: str, instance: str) -> list[str]:
    """Claims and finishes until nothing is left; every id this instance was given."""
    backend = open_backend(location)
    await patiently(backend.open)
    bench = Bench(backend, instance)
    claimed: list[str] = []
    held: list[Claimed] = []
    while True:
        finishes = [make_finish(task, TaskStatus.SUCCESS, bench.now) for task in held]
        result = await patiently(bench.turn, finishes=finishes, demand=Demand({"job": "thread"}, {"thread": 7}))
        assert not result.refused
        held = list(result.claimed)
        claimed += [task.task_id for task in held]
        if not held:
            await backend.close()
            return claimed


async def patiently(do: Any, **parts: Any) -> Any:
    """As the journal does: what a busy database refused is tried again."""
    for _ in range(200):
        try:
            return await do(**parts)
        except BackendUnavailable:
            await asyncio.sleep(0.01)
    raise AssertionError("the database stayed busy")


def claim_all_here(location: str, instance: str) -> list[str]:
    return asyncio.run(claim_all(location, instance))


@pytest.mark.parametrize("where", ["threads", "processes"])
async def test_instances_that_claim_at_the_same_time_get_disjoint_tasks(shared_location: str, where: str) -> None:
    backend = open_backend(shared_location)
    await backend.open()
    bench = Bench(backend)
    await bench.accept(*[make_draft(task_id=next_id("shared")) for _ in range(600)])
    loop = asyncio.get_running_loop()
    if where == "threads":
        claims = await asyncio.gather(
            *[asyncio.to_thread(claim_all_here, shared_location, name) for name in ("two", "three")]
        )
    else:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            claims = await asyncio.gather(
                *[loop.run_in_executor(pool, claim_all_here, shared_location, name) for name in ("two", "three")]
            )
    ids = [task_id for claimed in claims for task_id in claimed]
    assert len(ids) == len(set(ids)) == 600
    starts = Counter(event.kind for event in await backend.events_after(0, 10_000))
    assert starts == {"accepted": 600, "started": 600, "succeeded": 600}
    await assert_counters_match_rows(backend, bench.now)
    await backend.close()


async def test_every_event_kind_of_the_core_belongs_to_an_allowed_transition(backend: Backend) -> None:
    """What the state machine checks at random, once in full: kinds that end an attempt go where TRANSITIONS allows."""
    ends = {
        EventKind.SUCCEEDED: TaskStatus.SUCCESS,
        EventKind.FAILED: TaskStatus.FAILED,
        EventKind.CANCELLED: TaskStatus.CANCELLED,
        EventKind.INTERRUPTED: TaskStatus.INTERRUPTED,
        EventKind.RETRYING: TaskStatus.PENDING,
        EventKind.RESCUED: TaskStatus.PENDING,
    }
    assert set(ends.values()) == TRANSITIONS[TaskStatus.RUNNING]
