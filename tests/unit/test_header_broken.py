"""What is wrong with real files, one at a time: the row or the reason that comes of it."""

from __future__ import annotations

import struct
import zlib
from datetime import date
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere.conf.errors import RejectReason, StorageError
from sphere.ingest.header import Header, HeaderReader, Rejected, identify
from sphere.ingest.header.walker import MAX_DEPTH, MAX_WARNINGS
from tests.support.examples import examples
from tests.support.headers import (
    DEFLATED,
    EXPLICIT_BE,
    EXPLICIT_LE,
    IDENTITY,
    IMPLICIT_BODY,
    IMPLICIT_LE,
    Source,
    dataset,
    element,
    header,
    implicit,
    instance,
    item,
    part10,
    read,
    sequence,
    text,
)

pytestmark = pytest.mark.unit

BODY = b"".join(IDENTITY)
BIG_BODY = b"".join(
    element(tag, vr, value, order=">")
    for tag, vr, value in (
        ("SOPInstanceUID", "UI", b"1.2.3.4\0"),
        ("StudyInstanceUID", "UI", b"1.2.3\0"),
        ("SeriesInstanceUID", "UI", b"1.2.3.1\0"),
        ("Rows", "US", b"\x02\x00"),
        ("FrameIncrementPointer", "AT", b"\x00\x18\x10\x63"),
        ("RedPaletteColorLookupTableData", "OW", b"\x01\x02\x03\x04"),
    )
)
ID = text("PatientID", "LO", "id")
DEFLATE = zlib.compressobj(wbits=-15)
DEFLATED_BODY = DEFLATE.compress(BODY + text("PatientID", "LO", "x")) + DEFLATE.flush()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", RejectReason.EMPTY),
        (b"\0", RejectReason.NOT_DICOM),
        (bytes(4096), RejectReason.NOT_DICOM),
        (b"Hello, this is a text and no image at all. " * 20, RejectReason.NOT_DICOM),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4, RejectReason.NOT_DICOM),
        (b"PK\x03\x04" + bytes(range(256)) * 4, RejectReason.NOT_DICOM),
        (part10(b""), RejectReason.TRUNCATED),
        (part10(BODY[:60]), RejectReason.TRUNCATED),
        (part10(BODY[:-3]), RejectReason.TRUNCATED),
        (part10(b"\xde\xad\xbe\xef" * 100), RejectReason.TRUNCATED),
        (part10(element(0x00080018, "UI", b"1.2.3.4\0") + b"\xfe\xff\x00\xe0\xff\xff\xff\xff"), RejectReason.MALFORMED),
        (part10(sequence("ReferencedStudySequence", b"garbage!" * 4, undefined=True) + BODY), RejectReason.MALFORMED),
        (instance(identity=IDENTITY[:2]), RejectReason.MISSING_UID),
        (instance(identity=(*IDENTITY[:3], text("SeriesInstanceUID", "UI", ""))), RejectReason.MISSING_UID),
        (instance(identity=(*IDENTITY[:3], text("SeriesInstanceUID", "UI", "1." * 32 + "1"))), RejectReason.BAD_UID),
        (instance(identity=(*IDENTITY[:3], text("SeriesInstanceUID", "UI", "1.2/../3"))), RejectReason.BAD_UID),
        (instance(identity=(*IDENTITY[:3], text("SeriesInstanceUID", "UI", "1.2 3"))), RejectReason.BAD_UID),
        (part10(b"\0\0\0\0" * 20, syntax="1.2.3.4.5"), RejectReason.TRANSFER_SYNTAX),
        (part10(IMPLICIT_BODY, syntax="1.2.3.4.5"), RejectReason.TRANSFER_SYNTAX),
        (part10(b"\xff" * 100, syntax=DEFLATED), RejectReason.MALFORMED),
        (instance(identity=(text("SOPClassUID", "UI", "1.2.840.10008.1.3.10"),)), RejectReason.MEDIA_DIRECTORY),
        (instance(sequence("DirectoryRecordSequence"), identity=()), RejectReason.MEDIA_DIRECTORY),
    ],
)
def test_rejected(data: bytes, reason: RejectReason):
    found = read(data)
    assert isinstance(found, Rejected)
    assert found.reason == reason, found
    assert found.detail


