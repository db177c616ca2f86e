"""What happens with one C-STORE."""

from __future__ import annotations

import errno
import struct
from pathlib import Path
from typing import Any, cast

import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from sphere.conf.errors import Refused, StorageFull
from sphere.conf.loading import from_dict
from sphere.ingest.bundle import FileRange, NewMember
from sphere.ingest.part10 import read_file_meta
from sphere.ingest.records import MemberRecord
from sphere.scp.policy import Policy
from sphere.scp.store import (
    LOOK_S,
    MISMATCH,
    OUT_OF_RESOURCES,
    PROCESSING_FAILURE,
    SUCCESS,
    StoreAnswer,
    StoreRequest,
    StoreService,
)
from sphere.scp.upper.dataset import ArrivingDataSet, WaitingFile

pytestmark = pytest.mark.unit

CT, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"


class FakeWriter:
    """Remembers members; fails with `error` where it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.members: list[NewMember] = []
        self._error = error

    def store(self, member: NewMember) -> MemberRecord:
        if self._error is not None:
            raise self._error
        self.members.append(member)
        return None  # type: ignore[return-value]


def encoded(**changes: Any) -> bytes:
    """A small CT data set in Explicit VR Little Endian; a change to None leaves the attribute out."""
    dataset = Dataset()
    values = {"SOPClassUID": CT, "SOPInstanceUID": "1.2.3.1", "PatientName": "A^B", "StudyInstanceUID": "1.2.3.2",
              "SeriesInstanceUID": "1.2.3.3"} | changes  # fmt: skip
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, dataset)
    return buffer.getvalue()


def encoded_implicitly() -> bytes:
    """Study and series of one in Implicit VR Little Endian."""
    uids = {0x000D: b"1.2.3.2\0", 0x000E: b"1.2.3.3\0"}
    return b"".join(struct.pack("<HHI", 0x0020, element, len(uid)) + uid for element, uid in uids.items())


def request(data: bytes, **changes: Any) -> StoreRequest:
    fields: dict[str, Any] = {
        "AffectedSOPClassUID": CT, "AffectedSOPInstanceUID": "1.2.3.1", "TransferSyntaxUID": EXPLICIT,
        "dataset": memoryview(data), "size": len(data), "calling_ae": "CT1", "address": "10.0.0.5",
    } | changes  # fmt: skip
    return StoreRequest(**fields)


def test_the_bytes_are_handed_on_as_they_came() -> None:
    writer, data = FakeWriter(), encoded()
    assert StoreService(writer).land(request(data)).status == SUCCESS
    [member] = writer.members
    assert bytes(member.dataset) == data  # type: ignore[arg-type]
    uids = (member.SOPInstanceUID, member.SOPClassUID, member.StudyInstanceUID, member.SeriesInstanceUID)
    assert uids == ("1.2.3.1", CT, "1.2.3.2", "1.2.3.3")
    assert (member.source_aet, member.origin) == ("CT1", "dimse:CT1@10.0.0.5")
    meta = read_file_meta(member.preamble + data)
    assert (meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID) == ("1.2.3.1", EXPLICIT)
    assert meta.dataset_offset == len(member.preamble)


@pytest.mark.parametrize(
    ("data", "uid", "comment"),
    [
        (encoded(SOPInstanceUID="1.2.3.9"), "1.2.3.9", "names another instance"),
        (encoded(SOPInstanceUID=None), "1.2.3.1", "no readable SOP Instance UID"),
        (encoded(SOPClassUID="1.2.840.10008.5.1.4.1.1.4"), "1.2.3.1", "names another SOP class"),
        (encoded(SOPClassUID=None), "1.2.3.1", "no readable SOP Class UID"),
        (encoded(StudyInstanceUID=None), "1.2.3.1", "Study or Series Instance UID is not readable"),
        (b"\xff" * 300, "1.2.3.1", "no readable SOP Instance UID"),
        (b"", "1.2.3.1", "no readable SOP Instance UID"),
    ],
)
def test_a_data_set_that_contradicts_the_command_is_kept_with_a_warning(data: bytes, uid: str, comment: str) -> None:
    """As what it says itself; as what the command says where it says nothing."""
    writer = FakeWriter()
    answer = StoreService(writer).land(request(data))
    assert answer.status == MISMATCH
    assert comment in answer.comment
    assert len(answer.comment) <= 64
    assert writer.members[0].SOPInstanceUID == uid
    assert read_file_meta(writer.members[0].preamble + data).MediaStorageSOPInstanceUID == uid


@pytest.mark.parametrize(
    ("written", "uid", "meta"),
    [
        ("1.2.3.9\\1.2.3.1", "1.2.3.9", "1.2.3.9"),
        ("unknown", "unknown", "1.2.3.1"),
        ("9" * 70_000, "9" * 70_000, "1.2.3.1"),
    ],
    ids=["several", "no UID", "long"],
)
def test_a_uid_that_is_none_or_several(written: str, uid: str, meta: str) -> None:
    """Nothing of it is taken for another instance's, and the File Meta Information has a UID at any rate."""
    writer = FakeWriter()
    syntax = "1.2.840.10008.1.2"
    data = struct.pack("<HHI", 0x0008, 0x0018, len(written)) + written.encode() + encoded_implicitly()
    assert StoreService(writer).land(request(data, TransferSyntaxUID=syntax)).status == MISMATCH
    [member] = writer.members
    assert (member.SOPInstanceUID, member.StudyInstanceUID) == (uid, "1.2.3.2")
    assert read_file_meta(member.preamble + data).MediaStorageSOPInstanceUID == meta


