"""STOW-RS over a real socket: stored means durable, every instance is answered, bad bodies leave nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pydicom
import pytest
from dicomweb_client import DICOMwebClient

from sphere.conf.errors import StorageError
from sphere.conf.loading import from_dict
from sphere.ingest import members
from sphere.ingest.header import identify
from sphere.ingest.journal import Landed
from sphere.ingest.part10 import read_file_meta
from sphere.ingest.storage import open_storage
from sphere.scp.web import incoming, metadata_in
from tests.support.audit_records import recorded
from tests.support.landing import archive, changed
from tests.support.samples import make_instance
from tests.support.stow import (
    AS_IT_IS,
    DICOM,
    FILES,
    JSON,
    XML,
    body,
    files,
    landed,
    new,
    post,
    reasons,
    saved,
    where,
)
from tests.support.web import Web, serving_web, until_closed

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serving_web(archive(tmp_path_factory.mktemp("web"), web={"idle_s": 1}, storage={"memory_mib": 1})) as running:
        yield running


def packaged() -> list[dict[str, bytes]]:
    """pydicom's files that name an instance, by name; those of one SOP Instance UID in sets of their own."""
    found: list[dict[str, bytes]] = []
    seen: Counter[str] = Counter()
    for path in sorted(FILES.glob("*.dcm")):
        data = path.read_bytes()
        one = identify(data, size=len(data))
        if all((one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID, one.SOPClassUID)):
            number = seen[one.SOPInstanceUID]
            seen[one.SOPInstanceUID] += 1
            found += [{}] * (number == len(found))
            found[number] = {**found[number], path.name: data}
    return found


@pytest.mark.parametrize("durability", ["storage", "spool"])
def test_what_was_stored_comes_back_byte_for_byte(tmp_path: Path, durability: str) -> None:
    """Every packaged file that is a Part 10 file; what is none is refused, and no more of it is there."""
    stored = 0
    for number, sent in enumerate(packaged()):
        whole = {name: data for name, data in sent.items() if data[128:132] == b"DICM"}
        with serving_web(archive(tmp_path / str(number), ingest={"durability": durability})) as web:
            response = post(web, files(*sent.values()))
            urls = [one["00081190"]["Value"][0] for one in response.json()["00081199"]["Value"]]
            assert sorted(urls) == sorted(f"{web.url}{where(data)}" for data in whole.values())
            assert reasons(response) == [0xC000] * (len(sent) - len(whole))
            for name, data in whole.items():
                assert web.get(where(data), headers={"accept": AS_IT_IS}).content == data, name
        stored += len(whole)
    assert stored > 40