@pytest.mark.parametrize(
    ("data", "syntax"),
    [
        (part10(BODY), EXPLICIT_LE),
        (part10(BODY, syntax="1.2.840.10008.1.2.4.70"), "1.2.840.10008.1.2.4.70"),
        (part10(BODY, syntax="1.2.3.4.5"), "1.2.3.4.5"),  # private, but written as most are
        (part10(IMPLICIT_BODY, syntax=IMPLICIT_LE), IMPLICIT_LE),
        (part10(BIG_BODY, syntax=EXPLICIT_BE), EXPLICIT_BE),
        (part10(DEFLATED_BODY, syntax=DEFLATED), DEFLATED),
        (part10(BODY)[128:], EXPLICIT_LE),
        (part10(BODY)[132:], EXPLICIT_LE),
        (BODY, EXPLICIT_LE),
        (IMPLICIT_BODY, IMPLICIT_LE),
        (BIG_BODY, EXPLICIT_BE),
        (implicit(0x00080000, b"\0\0\0\0") + IMPLICIT_BODY, IMPLICIT_LE),
        (bytes(128) + b"DICM" + BODY, EXPLICIT_LE),
    ],
)
def test_every_way_of_writing_gives_the_row(data: bytes, syntax: str):
    found = header(data)
    assert found.values["SOPInstanceUID"] == "1.2.3.4"
    assert found.values["SeriesInstanceUID"] == "1.2.3.1"
    assert found.TransferSyntaxUID == syntax
    identity = identify(data, size=len(data))
    assert (identity.StudyInstanceUID, identity.TransferSyntaxUID) == ("1.2.3", syntax)
    assert (identity.dataset_offset, identity.complete) == (found.dataset_offset, True)


@pytest.mark.parametrize(
    ("body", "declared"),
    [(IMPLICIT_BODY, EXPLICIT_LE), (BODY, IMPLICIT_LE), (BIG_BODY, EXPLICIT_LE), (BODY, DEFLATED), (BODY, EXPLICIT_BE)],
)
def test_a_transfer_syntax_that_lies_is_a_warning(body: bytes, declared: str):
    found = header(part10(body, syntax=declared))
    assert found.values["StudyInstanceUID"] == "1.2.3"
    assert any("is declared" in warning for warning in found.warnings)


def test_big_endian_values():
    found = header(part10(BIG_BODY, syntax=EXPLICIT_BE))
    assert found.values["Rows"] == 512
    assert found.values["FrameIncrementPointer"] == ["00181063"]
    assert dataset(found)["00281201"] == {"vr": "OW", "InlineBinary": "AgEEAw=="}  # little endian in JSON


def test_implicit_values():
    found = header(part10(IMPLICIT_BODY, syntax=IMPLICIT_LE))
    assert found.values["PatientName"] == "Doe^Jane"
    assert found.values["SmallestImagePixelValue"] == -1
    assert dataset(found)["00280106"] == {"vr": "SS", "Value": [-1]}


