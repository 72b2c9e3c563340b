"""Computing on a Dask cluster: what a worker process does is done by a worker of the cluster; no promise changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.taskflow import TaskDefinitionError, TaskFailed, TaskManager, TaskStatus
from app.taskflow import cluster as clusters

from . import cluster_tasks
from .conftest import StartManager
from .helpers import eventually
from .servers import free_port

pytestmark = pytest.mark.anyio
distributed: Any = pytest.importorskip("distributed", reason="no Dask here: uv add --dev distributed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster


@pytest.fixture
async def manager(cluster: Any, start_manager: StartManager) -> TaskManager:
    return await start_manager(cluster_tasks.define, cluster=cluster.scheduler_address)


async def add(manager: TaskManager, name: str, *args: object) -> str:
    return await manager.enqueue(manager.registry.named(name).function, *args)


async def test_results_log_lines_and_progress_come_back(manager: TaskManager, cluster: Any) -> None:
    task_id = await add(manager, "double", 21)
    result = await manager.result(task_id, 30)
    assert result["twice"] == 42
    assert result["pid"] in {worker.pid for worker in cluster.workers.values()}
    task = await manager.store.get(task_id)
    assert task.progress == {"done": 1, "total": 2, "message": "half"}
    (line,) = await manager.store.logs(task_id)
    assert (line.message, line.extra) == ("doubling", {"n": 21})


async def test_an_error_is_the_same_as_here(manager: TaskManager) -> None:
    task_id = await add(manager, "declines", 7)
    with pytest.raises(TaskFailed, match="no order 7"):
        await manager.result(task_id, 30)
    task = await manager.store.get(task_id)
    assert "LookupError" in (task.stacktrace or "")
    assert "in declines" in (task.stacktrace or "")


async def test_signals_cross_over(manager: TaskManager, tmp_path: Path) -> None:
    withdrawn, later = await add(manager, "withdraws"), await add(manager, "later", str(tmp_path))
    with pytest.raises(TaskFailed, match="cancelled"):
        await manager.result(withdrawn, 30)
    assert (await manager.store.get(withdrawn)).error == "not wanted any more"
    assert await manager.result(later, 30) == 1


@pytest.mark.parametrize("name", ["waits", "waits_briefly"])
async def test_who_is_cancelled_or_late_is_told_so(manager: TaskManager, tmp_path: Path, name: str) -> None:
    file = tmp_path / "said"
    file.touch()
    task_id = await add(manager, name, str(file))
    await eventually(lambda: "began" in file.read_text(), 30)
    if name == "waits":
        await manager.store.cancel(task_id)
    with pytest.raises(TaskFailed, match="cancelled" if name == "waits" else "timed out after 0.5 s"):
        await manager.result(task_id, 30)
    await eventually(lambda: "told" in file.read_text(), 30)


async def test_a_worker_that_dies_is_that_attempts_failure_and_nothing_runs_twice(
    manager: TaskManager, tmp_path: Path
) -> None:
    file = tmp_path / "said"
    file.touch()
    task_id = await add(manager, "dies", str(file))
    with pytest.raises(TaskFailed, match="worker process ended"):
        await manager.result(task_id, 60)
    assert file.read_text().count("began") == 1
    assert (await manager.result(await add(manager, "double", 1), 60))["twice"] == 2


async def test_a_cluster_that_is_away_is_waited_for(start_manager: StartManager) -> None:
    port = free_port()
    manager = await start_manager(cluster_tasks.define, cluster=f"tcp://127.0.0.1:{port}")
    task_id = await add(manager, "double", 4)
    await asyncio.sleep(1)
    assert (await manager.store.get(task_id)).status is TaskStatus.RUNNING
    with await asyncio.to_thread(
        lambda: distributed.LocalCluster(
            n_workers=1, processes=True, scheduler_port=port, host="127.0.0.1", dashboard_address=None, silence_logs=50
        )
    ):
        assert (await manager.result(task_id, 60))["twice"] == 8
        await manager.shutdown()


def test_without_dask_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(clusters, "import_module", missing)
    with pytest.raises(TaskDefinitionError, match="uv add distributed"):
        TaskManager(cluster="tcp://127.0.0.1:8786")