def test_digests_are_made_as_the_bytes_come(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what waits in memory and of what waits in a file, once; they are those of the data sets."""
    monkeypatch.setattr(members, "_digest", lambda *_: pytest.fail("computed again"))
    [small] = new()
    large = changed(new()[0], Rows=1200, Columns=1200, PixelData=bytes(range(256)) * 11250)
    assert len(large) > web.settings.storage.memory_mib << 20
    assert reasons(post(web, files(small, large))) == []
    found = Landed(open_storage(web.settings.storage.root), web.settings.archive.state_dir)
    records = [one for state in found.bundles() for one in found.records(state.bundle, unpublished=True)[0]]
    digests = {one.SOPInstanceUID: one.sha256 for one in records}
    for data in (small, large):
        dataset = data[read_file_meta(data).dataset_offset :]
        assert digests[identify(data, size=len(data)).SOPInstanceUID] == hashlib.sha256(dataset).hexdigest()


def test_each_instance_has_its_answer(web: Web, tmp_path: Path) -> None:
    [good] = new()
    no_uid = make_instance(tmp_path / "x.dcm", StudyInstanceUID="").read_bytes()
    bad_uid = make_instance(tmp_path / "y.dcm", SOPInstanceUID="../../etc/passwd").read_bytes()
    before = landed(web)
    response = post(web, files(good, b"no DICOM at all", no_uid, bad_uid, good[132:]))
    assert response.status_code == 202
    assert sorted(reasons(response)) == [0xC000] * 4
    assert len(response.json()["00081199"]["Value"]) == 1
    assert landed(web) == before + 1
    everything = post(web, files(b"x", b""))
    assert (everything.status_code, reasons(everything)) == (409, [0xC000, 0xC000])


def test_what_was_stored_before_a_body_went_wrong_is_told_and_recorded(tmp_path: Path) -> None:
    [good] = new()
    content = body((f"Content-Type: {DICOM}", good), ("Content-Type: application/zip", b"PK"))
    with serving_web(archive(tmp_path)) as other:
        response = post(other, content)
        assert (response.status_code, landed(other)) == (415, 1)
        assert "1 instances of the request had been stored" in response.json()["detail"]
        assert other.get(where(good), headers={"accept": DICOM}).content == good
        root = Path(other.settings.storage.root.removeprefix("file://"))
        [first] = recorded(other.services.journal, root, "POST")
    assert (first["status"], first["outcome"], first["entities"]) == (415, "failed", 1)


@pytest.mark.parametrize("error", [StorageError("reading it back"), OSError(errno.EMFILE, "Too many open files")])
@pytest.mark.parametrize("whole", [True, False], ids=["the metadata", "bulk data"])
def test_what_cannot_be_read_back_is_told_and_what_was_stored_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, whole: bool
) -> None:
    """Of three instances the third's bulk data, or all of its metadata."""
    headers = [pydicom.dcmread(io.BytesIO(one)).to_json_dict(bulk_data_threshold=1 << 30) for one in new(3)]
    for header in headers[1:]:
        header["7FE00010"] = {"vr": "OW", "BulkDataURI": "pixels"}
    texts = [json.dumps(some).encode() for some in ((headers[:2], headers[2:]) if whole else (headers,))]
    pixels = ("Content-Type: application/octet-stream\r\nContent-Location: pixels", bytes(128 * 128 * 2))
    content = body(*((f"Content-Type: {JSON}", text) for text in texts), pixels)
    calls: list[object] = []

    def failing(real: Callable[..., Any], *arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise error
        return real(*arguments)

    patched, name = (incoming.ArrivingBody, "tobytes") if whole else (metadata_in, "_copied")
    real = getattr(patched, name)
    monkeypatch.setattr(patched, name, lambda *arguments: failing(real, *arguments))
    with serving_web(archive(tmp_path)) as other:
        response = post(other, content, JSON)
        assert landed(other) == 2
        if whole:
            assert response.status_code == 507
            assert "2 instances of the request had been stored" in response.json()["detail"]
        else:
            assert (response.status_code, reasons(response)) == (202, [0xA700])
        root = Path(other.settings.storage.root.removeprefix("file://"))
        [first] = recorded(other.services.journal, root, "POST")
    assert (first["status"], first["entities"]) == (response.status_code, 2)


def test_a_study_takes_its_own_instances_only(web: Web) -> None:
    [mine], [other] = new(), new()
    study = "/".join(where(mine).split("/")[:3])
    response = post(web, files(mine, other), path=study)
    assert (response.status_code, reasons(response)) == (202, [0xA900])
    assert response.json()["00081190"]["Value"] == [f"{web.url}{study}"]
    assert web.get(where(other), headers={"accept": DICOM}).status_code == 404


def test_an_answer_in_xml(web: Web) -> None:
    kind = f'multipart/related; type="{DICOM}"; boundary=B'
    headers = {"content-type": kind, "accept": XML}
    response = web.client.post(f"{web.url}/studies", content=files(*new()), headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (200, XML)
    assert b'keyword="ReferencedSOPSequence"' in response.content


BOMB = (
    b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
    + b']><NativeDicomModel><DicomAttribute tag="00100010" vr="PN">&j;</DicomAttribute></NativeDicomModel>'
)
OUTSIDE = b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><NativeDicomModel>&e;</NativeDicomModel>'


@pytest.mark.parametrize(
    ("root", "content", "status", "says"),
    [
        (JSON, body((f"Content-Type: {JSON}", b"{nonsense")), 400, "not JSON"),
        (JSON, body((f"Content-Type: {JSON}", b"[1, 2]")), 400, "DICOM JSON"),
        (JSON, body(("Content-Type: image/jpeg", b"x")), 400, "Content-Location"),
        (JSON, body(("Content-Type: image/jpeg\r\nContent-Location: x", b"x")), 400, "no part of type"),
        (XML, body((f"Content-Type: {XML}", BOMB)), 400, "DTD or entities"),
        (XML, body((f"Content-Type: {XML}", OUTSIDE)), 400, "DTD or entities"),
        (XML, body((f"Content-Type: {XML}", b"<x/>")), 400, "NativeDicomModel"),
        (XML, body((f"Content-Type: {XML}", b"<x")), 400, "not XML"),
        (DICOM, b"no part at all", 400, "closing boundary"),
        (DICOM, b"x" * 70_000, 400, "no part with its boundary"),
        (DICOM, body((f"Content-Type: {DICOM}", b"x"), boundary="OTHER"), 400, "closing boundary"),
        (DICOM, body((f"Content-Type: {DICOM}", b"x"), end=False), 400, "closing boundary"),
        (DICOM, b"--B--\r\n", 400, "no parts"),
        (DICOM, body(("no header", b"x")), 400, "headers that is none"),
        (DICOM, body(("X: " + "y" * 9000, b"x")), 400, "at most 8192 bytes"),
        (DICOM, body(("Content-Type: application/zip", b"PK")), 415, "application/zip"),
        ("application/zip", b"PK", 415, "cannot store"),
    ],
)
def test_bodies_that_are_wrong(web: Web, root: str, content: bytes, status: int, says: str) -> None:
    before = landed(web)
    response = post(web, content, root)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert says in response.json()["detail"]
    assert landed(web) == before


def test_a_body_that_stops_is_408_and_leaves_nothing(web: Web) -> None:
    before = landed(web)
    content = files(*new())
    with socket.create_connection(("127.0.0.1", web.port)) as client:
        head = f'POST /dicom-web/studies HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n' \
            f'Content-Type: multipart/related; type="{DICOM}"; boundary=B\r\n\r\n'  # fmt: skip
        client.sendall(head.encode() + content[:-100])
        answer = until_closed(client)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"application/problem+json" in answer
    assert landed(web) == before


def test_a_client_that_goes_away_leaves_nothing(web: Web) -> None:
    before = landed(web)
    with socket.create_connection(("127.0.0.1", web.port)) as client:
        client.sendall(
            f'POST /dicom-web/studies HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\nContent-Type: '
            f'multipart/related; type="{DICOM}"; boundary=B\r\n\r\n'.encode() + files(*new())[:-50]
        )  # fmt: skip
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert post(web, files(*new())).status_code == 200
    assert landed(web) == before + 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 40_000, 431),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", 408),
        (b"", 408),
    ],
)
def test_heads_that_are_wrong_or_slow(web: Web, sent: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", web.port)) as client:
        client.sendall(sent)
        answer = until_closed(client)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"application/problem+json" in answer


def test_an_archive_that_is_read_only(web: Web) -> None:
    settings = web.settings.model_copy(update={"web": web.settings.web.model_copy(update={"read_only": True})})
    with serving_web(settings) as other:
        response = post(other, files(*new()))
        assert (response.status_code, response.headers["content-type"]) == (403, "application/problem+json")
        assert other.get("/studies").status_code in (200, 204)


def test_rules_hold_here_too(tmp_path: Path) -> None:
    rules = [{"action": "reject", "via": ["web"], "modality": ["CT"], "status": 0x0124}]
    with serving_web(from_dict({"rules": rules}, base=tmp_path)) as other:
        response = post(other, files(*new()))
        assert (response.status_code, reasons(response)) == (409, [0x0124])
        assert landed(other) == 0


def test_stored_means_durable_as_by_c_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance that is not on the disk is refused for want of resources (PS3.4 B.2.3), and is nowhere."""
    first, second = new(2)
    syncs: list[int] = []

    def failing(fd: int) -> None:
        syncs.append(fd)
        raise OSError(errno.EIO, "the disk is broken")

    with serving_web(archive(tmp_path)) as other:
        assert post(other, files(first)).status_code == 200
        with monkeypatch.context() as broken:
            broken.setattr(os, "fdatasync", failing)
            response = post(other, files(second))
        assert (response.status_code, reasons(response), bool(syncs)) == (409, [0xA700], True)
        assert (landed(other), other.get(where(second), headers={"accept": DICOM}).status_code) == (1, 404)
        assert post(other, files(second)).status_code == 200
        assert (landed(other), other.get(where(second), headers={"accept": DICOM}).content) == (2, second)


@pytest.mark.parametrize(("policy", "reason"), [("reject", [0x0111]), ("keep-first", []), ("replace", [])])
def test_other_bytes_of_an_instance_are_judged_as_by_c_store(tmp_path: Path, policy: str, reason: list[int]) -> None:
    [data] = new()
    other_bytes = changed(data, PatientComments="corrected")
    with serving_web(archive(tmp_path, ingest={"on_conflict": policy})) as other:
        assert post(other, files(data)).status_code == post(other, files(data)).status_code == 200
        assert landed(other) == 1, "its very bytes are there already"
        assert reasons(post(other, files(other_bytes))) == reason
        got = other.get(where(data), headers={"accept": DICOM}).content
        assert got == (other_bytes if policy == "replace" else data)


def test_a_client_of_others_stores(web: Web) -> None:
    data = new(3)
    answer = DICOMwebClient(web.url).store_instances([pydicom.dcmread(io.BytesIO(one)) for one in data])
    assert len(answer.ReferencedSOPSequence) == 3
    assert len(DICOMwebClient(web.url).retrieve_series(*where(data[0]).split("/")[2:5:2])) == 3


def test_a_large_request_takes_no_more_memory_than_a_small_one(web: Web) -> None:
    """160 MiB in one request, half of it in one instance; never whole in memory."""
    small = new(40)
    large = pydicom.dcmread(io.BytesIO(new()[0]))
    large.Rows = large.Columns = 6144
    large.PixelData = b"\0" * (6144 * 6144 * 2)
    big = saved(large)
    del large
    process, most = psutil.Process(), 0
    before = process.memory_info().rss

    def content() -> Iterator[bytes]:
        nonlocal most
        for data in (*small, big):
            yield f"\r\n--B\r\nContent-Type: {DICOM}\r\n\r\n".encode()
            for start in range(0, len(data), 1 << 20):
                yield data[start : start + (1 << 20)]
                most = max(most, process.memory_info().rss)
        yield b"\r\n--B--\r\n"

    assert post(web, content()).status_code == 200
    assert most - before < 48 << 20
    assert not list((web.settings.archive.state_dir / "incoming").iterdir())
