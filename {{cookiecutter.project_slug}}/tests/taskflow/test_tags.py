"""Tags are an index of every store: a task of any age is found by them, at the cost of what is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app.taskflow.backends import open_backend
from app.taskflow.backends.base import Backend, Purge
from app.taskflow.backends.search import is_search, walked_by
from app.taskflow.backends.sql import SqlBackend
from app.taskflow.copying import batches
from app.taskflow.models import TaskFilter, TaskStatus

from .conftest import LOCATIONS, SHARED
from .helpers import START, Bench, all_tasks, assert_tags_match_rows, make_draft, tag_entries

pytestmark = pytest.mark.anyio

WINDOW = 10
ACME = ("tenant", "acme")


@pytest.fixture
def bench(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """In front of a store that looks for what has no index among so few of the newest tasks."""
    module = "pages" if isinstance(backend, SqlBackend) else "redis"
    monkeypatch.setattr(f"app.taskflow.backends.{module}.SEARCH_WINDOW", WINDOW)
    return Bench(backend)


async def find(bench: Bench, *tags: tuple[str, str], limit: int = 3, **others: Any) -> list[str]:
    found = await all_tasks(bench.backend, TaskFilter(tags=tags, **others), limit)
    return [record.task_id for record in found]


async def bury(bench: Bench, number: int = 3 * WINDOW, **facts: Any) -> None:
    """Under newer tasks."""
    bench.pass_time(1)
    await bench.accept(*(make_draft(at=bench.now, **facts) for _ in range(number)))


async def test_a_tag_is_found_behind_any_number_of_newer_tasks(bench: Bench) -> None:
    wanted = await bench.add(tags={"tenant": "acme"})
    await bury(bench)
    await bury(bench, tags={"tenant": "other", "acme": "tenant"})
    assert await find(bench, ACME) == [wanted]
    assert await find(bench, ("tenant", "nobody")) == []


async def test_tasks_of_one_tag_and_one_moment_are_parted_cleanly(bench: Bench) -> None:
    drafts = [make_draft(tags={"tenant": "acme"}) for _ in range(25)]
    await bench.accept(*drafts)
    await bury(bench)
    assert await find(bench, ACME) == sorted((draft.task_id for draft in drafts), reverse=True)


@pytest.mark.parametrize("tags", [(ACME, ("env", "live")), (("env", "live"), ACME)], ids=["rare first", "rare last"])
async def test_of_several_tags_a_task_has_each_whichever_is_rare(bench: Bench, tags: Sequence[tuple[str, str]]) -> None:
    old = await bench.add(tags={"tenant": "acme", "env": "live"})
    await bury(bench, tags={"env": "live"})
    new = await bench.add(tags={"tenant": "acme", "env": "live", "more": "x"})
    await bury(bench, tags={"tenant": "acme", "env": "test"})
    assert await find(bench, *tags, limit=1) == [new, old]
    assert await find(bench, *tags, ("more", "x")) == [new]
    assert await find(bench, *tags, ("no", "such")) == []
    assert await find(bench, ACME, ACME, ("env", "live")) == [new, old]


async def test_other_parts_of_a_filter_narrow_a_tag_behind_any_number_of_newer_tasks(bench: Bench) -> None:
    facts: dict[str, Any] = {"tags": {"tenant": "acme"}, "source": "scheduled", "queue": "slow"}
    task_id = await bench.become(TaskStatus.FAILED, **facts)
    await bench.become(TaskStatus.CANCELLED, tags={"tenant": "acme"})
    await bury(bench, name="mail")
    for others in (
        {"statuses": (TaskStatus.FAILED,)},
        {"statuses": (TaskStatus.FAILED, TaskStatus.RUNNING), "queue": "slow"},
        {"queue": "slow"},
        {"source": "scheduled", "func_name": "job"},
        {"attempts": (">", 0)},
        {"task_id": task_id},
    ):
        assert await find(bench, ACME, **others) == [task_id], others
    assert await find(bench, ACME, func_name="mail") == []


async def test_a_tag_is_found_between_two_moments(bench: Bench) -> None:
    ids = []
    for _ in range(6):
        ids.append(await bench.add(tags={"tenant": "acme"}))
        bench.pass_time(10)
    await bury(bench)
    since, until = START + timedelta(seconds=10), START + timedelta(seconds=40)
    assert await find(bench, ACME, since=since) == ids[:0:-1]
    assert await find(bench, ACME, until=until) == ids[4::-1]
    assert await find(bench, ACME, since=since, until=until, limit=1) == ids[4:0:-1]


@pytest.mark.parametrize(
    ("tags", "asked", "others"),
    [
        ({"aws:region": "eu"}, ("aws", "region:eu"), ("aws:region", "us")),
        ({"a": "b:c", "a:b": "c"}, ("a:b", "c"), ("a", "b")),
        ({"Tenant": "Acme"}, ("Tenant", "Acme"), ("tenant", "acme")),
        ({"ümlaut": "✓ \U0001f600"}, ("ümlaut", "✓ \U0001f600"), ("umlaut", "✓")),
        ({"odd": 'a"b\\%_\n'}, ("odd", 'a"b\\%_\n'), ("odd", 'a"b\\%x\n')),
        ({"empty": ""}, ("empty", ""), ("empt", "y:")),
        ({"x" * 256: "\U0001f600" * 256}, ("x" * 256, "\U0001f600" * 256), ("x" * 256, "\U0001f600" * 255)),
        ({"number": "1", "true": "True"}, ("number", "1"), ("number", "1.0")),
    ],
)
async def test_a_tag_is_found_exactly_cut_at_whichever_colon(
    bench: Bench, tags: dict[str, str], asked: tuple[str, str], others: tuple[str, str]
) -> None:
    task_id = await bench.add(tags=tags)
    await bury(bench)
    assert await find(bench, asked) == [task_id]
    assert await find(bench, *tags.items()) == [task_id]
    assert await find(bench, others) == []
    await assert_tags_match_rows(bench.backend)


async def test_a_key_that_comes_again_is_found_by_its_new_tags_alone(bench: Bench) -> None:
    draft = make_draft(key="k", tags={"tenant": "acme", "try": "1"})
    await bench.accept(draft)
    await bench.finish(await bench.claim_one(), TaskStatus.FAILED)
    await bench.accept(draft._replace(tags={"tenant": "acme", "try": "2", "more": "x"}))
    await bury(bench)
    assert await find(bench, ACME) == await find(bench, ("try", "2")) == await find(bench, ("more", "x"))
    assert await find(bench, ACME, ("try", "2")) == [draft.task_id]
    assert await find(bench, ("try", "1")) == []
    await assert_tags_match_rows(bench.backend)


async def test_a_purge_leaves_nothing_of_a_tag(bench: Bench) -> None:
    for number in range(20):
        await bench.become(TaskStatus.CANCELLED, tags={"tenant": "acme", "n": str(number)} if number % 2 else None)
    kept = await bench.add(tags={"tenant": "acme"})
    assert len(await tag_entries(bench.backend)) == 21
    bench.pass_time(60)
    while (await bench.turn(commands=[Purge(bench.now, 7)])).answers[0].more:
        await assert_tags_match_rows(bench.backend)
    assert {task_id for _, _, task_id in await tag_entries(bench.backend)} == {kept}
    assert await find(bench, ACME) == [kept]


UNREADABLE = [
    '{"a":',
    "[1]",
    '["a"]',
    "7",
    "null",
    "",
    "[" * 50_000,
    '{"a": "\\u0000"}',
    '{"a": "\\ud800"}',
    '{"a": 7, "b": null, "c": {"d": "e"}, "d": ["e"], "f": true}',
    json.dumps({"a": "x" * 10_000}),
]


async def test_a_cell_that_is_no_tags_stops_no_turn_no_page_and_no_purge(bench: Bench) -> None:
    known = await bench.become(TaskStatus.FAILED, tags={"tenant": "acme"}, key="k", task_id="known")
    (row,) = [row async for batch in batches(bench.backend, "task") for row in batch.rows]
    rows = [{**row, "task_id": f"{number}", "tags": junk} for number, junk in enumerate(UNREADABLE)]
    assert await bench.backend.load("task", rows) == len(rows)
    assert await find(bench, ACME) == [known]
    again = [make_draft(task_id=str(number), key="k", tags={"tenant": "acme"}) for number, _ in enumerate(UNREADABLE)]
    await bench.accept(*again[::2])
    assert len(await find(bench, ACME)) == 1 + len(again[::2])
    while claimed := await bench.claim():
        for task in claimed:
            await bench.finish(task)
    bench.pass_time(60)
    assert (await bench.obey(Purge(bench.now, 1_000))).changed == 1 + len(rows)
    assert await tag_entries(bench.backend) == set()


async def test_tasks_without_tags_leave_no_entry(bench: Bench) -> None:
    await bury(bench)
    assert await tag_entries(bench.backend) == set()


@pytest.mark.parametrize(
    ("where", "walked", "searches"),
    [
        (TaskFilter(), "", False),
        (TaskFilter(tags=(ACME,)), "tags", False),
        (TaskFilter(tags=(ACME,), since=START, until=START), "tags", False),
        (TaskFilter(tags=(ACME, ("a", "b"))), "tags", True),
        (TaskFilter(tags=(ACME,), statuses=(TaskStatus.FAILED,)), "tags", True),
        (TaskFilter(tags=(ACME,), func_name="job", queue="slow"), "tags", True),
        (TaskFilter(tags=(ACME,), text="x"), "tags", True),
        (TaskFilter(tags=(ACME,), error_key="x"), "error_key", True),
        (TaskFilter(statuses=(TaskStatus.FAILED,)), "statuses", False),
        (TaskFilter(source="manual"), "", True),
    ],
)
def test_a_filter_by_a_tag_alone_is_no_search(where: TaskFilter, walked: str, searches: bool) -> None:
    assert (walked_by(where), is_search(where)) == (walked, searches)


# -- SQL alone


@pytest.fixture(params=[name for name in SHARED if name != "redis"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with LOCATIONS[request.param](tmp_path) as found:
        assert found is not None
        yield found


def change(backend: Backend, *statements: str) -> None:
    assert isinstance(backend, SqlBackend)
    with backend._write_engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


async def test_a_database_of_the_sixth_schema_gets_the_index_with_the_tasks_that_are_there(database: str) -> None:
    backend = open_backend(database)
    await backend.open()
    names = ("tag_new_tasks", "tag_changed_tasks", "tag_gone_tasks")
    of_the_table = " ON taskflow_task" if database.startswith("postgres") else ""
    change(
        backend,
        *(f"DROP TRIGGER taskflow_{name}{of_the_table}" for name in names),
        "DROP TABLE taskflow_tag",
        "UPDATE taskflow_schema_version SET version = 6",
    )
    bench = Bench(backend)
    ids = [await bench.add(tags={"tenant": ("acme", "other")[n % 2], "n": str(n)} if n % 5 else None) for n in range(9)]
    broken = await bench.add(tags={"tenant": "acme"})
    change(backend, f"UPDATE taskflow_task SET tags = '{{' WHERE task_id = '{broken}'")
    await backend.close()
    await backend.open()
    await assert_tags_match_rows(backend)
    assert await find(bench, ACME) == [ids[8], ids[6], ids[4], ids[2]]
    await bench.add(tags={"tenant": "acme"})
    await bench.cancel(ids[2])
    bench.pass_time(1)
    assert (await bench.obey(Purge(bench.now, 10))).changed == 1
    await assert_tags_match_rows(backend)
    await backend.close()


async def test_whoever_writes_a_task_writes_the_index_of_its_tags(database: str) -> None:
    """Code that knows nothing of it, in a rolling deploy say."""
    backend = open_backend(database)
    await backend.open()
    bench = Bench(backend)
    one, two = await bench.add(tags={"tenant": "acme"}), await bench.add()
    change(
        backend,
        f"""UPDATE taskflow_task SET tags = '{{"tenant": "other"}}' WHERE task_id = '{one}'""",
        f"""UPDATE taskflow_task SET tags = '{{"tenant": "acme", "a": "b"}}' WHERE task_id = '{two}'""",
    )
    assert (await find(bench, ACME), await find(bench, ("tenant", "other"))) == ([two], [one])
    await assert_tags_match_rows(backend)
    change(backend, "DELETE FROM taskflow_task")
    assert await tag_entries(backend) == set()
    await backend.close()
