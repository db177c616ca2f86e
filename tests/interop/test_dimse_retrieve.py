"""C-MOVE and C-GET with other people's programs: what comes back is what went in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.presentation import StoragePresentationContexts
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made when the module is loaded
    CompositeInstanceRootRetrieveGet,
    uid_to_service_class,
)

from sphere.ingest.header import identify
from sphere.ingest.part10 import file_meta
from sphere.scp import client
from sphere.scp.client import retrieve as retrieve_client
from sphere.scp.client.retrieve import Progress
from sphere.scp.contexts import GET_MODELS, MOVE_MODELS, is_storage
from sphere.scp.retrieve.transcode import CONVERTIBLE, TARGETS, convert
from sphere.scp.store import StoreAnswer, StoreRequest
from sphere.scp.upper.command import C_GET_RQ, C_MOVE_RQ
from sphere.scp.upper.outgoing import Outgoing
from sphere.scp.upper.requestor import Proposed, connect
from tests.support.dicom_tools import (
    STORESCU_OPTIONS,
    part10_dataset,
    require_tool,
    run_tool,
    running_storescp,
)
from tests.support.hdfs import HdfsCluster
from tests.support.ports import free_port
from tests.support.pynetdicom_user import hold_reactor
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import dataset_of, make_instance, sendable_files

pytestmark = pytest.mark.interop

UID = re.compile("[0-9.]{1,64}")
NOT_CONVERTED = {  # by one sample each
    "1.2.840.10008.1.2.4.55",  # JPEG full progression, retired
    "1.2.840.10008.1.2.8.1",  # frame-wise deflate
    "1.2.840.10008.1.2.4.91",  # a code stream that OpenJPEG refuses
    "1.2.840.10008.1.2.5",  # RLE of 1 bit
}
LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
J2K = "1.2.840.10008.1.2.4.90"


@dataclass
class Holding:
    """A receiver that holds every sample, and a destination that takes some transfer syntaxes."""

    receiver: Receiver
    destination: Path
    files: dict[str, Path]  # by SOP Instance UID

    def studies(self) -> list[str]:
        return sorted({one.StudyInstanceUID for one in self.receiver.members() if UID.fullmatch(one.StudyInstanceUID)})

    def retrievable(self) -> dict[str, Path]:
        """Of the instances that say which study they are of: others will be quarantined."""
        known = {one.SOPInstanceUID for one in self.receiver.members() if UID.fullmatch(one.StudyInstanceUID)}
        return {uid: path for uid, path in self.files.items() if uid in known and UID.fullmatch(uid)}


@contextmanager
def holding(
    base: Path,
    *options: str,
    files: Sequence[Path] | None = None,
    peers: Sequence[Mapping[str, object]] = (),
) -> Iterator[Holding]:
    """An archive with `files` (every sample), and a storescp that was started with `options`, besides other `peers`."""
    paths = sendable_files() if files is None else files
    identities = [(identify(path.read_bytes(), size=path.stat().st_size), path) for path in paths]
    chosen = {found.SOPInstanceUID: path for found, path in identities if is_storage(found.SOPClassUID)}
    out = base / "out"
    with running_storescp(out, *options) as port:
        known = [*peers, {"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": port}]
        with running_receiver(base / "archive", {"peers": known}) as receiver:
            results = list(client.store(receiver.peer, chosen.values(), settings=receiver.settings))
            unstored = [(result.source, result.error) for result in results if not result.stored]
            assert not unstored, unstored
            yield Holding(receiver, out, chosen)


def by_instance(folder: Path) -> dict[str, Path]:
    return {identify(path.read_bytes(), size=path.stat().st_size).SOPInstanceUID: path for path in folder.iterdir()}


def syntax_of(path: Path) -> str:
    return identify(path.read_bytes(), size=path.stat().st_size).TransferSyntaxUID


def as_sent(path: Path) -> bytes:
    """A file's data set, one of odd length with a NUL more: DCMTK ends the association over it."""
    data = dataset_of(path)
    return data + bytes(len(data) % 2)


def finished(responses: Iterator[Progress], total: int) -> Progress:
    """The final response; the counts of each add up."""
    last = None
    for last in responses:
        if last.pending:
            assert last.remaining + last.completed + last.failed + last.warning == total
    assert last is not None and not last.pending
    assert last.completed + last.failed + last.warning == total
    return last


def files_in(syntax: str, count: int) -> list[Path]:
    """Some files in a transfer syntax."""
    return [path for path in sendable_files() if syntax_of(path) == syntax][:count]


