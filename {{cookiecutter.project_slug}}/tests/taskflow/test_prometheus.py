"""What Prometheus scrapes: valid by its own parser, named by its conventions, bounded, and true."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.taskflow.web.prometheus import cumulative

from .web_support import Service, service

GRAFANA = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture(scope="module")
def busy() -> Iterator[Service]:
    with service() as running:
        for number in range(3):
            running.run("add_up", number, 1)
        running.run("charge_card", 7)
        running.add("add_up", 1, 1, delay_seconds=600)
        yield running


def scraped(running: Service) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Sample name -> labels and values."""
    response = running.client.get("/tasks/metrics", headers={"Accept": "text/plain"})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(found: dict[str, list[tuple[dict[str, str], float]]], name: str, **labels: str) -> float:
    (only,) = [number for known, number in found[name] if labels.items() <= known.items()]
    return only


def test_what_was_done_is_counted_by_outcome(busy: Service) -> None:
    found = scraped(busy)
    assert value(found, "taskflow_tasks_started_total", func_name="add_up") == 3
    assert value(found, "taskflow_tasks_finished_total", func_name="add_up", outcome="success") == 3
    assert value(found, "taskflow_tasks_finished_total", func_name="charge_card", outcome="failed") == 1
    assert value(found, "taskflow_tasks", status="success") == 3
    assert value(found, "taskflow_queue_delayed", queue="sums") == 1
    assert value(found, "taskflow_queue_depth", queue="sums") == 0
    assert value(found, "taskflow_ready") == 1
    assert value(found, "taskflow_last_commit_age_seconds") < 60
    assert value(found, "taskflow_rescued_total") == 0


def test_a_histogram_counts_each_attempt_once(busy: Service) -> None:
    found = scraped(busy)
    for name in ("wait", "run"):
        assert value(found, f"taskflow_task_{name}_seconds_count", func_name="add_up") == 3
        buckets = [n for labels, n in found[f"taskflow_task_{name}_seconds_bucket"] if labels["func_name"] == "add_up"]
        assert buckets == sorted(buckets)
        assert buckets[-1] == 3


def test_buckets_add_up() -> None:
    assert cumulative({0: 2, 3: 1})[:5] == [("0.001", 2), ("0.002", 2), ("0.005", 2), ("0.01", 3), ("0.02", 3)]
    assert cumulative({24: 4})[-1] == ("+Inf", 4)


def test_open_metrics_are_spoken_too(busy: Service) -> None:
    accept = "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5"
    response = busy.client.get("/tasks/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_json_is_the_answer_unless_text_is_asked_for(busy: Service) -> None:
    assert busy.client.get("/tasks/metrics").json()["success"] == 3
    assert busy.client.get("/tasks/metrics", headers={"Accept": "*/*"}).json()["failed"] == 1


def test_every_query_of_the_grafana_dashboard_names_a_metric_that_exists(busy: Service) -> None:
    names = set(scraped(busy))
    panels = json.loads(GRAFANA.read_text("utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert len(queries) >= 8
    for query in queries:
        asked = set(re.findall(r"taskflow_\w+", query))
        assert asked, query
        assert asked <= names, query


def test_a_store_that_is_away_is_said(busy: Service) -> None:
    with busy.disk_full():
        assert busy.client.get("/tasks/metrics", headers={"Accept": "text/plain"}).status_code in (200, 503)
