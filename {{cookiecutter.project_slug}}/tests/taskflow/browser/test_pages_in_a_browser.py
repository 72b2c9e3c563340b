"""Each page in both themes and three widths: nothing complains, everybody can use it; and what operators do."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from playwright.sync_api import Route, expect

from app.taskflow.models import TaskFilter, TaskRecord, TaskStatus
from app.taskflow.web.navigation import NAVIGATION

from .conftest import Shop, Tab

OpenTab = Callable[..., Tab]
WIDTHS = (390, 900, 1440)


def tasks_of(shop: Shop, **where: object) -> list[TaskRecord]:
    page = shop.ask(lambda: shop.manager.store.page(TaskFilter(**where)))  # type: ignore[arg-type]
    return list(page.tasks)


def addresses(shop: Shop) -> list[str]:
    """Every page of the navigation, and one of each kind that they lead to."""
    failed = tasks_of(shop, statuses=(TaskStatus.FAILED,))[0].task_id
    mail = tasks_of(shop, statuses=(TaskStatus.SUCCESS,), func_name="send_email")[0].task_id
    later = tasks_of(shop, statuses=(TaskStatus.PENDING,))[0].task_id
    more = ["?span=7d", "/queues?name=default", "/schedules/once", "/dead?tab=dismissed", "/nowhere"]
    more += [f"/tasks/{failed}", f"/tasks/{mail}", f"/tasks/{later}", "/tasks?q=status:failed+color:red"]
    more += ["/bulk?act=dismiss&q=status:failed", "/audit?actor=ada"]
    return [entry.path.removeprefix("/dashboard") for entry in NAVIGATION] + more


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_is_quiet_accessible_and_fits(shop: Shop, open_tab: OpenTab, theme: str, width: int) -> None:
    tab = open_tab(color_scheme=theme, viewport={"width": width, "height": 900})
    for address in addresses(shop):
        response = tab.page.goto(shop.address(address))
        assert response is not None
        expected = 404 if address == "/nowhere" else 200
        assert response.status == expected, address
        assert tab.axe() == [], address
        wide, room = tab.width()
        assert wide <= room, f"{address} is {wide} wide at {room}"
        assert tab.page.locator("h1").count() == 1, address
        complaints = [said for said in tab.complaints if "404" not in said]
        assert complaints == [], address


def test_a_failed_task_is_found_by_its_error_and_retried(shop: Shop, open_tab: OpenTab) -> None:
    page = open_tab().page
    page.goto(shop.address("/tasks"))
    page.get_by_role("searchbox").fill('error:"funds for order 3"')
    page.get_by_role("button", name="Search").click()
    page.locator(".tasks tbody tr").first.get_by_role("link").click()
    expect(page.get_by_text("CardDeclined").first).to_be_visible()
    before = page.locator(".waterfall tbody tr").count()
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".waterfall tbody tr")).to_have_count(before + 2)  # live: both of the new attempts


@pytest.mark.parametrize("with_script", [True, False])
def test_a_search_is_saved_and_found_again(shop: Shop, open_tab: OpenTab, with_script: bool) -> None:
    tab = open_tab(java_script_enabled=with_script)
    tab.page.goto(shop.address("/tasks"))
    tab.page.get_by_role("searchbox").fill("status:failed name:charge_card")
    tab.page.keyboard.press("Enter")
    tab.page.get_by_role("button", name="Save view").click()
    tab.page.get_by_role("link", name="Tasks").click()
    tab.page.get_by_role("navigation", name="Saved views").get_by_role("link").click()
    expect(tab.page.get_by_role("searchbox")).to_have_value("status:failed name:charge_card")
    if with_script:
        assert tab.axe() == []
    tab.page.get_by_role("button", name="Remove view").click()
    expect(tab.page.get_by_role("button", name="Save view")).to_be_visible()
    expect(tab.page.get_by_role("navigation", name="Saved views").get_by_role("link")).to_have_count(0)


def test_a_whole_group_is_dismissed_with_its_number_said_before_and_restored(shop: Shop, open_tab: OpenTab) -> None:
    page = open_tab().page
    page.goto(shop.address("/dead"))
    page.get_by_role("link", name="Dismiss 5").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Dismiss 5 tasks?")
    page.get_by_label("Why").fill("the provider was down")
    page.get_by_role("button", name="Dismiss 5").click()
    expect(page.locator("#summary")).to_have_text("5 of 5")
    expect(page.get_by_role("heading", level=1)).to_have_text("Done")
    page.goto(shop.address("/dead?tab=dismissed"))
    page.get_by_role("link", name="Restore 5").click()
    page.get_by_role("button", name="Restore 5").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Done")
    page.goto(shop.address("/audit"))
    expect(page.locator("#audit")).to_contain_text("the provider was down")


def test_ticked_tasks_are_retried_and_ticks_survive_what_happens_meanwhile(shop: Shop, open_tab: OpenTab) -> None:
    page = open_tab().page
    page.goto(shop.address("/tasks?q=status:failed"))
    boxes = page.get_by_role("checkbox")
    boxes.nth(0).check()
    boxes.nth(2).click(modifiers=["Shift"])
    shop.ask(lambda: shop.manager.enqueue(shop.manager.registry.named("send_email").function, "x@example.com"))
    page.wait_for_timeout(1_500)
    assert [boxes.nth(n).is_checked() for n in range(4)] == [True, True, True, False]
    page.get_by_role("button", name="Retry", exact=True).click()
    expect(page.get_by_role("searchbox")).to_have_value("status:failed")


def test_a_running_tasks_log_is_followed_to_its_end(shop: Shop, open_tab: OpenTab) -> None:
    function = shop.manager.registry.named("sync_stock").function
    task_id = shop.ask(lambda: shop.manager.enqueue(function, 20))
    page = open_tab().page
    page.goto(shop.address(f"/tasks/{task_id}"))
    expect(page.locator("#log-lines")).to_contain_text("the end")
    expect(page.locator(".head .badge")).to_contain_text("Success")


def test_a_queue_is_paused_for_a_reason_and_resumed(shop: Shop, open_tab: OpenTab) -> None:
    page = open_tab().page
    page.goto(shop.address("/queues"))
    page.get_by_role("link", name="Pause mail").click()
    page.get_by_label("Reason").fill("provider is down")
    page.get_by_role("button", name="Pause mail").click()
    row = page.get_by_role("row").filter(has_text="mail")
    expect(row).to_contain_text("provider is down")
    row.get_by_role("button", name="Resume").click()
    expect(row).not_to_contain_text("Paused")


def test_a_schedule_is_run_now(shop: Shop, open_tab: OpenTab) -> None:
    page = open_tab().page
    page.goto(shop.address("/schedules"))
    expect(page.get_by_text("every weekday at 08:00")).to_be_visible()
    page.get_by_role("button", name="Run now nightly_report").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("nightly_report")


def test_a_one_off_is_moved_and_called_off(shop: Shop, open_tab: OpenTab) -> None:
    page = open_tab().page
    page.goto(shop.address("/schedules/once"))
    page.get_by_text("Move").first.click()
    page.get_by_label("When, in UTC").fill("2031-01-02T03:04:05")
    page.get_by_role("button", name="Move", exact=True).click()
    expect(page.get_by_role("row").filter(has_text="remind:991")).to_contain_text("2031-01-02 03:04:05")


def test_everything_can_be_reached_by_keyboard_alone(shop: Shop, open_tab: OpenTab) -> None:
    tab = open_tab()
    page = tab.page
    page.goto(shop.address())
    for entry in NAVIGATION[1:]:
        page.keyboard.press("g")
        page.keyboard.press(entry.key)
        page.wait_for_url(f"**{entry.path}")
    page.keyboard.press("/")
    page.wait_for_url("**/tasks")
    page.keyboard.press("/")
    page.keyboard.type("name:send_email")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=name*")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("x")
    expect(page.get_by_role("checkbox").nth(1)).to_be_checked()
    page.keyboard.press("x")
    page.keyboard.press("Enter")
    page.wait_for_url("**/dashboard/tasks/*")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    theme = page.locator("html").get_attribute("data-theme")
    page.keyboard.press("t")
    assert page.locator("html").get_attribute("data-theme") != theme
    assert tab.complaints == []


def test_everything_works_without_javascript(shop: Shop, open_tab: OpenTab) -> None:
    page = open_tab(java_script_enabled=False).page
    page.goto(shop.address("/tasks"))
    page.get_by_role("searchbox").fill("status:failed name:charge_card")
    page.get_by_role("button", name="Search").click()
    page.locator(".tasks tbody tr").first.get_by_role("link").click()
    page.get_by_text("Dismiss").first.click()
    page.get_by_placeholder("Reason").fill("known")
    page.locator(".drop form").get_by_role("button").click()
    expect(page.locator("#task")).to_contain_text("Dismissed")
    page.get_by_role("button", name="Restore").click()
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    page.get_by_role("link", name="Queues").click()
    page.get_by_role("link", name="default", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("default")
    page.get_by_role("button", name="Theme").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "light")


def test_a_stream_that_ended_goes_on_from_its_last_event(shop: Shop, open_tab: OpenTab) -> None:
    page = open_tab().page
    asked: list[str | None] = []
    page.on(
        "request",
        lambda request: asked.append(request.headers.get("last-event-id")) if "/stream" in request.url else None,
    )
    page.goto(shop.address("/tasks"))
    expect(page.locator("#live-word")).to_have_text("live")
    shop.ask(lambda: shop.manager.enqueue(shop.manager.registry.named("send_email").function, "y@example.com"))
    deadline = time.monotonic() + 40
    while len(asked) < 2:
        assert time.monotonic() < deadline
        page.wait_for_timeout(200)
    assert asked[0] is None
    assert (asked[1] or "").isdigit()


def test_a_page_is_live_also_where_a_script_comes_late(shop: Shop, open_tab: OpenTab) -> None:
    page = open_tab().page

    def late(route: Route) -> None:
        time.sleep(0.5)
        route.continue_()

    page.route("**/hx-sse.min.js*", late)
    page.goto(shop.address("/tasks"))
    expect(page.locator("#live-word")).to_have_text("live")


def test_what_is_being_typed_survives_what_happens_meanwhile(shop: Shop, open_tab: OpenTab) -> None:
    page = open_tab().page
    page.goto(shop.address("/tasks"))
    box = page.get_by_role("searchbox")
    box.focus()
    for letter in "charge_card":
        page.keyboard.type(letter)
        shop.ask(lambda: shop.manager.enqueue(shop.manager.registry.named("send_email").function, "z@example.com"))
        page.wait_for_timeout(150)
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(1_200)
    assert box.input_value() == "charge_card"
    assert page.evaluate("document.activeElement.selectionStart") == len("charge_card") - 1
