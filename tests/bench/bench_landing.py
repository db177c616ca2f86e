"""How fast instances land: ``make bench-landing`` (``LANDING="--rounds 1 --no-hdfs"`` for options).

Sender: DCMTK's storescu, one process an association, (a) as shipped and (b) with TCP_NODELAY=1 in its environment.
Every receiver ends a run with everything on disk: SPHERE, Orthanc and the pynetdicom server before each Success,
storescp by one syncfs at the end, whose time is counted in. Times run from the start of the senders to the exit of the
last. Receivers take turns, round by round, so that what else the machine does hits all of them; ratios are medians of
the ratios within a round. CPU time is that of the processes, and does not depend on the load of the machine. Every
run sends instances that nobody has seen: a copy need not be stored. Each association sends as many.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from pydicom.data import get_testdata_file
from rich.console import Console
from rich.table import Table

from sphere.ingest.storage import open_storage
from tests.bench import landing_memory
from tests.bench import landing_servers as servers
from tests.support.dicom_tools import require_tool

ASSOCIATIONS = (1, 4, 16)
SHIPPED, TUNED = "as shipped", "TCP_NODELAY=1"
CLIENTS = {SHIPPED: {}, TUNED: servers.NODELAY}
SIZES = {"39 kB": 128, "526 kB": 512}  # rows and columns of the CT
OURS, NULL = "SPHERE", "SPHERE, keeping nothing"
Target = Callable[[Path], AbstractContextManager[servers.Server]]
TARGETS: dict[str, Target] = {
    OURS: servers.sphere,
    NULL: lambda folder: servers.sphere(folder, kind="null"),
    "storescp": lambda folder: servers.storescp(folder, tuned=False),
    "storescp, TCP_NODELAY=1": lambda folder: servers.storescp(folder, tuned=True),
    "Orthanc": lambda folder: servers.orthanc(folder, tuned=False),
    "Orthanc, TCP_NODELAY=1": lambda folder: servers.orthanc(folder, tuned=True),
    "pynetdicom": servers.pynetdicom,
}
STALLED = ("storescp", "Orthanc")  # they wait for delayed ACKs, whatever the sender does
SLOW = ("Orthanc, TCP_NODELAY=1", "pynetdicom")
console = Console(width=150)


@dataclass(frozen=True)
class Load:
    """Files of one size, as many in the folder of each association; `places` are where their instance UID stands."""

    folders: tuple[Path, ...]
    each: int  # files a folder
    size: int  # bytes of a file
    places: tuple[int, ...]

    def renew(self) -> None:
        """Make other instances of them, on disk before this returns: nobody else's sync has to bring them there."""
        for folder in self.folders:
            for path in folder.iterdir():
                uid = new_uid().encode()
                with path.open("r+b", buffering=0) as file:
                    for place in self.places:
                        file.seek(place)
                        file.write(uid)
        os.sync()


@dataclass
class Runs:
    """Runs of one receiver: instances/s round by round, and ms of CPU an instance, of senders and receiver."""

    rates: list[float] = field(default_factory=list)
    sender_ms: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


Found = dict[tuple[str, str, str, int], Runs]  # by client, size, target, associations


def new_uid() -> str:
    """A UID (PS3.5 B.2) that always has 44 characters."""
    return f"2.25.1{random.randrange(10**38):038d}"


def make_load(folder: Path, rows: int, each: int) -> Load:
    """`each` CT instances, of one study, for every association."""
    source = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    if rows != source.Rows:
        source.Rows = source.Columns = rows
        source.PixelData = np.random.default_rng(rows).integers(0, 2000, (rows, rows), dtype="uint16").tobytes()
    uid = source.SOPInstanceUID = source.file_meta.MediaStorageSOPInstanceUID = new_uid()
    folder.mkdir(parents=True)
    source.save_as(folder / "first.dcm")
    data = (folder / "first.dcm").read_bytes()
    folders = tuple(folder / f"{number:02d}" for number in range(max(ASSOCIATIONS)))
    for path in folders:
        path.mkdir()
        for number in range(each):
            (path / f"{number:05d}.dcm").write_bytes(data)
    return Load(folders, each, len(data), tuple(match.start() for match in re.finditer(uid.encode(), data)))