@pytest.mark.parametrize(
    ("raw", "keyword", "value", "json", "warning"),
    [
        (text("StudyDate", "DA", "20240131"), "StudyDate", date(2024, 1, 31), ["20240131"], ""),
        (text("StudyDate", "DA", "2024.01.31"), "StudyDate", date(2024, 1, 31), ["2024.01.31"], ""),
        (text("StudyDate", "DA", "20240132"), "StudyDate", None, ["20240132"], "(0008,0020) StudyDate: a value"),
        (text("StudyDate", "DA", ""), "StudyDate", None, None, ""),
        (text("StudyTime", "TM", "101112.5 "), "StudyTime", "101112.5", ["101112.5"], ""),
        (text("SliceThickness", "DS", " 1.50"), "SliceThickness", 1.5, [1.5], ""),
        (text("SliceThickness", "DS", "+.5"), "SliceThickness", 0.5, [0.5], ""),
        (text("SliceThickness", "DS", "1,5"), "SliceThickness", None, ["1,5"], "1 of 1 values are not numbers"),
        (text("SliceThickness", "DS", "1\\2"), "SliceThickness", 1.0, [1, 2], "2 values where one is allowed"),
        (text("SliceThickness", "DS", "1e999"), "SliceThickness", None, ["1e999"], "not numbers"),
        (text("SliceThickness", "DS", "NaN"), "SliceThickness", None, ["NaN"], "not numbers"),
        (text("PixelSpacing", "DS", "0.5\\"), "PixelSpacing", [0.5, None], [0.5, None], ""),
        (text("InstanceNumber", "IS", "+007"), "InstanceNumber", 7, [7], ""),
        (text("InstanceNumber", "IS", "3.0"), "InstanceNumber", 3, [3], ""),
        (text("InstanceNumber", "IS", "3.5"), "InstanceNumber", None, ["3.5"], "not numbers"),
        (text("InstanceNumber", "IS", "9" * 12), "InstanceNumber", 10**12 - 1, [10**12 - 1], ""),
        (text("InstanceNumber", "IS", "9" * 30), "InstanceNumber", None, ["9" * 30], "does not fit"),
        (element("Rows", "US", b"\0\x02"), "Rows", 512, [512], ""),
        (element("Rows", "US", b"\0\x02\x01"), "Rows", None, None, "(0028,0010) Rows: 3 bytes are not a value of US"),
        (element("Rows", "SS", b"\xff\xff"), "Rows", -1, [-1], ""),
        (element("Rows", "UN", b"\0\x02"), "Rows", 512, [512], ""),
        (element("Rows", "OB", b"\0\x02"), "Rows", None, None, "has VR OB"),
        (text("Rows", "LO", "512"), "Rows", 512, ["512"], ""),
        (text("Rows", "LO", "many"), "Rows", None, ["many"], "does not fit"),
        (element("PatientID", "US", b"\x07\0"), "PatientID", "7", [7], ""),
        (element("RevolutionTime", "FD", struct.pack("<d", 0.5)), "RevolutionTime", 0.5, [0.5], ""),
        (
            element("ExposureTimeInms", "FD", struct.pack("<d", float("inf"))),
            "ExposureTimeInms",
            float("inf"),
            ["Infinity"],
            "",
        ),
        (
            text("ImageType", "CS", "ORIGINAL\\ PRIMARY"),
            "ImageType",
            ["ORIGINAL", "PRIMARY"],
            ["ORIGINAL", "PRIMARY"],
            "",
        ),
        (text("PatientComments", "LT", " a\\b "), "PatientComments", " a\\b", [" a\\b"], ""),
        (
            text("PatientName", "PN", "A^B=C^D= "),
            "PatientName",
            "A^B=C^D",
            [{"Alphabetic": "A^B", "Ideographic": "C^D"}],
            "",
        ),
        (text("PatientName", "PN", "=C"), "PatientName", "=C", [{"Ideographic": "C"}], ""),
    ],
)
def test_values(raw: bytes, keyword: str, value: Any, json: list[Any] | None, warning: str):
    found = header(instance(raw))
    assert found.values.get(keyword) == value
    group, number = struct.unpack_from("<HH", raw)
    assert dataset(found)[f"{group:04X}{number:04X}"].get("Value") == json
    assert [warning in text for text in found.warnings] == ([True] if warning else [])


