"""The viewer's scripts read ahead from the list of studies: a service worker in a real Chromium, and what it keeps."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, expect

from sphere.conf import viewer
from tests.support.browser import NO_TOUR, WAIT_MS, require_viewer
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member
from tests.support.viewed import gradient_ct
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.web

ACTIVE = """async () => {
  const found = await navigator.serviceWorker.getRegistration('/viewer/');
  return Boolean(found && found.active && !found.installing && !found.waiting && found.active.state == 'activated');
}"""
KEPT = """async () => {
  const kept = {};
  for (const name of await caches.keys()) {
    kept[name] = (await (await caches.open(name)).keys()).map(one => new URL(one.url).pathname);
  }
  return kept;
}"""
DRAWN = """() => Array.from(document.querySelectorAll('canvas.cornerstone-canvas')).some(canvas => {
  const context = canvas.getContext('2d', {willReadFrequently: true});
  const row = context.getImageData(0, canvas.height >> 1, canvas.width, 1).data;
  return row.some((value, i) => i % 4 < 3 && value > 40);
})"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A viewer that a test may change."""
    require_viewer()
    return Path(shutil.copytree(viewer.folder(), tmp_path_factory.mktemp("build") / "viewer"))


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, build: Path) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("ahead"), web={"viewer_dir": str(build)})
    land(settings, [new_member(data) for data in gradient_ct(6)])
    extract(settings)
    with serving_web(settings) as running:
        yield running


def listed(page: Page, web: Web) -> None:
    """The list of studies."""
    page.goto(f"http://127.0.0.1:{web.port}/")
    expect(page.locator("main tbody tr")).to_have_count(1)


def installed(page: Page, *, but: str = "") -> tuple[str, list[str]]:
    """The one cache there is, of another name than `but`, and the paths in it, once its service worker is active."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while time.monotonic() < deadline:
        if page.evaluate(ACTIVE) and len(kept := page.evaluate(KEPT)) == 1 and but not in kept:
            return next(iter(kept.items()))
        page.wait_for_timeout(50)
    raise AssertionError("no service worker became active")


def named(build: Path) -> set[str]:
    """Paths of the scripts that the viewer's page names by their content."""
    return set(re.findall(r'"(/viewer/[^"/]+\.bundle\.[0-9a-f]{16}\.js)"', (build / "index.html").read_text()))


def test_scripts_come_from_the_service_worker_and_nothing_of_patients_is_kept(
    page: Page, web: Web, build: Path
) -> None:
    listed(page, web)
    name, files = installed(page)
    assert re.fullmatch("viewer-[0-9a-f]{16}", name) and set(files) == named(build) and len(files) > 20

    asked: list[Request] = []
    page.add_init_script(NO_TOUR)
    page.on("request", lambda request: asked.append(request))  # noqa: PLW0108  it gets an attribute
    page.locator("main tbody tr").first.click()
    page.get_by_role("link", name="Open in the viewer").click()
    page.wait_for_function(DRAWN, timeout=WAIT_MS)
    assert page.evaluate("navigator.serviceWorker.controller.scriptURL").endswith("/viewer/service-worker.js")
    served: dict[bool, set[str]] = {True: set(), False: set()}
    for request in asked:
        if response := request.response():
            served[response.from_service_worker].add(request.url.partition(f":{web.port}")[2].partition("?")[0])
    assert set(files) <= served[True]
    of_patients = [path for path in served[False] if path.startswith("/dicom-web/")]
    assert any(path.endswith("/metadata") for path in of_patients) and any("/frames/" in path for path in of_patients)
    assert not [path for path in served[True] if not path.startswith("/viewer/")]
    assert page.evaluate(KEPT) == {name: files}, "as before: what the viewer asked for is not kept"


def test_a_new_build_takes_the_place_of_the_old_one(page: Page, web: Web, build: Path) -> None:
    listed(page, web)
    before, _ = installed(page)
    index, script = build / "index.html", "/viewer/1.bundle.00000000000000ff.js"
    text = index.read_text()
    for copy in build.glob("index.html*"):
        copy.unlink()
    index.write_text(text.replace("<title>", f'<link rel="preload" as="script" href="{script}"><title>'))
    (build / Path(script).name).write_text("// new")
    page.reload()
    _, files = installed(page, but=before)
    assert script in files and set(files) == named(build)


@pytest.mark.parametrize("how", ["blocked", "unknown"])
def test_it_opens_as_well_without_a_service_worker(browser: Browser, web: Web, how: str) -> None:
    """Where the browser lets none in, and where it knows of none, as off loopback without TLS."""
    context = browser.new_context(service_workers="block" if how == "blocked" else "allow")
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.add_init_script(NO_TOUR)
    if how == "unknown":
        page.add_init_script("Object.defineProperty(Navigator.prototype, 'serviceWorker', {get: () => undefined})")
    listed(page, web)
    page.locator("main tbody tr").first.click()
    page.get_by_role("link", name="Open in the viewer").click()
    page.wait_for_function(DRAWN)
    assert not page.evaluate("caches.keys()")
    context.close()
    assert not errors, errors


def test_without_a_viewer_there_is_nothing_to_read_ahead(page: Page, tmp_path: Path) -> None:
    settings = archive(tmp_path, web={"viewer_dir": str(tmp_path / "none")})
    land(settings, [new_member(data) for data in gradient_ct(1)])
    with serving_web(settings) as running:
        with page.expect_response("**/viewer/service-worker.js") as answer:
            listed(page, running)
        assert answer.value.status == 404
        assert page.evaluate("async () => (await navigator.serviceWorker.getRegistrations()).length") == 0
