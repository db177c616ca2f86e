"""Compressed on request: the same pixels, sound headers, and what cannot be compressed fails alone or goes as it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.pixels.utils import pixel_array
from pynetdicom import AE, evt

from sphere.catalog.queries import open_queries
from sphere.conf.loading import from_dict
from sphere.conf.peers import Peer
from sphere.ingest.header import identify
from sphere.ingest.part10 import file_meta
from sphere.jobs.forward import Forwarder
from sphere.jobs.forward_queue import Queue
from sphere.scp import client
from sphere.scp.retrieve.transcode import CONVERTIBLE, DECODERS, ENCODERS, NAMED, TARGETS, NotConverted, convert
from sphere.scp.retrieve.transcoder import Transcoder
from sphere.scp.store import StoreAnswer, StoreRequest
from tests.support.dicom_tools import run_tool
from tests.support.forwarder import catalogue
from tests.support.landing import land, new_member
from tests.support.ports import free_port
from tests.support.receiver import running_receiver
from tests.support.samples import CT_STORAGE, dataset_of, make_instance, sendable_files

pytestmark = pytest.mark.interop

RLE, EXPLICIT = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1"
NAME = "RLELossless"
KIND = (
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel",
    "PlanarConfiguration",
)  # fmt: skip
MAX_SIZE = 400_000  # bytes of the samples: one of each kind is to be quick


def kinds() -> dict[tuple[Any, ...], tuple[Path, str]]:
    """The smallest sample of each kind of pixels in each transfer syntax."""
    found: dict[tuple[Any, ...], tuple[Path, str]] = {}
    for path in sorted(sendable_files(), key=lambda path: path.stat().st_size):
        identity = identify(path.read_bytes(), size=path.stat().st_size)
        syntax = identity.TransferSyntaxUID
        if path.stat().st_size > MAX_SIZE or syntax not in CONVERTIBLE or not identity.complete:
            continue
        read = pydicom.dcmread(path, force=True)
        if "PixelData" not in read or read["Rows"].VM != 1 or read["Columns"].VM != 1:
            continue  # see test_a_header_with_two_numbers_for_one_is_not_converted
        if min(read.Rows, read.Columns) < 32:
            continue
        kind = (syntax, *(read.get(keyword) for keyword in KIND), "NumberOfFrames" in read)
        found.setdefault(kind, (path, syntax))
    return found


def as_file(data: bytes, syntax: str, original: Path) -> bytes:
    """A file of the same instance; some originals name it in their File Meta Information only."""
    found = identify(original.read_bytes(), size=original.stat().st_size)
    meta = file_meta(sop_class_uid=found.SOPClassUID, sop_instance_uid=found.SOPInstanceUID, transfer_syntax_uid=syntax)
    return meta + data


def problems(path: Path) -> set[str]:
    """The errors that dciodvfy finds."""
    return {line for line in run_tool("dciodvfy", path).stdout.splitlines() if line.startswith("Error")}


@pytest.mark.parametrize("target", ENCODERS)
def test_the_same_pixels_and_no_new_error(tmp_path: Path, target: str) -> None:
    """Against what the same instance is uncompressed, as that is what the peer would get otherwise."""
    chosen = kinds()
    compressed = as_it_lies = 0
    for path, syntax in chosen.values():
        if syntax == target:
            assert convert(dataset_of(path), syntax, target) == dataset_of(path)
            as_it_lies += 1
            continue
        try:
            result = as_file(convert(dataset_of(path), syntax, target), target, path)
        except NotConverted:
            continue
        plain = as_file(convert(dataset_of(path), syntax, EXPLICIT), EXPLICIT, path)
        before, after = (pydicom.dcmread(BytesIO(data), force=True) for data in (plain, result))
        np.testing.assert_array_equal(
            pixel_array(after, raw=True, decoding_plugin=DECODERS[target][0]), pixel_array(before, raw=True)
        )
        assert after.get("LossyImageCompression") == before.get("LossyImageCompression"), path
        changed = {element.keyword for element in after if before.get(element.tag) != element}
        assert changed <= {"PixelData", "PlanarConfiguration", "PhotometricInterpretation"}, (path, changed)
        files = (tmp_path / "before.dcm", tmp_path / "after.dcm")
        for file, data in zip(files, (plain, result), strict=True):
            file.write_bytes(data)
        assert not problems(files[1]) - problems(files[0]), path
        compressed += 1
    assert compressed >= 0.8 * (len(chosen) - as_it_lies) and compressed >= 8


def coloured(path: Path) -> Path:
    """An image in YBR_FULL of which RGB and back would not give the same samples."""
    samples = np.random.default_rng(7).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return image(
        path, "1.2.3.9", BitsAllocated=8, BitsStored=8, HighBit=7, SamplesPerPixel=3, PlanarConfiguration=0,
        PhotometricInterpretation="YBR_FULL", PixelData=samples.tobytes(),
    )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless", "JPEGLosslessSV1"])
def test_colour_without_loss_stays_as_it_is(tmp_path: Path, name: str, target: str) -> None:
    """YBR_FULL is not made RGB, which would round it; the last is encoded by DCMTK."""
    original, compressed = coloured(tmp_path / "plain.dcm"), tmp_path / "compressed.dcm"
    if name == "JPEGLosslessSV1":
        assert run_tool("dcmcjpeg", "+e1", original, compressed).returncode == 0
    else:
        compressed.write_bytes(as_file(convert(dataset_of(original), EXPLICIT, NAMED[name]), NAMED[name], original))
    syntax = str(pydicom.dcmread(compressed).file_meta.TransferSyntaxUID)
    assert pydicom.uid.UID(syntax).keyword == name
    result = pydicom.dcmread(BytesIO(as_file(convert(dataset_of(compressed), syntax, target), target, original)))
    before = pydicom.dcmread(original)
    assert result.PhotometricInterpretation == before.PhotometricInterpretation
    np.testing.assert_array_equal(pixel_array(result, raw=True), pixel_array(before, raw=True))


@pytest.mark.parametrize(
    ("tool", "syntaxes"),
    [
        ("dcmdjpeg", ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")),
        ("dcmdjpls", ("1.2.840.10008.1.2.4.80",)),
        ("dcmdrle", (RLE,)),
    ],
)
def test_what_dcmtk_decompresses_is_the_same(
    tmp_path: Path, corpus: Path, tool: str, syntaxes: tuple[str, ...]
) -> None:
    """The decoders of another family, over every file of the corpus that they take."""
    compared = set()
    for path in sendable_files():
        identity = identify(path.read_bytes(), size=path.stat().st_size)
        if identity.TransferSyntaxUID not in syntaxes or "PixelData" not in pydicom.dcmread(path, force=True):
            continue
        reference = tmp_path / "reference.dcm"
        reference.unlink(missing_ok=True)
        if run_tool(tool, path, reference).returncode != 0:
            continue
        try:
            result = as_file(convert(dataset_of(path), identity.TransferSyntaxUID, EXPLICIT), EXPLICIT, path)
        except NotConverted:
            continue
        ours, theirs = pydicom.dcmread(BytesIO(result)), pydicom.dcmread(reference)
        np.testing.assert_array_equal(pixel_array(ours, raw=True), pixel_array(theirs, raw=True), err_msg=str(path))
        compared.add(path)
    assert len(compared) >= (2 if tool == "dcmdrle" else 4)


@pytest.mark.parametrize("target", ENCODERS)
@pytest.mark.parametrize("keyword", ["Rows", "Columns", "SamplesPerPixel"])
def test_a_header_with_two_numbers_for_one_is_not_converted(tmp_path: Path, target: str, keyword: str) -> None:
    """As the header of a real file has them: 4 bytes where 2 are to be."""
    path = image(tmp_path / "image.dcm", "1.2.3.1", **{keyword: [8, 0]})
    with pytest.raises(NotConverted):
        convert(dataset_of(path), EXPLICIT, target)
    assert convert(dataset_of(path), EXPLICIT, EXPLICIT) == dataset_of(path)


@contextmanager
def peer_that_takes(port: int, *syntaxes: str) -> Iterator[list[tuple[str, str, bytes]]]:
    """A peer by pynetdicom; gives instance, transfer syntax and data set of what it was sent."""
    seen: list[tuple[str, str, bytes]] = []

    def handle(event: Any) -> int:
        seen.append(
            (event.request.AffectedSOPInstanceUID, event.context.transfer_syntax, event.request.DataSet.getvalue())
        )
        return 0x0000

    ae = AE(ae_title="DEST")
    ae.add_supported_context(CT_STORAGE, list(syntaxes))
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, handle)])
    assert server is not None
    try:
        yield seen
    finally:
        server.shutdown()


def image(path: Path, uid: str, **values: Any) -> Path:
    rows = np.arange(64 * 64, dtype="<u2").reshape(64, 64)
    sound: dict[str, Any] = {
        "SOPInstanceUID": uid, "StudyInstanceUID": "1.2.3", "Rows": 64, "Columns": 64, "BitsAllocated": 16,
        "BitsStored": 12, "HighBit": 11, "SamplesPerPixel": 1, "PixelRepresentation": 0,
        "PhotometricInterpretation": "MONOCHROME2", "PixelData": rows.tobytes(),
    }  # fmt: skip
    return make_instance(path, **sound | values)


@pytest.mark.parametrize("name", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless"])
def test_by_c_move_to_a_peer_that_takes_nothing_else(tmp_path: Path, name: str) -> None:
    """An instance without pixels fails alone, with its reason."""
    port = free_port()
    files = [image(tmp_path / "image.dcm", "1.2.3.1"), make_instance(
        tmp_path / "none.dcm", SOPInstanceUID="1.2.3.2", StudyInstanceUID="1.2.3"
    )]  # fmt: skip
    peer = {"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": port, "transfer_syntaxes": [name]}
    with (
        running_receiver(tmp_path / "archive", {"peers": [peer]}) as receiver,
        peer_that_takes(port, NAMED[name]) as seen,
    ):
        settings = receiver.settings
        assert all(result.stored for result in client.store(receiver.peer, files, settings=settings))
        *_, last = client.move(receiver.peer, {"StudyInstanceUID": "1.2.3"}, settings=settings, destination="DEST")
        assert (last.status, last.completed, last.failed_uids) == (0xB000, 1, ("1.2.3.2",))
        assert "no pixel data to be compressed" in last.comment
        [(uid, syntax, data)] = seen
        assert (uid, syntax) == ("1.2.3.1", NAMED[name])
        sent = pydicom.dcmread(BytesIO(as_file(data, syntax, files[0])))
        np.testing.assert_array_equal(sent.pixel_array, pydicom.dcmread(files[0]).pixel_array)


def test_what_cannot_be_compressed_goes_as_it_lies(tmp_path: Path) -> None:
    port = free_port()
    files = [image(tmp_path / "image.dcm", "1.2.3.1"), make_instance(
        tmp_path / "none.dcm", SOPInstanceUID="1.2.3.2", StudyInstanceUID="1.2.3"
    )]  # fmt: skip
    peer = {"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": port, "transfer_syntaxes": [NAME]}
    with (
        running_receiver(tmp_path / "archive", {"peers": [peer]}) as receiver,
        peer_that_takes(port, EXPLICIT, RLE) as seen,
    ):
        settings = receiver.settings
        assert all(result.stored for result in client.store(receiver.peer, files, settings=settings))
        *_, last = client.move(receiver.peer, {"StudyInstanceUID": "1.2.3"}, settings=settings, destination="DEST")
        assert (last.status, last.completed) == (0x0000, 2)
        assert {uid: syntax for uid, syntax, _ in seen} == {"1.2.3.1": RLE, "1.2.3.2": EXPLICIT}
        assert seen[1][2] == dataset_of(files[1])


def check_sent(seen: tuple[str, str, bytes], original: Path, syntax: str) -> None:
    """That an image went out in `syntax`, with the same pixels."""
    uid, as_sent, data = seen
    before = pydicom.dcmread(original)
    assert (uid, as_sent) == (before.SOPInstanceUID, syntax)
    after = pydicom.dcmread(BytesIO(as_file(data, as_sent, original)))
    np.testing.assert_array_equal(after.pixel_array, before.pixel_array)


@pytest.mark.parametrize("name", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless"])
def test_by_forwarding(tmp_path: Path, name: str) -> None:
    """To a peer that takes nothing else: without a context for it, the study would wait forever."""
    port = free_port()
    path = image(tmp_path / "image.dcm", "1.2.3.1")
    peer = {"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": port, "transfer_syntaxes": [name]}
    settings = from_dict({"peers": [peer], "forwards": [{"name": "all", "to": "dest"}]}, base=tmp_path / "archive")
    queue = Queue(settings)
    queue.open()
    catalogue(settings, land(settings, [new_member(path.read_bytes())]))
    assert queue.take_up() == 1
    with (
        peer_that_takes(port, NAMED[name]) as seen,
        open_queries(settings) as queries,
        closing(Transcoder()) as transcoder,
        closing(Forwarder(settings, queue, queries, transcoder)) as forwarder,
    ):
        forwarder.send_due(threading.Event())
    assert queue.waiting == []
    [one] = seen
    check_sent(one, path, NAMED[name])


def test_by_c_store_as_a_user(tmp_path: Path, settings: Any) -> None:
    port = free_port()
    path = image(tmp_path / "image.dcm", "1.2.3.1")
    peer = Peer(name="dest", ae_title="DEST", host="127.0.0.1", port=port, transfer_syntaxes=(NAME,))
    with peer_that_takes(port, EXPLICIT, RLE) as seen, closing(Transcoder()) as transcoder:
        [result] = client.store(peer, [path], settings=settings, converter=transcoder)
        assert result.stored, result.error
    [one] = seen
    check_sent(one, path, RLE)


def test_by_c_get(tmp_path: Path) -> None:
    """A requester that is known, and offers a context for each transfer syntax, is sent the one of its settings."""
    path = image(tmp_path / "image.dcm", "1.2.3.1")
    seen: list[tuple[str, str, bytes]] = []

    class Keeps:
        def land(self, request: StoreRequest) -> StoreAnswer:
            assert isinstance(request.dataset, list)
            seen.append((request.AffectedSOPInstanceUID, request.TransferSyntaxUID, b"".join(request.dataset)))
            return StoreAnswer(0x0000)

    peer = {"name": "me", "ae_title": "SPHERE", "host": "127.0.0.1", "transfer_syntaxes": ["JPEGLSLossless"]}
    with running_receiver(tmp_path / "archive", {"peers": [peer]}) as receiver:
        settings = receiver.settings
        assert all(result.stored for result in client.store(receiver.peer, [path], settings=settings))
        keys = {"StudyInstanceUID": "1.2.3"}
        *_, last = client.get(receiver.peer, keys, settings=settings, store=Keeps(), sop_classes=[CT_STORAGE])
    assert (last.status, last.completed) == (0x0000, 1)
    [one] = seen
    check_sent(one, path, NAMED["JPEGLSLossless"])