@pytest.mark.parametrize(
    ("raw", "kept", "warning"),
    [
        (element("PatientName", "PN", b"Doe^J", length=5) + b" " + ID, "id", "padding that its length does not count"),
        (element("PatientName", "PN", b"Doe"), None, ""),  # odd, not padded
        (element("PatientName", "??", b"Doe^Jane") + ID, "id", ""),
        (implicit("PatientName", b"Doe^Jane") + ID, "id", ""),  # implicit VR among explicit
        (element("PatientName", "PN", b"Doe^Jane") * 2 + ID, "id", "stand more than once"),
        (ID + element("PatientName", "PN", b"Doe^Jane"), "id", "not in the order"),
        (element(0x00100000, "UL", b"\0\0\0\0") + ID, "id", ""),
        (element(0x00020010, "UI", b"1.2\0") + ID, "id", "does not belong into a data set"),
        (b"\xfe\xff\x0d\xe0\0\0\0\0" + ID, "id", "a delimiter without beginning"),
        (sequence("ReferencedPatientSequence", item(ID), item(ID)) + ID, "id", ""),
        (sequence("ReferencedPatientSequence", item(ID, undefined=True), undefined=True) + ID, "id", ""),
        (sequence("ReferencedPatientSequence", b"rubbish " * 3) + ID, "id", "something else stands"),
        (sequence("ReferencedPatientSequence", item(ID)[:-2]) + ID, "id", "an item is longer than its sequence"),
        (sequence("ReferencedPatientSequence", item(ID[:-2])) + ID, "id", "do not fit into what is there"),
        (sequence("ReferencedPatientSequence", item(implicit("PatientID", b"x ")), vr="UN") + ID, "id", ""),
        (sequence("ReferencedPatientSequence", item(ID), vr="UN") + ID, "id", ""),
        (
            sequence("ReferencedPatientSequence", item(implicit("PatientID", b"x ")), vr="UN", undefined=True) + ID,
            "id",
            "",
        ),
    ],
)
def test_one_bad_element_costs_that_element(raw: bytes, kept: str | None, warning: str):
    found = header(
        part10(
            BODY[: len(IDENTITY[0] + IDENTITY[1])]
            + raw
            + IDENTITY[2]
            + IDENTITY[3]
            + text("ImageComments", "LT", "end")
        )
    )
    assert found.values.get("PatientID") == kept
    assert found.values["ImageComments"] == "end"
    assert any(warning in text for text in found.warnings) == bool(warning), found.warnings
    assert bool(found.warnings) == bool(warning)


def test_a_cut_end_costs_the_last_element():
    whole = instance(text("ImageComments", "LT", "long enough to be cut"))
    found = header(whole[:-5])
    assert "ImageComments" not in found.values
    assert found.warnings == ["(0020,4000) ImageComments: 22 bytes do not fit into what is there, left out"]


@pytest.mark.parametrize("size", [1024, 1026, 5_000_000])
def test_binary_values_are_inline_or_named(size: int):
    bulk = element("EncapsulatedDocument", "OB", bytes(size))
    data = instance(
        bulk, text("ImageComments", "LT", "x"), text(0x00430010, "LO", "after"), element(0x60003000, "OW", b"\1\2")
    )
    source = Source(data)
    found = HeaderReader(max_header=1 << 20).read(data[:300], size=len(data), fetch=source.fetch)
    assert isinstance(found, Header)
    value = dataset(found)["00420011"]
    if size <= 1024:
        assert value["InlineBinary"]
    else:
        offset = data.index(bulk) + 12
        assert value == {"vr": "OB", "BulkDataURI": f"?offset={offset}&length={size}"}
        assert sum(count for _, count in source.fetched) < 100_000
    assert dataset(found)["60003000"] == {"vr": "OW", "InlineBinary": "AQI="}


def test_pixel_data_is_named_and_ends_the_header():
    pixels = element("PixelData", "OW", bytes(10))
    found = header(data := instance(pixels, element(0xFFFCFFFC, "OB", bytes(4))))
    assert found.pixel_offset == data.index(pixels)
    assert dataset(found)["7FE00010"] == {"vr": "OW", "BulkDataURI": f"?offset={found.pixel_offset + 12}&length=10"}
    assert "FFFCFFFC" not in dataset(found)


def test_small_pixel_data_within_a_sequence_does_not_end_the_header():
    icon = sequence("IconImageSequence", item(element("PixelData", "OW", bytes(10))))
    reader = HeaderReader(max_header=1 << 20)
    for data in (
        instance(icon, element("PixelData", "OW", bytes(10))),
        instance(element("PixelData", "OW", bytes(10))),
    ):
        found = reader.read(data, size=len(data), fetch=Source(data).fetch)
        assert isinstance(found, Header)
        assert found.pixel_offset == len(data) - 22


