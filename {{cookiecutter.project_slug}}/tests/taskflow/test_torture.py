"""`make torture`: its judge finds what is planted, it writes to an empty store only, and a short one passes."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from app.settings import settings
from app.taskflow import TaskManager, TaskStatus
from app.taskflow.models import utc_now
from app.taskflow.testing import drain
from tests import torture_tasks
from tools import torture_instance
from tools.torture import Torture
from tools.torture_instance import Notes, NotTortured, read_notes, team_manager, team_offers
from tools.torture_report import Setting, report
from tools.torture_store import refuse_used
from tools.torture_verdict import (
    Evidence,
    Fault,
    Harm,
    Start,
    Stored,
    judge,
    until_rescued,
    until_work_comes_back,
    until_work_goes_on,
)

PROJECT = Path(__file__).parents[2]
SUCCESS, FAILED, INTERRUPTED = TaskStatus.SUCCESS, TaskStatus.FAILED, TaskStatus.INTERRUPTED
PENDING, RUNNING = TaskStatus.PENDING, TaskStatus.RUNNING
KILL, STOP, FREEZE = Harm("kill", 1, 5.0, 5.0), Harm("stop", 1, 5.0, 6.0), Harm("freeze", 1, 5.0, 9.0)


def start(attempt: int = 1, life: int = 1, at: float = 1.0, *, again: bool = False, end: str = "") -> Start:
    return Start("one", "job", attempt, life, at, again, end)


def evidence(status: TaskStatus | None, *starts: Start, harm: Harm | None = None, waits: bool = False) -> Evidence:
    """Of one promised task."""
    stored = {} if status is None else {"one": Stored("job", status, waits)}
    return Evidence({"one": "job"}, starts, [harm] if harm else [], stored)


# -- the judge

ONCE, AGAIN = start(end="succeeded"), start(again=True)
CASES: dict[str, tuple[Evidence, Sequence[Fault]]] = {
    "it succeeded": (evidence(SUCCESS, ONCE), []),
    "it was killed and is interrupted": (evidence(INTERRUPTED, start(), harm=KILL), []),
    "it was claimed, and its process killed before it began": (evidence(INTERRUPTED, harm=KILL), []),
    "it is not there": (evidence(None), ["lost"]),
    "it ran, and is not there": (evidence(None, ONCE), ["lost"]),
    "a success that never began": (evidence(SUCCESS), ["lost"]),
    "it still waits, and is due": (evidence(PENDING), ["left"]),
    "it waits for its retry": (evidence(PENDING, start(end="failed"), waits=True), []),
    "it is still running": (evidence(RUNNING, start()), ["left"]),
    "it failed, and was tried again": (evidence(SUCCESS, start(end="failed"), start(2, 2, 2.0, end="succeeded")), []),
    "it asked to be tried later": (evidence(SUCCESS, start(end="postponed"), start(2, 2, 2.0)), []),
    "one attempt began in two processes": (evidence(SUCCESS, ONCE, start(1, 2, 7.0), harm=KILL), ["doubled"]),
    "it had succeeded, and ran again": (evidence(SUCCESS, ONCE, start(2, 2, 7.0), harm=KILL), ["doubled"]),
    "it was killed, and ran again": (evidence(SUCCESS, start(), start(2, 2, 7.0), harm=KILL), ["doubled"]),
    "it may run again after a kill": (evidence(SUCCESS, AGAIN, start(2, 2, 7.0, again=True), harm=KILL), []),
    "it may run again after a stop": (evidence(SUCCESS, AGAIN, start(2, 2, 5.5, again=True), harm=STOP), []),
    "it was rescued while its process was frozen, which then began it": (
        evidence(SUCCESS, start(at=9.2, again=True), start(2, 2, 8.0, again=True), harm=FREEZE),
        [],
    ),
    "it ran again although nothing had happened": (
        evidence(SUCCESS, AGAIN, start(2, 2, 3.0, again=True), harm=KILL),
        ["doubled"],
    ),
    "it ran again although only another process was killed": (
        evidence(SUCCESS, AGAIN, start(2, 2, 7.0, again=True), harm=KILL._replace(life=3)),
        ["doubled"],
    ),
    "it ran three times, of which one was too many": (
        evidence(SUCCESS, start(end="failed"), start(2, at=2.0, end="succeeded"), start(3, at=3.0)),
        ["doubled"],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_task_is_judged_by_what_was_noted_of_it(case: tuple[Evidence, Sequence[Fault]]) -> None:
    known, faults = case
    assert [finding.fault for finding in judge(known)] == faults


def test_what_nobody_was_promised_is_judged_too() -> None:
    unheard = Evidence(starts=[ONCE, start(2, 2, 7.0)], harms=[KILL], stored={"one": Stored("job", RUNNING)})
    assert [finding.fault for finding in judge(unheard)] == ["left", "doubled"]


def test_recovery_is_counted_from_the_kill_to_the_next_start() -> None:
    other = Start("two", "job", 1, 2, 5.25, False, "succeeded")
    known = evidence(SUCCESS, AGAIN, start(2, 2, 7.0, again=True), harm=KILL)
    known = Evidence(known.promised, [*known.starts, other], [*known.harms, Harm("cut", 0, 6.0, 6.5)], known.stored)
    assert until_work_goes_on(known) == [0.25]
    assert until_rescued(known) == [2.0]
    assert until_work_comes_back(known) == [0.5]


# -- the report


def page_of(known: Evidence, *faults: str) -> str:
    return report(Setting("sqlite", 60, 1, 3, utc_now()), known, judge(known), [0.5], faults)


def test_the_report_says_that_all_is_well() -> None:
    page = page_of(evidence(SUCCESS, ONCE, harm=KILL))
    assert "**Passed.** Nothing was lost and nothing was doubled." in page
    assert "What is wrong" not in page
    assert len(page.splitlines()) < 40


def test_the_report_names_every_task_that_is_wrong() -> None:
    page = page_of(evidence(None, start(), start(2)), "instance 2 ended by itself, with exit code 1")
    assert "**Failed.** 1 lost, 1 doubled, 1 faults." in page
    assert "- lost: job `one` was promised, and the store does not have it" in page
    assert "- doubled: job `one` began again after attempt 1: no end" in page
    assert "- instance 2 ended by itself" in page


# -- notes


def test_notes_are_what_was_promised_begun_and_ended(tmp_path: Path) -> None:
    manager = TaskManager()
    notes = Notes(tmp_path, 7)
    notes.watch(manager)

    @manager.task
    def plain() -> None: ...

    @manager.task(retries=1)
    async def fails() -> None:
        raise ValueError

    async def live() -> list[str]:
        async with manager.lifespan():
            ids = [await manager.enqueue(plain), await manager.enqueue(fails)]
            await drain(manager)
            return ids

    ids = asyncio.run(live())
    notes.write("promised", ids[0], "plain")
    notes.write("refused")
    read = read_notes(tmp_path)
    assert (read.promised, read.refused) == ({ids[0]: "plain"}, 1)
    found = sorted(
        (start.task_id, start.name, start.attempt, start.life, start.again, start.end) for start in read.starts
    )
    assert found == [
        (ids[0], "plain", 1, 7, False, "succeeded"),
        (ids[1], "fails", 1, 7, False, "failed"),
        (ids[1], "fails", 2, 7, False, "failed"),
    ]


# -- what is refused, and what is called


def used(url: str, *, schedule: bool) -> None:
    manager = TaskManager(snapshot_db=url)
    manager.runs_tasks = False

    def job() -> None: ...

    manager.schedule(every=3600)(job) if schedule else manager.task(job)

    async def live() -> None:
        async with manager.lifespan():
            if not schedule:
                await manager.enqueue(job)

    asyncio.run(live())


@pytest.mark.parametrize("schedule", [False, True])
def test_a_store_that_holds_anything_is_refused(shared_location: str, schedule: bool) -> None:
    asyncio.run(refuse_used(shared_location))  # empty
    used(shared_location, schedule=schedule)
    with pytest.raises(NotTortured, match="holds tasks or schedules: a torture runs on an empty store only"):
        asyncio.run(refuse_used(shared_location))


def test_the_store_of_the_service_is_refused_even_when_it_is_empty() -> None:
    with pytest.raises(NotTortured, match="is where the service keeps its tasks"):
        asyncio.run(refuse_used(settings.url))


def test_tasks_that_would_go_to_another_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotTortured, match=r"must take its store from `settings.url`"):
        team_manager(f"sqlite:///{tmp_path}/other.db")


def test_yours_are_functions_or_partials_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = TaskManager()

    @manager.task
    def mail(address: str) -> None: ...

    monkeypatch.setattr(torture_tasks, "TASKS", [partial(mail, address="a@example.com")])
    (offer,) = team_offers(manager)
    assert (offer.name, offer.args, dict(offer.kwargs)) == ("mail", (), {"address": "a@example.com"})
    for wrong in (mail, partial(mail, 1), lambda: None):  # type: ignore[arg-type]
        monkeypatch.setattr(torture_tasks, "TASKS", [wrong])
        with pytest.raises(NotTortured, match=r"TASKS of tests.torture_tasks: .*"):
            list(team_offers(manager))


def test_without_a_file_that_names_yours_none_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torture_instance, "TEAM", "tests.no_torture_tasks")
    assert list(team_offers(TaskManager())) == []


def test_a_file_that_names_a_function_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torture_of_the_gone.py").write_text("from app.tasks import no_such_function\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torture_instance, "TEAM", "torture_of_the_gone")
    with pytest.raises(NotTortured, match="torture_of_the_gone cannot be imported: cannot import name"):
        list(team_offers(TaskManager()))


# -- a real one


@pytest.mark.parametrize("seed", range(5))
def test_no_ordeal_is_left_out_by_chance(tmp_path: Path, seed: int) -> None:
    on_a_file = Torture("sqlite:///tasks.db", tmp_path, None, seed=seed, stop_timeout=1)
    first, *others = islice(on_a_file.ordeals(longest_freeze=5), 9)
    assert first == on_a_file.kill
    assert (others.count(on_a_file.kill), others.count(on_a_file.stop), others.count(on_a_file.cut)) == (3, 2, 1)
    elsewhere = Torture("redis://127.0.0.1/7", tmp_path, None, seed=seed, stop_timeout=1)
    assert set(islice(elsewhere.ordeals(longest_freeze=0), 50)) == {elsewhere.kill, elsewhere.stop}


def run_torture(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.torture", *words]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)


def test_a_short_torture_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    page = tmp_path / "torture.md"
    done = run_torture("--minutes", "0.05", "--instances", "2", "--store", "sqlite", "--report", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert "**Passed.**" in text
    cells = re.search(r"^\| \*\*all\*\* \|(.*)\|$", text, re.MULTILINE)
    assert cells
    accepted, *_, lost, doubled, left, starts = (int(cell.replace(",", "")) for cell in cells[1].split("|"))
    assert (lost, doubled, left) == (0, 0, 0)
    assert starts >= accepted > 100


def test_a_torture_that_cannot_begin_says_why_with_code_2(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"
    used(url, schedule=False)
    done = run_torture("--url", url, "--report", str(tmp_path / "torture.md"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{url} holds tasks or schedules: a torture runs on an empty store only\n"
    assert not (tmp_path / "torture.md").exists()
