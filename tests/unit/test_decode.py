"""Identifiers that are made to cost more than they say: refused before anything is made of them."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import pytest
from pydicom.uid import UID

from sphere.conf.errors import QueryError
from sphere.scp.decode import MAX_ELEMENTS, MAX_IDENTIFIER, SMALL, decode_identifier
from tests.support.headers import DEFLATED, EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE, element, implicit, item, text

pytestmark = pytest.mark.unit

ROOM = MAX_IDENTIFIER - 100
LEVEL = text("QueryRetrieveLevel", "CS", "STUDY")
EMPTY_ITEMS = item() * (ROOM // 8)
ELEMENTS = b"".join(struct.pack("<HH2sH", 0x41 + 2 * (n >> 15), n & 0x7FFF, b"LO", 0) for n in range(ROOM // 8))
SEQUENCE = "ConceptNameCodeSequence"


@pytest.mark.parametrize(
    ("data", "syntax"),
    [
        (LEVEL + element(SEQUENCE, "SQ", EMPTY_ITEMS), EXPLICIT_LE),
        (LEVEL + element(SEQUENCE, "SQ", EMPTY_ITEMS, length=0xFFFFFFFF), EXPLICIT_LE),
        (LEVEL + element(SEQUENCE, "UN", EMPTY_ITEMS), EXPLICIT_LE),
        (implicit(SEQUENCE, EMPTY_ITEMS), IMPLICIT_LE),
        (implicit(0x00411000, EMPTY_ITEMS), IMPLICIT_LE),
        (b"\x00\x40\xa0\x43SQ\0\0\xff\xff\xff\xff" + b"\xff\xfe\xe0\x00\0\0\0\0" * (ROOM // 8), EXPLICIT_BE),
        (LEVEL + ELEMENTS, EXPLICIT_LE),
        (implicit("SOPClassUID", b"1" * 0x5551) + element(SEQUENCE, "SQ", EMPTY_ITEMS[:SMALL]), IMPLICIT_LE),
        (LEVEL + element("PatientName", "PN", b"", length=0xFFFF) + bytes(SMALL), EXPLICIT_LE),
        (LEVEL + element("PatientComments", "LT", bytes(60_000)) * 4 + ELEMENTS[: SMALL // 2] + b"\0" * 7, EXPLICIT_LE),
    ],
    ids=range(10),
)
def test_what_would_take_too_much(data: bytes, syntax: str) -> None:
    _refused(data, syntax)


def test_what_would_take_too_much_inflated() -> None:
    stream = zlib.compressobj(wbits=-15)
    bomb = stream.compress(LEVEL + element(SEQUENCE, "SQ", EMPTY_ITEMS)) + stream.flush()
    assert len(bomb) < 10_000
    _refused(bomb, DEFLATED)


def _refused(data: bytes, syntax: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(QueryError, match="plain elements only"):
            decode_identifier(data, UID(syntax))
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_IDENTIFIER
    finally:
        tracemalloc.stop()


def test_a_long_list_of_uids_is_taken() -> None:
    uids = b"\\".join(b"1.2.826.0.1.%d" % number for number in range(60_000))
    data = implicit("QueryRetrieveLevel", b"IMAGE ") + implicit("SOPInstanceUID", uids + b"\0" * (len(uids) % 2))
    found = decode_identifier(data, UID(IMPLICIT_LE))
    assert len(found.SOPInstanceUID) == 60_000


def test_references_of_storage_commitment_are_items() -> None:
    reference = item(text("ReferencedSOPClassUID", "UI", "1.2"), text("ReferencedSOPInstanceUID", "UI", "1.2.3"))
    count = SMALL // len(reference) + 1
    data = element("ReferencedSOPSequence", "SQ", reference * count)
    found = decode_identifier(data, UID(EXPLICIT_LE), max_items=count)
    assert len(found.ReferencedSOPSequence) == count
    with pytest.raises(QueryError, match=f"more than {count - 1} items"):
        decode_identifier(data, UID(EXPLICIT_LE), max_items=count - 1)


def test_a_small_one_may_be_whatever_pydicom_reads() -> None:
    assert len(decode_identifier(LEVEL + element(SEQUENCE, "SQ", item() * 3), UID(EXPLICIT_LE))) == 2
    assert MAX_ELEMENTS * 8 < SMALL
