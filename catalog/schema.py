"""The Delta tables: their columns, their keys, and how the roll-ups follow from `instances`.

Key columns come first (Delta keeps statistics of the first 32 columns only); timestamps are UTC; no type needs more
than Delta reader version 1. Columns that hold a DICOM attribute bear its keyword (PS3.6) and are of
`sphere.ingest.header.columns.COLUMNS`; all others are lower case, except the computed keys of PS3.4 C.3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from sphere.ingest.header.columns import COLUMNS, MODULES, Column

Level = Literal["PATIENT", "STUDY", "SERIES", "IMAGE"]
LEVELS: tuple[Level, ...] = ("PATIENT", "STUDY", "SERIES", "IMAGE")
"""Query/Retrieve levels from the top (PS3.4 C.6.1.1)."""

TIMESTAMP = pa.timestamp("us", tz="UTC")
TEXTS = pa.list_(pa.string())

BY_KEYWORD: Mapping[str, Column] = {column.keyword: column for column in COLUMNS}

UNIQUE_KEY: Mapping[Level, str] = {
    "PATIENT": "PatientID",
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}
"""The unique key of each level (PS3.4 C.6.1.1.2 to C.6.1.1.5)."""

_LEVEL_MODULES: Mapping[Level, tuple[str, ...]] = {
    "PATIENT": ("Patient", "Clinical Trial Subject"),
    "STUDY": ("General Study", "Patient Study", "Clinical Trial Study"),
    "SERIES": (
        "General Series",
        "Clinical Trial Series",
        "Enhanced Series",
        "Frame of Reference",
        "Synchronization",
        "General Equipment",
        "Enhanced General Equipment",
    ),
}
_KEYWORDS_OF: Mapping[str, tuple[str, ...]] = {module.name: module.keywords for module in MODULES}
# Attributes of a series' modules that differ between its instances in practice.
_OF_INSTANCE = frozenset({"PixelPaddingValue"})


def _attributes(level: Level) -> tuple[str, ...]:
    """Keywords of the attributes of one level above IMAGE, its unique key first, in the order of PS3.3."""
    names = dict.fromkeys([UNIQUE_KEY[level]])
    for module in _LEVEL_MODULES[level]:
        names |= dict.fromkeys(name for name in _KEYWORDS_OF[module] if name not in _OF_INSTANCE)
    return tuple(names)


ATTRIBUTES: Mapping[Level, tuple[str, ...]] = {level: _attributes(level) for level in LEVELS[:-1]}
"""Keywords of the typed attributes that live at PATIENT, STUDY and SERIES level; all other columns live at IMAGE."""

_LEVEL_OF: Mapping[str, Level] = {name: level for level, names in ATTRIBUTES.items() for name in names}

COMPUTED: Mapping[str, Level] = {
    "NumberOfPatientRelatedStudies": "PATIENT",
    "NumberOfPatientRelatedSeries": "PATIENT",
    "NumberOfPatientRelatedInstances": "PATIENT",
    "ModalitiesInStudy": "STUDY",
    "SOPClassesInStudy": "STUDY",
    "NumberOfStudyRelatedSeries": "STUDY",
    "NumberOfStudyRelatedInstances": "STUDY",
    "NumberOfSeriesRelatedInstances": "SERIES",
}
"""Attributes that no instance bears and that a roll-up computes (PS3.4 C.3.4), with their level."""


def level_of(keyword: str) -> Level | None:
    """The level at which an attribute is a key; None where no column holds it (it may be asked at any level)."""
    if keyword in COMPUTED:
        return COMPUTED[keyword]
    return _LEVEL_OF.get(keyword, "IMAGE") if keyword in BY_KEYWORD else None


PATIENT_KEY_SQL = (
    "CASE WHEN coalesce(PatientID, '') = '' THEN concat('0:', StudyInstanceUID) "
    "ELSE concat(CAST(length(PatientID) AS STRING), ':', PatientID, coalesce(IssuerOfPatientID, '')) END"
)
"""`patient_key` of a study (Spark SQL and DuckDB): PatientID and IssuerOfPatientID, PatientID's length in front.

