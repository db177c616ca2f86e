"""STOW-RS over a real socket: stored means durable, every instance is answered, bad bodies leave nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from sphere.conf.settings import from_dict
from sphere.ingest import members
from sphere.ingest.header import identify
from sphere.ingest.journal import Landed
from sphere.ingest.part10 import read_file_meta
from sphere.ingest.storage import open_storage
from sphere.scp.web.multipart_in import Data, End, Head, MultipartReader
from sphere.scp.web.native_xml import native_model
from sphere.scp.web.problem import WebError
from tests.support.landing import archive, changed, slices
from tests.support.samples import make_instance
from tests.support.web import Web, serving_web, until_closed

pytestmark = pytest.mark.unit

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
DICOM, JSON, XML = "application/dicom", "application/dicom+json", "application/dicom+xml"
NAME = "http://dicom.nema.org/PS3.19/models/NativeDICOM"
AS_IT_IS = "application/dicom; transfer-syntax=*"
_SEEDS = count(1000)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serving_web(archive(tmp_path_factory.mktemp("web"), web={"idle_s": 1}, storage={"memory_mib": 1})) as running:
        yield running


def body(*parts: tuple[str, bytes], boundary: str = "B", end: bool = True) -> bytes:
    """Parts of header lines and content."""
    whole = b"".join(f"\r\n--{boundary}\r\n{head}\r\n\r\n".encode() + data for head, data in parts)
    return whole + (f"\r\n--{boundary}--\r\n".encode() if end else b"")


def post(web: Web, content: Any, root: str = DICOM, *, path: str = "/studies", boundary: str = "B") -> httpx.Response:
    kind = f'multipart/related; type="{root}"; boundary={boundary}'
    return web.client.post(f"{web.url}{path}", content=content, headers={"content-type": kind})


def files(*data: bytes) -> bytes:
    return body(*((f"Content-Type: {DICOM}", one) for one in data))


def new(number: int = 1) -> list[bytes]:
    return slices(number, seed=next(_SEEDS))


def where(data: bytes) -> str:
    one = identify(data, size=len(data))
    return f"/studies/{one.StudyInstanceUID}/series/{one.SeriesInstanceUID}/instances/{one.SOPInstanceUID}"


def landed(web: Web) -> int:
    """Members that are durable."""
    found = Landed(open_storage(web.settings.storage.root), web.settings.archive.state_dir)
    return sum(len(found.records(state.bundle, unpublished=True)[0]) for state in found.bundles())


def reasons(response: httpx.Response) -> list[int]:
    return [one["00081197"]["Value"][0] for one in response.json().get("00081198", {}).get("Value", [])]


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
        other.services.journal.close()
        [file] = Path(other.settings.storage.root.removeprefix("file://")).glob("audit/**/*.jsonl")
        first = json.loads(file.read_bytes().splitlines()[0])
    assert (first["status"], first["outcome"], first["entities"]) == (415, "failed", 1)


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


def described(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The metadata of a file, its pixel data referred to as "pixels", and these."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    pixels = dataset.PixelData
    del dataset.PixelData
    header = dataset.to_json_dict()
    header["7FE00010"] = {"vr": "OW", "BulkDataURI": "pixels"}
    return header, pixels


def test_metadata_and_bulk_data_in_json(web: Web) -> None:
    [data] = new()
    header, pixels = described(data)
    content = body(
        (f"Content-Type: {JSON}", json.dumps([header]).encode()),
        ("Content-Type: application/octet-stream\r\nContent-Location: pixels", pixels),
    )
    response = post(web, content, JSON)
    assert response.status_code == 200, response.text
    got = pydicom.dcmread(io.BytesIO(web.get(where(data), headers={"accept": DICOM}).content))
    sent = pydicom.dcmread(io.BytesIO(data))
    assert got.PixelData == sent.PixelData
    assert {e.tag: e.value for e in got if e.VR != "SQ"} == {e.tag: e.value for e in sent if e.VR != "SQ"}


def test_compressed_frames_in_parts(web: Web) -> None:
    dataset = pydicom.dcmread(FILES / "SC_rgb_jpeg_gdcm.dcm")
    dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    header, pixels = described(_saved(dataset))
    frame = next(pydicom.encaps.generate_frames(pixels, number_of_frames=1))
    content = body(
        (f"Content-Type: {JSON}", json.dumps([header]).encode()),
        ("Content-Type: image/jpeg; transfer-syntax=1.2.840.10008.1.2.4.70\r\nContent-Location: pixels", frame),
    )
    assert post(web, content, JSON).status_code == 200
    got = web.get(where(_saved(dataset)) + "/frames/1", headers={"accept": "image/jpeg"})
    assert got.content == frame


def _saved(dataset: Dataset) -> bytes:
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def test_metadata_in_xml(web: Web) -> None:
    [data] = new()
    header, pixels = described(data)
    elements = "".join(_xml(tag, element) for tag, element in header.items())
    content = body(
        (f"Content-Type: {XML}", f'<NativeDicomModel xmlns="{NAME}">{elements}</NativeDicomModel>'.encode()),
        ("Content-Type: application/octet-stream\r\nContent-Location: pixels", pixels),
    )
    response = post(web, content, XML)
    assert response.status_code == 200, response.text
    got = pydicom.dcmread(io.BytesIO(web.get(where(data), headers={"accept": DICOM}).content))
    sent = pydicom.dcmread(io.BytesIO(data))
    assert (got.PixelData, str(got.PatientName)) == (sent.PixelData, str(sent.PatientName))


@pytest.mark.parametrize("form", [JSON, XML])
@pytest.mark.parametrize("name", ["CT_small.dcm", "rtplan.dcm", "liver_1frame.dcm", "test-SR.dcm"])
def test_metadata_of_real_files_keep_every_element(web: Web, name: str, form: str) -> None:
    """Sequences, items in items and private blocks of files, stored as new instances and read back."""
    dataset = pydicom.dcmread(FILES / name)
    dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    header = dataset.to_json_dict(bulk_data_threshold=1 << 30)
    has = [e for e in dataset.iterall() if e.VR == "SQ"], [e for e in dataset if e.tag.is_private and e.tag.elem > 0xFF]
    assert len(has[name == "CT_small.dcm"]) > 1
    sent = json.dumps([header]).encode() if form == JSON else native_model(header)
    response = post(web, body((f"Content-Type: {form}", sent)), form)
    assert response.status_code == 200, response.text
    got = pydicom.dcmread(io.BytesIO(web.get(where(_saved(dataset)), headers={"accept": AS_IT_IS}).content))
    assert got.to_json_dict(bulk_data_threshold=1 << 30) == header


@pytest.mark.parametrize("form", [JSON, XML])
def test_a_study_takes_its_own_metadata_only(web: Web, form: str) -> None:
    """The second has the UIDs of another study: it is refused, and the first is there."""
    [mine], [other] = new(), slices(1, seed=next(_SEEDS), study=7)
    headers, pixels = zip(*map(described, (mine, other)), strict=True)
    if form == JSON:
        sent = json.dumps(headers).encode()
    else:
        models = [native_model(one).partition(b"?>")[2] for one in headers]
        sent = b"<models>" + b"".join(models) + b"</models>"
    content = body(
        (f"Content-Type: {form}", sent),
        ("Content-Type: application/octet-stream\r\nContent-Location: pixels", pixels[0]),
    )
    response = post(web, content, form, path="/".join(where(mine).split("/")[:3]))
    assert (response.status_code, reasons(response)) == (202, [0xA900])
    assert web.get(where(mine), headers={"accept": DICOM}).status_code == 200
    assert web.get(where(other), headers={"accept": DICOM}).status_code == 404


def test_private_blocks_of_one_group_in_xml(web: Web) -> None:
    """Each has its values (PS3.19 Table A.1.5-2); what is there twice is refused, and not left out."""
    [data] = new()
    header, pixels = described(data)
    block = '<DicomAttribute tag="00090001" vr="LO" privateCreator="{}"><Value number="1">{}</Value></DicomAttribute>'

    def stored(*more: str) -> httpx.Response:
        elements = "".join((*(_xml(tag, element) for tag, element in header.items()), *more))
        content = body(
            (f"Content-Type: {XML}", f'<NativeDicomModel xmlns="{NAME}">{elements}</NativeDicomModel>'.encode()),
            ("Content-Type: application/octet-stream\r\nContent-Location: pixels", pixels),
        )
        return post(web, content, XML)

    before = landed(web)
    for more in (block.format("ACME", "a") * 2, _xml("00100010", header["00100010"])):
        refused = stored(more)
        assert (refused.status_code, reasons(refused)) == (409, [0xC000]), more
        assert "twice" in refused.json()["00081198"]["Value"][0]["00000902"]["Value"][0]
    assert landed(web) == before
    assert stored(block.format("ACME", "a"), block.format("OTHER", "o")).status_code == 200
    got = pydicom.dcmread(io.BytesIO(web.get(where(data), headers={"accept": AS_IT_IS}).content))
    assert [got.private_block(9, name)[1].value for name in ("ACME", "OTHER")] == ["a", "o"]


def test_what_json_has_twice_is_refused(web: Web) -> None:
    [data] = new()
    header, pixels = described(data)
    text = json.dumps([header])
    other = '"00100020":{"vr":"LO","Value":["OTHER"]},'
    lower = '"0010004f":{"vr":"LO"},"0010004F":{"vr":"LO"},'
    before = landed(web)
    for changes in (other, lower, other.replace("0020", "\\u0030020")):
        content = body(
            (f"Content-Type: {JSON}", text.replace("{", "{" + changes, 1).encode()),
            ("Content-Type: application/octet-stream\r\nContent-Location: pixels", pixels),
        )
        response = post(web, content, JSON)
        assert (response.status_code, reasons(response)) == (409, [0xC000]), changes
        assert "twice" in response.json()["00081198"]["Value"][0]["00000902"]["Value"][0]
    assert landed(web) == before


def _xml(tag: str, element: dict[str, Any]) -> str:
    inner = f'<BulkData uri="{element["BulkDataURI"]}"/>' if "BulkDataURI" in element else ""
    for number, value in enumerate(element.get("Value", []), 1):
        if element["vr"] == "PN":
            parts = zip(("FamilyName", "GivenName"), value["Alphabetic"].split("^"), strict=False)
            names = "".join(f"<{name}>{part}</{name}>" for name, part in parts)
            inner += f'<PersonName number="{number}"><Alphabetic>{names}</Alphabetic></PersonName>'
        elif element["vr"] == "SQ":
            inner += f'<Item number="{number}">{"".join(_xml(t, e) for t, e in value.items())}</Item>'
        else:
            inner += f'<Value number="{number}">{value}</Value>'
    return f'<DicomAttribute tag="{tag}" vr="{element["vr"]}">{inner}</DicomAttribute>'


BOMB = (
    b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
    + b']><NativeDicomModel><DicomAttribute tag="00100010" vr="PN">&j;</DicomAttribute></NativeDicomModel>'
)
OUTSIDE = b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><NativeDicomModel>&e;</NativeDicomModel>'
DEEP = b'{"00081140":{"vr":"SQ","Value":[' * 200 + b"{}" + b"]}}" * 200


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"00100010": {"vr": "US", "Value": [1]}}, "00100010: has VR US"),
        ({"00100010": {"vr": "XX"}}, "VR is none"),
        ({"00100010": {"vr": "PN", "Value": "Doe"}}, "no list"),
        ({"00100010": {"vr": "PN", "Value": [7]}}, "cannot be encoded"),
        ({"00280010": {"vr": "US", "Value": ["many"]}}, "cannot be encoded"),
        ({"00280010": {"vr": "US", "Value": [70000]}}, "cannot be encoded"),
        ({"PatientName": {"vr": "PN"}}, "not a tag"),
        ({"00081140": json.loads(DEEP)["00081140"]}, "too deep"),
        ({"00204000": {"vr": "LT", "BulkDataURI": "nowhere"}}, "not in the request"),
        ({"00020010": {"vr": "UI", "Value": ["1.2"]}, "0020000D": {"vr": "UI"}}, "identifying UID"),
    ],
)
def test_metadata_that_makes_no_instance(web: Web, change: dict[str, Any], says: str) -> None:
    header, pixels = described(new()[0])
    before = landed(web)
    content = body(
        (f"Content-Type: {JSON}", json.dumps([{**header, **change}]).encode()),
        ("Content-Type: application/octet-stream\r\nContent-Location: pixels", pixels),
    )
    response = post(web, content, JSON)
    assert (response.status_code, reasons(response)) == (409, [0xC000]), response.text
    assert says in response.json()["00081198"]["Value"][0]["00000902"]["Value"][0]
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
    big = _saved(large)
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


@given(st.lists(st.tuples(st.dictionaries(st.sampled_from(["a", "b-c"]), st.sampled_from(["", "x", "y; z=1"])),
                          st.binary(max_size=60) | st.sampled_from([b"\r\n--", b"\r\n--Bx\r\n", b"--B", b"\r\n"]))),
       st.lists(st.integers(1, 40), min_size=1))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_parts_come_out_as_they_went_in(parts: list[tuple[dict[str, str], bytes]], cuts: list[int]) -> None:
    delimiter = re.compile(rb"\r\n--B(--|[ \t]*\r\n)")
    parts = [(head, data) for head, data in parts if not delimiter.search(b"\r\n" + data + b"\r\n")]
    whole = b"".join(
        b"\r\n--B\r\n" + "".join(f"{k}: {v}\r\n" for k, v in head.items()).encode() + b"\r\n" + data
        for head, data in parts
    )
    whole += b"\r\n--B--\r\n"
    reader, got, at, turn = MultipartReader("B"), [], 0, 0
    while at < len(whole):
        size = cuts[turn % len(cuts)]
        for event in reader.feed(whole[at : at + size]):
            if isinstance(event, Head):
                got.append((dict(event.headers), b""))
            elif isinstance(event, Data):
                got[-1] = (got[-1][0], got[-1][1] + event.data)
            else:
                assert isinstance(event, End)
        at, turn = at + size, turn + 1
    reader.close()
    assert got == [({k: v.strip() for k, v in head.items()}, data) for head, data in parts]


@given(st.binary(max_size=300), st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_the_reader_never_fails_otherwise(data: bytes, step: int) -> None:
    """Nor does it give more than it was given."""
    reader, events = MultipartReader("B"), []
    with suppress(WebError):
        for at in range(0, len(data), step):
            events += reader.feed(data[at : at + step])
        reader.close()
    assert sum(len(event.data) for event in events if isinstance(event, Data)) <= len(data)
