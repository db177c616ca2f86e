"""OHIF on this archive, in a real Chromium: what it draws is read back from its canvases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from time import monotonic
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, Response

from sphere.conf import viewer
from sphere.ingest.storage import open_storage
from sphere.scp.web.tokens import Tokens
from tests.support.browser import NO_TOUR, WAIT_MS, require_viewer
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member
from tests.support.viewed import SIZE, gradient_ct, grey, report, segmentation
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.web

SLICES = 24
SEEN = f"{NO_TOUR}; sessionStorage.setItem('sphere.token', '{{token}}')"
LINES = """() => Array.from(document.querySelectorAll('canvas.cornerstone-canvas')).map(canvas => {
    const context = canvas.getContext('2d', {willReadFrequently: true});
    const middle = [canvas.width >> 1, canvas.height >> 1];
    const row = context.getImageData(0, middle[1], canvas.width, 1).data;
    const column = context.getImageData(middle[0], 0, 1, canvas.height).data;
    return [row, column].map(one => Array.from(one));
})"""
BRIGHT = "([row]) => row.some((value, i) => i % 4 < 3 && value > 40)"
ALL_SHOW = f"number => {{ const all = ({LINES})(); return all.length == number && all.every({BRIGHT}) }}"
REDDISH = "([row]) => row.some((value, i) => i % 4 == 0 && value > row[i + 1] + 30)"
CHANGED = f"before => JSON.stringify(({LINES})()[0][0]) != before"
WORKERS = ("worker.", "/8097.")  # in the addresses of scripts that run beside the page
CONTEXTS = """window.contexts = 0;
for (const kind of [HTMLCanvasElement, OffscreenCanvas]) {
  const before = kind.prototype.getContext;
  kind.prototype.getContext = function (name, ...more) {
    if (/webgl/.test(name) && !this.counted) { this.counted = true; window.contexts++; }
    return before.call(this, name, ...more);
  };
}"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """A CT with a segmentation and a report, over HTTP, to those who show a token; and an installed viewer."""
    require_viewer()
    settings = archive(tmp_path_factory.mktemp("shown"), web={"auth": "all"})
    images = gradient_ct(SLICES)
    land(settings, [new_member(data) for data in (*images, segmentation(images), report(images))])
    extract(settings)
    token = Tokens(open_storage(settings.storage.root)).create("viewer", "reader", None)
    with serving_web(settings) as running:
        running.client.headers["authorization"] = f"Bearer {token}"
        yield running


@pytest.fixture
def opened(page: Page, shown: Web) -> Iterator[Page]:
    """The study in the viewer, its first image drawn; at the end, nothing of elsewhere was asked for, nor forbidden."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: said.append(f"asked {request.url}"))
    token = str(shown.client.headers["authorization"]).removeprefix("Bearer ")
    page.add_init_script(SEEN.replace("{token}", token))
    study = shown.get("/studies").json()[0]["0020000D"]["Value"][0]
    page.goto(f"http://127.0.0.1:{shown.port}/viewer/viewer?StudyInstanceUIDs={study}")
    page.wait_for_function(ALL_SHOW, arg=1, polling=100)
    yield page
    here = (f"asked http://127.0.0.1:{shown.port}/", "asked blob:", "asked data:")
    assert not [line for line in said if line.startswith("asked ") and not line.startswith(here)]
    assert not [line for line in said if "Content Security Policy" in line]


def lines(page: Page, viewport: int = 0) -> tuple[Any, Any]:
    """The middle row and the middle column of a viewport: RGBA of each pixel."""
    row, column = page.evaluate(LINES)[viewport]
    return np.array(row).reshape(-1, 4), np.array(column).reshape(-1, 4)


def redrawn_until(page: Page, drawn: Locator) -> None:
    """Waits for annotations. OHIF draws them with their image: what is loaded after it comes with the next redraw.

    So the image, the last one of its stack, is left and returned to now and then, as a user would.
    """
    page.mouse.move(760, 500)
    until = monotonic() + WAIT_MS / 1000
    while not drawn.count():
        assert monotonic() < until, "the annotation is not drawn"
        page.wait_for_timeout(1000)
        for there_and_back in (-100, 100) if not drawn.count() else ():
            page.mouse.wheel(0, there_and_back)
            page.wait_for_timeout(500)


def differences(row: Any, width: int, height: int, number: int) -> Any:
    """By how much the grey levels of a row differ from those of slice `number`, drawn as high as the canvas is."""
    scale = height / SIZE
    columns = (np.arange(width) + 0.5 - (width - height) / 2) / scale - 0.5
    inside = (columns > 1) & (columns < SIZE - 2)
    return np.abs(row[inside, 0] - grey(columns[inside], number))


