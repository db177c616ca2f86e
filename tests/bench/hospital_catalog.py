"""The catalog of an invented hospital: real Delta tables as extraction leaves them.

``python -m tests.bench.hospital_catalog --studies 100000 --folder DIR`` makes one, or finds it there from the last
time.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from sphere.catalog.rollup import roll_up_sql
from sphere.catalog.schema import INSTANCE_FIELDS, TABLES
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.jobs.headers import TASK_MEMBERS
from sphere.jobs.parquet import ROW_GROUP, FileWriter
from sphere.jobs.tables import NewFile, Tables, file_rows
from tests.bench.hospital import (
    BATCH_STUDIES,
    IMAGE_VALUES,
    KINDS,
    PER_BUNDLE,
    Batch,
    Hospital,
    Ints,
    as_type,
    patient_keys,
    received_us,
)

_MADE = "generated"
_LAYOUT = 4  # raised when rows or files change: catalogs kept from before are made anew


def _write_instances(settings: Settings, hospital: Hospital, batches: Sequence[Batch], threads: int) -> None:
    tables = Tables(settings)
    storage = open_storage(settings.catalog_root, user="")
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            total = len(batch.series)
            _ = batch.number, hospital.bundles  # made once, before the threads need them
            _ = hospital.series_values, hospital.study_values
            made = pool.map(functools.partial(_file, storage, batch), range(0, total, TASK_MEMBERS))
            tables.append("instances", list(made), onto=tables.ensure("instances"))


def _file(storage: Any, batch: Batch, start: int) -> NewFile:
    stop = min(len(batch.series), start + TASK_MEMBERS)
    writer = FileWriter(TABLES["instances"])
    for first in range(start, stop, ROW_GROUP):
        writer.add(batch.columns(first, min(stop, first + ROW_GROUP)))
    return writer.finish(storage, "instances")


def _write(settings: Settings, name: str, columns: dict[str, pa.Array]) -> None:
    schema = TABLES[name].schema
    count = len(next(iter(columns.values())))
    arrays = [
        as_type(columns[field.name], field.type) if field.name in columns else pa.nulls(count, field.type)
        for field in schema
    ]
    rows = pa.Table.from_arrays(arrays, schema=schema).sort_by([(key, "ascending") for key in TABLES[name].key])
    tables, storage = Tables(settings), open_storage(settings.catalog_root, user="")
    files = []
    for start in range(0, count, file_rows(name)):
        writer = FileWriter(TABLES[name])
        for batch in rows.slice(start, file_rows(name)).combine_chunks().to_batches(max_chunksize=ROW_GROUP):
            writer.add(batch)
        files.append(writer.finish(storage, name))
    tables.append(name, files, onto=tables.open(name))


def _sums(values: Ints, groups: Ints, count: int) -> Ints:
    return np.bincount(groups, weights=values, minlength=count).astype(np.int64)


def _roll_ups(settings: Settings, h: Hospital, first: int, last: int) -> None:
    """`series` and `studies` of studies [first, last)."""
    series = np.arange(h.first_series[first], h.first_series[last])
    study = h.study_of[series]
    count = h.instances_of[series]
    size = count * (1_900 + 2 * h.rows[study] ** 2)
    begin, classes = received_us(h, series) + 40_000, pa.array([[kind.sop_class] for kind in KINDS])
    end = received_us(h, series) + count * 40_000
    values = {name: column.take(pa.array(series)) for name, column in h.series_values.items()}
    _write(settings, "series", values | {
        "StudyInstanceUID": h.study_uid.take(pa.array(study)),
        "NumberOfSeriesRelatedInstances": pa.array(count),
        "sop_classes_in_series": classes.take(pa.array(h.kind[study])),
        "size_bytes": pa.array(size),
        "first_received_at": pa.array(begin, INSTANCE_FIELDS["received_at"]),
        "last_received_at": pa.array(end, INSTANCE_FIELDS["received_at"]),
    })  # fmt: skip
    number, kinds = last - first, pa.array(h.kind[first:last])
    starts = h.first_series[first:last] - h.first_series[first]
    values = {name: column.slice(first, number) for name, column in h.study_values.items()}
    _write(settings, "studies", values | {
        "patient_key": patient_keys(h).take(pa.array(h.patient[first:last])),
        "PatientAge": pa.repeat(pa.scalar(IMAGE_VALUES["PatientAge"]), number),
        "ModalitiesInStudy": pa.array([[kind.modality] for kind in KINDS]).take(kinds),
        "SOPClassesInStudy": classes.take(kinds),
        "NumberOfStudyRelatedSeries": pa.array(h.series_of[first:last]),
        "NumberOfStudyRelatedInstances": pa.array(_sums(count, study - first, number)),
        "size_bytes": pa.array(_sums(size, study - first, number)),
        "first_received_at": pa.array(np.minimum.reduceat(begin, starts), INSTANCE_FIELDS["received_at"]),
        "last_received_at": pa.array(np.maximum.reduceat(end, starts), INSTANCE_FIELDS["received_at"]),
    })  # fmt: skip


def _patients(settings: Settings, h: Hospital) -> None:
    files = [str(path) for path in (Path(settings.catalog_root.removeprefix("file://")) / "studies").glob("*.parquet")]
    with duckdb.connect(config={"memory_limit": "2GB"}) as db:
        db.execute("SET TimeZone = 'UTC'")
        rows = db.sql(roll_up_sql("patients", "read_parquet(?)"), params=[files]).to_arrow_table()
    _write(settings, "patients", {name: rows[name].combine_chunks() for name in rows.column_names})


def generate(settings: Settings, studies: int, *, seed: int = 1, threads: int = 2) -> Hospital:
    """Write all tables, in the order of extraction."""
    hospital = Hospital(studies, seed)
    _write_batches(settings, hospital, threads)
    for start, stop in _slices(studies, 250_000):
        _roll_ups(settings, hospital, start, stop)
    _patients(settings, hospital)
    _write_bundles(settings, hospital)
    return hospital


def nightly(settings: Settings, studies: int, *, seed: int) -> Hospital:
    """One more batch of extraction, of patients who are there already; without the roll-ups, which an index does not
    read for it."""
    hospital = Hospital(studies, seed)
    _write_batches(settings, hospital, 1)
    _write_bundles(settings, hospital)
    return hospital


def _write_batches(settings: Settings, hospital: Hospital, threads: int) -> None:
    batches = [Batch(hospital, start, stop) for start, stop in _slices(hospital.studies, BATCH_STUDIES)]
    _write_instances(settings, hospital, batches, threads)


def _write_bundles(settings: Settings, hospital: Hospital) -> None:
    names = hospital.bundles
    members = np.minimum(PER_BUNDLE, hospital.instances - np.arange(len(names)) * PER_BUNDLE)
    _write(settings, "bundles", {
        "bundle": names,
        "journal_bytes": pa.array(members * 640),
        "members": pa.array(members),
        "sealed": pa.array(np.full(len(names), True)),
    })  # fmt: skip


def _slices(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(count, start + size)


def kept(folder: Path, studies: int, *, seed: int = 1, threads: int = 2) -> tuple[Settings, Hospital]:
    """The archive in `folder`, made when it is not there yet."""
    settings = from_dict({"archive": {"ae_title": "TESTED"}}, base=folder)
    note = f"{_LAYOUT} {studies} {seed}"
    if (folder / _MADE).exists() and (folder / _MADE).read_text() == note:
        return settings, Hospital(studies, seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    hospital = generate(settings, studies, seed=seed, threads=threads)
    (folder / _MADE).write_text(note)
    return settings, hospital


def size_of(settings: Settings, name: str) -> tuple[int, int]:
    """Files and bytes of a table's present version."""
    actions = pa.table(DeltaTable(f"{settings.catalog_root}/{name}").get_add_actions(flatten=True))
    return len(actions), pc.sum(actions["size_bytes"]).as_py() or 0


def main() -> None:
    """Make a catalog and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True, help="where it is made, and found again")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began, cpu = time.perf_counter(), time.process_time()
    settings, hospital = kept(options.folder.absolute(), options.studies, seed=options.seed)
    print(
        f"{hospital.studies:,} studies, {len(hospital.study_of):,} series, {hospital.instances:,} instances, "
        f"{hospital.patients:,} patients in {time.perf_counter() - began:.0f} s ({time.process_time() - cpu:.0f} s CPU)"
    )
    for name in TABLES:
        if (options.folder / "storage/catalog" / name).is_dir():
            files, size = size_of(settings, name)
            print(f"  {name:10} {files:6,} files {size / 1e6:10,.1f} MB")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
