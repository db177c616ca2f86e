"""The first image of a study in OHIF as a person gets it: visits of a real Chromium that nothing watches.

A debugger costs a page 0.4 s and more: for each exception that OHIF's scripts catch at their start (there are
eleven) V8 then parses them again, all 11 MB, for the places of every frame of its stack. So the page itself notes when
its first image is drawn, and says it in its title, which Chromium tells over HTTP without attaching to it.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.browser import LOOPBACK, SOFTWARE_GL
from tests.support.dicom_tools import require_tool

SETTLED_S = 3  # what a browser does when it starts is no part of a visit
AFTER_S = 1.5  # from a first image to the end of a visit
PATIENCE_S = 60
FIRST_IMAGE = """document.addEventListener('CORNERSTONE_IMAGE_RENDERED', event => {
  const canvas = event.target.querySelector('canvas.cornerstone-canvas');
  if (window.firstImage || !canvas || canvas.width < 300) return;
  const middle = canvas.getContext('2d').getImageData(canvas.width / 3, canvas.height / 2, 1, 1);
  if (middle.data[0] <= 20) return;
  window.firstImage = performance.now();
  setInterval(() => { document.title = 'first image ' + window.firstImage; }, 100);
}, true)"""
"""Notes, in a page, the milliseconds since its address was entered when the viewer has drawn something bright. Looked
for at each drawing and not again and again, as reading pixels back stops a page that draws."""
ACTIVE = """async () => {
  const found = await navigator.serviceWorker.getRegistration('/viewer/');
  return Boolean(found && found.active && found.active.state == 'activated');
}"""


def watched(viewer: Path, target: Path) -> Path:
    """The installed viewer in `target`, its page with FIRST_IMAGE in it."""
    shutil.copytree(viewer, target)
    text = (target / "index.html").read_text(encoding="utf-8")
    for copy in target.glob("index.html*"):
        copy.unlink()
    (target / "index.html").write_text(text.replace("<title>", f"<script>{FIRST_IMAGE}</script><title>", 1), "utf-8")
    return target


@dataclass(frozen=True)
class Chromium:
    """A running browser, by the port of its HTTP interface."""

    port: int

    def ask(self, method: str, path: str) -> bytes:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        link.request(method, path)
        text = link.getresponse().read()
        link.close()
        return text

    def open(self, address: str) -> str:
        """A new tab; returns its id."""
        return str(json.loads(self.ask("PUT", f"/json/new?{address}"))["id"])

    def first_image(self, address: str) -> float:
        """Seconds from an address of the viewer being entered to its first image."""
        tab, deadline = self.open(address), time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(0.1)
            tabs: list[dict[str, Any]] = json.loads(self.ask("GET", "/json/list"))
            [title] = [one["title"] for one in tabs if one["id"] == tab]
            if title.startswith("first image "):
                time.sleep(AFTER_S)
                self.ask("GET", f"/json/close/{tab}")
                return float(title.split()[-1]) / 1000
        raise TimeoutError(f"no image after {PATIENCE_S} s")


@contextmanager
def chromium(profile: Path) -> Iterator[Chromium]:
    """A browser that has not been anywhere, at rest."""
    command = [require_tool("chromium"), "--headless", "--no-sandbox", "--no-first-run", "--window-size=1280,900"]
    command += [f"--user-data-dir={profile}", "--remote-debugging-port=0", *SOFTWARE_GL, *LOOPBACK, "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    try:
        time.sleep(SETTLED_S)
        yield Chromium(int((profile / "DevToolsActivePort").read_text().split()[0]))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def prepared(browser: Chromium, root: str) -> float:
    """Seconds from the list of studies being entered until the viewer's service worker is active; nothing stays
    attached."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        driven = playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{browser.port}")
        page = driven.contexts[0].new_page()
        began = time.monotonic()
        page.goto(root)
        while not page.evaluate(ACTIVE):
            page.wait_for_timeout(20)
        took = time.monotonic() - began
        driven.close()
    return took


def measure(folder: Path, root: str, study: str, rounds: int, say: Callable[[str], None]) -> None:
    """Print seconds of each kind of visit, each round in a profile of its own. `root`: the address of the server."""
    address = f"{root}/viewer/viewer?StudyInstanceUIDs={study}"
    seconds: dict[str, list[float]] = {}

    def note(kind: str, took: float) -> None:
        seconds.setdefault(kind, []).append(took)

    for turn in range(rounds):
        with chromium(folder / f"direct-{turn}") as browser:
            for kind in ("first visit", "second visit", "third visit", "fourth visit"):
                note(kind, browser.first_image(address))
        with chromium(folder / f"at-once-{turn}") as browser:
            browser.open(f"{root}/")
            time.sleep(1)
            note("first visit, 1 s after the list was opened", browser.first_image(address))
        with chromium(folder / f"prepared-{turn}") as browser:
            note("(from the list being opened until the scripts are ready)", prepared(browser, f"{root}/"))
            time.sleep(1)
            note("first visit, after that", browser.first_image(address))
    for kind, all_of_them in seconds.items():
        say(f"  {kind:58} {'  '.join(f'{one:5.2f}' for one in all_of_them)} s")