def moved(held: Holding, destination: str = "DEST") -> Progress:
    """Every study by one C-MOVE."""
    keys = {"StudyInstanceUID": "\\".join(held.studies())}
    peer, settings = held.receiver.peer, held.receiver.settings
    responses = retrieve_client.move(peer, keys, settings=settings, destination=destination)
    return finished(responses, len(held.retrievable()))


def test_every_file_comes_back_byte_for_byte_by_c_move(tmp_path: Path) -> None:
    """storescp takes most transfer syntaxes; what it does not take is converted, or fails alone."""
    with holding(tmp_path) as held:
        wanted = held.retrievable()
        last = moved(held)
        got = by_instance(held.destination)
        failed = set(last.failed_uids)
        assert last.status == (0xB000 if failed else 0x0000)
        assert got.keys() | failed == wanted.keys() and last.completed == len(got) >= 0.9 * len(wanted)
        assert all(syntax_of(wanted[uid]) not in CONVERTIBLE for uid in failed)
        for uid, path in got.items():
            if syntax_of(path) == syntax_of(wanted[uid]):
                assert part10_dataset(path.read_bytes()) == as_sent(wanted[uid]), wanted[uid]
            else:
                assert syntax_of(wanted[uid]) not in STORESCU_OPTIONS


def test_another_archive_gets_every_byte(tmp_path: Path) -> None:
    with running_receiver(tmp_path / "other", {"archive": {"ae_title": "OTHER"}}) as other:
        peers = [{"name": "other", "ae_title": "OTHER", "host": "127.0.0.1", "port": other.port}]
        with holding(tmp_path, peers=peers) as held:
            last = moved(held, "OTHER")
            wanted = held.retrievable()
            assert (last.status, last.completed) == (0x0000, len(wanted))
            assert {one.SOPInstanceUID: one.sha256 for one in other.members()} == {
                one.SOPInstanceUID: one.sha256 for one in held.receiver.members() if one.SOPInstanceUID in wanted
            }


def test_every_file_comes_back_byte_for_byte_by_c_get(tmp_path: Path) -> None:
    """pynetdicom takes whatever is asked for in a context of its own: each SOP class in each transfer syntax."""
    with holding(tmp_path) as held:
        wanted = held.retrievable()
        of_kind: dict[tuple[str, str], list[str]] = {}
        for one in held.receiver.members():
            if one.SOPInstanceUID in wanted:
                of_kind.setdefault((one.SOPClassUID, one.TransferSyntaxUID), []).append(one.SOPInstanceUID)
        kinds, got = sorted(of_kind), {}
        for start in range(0, len(kinds), 100):  # of the 128 contexts of an association
            some = kinds[start : start + 100]
            got |= got_by_pynetdicom(held.receiver, some, [uid for kind in some for uid in of_kind[kind]])
    assert got.keys() == wanted.keys()
    for uid, (syntax, data) in got.items():
        assert (syntax, data) == (syntax_of(wanted[uid]), as_sent(wanted[uid])), wanted[uid]


def got_by_pynetdicom(
    receiver: Receiver, kinds: Sequence[tuple[str, str]], uids: Sequence[str]
) -> dict[str, tuple[str, bytes]]:
    """Transfer syntax and data set of instances by one C-GET (PS3.4 Annex Y); the counts of each response are right."""
    got: dict[str, tuple[str, bytes]] = {}

    def keep(event: evt.Event) -> int:
        data = event.request.DataSet.getvalue()
        got[str(event.request.AffectedSOPInstanceUID)] = str(event.context.transfer_syntax), data
        return 0x0000

    model = CompositeInstanceRootRetrieveGet
    contexts = [build_context(model), *(build_context(sop_class, syntax) for sop_class, syntax in kinds)]
    roles = [build_role(sop_class, scp_role=True) for sop_class in sorted({sop_class for sop_class, _ in kinds})]
    ae = AE(ae_title="TEST")
    ae.dimse_timeout = 60
    association = ae.associate(
        "127.0.0.1", receiver.port, contexts, ext_neg=list(roles), evt_handlers=[(evt.EVT_C_STORE, keep)]
    )
    assert association.is_established and not association.rejected_contexts
    hold_reactor(association)
    keys = Dataset()
    keys.QueryRetrieveLevel, keys.SOPInstanceUID = "IMAGE", list(uids)
    *pending, last = [status for status, _ in association.send_c_get(keys, model)]
    association.release()
    for one in pending:
        counts = (one.NumberOfRemainingSuboperations, one.NumberOfCompletedSuboperations)
        assert (one.Status, sum(counts), one.NumberOfFailedSuboperations) == (0xFF00, len(uids), 0)
    assert pending and (last.Status, last.NumberOfCompletedSuboperations) == (0x0000, len(uids))
    return got


