"""Pages of other origins in a real Chromium on this host: they change nothing here, and learn nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.support.browser import FOREIGN
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.support.web import Web, serving_web
from tests.unit.test_web_audit import records

pytestmark = pytest.mark.web

ONE = new_member(slices(1, rows=32, columns=32)[0])
TRIED = """async ({ root, study }) => {
    const told = {};
    const ask = async (name, path, options) => {
        try {
            const response = await fetch(root + path, options);
            told[name] = `${response.type} ${response.status}`;
        } catch (error) {
            told[name] = "refused";
        }
    };
    const seen = (name, kind, path) => new Promise((done) => {
        const element = document.createElement(kind);
        element.onload = () => { told[name] = "loaded"; done(); };
        element.onerror = () => { told[name] = "refused"; done(); };
        element.src = root + path;
        document.body.append(element);
    });
    const simple = { mode: "no-cors", method: "POST", body: "planted" };
    await ask("annotation", `/annotations?uid=${study}`, simple);
    await ask("unknown", "/annotations?uid=1.2.3&allow_unknown=true&level=study", simple);
    await ask("echo", "/status/peers", simple);
    await ask("list", "/dicom-web/studies", { mode: "no-cors" });
    await ask("read", "/dicom-web/studies", {});
    const stow = { method: "POST", body: "x", headers: { "content-type": "multipart/related" } };
    await ask("stow", "/dicom-web/studies", stow);
    await ask("delete", `/dicom-web/studies/${study}`, { method: "DELETE" });
    await seen("known", "img", `/dicom-web/studies/${study}/thumbnail`);
    await seen("nothing", "img", "/dicom-web/studies/9.9.9/thumbnail");
    await seen("icon", "img", "/page/icon.svg");
    await seen("script", "script", "/page/dom.js");
    return told;
}"""


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("foreign"), web={"delete": True})
    land(settings, [ONE])
    extract(settings)
    with serving_web(settings) as running:
        yield running


@contextmanager
def empty_page() -> Iterator[int]:
    """A server with an empty page; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title>")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("host", [FOREIGN, "127.0.0.1"], ids=["another site", "another port"])
def test_a_page_of_elsewhere_gets_nothing_done(page: Page, web: Web, host: str) -> None:
    root = web.url.removesuffix("/dicom-web")
    web.services.journal.flush()
    before = len(records(web.settings))
    with empty_page() as port:
        page.goto(f"http://{host}:{port}/")
        told = page.evaluate(TRIED, {"root": root, "study": ONE.StudyInstanceUID})
    assert len(told) == 11 and set(told.values()) == {"refused"}, told
    assert web.client.get(f"{root}/annotations").headers["x-total-count"] == "0"
    assert len(web.get("/studies").json()) == 1
    web.services.journal.flush()
    # the simple requests came, and were refused here; those that a browser asks leave for (OPTIONS) never did
    found = [one for one in records(web.settings)[before:] if one["status"] == 403]
    assert {(one["method"], one["path"]) for one in found} >= {
        ("POST", "/annotations"),
        ("GET", "/dicom-web/studies"),
        ("GET", f"/dicom-web/studies/{ONE.StudyInstanceUID}/thumbnail"),
        ("GET", "/dicom-web/studies/9.9.9/thumbnail"),
    }
    assert not any(one["method"] == "DELETE" for one in found)


def test_our_own_page_and_an_address_that_is_typed_are_answered(page: Page, web: Web) -> None:
    page.goto(f"http://127.0.0.1:{web.port}/")
    expect(page.locator("main tbody tr")).to_have_count(1)
    posted = page.evaluate("async () => (await fetch('/status/peers', { method: 'POST' })).status")
    assert posted == 200
    page.goto(f"http://127.0.0.1:{web.port}/dicom-web/studies")
    assert ONE.StudyInstanceUID in page.content()
