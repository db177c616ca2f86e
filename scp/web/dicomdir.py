"""DICOMDIR: the directory of a File-set (PS3.3 F, PS3.10 8), from the headers of the catalog."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage, generate_uid

from sphere.catalog.service import StoredInstance
from sphere.ingest.part10 import file_meta
from sphere.scp.retrieve.outbound import syntax_of

FOLDER: Final = "DICOM"  # of the files; the names of File IDs have 8 characters at most (PS3.10 8.2)

_STORAGE: Final = "1.2.840.10008.5.1.4.1.1."
_TYPES: Final = {
    "88.59": "KEY OBJECT DOC", "88.": "SR DOCUMENT", "11.": "PRESENTATION", "9.": "WAVEFORM", "4.2": "SPECTROSCOPY",
    "104.": "ENCAP DOC", "66.1": "REGISTRATION", "66.3": "REGISTRATION", "66.2": "FIDUCIAL", "66.5": "SURFACE",
    "67": "VALUE MAP", "481.2": "RT DOSE", "481.3": "RT STRUCTURE SET", "481.5": "RT PLAN", "481.8": "RT PLAN",
    "481.4": "RT TREAT RECORD", "481.6": "RT TREAT RECORD", "481.7": "RT TREAT RECORD", "481.9": "RT TREAT RECORD",
}  # fmt: skip
"""Record types by SOP class below _STORAGE, a full stop at the end standing for all below; all others are IMAGE, and
Raw Data (66) RAW DATA."""

_CONTENT: Final = ("ContentDate", "ContentTime")
_LABEL: Final = ("ContentLabel", "ContentDescription", "ContentCreatorName")
_KEYS: Final[Mapping[str, Sequence[str]]] = {
    "PATIENT": ("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    "STUDY": ("StudyDate", "StudyTime", "StudyDescription", "StudyInstanceUID", "StudyID", "AccessionNumber"),
    "SERIES": ("Modality", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription"),
    "IMAGE": (),
    "RAW DATA": _CONTENT,
    "RT DOSE": ("DoseSummationType",),
    "RT STRUCTURE SET": ("StructureSetLabel", "StructureSetDate", "StructureSetTime"),
    "RT PLAN": ("RTPlanLabel", "RTPlanDate", "RTPlanTime"),
    "RT TREAT RECORD": ("TreatmentDate", "TreatmentTime"),
    "PRESENTATION": ("PresentationCreationDate", "PresentationCreationTime", *_LABEL),
    "WAVEFORM": _CONTENT,
    "SR DOCUMENT": (*_CONTENT, "CompletionFlag", "VerificationFlag", "ConceptNameCodeSequence"),
    "KEY OBJECT DOC": (*_CONTENT, "ConceptNameCodeSequence"),
    "SPECTROSCOPY": ("ImageType", *_CONTENT),
    "ENCAP DOC": (*_CONTENT, "DocumentTitle", "MIMETypeOfEncapsulatedDocument", "ConceptNameCodeSequence"),
    "REGISTRATION": (*_CONTENT, *_LABEL),
    "FIDUCIAL": (*_CONTENT, *_LABEL),
    "SURFACE": (*_CONTENT, *_LABEL),
    "VALUE MAP": (*_CONTENT, *_LABEL),
}
"""Keys of the records (PS3.3 F.5), beside InstanceNumber."""
_CODE: Final = ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")


def _tag(keyword: str) -> str:
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return f"{tag:08X}"


_NUMBER: Final = _tag("InstanceNumber")
TAGS: Final = frozenset(_tag(name) for names in _KEYS.values() for name in names) | {_NUMBER}
"""What a header has to say."""

Header = Mapping[str, Mapping[str, Any]]  # DICOM JSON (PS3.18 F)


@dataclass(frozen=True, slots=True)
class Entry:
    """An instance, and the elements TAGS of its header."""

    instance: StoredInstance
    header: Header


@dataclass(slots=True)
class _Record:
    """A directory record: its elements after the offsets, and the records below it by key."""

    body: bytes
    below: dict[str, _Record] = field(default_factory=dict)
    at: int = 0  # its place in the file


def directory(entries: Sequence[Entry]) -> tuple[bytes, list[str]]:
    """(the file DICOMDIR, the path of each entry's file from it).

    Values of Type 1 that a header lacks are empty, but for an InstanceNumber, which is the number in the series.
    """
    root, numbers = _Record(b""), dict[tuple[str, str], int]()
    names = [_place(root, numbers, entry) for entry in entries]
    meta = file_meta(
        sop_class_uid=MediaStorageDirectoryStorage,
        sop_instance_uid=generate_uid(entropy_srcs=[entry.instance.sha256 for entry in entries]),
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    first = len(meta) + len(_head(0, 0, 0))
    end = _locate(root, first)
    last = next(reversed(root.below.values())).at if root.below else 0
    head = _head(first if root.below else 0, last, end - first)
    return b"".join([meta, head, *_written(root)]), names


def _place(root: _Record, numbers: dict[tuple[str, str], int], entry: Entry) -> str:
    """Add the records of an instance; returns the path of its file. `numbers` are those of the series."""
    one, header = entry.instance, entry.header
    person = _text(header, "PatientID")
    patient = _below(root, person, "PATIENT", header)
    study = _below(patient, one.StudyInstanceUID, "STUDY", header)
    series = _below(study, one.SeriesInstanceUID, "SERIES", header)
    number = len(series.below) + 1
    folder = numbers.setdefault((person, one.SeriesInstanceUID), len(numbers) + 1)
    path = (FOLDER, f"SE{folder:06}", f"IM{number:06}")
    kind = record_type(one.SOPClassUID)
    named = {
        "00041500": ("CS", "\\".join(path)),
        "00041510": ("UI", one.SOPClassUID),
        "00041511": ("UI", one.SOPInstanceUID),
        "00041512": ("UI", syntax_of(one)),
        _NUMBER: ("IS", _text(header, "InstanceNumber") or str(number)),
    }
    series.below[one.SOPInstanceUID] = _Record(_body(kind, header, named))
    return "/".join(path)


def _below(parent: _Record, key: str, kind: str, header: Header) -> _Record:
    if key not in parent.below:
        parent.below[key] = _Record(_body(kind, header, {}))
    return parent.below[key]


def record_type(sop_class_uid: str) -> str:
    """The type of the record of an instance (PS3.3 Table F.4-1)."""
    below = sop_class_uid.removeprefix(_STORAGE)
    if below == sop_class_uid:
        return "IMAGE"
    if below == "66":
        return "RAW DATA"
    kinds = (kind for key, kind in _TYPES.items() if below == key or (key[-1] == "." and below.startswith(key)))
    return next(kinds, "IMAGE")


def _text(header: Header, keyword: str) -> str:
    return _value(header.get(_tag(keyword)))


def _value(element: Mapping[str, Any] | None) -> str:
    """The values of an element as text, separated by backslashes."""
    return "\\".join(_plain(one) for one in (element or {}).get("Value") or ())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):  # a person name (PS3.18 F.2.2)
        groups = [str(value.get(name, "")) for name in ("Alphabetic", "Ideographic", "Phonetic")]
        return "=".join(groups).rstrip("=")
    return "" if value is None else str(value)


def _body(kind: str, header: Header, named: Mapping[str, tuple[str, str]]) -> bytes:
    """The elements of a record after its offsets."""
    texts = {"00041430": ("CS", kind), "00080005": ("CS", "ISO_IR 192"), **named}
    sequences: dict[str, bytes] = {}
    for keyword in _KEYS[kind]:
        tag = _tag(keyword)
        if keyword == "ConceptNameCodeSequence":
            sequences[tag] = _code(header.get(tag))
        else:
            texts.setdefault(tag, (dictionary_VR(keyword), _value(header.get(tag))))
    encoded = {tag: _element(tag, vr, text) for tag, (vr, text) in texts.items()} | sequences
    return b"".join(encoded[tag] for tag in sorted(encoded))


def _code(element: Mapping[str, Any] | None) -> bytes:
    """ConceptNameCodeSequence with one item, or none."""
    items = (element or {}).get("Value") or [None]
    tags = {_tag(keyword): dictionary_VR(keyword) for keyword in _CODE}
    body = b""
    if items[0]:
        body = _item(b"".join(_element(tag, vr, _value(items[0].get(tag))) for tag, vr in sorted(tags.items())))
    return _sequence(_tag("ConceptNameCodeSequence"), len(body)) + body


def _element(tag: str, vr: str, text: str) -> bytes:
    """In Explicit VR Little Endian, a value that does not fit into one of 16 bits of length left out."""
    value = text.encode()
    if len(value) % 2:
        value += b"\0" if vr == "UI" else b" "
    if len(value) > 0xFFFE:
        value = b""
    return _number(tag) + vr.encode() + struct.pack("<H", len(value)) + value


def _number(tag: str) -> bytes:
    return struct.pack("<HH", int(tag[:4], 16), int(tag[4:], 16))


def _sequence(tag: str, length: int) -> bytes:
    return _number(tag) + b"SQ\0\0" + struct.pack("<I", length)


def _item(body: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(body)) + body


def _offset(tag: str, value: int) -> bytes:
    return _number(tag) + b"UL" + struct.pack("<HI", 4, value)


def _flag(tag: str, value: int) -> bytes:
    return _number(tag) + b"US" + struct.pack("<HH", 2, value)


def _head(first: int, last: int, length: int) -> bytes:
    """The data set up to its first record (PS3.3 F.3.2.2)."""
    return (
        _element("00041130", "CS", "SPHERE")
        + _offset("00041200", first)
        + _offset("00041202", last)
        + _flag("00041212", 0)
        + _sequence("00041220", length)
    )


def _offsets(following: int, below: int) -> bytes:
    return _offset("00041400", following) + _flag("00041410", 0xFFFF) + _offset("00041420", below)


def _locate(parent: _Record, at: int) -> int:
    """Give every record below its place, from `at` on; returns where they end."""
    for record in parent.below.values():
        record.at = at
        at = _locate(record, at + len(_item(_offsets(0, 0) + record.body)))
    return at


def _written(parent: _Record) -> list[bytes]:
    """The records below, each before those that are below it."""
    written: list[bytes] = []
    siblings = list(parent.below.values())
    for record, following in zip(siblings, [*siblings[1:], None], strict=False):
        below = next(iter(record.below.values()), None)
        offsets = _offsets(following.at if following else 0, below.at if below else 0)
        written.append(_item(offsets + record.body))
        written += _written(record)
    return written
