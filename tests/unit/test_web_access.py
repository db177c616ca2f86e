"""Who may ask what over HTTP, and what is recorded of it."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, cast

import httpx
import jwt
import orjson
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.testclient import TestClient

from sphere.catalog.answer import Match
from sphere.catalog.audit import FOLDER, AuditJournal
from sphere.catalog.query import Key
from sphere.cli import main
from sphere.conf.errors import SettingsError, StorageError
from sphere.conf.settings import Settings, from_dict
from sphere.ingest.storage import open_storage
from sphere.scp.web.app import make_app
from sphere.scp.web.oidc import FETCH_S, FRESH_S, Known, Oidc
from sphere.scp.web.server import services_of
from sphere.scp.web.tokens import PATH, Role, Tokens
from tests.support.certificates import Authority
from tests.support.web import serving_web

pytestmark = pytest.mark.unit

KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
NOW = datetime.now(timezone.utc)
STORE = {"content-type": 'multipart/related; type="application/dicom"; boundary=B'}


def jwks(path: Path, **keys: rsa.RSAPrivateKey) -> Path:
    entries = [
        {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key())), "kid": kid} for kid, key in keys.items()
    ]
    path.write_text(json.dumps({"keys": entries}))
    return path


def bearer(key: Any = KEY, kid: str = "one", algorithm: str = "RS256", **changes: Any) -> dict[str, str]:
    claims = {
        "iss": "https://issuer",
        "aud": "sphere",
        "sub": "anna",
        "exp": NOW + timedelta(hours=1),
        "roles": ["reader"],
    }
    claims = {name: value for name, value in {**claims, **changes}.items() if value is not None}
    return {"authorization": f"Bearer {jwt.encode(claims, key, algorithm, headers={'kid': kid})}"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("access")
    jwks(folder / "keys.json", one=KEY)
    web = {"oidc_issuer": "https://issuer", "oidc_audience": "sphere", "oidc_jwks": "keys.json"}
    return from_dict({"web": web}, base=folder)


@pytest.fixture(scope="module")
def far(settings: Settings) -> Iterator[TestClient]:
    """A client of another host."""
    with services_of(settings) as services:
        yield TestClient(make_app(settings, services), client=("10.0.0.5", 40000), base_url="http://pacs.example")


def tokens(settings: Settings) -> Tokens:
    return Tokens(open_storage(settings.storage.root))


def asked(client: TestClient, headers: dict[str, str] | None = None, method: str = "GET") -> int:
    return client.request(method, "/dicom-web/studies", headers=headers or {}).status_code


def test_from_elsewhere_nothing_without_a_token(far: TestClient) -> None:
    response = far.get("/dicom-web/studies")
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.headers["content-type"] == "application/problem+json"
    assert far.get("/metrics").status_code == far.get("/wado").status_code == 401
    assert far.get("/healthz").status_code == far.get("/openapi.json").status_code == 200


@pytest.mark.parametrize(
    "value", ["Basic YTpi", "Bearer", "Bearer x", "Bearer sphere_x", "Bearer " + "a" * 20_000, "x"]
)
def test_what_is_no_token(far: TestClient, value: str) -> None:
    assert asked(far, {"authorization": value}) == 401


def test_roles_of_tokens(settings: Settings) -> None:
    known = tokens(settings)
    roles: tuple[Role, ...] = ("reader", "writer", "admin")
    secrets = {role: known.create(f"a {role}", role, None) for role in roles}
    shown = {role: {"authorization": f"Bearer {secret}"} for role, secret in secrets.items()}
    with services_of(settings) as services:
        far = TestClient(make_app(settings, services), client=("10.0.0.5", 40000))
        assert [asked(far, headers) for headers in shown.values()] == [204, 204, 204]
        posts = [asked(far, {**headers, **STORE}, "POST") for headers in shown.values()]
        assert posts == [403, 400, 400]  # the body is empty
        assert [asked(far, headers, "DELETE") for headers in shown.values()] == [403, 403, 405]
    assert not any(secret in open_storage(settings.storage.root).read(PATH).decode() for secret in secrets.values())


def test_a_token_expires_and_is_taken_back(settings: Settings) -> None:
    known = tokens(settings)
    secret = known.create("short", "reader", NOW + timedelta(hours=1))
    assert Tokens(open_storage(settings.storage.root)).check(secret) is not None
    later = Tokens(open_storage(settings.storage.root), clock=lambda: NOW + timedelta(hours=2))
    assert later.check(secret) is None
    [one] = [one for one in known.all() if one.name == "short"]
    known.revoke(one.id)
    assert Tokens(open_storage(settings.storage.root)).check(secret) is None
    with pytest.raises(SettingsError, match="no token"):
        known.revoke(one.id)


def test_the_command(tmp_path: Path) -> None:
    config = tmp_path / "sphere.toml"
    config.write_text('[storage]\nroot = "file:storage"\n')

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["--config", str(config), "token", *arguments])

    made = call("create", "--role", "reader", "--name", "notebook", "--expires", "2h")
    assert made.exit_code == 0 and made.output.startswith("sphere_")
    listed = call("list").output
    assert "reader  notebook  made " in listed and "until " in listed and made.output.strip() not in listed
    assert call("revoke", listed.split()[0]).exit_code == 0
    assert call("list").output == ""
    assert call("create", "--role", "reader", "--name", "x", "--expires", "soon").exit_code == 2


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


def test_who_is_of_this_host(settings: Settings) -> None:
    def status(**changes: Any) -> int:
        host, auth = changes.get("host", "localhost:8080"), changes.get("auth", "remote")
        changed = settings.model_copy(update={"web": settings.web.model_copy(update={"auth": auth})})
        client = TestClient(make_app(changed, services), client=(changes.get("address", "127.0.0.1"), 1))
        return asked(client, {"host": host})

    with services_of(settings) as services:
        assert status() == status(host="127.0.0.1") == status(address="::1", host="[::1]:80") == 204
        assert status(host="rebound.example") == 401
        assert status(address="10.0.0.5") == 401
        assert status(auth="all") == 401


@pytest.mark.parametrize(
    "name",
    ["Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded", "X-Real-IP", "Via"],
)
def test_what_a_proxy_on_this_host_passes_on_is_not_local(settings: Settings, name: str) -> None:
    """Whoever it is for, and though it calls us by our address, as nginx and Apache do by default."""
    with services_of(settings) as services:
        client = TestClient(make_app(settings, services), client=("127.0.0.1", 1), base_url="http://127.0.0.1:8080")
        assert asked(client) == 204
        for value in ("203.0.113.9", "127.0.0.1", "for=127.0.0.1", "1.1 proxy", ""):
            assert asked(client, {name: value}) == asked(client, {name: value}, "DELETE") == 401
        secret = services.tokens.create("behind a proxy", "reader", None)
        assert asked(client, {name: "203.0.113.9", "authorization": f"Bearer {secret}"}) == 204


def test_every_request_that_touches_data_is_recorded(tmp_path: Path) -> None:
    settings = from_dict({}, base=tmp_path)
    with services_of(settings) as services:
        client = TestClient(make_app(settings, services), client=("127.0.0.1", 1), base_url="http://localhost")
        client.get("/dicom-web/studies?PatientID=AUDIT-1")
        client.get("/dicom-web/studies?Nonsense=1")
        client.get("/healthz")
        client.get("/dicom-web/studies/1.2.3/metadata", headers={"authorization": "Bearer x"})
        client.get("/wado")
        client.get("/status/peers")
        client.get("/status/arrivals")
        client.get("/status/quarantine", headers={"authorization": "Bearer x"})
    storage = open_storage(settings.storage.root)
    lines = [line for entry in storage.walk(FOLDER) for line in storage.read(entry.path).splitlines()]
    records = [orjson.loads(line) for line in lines]
    assert [one["path"].split("/")[1] for one in records] == ["dicom-web"] * 3 + ["wado", "status", "status"]
    done, _, refused, failed = records[:4]
    assert "AUDIT-1" in done["query"]
    assert (done["who"], done["role"], done["address"], done["entities"]) == ("local", "admin", "127.0.0.1", 0)
    assert (done["method"], done["path"], done["status"]) == ("GET", "/dicom-web/studies", 204)
    assert (refused["who"], refused["status"]) == ("", 401)
    assert failed["status"] == 400
    assert [one["outcome"] for one in records] == ["done", "failed", "refused", "failed", "done", "refused"]


class Many:
    """A catalog of 450 studies."""

    def find(self, query: Any, **_: Any) -> Iterator[Match]:
        key = Key(0x0020000D, "StudyInstanceUID", "UI")
        yield from (Match("STUDY", (key,), {key.tag: f"1.2.{number}"}, {}, "SPHERE") for number in range(450))


def test_all_that_a_search_gave_is_recorded(tmp_path: Path) -> None:
    """Not the first page of it only."""
    settings = from_dict({}, base=tmp_path)
    with services_of(settings) as services:
        app = make_app(settings, replace(services, finder=cast(Any, Many())))
        client = TestClient(app, client=("127.0.0.1", 1), base_url="http://localhost")
        assert len(client.get("/dicom-web/studies").json()) == 450
        assert len(client.get("/dicom-web/studies?offset=440").json()) == 10
    storage = open_storage(settings.storage.root)
    lines = [line for entry in storage.walk(FOLDER) for line in storage.read(entry.path).splitlines()]
    assert [orjson.loads(line)["entities"] for line in lines] == [450, 10]


def test_logs_name_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, and whatever goes wrong, a defect of ours too."""
    settings = from_dict({}, base=tmp_path)
    caplog.set_level("DEBUG", "sphere")
    multipart = {"content-type": 'multipart/related; type="application/dicom+json"; boundary=B'}
    wrong = {"00100010": {"vr": "PN", "Value": [{"Alphabetic": "Secret^Name"}]}, "00100020": {"vr": "US"}}
    body = b"--B\r\nContent-Type: application/dicom+json\r\n\r\n" + orjson.dumps([wrong]) + b"\r\n--B--\r\n"
    with services_of(settings) as services:
        app = make_app(settings, services)
        client = TestClient(app, client=("127.0.0.1", 1), base_url="http://localhost", raise_server_exceptions=False)
        client.get("/dicom-web/studies?PatientName=Secret*")
        client.get("/dicom-web/studies?PatientBirthDate=Secret")
        assert client.post("/dicom-web/studies", content=body, headers=multipart).status_code == 409
        monkeypatch.setattr(services.finder, "find", lambda *_, **__: {}["Secret"])
        assert client.get("/dicom-web/studies?PatientName=Secret*").status_code == 500
    assert "not stored" in caplog.text and "request failed: KeyError" in caplog.text
    assert "Secret" not in caplog.text


