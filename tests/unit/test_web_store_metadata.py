"""STOW-RS of metadata and bulk data (PS3.18 10.5.1.2): in JSON and XML, whole or refused."""

from __future__ import annotations

import io
import json
import resource
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest

from sphere.scp.web import stow
from sphere.scp.web.allowance import RETRY_AFTER_S, Allowance
from sphere.scp.web.native_xml import native_model
from tests.support.landing import archive, slices
from tests.support.stow import AS_IT_IS, DICOM, FILES, JSON, SEEDS, XML, body, landed, new, post, reasons, saved, where
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

NAME = "http://dicom.nema.org/PS3.19/models/NativeDICOM"
DEEP = b'{"00081140":{"vr":"SQ","Value":[' * 200 + b"{}" + b"]}}" * 200


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with serving_web(archive(tmp_path_factory.mktemp("web"), web={"idle_s": 1}, storage={"memory_mib": 1})) as running:
        yield running


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


def test_bulk_data_of_another_instance_is_never_taken(web: Web) -> None:
    """Of two locations one ends with the other; and one that only ends with what is asked for is another."""
    one, other = new(2)
    (first, mine), (second, theirs) = described(one), described(other)
    mine, theirs = mine[:-1] + b"m", theirs[:-1] + b"t"

    def stored(*uris: str) -> httpx.Response:
        for header, uri in zip((first, second), uris, strict=False):
            header["7FE00010"]["BulkDataURI"] = uri
        content = body(
            (f"Content-Type: {JSON}", json.dumps([first, second][: len(uris)]).encode()),
            ("Content-Type: application/octet-stream\r\nContent-Location: http://x/prebulk1", theirs),
            ("Content-Type: application/octet-stream\r\nContent-Location: http://x/bulk1", mine),
        )
        return post(web, content, JSON)

    refused = stored("k1")
    assert (refused.status_code, reasons(refused)) == (409, [0xC000])
    assert "not in the request" in refused.json()["00081198"]["Value"][0]["00000902"]["Value"][0]
    assert stored("bulk1", "http://x/prebulk1").status_code == 200
    for data, pixels in ((one, mine), (other, theirs)):
        assert pydicom.dcmread(io.BytesIO(web.get(where(data), headers={"accept": DICOM}).content)).PixelData == pixels


def test_parts_that_wait_take_one_descriptor_for_all(web: Web) -> None:
    """Far more parts than the process may have files, most of them beyond the memory that parts have (1 MiB)."""
    headers, parts, data = [], [], new(300)
    for number, one in enumerate(data):
        header, _ = described(one)
        header["7FE00010"]["BulkDataURI"] = f"pixels/{number}"
        header["00280010"]["Value"] = header["00280011"]["Value"] = [96]
        headers.append(header)
        head = f"Content-Type: application/octet-stream\r\nContent-Location: pixels/{number}"
        parts.append((head, struct.pack("<H", number) * 96 * 96))
    content = body((f"Content-Type: {JSON}", json.dumps(headers).encode()), *parts)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (sum(1 for _ in Path("/proc/self/fd").iterdir()) + 64, hard))
    try:
        response = post(web, content, JSON)
        assert (response.status_code, reasons(response)) == (200, []), response.text[:500]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for one, (_, pixels) in zip(data, parts, strict=True):
        assert web.get(where(one) + "/frames/1", headers={"accept": "application/octet-stream"}).content == pixels
    assert not list((web.settings.archive.state_dir / "incoming").iterdir())


