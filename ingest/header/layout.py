"""Where the data set of a member begins and how it is written: File Meta Information or the first elements say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from sphere.conf.errors import RejectReason
from sphere.ingest.header.dictionary import UNDEFINED, standard_vr
from sphere.ingest.header.element import (
    EXPLICIT_BE,
    EXPLICIT_LE,
    IMPLICIT_BE,
    IMPLICIT_LE,
    VRS,
    Encoding,
    read_head,
)
from sphere.ingest.header.window import Fetch, InflateFailed, Inflater, Window
from sphere.ingest.part10 import SHORT_VRS, FileMeta, read_file_meta

IMPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2"
EXPLICIT_VR_LITTLE_ENDIAN: Final = "1.2.840.10008.1.2.1"
DEFLATED: Final = frozenset(
    ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205")  # PS3.5 A.5, A.6 and A.9
)
_DECLARED: Final = {
    IMPLICIT_VR_LITTLE_ENDIAN: IMPLICIT_LE,
    "1.2.840.10008.1.2.2": EXPLICIT_BE,
    "1.2.840.113619.5.2": IMPLICIT_LE,  # GE private: only its pixels are big endian
}
_GUESSED: Final = {
    IMPLICIT_LE: IMPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_LE: EXPLICIT_VR_LITTLE_ENDIAN,
    EXPLICIT_BE: "1.2.840.10008.1.2.2",
    IMPLICIT_BE: "",
}
_STANDARD_ROOT: Final = "1.2.840.10008.1.2."
_FIRST_LOOK: Final = 4096  # bytes within which File Meta Information usually ends


@dataclass(frozen=True, slots=True)
class Rejected:
    """Bytes that cannot become a row, and why; `detail` is for a person and holds no patient data.

    `dataset` is the header as DICOM JSON where it could be read, for those who ask what the instance says of itself.
    """

    reason: RejectReason
    detail: str
    dataset: bytes = field(default=b"{}", compare=False, repr=False)


@dataclass(slots=True)
class Layout:
    """Where and how the data set is: read it from position `start` of `window`.

    ``dataset_offset`` counts from the member's first byte. Where ``inflated`` is set, `window` is over the inflated
    data set and its positions are not the member's.
    """

    meta: FileMeta
    TransferSyntaxUID: str
    encoding: Encoding
    window: Window
    dataset_offset: int
    start: int
    inflated: bool
    warnings: list[str]


def find_layout(
    prefix: bytes, *, size: int, fetch: Fetch, limit: int, transfer_syntax_uid: str | None = None
) -> Layout | Rejected:
    """The layout of a member that begins with `prefix`.

    With `transfer_syntax_uid` the bytes are a bare data set of that transfer syntax, as it comes over an association.
    Raises HeaderTooLarge.
    """
    window = Window(prefix, size=size, fetch=fetch, limit=limit)
    if window.size == 0:
        return Rejected(RejectReason.EMPTY, "no bytes")
    if transfer_syntax_uid is None:
        meta = _load_meta(window)
        declared = meta.TransferSyntaxUID
    else:
        meta = FileMeta({}, 0, complete=True, has_prefix=False)
        declared = transfer_syntax_uid
    start = _dataset_start(window, meta)
    if declared in DEFLATED:
        return _deflated(window, meta, declared, start, fetch, limit)
    return _plain(window, meta, declared, start)


def _load_meta(window: Window) -> FileMeta:
    window.load(0, _FIRST_LOOK)
    meta = read_file_meta(window.buf)
    while not meta.complete and len(window.buf) < window.size:
        window.load(0, 2 * len(window.buf))
        meta = read_file_meta(window.buf)
    return meta


def _dataset_start(window: Window, meta: FileMeta) -> int:
    """Where group 0002 ends; the group length is believed only where the elements lead nowhere."""
    start, announced = meta.dataset_offset, meta.group_end
    if announced is None or announced == start or not 0 < announced < window.size:
        return start
    window.load(0, announced + 12)
    if _recognise(window, start) is None and _recognise(window, announced) is not None:
        return announced
    return start


def _deflated(window: Window, meta: FileMeta, declared: str, start: int, fetch: Fetch, limit: int) -> Layout | Rejected:
    prefix = window.buf

    def raw(pos: int, count: int) -> bytes:
        return prefix[pos : pos + count] if pos < len(prefix) else fetch(pos, count)

    source = Inflater(raw, offset=start, size=window.size, limit=limit)
    inflated = Window(b"", size=source.size, fetch=source.fetch, limit=source.size)
    try:
        inflated.load(0, 1)
    except InflateFailed:
        if _recognise(window, start) is not None:
            plain = _plain(window, meta, "", start)
            if isinstance(plain, Layout):
                plain.warnings.append(f"transfer syntax {declared} is declared, but the data set is not deflated")
            return plain
        return Rejected(RejectReason.MALFORMED, "the data set is declared deflated and cannot be inflated")
    return Layout(meta, declared, EXPLICIT_LE, inflated, start, 0, True, [])


def _plain(window: Window, meta: FileMeta, declared: str, start: int) -> Layout | Rejected:
    if start >= window.size:
        if meta.elements or meta.has_prefix:
            return Rejected(RejectReason.TRUNCATED, "no data set follows the File Meta Information")
        return Rejected(RejectReason.NOT_DICOM, "no data element could be recognised")
    known_as_dicom = bool(meta.elements or meta.has_prefix or declared)
    seen = _recognise(window, start, last_group=0x7FE0 if known_as_dicom else 0x0020)
    expected = expected_encoding(declared)
    if seen is None:
        return _unrecognised(known_as_dicom, declared, expected) or Layout(
            meta, declared, expected or EXPLICIT_LE, window, start, start, False, []
        )
    if expected is None and declared and not seen.explicit:
        return Rejected(RejectReason.TRANSFER_SYNTAX, f"the encoding of transfer syntax {declared} is not known")
    warnings = []
    if expected is not None and expected != seen:
        warnings.append(f"transfer syntax {declared} is declared, but the data set is written in {_name(seen)}")
    uid = declared or _GUESSED[seen]
    return Layout(meta, uid, seen, window, start, start, False, warnings)


def _unrecognised(known_as_dicom: bool, declared: str, expected: Encoding | None) -> Rejected | None:
    """Why a data set whose first element looks like none cannot be tried; None where it can."""
    if not known_as_dicom:
        return Rejected(RejectReason.NOT_DICOM, "no data element could be recognised")
    if declared and expected is None:
        return Rejected(RejectReason.TRANSFER_SYNTAX, f"the encoding of transfer syntax {declared} is not known")
    return None


def expected_encoding(declared: str) -> Encoding | None:
    """The encoding of a transfer syntax: all standard ones but three are explicit little endian (PS3.5 Annex A)."""
    if declared in _DECLARED:
        return _DECLARED[declared]
    return EXPLICIT_LE if declared.startswith(_STANDARD_ROOT) else None


def _recognise(window: Window, pos: int, *, last_group: int = 0x7FE0) -> Encoding | None:
    """The encoding of the element at `pos`; None where it looks like no first element of a data set.

    Bytes that nothing else calls DICOM are believed only where they begin with a group up to `last_group`.
    """
    index = window.load(pos, 12) if pos >= window.base else 0
    first = window.buf[index : index + 12]
    if len(first) < 8:
        return None
    if first[0] and not first[1] and first[4:6] in SHORT_VRS and first[0] <= last_group:
        return EXPLICIT_LE  # how nearly all data sets begin
    little = int.from_bytes(first[:2], "little") <= int.from_bytes(first[:2], "big")
    explicit = first[4:6] in VRS
    encoding = Encoding(explicit=explicit, little=little)
    head = read_head(first, 0, encoding, window.size - pos)
    if head is None or not 1 <= head.tag >> 16 <= last_group:
        return None
    if head.length == UNDEFINED:
        fits = (head.vr or standard_vr(head.tag) or "UN") in ("SQ", "UN")
    else:
        fits = head.length <= window.size - pos or explicit
    if not explicit:
        fits = fits and bool(standard_vr(head.tag) or head.tag >> 16 & 1)
    return _CANONICAL[encoding] if fits else None


_CANONICAL: Final = {encoding: encoding for encoding in _GUESSED}


def _name(encoding: Encoding) -> str:
    return f"{'explicit' if encoding.explicit else 'implicit'} VR {'little' if encoding.little else 'big'} endian"
