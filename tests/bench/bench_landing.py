"""How fast instances land: ``make bench-landing`` (``LANDING="--small 500 --no-hdfs"`` for options).

Sender: DCMTK's storescu, one process an association, (a) as shipped and (b) with TCP_NODELAY=1 in its environment.
Every receiver ends a run with everything on disk: SPHERE, Orthanc and the pynetdicom server before each Success,
storescp by one syncfs at the end, whose time is counted in. Times run from the start of the senders to the exit of the
last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid
from rich.console import Console
from rich.table import Table

from sphere.ingest.storage import open_storage
from tests.bench import landing_servers as servers
from tests.support.dicom_tools import require_tool

ASSOCIATIONS = (1, 4, 16)
CLIENTS = {"as shipped": {}, "TCP_NODELAY=1": servers.NODELAY}
SIZES = {"39 kB": 128, "526 kB": 512}  # rows and columns of the CT
Target = Callable[[Path], AbstractContextManager[servers.Server]]
TARGETS: dict[str, Target] = {
    "SPHERE": servers.sphere,
    "storescp": lambda folder: servers.storescp(folder, tuned=False),
    "storescp, TCP_NODELAY=1": lambda folder: servers.storescp(folder, tuned=True),
    "Orthanc": lambda folder: servers.orthanc(folder, tuned=False),
    "Orthanc, TCP_NODELAY=1": lambda folder: servers.orthanc(folder, tuned=True),
    "pynetdicom": servers.pynetdicom,
}
console = Console(width=140)


@dataclass(frozen=True)
class Load:
    """Files in one folder per association, all of one size."""

    folders: tuple[Path, ...]
    count: int
    size: int  # bytes of all of them

    @property
    def each(self) -> float:
        return self.size / self.count


def make_load(folder: Path, rows: int, count: int) -> Load:
    """`count` CT instances of one study, over 16 folders."""
    source = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    if rows != source.Rows:
        source.Rows = source.Columns = rows
        source.PixelData = np.random.default_rng(rows).integers(0, 2000, (rows, rows), dtype="uint16").tobytes()
    folders = tuple(folder / f"{number:02d}" for number in range(max(ASSOCIATIONS)))
    for path in folders:
        path.mkdir(parents=True)
    size = 0
    for number in range(count):
        source.SOPInstanceUID = source.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        path = folders[number % len(folders)] / f"{number:05d}.dcm"
        source.save_as(path)
        size += path.stat().st_size
    return Load(folders, count, size)


def send(load: Load, port: int, associations: int, environment: dict[str, str]) -> None:
    """Send all of `load` over that many associations at once; raises when storescu reports a failure."""
    share = len(load.folders) // associations
    plain = {name: value for name, value in os.environ.items() if name not in servers.NODELAY}
    running = [
        subprocess.Popen(
            [require_tool("storescu"), "+sd", "-R", "127.0.0.1", str(port), *map(str, load.folders[at : at + share])],
            env=plain | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for at in range(0, len(load.folders), share)
    ]  # fmt: skip
    for process in running:
        output = process.communicate()[0]
        if process.returncode or b"Fail" in output:
            raise AssertionError(output.decode(errors="replace")[-500:])


def rate(load: Load, server: servers.Server, associations: int, environment: dict[str, str], repeat: int) -> float:
    """Instances per second, the median of `repeat` runs."""
    port, _, sync = server
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        send(load, port, associations, environment)
        sync()
        seconds.append(time.perf_counter() - started)
    return load.count / statistics.median(seconds)


@contextmanager
def fresh(base: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, on the disk of the others."""
    folder = Path(tempfile.mkdtemp(dir=base)) / "server"
    yield folder
    shutil.rmtree(folder.parent)


