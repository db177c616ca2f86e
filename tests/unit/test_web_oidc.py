"""Bearer tokens of a provider (OpenID Connect), and its keys."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from sphere.conf.errors import SettingsError
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.scp.web.oidc import FETCH_S, FRESH_S, Known, Oidc
from tests.support.oidc import KEY, NOW, OTHER, asked, bearer, jwks, provided
from tests.support.web import serving_web

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return provided(tmp_path_factory.mktemp("access"))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (bearer(), 204),
        (bearer(roles=["writer", "unknown"]), 204),
        (bearer(roles="reader"), 204),
        (bearer(roles=[]), 403),
        (bearer(roles=None), 403),
        (bearer(exp=NOW - timedelta(minutes=5)), 401),
        (bearer(exp=None), 401),
        (bearer(iss="https://elsewhere"), 401),
        (bearer(aud="another"), 401),
        (bearer(sub=None), 401),
        (bearer(nbf=NOW + timedelta(hours=1)), 401),
        (bearer(OTHER), 401),
        (bearer(kid="two"), 401),
        (bearer("a secret of enough characters, all in all", algorithm="HS256"), 401),
        (bearer("", algorithm="none"), 401),
    ],
)
def test_bearer_tokens_of_a_provider(far: TestClient, headers: dict[str, str], status: int) -> None:
    assert asked(far, headers) == status


def test_keys_are_rotated(settings: Settings, tmp_path: Path) -> None:
    path, now = jwks(tmp_path / "keys.json", one=KEY), [0.0]
    oidc = Oidc(settings.web.model_copy(update={"oidc_jwks": str(path)}), clock=lambda: now[0])
    first, second = (bearer(key, kid)["authorization"][7:] for key, kid in ((KEY, "one"), (OTHER, "two")))
    assert oidc.check(first) == Known("anna", "reader")
    jwks(path, two=OTHER)
    assert oidc.check(second) is None  # looked a moment ago
    now[0] = 31
    assert oidc.check(second) == Known("anna", "reader")
    assert oidc.check(first) is None


def test_a_key_that_is_withdrawn_is_forgotten(settings: Settings, tmp_path: Path) -> None:
    """By the next look at the set, though nobody shows a key that is not known."""
    path, now = jwks(tmp_path / "keys.json", one=KEY, two=OTHER), [0.0]
    oidc = Oidc(settings.web.model_copy(update={"oidc_jwks": str(path)}), clock=lambda: now[0])
    first, second = (bearer(key, kid)["authorization"][7:] for key, kid in ((KEY, "one"), (OTHER, "two")))
    assert oidc.check(first) == oidc.check(second) == Known("anna", "reader")
    jwks(path, two=OTHER)
    now[0] = FRESH_S
    assert oidc.check(first) == Known("anna", "reader")
    now[0] = FRESH_S + 1
    assert (oidc.check(first), oidc.check(second)) == (None, Known("anna", "reader"))
    jwks(path, one=OTHER)  # the same id for another key
    now[0] = 3 * FRESH_S
    assert oidc.check(first) is None


@contextmanager
def provider(answers: dict[str, bytes]) -> Iterator[str]:
    """A server that gives, byte for byte, the responses by path; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(answers[self.path])

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def answered(body: bytes, *, status: str = "200 OK", length: int | None = None) -> bytes:
    head = f"HTTP/1.0 {status}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


def test_keys_at_an_address_are_rotated(settings: Settings, tmp_path: Path) -> None:
    answers = {"/keys": answered(jwks(tmp_path / "keys.json", one=KEY).read_bytes())}
    now = [0.0]
    first, second = (bearer(key, kid)["authorization"][7:] for key, kid in ((KEY, "one"), (OTHER, "two")))
    with provider(answers) as url:
        oidc = Oidc(settings.web.model_copy(update={"oidc_jwks": f"{url}/keys"}), clock=lambda: now[0])
        assert oidc.check(first) == Known("anna", "reader")
        answers["/keys"] = answered(jwks(tmp_path / "keys.json", two=OTHER).read_bytes())
        assert (oidc.check(first), oidc.check(second)) == (Known("anna", "reader"), None)  # looked a moment ago
        now[0] = 31
        assert (oidc.check(second), oidc.check(first)) == (Known("anna", "reader"), None)
    now[0] = 700  # nobody answers there any more
    assert oidc.check(second) is None
    assert oidc.check(second) == Known("anna", "reader"), "with the keys that are known"


@pytest.mark.parametrize(
    "answer",
    [
        answered(b"[]"),
        answered(b'{"keys": 5}'),
        answered(b'{"keys": [5]}'),
        answered(b'{"keys": []}'),
        answered(b'{"keys": [{"kty": "RSA", "kid": "one", "n": 5, "e": "AQAB"}]}'),
        answered(b"\xff\xfe"),
        answered(b"[" * 5000),
        answered(b'{"keys": ' + b" " * (1 << 20) + b"[]}"),
        answered(b"{}", status="500 No"),
        answered(b"{}", length=500),
        b"no HTTP at all\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.0 302 Found\r\nLocation: file:///etc/hostname\r\n\r\n",
        b"",
    ],
    ids=range(14),
)
def test_a_key_set_that_is_none_refuses_and_no_more(settings: Settings, answer: bytes) -> None:
    with provider({"/keys": answer}) as url:
        oidc = Oidc(settings.web.model_copy(update={"oidc_jwks": f"{url}/keys"}))
        assert oidc.check(bearer()["authorization"][7:]) is None


