"""How fast instances land: ``make bench-landing`` (``LANDING="--client tuned --size 39 --turns 9"`` for a part of it).

Sender: DCMTK's storescu, one process an association, as shipped or with TCP_NODELAY=1 in its environment ("tuned").
Every receiver ends a run with everything on disk: SPHERE, Orthanc and the pynetdicom server before each Success,
storescp by one syncfs at the end, whose time is counted in; "synced" has each file of storescp on disk before its
Success as well. Times run from the start of the senders to the exit of the last. SPHERE and one rival take turns in
short runs, so that what else the machine does hits both; a ratio is the median of those of the turns. CPU time is that
of the processes, and does not depend on the load of the machine. Every
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pydicom
from pydicom.data import get_testdata_file
from rich.console import Console
from rich.table import Table

from sphere.ingest.storage import open_storage
from tests.bench import landing_memory, landing_pages
from tests.bench import landing_servers as servers
from tests.support.dicom_tools import require_tool

ASSOCIATIONS = (1, 4, 16)
CLIENTS = {"shipped": {}, "tuned": servers.NODELAY}
SIZES = {"39": ("39 kB", 128), "526": ("526 kB", 512)}  # rows and columns of the CT
OURS, NULL = "SPHERE", "SPHERE, keeping nothing"
Target = Callable[[Path], AbstractContextManager[servers.Server]]
TARGETS: dict[str, Target] = {
    OURS: servers.sphere,
    NULL: lambda folder: servers.receivers(folder, "null"),
    "storescp": lambda folder: servers.storescp(folder, tuned=False),
    "storescp, TCP_NODELAY=1": lambda folder: servers.storescp(folder, tuned=True),
    "storescp, TCP_NODELAY=1, synced": lambda folder: servers.storescp(folder, tuned=True, synced=True),
    "Orthanc": lambda folder: servers.orthanc(folder, tuned=False),
    "Orthanc, TCP_NODELAY=1": lambda folder: servers.orthanc(folder, tuned=True),
    "pynetdicom": servers.pynetdicom,
}
RIVALS = {  # the aim of one association against each; the others are told beside it
    "shipped": {"storescp": 10.0, "Orthanc": 10.0, "storescp, TCP_NODELAY=1": 0, "Orthanc, TCP_NODELAY=1": 0},
    "tuned": {
        "storescp, TCP_NODELAY=1": 1.0,
        "storescp, TCP_NODELAY=1, synced": 1.0,
        "Orthanc, TCP_NODELAY=1": 2.0,
        "pynetdicom": 0,
    },
}
STALLED = ("storescp", "Orthanc")  # they wait for delayed ACKs, whatever the sender does
CORES = os.cpu_count() or 1
FIRST_RAW, GROUP = 600, 4  # instances of a raw stream before all others, and a grouping to begin with
SLOW = ("Orthanc, TCP_NODELAY=1", "pynetdicom")
console = Console(width=150)


@dataclass(frozen=True)
class Load:
    """Files of one size, as many in the folder of each association; `places` are where their instance UID stands."""

    folders: tuple[Path, ...]
    each: int  # files a folder
    size: int  # bytes of a file
    places: tuple[int, ...]

    def renew(self, associations: int) -> None:
        """Make other instances of theirs, on disk before this returns: nobody else's sync has to bring them there."""
        for folder in self.folders[:associations]:
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


@dataclass
class HdfsRuns(Runs):
    """Runs that end on HDFS: with ms of CPU an instance of its servers."""

    nodes_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Contest:
    """Two that take turns, each a receiver and a number of associations to it; 0: no aim for their ratio."""

    left: tuple[str, int]
    right: tuple[str, int]
    aim: float = 0


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


def contests(client: str, associations: Sequence[int], rivals: str) -> Iterator[Contest]:
    """What is measured with this client; `rivals` is a part of their names."""
    for n in associations:
        for rival, aim in RIVALS[client].items():
            if rivals in rival:
                yield Contest((OURS, n), (rival, n), aim if n == 1 else 0)
    if client == "tuned" and 1 in associations and 16 in associations:
        yield Contest((OURS, 16), (OURS, 1), 2.0)
        yield Contest((NULL, 16), (OURS, 1))  # what the senders allow


