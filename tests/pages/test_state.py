"""What the page shows of the archive's state: jobs as they go on, quarantine with reasons, peers, storage, errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from sphere.catalog.schema import TABLES
from sphere.conf import serving
from tests.support.browser import WAIT_MS
from tests.support.catalog import write_table
from tests.support.extracted import extract
from tests.support.landing import START, archive, land, new_member, slices
from tests.support.ports import free_port
from tests.support.receiver import running_receiver
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.web

HOSTILE = "<img src=x onerror=window.hit=1>"
PAGE = 100  # members of the quarantine that are shown at once
expect.set_options(timeout=WAIT_MS)


@dataclass(frozen=True)
class Seen:
    """The page in a tab, and what it shows."""

    page: Page
    web: Web

    def view(self, name: str) -> Locator:
        """The rows of a view."""
        self.page.goto(f"http://127.0.0.1:{self.web.port}/#/{name}")
        return self.page.locator("main table.list tbody tr")


def rejected(number: int) -> dict[str, Any]:
    place = {"bundle": "bundles/a.tar", "offset": number, "length": 2048}
    why = {"reason": "TRUNCATED" if number % 3 else "NOT_DICOM", "detail": f"{HOSTILE} number {number}"}
    sent = {"received_at": START + timedelta(seconds=number), "source_aet": "MODALITY", "origin": "test"}
    return {**place, **why, **sent}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("state")
    with running_receiver(folder / "peer") as peer:
        named = (("there", "SPHERE", peer.port), ("gone", "GONE", free_port()))
        peers = [{"name": name, "ae_title": title, "host": "127.0.0.1", "port": port} for name, title, port in named]
        settings = archive(folder / "archive")
        settings = settings.model_copy(update={"peers": type(settings).model_validate({"peers": peers}).peers})
        land(settings, [new_member(one) for one in slices(3)])
        extract(settings)
        write_table(settings, TABLES["quarantine"], [rejected(number) for number in range(PAGE + 3)])
        log = settings.archive.state_dir / "log" / "receiver-1.log"
        log.parent.mkdir(parents=True)
        log.write_text(f"2026-03-01T08:00:00.000Z ERROR   sphere.scp[7] storage is full {HOSTILE}\n")
        with serving_web(settings) as running:
            yield running


@pytest.fixture
def seen(page: Page, web: Web) -> Iterator[Seen]:
    """At the end, nothing that was shown had run."""
    yield Seen(page, web)
    assert page.evaluate("window.hit") is None


def test_what_was_put_aside_with_its_reason(seen: Seen) -> None:
    rows, facts = seen.view("quarantine"), seen.page.locator("main dl.facts")
    expect(rows).to_have_count(PAGE)
    expect(seen.page.locator("main p.note")).to_contain_text(f"{PAGE + 3} members could not be catalogued")
    expect(facts).to_contain_text("TRUNCATED")
    expect(facts).to_contain_text("NOT_DICOM")
    expect(rows.first).to_contain_text(f"{HOSTILE} number {PAGE + 2}")
    expect(rows.first).to_contain_text("NOT_DICOM")
    expect(rows.first).to_contain_text("MODALITY, test")
    expect(rows.first).to_contain_text("2.0 kB")
    seen.page.get_by_role("link", name="More").click()
    expect(rows).to_have_count(3)
    expect(rows.last).to_contain_text("number 0")
    seen.page.get_by_role("link", name="Earlier").click()
    expect(rows).to_have_count(PAGE)


def test_peers_with_their_last_echo(seen: Seen) -> None:
    rows = seen.view("peers")
    expect(rows).to_have_count(2)
    expect(rows.filter(has_text="there")).to_contain_text("never")
    seen.page.get_by_role("button", name="Echo now").click()
    expect(rows.filter(has_text="there").locator("span.good")).to_contain_text(" ms")
    expect(rows.filter(has_text="gone").locator("span.error")).to_contain_text("GONE")
    expect(rows.filter(has_text="never")).to_have_count(0)
    seen.page.reload()
    expect(rows.filter(has_text="there").locator("span.good")).to_contain_text(" ms")


def test_storage_and_errors(seen: Seen) -> None:
    seen.view("storage")
    facts = seen.page.locator("main dl.facts")
    expect(facts.first).to_contain_text(seen.web.settings.storage.root)
    expect(facts.first).to_contain_text(" free of ")
    expect(facts.last).to_contain_text("instances3")
    rows = seen.view("errors")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text(f"storage is full {HOSTILE}")
    expect(rows).to_contain_text("receiver-1")


def test_a_job_as_it_goes_on(seen: Seen) -> None:
    state_dir = seen.web.settings.archive.state_dir
    job = serving.JobState(serving.now(), step="headers", done=3, total=10)
    serving.write_job(state_dir, job)
    seen.view("arrivals")
    facts = seen.page.locator("main dl.facts")
    expect(facts).to_contain_text("headers")
    expect(facts).to_contain_text("headers 30 %")
    serving.write_job(state_dir, replace(job, done=7))
    expect(facts).to_contain_text("headers 70 %")
    ended = replace(job, ended_at=serving.now(), outcome="the catalog is locked", failed=True)
    serving.write_job(state_dir, ended)
    expect(facts.locator("span.error")).to_contain_text("the catalog is locked")


@pytest.mark.parametrize("name", ["arrivals", "quarantine", "peers", "storage", "errors"])
def test_on_a_phone_nothing_is_cut_off(seen: Seen, name: str) -> None:
    seen.page.set_viewport_size({"width": 360, "height": 740})
    seen.view(name)
    expect(seen.page.locator("main h1")).to_be_visible()
    expect(seen.page.locator("main :is(table.list tbody tr, dl.facts)").first).to_be_visible()
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360
    beyond = (
        "Array.from(document.querySelectorAll('main td, main dd, main th')).filter("
        "one => one.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert seen.page.evaluate(beyond) == 0, "and nothing that one cannot reach"
