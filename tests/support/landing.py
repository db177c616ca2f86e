"""Archives with something in them, and what their tables hold."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, QueryBuilder
from deltalake.exceptions import TableNotFoundError
from pydicom import dcmread, dcmwrite

from sphere.catalog.annotations import About, Annotations, Target
from sphere.catalog.schema import TABLES
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter, NewMember
from sphere.ingest.header import identify
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from sphere.jobs.synthetic import ct_series

START = datetime(2026, 3, 1, 8, 0, 0, 250, tzinfo=timezone.utc)


def archive(folder: Path, **sections: Any) -> Settings:
    """Settings of an archive below `folder`, its sections changed by name; the folder's name needs quoting in a URL."""
    base = {"spark": {"master": "local[2]", "shuffle_partitions": 2}, "extract": {"every_s": 0, "lock_wait_s": 0}}
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    return from_dict(merged, base=folder)


def copy_of(settings: Settings, folder: Path, **sections: Any) -> Settings:
    """Another archive with the same bytes and tables as one on local disk, below `folder` (which must not exist)."""
    origin = settings.archive.state_dir.parent
    shutil.copytree(origin, folder)
    return archive(folder, **sections)


def new_member(data: bytes, *, second: float = 0, source_aet: str = "MODALITY", origin: str = "test") -> NewMember:
    """A file as import would store it, received `second` seconds after START."""
    found = identify(data, size=len(data))
    start = found.dataset_offset
    return NewMember(
        SOPInstanceUID=found.SOPInstanceUID,
        SOPClassUID=found.SOPClassUID,
        StudyInstanceUID=found.StudyInstanceUID,
        SeriesInstanceUID=found.SeriesInstanceUID,
        TransferSyntaxUID=found.TransferSyntaxUID,
        source_aet=source_aet,
        origin=origin,
        received_at=START + timedelta(seconds=second),
        preamble=data[:start],
        dataset=memoryview(data)[start:],
    )


def land(settings: Settings, members: Iterable[NewMember]) -> list[MemberRecord]:
    """Store the members in a bundle of their own, sealed."""
    writer = BundleWriter(open_storage(settings.storage.root, user=settings.storage.user), settings)
    try:
        return [writer.store(member) for member in members]
    finally:
        writer.close()


def slices(n: int, **values: Any) -> list[bytes]:
    """Small synthetic CT slices; arguments as of `ct_series`."""
    return list(ct_series(n, **{"rows": 8, "columns": 8, **values}))


def mixture(settings: Settings) -> int:
    """Land new instances, copies, other versions, an older version again, and rubbish; three bundles, mixed in time."""
    first, second = slices(4, seed=1), slices(3, seed=2, study=1)
    other = [changed(first[0], PatientComments=text) for text in ("corrected", "corrected again")]
    moved = changed(first[1], SeriesInstanceUID="1.2.3.4", SeriesNumber=9)
    truncated = first[3][:700]
    bundles = [
        [(first[0], 0), (first[1], 7), (second[0], 1), (b"", 2), (truncated, 3)],
        [(other[0], 5), (second[0], 0.5), (first[0], 6), (b"not DICOM" * 40, 4), (truncated, 8)],
        [(first[2], 9), (other[1], 10), (other[0], 11), (moved, 6.5), (second[1], 12), (second[2], 12)],
    ]
    for bundle in bundles:
        land(settings, [new_member(data, second=second) for data, second in bundle])
    return sum(len(bundle) for bundle in bundles)


def annotate(settings: Settings, study: str = "1.2.3") -> str:
    """Link a file of two versions to a study; its id."""
    annotations = Annotations(settings)
    draft = annotations.begin(About(type="note"), made_by="test")
    draft.write(b"first")
    made = draft.commit(Target.unknown("STUDY", study))
    draft = annotations.begin_version(made.id, About(), made_by="test")
    draft.commit()
    annotations.close()
    return made.id


def changed(data: bytes, **attributes: Any) -> bytes:
    """The same file with other attribute values."""
    dataset = dcmread(io.BytesIO(data))
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset)
    return buffer.getvalue()


def table_rows(settings: Settings, name: str) -> list[dict[str, Any]]:
    """Every row of a table, in the order of its key; nothing where there is no table."""
    try:
        table = DeltaTable(f"{settings.catalog_root}/{name}")
    except TableNotFoundError:
        return []
    rows = pa.table(QueryBuilder().register("rows", table).execute("SELECT * FROM rows")).to_pylist()
    key = TABLES[name].key
    ordered = sorted(rows, key=lambda row: tuple(row[column] for column in key))
    keys = [tuple(row[column] for column in key) for row in ordered]
    assert len(keys) == len(set(keys)), f"{name}: a key stands twice"
    return ordered


def all_tables(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Every table of the catalog."""
    return {name: table_rows(settings, name) for name in TABLES}


def by_uid(settings: Settings) -> dict[str, dict[str, Any]]:
    """Rows of `instances` by SOP Instance UID."""
    return {row["SOPInstanceUID"]: row for row in table_rows(settings, "instances")}