Studies without a PatientID are never taken for one person: each is a patient of its own, keyed by its UID.
"""


def patient_key(patient_id: str | None, issuer: str | None, study_instance_uid: str) -> str:
    """What PATIENT_KEY_SQL computes."""
    if not patient_id:
        return f"0:{study_instance_uid}"
    return f"{len(patient_id)}:{patient_id}{issuer or ''}"


@dataclass(frozen=True, slots=True)
class Aggregate:
    """A roll-up column computed over a group: `kind` of the column `source` of the rows rolled up.

    ``count`` counts rows (source ""), ``count_distinct`` and ``collect_set`` leave out null, and the latter is sorted;
    ``union`` collects the elements of lists in the same way.
    """

    column: str
    kind: Literal["count", "count_distinct", "collect_set", "union", "sum", "min", "max"]
    source: str
    arrow: pa.DataType


@dataclass(frozen=True, slots=True)
class RollUp:
    """How a table follows from another: one row per distinct `keys` of the rows of `source`.

    Each of `attributes` is its value in the first row, ordered by the columns `order`, where it is not null.
    """

    source: str
    keys: tuple[str, ...]
    order: tuple[str, ...]
    attributes: tuple[str, ...]
    aggregates: tuple[Aggregate, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A Delta table below the catalog root. `key` is unique; MERGE is by it.

    Of one that is `sparse`, a file has only the columns that say something in it, those of its key, and of `instances`
    the first of the schema, which have statistics: whoever reads it takes a column that a file lacks as null.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    roll_up: RollUp | None = None
    sparse: bool = False
    properties: Mapping[str, str] = field(default_factory=dict)


_OFFSET = "TimezoneOffsetFromUTC"  # of an instance, but its study's and series' times are local times there
_EARLIEST = ("received_at", "bundle", "offset")
_COLLECTIONS = Aggregate("collections", "union", "collections", TEXTS)
_EXTENT = (
    Aggregate("size_bytes", "sum", "length", pa.int64()),
    Aggregate("first_received_at", "min", "received_at", TIMESTAMP),
    Aggregate("last_received_at", "max", "received_at", TIMESTAMP),
    _COLLECTIONS,
)

_SERIES = RollUp(
    source="instances",
    keys=("StudyInstanceUID", "SeriesInstanceUID"),
    order=_EARLIEST,
    attributes=(*ATTRIBUTES["SERIES"][1:], _OFFSET),
    aggregates=(
        Aggregate("NumberOfSeriesRelatedInstances", "count", "", pa.int64()),
        Aggregate("sop_classes_in_series", "collect_set", "SOPClassUID", TEXTS),
        *_EXTENT,
    ),
)

_STUDIES = RollUp(
    source="instances",
    keys=("StudyInstanceUID",),
    order=_EARLIEST,
    attributes=(*ATTRIBUTES["PATIENT"], *ATTRIBUTES["STUDY"][1:], _OFFSET),
    aggregates=(
        Aggregate("ModalitiesInStudy", "collect_set", "Modality", TEXTS),
        Aggregate("SOPClassesInStudy", "collect_set", "SOPClassUID", TEXTS),
        Aggregate("NumberOfStudyRelatedSeries", "count_distinct", "SeriesInstanceUID", pa.int64()),
        Aggregate("NumberOfStudyRelatedInstances", "count", "", pa.int64()),
        *_EXTENT,
    ),
)

_PATIENTS = RollUp(
    source="studies",
    keys=("patient_key",),
    order=("first_received_at", "StudyInstanceUID"),
    attributes=ATTRIBUTES["PATIENT"],
    aggregates=(
        Aggregate("NumberOfPatientRelatedStudies", "count", "", pa.int64()),
        Aggregate("NumberOfPatientRelatedSeries", "sum", "NumberOfStudyRelatedSeries", pa.int64()),
        Aggregate("NumberOfPatientRelatedInstances", "sum", "NumberOfStudyRelatedInstances", pa.int64()),
        Aggregate("size_bytes", "sum", "size_bytes", pa.int64()),
        Aggregate("first_received_at", "min", "first_received_at", TIMESTAMP),
        Aggregate("last_received_at", "max", "last_received_at", TIMESTAMP),
        _COLLECTIONS,
    ),
)

# Attributes with statistics in `instances`, after its identifying columns: the common query keys.
_INSTANCE_FIRST = (
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPClassUID",
    "PatientID",
    "StudyDate",
    "Modality",
    "AccessionNumber",
    "PatientName",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "SeriesNumber",
    "SeriesDescription",
    "SeriesDate",
    "InstanceNumber",
    "ContentDate",
    "BodyPartExamined",
    "Manufacturer",
)

INSTANCE_FIELDS: Mapping[str, pa.DataType] = {
    "bundle": pa.string(),
    "offset": pa.int64(),
    "length": pa.int64(),
    "dataset_offset": pa.int64(),
    "pixel_offset": pa.int64(),
    "transfer_syntax_uid": pa.string(),
    "sha256": pa.string(),
    "received_at": TIMESTAMP,
    "source_aet": pa.string(),
    "origin": pa.string(),
    "header_warnings": TEXTS,
    "collections": TEXTS,
}
"""Columns of `instances` that are not DICOM attributes; offsets and lengths in bytes (see MemberRecord)."""


def _instances() -> pa.Schema:
    fields = [(name, BY_KEYWORD[name].arrow) for name in _INSTANCE_FIRST]
    fields += list(INSTANCE_FIELDS.items())
    fields += [(column.keyword, column.arrow) for column in COLUMNS if column.keyword not in _INSTANCE_FIRST]
    return pa.schema([*fields, ("dataset", pa.string())])


def _rolled(roll_up: RollUp, first: tuple[str, ...]) -> pa.Schema:
    """Columns of a roll-up: keys, the attributes most asked for, aggregates, the other attributes."""
    rest = [name for name in roll_up.attributes if name not in first]
    names = dict.fromkeys((*roll_up.keys, *first))
    fields = [(name, BY_KEYWORD[name].arrow if name in BY_KEYWORD else pa.string()) for name in names]
    fields += [(aggregate.column, aggregate.arrow) for aggregate in roll_up.aggregates]
    fields += [(name, BY_KEYWORD[name].arrow) for name in rest]
    return pa.schema(fields)


_PATIENT_FIRST = ("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex")
_STUDY_FIRST = ("StudyDate", "StudyTime", "AccessionNumber", "StudyID", "StudyDescription", "ReferringPhysicianName")
_SERIES_FIRST = ("Modality", "SeriesNumber", "SeriesDescription", "SeriesDate", "SeriesTime", "BodyPartExamined")

_MEMBER = [
    ("bundle", pa.string()),
    ("offset", pa.int64()),
    ("length", pa.int64()),
]
_UIDS = [
    ("SOPInstanceUID", pa.string()),
    ("StudyInstanceUID", pa.string()),
    ("SeriesInstanceUID", pa.string()),
    ("SOPClassUID", pa.string()),
]
_PROVENANCE = [
    ("transfer_syntax_uid", pa.string()),
    ("sha256", pa.string()),
    ("received_at", TIMESTAMP),
    ("source_aet", pa.string()),
    ("origin", pa.string()),
]

_QUARANTINE = pa.schema(
    [
        *_MEMBER,
        ("dataset_offset", pa.int64()),
        ("reason", pa.string()),  # a RejectReason
        ("detail", pa.string()),
        *_UIDS,  # "" where the bytes did not give them
        *_PROVENANCE,
    ]
)

ConflictKind = Literal[
    "SOP_INSTANCE",
    "STUDY_PATIENT",
    "STUDY_ISSUER",
    "SERIES_STUDY",
    "SERIES_MODALITY",
    "PATIENT_BIRTH_DATE",
    "PATIENT_SEX",
]
"""Same SOPInstanceUID with other bytes; same study with another PatientID or IssuerOfPatientID; same series in another
study or with another Modality; same patient with another birth date or sex."""

_CONFLICTS = pa.schema(
    [
        ("bundle", pa.string()),  # with offset and length: of the later of the two versions
        ("offset", pa.int64()),
        ("kind", pa.string()),  # a ConflictKind
        ("length", pa.int64()),
        ("SOPInstanceUID", pa.string()),
        ("StudyInstanceUID", pa.string()),
        ("decision", pa.string()),  # a value of ingest.on_conflict, or "recorded"
        ("kept_bundle", pa.string()),
        ("kept_offset", pa.int64()),
        ("kept_sha256", pa.string()),
        ("other_bundle", pa.string()),
        ("other_offset", pa.int64()),
        ("other_sha256", pa.string()),
        ("received_at", TIMESTAMP),  # of the later of the two versions
        ("source_aet", pa.string()),
        ("origin", pa.string()),
        ("detail", pa.string()),
        ("subject", pa.string()),  # the UID, or the patient_key, of which two things are said
    ]
)

_TOMBSTONES = pa.schema(
    [
        ("bundle", pa.string()),  # where a member of a deleted instance is: read again when that is restored
        ("offset", pa.int64()),
        ("SOPInstanceUID", pa.string()),
        ("StudyInstanceUID", pa.string()),
        ("SeriesInstanceUID", pa.string()),
        ("length", pa.int64()),
        ("deleted_at", TIMESTAMP),
        ("deleted_by", pa.string()),
        ("reason", pa.string()),  # as it was given; "": none was
        ("erased_at", TIMESTAMP),  # since when its bytes are gone; null: they are there
    ]
)

_BUNDLES = pa.schema(
    [
        ("bundle", pa.string()),
        ("journal_bytes", pa.int64()),  # bytes of the bundle's journal that are catalogued
        ("members", pa.int64()),  # members catalogued, rejected ones included
        ("sealed", pa.bool_()),  # the journal's last line was among those bytes: nothing more will come
    ]
)

_FORWARDS = pa.schema(
    [
        ("forward", pa.string()),  # the name of one of [[forwards]]
        ("StudyInstanceUID", pa.string()),
        ("version", pa.int64()),  # of `instances`, up to which the entry reaches
        ("destination", pa.string()),  # the name of a peer
        ("state", pa.string()),  # "waiting" or "sent"
        ("instances", TEXTS),  # SOP Instance UIDs that are still to be sent, in the order of arrival
        ("sent", pa.int64()),
        ("attempts", pa.int64()),  # since something went through
        ("next_at", TIMESTAMP),
        ("last_error", pa.string()),
        ("queued_at", TIMESTAMP),
        ("updated_at", TIMESTAMP),
    ]
)

_AUDIT = pa.schema(
    [
        ("file", pa.string()),  # of the audit journal, below the storage root
        ("position", pa.int64()),  # the byte after the record's line
        ("at", TIMESTAMP),
        ("who", pa.string()),  # local, token:ID:NAME, oidc:SUBJECT, ae:TITLE
        ("role", pa.string()),  # over HTTP; over DIMSE the name of the peer, or strangers
        ("address", pa.string()),
        ("method", pa.string()),  # GET, POST ..., C-STORE, C-FIND, C-MOVE, C-GET, N-ACTION
        ("path", pa.string()),  # of the URL; over DIMSE the called AE title and the SOP class
        ("query", pa.string()),  # of the URL; over DIMSE the identifier as DICOM JSON
        ("status", pa.int64()),  # of HTTP, or of the last DIMSE response
        ("outcome", pa.string()),  # done, refused, failed, broken off, unreadable
        ("entities", pa.int64()),  # found, sent or stored
        ("failed", pa.int64()),  # of them, over DIMSE, those that failed
        ("bytes", pa.int64()),  # of the response body
        ("seconds", pa.float64()),
    ]
)

_ANNOTATIONS = pa.schema(
    [
        ("id", pa.string()),
        ("version", pa.int64()),
        *((name, pa.string()) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")),  # "": not known
        ("level", pa.string()),  # STUDY, SERIES or IMAGE: which of them it is linked to
        ("state", pa.string()),  # "current", "superseded", or "deleted"
        *((name, pa.string()) for name in ("type", "author", "name", "media_type", "description")),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("path", pa.string()),  # of its bytes, below storage.root
        ("at", TIMESTAMP),
        ("made_by", pa.string()),
    ]
)

TABLES: Mapping[str, Table] = {
    table.name: table
    for table in (
        Table(
            "instances",
            _instances(),
            ("SOPInstanceUID",),
            sparse=True,
            properties={"delta.enableChangeDataFeed": "true"},
        ),
        Table("series", _rolled(_SERIES, _SERIES_FIRST), _SERIES.keys, _SERIES),
        Table(
            "studies",
            # patient_key is computed, see PATIENT_KEY_SQL, from the rolled up PatientID and IssuerOfPatientID.
            _rolled(_STUDIES, ("patient_key", *_PATIENT_FIRST, *_STUDY_FIRST)),
            _STUDIES.keys,
            _STUDIES,
        ),
        Table("patients", _rolled(_PATIENTS, _PATIENT_FIRST), _PATIENTS.keys, _PATIENTS, sparse=True),
        Table("quarantine", _QUARANTINE, ("bundle", "offset")),
        Table("conflicts", _CONFLICTS, ("bundle", "offset", "kind")),
        Table("tombstones", _TOMBSTONES, ("bundle", "offset")),
        Table("forwards", _FORWARDS, ("forward", "StudyInstanceUID", "version")),
        Table("audit", _AUDIT, ("file", "position"), properties={"delta.appendOnly": "true"}),
        Table("annotations", _ANNOTATIONS, ("id", "version")),
        Table("bundles", _BUNDLES, ("bundle",)),
    )
}
"""Every table by name, in the order in which extraction writes them; `bundles` last, as it says what is done."""
