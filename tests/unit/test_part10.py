"""File Meta Information, written and read."""

from __future__ import annotations

import io

import pytest
from pydicom import dcmread

from sphere.ingest.part10 import file_meta, read_file_meta
from tests.support.headers import element, implicit, text

pytestmark = pytest.mark.unit

SYNTAX = "1.2.840.10008.1.2.1"
PREAMBLE = bytes(128) + b"DICM"


@pytest.mark.parametrize("aet", ["", "CT1", "A_LONG_AE_TITLE_"])
def test_written_group_is_what_pydicom_reads(aet: str):
    raw = file_meta(
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        sop_instance_uid="1.2.3.44",
        transfer_syntax_uid=SYNTAX,
        source_aet=aet,
    )
    meta = dcmread(io.BytesIO(raw)).file_meta
    assert meta.FileMetaInformationGroupLength == len(raw) - 144
    assert meta.FileMetaInformationVersion == b"\x00\x01"
    assert (meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID) == ("1.2.840.10008.5.1.4.1.1.2", "1.2.3.44")
    assert meta.TransferSyntaxUID == SYNTAX
    assert meta.get("SourceApplicationEntityTitle", "") == aet
    assert len(raw) % 2 == 0
    found = read_file_meta(raw + b"\x08\x00\x05\x00CS\0\0")
    assert (found.dataset_offset, found.group_end, found.complete, found.has_prefix) == (len(raw), len(raw), True, True)
    assert found.TransferSyntaxUID == SYNTAX
    assert found.MediaStorageSOPInstanceUID == "1.2.3.44"


META = text(0x00020002, "UI", "1.2") + text(0x00020010, "UI", SYNTAX)
FIRST = text(0x00080005, "CS", "ISO_IR 100")


@pytest.mark.parametrize(
    ("before", "group"),
    [
        (PREAMBLE, META),
        (b"DICM", META),
        (b"", META),
        (PREAMBLE, element(0x00020000, "UL", b"\xff\xff\x00\x00") + META),
        (PREAMBLE, element(0x00020000, "UL", b"\x01\x00\x00\x00") + META),
        (PREAMBLE, implicit(0x00020010, SYNTAX.encode() + b"\0")),
        (PREAMBLE, element(0x00020001, "OB", b"") + META + element(0x00020102, "OB", bytes(300))),
    ],
)
def test_read_whatever_stands_before_the_data_set(before: bytes, group: bytes):
    data = before + group + FIRST + bytes(200)
    found = read_file_meta(data)
    assert found.dataset_offset == len(before + group)
    assert found.TransferSyntaxUID == SYNTAX
    assert found.complete


@pytest.mark.parametrize("cut", [0, 1, 100, 131, 132, 140, 200, 280])
def test_a_cut_group_is_incomplete_and_never_raises(cut: int):
    raw = file_meta(sop_class_uid="1.2", sop_instance_uid="1.2.3", transfer_syntax_uid=SYNTAX, source_aet="X")
    assert not read_file_meta(raw[:cut]).complete
