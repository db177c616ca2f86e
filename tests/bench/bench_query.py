"""Queries over generated catalogs of growing size, beside Orthanc with SQLite and with PostgreSQL, in one run.

``python -m tests.bench.bench_query --sizes 10000,100000`` (``make bench-query``): C-FIND over real associations to two
receiver processes, answers read to the end; the byte ranges of a study as retrieval asks for them. Catalogs are kept in
--folder. Orthanc has the headers of the first studies of the smallest catalog, as many as load within --load seconds;
SPHERE answers from the whole of it. --full: 10,000, 100,000 and 1,000,000 studies, and 20 minutes for each Orthanc.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from deltalake import DeltaTable

from sphere.catalog.index_maker import HOLD_S
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.conf.settings import Settings
from tests.bench import landing_servers
from tests.bench.hospital import DAYS, KINDS, Hospital
from tests.bench.hospital_catalog import kept, nightly
from tests.bench.query_client import Web, association, looping, percentile, question, together
from tests.bench.query_servers import load, memory_mib, orthanc, postgres, web

NIGHT = 800
"""Studies of a nightly batch: about 20,000 instances."""
STUDY_KEYS = ("PatientName", "PatientID", "StudyDate", "ModalitiesInStudy", "AccessionNumber", "StudyInstanceUID")
BROAD = 10_000

Makers = dict[str, Callable[[], bytes]]


@dataclass
class Line:
    """Times of one question to its last and to its first answer, in ms, and how many answers it had on average."""

    times: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    answers: float = 0.0

    def __str__(self) -> str:
        p50, p95, p99 = (percentile(self.times, share) for share in (0.5, 0.95, 0.99))
        first = f"  first p99 {percentile(self.firsts, 0.99):6.1f} ms" if self.firsts else ""
        return f"p50 {p50:8.1f}  p95 {p95:8.1f}  p99 {p99:8.1f} ms  {self.answers:8.1f} answers{first}"


class Questions:
    """Random questions about some of the studies of a hospital, for a server that has `held` studies of it (these)."""

    def __init__(self, hospital: Hospital, studies: Sequence[int], *, held: int = 0, seed: int = 3) -> None:
        self._h = hospital
        self._studies = studies
        self._held = held or len(studies)
        self._chance = random.Random(seed)

    def makers(self) -> Makers:
        """A maker of one encoded identifier for each kind of question."""
        study = self._study
        return {
            "PatientID": lambda: study(PatientID=self.value("PatientID")),
            "AccessionNumber": lambda: study(AccessionNumber=self.value("AccessionNumber")),
            "StudyInstanceUID": lambda: study(StudyInstanceUID=self.value("StudyInstanceUID")),
            "100 by date and modality": lambda: study(StudyDate=self._days(100), ModalitiesInStudy="MR"),
            "name wild card": lambda: study(PatientName=self._name()),
            "series of a study": self._series,
            "instances of a series": self._instances,
        }

    def broad(self) -> bytes:
        """Studies of a range of dates, about BROAD of them."""
        return self._study(StudyDate=self._days(BROAD, share=1.0))

    def _study(self, **match: str) -> bytes:
        return question("STUDY", dict.fromkeys(STUDY_KEYS, "") | match)

    def _pick(self) -> int:
        return int(self._chance.choice(self._studies))

    def value(self, keyword: str) -> str:
        """That of some study."""
        return str(self._h.study_values[keyword][self._pick()].as_py())

    def _name(self) -> str:
        family, _, given = self.value("PatientName").partition("=")[0].partition("^")
        return f"{family.lower()}^{given[:1]}*"

    def _days(self, answers: int, *, share: float = KINDS[1].share) -> str:
        """A range of dates in which about so many studies are: whole days, so rarely fewer."""
        spread = int(self._h.day[self._studies[-1]] - self._h.day[self._studies[0]] + 1)
        width = min(spread, max(1, math.ceil(answers * spread / (self._held * share))))
        first = int(self._h.day[self._studies[0]]) + self._chance.randrange(spread - width + 1)
        low, high = (np.datetime64("2004-01-01") + min(DAYS - 1, day) for day in (first, first + width - 1))
        return f"{str(low).replace('-', '')}-{str(high).replace('-', '')}"

    def _series(self) -> bytes:
        keys = ("SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription")
        return question("SERIES", dict.fromkeys(keys, "") | {"StudyInstanceUID": self.value("StudyInstanceUID")})

    def _instances(self) -> bytes:
        uid = self.value("StudyInstanceUID")
        keys = {"StudyInstanceUID": uid, "SeriesInstanceUID": f"{uid}.1", "SOPInstanceUID": "", "InstanceNumber": ""}
        return question("IMAGE", keys)


@dataclass
class Result:
    """What one server gave."""

    name: str
    lines: dict[str, Line]
    first_ms: float
    answers_per_s: float
    queries_per_s: float


def measure(name: str, port: int, ae_title: str, asked: Questions, options: argparse.Namespace) -> Result:
    """Put all questions to a server, and print what came of it."""
    lines: dict[str, Line] = {}
    makers = asked.makers()
    with association(port, ae_title) as requested:
        for what, make in makers.items():
            line = lines[what] = Line()
            total = 0
            for turn in range(options.repeat + 3):
                found = requested.ask(make())
                if turn >= 3:  # the first ones warm caches up
                    line.times.append(found.last_s * 1000)
                    line.firsts.append(found.first_s * 1000)
                    total += found.answers
            line.answers = total / options.repeat
            print(f"  {name:22} {what:26} {line}", flush=True)
        broad = min((requested.ask(asked.broad()) for _ in range(3)), key=lambda one: one.last_s)
    mix = [makers[what]() for what in ("PatientID", "AccessionNumber", "StudyInstanceUID") for _ in range(200)]
    rate = together(port, ae_title, mix, clients=16, seconds=options.seconds)
    result = Result(name, lines, broad.first_s * 1000, broad.answers / broad.last_s, rate)
    print(
        f"  {name:22} {broad.answers} answers: first after {result.first_ms:.1f} ms, {result.answers_per_s:,.0f} "
        f"answers/s; 16 clients: {rate:,.0f} queries/s",
        flush=True,
    )
    return result


def beside_broad(port: int, asked: Questions, repeat: int) -> None:
    """PatientID while two other clients loop queries of 10,000 answers; which receivers they have is as it comes."""
    line, total = Line(), 0
    make = asked.makers()["PatientID"]
    broad = [asked.broad() for _ in range(20)]
    with association(port, "SPHERE") as requested, looping(port, "SPHERE", broad, clients=2) as answers:
        before, began = answers.value, time.perf_counter()
        for _ in range(repeat):
            found = requested.ask(make())
            line.times.append(found.last_s * 1000)
            line.firsts.append(found.first_s * 1000)
            total += found.answers
            time.sleep(0.01)  # a lookup now and then, whatever the others are at
        rate = (answers.value - before) / (time.perf_counter() - began)
    line.answers = total / repeat
    print(
        f"  {'SPHERE, 2 ask broadly':22} {'PatientID':26} {line}; meanwhile {rate:,.0f} answers/s for them", flush=True
    )


def over_qido(settings: Settings, asked: Questions, repeat: int) -> None:
    """The lines of single keys over QIDO-RS, beside the receivers."""
    with web(settings) as (port, process):
        client = Web(port)
        for keyword in ("PatientID", "AccessionNumber", "StudyInstanceUID"):
            line, total = Line(), 0
            for turn in range(repeat + 3):
                found = client.ask(f"/dicom-web/studies?{keyword}={asked.value(keyword)}")
                if turn >= 3:
                    line.times.append(found.last_s * 1000)
                    total += found.answers
            line.answers = total / repeat
            print(f"  {'SPHERE, QIDO-RS':22} {keyword:26} {line}", flush=True)
        client.close()
        print(f"  memory of the web server: {memory_mib([process]):,.0f} MiB (PSS, shared with the receivers)")


def bench_size(studies: int, options: argparse.Namespace) -> tuple[Settings, Hospital]:
    """One point of the curve: index from nothing, every question, a nightly batch."""
    began = time.perf_counter()
    settings, hospital = kept(options.folder / str(studies), studies)
    print(
        f"\n{studies:,} studies, {len(hospital.study_of):,} series, {hospital.instances:,} instances "
        f"(catalog at hand after {time.perf_counter() - began:.0f} s)"
    )
    shutil.rmtree(settings.archive.state_dir / "index", ignore_errors=True)
    began, cpu = time.perf_counter(), time.process_time()
    with QueryService(settings) as service:
        service.count(Query.build("STUDY", {"PatientID": "none"}))
        size = sum(path.stat().st_size for path in (settings.archive.state_dir / "index").glob("*.duckdb"))
        print(
            f"  index ready from nothing after {time.perf_counter() - began:.1f} s "
            f"({time.process_time() - cpu:.1f} s CPU), {size / 1e6:,.0f} MB"
        )
        print(f"  {'byte ranges of 1,000':22} {'(Python call)':26} {_ranges(service, hospital, options.repeat)}")
    with landing_servers.sphere(settings.archive.state_dir.parent) as (port, processes, _):
        options.results[studies] = measure("SPHERE", port, "SPHERE", Questions(hospital, range(studies)), options)
        for _ in range(4):  # the receivers that take the associations differ
            beside_broad(port, Questions(hospital, range(studies)), options.repeat)
        over_qido(settings, Questions(hospital, range(studies)), options.repeat)
        print(f"  memory of the two receivers: {memory_mib([process.pid for process in processes]):,.0f} MiB (PSS)")
    _nightly(settings, hospital)
    return settings, hospital


def _ranges(service: QueryService, hospital: Hospital, repeat: int) -> Line:
    chance, line, found = random.Random(5), Line(), 0
    large = [int(study) for study in hospital.large()]
    for _ in range(repeat):
        uid = hospital.study_uid[chance.choice(large)].as_py()
        began = time.perf_counter()
        found += sum(1 for _ in service.lookup_instances(study=[uid]))
        line.times.append((time.perf_counter() - began) * 1000)
    line.answers = found / repeat
    return line


def _nightly(settings: Settings, hospital: Hospital) -> None:
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
    print(
        f"  nightly batch of {batch.instances:,} instances: in the answers {seconds:.2f} s after its commit; meanwhile "
        f"{len(waits)} queries, the longest {max(waits):.0f} ms"
    )
    for name, version in versions.items():
        DeltaTable(f"{settings.catalog_root}/{name}").restore(version)


def rivals(settings: Settings, hospital: Hospital, options: argparse.Namespace) -> None:
    """Both Orthancs on what they load of the smallest catalog, SPHERE on the same questions, and the ratios."""
    with _rivals_folder(options) as folder, _servers(folder) as servers:
        results, asked = [], []
        for what, port in servers:
            loaded = load(port, settings, folder / f"{what}.json", seconds=options.load)
            print(
                f"\n{what}: {len(loaded.studies):,} studies, {loaded.instances:,} instances loaded in "
                f"{loaded.seconds:.0f} s"
            )
            wanted = {uid: number for number, uid in enumerate(hospital.study_uid.to_pylist())}
            asked = sorted(wanted[uid] for uid in loaded.studies)
            results.append(measure(what, port, "ORTHANC", Questions(hospital, asked), options))
        with landing_servers.sphere(settings.archive.state_dir.parent) as (port, _, _):
            questions = Questions(hospital, asked, held=hospital.studies)  # as many answers from more studies
            ours = measure("SPHERE, same questions", port, "SPHERE", questions, options)
    for theirs in results:
        print(f"\nSPHERE ({hospital.studies:,} studies) against {theirs.name}, p50 and p99, times as fast:")
        for what, line in theirs.lines.items():
            ratios = [percentile(line.times, s) / percentile(ours.lines[what].times, s) for s in (0.5, 0.99)]
            print(f"  {what:26} {ratios[0]:6.1f}  {ratios[1]:6.1f}")
        print(f"  {'answers/s':26} {ours.answers_per_s / theirs.answers_per_s:6.1f}")
        print(f"  {'queries/s of 16 clients':26} {ours.queries_per_s / theirs.queries_per_s:6.1f}")


@contextmanager
def _rivals_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Where the rivals' databases are, and what each was given: temporary, or kept for the next time."""
    if options.rivals_folder is not None:
        yield options.rivals_folder.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="bench-query-") as name:
        yield Path(name)


