"""So many searches at once of one caller: 429 for more, and others are not concerned."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from sphere.catalog.answer import Match
from sphere.conf.settings import Settings
from sphere.scp.web.app import Services
from sphere.scp.web.fair import SEARCHES, caller_of
from tests.faults.test_dimse_faults import study
from tests.support.landing import archive
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

PATIENCE_S = 60.0


class Held:
    """A catalog whose searches stand still until `go_on`; each then gives `count` answers."""

    def __init__(self, count: int = 1) -> None:
        self.count, self.go_on = count, threading.Event()
        self.asked = 0

    def find(self, query: Any, **_: Any) -> Iterator[Match]:
        self.asked += 1
        assert self.go_on.wait(PATIENCE_S)
        for number in range(self.count):
            yield study(f"1.2.{number}")

    def restricted(self, grant: Any) -> Held:
        return self

    def close(self) -> None:
        """Nothing is open."""


def eventually(what: Callable[[], Any]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def held() -> Iterator[Held]:
    catalog = Held()
    yield catalog
    catalog.go_on.set()


def limited(folder: Path, most: int) -> Settings:
    settings = archive(folder)
    return settings.model_copy(update={"web": settings.web.model_copy(update={"max_queries": most})})


@pytest.fixture
def web(tmp_path: Path, held: Held) -> Iterator[Web]:
    def change(services: Services) -> Services:
        return replace(services, finder=held)  # type: ignore[arg-type]

    with serving_web(limited(tmp_path, 2), change) as running:
        yield running
        held.go_on.set()


def ask(web: Web, path: str = "/studies", secret: str = "") -> tuple[threading.Thread, list[httpx.Response]]:
    """A search in a thread and, when that ends, its answer."""
    answers: list[httpx.Response] = []
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}

    def get() -> None:
        answers.append(httpx.get(f"{web.url}{path}", headers=headers, timeout=PATIENCE_S))

    thread = threading.Thread(target=get)
    thread.start()
    return thread, answers


def test_one_more_than_allowed(web: Web, held: Held) -> None:
    under_way = [ask(web), ask(web, "/instances?PatientID=1")]
    eventually(lambda: held.asked == 2)
    for path in ("/studies", "/series", "/instances", "/studies/1.2/series", "/studies/1.2/series/1.3/instances"):
        refused = web.get(path)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json() == {
            "type": "about:blank", "title": "Too Many Requests", "status": 429,
            "detail": "2 searches at once are answered: wait for the end of one",
        }  # fmt: skip
    assert web.client.head(f"{web.url}/studies").status_code == 429
    assert web.client.get(web.url.replace("/dicom-web", "/healthz")).status_code == 200, "only searches are counted"
    assert web.get("/studies/1.2/metadata").status_code != 429
    held.go_on.set()
    for thread, answers in under_way:
        thread.join(PATIENCE_S)
        assert answers[0].status_code == 200
    assert web.get("/studies").status_code == 200, "a place is free again"


def test_each_caller_has_a_share(web: Web, held: Held) -> None:
    """Two tokens, and who shows none, of one address."""
    one, two = (web.services.tokens.create(name, "reader", None) for name in ("one", "two"))
    waiting = [ask(web, secret=secret) for secret in ("", "", one, one, two, two)]
    eventually(lambda: held.asked == 6)
    for secret in (one, two, ""):
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        assert web.get("/studies", headers=headers).status_code == 429
    held.go_on.set()
    for thread, answers in waiting:
        thread.join(PATIENCE_S)
        assert answers[0].status_code == 200


def test_until_the_answer_is_sent_or_its_reader_is_gone(web: Web, held: Held) -> None:
    """Half an answer counts; a client that left does not."""
    held.count = 200_000
    held.go_on.set()
    clients = [socket.create_connection(("127.0.0.1", web.port)) for _ in range(2)]
    for client in clients:
        client.sendall(b"GET /dicom-web/studies HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
    assert web.get("/studies").status_code == 429
    for client in clients:
        client.close()
    held.count = 1
    eventually(lambda: web.get("/studies").status_code == 200)


def test_what_goes_wrong_gives_its_place_back(web: Web, held: Held) -> None:
    held.go_on.set()
    for _ in range(5):
        assert web.get("/studies?Nonsense=1").status_code == 400
    assert web.get("/studies").status_code == 200


def test_without_a_limit(tmp_path: Path, held: Held) -> None:
    with serving_web(limited(tmp_path, 0), lambda same: replace(same, finder=held)) as web:  # type: ignore[arg-type]
        waiting = [ask(web) for _ in range(8)]
        eventually(lambda: held.asked == 8)
        held.go_on.set()
        for thread, answers in waiting:
            thread.join(PATIENCE_S)
            assert answers[0].status_code == 200


def test_who_a_caller_is() -> None:
    client = ("10.0.0.5", 4711)
    for who, expected in (
        ("token:1:a", "token:1:a"), ("oidc:anna", "oidc:anna"), ("local", "address:10.0.0.5"), ("", "address:10.0.0.5"),
    ):  # fmt: skip
        assert caller_of({"state": {"who": who}, "client": client}) == expected


@pytest.mark.parametrize(
    ("path", "searches"),
    [
        ("/studies", True), ("/series", True), ("/instances", True), ("/studies/1/series", True),
        ("/studies/1/instances", True), ("/studies/1/series/2/instances", True), ("/studies/1", False),
        ("/studies/1/metadata", False), ("/studies/1/series/2", False), ("/studies/1/series/2/instances/3", False),
        ("/studies/1/series/2/instances/3/frames/1", False), ("/studies/", False),
    ],
)  # fmt: skip
def test_which_paths_are_searches(path: str, searches: bool) -> None:
    assert bool(SEARCHES.fullmatch(f"/dicom-web{path}")) == searches