def test_movescu_counts_each_response(tmp_path: Path) -> None:
    with holding(tmp_path, files=files_in(ExplicitVRLittleEndian, 20)) as held:
        uids = "\\".join(held.studies())
        keys = ("-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={uids}")
        run = run_tool("movescu", "-d", "-aem", "DEST", "-S", *keys, "127.0.0.1", held.receiver.port)
        assert run.returncode == 0 and "Sub-operations complete - No failures or warnings" in run.stdout
        total = len(held.retrievable())
        rows = [
            re.findall(rf"{name} Suboperations +: (\w+)", run.stdout) for name in ("Remaining", "Completed", "Failed")
        ]
        *pending, final = zip(*rows, strict=True)
        assert (
            final == ("none", str(total), "0") and len(pending) >= 1
        )  # not one for each sub-operation: it is optional
        counts = [tuple(map(int, row)) for row in pending]
        assert counts[0] == (total - 1, 1, 0) and counts == sorted(counts, reverse=True)
        assert all(sum(row) == total for row in counts)
        assert len(list(held.destination.iterdir())) == total


def test_getscu_gets_what_it_accepts(tmp_path: Path) -> None:
    """Byte for byte, as it writes what it is sent."""
    require_tool("getscu")
    with holding(tmp_path, files=files_in(ExplicitVRLittleEndian, 20)) as held:
        (tmp_path / "got").mkdir()
        uids = "\\".join(held.studies())
        keys = ("-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={uids}")
        out = ("-od", tmp_path / "got")
        run = run_tool("getscu", "-v", "+B", "-S", *out, *keys, "127.0.0.1", held.receiver.port)
        assert run.returncode == 0, run.stdout
        got, wanted = by_instance(tmp_path / "got"), held.retrievable()
        assert got.keys() == wanted.keys() and got, run.stdout
        for uid, path in got.items():
            assert syntax_of(path) == ExplicitVRLittleEndian
            assert part10_dataset(path.read_bytes()) == as_sent(wanted[uid]), wanted[uid]


@pytest.mark.parametrize("option", ["+xe", "+xi"])
def test_what_is_not_accepted_is_converted_to_the_same_pixels(tmp_path: Path, option: str) -> None:
    """storescp with +xe takes little endian uncompressed ones, with +xi implicit VR only."""
    with holding(tmp_path, option) as held:
        wanted = held.retrievable()
        failed = set(moved(held).failed_uids)
        got = by_instance(held.destination)
        assert got.keys() | failed == wanted.keys() and not got.keys() & failed
        assert {syntax_of(wanted[uid]) for uid in failed} <= NOT_CONVERTED and len(failed) <= 5
        compared = {syntax_of(wanted[uid]) for uid, path in got.items() if is_same_image(wanted[uid], path)}
    there = {syntax_of(path) for path in wanted.values()}
    assert compared >= there & (CONVERTIBLE - {"1.2.840.10008.1.2.4.51"}) and len(compared) >= 8


def test_12_bit_jpeg_is_decoded_as_dcmtk_does(tmp_path: Path) -> None:
    path = Path(str(get_testdata_file("JPEG-lossy.dcm")))
    reference = tmp_path / "reference.dcm"
    run = run_tool("dcmdjpeg", path, reference)
    assert reference.exists(), run.stdout
    for number, target in enumerate(TARGETS):
        plain = convert(dataset_of(path), syntax_of(path), target)
        meta = file_meta(sop_class_uid="1.2", sop_instance_uid=f"1.{number}", transfer_syntax_uid=target)
        result = pydicom.dcmread(BytesIO(meta + plain))
        np.testing.assert_array_equal(result.pixel_array, pydicom.dcmread(reference).pixel_array)
        assert result.LossyImageCompression == "01" and result.pixel_array.max() > 0


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("SC_rgb_small_odd_jpeg.dcm", True),
        ("JPEG2000.dcm", True),
        ("JPEG2000.dcm", False),  # the code stream tells
        ("JPEGLSNearLossless_08.dcm", True),
        ("JPEGLSNearLossless_08.dcm", False),
    ],
)
def test_what_was_lossy_says_so_when_it_is_decompressed(tmp_path: Path, name: str, stated: bool) -> None:
    """LossyImageCompression (PS3.3 C.7.6.1.1.5) is 01 in what is sent, whether or not it was in what was kept."""
    dataset = pydicom.dcmread(str(get_testdata_file(name, download=False)))
    if stated:
        dataset.LossyImageCompression = "01"
    elif "LossyImageCompression" in dataset:
        del dataset.LossyImageCompression
    path = tmp_path / name
    dataset.save_as(path)
    for number, target in enumerate(TARGETS):
        plain = convert(dataset_of(path), syntax_of(path), target)
        meta = file_meta(sop_class_uid="1.2", sop_instance_uid=f"1.{number}", transfer_syntax_uid=target)
        assert pydicom.dcmread(BytesIO(meta + plain)).LossyImageCompression == "01"