@contextmanager
def _servers(folder: Path) -> Iterator[Iterator[tuple[str, int]]]:
    def each() -> Iterator[tuple[str, int]]:
        with orthanc(folder / "sqlite") as port:
            yield "Orthanc + SQLite", port
        with postgres(folder / "postgres") as database, orthanc(folder / "postgresql", postgresql=database) as port:
            yield "Orthanc + PostgreSQL", port

    servers = each()
    try:
        yield servers
    finally:
        servers.close()


def main() -> None:
    """Every size, then the rivals; one line per question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000", help="studies of each catalog")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sphere-bench-query")
    parser.add_argument("--repeat", type=int, default=100, help="times that each question is put")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long 16 clients ask")
    parser.add_argument("--load", type=float, default=60.0, help="seconds for loading each Orthanc; 0 leaves them out")
    parser.add_argument(
        "--rivals-folder", type=Path, help="where the loaded Orthancs are kept; else a temporary folder"
    )
    parser.add_argument("--full", action="store_true", help="up to 1,000,000 studies; load for 20 minutes")
    options = parser.parse_args()
    if options.full:
        options.sizes, options.load = "10000,100000,1000000", 1200.0
    options.folder = options.folder.absolute()
    options.results = {}
    smallest = None
    for studies in sorted(map(int, options.sizes.split(","))):
        made = bench_size(studies, options)
        smallest = smallest or made
    print("\np50 in ms by studies")
    for what in next(iter(options.results.values())).lines:
        points = (f"{percentile(r.lines[what].times, 0.5):9.1f} at {size:>9,}" for size, r in options.results.items())
        print(f"  {what:26} {'  '.join(points)}")
    if options.load and smallest is not None:
        rivals(*smallest, options)


if __name__ == "__main__":
    main()
