"""One batch of 20,000 new instances on catalogs of several sizes: ``make bench-growth``.

``python -m tests.bench.bench_growth [--studies 4000,200000] [--cores 2] [--folder DIR] [--rounds 1]``

A study has 25 instances on average: 4,000 studies are 100,000 instances, 1,000,000 are 25 million. The catalogs are
generated (tests.bench.hospital_catalog) and kept in the folder, if one is given. There is a first small batch, which
makes what is kept of the keys from nothing; then batches of new instances, which are the figure: of new patients, a
series more for each study of that batch, and new studies of patients from all over the catalog, twice; all this as
often as there are rounds, with the medians in the end; then the instances of a batch once more. The catalogs take
turns: each batch goes to all of them before the next one. All runs are of one process, as those of `sphere serve` are,
each of which goes on with the tables that the one before has opened. "read" counts files and bytes of the catalog that
the driver opened: tasks read bundles only. "merged" are the files that a batch took out of a table (-) and put in (+).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import chain, islice
from pathlib import Path

from deltalake import DeltaTable
from pyspark.sql import SparkSession

from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.storage.local import LocalStorage
from sphere.jobs.extract import Kept, run
from sphere.jobs.report import Report
from sphere.jobs.rollup import MARK
from sphere.jobs.session import spark_session
from sphere.jobs.synthetic import ct_series
from sphere.jobs.tables import Tables
from tests.bench.bench_extract import SLICES, land, machine, timed
from tests.bench.hospital import Hospital
from tests.bench.hospital_catalog import kept

BATCH = 20_000
FIRST = 2_000
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="Extraction while the catalog grows.")
    parser.add_argument("--studies", default="4000,200000", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--cores", default=os.cpu_count() or 1, type=int, help="cores that Spark may use")
    parser.add_argument("--folder", type=Path, help="where catalogs are kept; else a temporary folder")
    parser.add_argument("--rounds", default=1, type=int, help="batches of each kind, of which the median is told")
    options = parser.parse_args()
    print(machine(options.cores, "tests.bench.bench_growth"))
    with tempfile.TemporaryDirectory(prefix="sphere-growth-") as temporary:
        folder = options.folder or Path(temporary)
        archives = []
        for studies in options.studies:
            catalog, hospital = kept(folder / f"{studies}", studies)
            settings = _archive(catalog, Path(temporary) / f"archive-{studies}", options.cores)
            archives.append(_Growing(settings, hospital, Kept(settings)))
        spark = _warm(archives[0].settings, Path(temporary) / "warm", options.cores)
        _by_turns(spark, archives, options.rounds)
        spark.stop()


def _archive(catalog: Settings, folder: Path, cores: int) -> Settings:
    """An archive with a copy of the catalog, whose roll-ups say that they show it."""
    root = Path(catalog.catalog_root.removeprefix("file://"))
    shutil.copytree(root, folder / "catalog", copy_function=_link)
    sections = {"catalog": {"root": "file:catalog"}, "spark": {"master": f"local[{cores}]"}}
    settings = from_dict(sections, base=folder)
    tables = Tables(settings)
    mark = (MARK, tables.ensure("instances").version())
    for name in ("patients", "studies", "series"):
        tables.append(name, [], onto=tables.ensure(name), mark=mark)
    return settings


def _link(source: str, target: str) -> None:
    """Data files are never changed: links will do, but for the log."""
    if source.endswith(".parquet") and "_delta_log" not in source:
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


def _warm(settings: Settings, folder: Path, cores: int) -> SparkSession:
    spark = spark_session(settings, app_name="growth")
    for number in range(3):
        other = from_dict({"spark": {"master": f"local[{cores}]"}}, base=folder / str(number))
        (folder / str(number)).mkdir(parents=True)
        land(other, _Series(number, BATCH))
        run(spark, other)
    return spark


@dataclass(frozen=True)
class _Series:
    """Series of `slices` instances: each a study of its own, of patients from all over a hospital if one is given, or
    one series more for each study of the seed `studies`."""

    seed: int
    count: int
    studies: int | None = None
    patients: Hospital | None = None
    slices: int = SLICES

    def __iter__(self) -> Iterator[bytes]:
        number = self.count // self.slices + 1
        first = _number(self.seed if self.studies is None else self.studies)
        series = (
            ct_series(
                self.slices, rows=8, columns=8, seed=_number(self.seed) + n, study=first + n,
                patient=_patient(self.patients, n / number),
            )
            for n in range(number)
        )  # fmt: skip
        return islice(chain.from_iterable(series), self.count)


def _patient(hospital: Hospital | None, at: float) -> dict[str, str]:
    """What is known of a patient, so that nothing contradicts it."""
    if hospital is None:
        return {}
    one = {name: hospital.patient_values[name][int(at * hospital.patients)].as_py() for name in PATIENT}
    return {name: f"{value:%Y%m%d}" if isinstance(value, date) else value for name, value in one.items()}


def _number(seed: int) -> int:
    return 1000 * (seed + 1)


def _planned(rounds: int) -> Iterator[tuple[str, _Series, bool]]:
    """What batches there are, and whether their patients are those of the hospital."""
    yield "first batch", _Series(10, FIRST), False
    for seed in range(11, 11 + 10 * rounds, 10):
        yield "new patients", _Series(seed, BATCH), False
        yield "new patients", _Series(seed + 1, BATCH), False
        yield "series more", _Series(seed + 2, BATCH, studies=seed), False
        yield "known patients", _Series(seed + 3, BATCH, slices=25), True
        yield "known patients", _Series(seed + 4, BATCH, slices=25), True
    yield "the same again", _Series(14, BATCH, slices=25), True


@dataclass
class _Growing:
    """A catalog, and what its batches took: us an instance by the clock, of CPU, of it the driver's, and by the clock
    besides the reading of headers; and the steps' seconds."""

    settings: Settings
    hospital: Hospital
    kept: Kept
    figures: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    steps: dict[str, list[Mapping[str, float]]] = field(default_factory=dict)