@contextmanager
def silent_provider() -> Iterator[tuple[str, threading.Semaphore, Callable[[], None]]]:
    """An address that takes connections and says nothing; what is released for each of them; what ends them."""
    asked = threading.Semaphore(0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def take() -> None:
            with suppress(OSError):
                while True:
                    held.append(server.accept()[0])
                    asked.release()

        thread = threading.Thread(target=take)
        thread.start()

        def let_go() -> None:
            while held:
                held.pop().close()

        yield f"http://127.0.0.1:{server.getsockname()[1]}/keys", asked, let_go
        let_go()
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_one_asks_for_a_key_and_the_others_go_on(settings: Settings, tmp_path: Path) -> None:
    """By the keys that are known, however long the provider takes."""
    answers = {"/keys": answered(jwks(tmp_path / "keys.json", one=KEY).read_bytes())}
    now = [0.0]
    known, unknown = (bearer(KEY, kid)["authorization"][7:] for kid in ("one", "two"))
    with provider(answers) as url, silent_provider() as (silent, asked, let_go):
        oidc = Oidc(settings.web.model_copy(update={"oidc_jwks": f"{url}/keys"}), clock=lambda: now[0])
        assert oidc.check(known) == Known("anna", "reader")
        now[0] = 31
        object.__setattr__(oidc, "_settings", settings.web.model_copy(update={"oidc_jwks": silent}))
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(oidc.check, unknown)
            assert asked.acquire(timeout=10)
            assert oidc.check(known) == Known("anna", "reader")
            assert oidc.check(unknown) is None
            assert not asking.done(), "the provider has not answered yet"
            now[0] = FRESH_S + 100
            assert oidc.check(known) == Known("anna", "reader")
            let_go()
            assert asking.result(2 * FETCH_S) is None
    assert not asked.acquire(blocking=False), "it was asked once"


def test_all_wait_for_the_first_key_set(settings: Settings, tmp_path: Path) -> None:
    """A page that begins with several requests at once is not told that its token is none."""
    fifo = tmp_path / "keys"
    os.mkfifo(fifo)
    oidc = Oidc(settings.web.model_copy(update={"oidc_jwks": str(fifo)}))
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(oidc.check, bearer()["authorization"][7:]) for _ in range(4)]
        with fifo.open("wb") as file:  # when one of them reads
            file.write(jwks(tmp_path / "keys.json", one=KEY).read_bytes())
        assert {one.result(60) for one in asking} == {Known("anna", "reader")}


def test_a_provider_that_is_silent_holds_up_nobody_else(settings: Settings, tmp_path: Path) -> None:
    """Not with 60 tokens that nobody made: API tokens, clients of this host and /healthz are answered meanwhile."""
    with silent_provider() as (silent, asked, let_go):
        changed = settings.model_copy(update={"web": settings.web.model_copy(update={"oidc_jwks": silent})})
        with serving_web(changed) as running, ThreadPoolExecutor(60) as pool:
            secret = running.services.tokens.create("a notebook", "reader", None)
            tries = [
                pool.submit(httpx.get, f"{running.url}/studies", headers=bearer(kid=str(number)), timeout=60)
                for number in range(60)
            ]
            assert asked.acquire(timeout=30)
            health = running.url.replace("/dicom-web", "/healthz")
            statuses = [running.client.get(health).status_code, running.get("/studies").status_code]
            statuses.append(running.get("/studies", headers={"authorization": f"Bearer {secret}"}).status_code)
            waiting = sum(not one.done() for one in tries)
            assert statuses == [200, 204, 204] and waiting, "while the provider is still waited for"
            let_go()
            assert {one.result().status_code for one in tries} == {401}


def test_a_key_set_that_comes_drop_by_drop_is_given_up(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is that of all of it, not of each piece."""
    monkeypatch.setattr("sphere.scp.web.oidc.FETCH_S", 0.2)
    sent = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal sent
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n")
            with suppress(OSError):
                while sent < 600:
                    self.wfile.write(b" ")
                    sent += 1
                    time.sleep(0.05)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/keys"
        assert Oidc(settings.web.model_copy(update={"oidc_jwks": url})).check(bearer()["authorization"][7:]) is None
        thread.join()
    assert sent < 600


def test_roles_inside_an_object(settings: Settings) -> None:
    oidc = Oidc(settings.web.model_copy(update={"oidc_roles_claim": "realm_access.roles"}))
    token = bearer(realm_access={"roles": ["admin"]})["authorization"][7:]
    assert oidc.check(token) == Known("anna", "admin")


def test_what_a_researcher_is_granted_comes_from_claims(settings: Settings) -> None:
    claims = {"oidc_collections_claim": "sphere.collections", "oidc_cohorts_claim": "cohorts"}
    oidc = Oidc(settings.web.model_copy(update=claims))
    granted = {"roles": ["researcher"], "sphere": {"collections": ["A", 5, "B"]}, "cohorts": "trial"}
    assert oidc.check(bearer(**granted)["authorization"][7:]) == Known("anna", "researcher", ("A", "B"), ("trial",))
    nothing = Known("anna", "researcher")
    assert oidc.check(bearer(roles=["researcher"], sphere="A")["authorization"][7:]) == nothing


def test_a_provider_needs_all_its_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"oidc_issuer and web\.oidc_audience"):
        from_dict({"web": {"oidc_jwks": "keys.json"}}, base=tmp_path)
