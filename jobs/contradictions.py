"""Contradictions between instances, recorded in `conflicts`: a study with two patients, a series in two studies or with
two modalities, a patient with two birth dates or sexes.

They follow from what `instances` shows, and from where its rows stand in time, alone: of everything that is said of one
subject, what was said first stands, and each other thing has a row at the first instance that says it. So neither
batches nor their order matter, and running twice gives the same rows. Nothing is refused or changed for them. Saying
nothing (no PatientID, no birth date) contradicts nothing; neither does a frame of reference in two studies (PS3.3
C.7.4.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from sphere.catalog.schema import TABLES
from sphere.catalog.versions import Order
from sphere.jobs.lookup import shaped
from sphere.jobs.opened import At
from sphere.jobs.tables import Tables, read

Row = Mapping[str, Any]
Level = Literal["study", "series", "patient"]

SAID = (
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "Modality",
)
"""What of an instance can contradict another one."""
_SAID = pa.schema([TABLES["instances"].schema.field(column) for column in SAID])
_OWNER = ("StudyInstanceUID", "PatientID", "patient_key")
_PLACE = ("bundle", "offset", "length", "sha256", "received_at", "source_aet", "origin", "SOPInstanceUID")


def said(rows: pa.Table) -> pa.Table:
    """What rows of `instances` say (SAID), each combination once."""
    return shaped(rows, _SAID).group_by(list(SAID)).aggregate([]).select(SAID)


SUBJECTS: Mapping[Level, str] = {"study": "StudyInstanceUID", "series": "SeriesInstanceUID", "patient": "patient_key"}
"""What contradictions are about, and the column of a row that names it; null where the row says nothing of it."""

_KINDS: Sequence[tuple[str, Level, str]] = (
    ("STUDY_PATIENT", "study", "PatientID"),
    ("STUDY_ISSUER", "study", "IssuerOfPatientID"),
    ("SERIES_STUDY", "series", "StudyInstanceUID"),
    ("SERIES_MODALITY", "series", "Modality"),
    ("PATIENT_BIRTH_DATE", "patient", "PatientBirthDate"),
    ("PATIENT_SEX", "patient", "PatientSex"),
)
_TABLE: Mapping[Level, str] = {"study": "studies", "series": "series", "patient": "patients"}
_LEVEL: Mapping[str, Level] = {kind: level for kind, level, _ in _KINDS}


def contradicted(rows: Sequence[Row]) -> dict[Level, set[str]]:
    """The subjects of which the rows (of SAID, with `patient_key`) say more than one thing."""
    found: dict[Level, set[str]] = {level: set() for level in SUBJECTS}
    for _, level, column in _KINDS:
        first: dict[str, Any] = {}
        for row in rows:
            subject, value = row[SUBJECTS[level]], row[column]
            if subject and value and first.setdefault(subject, value) != value:
                found[level].add(subject)
    return found


def conflicts(rows: Iterable[Row], subjects: Mapping[Level, set[str]]) -> list[dict[str, Any]]:
    """Rows of `conflicts` for these subjects from all their rows of `instances`."""
    found: list[dict[str, Any]] = []
    in_time = sorted(rows, key=_order)
    for kind, level, column in _KINDS:
        heard: dict[str, dict[Any, Row]] = {}  # by subject, the first row that says each thing
        for row in in_time:
            subject, value = row[SUBJECTS[level]], row[column]
            if not value or subject not in subjects[level]:
                continue
            first = heard.setdefault(subject, {})
            if first and value not in first:
                found.append(_conflict(kind, subject, next(iter(first.values())), row, f"another {column}"))
            first.setdefault(value, row)
    return found


def _order(row: Row) -> Order:
    return row["received_at"], row["bundle"], row["offset"]


def _conflict(kind: str, subject: str, first: Row, row: Row, text: str) -> dict[str, Any]:
    names = ("bundle", "offset", "length", "SOPInstanceUID", "StudyInstanceUID", "received_at", "source_aet", "origin")
    return {
        **{name: row[name] for name in names},
        **{f"kept_{name}": first[name] for name in ("bundle", "offset", "sha256")},
        **{f"other_{name}": row[name] for name in ("bundle", "offset", "sha256")},
        "kind": kind,
        "subject": subject,
        "decision": "recorded",
        "detail": text,
    }


def doubted(tables: Tables, heard: pa.Table, studies: pa.Table, patients: pa.Table) -> set[str]:
    """Those of the `patients` (rows as they were) of which something else was ever said, or is now.

    `heard` is what some `studies` say (SAID). Who has a study with two patients is doubted too: what the patient's row
    says may be of the other one.
    """
    owners = {row["StudyInstanceUID"]: row for row in studies.select(_OWNER).to_pylist()}
    known = patients.select(["patient_key", "PatientBirthDate", "PatientSex"]).to_pylist()
    if not known:
        return set()
    present = [dict.fromkeys(SAID) | row for row in known] + [_owned(row, owners) for row in heard.to_pylist()]
    found = contradicted(present)["patient"]
    mixed = set()
    for row in _recorded(tables):
        if row["kind"] == "STUDY_PATIENT":
            mixed.add(row["subject"])
        elif _LEVEL[row["kind"]] == "patient":
            found.add(row["subject"])
    theirs = tables.find(
        "studies", ("patient_key",), key="StudyInstanceUID", values=mixed, at=tables.current("studies")
    )
    return found.union(theirs["patient_key"].to_pylist())


def record(
    tables: Tables,
    instances: At,
    *,
    heard: pa.Table,
    studies: pa.Table,
    series: pa.Table,
    before: Mapping[str, pa.Table],
) -> None:
    """Bring `conflicts` to the present for what changed.

    `heard` is what the studies that changed say now (SAID). `studies` has them and all the others of their patients
    (but not of patients who are not `doubted`), `series` their series and the same series in other studies, `before`
    the keys of `studies`, `series` and `patients` that they had.
    """
    owners = {row["StudyInstanceUID"]: row for row in studies.select(_OWNER).to_pylist()}
    found = [piece for rows in (heard, studies, series) for piece in shaped(rows, _SAID).to_pylist()]
    present = [_owned(row, owners) for row in found]
    changed: dict[Level, set[str]] = {level: {row[name] for row in present} for level, name in SUBJECTS.items()}
    for level, table in _TABLE.items():
        changed[level] |= set(before[table][SUBJECTS[level]].to_pylist())
    subjects = contradicted(present)
    recorded = [row for row in _recorded(tables) if row["subject"] in changed[_LEVEL[row["kind"]]]]
    for row in recorded:
        subjects[_LEVEL[row["kind"]]].add(row["subject"])
    if not any(subjects.values()):
        return
    uids = {
        row["StudyInstanceUID"] for row in present if any(row[SUBJECTS[level]] in subjects[level] for level in SUBJECTS)
    }
    rows = tables.find("instances", (*_PLACE, *SAID), key="StudyInstanceUID", values=uids, at=instances).to_pylist()
    now = conflicts([_owned(row, owners) for row in rows], subjects)
    places = {_place(row) for row in now}
    tables.merge("conflicts", now, gone=[row for row in recorded if _place(row) not in places])


def _owned(row: Row, owners: Mapping[str, Row]) -> dict[str, Any]:
    """The row with the `patient_key` of its study, unless it names another patient: then it contradicts its study
    already."""
    owner = owners.get(row["StudyInstanceUID"])
    same = owner is not None and row["PatientID"] in (owner["PatientID"], "", None)
    return {**row, "patient_key": owner["patient_key"] if owner and same else None}


def _place(row: Row) -> tuple[str, int, str]:
    return row["bundle"], row["offset"], row["kind"]


def _recorded(tables: Tables) -> Iterator[dict[str, Any]]:
    for piece in read(tables.current("conflicts"), ("bundle", "offset", "kind", "subject")):
        yield from (row for row in piece.to_pylist() if row["kind"] in _LEVEL)
