"""Queries without a catalog: how fast headers in the bundles are read, and how soon the first answer comes.

    python -m tests.bench.bench_files [--instances 20000] [--workers 2] [--root hdfs://...]

Prints instances per second of a query that reads every header, seconds to its first and last answer, a query by
StudyInstanceUID, and the memory of this process and of those beside it. Small CT slices, a study of 50 each.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

from sphere.catalog.queries import open_queries
from sphere.catalog.query import Query
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from tests.support.landing import land, new_member, slices

PER_STUDY = 50


def fill(settings: Settings, instances: int) -> None:
    """Land small CT slices, a study of PER_STUDY each."""
    studies = range(instances // PER_STUDY)
    for start in range(0, len(studies), 100):
        chosen = studies[start : start + 100]
        land(settings, (new_member(data) for study in chosen for data in slices(PER_STUDY, seed=study, study=study)))


def measure(settings: Settings, instances: int) -> None:
    """Ask, and print what it took."""
    with open_queries(settings) as queries:
        began = time.perf_counter()
        list(queries.find(Query.build("STUDY", {"StudyInstanceUID": "1.2"})))
        print(f"journals of {instances} instances read in {time.perf_counter() - began:.2f} s")
        list(queries.find(Query.build("STUDY", {"PatientName": "nobody"})))  # the processes start
        for level in ("STUDY", "IMAGE", "PATIENT"):
            began = time.perf_counter()
            answers = queries.find(Query.build(level, {"PatientName": "*"}, return_keys=["PatientName", "StudyDate"]))
            uid = next(answers).identifier().get("StudyInstanceUID")
            first = time.perf_counter() - began
            count = 1 + sum(1 for _ in answers)
            whole = time.perf_counter() - began
            rate = instances / whole
            print(f"{level:8}{count:8} answers: first {first:.3f} s, last {whole:.2f} s, {rate:,.0f} headers/s")
            if level == "STUDY":
                wanted = Query.build("SERIES", {"StudyInstanceUID": str(uid)}, return_keys=["Modality"])
        times = []
        for _ in range(20):
            began = time.perf_counter()
            assert list(queries.find(wanted))
            times.append(time.perf_counter() - began)
        print(f"series of a study of {PER_STUDY}: median {1000 * statistics.median(times):.1f} ms")
    for who, name in ((resource.RUSAGE_SELF, "this process"), (resource.RUSAGE_CHILDREN, "largest beside it")):
        print(f"memory of {name}: {resource.getrusage(who).ru_maxrss / 1024:.0f} MB")


def main() -> None:
    """Fill a temporary archive and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--root", default="file:storage", help="storage.root")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables = {
            "storage": {"root": options.root},
            "catalog": {"mode": "files", "scan_workers": options.workers},
        }
        settings = from_dict(tables, base=Path(folder))
        fill(settings, options.instances)
        measure(settings, options.instances)


if __name__ == "__main__":
    main()