def test_deflated_offsets_are_named_as_such():
    squeeze = zlib.compressobj(wbits=-15)
    body = BODY + element("EncapsulatedDocument", "OB", bytes(2000)) + element("PixelData", "OW", bytes(10))
    found = header(part10(squeeze.compress(body) + squeeze.flush(), syntax=DEFLATED))
    assert found.pixel_offset is None
    assert dataset(found)["00420011"]["BulkDataURI"] == f"?inflated_offset={len(BODY) + 12}&length=2000"
    assert dataset(found)["7FE00010"]["BulkDataURI"] == f"?inflated_offset={len(body) - 10}&length=10"


def test_a_deflate_bomb_is_bounded():
    squeeze = zlib.compressobj(level=9, wbits=-15)
    body = (
        squeeze.compress(text(0x00080005, "CS", "") + element(0x00081000, "UT", bytes(200_000_000))) + squeeze.flush()
    )
    found = read(part10(body, syntax=DEFLATED), max_header=1 << 20)
    assert isinstance(found, Rejected)
    assert found.reason == RejectReason.INFLATE_LIMIT
    assert identify(part10(body, syntax=DEFLATED), size=len(body) + 400).StudyInstanceUID == ""


def test_a_header_beyond_the_limit_is_rejected():
    data = instance(element("TextValue", "UT", b"x" * 3_000_000))
    found = read(data, max_header=1 << 20)
    assert isinstance(found, Rejected)
    assert found.reason == RejectReason.TOO_LARGE
    assert len(header(data).dataset) > 3_000_000


def test_nesting_is_bounded():
    nested = b""
    for _ in range(1_000):
        nested = sequence("ContentSequence", item(nested, undefined=True), undefined=True)
    found = header(instance(nested, text("PatientID", "LO", "id"), text(0x00430010, "LO", "after")))
    assert dataset(found)["0040A730"]["Value"]
    assert any(f"deeper than {MAX_DEPTH}" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    "hostile",
    [
        b"".join(text(0x00080005, "CS", f"ISO_{number}") for number in range(2_500)),
        b"".join(element(0x00090010 + number % 200, "LO", b"%08d" % number) for number in range(2_500)),
        b"".join(element(0x00090010 + (number << 17), "LO", b"V%07d" % number) for number in range(2_500)),
        b"".join(sequence(0x00081110, item(text(0x00080005, "CS", f"{n}"), ID)) for n in range(2_500)),
        b"".join(text(0x00104000, "LT", f"{number}") for number in range(50_000)),
    ],
    ids=["character sets", "creators", "creators of many groups", "items", "the same again and again"],
)
def test_what_is_remembered_is_bounded(hostile: bytes):
    reader = HeaderReader(max_header=1 << 26)
    data = part10(IDENTITY[0] + hostile + BODY)
    for _ in range(2):
        found = reader.read(data, size=len(data), fetch=Source(data).fetch)
        assert isinstance(found, Header)
        assert found == header(data)
    assert reader.remembered < 100_000


def test_more_elements_than_any_data_set_has_are_rejected():
    found = read(part10(BODY + text(0x00104000, "LT", "x ") * 200_000))
    assert isinstance(found, Rejected)
    assert found.reason == RejectReason.TOO_LARGE


def test_warnings_are_bounded():
    bad = [element(0x00090000 + 0x1000 + index, "US", b"\1\2\3") for index in range(500)]
    assert len(header(instance(text(0x00090010, "LO", "X"), *bad)).warnings) == MAX_WARNINGS


def test_uids_from_the_file_meta_information_are_a_warning():
    found = header(instance(identity=IDENTITY[2:]))
    assert found.values["SOPInstanceUID"] == "1.2.3.4"
    assert "(0008,0018) SOPInstanceUID: missing, taken from the File Meta Information" in found.warnings


@pytest.mark.parametrize("uid", ["1.02.3", "1..2", "1.2."])
def test_uids_that_are_nearly_right_are_a_warning(uid: str):
    found = header(instance(identity=(*IDENTITY[:3], text("SeriesInstanceUID", "UI", uid))))
    assert found.values["SeriesInstanceUID"] == uid
    assert found.warnings == ["SeriesInstanceUID: a component is empty or has leading zeros"]


