"""Queries over generated catalogs of growing size, beside Orthanc with SQLite and with PostgreSQL, in one run.

``python -m tests.bench.bench_query --sizes 10000,100000`` (``make bench-query``): C-FIND over real associations to two
receiver processes, answers read to the end; QIDO-RS; the byte ranges of a study as retrieval asks for them. Catalogs
are kept in --folder. Orthanc, with its DICOMweb plugin, has the headers of the first studies of the smallest catalog,
as many as load within --load seconds; SPHERE answers the same questions from the whole of it. Where a study's bytes
are, Orthanc is asked over its own HTTP interface (the list of a study's instances with their files). --full: 10,000,
100,000 and 1,000,000 studies, and 20 minutes for each Orthanc. Every line is in --report as soon as it is measured.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

from deltalake import DeltaTable

from sphere.catalog.index_maker import HOLD_S
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.conf.settings import Settings
from tests.bench import landing_servers
from tests.bench.bench_extract import machine
from tests.bench.hospital import Hospital
from tests.bench.hospital_catalog import kept, nightly
from tests.bench.query_questions import WARM, Questions, beside_broad, over_dimse
from tests.bench.query_report import Line, Report, Server
from tests.bench.query_rivals import qido, rivals
from tests.bench.query_servers import memory_mib, web

NIGHT = 800
"""Studies of a nightly batch: about 20,000 instances."""


def bench_size(studies: int, options: argparse.Namespace, report: Report) -> tuple[Settings, Hospital]:
    """One point of the curve: index from nothing, every question, a nightly batch."""
    began = time.perf_counter()
    settings, hospital = kept(options.folder / str(studies), studies)
    print(
        f"\n{studies:,} studies, {len(hospital.study_of):,} series, {hospital.instances:,} instances "
        f"(catalog at hand after {time.perf_counter() - began:.0f} s)"
    )
    server = report.server("SPHERE", studies, ours=True)
    shutil.rmtree(settings.archive.state_dir / "index", ignore_errors=True)
    began, cpu = time.perf_counter(), time.process_time()
    with QueryService(settings) as service:
        service.count(Query.build("STUDY", {"PatientID": "none"}))
        size = sum(path.stat().st_size for path in (settings.archive.state_dir / "index").glob("*.duckdb"))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        report.number(server, "index from nothing, s", seconds, f"({cpu:.1f} s CPU), {size / 1e6:,.0f} MB")
        report.line(server, "where the bytes of 1,000 are", _ranges(service, hospital, options.repeat))
    asked = Questions(hospital, range(studies))
    with landing_servers.sphere(settings.archive.state_dir.parent) as (port, processes, _):
        over_dimse(server, port, "SPHERE", asked, options, report)
        for _ in range(4):  # the receivers that take the associations differ
            beside_broad(server, port, asked, options.repeat, report)
        with web(settings) as (http, process):
            qido(http, asked, options.repeat, lambda what, line: report.line(server, what, line))
            receivers = [one.pid for one in processes]
            note = f"PSS; the web server {memory_mib([process]):,.0f}"
            report.number(server, "memory of who serves, MiB", memory_mib([*receivers, process]), note)
    _nightly(server, settings, hospital, report)
    return settings, hospital


def _ranges(service: QueryService, hospital: Hospital, repeat: int) -> Line:
    """A call of Python in the process that has the index, as who serves retrieval makes it."""
    chance, line, found = random.Random(5), Line(), 0
    large = [int(study) for study in hospital.large()]
    service.count(Query.build("STUDY", {"PatientID": "none"}))  # the index is there
    for turn in range(repeat + WARM):
        uid = hospital.study_uid[chance.choice(large)].as_py()
        began = time.perf_counter()
        count = sum(1 for _ in service.lookup_instances(study=[uid]))
        if turn >= WARM:
            line.times.append((time.perf_counter() - began) * 1000)
            found += count
    line.answers = found / repeat
    return line


def _nightly(server: Server, settings: Settings, hospital: Hospital, report: Report) -> None:
    """Commit a batch, and ask on until it is in the answers; the tables are put back."""
    versions = {name: DeltaTable(f"{settings.catalog_root}/{name}").version() for name in ("instances", "bundles")}
    known = Query.build("STUDY", {"AccessionNumber": hospital.study_values["AccessionNumber"][0].as_py()})
    with QueryService(settings, apart=True) as service:  # as who serves has it
        service.count(known)
        time.sleep(HOLD_S + 5)  # who serves has done so for a while: the maker of indexes is ready
        batch = nightly(settings, NIGHT, seed=time.time_ns() % 1_000_000)
        new = Query.build("STUDY", {"StudyInstanceUID": batch.study_uid[0].as_py()})
        began, waits = time.perf_counter(), []
        while True:
            asked = time.perf_counter()
            assert service.count(known) >= 1
            waits.append((time.perf_counter() - asked) * 1000)
            if service.count(new):
                break
        seconds = time.perf_counter() - began
    note = (
        f"after its commit, {batch.instances:,} instances; meanwhile {len(waits)} queries, longest {max(waits):.0f} ms"
    )
    report.number(server, "nightly batch in the answers, s", seconds, note)
    for name, version in versions.items():
        DeltaTable(f"{settings.catalog_root}/{name}").restore(version)


def _same_questions(
    settings: Settings, hospital: Hospital, known: list[int], options: argparse.Namespace, report: Report
) -> None:
    """What the rivals were asked, asked of the whole of the catalog that their studies are from."""
    print("\nSPHERE, the same questions", flush=True)
    server = report.server("SPHERE, same questions", hospital.studies, ours=True)
    asked = Questions(hospital, known, held=hospital.studies)  # as many answers from more studies
    with QueryService(settings) as service:
        report.line(server, "where the bytes of 1,000 are", _ranges(service, hospital, options.repeat))
    with landing_servers.sphere(settings.archive.state_dir.parent) as (port, _, _):
        over_dimse(server, port, "SPHERE", asked, options, report)
        with web(settings) as (http, _):
            qido(http, asked, options.repeat, lambda what, line: report.line(server, what, line))


def main() -> None:
    """Every size, then the rivals; a line for each question, and all of them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000", help="studies of each catalog")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sphere-bench-query")
    parser.add_argument("--repeat", type=int, default=100, help="times that each question is put")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long 16 clients ask")
    parser.add_argument("--load", type=float, default=60.0, help="seconds for loading each Orthanc; 0 leaves them out")
    parser.add_argument(
        "--rivals-folder", type=Path, help="where the loaded Orthancs are kept; else a temporary folder"
    )
    parser.add_argument("--report", type=Path, help="where lines are kept as JSON; else bench-query.jsonl in --folder")
    parser.add_argument("--full", action="store_true", help="up to 1,000,000 studies; load for 20 minutes")
    options = parser.parse_args()
    if options.full:
        options.sizes, options.load = "10000,100000,1000000", 1200.0
    options.folder = options.folder.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    report = Report(options.report or options.folder / "bench-query.jsonl")
    report.began(machine(0, "tests.bench.bench_query"))
    smallest = None
    for studies in sorted(map(int, options.sizes.split(","))):
        made = bench_size(studies, options, report)
        smallest = smallest or made
    if options.load and smallest is not None:
        _same_questions(*smallest, rivals(*smallest, options, report), options, report)
    print("\nms (p50 / p99) where no unit is named; last, how many times as fast by p50, p99\n")
    print(report.table())
    if options.load:
        print("\n".join(["", "Less than three times as fast:", *(report.slower() or ["no line"])]))


if __name__ == "__main__":
    main()
