"""HeaderReader: the first bytes of a member, and more on demand, to one row or one reason why there is none."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final

from sphere.conf.errors import RejectReason
from sphere.conf.uids import UID, UID_LENGTH
from sphere.ingest.header.charset import DEFAULT
from sphere.ingest.header.layout import Layout, Rejected, find_layout
from sphere.ingest.header.memo import Memo
from sphere.ingest.header.values import Hit
from sphere.ingest.header.walker import MAX_WARNINGS, UNORDERED, Walker, join
from sphere.ingest.header.window import Fetch, HeaderTooLarge, InflatesTooLarge

_MEDIA_STORAGE_DIRECTORY: Final = "1.2.840.10008.1.3.10"
_DIRECTORY_RECORD_SEQUENCE: Final = 0x00041220
_IDENTIFYING: Final = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_LAST_IDENTIFYING: Final = 0x0020000E
_MAX_BARE: Final = 1 << 24  # bytes, inflated, of a data set that did not come as a member
_STRICT_UID: Final = re.compile(r"(?:0|[1-9]\d*)(?:\.(?:0|[1-9]\d*))+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Header:
    """One instance's header.

    ``values`` holds typed column values by keyword, only those that are there; ``dataset`` the whole header as DICOM
    JSON (PS3.18 Annex F; File Meta Information, group lengths and bulk data left out, and what stands behind pixel data
    that are encapsulated or deflated). ``pixel_offset`` is where the element with the pixel data begins, in bytes from
    the member's first one (None without pixel data, and in a deflated data set). ``warnings`` names what could not be
    used as it stands: "(gggg,eeee) Keyword: what".
    """

    values: dict[str, Any]
    dataset: bytes
    pixel_offset: int | None
    TransferSyntaxUID: str
    dataset_offset: int
    warnings: list[str]


class HeaderReader:
    """Reads headers; reusable, and faster on headers that resemble those it has read. Not for several threads at once.

    `max_header` bounds the bytes that one header may take, inflated where it is deflated; what is skipped as bulk data
    does not count unless it had to be inflated.
    """

    def __init__(self, *, max_header: int) -> None:
        self._max_header = max_header
        self._memo = Memo()

    @property
    def remembered(self) -> int:
        """How many decoded elements are kept for the headers to come."""
        return self._memo.count

    def read(self, prefix: bytes, *, size: int, fetch: Fetch) -> Header | Rejected:
        """The header of a member of `size` bytes that begins with `prefix`.

        ``fetch(offset, count)`` gives further bytes of it; it is asked in ascending order and never for pixel data,
        save for at most 16 KiB or as much as the header has already taken. What `fetch` raises goes through; bad bytes
        raise nothing.
        """
        failures: list[BaseException] = []

        def guarded(offset: int, count: int) -> bytes:
            try:
                return fetch(offset, count)
            except BaseException as error:
                failures.append(error)
                raise

        try:
            return self._read(prefix, size, guarded)
        except InflatesTooLarge:
            return Rejected(RejectReason.INFLATE_LIMIT, f"inflates to more than {self._max_header} bytes of header")
        except HeaderTooLarge:
            return Rejected(
                RejectReason.TOO_LARGE, f"more than {self._max_header} bytes of header, or too many elements"
            )
        except Exception as error:  # a defect of the reader costs one file, not the job
            if failures:
                raise
            return Rejected(RejectReason.INTERNAL, f"{type(error).__name__} in the header reader")
        finally:
            self._memo.trim()

    def _read(self, prefix: bytes, size: int, fetch: Fetch) -> Header | Rejected:
        layout = find_layout(prefix, size=size, fetch=fetch, limit=self._max_header)
        if isinstance(layout, Rejected):
            return layout
        if layout.meta.MediaStorageSOPClassUID == _MEDIA_STORAGE_DIRECTORY:
            return Rejected(RejectReason.MEDIA_DIRECTORY, "Media Storage Directory")
        walker = Walker(layout.window, inflated=layout.inflated)
        hits = walker.walk(layout.start, self._memo.context(layout.encoding, DEFAULT))
        return _header(layout, walker, hits)


def dataset_json(data: bytes, transfer_syntax_uid: str) -> str:
    """A bare data set as DICOM JSON; "" where that would not tell all of it: bytes that are no element, bulk data."""
    layout = find_layout(
        data, size=len(data), fetch=lambda offset, count: b"", limit=_MAX_BARE, transfer_syntax_uid=transfer_syntax_uid
    )
    if isinstance(layout, Rejected):
        return ""
    walker = Walker(layout.window, inflated=layout.inflated)
    hits = walker.walk(layout.start, Memo().context(layout.encoding, DEFAULT))
    json = b"{%s}" % join(hits)
    told = {text for hit in hits if b'{"vr":"SQ"' in hit.json[:24] for text in hit.warnings} | {*walker.warnings}
    return "" if walker.cut or told - {UNORDERED} or b'"BulkDataURI"' in json else json.decode("utf-8")


def _header(layout: Layout, walker: Walker, hits: list[Hit]) -> Header | Rejected:
    values = {hit[2]: hit[3] for hit in hits if hit[2]}
    warnings = layout.warnings + [text for hit in hits if hit[4] for text in hit[4]] + walker.warnings
    _complete_from_meta(values, layout, warnings)
    rejected = _check_uids(values, hits, walker, warnings)
    if rejected is not None:
        return replace(rejected, dataset=b"{%s}" % join(hits))
    if walker.shared:
        values = {**walker.shared, **values}
    return Header(
        values,
        b"{%s}" % join(hits),
        walker.pixel_offset,
        layout.TransferSyntaxUID,
        layout.dataset_offset,
        warnings[:MAX_WARNINGS],
    )


def _complete_from_meta(values: dict[str, Any], layout: Layout, warnings: list[str]) -> None:
    """SOP class and instance from the File Meta Information where the data set lacks them."""
    for keyword, tag in (("SOPClassUID", "(0008,0016)"), ("SOPInstanceUID", "(0008,0018)")):
        if keyword not in values and (uid := getattr(layout.meta, f"MediaStorage{keyword}")):
            values[keyword] = uid
            warnings.append(f"{tag} {keyword}: missing, taken from the File Meta Information")


def _check_uids(values: dict[str, Any], hits: list[Hit], walker: Walker, warnings: list[str]) -> Rejected | None:
    """Why the instance cannot be a row: it is a directory, or an identifying UID is missing or none (PS3.5 9.1)."""
    if values.get("SOPClassUID") == _MEDIA_STORAGE_DIRECTORY:
        return Rejected(RejectReason.MEDIA_DIRECTORY, "Media Storage Directory")
    missing = [keyword for keyword in _IDENTIFYING if not values.get(keyword)]
    if missing:
        return _missing(missing, hits, walker)
    for keyword in _IDENTIFYING:
        uid = values[keyword]
        if _STRICT_UID.fullmatch(uid) and len(uid) <= UID_LENGTH:
            continue
        if not UID.fullmatch(uid):
            return Rejected(RejectReason.BAD_UID, f"{keyword} is no UID ({len(uid)} characters)")
        warnings.append(f"{keyword}: a component is empty or has leading zeros")
    return None


def _missing(missing: list[str], hits: list[Hit], walker: Walker) -> Rejected:
    if any(hit.tag == _DIRECTORY_RECORD_SEQUENCE for hit in hits):
        return Rejected(RejectReason.MEDIA_DIRECTORY, "a directory of media records")
    names = ", ".join(missing)
    if walker.cut is not None and (not hits or hits[-1].tag < _LAST_IDENTIFYING):
        return Rejected(walker.cut, f"{names} not reached; {walker.warnings[-1] if walker.warnings else ''}")
    if not hits:
        return Rejected(RejectReason.NOT_DICOM, "no data element could be recognised")
    return Rejected(RejectReason.MISSING_UID, f"{names} missing or empty")