def send(load: Load, port: int, associations: int, environment: dict[str, str]) -> None:
    """Send over that many associations at once, a folder each; raises when storescu reports a failure."""
    plain = {name: value for name, value in os.environ.items() if name not in servers.NODELAY}
    running = [
        subprocess.Popen(
            [require_tool("storescu"), "+sd", "-R", "127.0.0.1", str(port), str(folder)],
            env=plain | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for folder in load.folders[:associations]
    ]  # fmt: skip
    for process in running:
        output = process.communicate()[0]
        if process.returncode or b"Fail" in output:
            told = output.decode(errors="replace")[-500:]
            raise AssertionError(f"storescu ended with {process.returncode}: {told}")


def run(load: Load, server: servers.Server, associations: int, environment: dict[str, str], runs: Runs) -> None:
    """One run, of instances that the server has not seen if `load` was renewed."""
    port, processes, sync = server
    count = load.each * associations
    sending, serving, started = _children_s(), servers.cpu_s(processes), time.perf_counter()
    send(load, port, associations, environment)
    sync()
    runs.rates.append(count / (time.perf_counter() - started))
    runs.sender_ms.append(1000 * (_children_s() - sending) / count)
    runs.server_ms.append(1000 * (servers.cpu_s(processes) - serving) / count)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def fresh(base: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, on the disk of the others."""
    folder = Path(tempfile.mkdtemp(dir=base)) / "server"
    yield folder
    shutil.rmtree(folder.parent)


def measure(base: Path, size: str, each: int, rounds: int, found: Found) -> None:
    """All receivers, clients and numbers of associations for one size of instance; `each` instances an association.

    Receivers that wait for delayed ACKs get a sixteenth of the load, once: 45 ms an instance do not vary. Slow ones get
    a quarter.
    """
    loads = {part: make_load(base / f"{size} {part}", SIZES[size], max(4, each // part)) for part in (1, 4, 16)}
    with ExitStack() as stack:
        running = {}
        for target, start in TARGETS.items():
            running[target] = stack.enter_context(start(stack.enter_context(fresh(base))))
        for client, environment in CLIENTS.items():
            for number in range(rounds):
                for n in ASSOCIATIONS:
                    for load in loads.values():
                        load.renew()
                    for target, server in running.items():
                        stalled = target in STALLED or (client == SHIPPED and target not in (OURS, NULL))
                        if stalled and number:
                            continue
                        load = loads[16 if stalled else 4 if target in SLOW else 1]
                        run(load, server, n, environment, found.setdefault((client, size, target, n), Runs()))
                    if not number:
                        console.print(f"{size}, {client}, {n} associations: first round done")
        for target, server in running.items():
            console.print(f"{target}, {size}: peak memory {servers.peak_mib(server[1]):.0f} MiB a process")


def report(found: Found, size: str) -> None:
    """A table for each client."""
    for client in CLIENTS:
        table = Table(title=f"instances/s, sender {client}, CT of {size}", title_justify="left")
        last = ("MB/s (best)", "CPU ms an instance, 1 / 16: receiver", "and sender")
        for column in ("receiver", *(f"{n} association{'s' * (n > 1)}" for n in ASSOCIATIONS), *last):
            table.add_column(column, justify="left" if column == "receiver" else "right")
        for target in TARGETS:
            runs = [found[client, size, target, n] for n in ASSOCIATIONS]
            best = max(each.rate for each in runs) * instance_bytes(size) / 1e6
            cpu = [
                " / ".join(f"{statistics.median(values):.2f}" for values in pair)
                for pair in ((runs[0].server_ms, runs[-1].server_ms), (runs[0].sender_ms, runs[-1].sender_ms))
            ]
            table.add_row(target, *(f"{each.rate:,.0f}" for each in runs), f"{best:,.0f}", *cpu)
        console.print(table)


def instance_bytes(size: str) -> int:
    return SIZES[size] ** 2 * 2 + 6500


def ratio(ours: Runs, theirs: Runs) -> float:
    """The median of the ratios within a round; of the medians where the rival ran once."""
    if len(ours.rates) != len(theirs.rates):
        return ours.rate / theirs.rate
    return statistics.median(a / b for a, b in zip(ours.rates, theirs.rates, strict=True))


def aims(found: Found, size: str, disk_mb_s: float) -> None:
    """What is wanted, what was reached, and where the machine ends."""

    def of(client: str, target: str, n: int = 1) -> Runs:
        return found[client, size, target, n]

    one = of(TUNED, OURS)
    wanted = {
        "storescp, all as shipped": (ratio(of(SHIPPED, OURS), of(SHIPPED, "storescp")), 10.0),
        "Orthanc, all as shipped": (ratio(of(SHIPPED, OURS), of(SHIPPED, "Orthanc")), 10.0),
        "storescp, all TCP_NODELAY=1": (ratio(one, of(TUNED, "storescp, TCP_NODELAY=1")), 1.0),
        "Orthanc, all TCP_NODELAY=1": (ratio(one, of(TUNED, "Orthanc, TCP_NODELAY=1")), 2.0),
        "one association, 16 of them": (ratio(of(TUNED, OURS, 16), one), 2.0),
    }
    for what, (reached, aim) in wanted.items():
        say(f"{size}: {reached:.2f} x {what}", reached >= aim, f"{aim:g} x")
    sender_ms = statistics.median(of(TUNED, OURS, 16).sender_ms)
    ceiling = 1000 * (os.cpu_count() or 1) / sender_ms
    console.print(
        f"  of which 16 senders allow: {ratio(of(TUNED, NULL, 16), one):.2f} x with a receiver that keeps nothing; "
        f"{ceiling / one.rate:.2f} x if receiving cost nothing at all "
        f"({os.cpu_count()} cores, {sender_ms:.2f} ms CPU of storescu an instance)"
    )
    if size == "526 kB":
        best = max(of(client, OURS, n).rate for client in CLIENTS for n in ASSOCIATIONS) * instance_bytes(size) / 1e6
        say(f"{size}: {best:,.0f} MB/s", best >= min(300.0, disk_mb_s), f"300 MB/s, or {disk_mb_s:,.0f} of the disk")


def say(what: str, reached: bool, aim: str) -> None:
    """One line an aim."""
    console.print(f"{'reached    ' if reached else 'NOT REACHED'} {what} (aim: {aim})")


def disk(base: Path, size: int) -> float:
    """MB/s that the disk itself gives: 200 appends of one instance's size, each followed by fdatasync."""
    data, path = os.urandom(size), base / "disk.bin"
    seconds = []
    with path.open("wb", buffering=0) as file:
        for _ in range(200):
            started = time.perf_counter()
            file.write(data)
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - started)
    path.unlink()
    each = statistics.mean(seconds)
    rate = size / each / 1e6
    console.print(f"disk: appends of {size / 1e3:.0f} kB with fdatasync: {1 / each:,.0f}/s, {rate:,.0f} MB/s")
    return rate


def hdfs(base: Path, each: int, rounds: int) -> None:
    """Landing on HDFS against one raw stream of hdfs-native that syncs after as many instances as we did on average."""
    from tests.support.hdfs import HdfsCluster

    load = make_load(base / "hdfs load", SIZES["526 kB"], each)
    with (
        HdfsCluster(base / "hdfs") as cluster,
        fresh(base) as folder,
        servers.sphere(folder, root=f"{cluster.hdfs_url}/sphere", kind="counted") as server,
    ):
        for associations in (1, 16):
            ours, raw, groups = Runs(), Runs(), []
            for number in range(rounds):
                load.renew()
                members, syncs = servers.counted(folder)
                run(load, server, associations, servers.NODELAY, ours)
                after = servers.counted(folder)
                groups.append(max(1, round((after[0] - members) / (after[1] - syncs))))
                raw.rates.append(
                    _raw_stream(
                        cluster.hdfs_url, f"{associations}-{number}", load.each * associations, load.size, groups[-1]
                    )
                )
            share = 100 * ratio(ours, raw)
            what = f"{associations} associations: {ours.rate:,.0f}/s, {ours.rate * load.size / 1e6:,.0f} MB/s"
            rival = f"{share:.0f} % of {raw.rate:,.0f}/s of a raw stream, hsync per {statistics.median(groups):.0f}"
            say(f"HDFS, 526 kB, {what}; {rival}", share >= 80, "80 %")
            console.print(
                f"  CPU ms an instance: receivers {statistics.median(ours.server_ms):.2f}, "
                f"storescu {statistics.median(ours.sender_ms):.2f}; the raw stream has no senders"
            )


def _raw_stream(url: str, name: str, count: int, size: int, group: int) -> float:
    data = os.urandom(size)
    appender = open_storage(url).create(f"raw-{name}.bin")
    started = time.perf_counter()
    for instance in range(1, count + 1):
        appender.write([data])
        if instance % group == 0:
            appender.sync()
    appender.close()
    return count / (time.perf_counter() - started)


def main() -> None:
    """Run all of it and print the tables."""
    parser = argparse.ArgumentParser(prog="make bench-landing LANDING=", description=__doc__)
    parser.add_argument("--small", type=int, default=400, help="instances of 39 kB an association")
    parser.add_argument("--large", type=int, default=120, help="instances of 526 kB an association")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of which the median counts")
    parser.add_argument("--huge-mib", type=int, default=4096, help="MiB of the one large instance; 0: no memory part")
    parser.add_argument("--no-speed", action="store_true", help="leave the rivals out")
    parser.add_argument("--no-hdfs", action="store_true", help="leave HDFS out")
    parser.add_argument("--dir", type=Path, help="folder on the disk to be measured")
    options = parser.parse_args()
    keep = nullcontext(str(options.dir)) if options.dir else tempfile.TemporaryDirectory(prefix="sphere-landing-")
    with keep as name, tempfile.TemporaryDirectory(dir=name) as work:
        base, found = Path(work), Found()
        for size, each in () if options.no_speed else (("39 kB", options.small), ("526 kB", options.large)):
            before = disk(base, instance_bytes(size))
            measure(base, size, each, options.rounds, found)
            report(found, size)
            aims(found, size, statistics.mean([before, disk(base, instance_bytes(size))]))
        if options.huge_mib:
            landing_memory.measure(base, options.huge_mib, say)
        if not options.no_hdfs:
            hdfs(base, options.large, options.rounds)


if __name__ == "__main__":
    main()