def measure(base: Path, counts: dict[str, int], repeat: int) -> dict[tuple[str, str, str, int], float]:
    """Instances per second by (client, size, target, associations).

    Pairs that wait for delayed ACKs get an eighth of the load, once: 45 ms an instance do not vary.
    """
    found: dict[tuple[str, str, str, int], float] = {}
    for size, rows in SIZES.items():
        whole = make_load(base / size, rows, counts[size])
        eighth = make_load(base / f"{size} eighth", rows, max(16, counts[size] // 8))
        for target, start in TARGETS.items():
            with fresh(base) as folder, start(folder) as server:
                for client, environment in CLIENTS.items():
                    quick = target == "SPHERE" or (bool(environment) and target not in ("storescp", "Orthanc"))
                    for n in ASSOCIATIONS:
                        load, runs = (whole, repeat) if quick else (eighth, 1)
                        found[client, size, target, n] = rate(load, server, n, environment, runs)
                console.print(f"{target}, {size}: peak memory {servers.peak_mib(server[1]):.0f} MiB a process")
    return found


def report(found: dict[tuple[str, str, str, int], float]) -> None:
    """A table for each client and size, and what the aims are measured by."""
    for client in CLIENTS:
        for size, rows in SIZES.items():
            table = Table(title=f"instances/s, sender {client}, CT of {size}", title_justify="left")
            for column in ("receiver", *(f"{n} association{'s' * (n > 1)}" for n in ASSOCIATIONS), "MB/s (best)"):
                table.add_column(column, justify="left" if column == "receiver" else "right")
            for target in TARGETS:
                rates = [found[client, size, target, n] for n in ASSOCIATIONS]
                best = max(rates) * (rows * rows * 2 + 6500) / 1e6
                table.add_row(target, *(f"{each:,.0f}" for each in rates), f"{best:,.0f}")
            console.print(table)
    for size in SIZES:
        tuned, shipped = "TCP_NODELAY=1", "as shipped"
        ours = {client: found[client, size, "SPHERE", 1] for client in CLIENTS}
        ratios = {
            "storescp, both tuned, sender tuned": ours[tuned] / found[tuned, size, "storescp, TCP_NODELAY=1", 1],
            "Orthanc, both tuned, sender tuned": ours[tuned] / found[tuned, size, "Orthanc, TCP_NODELAY=1", 1],
            "storescp, all as shipped": ours[shipped] / found[shipped, size, "storescp", 1],
            "Orthanc, all as shipped": ours[shipped] / found[shipped, size, "Orthanc", 1],
            "itself, 16 associations to one": found[tuned, size, "SPHERE", 16] / ours[tuned],
        }
        for what, ratio in ratios.items():
            console.print(f"SPHERE, {size}: {ratio:.2f} x {what}")


def disk(base: Path, size: float) -> None:
    """What the disk itself gives: appends of one instance's size, each followed by fdatasync."""
    data, path = os.urandom(int(size)), base / "disk.bin"
    with path.open("wb", buffering=0) as file:
        started = time.perf_counter()
        for _ in range(200):
            file.write(data)
            os.fdatasync(file.fileno())
        each = (time.perf_counter() - started) / 200
    path.unlink()
    console.print(
        f"disk: appends of {size / 1e3:.0f} kB with fdatasync: {1 / each:,.0f}/s, {size / each / 1e6:,.0f} MB/s"
    )


def hdfs(base: Path, count: int, repeat: int) -> None:
    """Landing on HDFS against one raw stream of hdfs-native with an hsync for each instance, and for each eighth."""
    from tests.support.hdfs import HdfsCluster

    load = make_load(base / "hdfs load", SIZES["526 kB"], count)
    with HdfsCluster(base / "hdfs") as cluster:
        raw = {group: _raw_stream(cluster.hdfs_url, int(load.each), count, group) for group in (1, 8)}
        with fresh(base) as folder, servers.sphere(folder, root=f"{cluster.hdfs_url}/sphere") as server:
            for associations, group in ((1, 1), (16, 8)):
                ours = rate(load, server, associations, servers.NODELAY, repeat)
                console.print(
                    f"HDFS, 526 kB, {associations} associations: {ours:,.0f}/s, {ours * load.each / 1e6:,.0f} MB/s; "
                    f"raw stream, hsync per {group}: {raw[group]:,.0f}/s; {100 * ours / raw[group]:.0f} %"
                )


def _raw_stream(url: str, size: int, count: int, group: int) -> float:
    data = os.urandom(size)
    appender = open_storage(url).create(f"raw-{group}.bin")
    started = time.perf_counter()
    for number in range(1, count + 1):
        appender.write([data])
        if number % group == 0:
            appender.sync()
    appender.close()
    return count / (time.perf_counter() - started)


def main() -> None:
    """Run all of it and print the tables."""
    parser = argparse.ArgumentParser(prog="make bench-landing LANDING=", description=__doc__)
    parser.add_argument("--small", type=int, default=1200, help="instances of 39 kB a run")
    parser.add_argument("--large", type=int, default=480, help="instances of 526 kB a run")
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the median counts")
    parser.add_argument("--no-hdfs", action="store_true", help="leave HDFS out")
    parser.add_argument("--dir", type=Path, help="folder on the disk to be measured")
    options = parser.parse_args()
    keep = nullcontext(str(options.dir)) if options.dir else tempfile.TemporaryDirectory(prefix="sphere-landing-")
    with keep as name, tempfile.TemporaryDirectory(dir=name) as work:
        base = Path(work)
        for size in (39_206, 530_758):
            disk(base, size)
        report(measure(base, {"39 kB": options.small, "526 kB": options.large}, options.repeat))
        if not options.no_hdfs:
            hdfs(base, options.large // 2, options.repeat)


if __name__ == "__main__":
    main()
