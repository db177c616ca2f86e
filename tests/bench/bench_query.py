"""Latency of the query service over a generated catalog: ``python -m tests.bench.bench_query --studies 100000``.

One process, one thread, answers read to their end; 4 series per study, 6 instances per series, sorted files of 100,000.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake

from sphere.catalog.query import Query
from sphere.catalog.schema import TABLES
from sphere.catalog.service import QueryService
from sphere.conf.settings import Settings
from tests.support.catalog import EPOCH, archive

SERIES, INSTANCES, ROWS_PER_FILE = 4, 6, 100_000
FAMILY = ["Doe", "Müller", "Petrov", "Yamada", "Hong", "O'Neil", "García", "Nguyen", "Smith", "Dupont"]


def write(settings: Settings, name: str, columns: dict[str, list[Any]]) -> None:
    """Append one file; columns that are not named are null."""
    schema = TABLES[name].schema
    count = len(next(iter(columns.values())))
    arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(count, f.type) for f in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    write_deltalake(f"{settings.catalog_root}/{name}", table, mode="append")


def generate(settings: Settings, studies: int) -> None:
    """The tables, sorted by study, in the order in which extraction commits them."""
    random.seed(1)
    uids = sorted(f"1.2.826.0.1.{number}" for number in range(studies))
    per_file = ROWS_PER_FILE // (SERIES * INSTANCES)
    for start in range(0, studies, per_file):
        part = [
            (u, f"{u}.{s}", f"{u}.{s}.{i}") for u in uids[start : start + per_file] for s in range(4) for i in range(6)
        ]
        study, series, sop = (list(column) for column in zip(*part, strict=True))
        write(
            settings,
            "instances",
            {
                "SOPInstanceUID": sop,
                "StudyInstanceUID": study,
                "SeriesInstanceUID": series,
                "InstanceNumber": [n % INSTANCES for n in range(len(sop))],
                "bundle": ["bundles/2024/01/01/x.tar"] * len(sop),
                "offset": list(range(len(sop))),
                "received_at": [EPOCH] * len(sop),
                "dataset": ['{"00080060":{"vr":"CS","Value":["CT"]}}'] * len(sop),
            },
        )
    rows = [(uid, f"{uid}.{series}") for uid in uids for series in range(SERIES)]
    modality = [random.choice(["CT", "MR", "US", "CR"]) for _ in rows]
    write(
        settings,
        "series",
        {"StudyInstanceUID": [r[0] for r in rows], "SeriesInstanceUID": [r[1] for r in rows], "Modality": modality},
    )
    patients = [random.randrange(studies // 2) for _ in uids]
    write(
        settings,
        "studies",
        {
            "StudyInstanceUID": uids,
            "patient_key": [f"8:P{patient:07}" for patient in patients],
            "PatientID": [f"P{patient:07}" for patient in patients],
            "PatientName": [f"{FAMILY[patient % 10]}{patient % 997}^Given{patient % 89}" for patient in patients],
            "AccessionNumber": [f"A{number:08}" for number in range(studies)],
            "StudyDate": [date(2004, 1, 1) + timedelta(days=random.randrange(7300)) for _ in uids],
            "ModalitiesInStudy": [sorted(set(modality[n * 4 : n * 4 + 4])) for n in range(studies)],
        },
    )
    write(settings, "bundles", {"bundle": ["x"]})


def questions(studies: int) -> Iterator[tuple[str, Callable[[], Query]]]:
    """Name and a maker of one random question each."""
    pick = lambda: random.randrange(studies)  # noqa: E731  a one-word maker reads better here
    asked = ["PatientName", "PatientID", "StudyDate", "ModalitiesInStudy", "AccessionNumber"]
    uid = lambda: f"1.2.826.0.1.{pick()}"  # noqa: E731
    study = lambda match: Query.build("STUDY", match, return_keys=asked)  # noqa: E731
    yield "PatientID", lambda: study({"PatientID": f"P{pick() // 2:07}"})
    yield "AccessionNumber", lambda: study({"AccessionNumber": f"A{pick():08}"})
    yield "StudyInstanceUID", lambda: study({"StudyInstanceUID": uid()})
    yield "date and modality", lambda: study({"StudyDate": "20200110-20200112", "ModalitiesInStudy": "MR"})
    yield "name wild card", lambda: study({"PatientName": f"müller{pick() % 997}*"})
    yield "series of a study", lambda: Query.build("SERIES", {"StudyInstanceUID": uid()}, return_keys=["Modality"])
    yield "instances of a series", lambda: Query.build("IMAGE", {"SeriesInstanceUID": f"{uid()}.1"})


def main() -> None:
    """Generate, build the index, ask; one line per question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sphere-bench-") as folder:
        settings = archive(Path(folder))
        began = time.perf_counter()
        generate(settings, options.studies)
        print(f"{options.studies:,} studies written in {time.perf_counter() - began:.1f} s")
        with QueryService(settings) as service:
            began = time.perf_counter()
            service.count(Query.build("STUDY", {"PatientID": "none"}))
            size = sum(path.stat().st_size for path in (settings.archive.state_dir / "index").glob("*.duckdb"))
            print(f"index built in {time.perf_counter() - began:.1f} s, {size / 1e6:.0f} MB")
            for name, make in questions(options.studies):
                times, answers = [], 0
                for _ in range(options.repeat):
                    query = make()
                    began = time.perf_counter()
                    answers += sum(1 for match in service.find(query) if match.identifier())
                    times.append((time.perf_counter() - began) * 1000)
                times.sort()
                p99 = times[int(len(times) * 0.99)]
                p50 = statistics.median(times)
                print(f"{name:24} p50 {p50:7.1f} ms  p99 {p99:7.1f} ms  {answers / options.repeat:6.1f} answers")


if __name__ == "__main__":
    main()
