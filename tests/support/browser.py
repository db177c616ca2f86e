"""Chromium for tests of the pages: headless, drawing WebGL in software, kept to this host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from sphere.conf import viewer
from sphere.ingest.header import identify
from tests.support.dicom_tools import require_tool
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.support.web import Web, serving_web

SOFTWARE_GL = (
    "--enable-unsafe-swiftshader",
)  # the pages themselves are drawn without WebGL, as on any host without a GPU
FOREIGN = "foreign.example"  # another site, which is served here as well
RULES = f"MAP {FOREIGN} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
LOOPBACK = (f"--host-resolver-rules={RULES}", "--disable-background-networking")
WAIT_MS = 60_000  # milliseconds for anything that a test waits for: the machine may be busy
NO_TOUR = "localStorage.setItem('shownTours', '[\"basicViewerTour\"]')"  # a script before OHIF's own
PACKAGED = Path(pydicom.__file__).parent / "data" / "test_files"


def require_viewer() -> None:
    """Without OHIF the test is skipped, or fails with SPHERE_REQUIRE_ALL=1."""
    if not (viewer.folder() / "index.html").is_file():
        line = "OHIF is missing: run make viewer"
        pytest.fail(line, pytrace=False) if os.environ.get("SPHERE_REQUIRE_ALL") == "1" else pytest.skip(line)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for a module. Not for the session: while it is there, asyncio.run cannot be used by other tests."""
    program = require_tool("chromium")
    with sync_playwright() as playwright:
        # no sandbox: tests run as root in containers
        options = {"executable_path": program, "chromium_sandbox": False, "args": [*SOFTWARE_GL, *LOOPBACK]}
        running = playwright.chromium.launch(**options)  # type: ignore[arg-type]
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new tab with nothing remembered; a script's uncaught error fails the test at its end."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT_MS)
    errors: list[str] = []
    tab = context.new_page()
    tab.on("pageerror", lambda error: errors.append(str(error)))
    yield tab
    context.close()
    assert not errors, errors


@pytest.fixture(scope="session")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """An archive to look at, over HTTP: pydicom's packaged files and a CT of 12 slices, catalogued."""
    require_tool("chromium")
    settings = archive(tmp_path_factory.mktemp("browsed"))
    files = {identify(data, size=len(data)).SOPInstanceUID: data for data in _packaged()}
    land(settings, [new_member(data) for data in (*files.values(), *slices(12, rows=64, columns=64))])
    extract(settings)
    with serving_web(settings) as running:
        yield running


def _packaged() -> Iterator[bytes]:
    for file in sorted(PACKAGED.glob("*.dcm")):
        data = file.read_bytes()
        found = identify(data, size=len(data))
        if found.SOPInstanceUID and found.StudyInstanceUID and found.SeriesInstanceUID:
            yield data
