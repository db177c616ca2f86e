"""What is recorded of requests over HTTP: who asked and had what, how much of it, when, and whether all went out."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from starlette.testclient import TestClient

from sphere.catalog.answer import Match
from sphere.catalog.audit import FOLDER, MAX_TEXT, AuditJournal, told
from sphere.catalog.query import Key
from sphere.conf.errors import StorageError
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.jobs import audit
from sphere.scp.web.app import make_app
from sphere.scp.web.protocol import MAX_HEAD
from sphere.scp.web.server import services_of
from sphere.scp.web.tokens import Tokens
from tests.support.extracted import extract
from tests.support.landing import archive, changed, land, new_member, slices, table_rows
from tests.support.oidc import KEY, bearer, jwks
from tests.support.web import serving_web, until_closed

pytestmark = pytest.mark.unit

SLICES = slices(12)
ONE = new_member(SLICES[3])
STUDY = f"/studies/{ONE.StudyInstanceUID}"
SERIES = f"{STUDY}/series/{ONE.SeriesInstanceUID}"
INSTANCE = f"{SERIES}/instances/{ONE.SOPInstanceUID}"
UIDS = f"studyUID={ONE.StudyInstanceUID}&seriesUID={ONE.SeriesInstanceUID}&objectUID={ONE.SOPInstanceUID}"
XML = 'multipart/related; type="application/dicom+xml"'
RETRIEVALS = [
    (STUDY, 'multipart/related; type="application/dicom"', 12),
    (SERIES, 'multipart/related; type="application/dicom"', 12),
    (INSTANCE, "application/dicom", 1),
    (f"{STUDY}/metadata", "application/dicom+json", 12),
    (f"{SERIES}/metadata", XML, 12),
    (f"{INSTANCE}/metadata", "application/dicom+json", 1),
    (f"{INSTANCE}/frames/1", "*/*", 1),
    (f"{INSTANCE}/rendered", "image/png", 1),
    (f"{INSTANCE}/thumbnail", "image/jpeg", 1),
    (f"{STUDY}?accept=application/zip", "*/*", 12),
    (f"{STUDY}?accept=application/zip&dicomdir=true", "*/*", 12),
    (f"/../wado?requestType=WADO&contentType=application/dicom&{UIDS}", "*/*", 1),
]


def records(settings: Settings) -> list[dict[str, Any]]:
    storage = open_storage(settings.storage.root)
    return [orjson.loads(line) for entry in storage.walk(FOLDER) for line in storage.read(entry.path).splitlines()]


def until(told: Callable[[], Any]) -> Any:
    """What is told, once it is."""
    ends = time.monotonic() + 20
    while not (found := told()):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return found


def test_every_retrieval_is_recorded_with_who_and_how_much(tmp_path: Path) -> None:
    """By a token of the archive and by one of a provider; each number is that of what came."""
    jwks(tmp_path / "keys.json", one=KEY)
    web = {"oidc_issuer": "https://issuer", "oidc_audience": "sphere", "oidc_jwks": "keys.json"}
    settings = archive(tmp_path, web=web)
    land(settings, [new_member(data) for data in SLICES])
    extract(settings)
    tokens = Tokens(open_storage(settings.storage.root))
    secret = tokens.create("a viewer", "reader", None)
    [token] = tokens.all()
    asking = {f"token:{token.id}:a viewer": {"authorization": f"Bearer {secret}"}, "oidc:anna": bearer()}
    began, expected = datetime.now(timezone.utc), []
    with serving_web(settings) as running:
        [header] = running.get(f"{INSTANCE}/metadata").json()
        bulk = header["7FE00010"]["BulkDataURI"].removeprefix(running.url)
        for who, shown in asking.items():
            for path, accept, entities in [*RETRIEVALS, (bulk, "application/octet-stream", 1)]:
                response = running.get(path, headers={**shown, "accept": accept})
                assert response.status_code == 200, (path, response.text)
                expected.append((who, "reader", entities, len(response.content)))
        running.get(STUDY, headers={"authorization": f"Bearer {secret[:-1]}x"})
        running.client.delete(f"{running.url}{STUDY}", headers=bearer())
    found = records(settings)[1:]
    assert [(one["who"], one["role"], one["entities"], one["bytes"]) for one in found[:-2]] == expected
    assert {(one["status"], one["outcome"], one["address"], one["method"]) for one in found[:-2]} == {
        (200, "done", "127.0.0.1", "GET")
    }
    assert [(one["who"], one["status"], one["outcome"], one["entities"]) for one in found[-2:]] == [
        ("", 401, "refused", 0),
        ("oidc:anna", 403, "refused", 0),
    ]
    times = [datetime.fromisoformat(one["at"]) for one in found]
    assert began <= times[0] and times == sorted(times) and times[-1] <= datetime.now(timezone.utc)
    assert secret not in orjson.dumps(found).decode()
    assert audit.run(settings) == len(found) + 1
    assert sum(row["entities"] for row in table_rows(settings, "audit")) == sum(one[2] for one in expected) + 1


def test_a_reader_that_goes_away_is_recorded(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    large = changed(SLICES[0], Rows=4096, Columns=4096, PixelData=bytes(32 << 20))
    land(settings, [new_member(large)])
    with serving_web(settings) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            head = f"GET /dicom-web{STUDY} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            client.sendall(head.encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        [one] = until(lambda: records(settings))
    assert (one["path"], one["status"], one["outcome"], one["entities"]) == (f"/dicom-web{STUDY}", 200, "broken off", 1)
    assert 0 <= one["bytes"] < len(large)


def test_nobody_changes_what_was_recorded(tmp_path: Path) -> None:
    """Table `audit` is append-only for every writer of Delta."""
    settings = archive(tmp_path)
    with serving_web(settings) as running:
        running.get("/studies")
    assert audit.run(settings) == 1
    table = DeltaTable(f"{settings.catalog_root}/audit")
    assert table.metadata().configuration["delta.appendOnly"] == "true"
    with pytest.raises(DeltaError, match="append"):
        table.delete()
    with pytest.raises(DeltaError, match="append"):
        table.update(updates={"who": "'nobody'"})
    assert len(table_rows(settings, "audit")) == 1


def test_who_asks_is_not_what_a_header_says(tmp_path: Path) -> None:
    """The address is that of the connection; nobody becomes another, nor local, by what they send."""
    settings = archive(tmp_path)
    settings = settings.model_copy(update={"web": settings.web.model_copy(update={"auth": "all"})})
    forwarded = {"x-forwarded-for": "10.0.0.9", "x-real-ip": "10.0.0.9", "forwarded": "for=10.0.0.9;host=localhost"}
    with serving_web(settings) as running:
        assert running.get("/studies", headers={**forwarded, "x-forwarded-for": "127.0.0.1"}).status_code == 401
        secret = running.services.tokens.create("far", "reader", None)
        shown = {"authorization": f"Bearer {secret}"}
        assert running.get("/studies", headers={**forwarded, **shown}).status_code == 204
    assert [(one["address"], one["status"]) for one in records(settings)] == [("127.0.0.1", 401), ("127.0.0.1", 204)]


def test_a_query_is_recorded_whole(tmp_path: Path) -> None:
    """Up to what a head may have: a key cannot be hidden behind others."""
    settings = archive(tmp_path)
    filler = "includefield=" + ",".join(["StudyDescription"] * 1500)
    with serving_web(settings) as running:
        assert running.get(f"/studies?{filler}&PatientName=HIDDEN*").status_code == 204
        assert running.get(f"/studies?{filler},{filler}&PatientName=HIDDEN*").status_code == 431
    assert audit.run(settings) == 1
    [row] = table_rows(settings, "audit")
    assert row["query"] == f"{filler}&PatientName=HIDDEN*"
    assert told("a" * MAX_TEXT) == "a" * MAX_TEXT
    assert told("a" * MAX_TEXT + "b").startswith("a" * MAX_TEXT + f"... [cut: {MAX_TEXT + 1} characters with SHA-256 ")
    assert MAX_TEXT > MAX_HEAD


def test_no_log_of_the_server_names_anybody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those of the libraries below it too, at their most talkative."""
    caplog.set_level("DEBUG")
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "sphere"):
        caplog.set_level("DEBUG", name)
    with serving_web(archive(tmp_path)) as running:
        assert running.get("/studies?PatientName=Secret*").status_code == 204
        assert running.get("/studies/Secret/metadata").status_code == 400
        running.client.post(
            f"{running.url}/studies/1.2?Secret", content=b"Secret", headers={"content-type": "Secret/x"}
        )
        for sent in (
            b"GET /Secret HTTP/9\r\n\r\n",
            b"Secret\r\n\r\n",
            b"GET /Secret\0 HTTP/1.1\r\nHost: x\r\nSecret\r\n\r\n",
        ):
            with socket.create_connection(("127.0.0.1", running.port)) as client:
                client.sendall(sent)
                until_closed(client)
    told = [one.getMessage() for one in caplog.records if one.name.partition(".")[0] not in ("httpx", "httpcore")]
    assert told, "something is logged at all"
    assert not [line for line in told if "Secret" in line]


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
