"""What holds of every store that several processes share: races between two of them, and who hears of what.

`test_backend_conformance.py` is the contract of one; here two open the same store, as two processes would.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from functools import partial
from time import monotonic

import pytest

from app.taskflow import QueueConfig, TaskManager, TaskStatus
from app.taskflow.backends import Backend, open_backend
from app.taskflow.backends.base import Cancel, DeclareQueues, Demand, Requeue, Supersede

from .helpers import (
    PATIENCE,
    START,
    Bench,
    all_tasks,
    assert_counters_match_rows,
    eventually,
    make_draft,
    make_finish,
)

pytestmark = pytest.mark.anyio

ROUNDS = 20
DEMAND = Demand({"job": "thread"}, {"thread": 100})


@pytest.fixture
async def benches(shared_location: str) -> AsyncIterator[tuple[Bench, Bench]]:
    """Two instances in front of one store, each with connections of its own."""
    backends = [open_backend(shared_location) for _ in range(2)]
    for backend in backends:
        await backend.open()
    one, two = backends
    yield Bench(one, "one"), Bench(two, "two")
    for backend in backends:
        await backend.close()


async def test_a_task_that_two_claim_at_once_is_had_by_one(benches: tuple[Bench, Bench]) -> None:
    one, two = benches
    drafts = [make_draft() for _ in range(200)]
    await one.accept(*drafts)
    claimed: list[str] = []
    while len(claimed) < 200:
        results = await asyncio.gather(one.claim(30), two.claim(30))
        claimed += [task.task_id for tasks in results for task in tasks]
    assert sorted(claimed) == [draft.task_id for draft in drafts]
    await assert_counters_match_rows(one.backend, one.now)


async def test_of_many_who_bring_one_key_at_once_one_makes_the_task(benches: tuple[Bench, Bench]) -> None:
    for number in range(ROUNDS):
        draft = make_draft(task_id=f"keyed-{number}", key="k")
        results = await asyncio.gather(*(bench.accept(draft) for bench in benches))
        assert sum(draft.task_id in result.existing for result in results) == 1
    assert len(await all_tasks(benches[0].backend)) == ROUNDS
    await assert_counters_match_rows(benches[0].backend, START)


async def test_a_key_that_two_arm_again_at_once_runs_once_more(benches: tuple[Bench, Bench]) -> None:
    one, two = benches
    for number in range(ROUNDS):
        draft = make_draft(task_id=f"keyed-{number}", key="k")
        await one.accept(draft)
        (task,) = await one.claim()
        await one.finish(task, TaskStatus.FAILED)
        await asyncio.gather(one.accept(draft), two.accept(draft))
        assert (await one.kinds(draft.task_id)).count("requeued") == 1
        (again,) = await two.claim()
        await two.finish(again)
    await assert_counters_match_rows(one.backend, one.now)


async def test_a_task_is_cancelled_or_claimed_and_never_both(benches: tuple[Bench, Bench]) -> None:
    one, two = benches
    for _ in range(ROUNDS):
        task_id = await one.add()
        answer, claimed = await asyncio.gather(one.cancel(task_id), two.claim())
        record = await one.get(task_id)
        if answer.before is TaskStatus.PENDING:
            assert (record.status, claimed) == (TaskStatus.CANCELLED, [])
        else:
            assert (record.status, record.cancel_requested) == (TaskStatus.RUNNING, True)
            await two.finish(claimed[0])
    await assert_counters_match_rows(one.backend, one.now)


async def test_a_result_and_a_rescue_at_once_leave_one_end(benches: tuple[Bench, Bench]) -> None:
    one, two = benches
    for _ in range(ROUNDS):
        task_id = await one.add()
        task = await one.claim_one()
        written, _ = await asyncio.gather(one.finish(task), two.rescue("one"))
        status = await one.status(task_id)
        assert status is (TaskStatus.SUCCESS if written else TaskStatus.INTERRUPTED)
    await assert_counters_match_rows(one.backend, one.now)


async def test_a_retry_and_a_cancel_at_once_never_run_what_was_asked_to_stop(benches: tuple[Bench, Bench]) -> None:
    one, two = benches
    for _ in range(ROUNDS):
        task_id = await one.add(max_attempts=5)
        task = await one.claim_one()
        again = make_finish(task, TaskStatus.PENDING, one.now, run_at=one.now)
        await asyncio.gather(one.turn(finishes=[again]), two.cancel(task_id))
        assert await one.status(task_id) is TaskStatus.CANCELLED
    await assert_counters_match_rows(one.backend, one.now)


async def test_two_retries_at_once_make_one(benches: tuple[Bench, Bench]) -> None:
    one, two = benches
    for _ in range(ROUNDS):
        task_id = await one.become(TaskStatus.FAILED)
        answers = await asyncio.gather(*(bench.obey(Requeue(task_id, 1, None)) for bench in benches))
        assert sum(answer.changed for answer in answers) == 1
        await two.obey(Cancel(task_id, None))
    await assert_counters_match_rows(one.backend, one.now)


async def test_a_queue_never_runs_more_than_it_allows_on_both_together(benches: tuple[Bench, Bench]) -> None:
    one, two = benches
    await one.turn(commands=[DeclareQueues({"mail": QueueConfig(concurrency=3)})])
    await one.accept(*[make_draft(queue="mail") for _ in range(60)])
    done = 0
    while done < 60:
        results = await asyncio.gather(one.claim(), two.claim())
        running = [*((one, task) for task in results[0]), *((two, task) for task in results[1])]
        assert len(running) <= 3
        await asyncio.gather(*(bench.finish(task) for bench, task in running))
        done += len(running)
    await assert_counters_match_rows(one.backend, one.now)


async def test_what_starts_at_once_counts_for_the_queue_too(benches: tuple[Bench, Bench]) -> None:
    one, two = benches
    await one.turn(commands=[DeclareQueues({"mail": QueueConfig(concurrency=1)})])
    for _ in range(ROUNDS):
        turns = (bench.turn(drafts=[make_draft(queue="mail")], demand=DEMAND) for bench in benches)
        results = await asyncio.gather(*turns)
        claimed = [(bench, task) for bench, result in zip(benches, results, strict=True) for task in result.claimed]
        assert len(claimed) == 1
        for bench, task in claimed:
            await bench.finish(task)
        (rest,) = await two.claim()
        await two.finish(rest)


async def test_exactly_as_many_wait_in_a_queue_as_may(benches: tuple[Bench, Bench]) -> None:
    await benches[0].turn(commands=[DeclareQueues({"mail": QueueConfig(max_size=25)})])

    async def add(bench: Bench) -> int:
        result = await bench.accept(make_draft(queue="mail"))
        return len(result.rejected)

    rejected = await asyncio.gather(*(add(benches[number % 2]) for number in range(60)))
    assert sum(rejected) == 35
    found = Counter(record.status for record in await all_tasks(benches[0].backend))
    assert found == {TaskStatus.PENDING: 25, TaskStatus.REJECTED: 35}
    await assert_counters_match_rows(benches[0].backend, START)


async def test_of_two_who_set_one_run_key_at_once_one_waits(benches: tuple[Bench, Bench]) -> None:
    for number in range(ROUNDS):
        drafts = [make_draft(run_at=START.replace(year=2027))._replace(run_key=f"deadline-{number}") for _ in benches]
        pairs = zip(benches, drafts, strict=True)
        await asyncio.gather(*(bench.turn(commands=[Supersede(draft)], drafts=[draft]) for bench, draft in pairs))
        waiting = [item.run_key for item in await benches[0].backend.scheduled(None, None, 1_000)]
        assert waiting.count(f"deadline-{number}") == 1
    await assert_counters_match_rows(benches[0].backend, START)


async def test_the_feed_passes_no_event_that_is_not_there_yet(benches: tuple[Bench, Bench]) -> None:
    seen: list[int] = []
    writing = True

    async def read() -> None:
        while writing or len(seen) < 400:
            seen.extend(event.seq for event in await benches[0].backend.events_after(max(seen, default=0), 50))
            await asyncio.sleep(0)

    async def write(bench: Bench) -> None:
        for _ in range(100):
            await bench.accept(make_draft(), make_draft())

    reader = asyncio.create_task(read())
    await asyncio.gather(*map(write, benches))
    writing = False
    async with asyncio.timeout(PATIENCE):
        await reader
    assert len(seen) == len(set(seen)) == 400


# -- whole managers


def define(manager: TaskManager) -> None:
    @manager.task
    async def quick(number: int) -> int:
        return number


async def start(location: str, *, runs: bool) -> TaskManager:
    manager = TaskManager(snapshot_db=location, shutdown_timeout=5.0)
    manager.runs_tasks = runs
    define(manager)
    await manager.startup()
    return manager


async def test_a_worker_hears_at_once_of_what_another_process_accepts(shared_location: str) -> None:
    """Not after the poll, whose interval is a second."""
    accepts, works = await start(shared_location, runs=False), await start(shared_location, runs=True)
    try:
        await eventually(lambda: works.unready() is None)
        await asyncio.sleep(0.3)  # for those who listen on a connection: until they do
        quick = accepts.registry.named("quick").function
        waits: list[float] = []
        for number in range(20):
            began = monotonic()
            task_id = await accepts.enqueue(quick, number)
            await eventually(partial(ended, accepts.backend, task_id))
            waits.append(monotonic() - began)
            await asyncio.sleep(0.05)
        assert sorted(waits)[10] < 0.3, waits
    finally:
        await accepts.shutdown()
        await works.shutdown()


async def ended(backend: Backend, task_id: str) -> bool:
    record = await backend.get(task_id)
    return record is not None and record.status.terminal


async def test_any_instance_answers_for_any_task(shared_location: str) -> None:
    accepts, works = await start(shared_location, runs=False), await start(shared_location, runs=True)
    try:
        quick = accepts.registry.named("quick").function
        ids: Sequence[str] = await asyncio.gather(*(accepts.enqueue(quick, number) for number in range(50)))
        assert [await accepts.result(task_id, PATIENCE) for task_id in ids] == list(range(50))
        assert {record.instance_id for record in await accepts.store.instances()} == {
            accepts.instance_id,
            works.instance_id,
        }
        same: Sequence[str] = await asyncio.gather(
            *(
                manager.enqueue(manager.registry.named("quick").function, 7, idempotency_key="k")
                for manager in (accepts, works)
                for _ in range(32)
            )
        )
        assert len(set(same)) == 1
    finally:
        await accepts.shutdown()
        await works.shutdown()