def test_private_vr_comes_from_the_creator():
    """The same bytes mean what their private creator says (PS3.5 7.8.1)."""
    elements = [implicit(0x00090010, b"GEMS_IDEN_01"), implicit(0x00091001, b"GE_GENESIS_FF ")]
    reader = HeaderReader(max_header=1 << 20)
    for creator, vr in ((elements[0], "LO"), (implicit(0x00090010, b"SOMEONE ELSE"), "UN"), (b"", "UN")):
        data = part10(creator + elements[1] + IMPLICIT_BODY, syntax=IMPLICIT_LE)
        found = reader.read(data, size=len(data), fetch=Source(data).fetch)
        assert isinstance(found, Header)
        assert dataset(found)["00091001"]["vr"] == vr


def test_shared_functional_groups_fill_columns():
    groups = sequence(
        "SharedFunctionalGroupsSequence",
        item(
            sequence(
                "PixelMeasuresSequence",
                item(text("PixelSpacing", "DS", "0.5\\0.5"), text("SliceThickness", "DS", "2 ")),
            ),
            sequence("ReferencedImageSequence", item(text("InstanceNumber", "IS", "9 "))),
        ),
    )
    reader = HeaderReader(max_header=1 << 20)
    for top, thickness in ((b"", 2.0), (text("SliceThickness", "DS", "7 "), 7.0)):
        data = instance(groups, *([top] if top else []))
        for _ in range(2):
            found = reader.read(data, size=len(data), fetch=Source(data).fetch)
            assert isinstance(found, Header)
            assert found.values["PixelSpacing"] == [0.5, 0.5]
            assert found.values["SliceThickness"] == thickness
            assert "InstanceNumber" not in found.values


def test_errors_of_fetching_go_through():
    def fetch(offset: int, count: int) -> bytes:
        raise StorageError("the disk is gone")

    with pytest.raises(StorageError, match="the disk is gone"):
        HeaderReader(max_header=1 << 20).read(BODY[:10], size=100_000, fetch=fetch)


SEEDS = [
    part10(BODY + ID + sequence(0x0040A730, item(ID), item(ID, undefined=True), undefined=True)),
    part10(IMPLICIT_BODY, syntax=IMPLICIT_LE),
    part10(BIG_BODY, syntax=EXPLICIT_BE),
    part10(DEFLATED_BODY, syntax=DEFLATED),
    BODY,
]
EDIT = st.tuples(st.integers(0, 3), st.integers(0, 700), st.binary(min_size=1, max_size=8))


def mutate(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Overwrite, insert, delete or cut, at places counted from the end."""
    changed = bytearray(data)
    for kind, back, piece in edits:
        place = max(len(changed) - back, 0)
        if kind == 0:
            changed[place : place + len(piece)] = piece
        elif kind == 1:
            changed[place:place] = piece
        elif kind == 2:
            del changed[place : place + len(piece)]
        else:
            del changed[place:]
    return bytes(changed)


def check(reader: HeaderReader, data: bytes) -> None:
    found = reader.read(data[:300], size=len(data), fetch=Source(data).fetch)
    identify(data, size=len(data))
    for syntax in (IMPLICIT_LE, EXPLICIT_LE, EXPLICIT_BE, DEFLATED, "1.2.3"):
        identify(data, transfer_syntax_uid=syntax, size=len(data))
    if isinstance(found, Header):
        assert isinstance(orjson.loads(found.dataset), dict)
        assert all(value is not None for value in found.values.values())
    else:
        assert found.reason != RejectReason.INTERNAL


READER = HeaderReader(max_header=1 << 20)


@settings(max_examples=examples(300), deadline=None)
@given(st.sampled_from(SEEDS), st.lists(EDIT, max_size=6))
def test_any_damage_is_a_row_or_a_reason(seed: bytes, edits: list[tuple[int, int, bytes]]):
    check(READER, mutate(seed, edits))


@settings(max_examples=examples(200), deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_a_row_or_a_reason(data: bytes, prefixed: bool):
    check(READER, part10(data) if prefixed else data)
