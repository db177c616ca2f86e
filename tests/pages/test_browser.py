"""What tests of pages stand on: a Chromium that draws with WebGL, and an archive that it reaches."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page

from tests.support.web import Web

pytestmark = pytest.mark.web

DRAWN = """() => {
    const gl = document.createElement('canvas').getContext('webgl2');
    gl.clearColor(0.2, 0.4, 0.6, 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    const pixel = new Uint8Array(4);
    gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, pixel);
    return Array.from(pixel);
}"""


def test_it_draws_and_asks_the_archive(page: Page, browsed: Web) -> None:
    page.goto(f"http://127.0.0.1:{browsed.port}/healthz")
    assert page.evaluate(DRAWN) == [51, 102, 153, 255]
    studies = page.evaluate("async () => await (await fetch('/dicom-web/studies')).json()")
    assert len(studies) == len(browsed.get("/studies").json()) > 10