@pytest.mark.parametrize("name", ["SC_rgb_gdcm_KY.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"])
def test_what_may_be_lossless_is_not_called_lossy(tmp_path: Path, name: str) -> None:
    """The first is in JPEG 2000 that may lose, by the wavelet that does not."""
    dataset = pydicom.dcmread(str(get_testdata_file(name, download=False)))
    if "LossyImageCompression" in dataset:
        del dataset.LossyImageCompression
    dataset.save_as(tmp_path / name)
    plain = convert(dataset_of(tmp_path / name), syntax_of(tmp_path / name), TARGETS[0])
    meta = file_meta(sop_class_uid="1.2", sop_instance_uid="1.3", transfer_syntax_uid=TARGETS[0])
    assert "LossyImageCompression" not in pydicom.dcmread(BytesIO(meta + plain))


@pytest.mark.parametrize(
    ("models", "field", "more"),
    [(MOVE_MODELS, C_MOVE_RQ, {"MoveDestination": "DEST"}), (GET_MODELS, C_GET_RQ, {})],
    ids=["move", "get"],
)
def test_nothing_found_is_success_with_zero_counts(
    tmp_path: Path, models: Mapping[str, str], field: int, more: Mapping[str, str]
) -> None:
    """One response, with the counts on the wire (PS3.4 C.4.2.1.6, C.4.3.1.5)."""
    dest = {"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": free_port()}
    sop_class = next(uid for uid, model in models.items() if model == "STUDY_ROOT")
    proposed = [Proposed(sop_class, ("1.2.840.10008.1.2",))]
    with (
        running_receiver(tmp_path, {"peers": [dest]}) as receiver,
        connect(receiver.peer, receiver.settings, proposed) as association,
    ):
        command = {"AffectedSOPClassUID": sop_class, "CommandField": field, "Priority": 0, **more}
        identifier = b"\x08\x00\x52\x00\x06\x00\x00\x00STUDY " + b"\x20\x00\x0d\x00\x08\x00\x00\x00" + b"1.2.3.4\0"
        context = association.user_contexts[0]
        message = association.response(field, association.send(context, command, Outgoing.of(identifier)))
    answer = message.command
    assert answer["Status"] == 0x0000 and message.dataset is None
    counts = [answer[f"NumberOf{kind}Suboperations"] for kind in ("Completed", "Failed", "Warning")]
    assert counts == [0, 0, 0] and "NumberOfRemainingSuboperations" not in answer


def test_more_than_128_contexts_take_several_associations(tmp_path: Path) -> None:
    """70 SOP classes, each compressed: a context for it as it lies, and one for it decompressed."""
    known = [str(context.abstract_syntax) for context in StoragePresentationContexts]
    classes = [uid for uid in known if uid_to_service_class(uid) is StorageServiceClass][:70]  # it aborts over others
    files = [
        make_instance(
            tmp_path / f"{n}.dcm", transfer_syntax=J2K, SOPClassUID=uid, SOPInstanceUID=f"1.9.{n}",
            StudyInstanceUID="1.9",
        )
        for n, uid in enumerate(classes, 1)
    ]  # fmt: skip
    proposed: list[int] = []
    got: dict[str, bytes] = {}

    def keep(event: evt.Event) -> int:
        got[str(event.request.AffectedSOPInstanceUID)] = event.request.DataSet.getvalue()
        return 0x0000

    def count(event: evt.Event) -> None:
        proposed.append(len(event.assoc.requestor.requested_contexts))

    ae = AE(ae_title="DEST")
    for uid in classes:
        ae.add_supported_context(uid, J2K)
    port = free_port()
    handlers = [(evt.EVT_C_STORE, keep), (evt.EVT_ESTABLISHED, count)]
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
    assert server is not None
    dest = {"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": port}
    try:
        with running_receiver(tmp_path / "archive", {"peers": [dest]}) as receiver:
            assert all(result.stored for result in client.store(receiver.peer, files, settings=receiver.settings))
            keys, settings = {"StudyInstanceUID": "1.9"}, receiver.settings
            responses = retrieve_client.move(receiver.peer, keys, settings=settings, destination="DEST")
            last = finished(responses, len(files))
    finally:
        server.shutdown()
    assert (last.status, last.completed) == (0x0000, 70), (last, proposed)
    assert sum(proposed) == 140 and len(proposed) == 2 and max(proposed) <= 128
    assert got == {f"1.9.{n}": dataset_of(path) for n, path in enumerate(files, 1)}


