"""The numbers of the task system in Prometheus' text format.

Owns which metrics there are, and their names. What the store says is the same from every instance: aggregate it with
`max`; what this process did is its own: aggregate it with `sum`. HELP says which is which. Label values are bounded,
because the sums are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from time import monotonic

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..history import BOUNDS, Sums
from ..manager import TaskManager
from ..models import Count, TaskStatus
from ..store import Metrics

OF_THE_STORE = "The same from every instance."
OF_THIS_PROCESS = "Of this process, since it began."
LABELS = ("queue", "func_name")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is told at one moment."""

    metrics: Metrics
    counts: tuple[Count, ...]
    oldest: Mapping[str, datetime]
    now: datetime


async def facts_of(manager: TaskManager) -> Facts:
    """Raises BackendUnavailable."""
    counts = tuple(await manager.store.counts())
    queues = sorted({count.queue for count in counts if count.status is TaskStatus.PENDING and count.n > count.delayed})
    return Facts(await manager.store.metrics(), counts, await manager.store.oldest(queues), manager.clock())


def exposition(manager: TaskManager, facts: Facts, accept: str) -> tuple[bytes, str]:
    """The text, and its content type, as the client accepts it."""
    registry = CollectorRegistry()
    registry.register(Told(manager, facts))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class Told(Collector):
    def __init__(self, manager: TaskManager, facts: Facts) -> None:
        self._manager = manager
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        yield from of_the_store(self._facts)
        yield from of_this_process(self._manager.book.totals)
        yield from of_the_writer(self._manager)


def of_the_store(facts: Facts) -> Iterator[Metric]:
    tasks = GaugeMetricFamily("taskflow_tasks", f"Stored tasks by status. {OF_THE_STORE}", labels=["status"])
    for status, n in facts.metrics.by_status.items():
        tasks.add_metric([status], n)
    yield tasks
    ratio = f"Successes among ended tasks. {OF_THE_STORE}"
    yield GaugeMetricFamily("taskflow_success_ratio", ratio, value=facts.metrics.success_rate)
    mean = f"Mean run time of ended tasks. {OF_THE_STORE}"
    yield GaugeMetricFamily("taskflow_duration_seconds_avg", mean, value=facts.metrics.avg_duration_seconds)
    levels = {
        "taskflow_queue_depth": ("Tasks that wait to start now.", waiting),
        "taskflow_queue_delayed": ("Tasks that wait for their time.", delayed),
        "taskflow_queue_running": ("Tasks that run.", running),
    }
    queues = sorted({count.queue for count in facts.counts})
    for name, (meaning, number) in levels.items():
        family = GaugeMetricFamily(name, f"{meaning} {OF_THE_STORE}", labels=["queue"])
        for queue in queues:
            family.add_metric([queue], sum(number(count) for count in facts.counts if count.queue == queue))
        yield family
    family = GaugeMetricFamily(
        "taskflow_queue_oldest_waiting_seconds",
        f"How long the oldest task could have started. {OF_THE_STORE}",
        labels=["queue"],
    )
    for queue in queues:
        since = facts.oldest.get(queue)
        family.add_metric([queue], max(0.0, (facts.now - since).total_seconds()) if since else 0.0)
    yield family


def waiting(count: Count) -> int:
    return count.n - count.delayed if count.status is TaskStatus.PENDING else 0


def delayed(count: Count) -> int:
    return count.delayed


def running(count: Count) -> int:
    return count.n if count.status is TaskStatus.RUNNING else 0


def of_this_process(totals: Mapping[tuple[str, str], Sums]) -> Iterator[Metric]:
    known = sorted(totals.items())
    started = CounterMetricFamily("taskflow_tasks_started", f"Attempts that began. {OF_THIS_PROCESS}", labels=LABELS)
    retried = CounterMetricFamily(
        "taskflow_tasks_retried", f"Attempts after which another follows. {OF_THIS_PROCESS}", labels=LABELS
    )
    finished = CounterMetricFamily(
        "taskflow_tasks_finished", f"Tasks that ended, by how. {OF_THIS_PROCESS}", labels=(*LABELS, "outcome")
    )
    for labels, sums in known:
        started.add_metric(labels, sums.counts["started"])
        retried.add_metric(labels, sums.counts["retried"])
        for status in TaskStatus:
            if status.terminal and status is not TaskStatus.REJECTED:
                finished.add_metric([*labels, status], sums.counts[status])
    yield from (started, finished, retried)
    waits = HistogramMetricFamily(
        "taskflow_task_wait_seconds",
        f"From when an attempt could start to when it did. {OF_THIS_PROCESS}",
        labels=LABELS,
    )
    runs = HistogramMetricFamily(
        "taskflow_task_run_seconds", f"How long attempts ran. {OF_THIS_PROCESS}", labels=LABELS
    )
    for labels, sums in known:
        waits.add_metric(labels, cumulative(sums.wait), sums.wait_seconds)
        runs.add_metric(labels, cumulative(sums.run), sums.run_seconds)
    yield from (waits, runs)


def cumulative(histogram: Mapping[int, int]) -> list[tuple[str, float]]:
    found, total = [], 0
    for bucket, bound in enumerate(BOUNDS):
        total += histogram.get(bucket, 0)
        found.append((f"{bound:g}", float(total)))
    return [*found, ("+Inf", float(total + histogram.get(len(BOUNDS), 0)))]


def of_the_writer(manager: TaskManager) -> Iterator[Metric]:
    journal, dispatcher = manager.journal, manager.dispatcher
    told = {
        "taskflow_journal_backlog": ("What waits to be written.", float(journal.backlog)),
        "taskflow_slots": ("Tasks that may run at once.", float(dispatcher.slots)),
        "taskflow_slots_busy": ("Tasks that run.", float(dispatcher.running)),
        "taskflow_ready": ("Whether it should get traffic.", float(manager.unready() is None)),
    }
    if journal.last_turn is not None:
        told["taskflow_last_commit_age_seconds"] = ("Since the last commit.", monotonic() - journal.last_turn)
    for name, (meaning, value) in told.items():
        yield GaugeMetricFamily(name, f"{meaning} Of this process.", value=value)
    rescued = "Tasks that this process rescued from lost instances, since it began."
    yield CounterMetricFamily("taskflow_rescued", rescued, value=float(manager.rescued))
