"""DICOM File Format (PS3.10 clause 7): the File Meta Information before a data set, written and read.

Reading is tolerant: real files lack the preamble, the group length or whole elements, and none of that hides the data
set. Nothing here raises on any bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sphere.conf.memo import remembered

PREAMBLE_LENGTH: Final = 128
PREFIX: Final = b"DICM"
MAX_SHORT: Final = 0xFFFE  # bytes of a value whose length has 16 bits (PS3.5 7.1.2)
IMPLEMENTATION_CLASS_UID: Final = "2.25.158931550105414851696770425707499901973"  # of UUID kind (PS3.5 B.2)
IMPLEMENTATION_VERSION_NAME: Final = "SPHERE"

# Explicit VRs whose length field has 16 bits, and those with two reserved bytes and 32 bits (PS3.5 7.1.2).
SHORT_VRS: Final = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG_VRS: Final = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())

_MEDIA_STORAGE_SOP_CLASS, _MEDIA_STORAGE_SOP_INSTANCE, _TRANSFER_SYNTAX = 0x0002, 0x0003, 0x0010
_GROUP_LENGTH = 0x0000


def file_meta(*, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, source_aet: str = "") -> bytes:
    """The 128-byte preamble, "DICM" and group 0002 that precede a data set in a Part 10 file (PS3.10 7.1).

    `source_aet` is the calling AE title, left out where empty. Characters outside ASCII become "?"; what no UID or AE
    title can be long enough for is cut.
    """
    before, after = _around(sop_class_uid, transfer_syntax_uid, source_aet)
    instance = _short(_MEDIA_STORAGE_SOP_INSTANCE, b"UI", sop_instance_uid, b"\0")
    length = len(before) + len(instance) + len(after)
    return b"".join((_BEGIN, length.to_bytes(4, "little"), before, instance, after))


@remembered(64)
def _around(sop_class_uid: str, transfer_syntax_uid: str, source_aet: str) -> tuple[bytes, bytes]:
    """What goes before and after the instance's UID in group 0002, which is the same for all that one sender sends."""
    before = _VERSION + _short(_MEDIA_STORAGE_SOP_CLASS, b"UI", sop_class_uid, b"\0")
    after = _short(_TRANSFER_SYNTAX, b"UI", transfer_syntax_uid, b"\0") + _IMPLEMENTATION
    return before, after + (_short(0x0016, b"AE", source_aet, b" ") if source_aet else b"")


def _short(element: int, vr: bytes, text: str, pad: bytes) -> bytes:
    value = text.encode("ascii", "replace")[:MAX_SHORT]
    value += pad * (len(value) % 2)
    return struct.pack("<HH2sH", 2, element, vr, len(value)) + value


def _long(element: int, vr: bytes, value: bytes) -> bytes:
    return struct.pack("<HH2sHI", 2, element, vr, 0, len(value)) + value


_BEGIN: Final = bytes(PREAMBLE_LENGTH) + PREFIX + struct.pack("<HH2sH", 2, _GROUP_LENGTH, b"UL", 4)
_VERSION: Final = _long(0x0001, b"OB", b"\x00\x01")
_IMPLEMENTATION: Final = _short(0x0012, b"UI", IMPLEMENTATION_CLASS_UID, b"\0") + _short(
    0x0013, b"SH", IMPLEMENTATION_VERSION_NAME, b" "
)


@dataclass(frozen=True, slots=True)
class FileMeta:
    """What was found before the data set.

    ``dataset_offset`` counts bytes from the first one of the file. ``complete`` is False where the given bytes ended
    inside the group: more of them may hold more. ``has_prefix`` says whether "DICM" stood where PS3.10 wants it.
    """

    elements: Mapping[int, bytes]
    dataset_offset: int
    complete: bool
    has_prefix: bool

    @property
    def TransferSyntaxUID(self) -> str:
        return self._uid(_TRANSFER_SYNTAX)

    @property
    def MediaStorageSOPClassUID(self) -> str:
        return self._uid(_MEDIA_STORAGE_SOP_CLASS)

    @property
    def MediaStorageSOPInstanceUID(self) -> str:
        return self._uid(_MEDIA_STORAGE_SOP_INSTANCE)

    @property
    def group_end(self) -> int | None:
        """Where (0002,0000) says that the data set begins; None without it."""
        value = self.elements.get(_GROUP_LENGTH, b"")
        if len(value) != 4:
            return None
        start = (PREAMBLE_LENGTH + len(PREFIX)) if self.has_prefix else 0
        return start + 12 + int(struct.unpack("<I", value)[0])

    def _uid(self, element: int) -> str:
        return self.elements.get(element, b"").decode("latin-1").strip("\0 ")


def read_file_meta(data: bytes) -> FileMeta:
    """The File Meta Information at the beginning of `data`, with or without preamble."""
    has_prefix = data[PREAMBLE_LENGTH : PREAMBLE_LENGTH + 4] == PREFIX
    pos = PREAMBLE_LENGTH + 4 if has_prefix else 4 if data[:4] == PREFIX else 0
    elements: dict[int, bytes] = {}
    complete = has_prefix or len(data) > PREAMBLE_LENGTH + 4
    while True:
        if pos + 8 > len(data):
            complete = False
            break
        group, element, vr, short = struct.unpack_from("<HH2sH", data, pos)
        if group != 2:
            break
        start, length = pos + 8, short
        if vr in LONG_VRS:
            start, length = pos + 12, _u32(data, pos + 8)
        elif vr not in SHORT_VRS:  # implicit VR where PS3.10 wants explicit
            length = _u32(data, pos + 4)
        if start + length > len(data):
            complete = False
            break
        elements[element] = data[start : start + length]
        pos = start + length
    return FileMeta(elements, pos, complete, has_prefix)


def _u32(data: bytes, pos: int) -> int:
    return int.from_bytes(data[pos : pos + 4], "little")
