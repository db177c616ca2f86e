"""Extraction in instances per second, and the naive way beside it in the same run: ``make bench``.

``python -m tests.bench.bench_extract [--headers ct,small,naive] [--sizes 10000,100000] [--repeat 3] [--cores 2]``

Instances are landed in bundles first; what is timed is `sphere extract` from the lock to the last commit into a new
catalog, in a session that did extractions before (its start, and theirs, is printed apart). The sizes take turns, so
that none is always the first; of each the median is compared. "per core" divides by the cores that Spark may use; "CPU"
is what the processes of the job took, and is the figure to go by on a machine that does other work too.
The naive way is Spark's ``binaryFile`` source, pydicom and its DICOM JSON, written as Parquet.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import psutil
import pyarrow as pa
from pydicom import Dataset, FileMetaDataset, dcmread, dcmwrite
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from pyspark.sql import SparkSession

from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter, NewMember
from sphere.ingest.header import Header, HeaderReader, identify
from sphere.ingest.storage import open_storage
from sphere.jobs.extract import run
from sphere.jobs.session import spark_session
from sphere.jobs.synthetic import ct_series
from tests.conftest import CORPUS

SLICES = 250  # of one series
COPIES = 20  # of each real header, with SOP Instance UIDs of their own
WARM_UP = 20_000  # instances of each extraction before the first that counts
WARM_UPS = 4
SMALL_WARM_UPS = 150  # of 1,000 instances: the JVM has compiled the job by then, as in a service of some hours
AGAIN = 3  # runs of a small size for one of the largest, of which each lasts as long as ten: other load hits it whole
SENDERS = 64  # threads that land members, so that many share one sync


@dataclass(frozen=True)
class Timing:
    """Seconds by the clock, and of CPU in the Python workers, in the JVM and in the driver."""

    wall_s: float
    workers_s: float
    jvm_s: float
    driver_s: float

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU in all processes."""
        return self.workers_s + self.jvm_s + self.driver_s


