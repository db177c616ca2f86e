"""What is recorded of retrievals over HTTP: who had what, how much of it, when, and whether all of it went out."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from sphere.catalog.audit import FOLDER, MAX_TEXT, told
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.jobs import audit
from sphere.scp.web.protocol import MAX_HEAD
from sphere.scp.web.tokens import Tokens
from tests.support.extracted import extract
from tests.support.landing import archive, changed, land, new_member, slices, table_rows
from tests.support.web import serving_web, until_closed
from tests.unit.test_web_access import KEY, bearer, jwks

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