def test_a_presentation_context_of_another_class_is_a_warning() -> None:
    """PS3.7 9.1.1.1.9 would refuse it (0122): an image is not lost for how it was sent."""
    writer, mr = FakeWriter(), "1.2.840.10008.5.1.4.1.1.4"
    answer = StoreService(writer).land(request(encoded(), abstract_syntax=mr))
    assert answer.status == MISMATCH
    assert answer.comment == "stored, but its presentation context is of another SOP class"
    assert len(answer.comment) <= 64
    assert StoreService(writer).land(request(encoded(), abstract_syntax=CT)).status == SUCCESS
    assert [member.SOPClassUID for member in writer.members] == [CT, CT]


class FakePolicy:
    """Says who is deleted, and counts how often it was asked."""

    def __init__(self, *, deleted: bool) -> None:
        self.deleted, self.asked = deleted, 0

    def was_deleted(self, uid: str) -> bool:
        self.asked += 1
        return self.deleted

    def admit(self, member: NewMember, *, not_deleted: bool, **_: Any) -> NewMember:
        if not not_deleted and self.was_deleted(member.SOPInstanceUID):
            raise Refused("deleted")
        return member


@pytest.mark.parametrize("deleted", [False, True])
def test_deletions_are_looked_at_when_a_request_begins_and_again_where_its_data_set_takes_long(deleted: bool) -> None:
    writer, policy = FakeWriter(), FakePolicy(deleted=deleted)
    service = StoreService(writer, cast("Policy", policy))
    begun = service.begin(request(encoded()))
    assert service.land(begun).status == (0x0124 if deleted else SUCCESS)
    assert policy.asked == (2 if deleted else 1)
    late = service.begin(request(encoded()))
    late.not_deleted_at -= LOOK_S
    policy.deleted = True
    assert service.land(late).status == 0x0124
    assert len(writer.members) == (not deleted)


def test_uids_behind_long_elements_are_found() -> None:
    writer, data = FakeWriter(), encoded(LongCodeValue="x" * 100_000)
    assert StoreService(writer).land(request(data)).status == SUCCESS
    assert writer.members[0].StudyInstanceUID == "1.2.3.2"


@pytest.mark.parametrize(
    ("error", "status", "comment"),
    [
        (StorageFull("no space left on storage, free some" * 3), OUT_OF_RESOURCES, "no space left"),
        (ZeroDivisionError("patient Doe"), PROCESSING_FAILURE, r"internal error (ZeroDivisionError)"),
    ],
)
def test_what_cannot_be_stored_is_never_a_success(error: Exception, status: int, comment: str) -> None:
    answer = StoreService(FakeWriter(error)).land(request(encoded()))
    assert answer.status == status
    assert answer.comment.startswith(comment)
    assert len(answer.comment) <= 64