def measure(base: Path, size: str, each: int, client: str, options: argparse.Namespace) -> None:
    """All contests of one size of instance and one client; `each` instances an association.

    Receivers that wait for delayed ACKs get a sixteenth of the load, once: 45 ms an instance do not vary. Slow ones get
    a quarter.
    """
    name, rows = SIZES[size]
    best = 0.0
    table = Table(title=f"instances/s, sender {client}, CT of {name}", title_justify="left")
    for column in (
        "associations",
        "receiver",
        "its rival",
        "ratio (of single turns)",
        "CPU ms an instance: receiver",
        "rival",
    ):
        table.add_column(column)
    with ExitStack() as stack:
        folder = stack.enter_context(fresh(base))
        loads = {part: make_load(folder / str(part), rows, max(4, each // part)) for part in (1, 4, 16)}
        running = {}
        for contest in contests(client, options.associations, options.rival):
            for target, _ in (contest.left, contest.right):
                if target not in running:
                    running[target] = stack.enter_context(TARGETS[target](stack.enter_context(fresh(base))))
            ours, theirs = compete(contest, running, loads, client, options.turns)
            table.add_row(*row(contest, ours, theirs))
            if contest.left[0] == OURS:
                best = max(best, ours.rate * loads[1].size / 1e6)
            n, m = contest.left[1], contest.right[1]
            what = f"{name}, {client}: {ratio(ours, theirs):.2f} x {contest.right[0]}, {n} to {m} associations"
            say(what, ratio(ours, theirs) >= contest.aim, f"{contest.aim:g} x" if contest.aim else "")
            if n != m:
                say_ceiling(contest, ours, theirs)
        console.print(table)
        if size == "526":
            limit = disk(base, loads[1].size)
            say(
                f"{name}, {client}: {best:,.0f} MB/s",
                best >= min(300.0, limit),
                f"300 MB/s, or {limit:,.0f} of the disk",
            )
        for target, server in running.items():
            console.print(f"{target}, {name}: peak memory {servers.peak_mb(server[1]):.0f} MB a process")


def compete(
    contest: Contest, running: dict[str, servers.Server], loads: dict[int, Load], client: str, turns: int
) -> tuple[Runs, Runs]:
    """Let the two take turns; those who stall have one."""
    found = Runs(), Runs()
    for turn in range(turns):
        for (target, n), runs in zip((contest.left, contest.right), found, strict=True):
            stalls = target in STALLED or (client == "shipped" and target not in (OURS, NULL))
            if not (stalls and turn):
                load = loads[16 if stalls else 4 if target in SLOW else 1]
                load.renew(n)
                run(load, running[target], n, CLIENTS[client], runs)
    return found


def row(contest: Contest, ours: Runs, theirs: Runs) -> list[str]:
    """Of the table: who, how fast, and how sure."""
    (target, n), (rival, m) = contest.left, contest.right
    single = ratios(ours, theirs)
    return [
        str(n) if n == m else f"{n} / {m}", f"{target} {ours.rate:,.0f}", f"{rival} {theirs.rate:,.0f}",
        f"{ratio(ours, theirs):.2f} ({min(single):.2f} to {max(single):.2f})",
        f"{statistics.median(ours.server_ms):.2f} (storescu {statistics.median(ours.sender_ms):.2f})",
        f"{statistics.median(theirs.server_ms):.2f} (storescu {statistics.median(theirs.sender_ms):.2f})",
    ]  # fmt: skip


def ratios(ours: Runs, theirs: Runs) -> list[float]:
    """Those of the turns; a rival that ran once is taken again."""
    last = theirs.rates[-1:] * (len(ours.rates) - len(theirs.rates))
    return [a / b for a, b in zip(ours.rates, theirs.rates + last, strict=True)]


def ratio(ours: Runs, theirs: Runs) -> float:
    """The median of the ratios of the turns."""
    return statistics.median(ratios(ours, theirs))


def say(what: str, reached: bool, aim: str) -> None:
    """One line, of an aim where there is one."""
    mark = "           " if not aim else "reached    " if reached else "NOT REACHED"
    console.print(f"{mark} {what}{f' (aim: {aim})' if aim else ''}")


def say_ceiling(contest: Contest, many: Runs, one: Runs) -> None:
    """What all cores allow with many associations, by the CPU time that was measured."""
    senders, receivers = statistics.median(many.sender_ms), statistics.median(many.server_ms)
    few_senders, few_receivers = statistics.median(one.sender_ms), statistics.median(one.server_ms)
    most, free = (1000 * CORES / ms for ms in (senders + receivers, senders))
    console.print(
        f"  CPU ms an instance, {contest.left[1]} and {contest.right[1]} associations: storescu {senders:.2f} and "
        f"{few_senders:.2f}, receivers {receivers:.2f} and {few_receivers:.2f}\n"
        f"  ceiling of this machine, all cores busy: {most:,.0f}/s, {most / one.rate:.2f} x; "
        f"if receivers cost nothing {free:,.0f}/s, {free / one.rate:.2f} x"
    )


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


def hdfs(base: Path, each: int, turns: int, many: Sequence[int]) -> None:
    """Landing on HDFS against one raw hdfs-native stream that syncs after as many instances as we did on average.

    They take turns in who is first; a raw stream before all of them has the JVMs compile what both need, and pages of
    blocks are given back behind both (`landing_pages`).
    """
    from tests.support.hdfs import HdfsCluster

    load = make_load(base / "hdfs load", SIZES["526"][1], each)
    with (
        HdfsCluster(base / "hdfs") as cluster,
        landing_pages.dropping(base / "hdfs"),
        fresh(base) as folder,
        servers.receivers(folder, "counted", root=f"{cluster.hdfs_url}/sphere") as server,
    ):
        nodes = [psutil.Process(pid) for pid in cluster.pids]
        _raw_stream(cluster.hdfs_url, "first", FIRST_RAW, load.size, GROUP)
        for n in many:
            ours, raw, groups = HdfsRuns(), HdfsRuns(), [min(n, GROUP)]
            for turn in range(turns):
                for what in ("ours", "raw") if turn % 2 == 0 else ("raw", "ours"):
                    if what == "ours":
                        groups.append(_land(load, server, n, ours, nodes, folder))
                    else:
                        name = f"{n}-{turn}"
                        _stream(cluster.hdfs_url, name, load.each * n, load.size, groups[-1], raw, nodes)
            _say_share(n, ours, raw, groups[1:], load.size)


def _land(
    load: Load, server: servers.Server, associations: int, runs: HdfsRuns, nodes: list[psutil.Process], folder: Path
) -> int:
    """One run of ours; how many members a sync had, on average."""
    load.renew(associations)
    before, used = servers.counted(folder), servers.cpu_s(nodes)
    run(load, server, associations, servers.NODELAY, runs)
    runs.nodes_ms.append(1000 * (servers.cpu_s(nodes) - used) / (load.each * associations))
    members, syncs = (a - b for a, b in zip(servers.counted(folder), before, strict=True))
    return max(1, round(members / syncs))


def _stream(
    url: str, name: str, count: int, size: int, group: int, runs: HdfsRuns, nodes: list[psutil.Process]
) -> None:
    """One run of the raw stream."""
    used, client = servers.cpu_s(nodes), time.process_time()
    runs.rates.append(_raw_stream(url, name, count, size, group))
    runs.nodes_ms.append(1000 * (servers.cpu_s(nodes) - used) / count)
    runs.server_ms.append(1000 * (time.process_time() - client) / count)


def _say_share(associations: int, ours: HdfsRuns, raw: HdfsRuns, groups: list[int], size: int) -> None:
    """How much of the raw stream landing is, and how much it could be on these cores."""
    single, share = [100 * r for r in ratios(ours, raw)], 100 * ratio(ours, raw)
    say(
        f"HDFS, 526 kB, {associations} associations: {ours.rate:,.0f}/s, {ours.rate * size / 1e6:,.0f} MB/s; "
        f"{share:.0f} % ({min(single):.0f} to {max(single):.0f}) of {raw.rate:,.0f}/s of a raw stream, "
        f"hsync per {statistics.median(groups):.0f}",
        share >= 80,
        "80 %",
    )
    receivers, senders, nodes, client, stream = (
        statistics.median(ms) for ms in (ours.server_ms, ours.sender_ms, ours.nodes_ms, raw.server_ms, raw.nodes_ms)
    )
    console.print(
        f"  CPU ms an instance: receivers {receivers:.2f}, storescu {senders:.2f}, HDFS {nodes:.2f}; raw stream, which "
        f"has no senders: client {client:.2f}, HDFS {stream:.2f}"
    )
    for what, ms in (
        ("", receivers + senders + nodes),
        (" if only storescu came to the raw stream", senders + client + stream),
    ):
        most = 1000 * CORES / ms
        console.print(f"  ceiling of this machine, all cores busy{what}: {most:,.0f}/s, {100 * most / raw.rate:.0f} %")


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
    parser.add_argument("--part", choices=("speed", "memory", "hdfs"), action="append", help="default: all three")
    parser.add_argument("--size", choices=SIZES, action="append", help="kB of an instance (default: each)")
    parser.add_argument("--client", choices=CLIENTS, action="append", help="storescu (default: both)")
    parser.add_argument("--rival", default="", help="only those whose name holds this")
    parser.add_argument("--associations", type=int, nargs="+", default=ASSOCIATIONS, help="1, 4, 16 or some of them")
    parser.add_argument("--turns", type=int, default=5, help="of which the median counts")
    parser.add_argument("--small", type=int, default=400, help="instances of 39 kB an association")
    parser.add_argument("--large", type=int, default=120, help="instances of 526 kB an association")
    parser.add_argument("--huge-mib", type=int, default=4096, help="MiB of the one large instance")
    parser.add_argument("--dir", type=Path, help="folder on the disk to be measured")
    options = parser.parse_args()
    parts = options.part or ("speed", "memory", "hdfs")
    keep = nullcontext(str(options.dir)) if options.dir else tempfile.TemporaryDirectory(prefix="sphere-landing-")
    with keep as name, tempfile.TemporaryDirectory(dir=name) as work:
        base = Path(work)
        if "speed" in parts:
            for size, client in product(options.size or SIZES, options.client or CLIENTS):
                measure(base, size, options.small if size == "39" else options.large, client, options)
        if "memory" in parts:
            landing_memory.measure(base, options.huge_mib, say)
        if "hdfs" in parts:
            hdfs(base, options.large, options.turns, options.associations)


if __name__ == "__main__":
    main()