def test_what_is_done_to_annotations_is_recorded(tmp_path: Path) -> None:
    settings = from_dict({}, base=tmp_path)
    with services_of(settings) as services:
        client = TestClient(make_app(settings, services), client=("127.0.0.1", 1), base_url="http://localhost")
        made = client.post("/annotations?uid=1.2.3&level=study&allow_unknown=true", content=b"AUDIT-2").json()
        one = f"/annotations/{made['id']}"
        statuses = [client.put(one, content=b"AUDIT-3").status_code, client.get(f"{one}/file").status_code]
        statuses += [client.delete(one).status_code, client.get("/annotations?uid=1.2.3").status_code]
        statuses.append(client.delete(one).status_code)
        refused = client.delete(one, headers={"authorization": "Bearer x"}).status_code
    storage = open_storage(settings.storage.root)
    lines = [line for entry in storage.walk(FOLDER) for line in storage.read(entry.path).splitlines()]
    records = [orjson.loads(line) for line in lines]
    assert (statuses, refused) == ([200, 200, 204, 200, 404], 401)
    told = [(record["method"], record["path"], record["status"], record["outcome"]) for record in records]
    assert told == [
        ("POST", "/annotations", 201, "done"),
        ("PUT", one, 200, "done"),
        ("GET", f"{one}/file", 200, "done"),
        ("DELETE", one, 204, "done"),
        ("GET", "/annotations", 200, "done"),
        ("DELETE", one, 404, "failed"),
        ("DELETE", one, 401, "refused"),
    ]
    assert [record["entities"] for record in records] == [1, 1, 1, 1, 0, 0, 0]
    assert records[2]["bytes"] == len(b"AUDIT-3")
    assert [record["who"] for record in records] == ["local"] * 6 + [""]
    assert not any(b"AUDIT-" in line for line in lines)  # no content


