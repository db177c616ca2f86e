"""One batch of 20,000 new instances on catalogs of several sizes: ``make bench-growth``.

``python -m tests.bench.bench_growth [--studies 4000,200000] [--cores 2] [--folder DIR]``

A study has 25 instances on average: 4,000 studies are 100,000 instances, 1,000,000 are 25 million. The catalogs are
generated (tests.bench.hospital_catalog) and kept in the folder, if one is given. Per catalog: a first small batch,
which makes what is kept of the keys from nothing; then the batch of new instances, which is the figure; then the same
instances once more. "read" counts files and bytes of the catalog that the driver opened: tasks read bundles only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pyspark.sql import SparkSession

from sphere.conf.settings import Settings, from_dict
from sphere.ingest.storage.local import LocalStorage
from sphere.jobs.extract import run
from sphere.jobs.rollup import MARK
from sphere.jobs.session import spark_session
from sphere.jobs.synthetic import ct_series
from sphere.jobs.tables import Tables
from tests.bench.bench_extract import SLICES, land, machine, timed
from tests.bench.hospital_catalog import kept

BATCH = 20_000
FIRST = 2_000


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="Extraction while the catalog grows.")
    parser.add_argument("--studies", default="4000,200000", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--cores", default=os.cpu_count() or 1, type=int, help="cores that Spark may use")
    parser.add_argument("--folder", type=Path, help="where catalogs are kept; else a temporary folder")
    options = parser.parse_args()
    print(machine(options.cores, "tests.bench.bench_growth"))
    with tempfile.TemporaryDirectory(prefix="sphere-growth-") as temporary:
        folder = options.folder or Path(temporary)
        spark: SparkSession | None = None
        for studies in options.studies:
            catalog, hospital = kept(folder / f"{studies}", studies)
            settings = _archive(catalog, Path(temporary) / f"archive-{studies}", options.cores)
            spark = spark or _warm(settings, Path(temporary) / "warm", options.cores)
            print(f"\n## {studies} studies, {hospital.instances} instances", flush=True)
            _batches(spark, settings)
        if spark is not None:
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
        land(other, _slices(number, BATCH))
        run(spark, other)
    return spark


def _slices(seed: int, count: int) -> Iterator[bytes]:
    series = range(1000 * (seed + 1), 1000 * (seed + 1) + count // SLICES + 1)
    return islice((data for one in series for data in ct_series(SLICES, rows=8, columns=8, seed=one)), count)


def _batches(spark: SparkSession, settings: Settings) -> None:
    opened: Counter[str] = Counter()
    read = LocalStorage.read

    def counted(self: LocalStorage, path: str, offset: int = 0, length: int | None = None) -> bytes:
        data = read(self, path, offset, length)
        if path.endswith(".parquet"):
            opened[path] += len(data)
        return data

    LocalStorage.read = counted  # type: ignore[method-assign]
    try:
        for what, seed, count in (("first batch", 10, FIRST), ("new", 11, BATCH), ("the same again", 11, BATCH)):
            land(settings, _slices(seed, count))
            opened.clear()
            timing, report = timed(lambda: run(spark, settings))
            steps = ", ".join(f"{name} {s:.2f}" for name, s in report.seconds.items() if s >= 0.01)  # type: ignore[attr-defined]
            us, cpu, driver = (s / count * 1e6 for s in (timing.wall_s, timing.cpu_s, timing.driver_s))
            print(
                f"{what:14}  {count:>6}  {us:>6.0f} us each, {cpu:>5.0f} of CPU, {driver:>5.0f} of it the driver's; "
                f"read {len(opened)} files, {sum(opened.values()) / 1e6:.1f} MB; {steps}",
                flush=True,
            )
    finally:
        LocalStorage.read = read  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