def test_a_stack_and_its_planes(opened: Page) -> None:
    row, column = lines(opened)
    found = [number for number in range(SLICES) if differences(row, len(row), len(column), number).max() < 1.6]
    assert len(found) == 1 and found[0] in (0, SLICES - 1), "the grey levels of the first or the last slice"
    assert (row[:, 0] == row[:, 1]).all() and (row[:, 0] == row[:, 2]).all()

    before = opened.evaluate(f"() => JSON.stringify(({LINES})()[0][0])")
    opened.mouse.move(760, 500)
    opened.mouse.wheel(0, 100)
    opened.wait_for_function(CHANGED, arg=before, polling=100)
    row, column = lines(opened)
    assert differences(row, len(row), len(column), abs(found[0] - 1)).max() < 1.6, "its neighbour"

    opened.locator("[data-cy=Layout]").click()
    opened.get_by_text("MPR", exact=True).click()
    opened.wait_for_function(ALL_SHOW, arg=3, polling=100)
    along = [np.diff(lines(opened, place)[0][:, 0].astype(int)) for place in range(3)]
    assert (along[0] >= 0).sum() > 300 and along[0].max() < 20, "axial: brighter from left to right"


def test_a_segmentation_and_a_report_are_shown(opened: Page) -> None:
    others = opened.locator("[data-cy=study-browser-thumbnail-no-image]")
    others.filter(has_text="SEG").dblclick()
    opened.wait_for_function(f"() => ({LINES})().some({REDDISH})", polling=100)
    row, _ = lines(opened)
    coloured = np.flatnonzero(row[:, 0] > row[:, 1] + 30)
    assert 0.45 < len(coloured) / 842 < 0.55, "the middle half of the columns"
    assert coloured[-1] - coloured[0] == len(coloured) - 1

    others.filter(has_text="SR").dblclick()
    line = opened.locator("svg.svg-layer g[data-annotation-uid]")
    redrawn_until(opened, line)
    ends = opened.locator("svg.svg-layer line").first
    length = float(ends.get_attribute("x2") or 0) - float(ends.get_attribute("x1") or 0)
    assert abs(length / 842 - 40 / SIZE) < 0.01, "from column 10 to column 50"


def test_from_the_list_of_studies_into_the_viewer(page: Page, shown: Web) -> None:
    """With the token that was shown to the page."""
    token = str(shown.client.headers["authorization"]).removeprefix("Bearer ")
    page.add_init_script(SEEN.replace("{token}", token))
    page.goto(f"http://127.0.0.1:{shown.port}/")
    page.locator("main tbody tr").first.click()
    page.get_by_role("link", name="Open in the viewer").click()
    page.wait_for_function(ALL_SHOW, arg=1, polling=100)
    row, column = lines(page)
    assert any(differences(row, len(row), len(column), number).max() < 1.6 for number in range(SLICES))


def test_what_a_first_visit_costs(page: Page, shown: Web) -> None:
    """Requests, bytes and WebGL contexts until the first image; seconds are what make bench-web measures."""
    token = str(shown.client.headers["authorization"]).removeprefix("Bearer ")
    page.add_init_script(SEEN.replace("{token}", token))
    page.add_init_script(CONTEXTS)
    answers: list[Response] = []
    page.on("response", lambda answer: answers.append(answer))  # noqa: PLW0108  it gets an attribute
    study = shown.get("/studies").json()[0]["0020000D"]["Value"][0]
    page.goto(f"http://127.0.0.1:{shown.port}/viewer/viewer?StudyInstanceUIDs={study}")
    page.wait_for_function(ALL_SHOW, arg=1, polling=100)
    assert not [answer.url for answer in answers if answer.status >= 400]
    assert page.evaluate("window.contexts") <= 6, "one to draw with, those that ask what there is, thumbnails"

    root = f"http://127.0.0.1:{shown.port}/viewer/"
    named = re.findall(r'href="/viewer/([^"]+\.js)"', answers[0].text())
    preloaded = {root + name for name in named}
    scripts = {answer.url for answer in answers if answer.request.resource_type == "script"}
    late = {
        url for url in scripts - preloaded if not url.startswith(root + "app") and not any(w in url for w in WORKERS)
    }
    assert len(preloaded) > 20 and not late, "what was asked for later than it could have been"
    files = [answer for answer in answers if answer.url.startswith(root)]
    assert {answer.headers.get("content-encoding") for answer in files if answer.url in preloaded} == {"zstd"}
    small = "esbuild" in (viewer.folder() / "installed.txt").read_text(encoding="utf-8")
    assert sum(answer.request.sizes()["responseBodySize"] for answer in files) < (5 if small else 10) << 20
    assert len(answers) < 90
