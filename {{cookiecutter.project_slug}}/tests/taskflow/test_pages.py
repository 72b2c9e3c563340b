"""The dashboard: what its pages say and offer, that they are safe, and that they stay small."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import app.taskflow.web
from app.taskflow import TaskAdmin, TaskManager, task_log
from app.taskflow.web.html import ERROR_WORDS
from app.taskflow.web.views import EVENT_WORDS, GLYPHS

from .test_api import make_manager_at, wait_until
from .web_support import Document, Service, make_manager, page, service

STATIC = Path(app.taskflow.web.__file__).parent / "static"


@pytest.fixture
def running() -> Iterator[Service]:
    with service() as running:
        yield running


@pytest.fixture(scope="module")
def full() -> Iterator[Service]:
    """With a page and more of tasks of several fates; shared, so nobody changes it."""
    with service(display_func_args=True) as full:
        added = [full.add("add_up", n, n, tags={"tenant": f"customer-{n}"}) for n in range(45)]
        for n in range(12):
            full.run("charge_card", n)
        for task_id in added:
            full.ended(task_id)
        full.add("add_up", 1, 2, delay_seconds=600)
        full.add("fail_slowly")
        wait_until(full, full.add("wait_for_gate"), "running")
        yield full


def show(running: Service, address: str = "") -> Document:
    return page(running.client.get(f"/tasks/dashboard{address}"))


# -- overview


def test_an_empty_overview_teaches(running: Service) -> None:
    document = show(running)
    assert "No tasks yet" in document.text
    assert "background_tasks.add_task" in document.text


def test_the_overview_counts_every_status_and_leads_to_its_tasks(full: Service) -> None:
    document = show(full)
    for status in GLYPHS:
        tile = next(text for text in document.links if status.capitalize() in text)
        assert document.links[tile] == f"/tasks/dashboard/tasks?q=status:{status}"
    assert any(re.search(r"Success 45 ", text) for text in document.links)
    assert any(re.search(r"Failed 12 ", text) for text in document.links)
    assert any(re.search(r"Pending 2 2 for later", text) for text in document.links)
    assert "Healthy" in document.text


def test_the_overview_lists_the_newest_tasks_and_groups_what_failed(full: Service) -> None:
    document = show(full)
    newest = full.client.get("/tasks?limit=1").json()[0]["task_id"]
    assert f"/tasks/dashboard/tasks/{newest}" in document.links.values()
    problem = next(text for text in document.links if "insufficient funds" in text)
    assert "charge_card" in problem
    assert "12" in problem
    found = full.client.get(document.links[problem])
    assert page(found).text.count("insufficient funds") >= 12


def test_a_service_that_is_not_ready_says_so_on_its_overview(full: Service) -> None:
    with full.disk_full():
        assert "Not ready: the task backend is away: disk full" in show(full).text


# -- the list


def test_the_list_pages_through_all_tasks(full: Service) -> None:
    address, seen = "/tasks/dashboard/tasks", set[str]()
    for _ in range(3):
        document = page(full.client.get(address))
        seen |= set(re.findall(r"/tasks/dashboard/tasks/[0-9a-f-]{36}", full.client.get(address).text))
        older = [link for text, link in document.links.items() if text.startswith("Older")]
        if not older:
            break
        address = older[0]
    assert len(seen) == 60
    assert [link for text, link in document.links.items() if text.endswith("Newest")] == ["/tasks/dashboard/tasks"]


def test_a_search_finds_by_error_text_and_says_what_it_understood(full: Service) -> None:
    document = show(full, "/tasks?q=status:failed+%22order+7%22+shape:round")
    assert 'Searching for status:failed "order 7"' in document.text
    assert "shape: is no qualifier" in document.text
    assert document.text.count("insufficient funds for order 7") == 1
    assert document.form("Search").fields["q"] == 'status:failed "order 7" shape:round'


def test_chips_add_and_remove_a_status_and_count_what_the_search_allows(full: Service) -> None:
    document = show(full, "/tasks?q=status:failed+name:charge_card")
    assert document.links["✕Failed 12"] == "/tasks/dashboard/tasks?q=name%3Acharge_card"
    query = document.links["●Success 0"]
    assert query == "/tasks/dashboard/tasks?q=status%3Afailed%2Csuccess%20name%3Acharge_card"


def test_nothing_found_leads_back_to_everything(full: Service) -> None:
    document = show(full, "/tasks?q=name:nobody")
    assert "Nothing matches" in document.text
    assert document.links["Show all tasks"] == "/tasks/dashboard/tasks"


@pytest.mark.parametrize("before", ["x", "1_%00", "99999999999999999999_a"])
def test_a_broken_cursor_is_a_page_that_says_so(full: Service, before: str) -> None:
    assert "Not understood" in page(full.client.get(f"/tasks/dashboard/tasks?before={before}"), 422).text


@pytest.mark.parametrize("q", ["%00", "%ff", '"', "status:", "since:99999d", "x" * 3_000, "name:%3Cscript%3E", ":::"])
def test_any_search_is_answered(full: Service, q: str) -> None:
    assert "<script>" not in full.client.get(f"/tasks/dashboard/tasks?q={q}").text
    show(full, f"/tasks?q={q}")


@pytest.mark.parametrize("field", ["actor", "action", "about", "since"])
def test_an_audit_of_what_no_store_can_hold_is_a_page_that_says_so(full: Service, field: str) -> None:
    assert "NUL" in page(full.client.get(f"/tasks/dashboard/audit?{field}=%00"), 422).text


# -- one task


def test_a_failed_task_shows_its_attempts_error_log_and_history(running: Service) -> None:
    task_id = running.run("charge_card", 7)
    document = show(running, f"/tasks/{task_id}")
    assert task_id in document.text
    assert "Declined insufficient funds for order 7" in document.text
    assert "Traceback (most recent call last)" in document.text
    assert document.text.count("calling the provider order= 7") == 3
    assert "Attempt 2" in document.text
    assert document.text.count("failed, tried again") == 2
    assert "3 started, 3 allowed" in document.text
    for word, _ in (EVENT_WORDS[kind] for kind in ("accepted", "started", "retrying", "failed")):
        assert word in document.text


def test_a_failed_task_is_retried_by_its_form(running: Service) -> None:
    task_id = running.run("charge_card", 7)
    form = show(running, f"/tasks/{task_id}").form("Retry")
    assert (form.method, form.action) == ("post", f"/tasks/dashboard/tasks/{task_id}/retry")
    response = running.client.post(form.action)
    assert response.status_code == 303
    assert response.headers["location"] == f"/tasks/dashboard/tasks/{task_id}"
    assert running.client.get(f"/tasks/{running.ended(task_id)}").json()["attempt"] == 6


def test_a_waiting_task_is_cancelled_by_its_form(running: Service) -> None:
    task_id = running.add("add_up", 1, 2, delay_seconds=600)
    document = show(running, f"/tasks/{task_id}")
    assert re.search(r"Pending starts in (9 m \d+ s|10 m)", document.text)
    running.client.post(document.form("Cancel").action)
    document = show(running, f"/tasks/{task_id}")
    assert "Cancelled" in document.text
    assert "anonymous" in document.text
    assert not [form for form in document.forms if form.buttons and form.buttons[0].startswith("Cancel")]


def test_a_retry_wait_says_when_it_ends(running: Service) -> None:
    task_id = running.add("fail_slowly")
    while running.client.get(f"/tasks/{task_id}").json()["attempt"] == 0:
        pass
    wait_until(running, task_id, "pending")
    assert re.search(r"retry 1 of 3 in (59 m \d+ s|1 h)", show(running, f"/tasks/{task_id}").text)
    assert re.search(r"retry 1 of 3 in (59 m \d+ s|1 h)", show(running, "/tasks").text)


def test_an_action_that_is_not_possible_any_more_is_a_page_that_says_so(running: Service) -> None:
    task_id = running.run("add_up", 1, 2)
    for command in ("retry", "cancel"):
        document = page(running.client.post(f"/tasks/dashboard/tasks/{task_id}/{command}"), 400)
        assert f"task {task_id} is success" in document.text


def test_a_running_task_shows_its_progress_and_its_log_goes_on(running: Service) -> None:
    task_id = running.add("wait_for_gate")
    wait_until(running, task_id, "running")
    while not running.client.get(f"/tasks/{task_id}").json()["progress"]:
        pass
    document = show(running, f"/tasks/{task_id}")
    assert "1 of 4 · first of four" in document.text
    assert ("progress", "value", "0.25") in document.attributes
    more = next(value for tag, name, value in document.attributes if name == "hx-get" and "/log?" in value)
    assert running.client.get(more).status_code == 204
    first = page(running.client.get(f"/tasks/dashboard/tasks/{task_id}/log"))
    assert "waiting" in first.text
    running.gate.set()
    running.ended(task_id)
    last = page(running.client.get(more))
    assert not [name for _, name, _ in last.attributes if name == "hx-get"], "nothing is asked for after the end"


def test_of_a_log_the_newest_lines_are_shown_and_a_refresh_reads_none_of_it(
    running: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.taskflow.web.pages.task.MOST_LOG_LINES", 3)
    monkeypatch.setattr("app.taskflow.web.pages.task.MOST_READ", 8)

    @running.manager.task
    async def say_much() -> None:
        for n in range(10):
            task_log(f"line {n}")

    task_id = running.run("say_much")
    document = show(running, f"/tasks/{task_id}")
    assert "The newest 3 lines of 8 and more" in document.text
    assert re.findall(r"line \d", document.text) == ["line 5", "line 6", "line 7"]
    more = next(value for tag, name, value in document.attributes if name == "hx-get" and "/log?" in value)
    last = page(running.client.get(more))
    assert re.findall(r"line \d", last.text) == ["line 8", "line 9"]
    assert not [name for _, name, _ in last.attributes if name == "hx-get"], "nothing is asked for after the end"

    read: list[int] = []
    logs = running.manager.store.logs

    async def counted(*args: Any) -> Any:
        found = await logs(*args)
        read.append(len(found))
        return found

    monkeypatch.setattr(running.manager.store, "logs", counted)
    page(running.client.get(f"/tasks/dashboard/tasks/{task_id}", headers={"HX-Request": "true"}))
    assert sum(read) <= 2, "of the log that the page has and keeps"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say a process's memory")
def test_workers_say_how_they_are(running: Service) -> None:
    document = show(running, "/workers")
    assert re.search(r"Slots busy Memory Commit Version.* 0 / [\d,]+ \d+ MB [\d.]+ m?s", document.text), document.text


def test_a_busy_worker_leads_to_what_runs(running: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    running.run("add_up", 1, 2)
    instances = running.manager.store.instances

    async def busy() -> Any:
        return [replace(instance, running=1) for instance in await instances()]

    monkeypatch.setattr(running.manager.store, "instances", busy)
    link = next(address for said, address in show(running, "/workers").links.items() if said.startswith("1 / "))
    assert "Nothing matches" in page(running.client.get(link)).text
    wait_until(running, running.add("wait_for_gate"), "running")
    found = page(running.client.get(link)).text
    assert "wait_for_gate" in found
    assert "add_up" not in found
    running.gate.set()


def test_arguments_are_hidden_unless_the_team_allows_them(running: Service) -> None:
    assert "Hidden." in show(running, f"/tasks/{running.run('add_up', 41, b=1)}").text
    with service(display_func_args=True) as frank:
        document = show(frank, f"/tasks/{frank.run('add_up', 41, b=1)}")
        assert '[ 41 ] { "b": 1 }' in document.text
        assert '{ "sum": 42 }' in document.text


def test_a_task_whose_function_is_gone_waits_for_a_process_that_knows_it(tmp_path: Path) -> None:
    location = str(tmp_path / "tasks.db")
    with service(manager=make_manager_at(location)) as running:
        waiting = running.add("add_up", 1, 2, delay_seconds=600)
        failed = running.run("charge_card", 7)
    with service(manager=TaskManager(snapshot_db=location)) as running:
        assert "waits for a process that knows this function" in show(running, f"/tasks/{waiting}").text
        assert "waits for a process that knows this function" in show(running, "/tasks").text
        document = show(running, f"/tasks/{failed}")
        assert ("button", "disabled", "") in document.attributes
        page(running.client.post(document.form("Retry").action), 409)


@pytest.mark.parametrize("task_id", ["nope", "01a20a52-8666-77f3-8543-36ee0f3f9343", "%00", "%F0%9F%8E%89"])
def test_an_unknown_task_is_a_page_with_a_way_back(full: Service, task_id: str) -> None:
    document = page(full.client.get(f"/tasks/dashboard/tasks/{task_id}"), 404)
    assert ERROR_WORDS[404] in document.text
    assert "/tasks/dashboard/tasks" in document.links.values()


def test_an_unknown_page_is_a_page(full: Service) -> None:
    assert ERROR_WORDS[404] in page(full.client.get("/tasks/dashboard/queues/x"), 404).text


def test_a_backend_that_is_away_is_a_page_that_says_so(tmp_path: Path) -> None:
    manager = make_manager_at(str(tmp_path / "missing" / "tasks.db"))
    with service(manager=manager) as running:
        for address in ("", "/tasks", "/tasks/x"):
            response = running.client.get(f"/tasks/dashboard{address}")
            assert ERROR_WORDS[503] in page(response, 503).text
            assert response.headers["retry-after"] == "2"


def test_what_a_task_says_is_text_and_never_markup() -> None:
    gate = threading.Event()
    manager = make_manager(gate)
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>"

    @manager.task(name=evil, tags={evil: evil})
    async def attack(value: str) -> None:
        raise ValueError(value)

    with service(manager=manager, display_func_args=True, title=evil) as running:
        task_id = running.run(evil, f'"{evil}\ud800')
        for address in ("", "/tasks", f"/tasks/{task_id}", f"/tasks?q={evil}"):
            response = running.client.get(f"/tasks/dashboard{address}")
            assert response.status_code == 200
            assert "<script>alert" not in response.text
            assert "<img" not in response.text


# -- the frame


PAGES = ["", "/tasks", "/tasks?q=status:failed", "/nothing"]


@pytest.mark.parametrize("address", PAGES)
def test_every_page_has_a_strict_policy_and_nothing_inline(full: Service, address: str) -> None:
    response = full.client.get(f"/tasks/dashboard{address}")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["cache-control"] == "no-store"
    assert_nothing_inline(Document(response.text))


def test_the_page_of_a_task_has_nothing_inline(full: Service) -> None:
    for task in full.client.get("/tasks?limit=20").json():
        assert_nothing_inline(show(full, f"/tasks/{task['task_id']}"))


def assert_nothing_inline(document: Document) -> None:
    names = {name for _, name, _ in document.attributes}
    assert "style" not in names
    assert not [name for name in names if name.startswith(("on", "hx-on"))]
    assert "style" not in document.tags
    scripts = [value for tag, name, value in document.attributes if (tag, name) == ("script", "src")]
    assert document.tags.count("script") == len(scripts)
    assert not [value for _, name, value in document.attributes if value.startswith(("js:", "javascript:"))]
    triggers = [value for _, name, value in document.attributes if name == "hx-trigger"]
    assert not [value for value in triggers if "[" in value]


@pytest.mark.parametrize("address", PAGES)
def test_every_page_can_be_used_without_seeing_it(full: Service, address: str) -> None:
    document = Document(full.client.get(f"/tasks/dashboard{address}").text)
    assert document.tags.count("h1") == 1
    assert document.tags.count("main") == 1
    assert document.links["Skip to content"] == "#main"
    assert document.tags.count("caption") == document.tags.count("table")
    assert all(document.attributes.count(("th", "scope", "col")) for _ in range(document.tags.count("table")))
    assert ("html", "lang", "en") in document.attributes


def test_links_lead_to_pages_that_exist(full: Service) -> None:
    seen: set[str] = set()
    waiting = ["/tasks/dashboard"]
    while waiting and len(seen) < 60:
        address = waiting.pop()
        seen.add(address)
        document = page(full.client.get(address))
        for link in document.links.values():
            if link.startswith("/tasks/dashboard") and link not in seen and link not in waiting:
                waiting.append(link)
    assert len(seen) > 30


def test_a_choice_of_theme_is_kept_without_a_script(running: Service) -> None:
    form = show(running, "/tasks?q=a").form("Theme")
    response = running.client.post(form.action, data=form.fields | {"theme": "dark"})
    assert response.headers["location"] == "/tasks/dashboard/tasks?q=a"
    assert ("html", "data-theme", "dark") in show(running).attributes
    running.client.post(form.action, data={"theme": "neon", "keys": "off", "next": "https://evil.example"})
    attributes = show(running).attributes
    assert ("html", "data-theme", "dark") in attributes
    assert ("html", "data-keys", "off") in attributes


VIEW = "/tasks/dashboard/tasks/view"


def test_a_search_is_saved_shown_and_removed(running: Service) -> None:
    search, address = "status:failed name:charge_card", "/tasks?q=name:charge_card++status:failed"
    assert not any("view" in button for form in show(running, "/tasks").forms for button in form.buttons)
    running.client.post(VIEW, data={"q": '  tag.tenant:"a & b"  ', "save": "on"})
    form = show(running, address).form("Save view")
    response = running.client.post(VIEW, data=form.fields | {"save": "on"})
    assert response.headers["location"] == "/tasks/dashboard/tasks?q=status%3Afailed+name%3Acharge_card"
    links = show(running, "/tasks").links
    assert [link for link in links if link in (search, 'tag.tenant:"a & b"')] == ['tag.tenant:"a & b"', search]
    assert show(running, links[search].removeprefix("/tasks/dashboard")).form("Remove view")
    running.client.post(VIEW, data={"q": search, "save": "off"})
    assert search not in show(running, "/tasks").links
    assert show(running, address).form("Save view")


def test_more_views_than_a_browser_keeps_are_refused_and_nothing_is_lost(running: Service) -> None:
    for number in range(12):
        running.client.post(VIEW, data={"q": f"id:{number}", "save": "on"})
    refused = running.client.post(VIEW, data={"q": "id:more", "save": "on"})
    assert "remove one first" in page(refused, 409).text
    long = running.client.post(VIEW, data={"q": "é" * 500, "save": "on"})
    assert long.status_code == 409
    assert all(f"id:{number}" in show(running, "/tasks").text for number in range(12))


@pytest.mark.parametrize("cookie", ["%", "&&&", "%ff%00", "x" * 9_000, "<script>alert(1)</script>"])
def test_any_cookie_of_saved_views_is_answered(running: Service, cookie: str) -> None:
    response = running.client.get("/tasks/dashboard/tasks", headers={"Cookie": f"taskflow_saved={cookie}"})
    assert response.status_code == 200
    assert "<script>alert" not in response.text


def test_a_page_without_a_script_asks_for_itself_now_and_then() -> None:
    with service(poll_interval=7) as running:
        assert ("meta", "content", "7") in show(running).attributes


@pytest.mark.parametrize("way", ["proxy", "mounted"])
def test_links_hold_behind_a_prefix(way: str) -> None:
    inner = FastAPI()
    manager = make_manager(threading.Event())
    TaskAdmin(inner, manager, auth=("ada", "lovelace"))
    outer = FastAPI(lifespan=manager.lifespan)
    outer.mount("/inner", inner)
    if way == "proxy":
        client = TestClient(inner, root_path="/inner", follow_redirects=False)
        asked = ""  # the proxy takes the prefix away
    else:
        client = TestClient(outer, follow_redirects=False)
        asked = "/inner"
    with client:
        response = client.get(f"{asked}/tasks/dashboard/tasks?q=a")
        assert response.headers["location"].startswith(
            "/inner/tasks/auth/login?next=%2Finner%2Ftasks%2Fdashboard%2Ftasks"
        )
        form = page(client.get(response.headers["location"].removeprefix("" if asked else "/inner"))).form("Log in")
        assert form.action == "/inner/tasks/auth/login"
        credentials = {"username": "ada", "password": "lovelace"}
        response = client.post(form.action.removeprefix("" if asked else "/inner"), data=form.fields | credentials)
        assert response.headers["location"] == "/inner/tasks/dashboard/tasks?q=a"
        client.cookies.set("taskflow_token", response.cookies["taskflow_token"])
        document = page(client.get(f"{asked}/tasks/dashboard"))
        local = [value for _, name, value in document.attributes if name in ("href", "src", "action", "hx-get")]
        assert all(value.startswith(("/inner/tasks/", "#")) for value in local)


# -- static files


def test_static_files_are_kept_by_browsers_until_they_change(full: Service) -> None:
    address = next(value for _, name, value in show(full).attributes if value.endswith(".css") or ".css?" in value)
    response = full.client.get(address)
    assert response.headers["content-type"] == "text/css; charset=utf-8"
    assert "immutable" in response.headers["cache-control"]
    again = full.client.get(urlsplit(address).path, headers={"if-none-match": response.headers["etag"]})
    assert again.status_code == 304
    plain = full.client.get(address, headers={"accept-encoding": "identity"})
    assert plain.content == (STATIC / "app.css").read_bytes()


@pytest.mark.parametrize("name", ["../pages.py", "..%2f..%2fpages.py", "vendor/README.md", "nothing.css", "%00", ""])
def test_only_static_files_are_served(full: Service, name: str) -> None:
    assert full.client.get(f"/tasks/dashboard/static/{name}").status_code == 404


def test_vendored_files_are_the_ones_their_readme_names() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (\S+) \| (\d+) \| `([^`]+)` \|$", vendor_readme(), re.MULTILINE)
    files = {path.relative_to(STATIC / "vendor").as_posix() for path in (STATIC / "vendor").rglob("*.js")}
    assert {name for name, *_ in rows} == files == {"htmx.min.js", "ext/hx-sse.min.js"}
    for name, version, size, sha384 in rows:
        content = (STATIC / "vendor" / name).read_bytes()
        assert version == "4.0.1"
        assert len(content) == int(size)
        assert base64.b64encode(hashlib.sha384(content).digest()).decode() == sha384


def vendor_readme() -> str:
    return (STATIC / "vendor" / "README.md").read_text()


# -- the budget


def test_the_dashboard_stays_small(full: Service) -> None:
    assert sum(path.stat().st_size for path in (STATIC / "vendor").rglob("*.js")) <= 45_000
    assert (STATIC / "app.css").stat().st_size <= 16_000
    assert (STATIC / "app.js").stat().st_size <= 7_000
    task_id = full.client.get("/tasks?func_name=charge_card&limit=1").json()[0]["task_id"]
    for address in ("", "/tasks", f"/tasks/{task_id}"):
        response = full.client.get(f"/tasks/dashboard{address}")
        assert len(gzip.compress(response.content)) <= 6_000, address
        document = Document(response.text)
        loaded = [
            value
            for tag, name, value in document.attributes
            if (tag, name) in (("script", "src"), ("link", "href")) and "icon" not in value
        ]
        assert len(loaded) <= 4
