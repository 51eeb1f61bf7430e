"""What only an administrator sees and does."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.browser.conftest import OpenPage
from tests.browser.fixture_gateway import FixtureGateway
from tests.browser.views import fleet_view


def test_without_administration_nothing_can_be_changed(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.show(fleet_view(admin=False))
    page = open_page()
    expect(page.locator("td.cell")).to_have_count(32)
    expect(page.get_by_role("button", name="Drain")).to_have_count(0)
    expect(page.get_by_role("button", name="Add one")).to_have_count(0)


def test_a_worker_is_drained_after_a_question_with_the_admin_key(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.admin_key = "admin"
    gateway.answers["/admin/workers/expert-1/drain"] = (200, {"unserved": [[0, 1]]})
    gateway.show(fleet_view(admin=True))
    page = open_page()
    drain = page.get_by_role("button", name="Drain worker expert-1")
    drain.click()
    page.get_by_role("button", name="Cancel").click()
    assert gateway.received == []
    drain.click()
    page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    dialog = page.get_by_role("dialog", name="Admin key")
    dialog.get_by_label("Key", exact=True).fill("admin")
    dialog.get_by_role("button", name="Use this key").click()
    expect(page.locator('#workers [data-key="expert-1"]')).to_contain_text("Draining. 1 slot waits")
    assert gateway.received == [("/admin/workers/expert-1/drain", {})]


def test_a_replica_is_added_and_the_last_one_stays(
    gateway: FixtureGateway, open_page: OpenPage
) -> None:
    gateway.admin_key = "admin"
    gateway.answers["/admin/experts/1/4/replicas"] = (200, {"replicas": 2})
    gateway.show(fleet_view(admin=True))
    page = open_page()
    page.locator('td.cell[data-layer="1"][data-expert="4"]').click()
    expect(page.get_by_role("button", name="Remove one")).to_be_disabled()
    page.get_by_role("button", name="Add one").click()
    page.get_by_role("dialog").get_by_label("Key", exact=True).fill("admin")
    page.keyboard.press("Enter")
    expect(page.locator(".cell-admin")).to_contain_text("2 held")
    assert gateway.received == [("/admin/experts/1/4/replicas", {"replicas": 2})]


def test_why_an_act_was_refused_is_said(gateway: FixtureGateway, open_page: OpenPage) -> None:
    gateway.admin_key = "admin"
    message = "expert-0 has 3 MiB left, a slot takes 12 MiB"
    gateway.answers["/admin/experts/0/0/replicas"] = (409, {"error": {"message": message}})
    gateway.show(fleet_view(admin=True))
    page = open_page()
    page.locator('td.cell[data-layer="0"][data-expert="0"]').click()
    page.get_by_role("button", name="Add one").click()
    page.get_by_role("dialog").get_by_label("Key", exact=True).fill("admin")
    page.keyboard.press("Enter")
    expect(page.locator(".cell-admin")).to_contain_text(message)