@pytest.mark.parametrize("form", [JSON, XML])
def test_large_metadata_take_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """The objects of a text take far more memory than it: those of one request are there at a time."""
    monkeypatch.setattr(stow, "SMALL_METADATA", 100)
    monkeypatch.setattr(stow, "Allowance", lambda _: Allowance(1))
    under_way = most = 0
    real, lock = stow._Described._read, threading.Lock()

    def watched(*arguments: Any) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        real(*arguments)
        with lock:
            under_way -= 1

    monkeypatch.setattr(stow._Described, "_read", watched)
    headers = [pydicom.dcmread(io.BytesIO(one)).to_json_dict(bulk_data_threshold=1 << 30) for one in new(6)]
    texts = [json.dumps([one]).encode() if form == JSON else native_model(one) for one in headers]
    with serving_web(archive(tmp_path)) as other, ThreadPoolExecutor(6) as pool:
        answers = pool.map(lambda text: post(other, body((f"Content-Type: {form}", text)), form), texts)
        assert [one.status_code for one in answers] == [200] * 6
        assert (landed(other), most) == (6, 1)
    monkeypatch.setattr(stow, "Allowance", lambda _: Allowance(1, waiting=0))
    small = b'[{"00080018":{"vr":"UI"}}]' if form == JSON else b"<NativeDicomModel/>"
    with serving_web(archive(tmp_path / "other")) as other:
        content = body((f"Content-Type: {form}", small), (f"Content-Type: {form}", texts[0]))
        refused = post(other, content, form)
        assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
        assert int(refused.headers["retry-after"]) == RETRY_AFTER_S
        assert "0 instances of the request had been stored" in refused.json()["detail"]
        assert post(other, body((f"Content-Type: {form}", small)), form).status_code == 409, "small ones do not wait"


def test_compressed_frames_in_parts(web: Web) -> None:
    dataset = pydicom.dcmread(FILES / "SC_rgb_jpeg_gdcm.dcm")
    dataset.SOPInstanceUID = pydicom.uid.generate_uid()
    header, pixels = described(saved(dataset))
    frame = next(pydicom.encaps.generate_frames(pixels, number_of_frames=1))
    content = body(
        (f"Content-Type: {JSON}", json.dumps([header]).encode()),
        ("Content-Type: image/jpeg; transfer-syntax=1.2.840.10008.1.2.4.70\r\nContent-Location: pixels", frame),
    )
    assert post(web, content, JSON).status_code == 200
    got = web.get(where(saved(dataset)) + "/frames/1", headers={"accept": "image/jpeg"})
    assert got.content == frame


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
    got = pydicom.dcmread(io.BytesIO(web.get(where(saved(dataset)), headers={"accept": AS_IT_IS}).content))
    assert got.to_json_dict(bulk_data_threshold=1 << 30) == header


@pytest.mark.parametrize("form", [JSON, XML])
def test_a_study_takes_its_own_metadata_only(web: Web, form: str) -> None:
    """The second has the UIDs of another study: it is refused, and the first is there."""
    [mine], [other] = new(), slices(1, seed=next(SEEDS), study=7)
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"00100010": {"vr": "US", "Value": [1]}}, "00100010: has VR US"),
        ({"00100010": {"vr": "XX"}}, "VR is none"),
        ({"00100010": {"vr": {}}}, "VR is none"),
        ({"00080001": {"vr": "UN", "InlineBinary": "AAE="}}, "cannot be encoded"),
        ({"FFFEE00D": {"vr": "UN"}}, "not a tag"),
        ({"00080018": {"vr": "UI", "Value": ["1" * 70_000]}}, "identifying UID"),
        ({"00100010": {"vr": "PN", "Value": "Doe"}}, "no list"),
        ({"00100010": {"vr": "PN", "Value": [7]}}, "cannot be encoded"),
        ({"00280010": {"vr": "US", "Value": ["many"]}}, "cannot be encoded"),
        ({"00280010": {"vr": "US", "Value": [70000]}}, "cannot be encoded"),
        ({"PatientName": {"vr": "PN"}}, "not a tag"),
        ({"00081140": json.loads(DEEP)["00081140"]}, "too deep"),
        ({"00204000": {"vr": "LT", "BulkDataURI": "nowhere"}}, "not in the request"),
        ({"00204000": {"vr": "LT", "BulkDataURI": 7}}, "cannot be encoded"),
        ({"7FE00010": {"vr": "OW", "Value": [1]}, "00280100": {"vr": "US"}}, "cannot be encoded"),
        ({"7FE00010": {"vr": "OW", "BulkDataURI": ["pixels"]}}, "no text"),
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