@pytest.mark.hdfs
def test_from_hdfs_what_landed_a_moment_ago(hdfs_cluster: HdfsCluster, tmp_path: Path) -> None:
    """The bundle is still open, and its last bytes are published within a second: retrieve waits for them."""
    files = [
        make_instance(tmp_path / f"{number}.dcm", StudyInstanceUID="1.2.3", SOPInstanceUID=f"1.2.3.{number}")
        for number in range(1, 21)
    ]
    tables = {"storage": {"root": f"{hdfs_cluster.hdfs_url}/retrieve"}}
    with running_receiver(tmp_path / "archive", tables) as receiver:
        assert all(result.stored for result in client.store(receiver.peer, files, settings=receiver.settings))
        landed: dict[str, bytes] = {}

        class Keeps:
            def land(self, request: StoreRequest) -> StoreAnswer:
                assert isinstance(request.dataset, list)
                landed[request.AffectedSOPInstanceUID] = b"".join(request.dataset)
                return StoreAnswer(0x0000)

        keys, settings = {"StudyInstanceUID": "1.2.3"}, receiver.settings
        last = finished(retrieve_client.get(receiver.peer, keys, settings=settings, store=Keeps()), len(files))
    assert (last.status, last.completed) == (0x0000, len(files))
    assert landed == {f"1.2.3.{number}": dataset_of(path) for number, path in enumerate(files, 1)}


def problems(path: Path) -> Counter[str]:
    """The errors that dciodvfy finds."""
    return Counter(line for line in run_tool("dciodvfy", path).stdout.splitlines() if line.startswith("Error"))


def test_dciodvfy_finds_no_new_error_in_what_was_converted(tmp_path: Path) -> None:
    """The smallest sample of each transfer syntax."""
    smallest: dict[str, Path] = {}
    for path in sorted(sendable_files(), key=lambda path: path.stat().st_size):
        found = identify(path.read_bytes(), size=path.stat().st_size)
        dataset = pydicom.dcmread(path, force=True)
        convertible = found.TransferSyntaxUID in CONVERTIBLE and found.complete and dataset.get("BitsAllocated") != 1
        if convertible and "PixelData" in dataset:
            smallest.setdefault(found.TransferSyntaxUID, path)
    assert len(smallest) >= 8
    for syntax, path in smallest.items():
        found = identify(path.read_bytes(), size=path.stat().st_size)
        expected = problems(path)
        for target in TARGETS:
            meta = file_meta(
                sop_class_uid=found.SOPClassUID, sop_instance_uid=found.SOPInstanceUID, transfer_syntax_uid=target
            )
            (tmp_path / "result.dcm").write_bytes(meta + convert(dataset_of(path), syntax, target))
            after = problems(tmp_path / "result.dcm")
            if "Error - Dicom dataset read failed" in expected:  # a deflated one; inflated, nothing else has changed
                expected = after
            assert not after - expected, (path, target)


def is_same_image(before: Path, after: Path) -> bool:
    """Whether there were pixels to compare; those that pydicom reads are the same (12-bit JPEG has its own test)."""
    source, result = pydicom.dcmread(before, force=True), pydicom.dcmread(after)
    assert not result.file_meta.TransferSyntaxUID.is_compressed
    assert source.SOPInstanceUID == result.SOPInstanceUID
    if syntax_of(before) in LOSSY or source.get("LossyImageCompression") == "01":
        assert result.LossyImageCompression == "01", before
    try:
        expected = source.pixel_array
    except (ValueError, AttributeError, NotImplementedError, RuntimeError):  # no pixels, or damaged ones
        return False
    np.testing.assert_array_equal(result.pixel_array, expected, err_msg=str(before))
    return True