def main() -> None:
    """Print the figures."""
    options = _options()
    print(machine(options.cores, "tests.bench.bench_extract"))
    with tempfile.TemporaryDirectory(prefix="sphere-bench-", dir=options.folder) as folder:
        bench = Bench(Path(folder), options.cores)
        bench.warm_up()
        for name, kind, make in (("ct", "CT-like, 75 elements", ct_like), ("small", "small, 14 elements", small)):
            if name in options.headers:
                print(f"\n## Extraction of {kind} headers, whole job, each into a new catalog")
                print(_Row.header())
                bench.sizes(make, options.sizes, options.repeat)
        if "naive" in options.headers:
            print("\n## Beside the naive way, same files, same session")
            bench.beside_naive("CT-like, 75 elements", list(ct_like(2000)))
            if CORPUS.exists():
                bench.beside_naive(f"real CT and MR headers, {COPIES} copies each", list(real_headers()))
        bench.spark.stop()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Extraction against the naive way.")
    parser.add_argument(
        "--headers", default="ct,small,naive", help="which of the parts", type=lambda text: text.split(",")
    )
    parser.add_argument("--sizes", default="10000,100000", type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("--repeat", default=3, type=int, help="runs of the largest size; others have more")
    parser.add_argument("--cores", default=os.cpu_count() or 1, type=int, help="cores that Spark may use")
    parser.add_argument("--folder", type=Path, help="where archives are made (about 700 MB); a temporary folder else")
    return parser.parse_args()


def machine(cores: int, module: str) -> str:
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"date      {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC\n"
        f"machine   {os.cpu_count()} x {model}, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f} at the start\n"
        f"command   {' '.join(['python -m', module, *sys.argv[1:]])}"
        f"{f' (Spark on {cores} cores)' if cores else ''}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


@dataclass(frozen=True)
class _Row:
    n: int
    cores: int
    timing: Timing
    steps: dict[str, float]

    @property
    def us(self) -> float:
        """Microseconds by the clock, per instance."""
        return self.timing.wall_s / self.n * 1e6

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU, per instance."""
        return self.timing.cpu_s / self.n * 1e6

    @staticmethod
    def header() -> str:
        return (
            f"{'instances':>9}  {'s':>6}  {'/s':>7}  {'/s/core':>7}  {'us/inst':>7}  "
            f"{'CPU us/inst: workers':>20}  {'JVM':>5}  {'driver':>6}  {'/CPU s':>7}  steps in s"
        )

    def __str__(self) -> str:
        timing, n = self.timing, self.n
        steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.steps.items() if seconds >= 0.005)
        return (
            f"{n:>9}  {timing.wall_s:>6.2f}  {n / timing.wall_s:>7.0f}  {n / timing.wall_s / self.cores:>7.0f}  "
            f"{timing.wall_s / n * 1e6:>7.0f}  {timing.workers_s / n * 1e6:>20.0f}  {timing.jvm_s / n * 1e6:>5.0f}  "
            f"{timing.driver_s / n * 1e6:>6.0f}  {n / timing.cpu_s:>7.0f}  {steps}"
        )


_STATE = {"state_dir": "state-of-one-run"}


class Bench:
    """One Spark session, and archives that come and go."""

    def __init__(self, folder: Path, cores: int) -> None:
        self.folder = folder
        self.cores = cores
        self._made = 0
        start = time.monotonic()
        self.spark: SparkSession = spark_session(self._archive(), app_name="bench")
        print(f"session   {time.monotonic() - start:.1f} s to start Spark")

    def _archive(self) -> Settings:
        self._made += 1
        folder = self.folder / str(self._made)
        folder.mkdir()
        return from_dict({"spark": {"master": f"local[{self.cores}]"}}, base=folder)

    def _extract(self, settings: Settings, n: int) -> _Row:
        """One extraction of everything that landed, into a new catalog, which is removed again."""
        base = settings.archive.state_dir.parent
        fresh = from_dict(
            {"spark": {"master": f"local[{self.cores}]"}, "catalog": {"root": "file:catalog"}, "archive": _STATE},
            base=base,
        )
        timing, report = timed(lambda: run(self.spark, fresh))
        assert (report.read, report.rows) == (n, n), report
        for folder in (base / "catalog", fresh.archive.state_dir):
            shutil.rmtree(folder, ignore_errors=True)
        return _Row(n, self.cores, timing, dict(report.seconds))

    def warm_up(self) -> None:
        """Start the Python workers, and let the JVM compile what the job uses most."""
        settings = self._archive()
        land(settings, ct_like(1000))
        walls = [self._extract(settings, 1000).timing.wall_s for _ in range(SMALL_WARM_UPS)]
        print(f"warm-up   {walls[0]:.1f} s for 1000 instances, {walls[-1]:.1f} s the last of {SMALL_WARM_UPS}")
        settings = self._archive()
        land(settings, ct_like(WARM_UP))
        for _ in range(WARM_UPS):
            row = self._extract(settings, WARM_UP)
            print(f"warm-up   {row.timing.wall_s:.1f} s for {WARM_UP} instances", flush=True)

    def sizes(self, make: Callable[[int], Iterable[bytes]], sizes: Sequence[int], repeat: int) -> None:
        """Land once for each size; extract by turns, the smaller sizes AGAIN times each; compare the medians."""
        archives = {n: self._archive() for n in sizes}
        rows: dict[int, list[_Row]] = {n: [] for n in sizes}
        for n, settings in archives.items():
            land(settings, make(n))
        turns = [n for _ in range(repeat) for size in sizes for n in [size] * (1 if size == max(sizes) else AGAIN)]
        for n in (*turns, min(sizes)):
            rows[n].append(self._extract(archives[n], n))
            print(rows[n][-1], flush=True)
        for n in sizes:
            us, cpu = (statistics.median(getattr(row, what) for row in rows[n]) for what in ("us", "cpu_us"))
            rate = 1e6 / us / self.cores
            print(
                f"median of {len(rows[n])}: {n} instances, {us:.0f} us each ({cpu:.0f} of CPU), {rate:.0f}/s per core"
            )
        for what, name in (("us", "by the clock"), ("cpu_us", "by CPU")):
            few, many = (statistics.median(getattr(row, what) for row in rows[n]) for n in (min(sizes), max(sizes)))
            print(f"cost per instance at {min(sizes)} : at {max(sizes)} = {few / many:.2f} {name}", flush=True)
        for settings in archives.values():
            shutil.rmtree(settings.archive.state_dir.parent)

    def beside_naive(self, kind: str, files: list[bytes]) -> None:
        """Our way and the naive one over the same files."""
        settings = self._archive()
        land(settings, files)
        ours, report = timed(lambda: run(self.spark, settings))
        assert report.rows == len(files), report
        plain = settings.archive.state_dir.parent / "plain"
        plain.mkdir()
        for number, data in enumerate(files):
            (plain / f"{number:06}.dcm").write_bytes(data)
        naive, rows = timed(lambda: naive_extraction(self.spark, plain))
        assert rows == len(files)
        n = len(files)
        print(f"{kind}: {n} files of {sum(map(len, files)) / n / 1e3:.1f} kB")
        for name, timing in (("naive", naive), ("extract", ours)):
            print(f"  {name:8} {n / timing.wall_s:>7.0f} /s   {n / timing.cpu_s:>7.0f} /CPU s   {timing.wall_s:.2f} s")
        print(
            f"  ratio    {naive.wall_s / ours.wall_s:.1f} by the clock, {naive.cpu_s / ours.cpu_s:.1f} by CPU",
            flush=True,
        )
        shutil.rmtree(settings.archive.state_dir.parent)


def timed(work: Callable[[], object]) -> tuple[Timing, object]:
    """Run, with the clock and the CPU of this process and all below it."""
    before, start = _cpu(), time.monotonic()
    result = work()
    wall = time.monotonic() - start
    after = _cpu()
    spent = {kind: after[kind] - before[kind] for kind in after}
    return Timing(wall, spent["workers"], spent["jvm"], spent["driver"]), result


def _cpu() -> dict[str, float]:
    spent = {"workers": 0.0, "jvm": 0.0, "driver": 0.0}
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        kind = "driver" if process == me else "jvm" if "java" in process.name() else "workers"
        times = process.cpu_times()
        spent[kind] += times.user + times.system
    return spent


def naive_extraction(spark: SparkSession, folder: Path) -> int:
    """Whole files through Spark's binaryFile, pydicom and its JSON; returns the rows written."""
    target = folder.with_name("naive.parquet")
    spark.read.format("binaryFile").load(str(folder)).select("path", "content").mapInArrow(
        _naive_rows, "path string, StudyInstanceUID string, Modality string, dataset string"
    ).write.mode("overwrite").parquet(str(target))
    return spark.read.parquet(str(target)).count()


def _naive_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        rows = []
        for path, content in zip(batch["path"].to_pylist(), batch["content"].to_pylist(), strict=True):
            dataset = dcmread(io.BytesIO(content), stop_before_pixels=True, force=True)
            json = dataset.to_json(suppress_invalid_tags=True)
            rows.append(
                {
                    "path": path,
                    "StudyInstanceUID": str(dataset.StudyInstanceUID),
                    "Modality": dataset.Modality,
                    "dataset": json,
                }
            )
        yield pa.RecordBatch.from_pylist(rows)


def ct_like(n: int) -> Iterator[bytes]:
    """CT slices of 32 by 32 pixels, three series a study."""
    series = (-(-n // SLICES)) + 1
    return islice(
        (data for seed in range(series) for data in ct_series(SLICES, rows=32, columns=32, seed=seed, study=seed // 3)),
        n,
    )


def small(n: int) -> Iterator[bytes]:
    """Secondary captures with little more than what makes them an instance."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    marks = {
        "SOPInstanceUID": "9" * 40,
        "SeriesInstanceUID": "8" * 40,
        "StudyInstanceUID": "7" * 40,
        "PatientID": "666666666666",
    }
    texts = {
        "SOPClassUID": SecondaryCaptureImageStorage,
        "Modality": "OT",
        "PatientName": "Small^Instance",
        "StudyDate": "20240102",
    }
    for keyword, value in {**texts, **marks}.items():
        setattr(dataset, keyword, value)
    dataset.Rows = dataset.Columns = 8
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = bytes(64)
    dataset["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset, enforce_file_format=True)
    for number in range(n):
        data = buffer.getvalue()
        for (keyword, mark), group in zip(marks.items(), (1, 50, 100, 100), strict=True):
            value = str(number // group).zfill(len(mark) - 6)
            data = data.replace(
                mark.encode(),
                (f"ID{value}".ljust(len(mark)) if keyword == "PatientID" else f"2.25.1{value}").encode(),
            )
        yield data


def real_headers() -> Iterator[bytes]:
    """Every CT and MR file of the corpus that gives a row, in copies that differ in their SOP Instance UID."""
    chance = random.Random(7)
    reader = HeaderReader(max_header=1 << 26)
    with (CORPUS / "INDEX.csv").open(newline="", encoding="utf-8") as file:
        names = [row["file"] for row in csv.DictReader(file) if row["modality"] in ("CT", "MR")]
    for name in names:
        data = (CORPUS / name).read_bytes()
        uid = identify(data, size=len(data)).SOPInstanceUID
        if len(data) > 2 << 20 or not uid:
            continue
        for _ in range(COPIES):
            new = f"2.25.{''.join(chance.choices('123456789', k=len(uid) - 5))}"
            copy = data.replace(uid.encode(), new.encode())
            header = reader.read(copy, size=len(copy), fetch=_within(copy))
            if isinstance(header, Header) and header.values["SOPInstanceUID"] == new:
                yield copy


def _within(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, count: data[offset : offset + count]


def land(settings: Settings, files: Iterable[bytes]) -> None:
    """Store the files as import would, many at a time."""
    writer = BundleWriter(open_storage(settings.storage.root), settings)

    def store(data: bytes) -> None:
        found = identify(data, size=len(data))
        writer.store(
            NewMember(
                SOPInstanceUID=found.SOPInstanceUID,
                SOPClassUID=found.SOPClassUID,
                StudyInstanceUID=found.StudyInstanceUID,
                SeriesInstanceUID=found.SeriesInstanceUID,
                TransferSyntaxUID=found.TransferSyntaxUID,
                source_aet="BENCH",
                origin="dimse:BENCH@127.0.0.1",
                received_at=datetime.now(timezone.utc),
                preamble=data[: found.dataset_offset],
                dataset=memoryview(data)[found.dataset_offset :],
            )
        )

    with ThreadPoolExecutor(SENDERS) as pool:
        for _ in pool.map(store, files):
            pass
    writer.close()


if __name__ == "__main__":
    main()