def test_records_outlive_a_storage_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"file:{tmp_path}/root")

    def away(path: str) -> Any:
        raise StorageError("away")

    monkeypatch.setattr(storage, "create", away)
    journal = AuditJournal(storage, tmp_path / "state" / "audit.jsonl")
    journal.add(who="anna")
    journal.close()
    [line] = (tmp_path / "state" / "audit.jsonl").read_bytes().splitlines()
    assert orjson.loads(line)["who"] == "anna"


def test_a_provider_needs_all_its_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"oidc_issuer and web\.oidc_audience"):
        from_dict({"web": {"oidc_jwks": "keys.json"}}, base=tmp_path)


def test_https_with_a_token(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ca")
    pair = authority.issue("pacs")
    web = {"tls_certificate": str(pair.path), "tls_key": str(pair.key), "auth": "all"}
    settings = from_dict({"web": web}, base=tmp_path)
    secret = tokens(settings).create("far", "reader", None)
    with serving_web(settings) as running:
        url = f"https://127.0.0.1:{running.port}/dicom-web/studies"
        trusted = ssl.create_default_context(cafile=str(authority.path))
        with httpx.Client(verify=trusted, timeout=60) as client:
            assert client.get(url).status_code == 401
            assert client.get(url, headers={"authorization": f"Bearer {secret}"}).status_code == 204
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http"))
