"""Values and frames of deflated instances over HTTP: as they are inflated, in bounded memory, bombs included."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from sphere.conf.settings import Settings
from sphere.ingest.part10 import file_meta
from sphere.scp.web import inflated
from tests.support.landing import archive, land, new_member
from tests.support.memory import peak
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

SIDE = 1024  # rows and columns, of 8 bits: 1 MiB a frame
FRAME = SIDE * SIDE
FRAMES = 192
OCTETS = {"accept": "application/octet-stream"}
FILE = Path(pydicom.__file__).parent / "data" / "test_files" / "image_dfl.dcm"


def frame(number: int) -> bytes:
    """A frame, from 1, each of its own grey."""
    return bytes([number]) * FRAME


def deflated(frames: int, *, declared: int | None = None, inside: int = FRAMES, name: str = "1") -> bytes:
    """A file of `frames` frames whose deflated stream holds `inside` of them; PixelData says `declared` bytes."""
    dataset = pydicom.dcmread(FILE)
    del dataset.PixelData
    dataset.SOPInstanceUID, dataset.NumberOfFrames = f"1.2.3.4.{name}", frames
    dataset.Rows = dataset.Columns = SIDE
    dataset.WindowCenter, dataset.WindowWidth = 127.5, 256
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = False, True
    write_dataset(out, Dataset(dataset))
    length = frames * FRAME if declared is None else declared
    press = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    pieces = [press.compress(out.getvalue() + struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OW", 0, length))]
    pieces += [press.compress(frame(number + 1)) for number in range(inside)]
    meta = file_meta(
        sop_class_uid=dataset.SOPClassUID,
        sop_instance_uid=dataset.SOPInstanceUID,
        transfer_syntax_uid=DeflatedExplicitVRLittleEndian,
    )
    return b"".join((meta, *pieces, press.flush()))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An archive with a bomb, one that says more than it has, one whose stream is cut, and one beyond all bounds."""
    found = archive(tmp_path_factory.mktemp("deflated"))
    files = (
        deflated(FRAMES, name="1"),
        deflated(8, inside=4, name="2"),
        deflated(4, inside=4, name="3")[:-64],
        deflated(FRAMES, declared=inflated.MAX_INFLATED, name="4"),
    )
    assert len(files[0]) < FRAMES * FRAME // 500
    land(found, [new_member(data) for data in files])
    return found


@pytest.fixture(scope="module")
def web(settings: Settings) -> Iterator[Web]:
    with serving_web(settings) as running:
        yield running


def place(web: Web, name: str) -> tuple[str, str]:
    """The path of an instance, and the URI of its pixel data as metadata give it."""
    dataset = pydicom.dcmread(FILE, stop_before_pixels=True)
    series = f"/studies/{dataset.StudyInstanceUID}/series/{dataset.SeriesInstanceUID}"
    path = f"{series}/instances/1.2.3.4.{name}"
    [header] = web.get(f"{path}/metadata").json()
    return path, header["7FE00010"]["BulkDataURI"]


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_a_value_is_sent_as_it_is_inflated(web: Web) -> None:
    """192 MiB out of 200 kB: whole, in parts of a multipart message, and a range of it."""
    _, uri = place(web, "1")
    before = resident()
    peak(os.getpid(), forget=True)
    for accept, more in (("application/octet-stream", 0), ("multipart/related", 40)):
        digest, size = 0, 0
        with web.client.stream("GET", uri, headers={"accept": accept}) as response:
            assert response.status_code == 200
            for chunk in response.iter_raw(1 << 20):
                size += len(chunk)
                digest = zlib.crc32(chunk, digest)
        assert size == int(response.headers["content-length"]) >= FRAMES * FRAME + more
        if not more:
            expected = 0
            for number in range(FRAMES):
                expected = zlib.crc32(frame(number + 1), expected)
            assert digest == expected
    some = web.client.get(uri, headers={"range": f"bytes={150 * FRAME - 2}-{150 * FRAME + 1}"})
    assert (some.status_code, some.content) == (206, bytes([150, 150, 151, 151]))
    assert peak(os.getpid()) - before < 32 << 20