def arriving(folder: Path, data: bytes, *, memory: int) -> ArrivingDataSet:
    """`data`, in fragments of which those beyond `memory` bytes went to a file."""
    dataset = ArrivingDataSet(folder)
    for start in range(0, len(data), 100):
        dataset.add(memoryview(data)[start : start + 100])
        if dataset.size > memory:
            dataset.spill()
    return dataset


def test_fragments_in_memory_are_stored_as_they_are(tmp_path: Path) -> None:
    data = encoded(PatientComments="x" * 5000)
    dataset = arriving(tmp_path, data, memory=1 << 20)
    assert dataset.in_memory
    writer = FakeWriter()
    assert StoreService(writer).land(request(data, dataset=dataset.content())).status == SUCCESS
    assert b"".join(writer.members[0].dataset) == data  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_large_data_set_waits_in_a_file_that_has_no_name(tmp_path: Path) -> None:
    data = encoded(PatientComments="x" * 5000)
    large = arriving(tmp_path, data, memory=1000)
    content = large.content()
    assert isinstance(content, FileRange)
    assert not large.in_memory
    assert b"".join(content.chunks()) == large.tobytes() == data
    assert list(tmp_path.iterdir()) == []
    writer = FakeWriter()
    assert StoreService(writer).land(request(data, dataset=content)).status == SUCCESS
    large.discard()
    with pytest.raises(OSError, match="No such file"):
        content.path.open("rb")


def test_data_sets_share_a_file_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own bytes, also after one of which the disk took a half."""
    file = WaitingFile(tmp_path)
    real = WaitingFile.write

    def half(self: WaitingFile, data: memoryview) -> None:
        real(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def arrived(*pieces: bytes) -> ArrivingDataSet:
        dataset = ArrivingDataSet(tmp_path, file)
        dataset.add(memoryview(pieces[0]))
        dataset.spill()
        for piece in pieces[1:]:
            dataset.add(memoryview(piece))
        return dataset

    kept = [arrived(b"first", b" of all")]
    with monkeypatch.context() as full:
        full.setattr(WaitingFile, "write", half)
        broken = arrived(b"that is not kept")
    kept += [arrived(b"second", b"", b" and last"), arrived(b"third")]
    assert broken.error is not None and [one.error for one in kept] == [None] * 3
    assert file.size == kept[0].content().path.stat().st_size == sum(one.size for one in kept)  # type: ignore[union-attr]
    kept[0].discard()
    assert [one.tobytes() for one in kept] == [b"first of all", b"second and last", b"third"]
    contents = [one.content() for one in kept]
    assert len({one.path for one in contents if isinstance(one, FileRange)}) == 1
    assert [b"".join(one.chunks()) for one in contents if isinstance(one, FileRange)][1:] == [
        b"second and last",
        b"third",
    ]
    file.close()
    with pytest.raises(OSError, match="No such file"):
        next(one for one in contents if isinstance(one, FileRange)).path.open("rb")


def test_a_full_disk_while_it_arrives_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sphere.scp.upper.dataset.tempfile.TemporaryFile", full)
    data = encoded(PatientComments="x" * 5000)
    dataset = arriving(tmp_path, data, memory=1000)
    assert dataset.size == len(data)
    assert not dataset.in_memory
    writer = FakeWriter()
    answer = StoreService(writer).land(request(b"", problem=dataset.error))
    assert (answer.status, answer.comment) == (OUT_OF_RESOURCES, "no room: No space left on device")
    assert writer.members == []


def test_a_rule_refuses_with_its_status_and_tags_what_it_lets_in(tmp_path: Path) -> None:
    rules = [
        {"calling_ae": "CT1", "action": "tag", "collection": "trial"},
        {"name": "no-calls", "called_ae": "OTHER", "action": "reject", "status": 0xA700},
    ]
    writer = FakeWriter()
    service = StoreService(writer, Policy(from_dict({"rules": rules}, base=tmp_path)))
    assert service.land(request(encoded(), called_ae="SPHERE")).status == SUCCESS
    assert service.land(request(encoded(), called_ae="OTHER")) == StoreAnswer(0xA700, "refused by rule no-calls")
    assert [member.collections for member in writer.members] == [("trial",)]
