"""The rules of a turn without any store: from what arrived and a snapshot to what changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from app.taskflow.backends.base import Cancel, Claimed, DeclareQueues, Demand, Rescue, Turn
from app.taskflow.backends.changes import Applied, Changes, Level, Snapshot, StoredQueue, StoredTask
from app.taskflow.models import QueueConfig, TaskStatus, to_micros
from app.taskflow.rules.limits import Levels, Limits
from app.taskflow.rules.turns import decide, wants

from .helpers import START, make_draft, make_finish

NOW = to_micros(START)
THREADS = Demand({"job": "thread", "other": "async"}, {"thread": 10, "async": 10})


def stored(task_id: str = "known", **facts: Any) -> StoredTask:
    values: dict[str, Any] = {
        "name": "job",
        "queue": "default",
        "priority": None,
        "executor": "thread",
        "status": "pending",
        "attempt": 0,
        "excused": 0,
        "crashes": 0,
        "max_attempts": 1,
        "created_at": NOW,
        "run_at": NOW,
        "started_at": None,
        "finished_at": None,
        "instance": None,
        "requeue": False,
        "cancel_requested": False,
        "arguments": "[[],{}]",
        "tags": "{}",
        "error": None,
        "trace": None,
    }
    return StoredTask(task_id=task_id, **{**values, **facts})


def running(task_id: str = "known", instance: str = "me", **facts: Any) -> StoredTask:
    values = {"status": "running", "attempt": 1, "instance": instance, "started_at": NOW}
    return stored(task_id, **{**values, **facts})


def held(row: StoredTask) -> Claimed:
    attempt = (row.attempt, row.excused, row.max_attempts, START, row.arguments)
    return Claimed(row.task_id, row.name, row.queue, row.executor, *attempt, {}, False, None, START)


def queue(
    name: str = "mail", *, concurrency: int | None = None, max_size: int | None = None, paused: bool = False
) -> Any:
    return StoredQueue(name, concurrency, max_size, paused, None, None)


def shown(
    *rows: StoredTask, levels: Sequence[Level] = (), queues: Sequence[StoredQueue] = (), **facts: Any
) -> Snapshot:
    tasks = {row.task_id: row for row in rows}
    return Snapshot(levels=levels, queues={each.name: each for each in queues}, tasks=tasks, **facts)


def kinds(changes: Changes) -> list[str]:
    return [event.kind for event in changes.events]


# -- what has to be seen


def test_what_its_sender_knows_for_sure_is_not_looked_at_before_it_turns_out_otherwise() -> None:
    finish = make_finish(held(running()), TaskStatus.SUCCESS, START)
    turn = Turn(START, "me", finishes=[finish], drafts=[make_draft(task_id="new")], demand=THREADS)
    assert wants(turn, careful=False).tasks == []
    assert wants(turn, careful=True).tasks == ["new", "known"]


def test_keys_and_what_commands_are_about_are_looked_at() -> None:
    turn = Turn(START, "me", drafts=[make_draft(task_id="keyed", key="k")], commands=[Cancel("known", None)])
    assert wants(turn, careful=False).tasks == ["keyed", "known"]


# -- how attempts end


@pytest.mark.parametrize(
    ("row", "refused"),
    [
        pytest.param(running(), False, id="it still runs here"),
        pytest.param(running(instance="other"), True, id="it runs elsewhere"),
        pytest.param(running(attempt=2), True, id="another attempt runs"),
        pytest.param(stored(status="interrupted", attempt=1, instance="me"), True, id="it was rescued"),
        pytest.param(None, True, id="it is gone"),
    ],
)
def test_a_result_counts_while_its_lease_holds(row: StoredTask | None, refused: bool) -> None:
    finish = make_finish(held(running()), TaskStatus.SUCCESS, START)
    decision = decide(Turn(START, "me", finishes=[finish]), shown(*([row] if row else [])), careful=True)
    assert decision.result(Applied()).refused == ({("known", 1)} if refused else set())
    assert kinds(decision.changes) == (["lease_lost"] if refused else ["succeeded"])
    assert dict(decision.changes.counts) == (
        {} if refused else {("default", "job", "running"): -1, ("default", "job", "success"): 1}
    )


def test_what_was_asked_to_stop_does_not_wait_again() -> None:
    again = make_finish(held(running(max_attempts=5)), TaskStatus.PENDING, START, run_at=START)
    snapshot = shown(running(max_attempts=5, cancel_requested=True))
    decision = decide(Turn(START, "me", finishes=[again]), snapshot, careful=True)
    assert [ending.status for ending in decision.changes.endings] == ["cancelled"]
    assert decision.result(Applied()).withdrawn == {("known", 1)}


def test_a_command_sees_what_the_turn_has_already_made_of_its_task() -> None:
    finish = make_finish(held(running()), TaskStatus.SUCCESS, START)
    turn = Turn(START, "me", finishes=[finish], commands=[Cancel("known", "ann"), Cancel("known", "bob")])
    decision = decide(turn, shown(running()), careful=False)
    assert [answer.before for answer in decision.answers] == [TaskStatus.SUCCESS, TaskStatus.SUCCESS]
    assert decision.changes.updates == {}


def test_two_commands_on_one_task_write_it_once() -> None:
    turn = Turn(START, "me", commands=[Cancel("known", "ann"), Cancel("known", "bob")])
    decision = decide(turn, shown(stored()), careful=False)
    assert [answer.changed for answer in decision.answers] == [1, 0]
    assert kinds(decision.changes) == ["cancelled"]


# -- what becomes of arrivals


@pytest.mark.parametrize(
    ("demand", "levels", "queues", "status"),
    [
        pytest.param(THREADS, [], [], "running", id="a slot is free and nothing waits"),
        pytest.param(None, [], [], "pending", id="this process runs nothing"),
        pytest.param(Demand({"other": "async"}, {"async": 1}), [], [], "pending", id="its name is not known here"),
        pytest.param(THREADS, [("mail", "job", "pending", 1)], [], "pending", id="another waits before it"),
        pytest.param(THREADS, [], [queue(paused=True)], "pending", id="the queue is paused"),
        pytest.param(
            THREADS, [("mail", "job", "running", 2)], [queue(concurrency=2)], "pending", id="the queue is at its limit"
        ),
        pytest.param(
            THREADS, [("mail", "job", "running", 1)], [queue(concurrency=2)], "running", id="the queue has one place"
        ),
        pytest.param(None, [("mail", "job", "pending", 3)], [queue(max_size=3)], "rejected", id="the queue is full"),
    ],
)
def test_a_task_that_arrives(
    demand: Demand | None, levels: Sequence[Level], queues: Sequence[StoredQueue], status: str
) -> None:
    turn = Turn(START, "me", drafts=[make_draft(task_id="new", queue="mail")], demand=demand)
    decision = decide(turn, shown(levels=levels, queues=queues), careful=False)
    assert [insert.status for insert in decision.changes.inserts] == [status]
    assert decision.admitted.rejected == ({"new": 3} if status == "rejected" else {})


def test_a_queue_is_filled_to_its_size_and_no_further_by_one_turn() -> None:
    drafts = [make_draft(queue="mail") for _ in range(5)]
    decision = decide(Turn(START, "me", drafts=drafts), shown(queues=[queue(max_size=3)]), careful=False)
    assert [insert.status for insert in decision.changes.inserts] == ["pending"] * 3 + ["rejected"] * 2
    assert decision.changes.ceilings["mail"].pending == 3


@pytest.mark.parametrize(
    ("status", "rearmed"),
    [("failed", True), ("interrupted", True), ("rejected", True), ("success", False), ("running", False)],
)
def test_a_key_that_comes_again_runs_its_task_again_only_where_it_had_no_success(status: str, rearmed: bool) -> None:
    draft = make_draft(task_id="known", key="k", arguments='[["new"],{}]')
    decision = decide(Turn(START, "me", drafts=[draft]), shown(stored(status=status, attempt=1)), careful=False)
    assert decision.admitted.existing == {"known"}
    assert bool(decision.changes.updates) is rearmed
    assert decision.changes.inserts == []
    if rearmed:
        values: Mapping[str, Any] = decision.changes.updates["known"].values
        assert (values["status"], values["arguments"], values["excused"]) == ("pending", '[["new"],{}]', 1)


# -- rescue


@pytest.mark.parametrize(
    ("row", "status"),
    [
        pytest.param(running(instance="gone"), "interrupted", id="once only"),
        pytest.param(running(instance="gone", requeue=True), "pending", id="may be started again"),
        pytest.param(running(instance="gone", requeue=True, crashes=2), "failed", id="its third crash"),
        pytest.param(running(instance="gone", requeue=True, cancel_requested=True), "cancelled", id="was to stop"),
    ],
)
def test_what_a_lost_instance_left(row: StoredTask, status: str) -> None:
    turn = Turn(START, "me", commands=[Rescue({"gone": 7})])
    decision = decide(turn, Snapshot(left=[row]), careful=False)
    assert decision.changes.updates["known"].values["status"] == status
    assert decision.changes.stamps == {"gone": 7}
    assert [moved.status.value for moved in decision.changes.moved] == [status]


# -- limits


def wished(demand: Demand, levels: Sequence[Level], *queues: StoredQueue, closed: frozenset[str] = frozenset()) -> Any:
    found = Levels(levels)
    limits = Limits(demand, {each.name: each for each in queues}, closed, found)
    return limits.wishes(0, found), limits


def test_slots_are_shared_among_queues_and_given_away_once() -> None:
    levels = [("a", "job", "pending", 8), ("b", "job", "pending", 8)]
    wishes, _ = wished(THREADS, levels)
    assert [(wish.queue, wish.most) for wish in wishes] == [("a", 8), ("b", 2)]


def test_a_queue_with_a_limit_gives_what_the_limit_leaves() -> None:
    levels = [("mail", "job", "pending", 8), ("mail", "job", "running", 3)]
    (wish,), limits = wished(THREADS, levels, queue(concurrency=5))
    assert (wish.most, limits.more) == (2, False)


def test_nothing_is_taken_from_a_limited_queue_that_others_hold() -> None:
    wishes, limits = wished(THREADS, [("mail", "job", "pending", 8)], queue(concurrency=5), closed=frozenset({"mail"}))
    assert (wishes, limits.more) == ([], True)


def test_names_that_nobody_here_knows_are_never_wished_for_and_are_told() -> None:
    wishes, limits = wished(THREADS, [("a", "newer", "pending", 5)])
    assert (wishes, limits.unknown) == ([], {"newer"})


def test_a_declaration_takes_effect_in_its_own_turn() -> None:
    turn = Turn(
        START,
        "me",
        commands=[DeclareQueues({"mail": QueueConfig(max_size=1)})],
        drafts=[make_draft(queue="mail"), make_draft(queue="mail")],
    )
    decision = decide(turn, shown(), careful=False)
    assert [insert.status for insert in decision.changes.inserts] == ["pending", "rejected"]
