"""UIDs found by the layout of the instance before are those found by following the elements, whatever the bytes."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from sphere.ingest.header import Identifier, Identity, alike, identify
from sphere.ingest.part10 import read_file_meta

pytestmark = pytest.mark.unit

NAMES = [
    "CT_small.dcm",
    "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm",
    "image_dfl.dcm",
    "liver_1frame.dcm",
    "rtplan.dcm",
]


def bare(name: str) -> tuple[bytes, str]:
    """The first bytes of a data set, with both UIDs of its image plane, and its transfer syntax."""
    data = Path(str(get_testdata_file(name))).read_bytes()
    meta = read_file_meta(data)
    return data[meta.dataset_offset :][:8192], meta.TransferSyntaxUID


def same(identifier: Identifier, data: bytes, syntax: str, size: int = 8192) -> Identity:
    expected = identify(data, transfer_syntax_uid=syntax, size=size)
    assert identifier.again(data[: identifier.wants], transfer_syntax_uid=syntax) in (None, expected)
    assert identifier.identify(data, transfer_syntax_uid=syntax, size=size) == expected
    return expected


@pytest.mark.parametrize("name", NAMES)
def test_other_values_at_the_same_places(name: str) -> None:
    data, syntax = bare(name)
    identifier = Identifier()
    first = same(identifier, data, syntax)
    for uid in (first.SOPInstanceUID, first.StudyInstanceUID, first.SeriesInstanceUID):
        data = data.replace(uid.encode(), uid[:-1].encode() + b"7")
        same(identifier, data, syntax)


@pytest.mark.parametrize("name", NAMES)
def test_any_byte_may_differ(name: str) -> None:
    """One to three bytes of what was learnt from are other ones, or its end is missing."""
    data, syntax = bare(name)
    draw = random.Random(name)
    begin = min(len(data), 1500)
    for _ in range(1500):
        identifier = Identifier()
        same(identifier, data, syntax)
        changed = bytearray(data)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(begin)] = draw.choice((0, 0xFF, draw.randrange(256)))
        same(identifier, bytes(changed[: draw.choice((begin, len(data), draw.randrange(begin)))]), syntax)


def test_what_is_alike_is_not_followed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data, syntax = bare("CT_small.dcm")
    identifier = Identifier()
    found = same(identifier, data, syntax)
    monkeypatch.delattr(alike, "identify")
    assert identifier.identify(data, transfer_syntax_uid=syntax, size=8192) == found
    assert identifier.again(data[: identifier.wants], transfer_syntax_uid=syntax) == found
    assert identifier.wants < len(data)


def test_the_same_bytes_in_another_transfer_syntax() -> None:
    data, syntax = bare("CT_small.dcm")
    identifier = Identifier()
    same(identifier, data, syntax)
    for other in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.3", syntax):
        same(identifier, data, other)


def test_layouts_that_never_repeat_are_no_longer_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = 0
    learn = alike._learn

    def counted(prefix: bytes, syntax: str) -> object:
        nonlocal learnt
        learnt += 1
        return learn(prefix, syntax)

    monkeypatch.setattr(alike, "_learn", counted)
    identifier, (data, syntax) = Identifier(), bare("CT_small.dcm")
    for length in range(0, 200, 2):
        same(identifier, struct.pack("<HH2sH", 0x0008, 0x0001, b"CS", length) + b" " * length + data, syntax)
    assert learnt == alike._PATIENCE