def test_a_frame_takes_the_memory_of_a_frame(web: Web) -> None:
    path, _ = place(web, "1")
    web.get(f"{path}/frames/1", headers=OCTETS)
    before = resident()
    peak(os.getpid(), forget=True)
    for number in (1, 2, 77, FRAMES):
        assert web.get(f"{path}/frames/{number}", headers=OCTETS).content == frame(number)
    shown = web.get(f"{path}/frames/100/rendered", headers={"accept": "image/png"})
    grey = np.asarray(Image.open(BytesIO(shown.content)).convert("L"))
    assert grey.shape == (SIDE, SIDE) and (abs(grey.astype(int) - 100) <= 1).all()
    assert peak(os.getpid()) - before < 64 << 20
    assert web.get(f"{path}/frames/{FRAMES + 1}", headers=OCTETS).status_code == 404


@pytest.mark.parametrize(("name", "inside"), [("2", 4), ("3", 3)], ids=["says more than it has", "its stream is cut"])
def test_what_is_not_in_the_stream_is_not_there(web: Web, name: str, inside: int) -> None:
    """A 404 with a problem body, and not a body that ends early; what is there can be had."""
    path, uri = place(web, name)
    whole = web.client.get(uri, headers=OCTETS)
    assert (whole.status_code, whole.json()["detail"]) == (404, "there is no such value")
    assert whole.headers["content-type"] == "application/problem+json"
    some = web.client.get(uri, headers={"range": "bytes=1048575-1048576"})
    assert (some.status_code, some.content) == (206, b"\1\2")
    assert web.get(f"{path}/frames/{inside}", headers=OCTETS).content == frame(inside)
    beyond = web.get(f"{path}/frames/5", headers=OCTETS)
    assert beyond.status_code == 404
    rendered = web.get(f"{path}/frames/5/rendered", headers={"accept": "image/png"})
    assert rendered.status_code == 404


def test_beyond_the_bound_nothing_is_inflated(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    path, uri = place(web, "4")
    monkeypatch.setattr(zlib, "decompressobj", lambda *_, **__: pytest.fail("it is inflated"))
    answer = web.client.get(uri, headers=OCTETS)
    assert (answer.status_code, answer.json()["detail"]) == (404, "there is no such value")
    far = inflated.MAX_INFLATED // FRAME
    assert web.get(f"{path}/frames/{far}", headers=OCTETS).status_code == 404


def test_a_deflated_image_with_lookup_tables(tmp_path: Path) -> None:
    """Its palette is too long for the header: it is inflated for it, and the image is that of the plain file."""
    shown = []
    for syntax in (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):
        dataset = pydicom.dcmread(FILE.with_name("examples_palette.dcm"))
        for colour in ("Red", "Green", "Blue"):
            table = dataset[f"{colour}PaletteColorLookupTableData"].value
            dataset[f"{colour}PaletteColorLookupTableData"].value = table + bytes(8192 - len(table))
            dataset[f"{colour}PaletteColorLookupTableDescriptor"].value = [4096, 0, 16]
        dataset.file_meta.TransferSyntaxUID = syntax
        out = BytesIO()
        dataset.save_as(out)
        settings = archive(tmp_path / syntax.keyword)
        land(settings, [new_member(out.getvalue())])
        series = f"/studies/{dataset.StudyInstanceUID}/series/{dataset.SeriesInstanceUID}"
        path = f"{series}/instances/{dataset.SOPInstanceUID}"
        with serving_web(settings) as running:
            [header] = running.get(f"{path}/metadata").json()
            assert "BulkDataURI" in header["00281201"]
            image = running.get(f"{path}/rendered", headers={"accept": "image/png"})
        assert image.headers["content-type"] == "image/png", image.text[:300]
        shown.append(np.asarray(Image.open(BytesIO(image.content))))
    assert shown[0].ndim == 3 and shown[0].std() > 10 and (shown[0] == shown[1]).all()