def _by_turns(spark: SparkSession, archives: Sequence[_Growing], rounds: int) -> None:
    """Each batch goes to one catalog after the other, and the next one the other way round: so what else the machine
    does, and whatever is warm by then, meets all of them."""
    turn = list(archives)
    for what, batch, known in _planned(rounds):
        for one in turn:
            _batch(spark, one, what, replace(batch, patients=one.hospital) if known else batch)
        turn.reverse()
    for one in archives:
        print(f"\n## {one.hospital.studies} studies, {one.hospital.instances} instances")
        for what, found in one.figures.items():
            *each, rest = _medians(found)
            print(f"median of {len(found)}  {what:16}  {_each(each)}; {rest:.0f} us by the clock besides headers")
            names = dict.fromkeys(name for steps in one.steps[what] for name in steps)
            print(f"    {_steps({name: statistics.median(s.get(name, 0) for s in one.steps[what]) for name in names})}")
    first, last = archives[0], archives[-1]
    print(f"\n## {last.hospital.studies} studies to {first.hospital.studies}")
    for what, found in first.figures.items():
        ratios = [few and many / few for few, many in zip(_medians(found), _medians(last.figures[what]), strict=True)]
        print("{:16}  {:.2f} by the clock, {:.2f} by CPU".format(what, *ratios))


def _batch(spark: SparkSession, one: _Growing, what: str, batch: _Series) -> None:
    opened: Counter[str] = Counter()
    read = LocalStorage.read

    def counted(self: LocalStorage, path: str, offset: int = 0, length: int | None = None) -> bytes:
        data = read(self, path, offset, length)
        if path.endswith(".parquet"):
            opened[path] += len(data)
        return data

    land(one.settings, batch)
    before = _files(one.settings)
    LocalStorage.read = counted  # type: ignore[method-assign]
    try:
        timing, report = timed(lambda: run(spark, one.settings, kept=one.kept))
    finally:
        LocalStorage.read = read  # type: ignore[method-assign]
    assert isinstance(report, Report)
    each = [s / batch.count * 1e6 for s in (timing.wall_s, timing.cpu_s, timing.driver_s)]
    headers = report.seconds.get("headers", 0.0) / batch.count * 1e6
    one.figures.setdefault(what, []).append((*each, each[0] - headers))
    one.steps.setdefault(what, []).append(report.seconds)
    merged = _merged(before, _files(one.settings))
    print(
        f"{one.hospital.studies:>7} {what:16}  {batch.count:>6}  {_each(each)}; read {len(opened)} files, "
        f"{sum(opened.values()) / 1e6:.1f} MB; {_steps(report.seconds)}; merged {merged}",
        flush=True,
    )


def _medians(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(one) for one in zip(*rows, strict=True)]


def _steps(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {s:.3f}" for name, s in seconds.items() if s >= 0.001)


def _each(us: Sequence[float]) -> str:
    return "{:>6.0f} us each, {:>5.0f} of CPU, {:>5.0f} of it the driver's".format(*us)


def _files(settings: Settings) -> dict[str, set[str]]:
    names = ("instances", "patients", "studies", "series", "bundles")
    return {name: set(DeltaTable(f"{settings.catalog_root}/{name}").file_uris()) for name in names}


def _merged(before: dict[str, set[str]], after: dict[str, set[str]]) -> str:
    return ", ".join(
        f"{name} -{len(files - after[name])} +{len(after[name] - files)} of {len(files)}"
        for name, files in before.items()
        if files != after[name]
    )


if __name__ == "__main__":
    main()
