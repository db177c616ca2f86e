"""What stands behind pixel data: private elements, digital signatures, padding, and what is none of these."""

from __future__ import annotations

import pytest

from sphere.ingest.header import Header, HeaderReader
from tests.support.headers import (
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
    sequence,
    text,
)

pytestmark = pytest.mark.unit

PRIVATE = text(0x7FE10010, "LO", "ACME")
HIDDEN = text(0x7FE11001, "LO", "hidden")
SIGNED = sequence(0xFFFAFFFA, item(element("PatientName", "PN", "Ünï^X ".encode())))
PIXELS = element("PixelData", "OW", bytes(40_000))


@pytest.mark.parametrize("prefix", [300, 1 << 20])
def test_what_stands_behind_pixel_data_of_a_known_length_is_told(prefix: int):
    bulk = element(0x7FE11002, "OB", bytes(2000))
    charset = text("SpecificCharacterSet", "CS", "ISO_IR 192")
    padding = element(0xFFFCFFFC, "OB", bytes(3000))
    data = instance(charset, PIXELS, PRIVATE, HIDDEN, bulk, SIGNED, padding)
    found = header(data, prefix=prefix)
    told = dataset(found)
    assert found.warnings == []
    assert found.pixel_offset == data.index(PIXELS)
    assert told["7FE10010"] == {"vr": "LO", "Value": ["ACME"]}
    assert told["7FE11001"] == {"vr": "LO", "Value": ["hidden"]}
    assert told["7FE11002"] == {"vr": "OB", "BulkDataURI": f"?offset={data.index(bulk) + 12}&length=2000"}
    assert told["FFFAFFFA"]["Value"] == [{"00100010": {"vr": "PN", "Value": [{"Alphabetic": "Ünï^X"}]}}]
    assert "FFFCFFFC" not in told


def test_what_stands_behind_pixel_data_in_implicit_vr():
    body = (
        IMPLICIT_BODY + implicit("PixelData", bytes(10)) + implicit(0x7FE10010, b"ACME") + implicit(0x7FE11001, b"xy")
    )
    told = dataset(header(part10(body, syntax=IMPLICIT_LE)))
    assert told["7FE11001"] == {"vr": "UN", "InlineBinary": "eHk="}


@pytest.mark.parametrize(
    ("behind", "kept", "warning"),
    [
        (bytes(500), set(), ""),
        (HIDDEN + bytes(500), {"7FE11001"}, ""),
        (b"\x01\x02\x03\x04" * 50, set(), "200 bytes behind the pixel data are no elements"),
        (HIDDEN + text("PatientName", "PN", "Other^Jane"), {"7FE11001"}, "bytes behind the pixel data are no elements"),
        (HIDDEN + element(0x7FE11003, "LO", b"cut", length=60), {"7FE11001"}, "60 bytes do not fit"),
        (HIDDEN + element(0x7FE11003, "UT", bytes(70_000)), set(), "is too large, left out"),
        (b"\0\1\2", set(), ""),
    ],
)
def test_what_is_wrong_behind_pixel_data_costs_what_is_there(behind: bytes, kept: set[str], warning: str):
    reader = HeaderReader(max_header=60_000)
    for _ in range(2):  # also where everything is remembered
        data = instance(text("PatientName", "PN", "Doe^Jane")) + PIXELS + behind
        found = reader.read(data[:300], size=len(data), fetch=Source(data).fetch)
        assert isinstance(found, Header)
        assert found.values["PatientName"] == "Doe^Jane"
        assert {key for key in dataset(found) if key > "7FE00010"} == kept
        assert [warning in one for one in found.warnings] == ([True] if warning else [])


def test_behind_encapsulated_pixel_data_nothing_is_looked_for():
    fragments = item() + item(bytes(20_000))
    data = instance(sequence("PixelData", fragments, vr="OB", undefined=True), syntax="1.2.840.10008.1.2.4.70") + HIDDEN
    source = Source(data)
    found = HeaderReader(max_header=1 << 20).read(data[:600], size=len(data), fetch=source.fetch)
    assert isinstance(found, Header)
    assert "7FE11001" not in dataset(found)
