"""How fast instances go out: ``make bench-retrieve`` (``RETRIEVE="--slices 200"`` for options).

A CT of 1,000 slices of 526 kB from SPHERE, Orthanc and DCMTK's dcmqrscp, in turn, on the same disk: by C-MOVE (movescu)
to a storescp that writes nothing, and by C-GET (getscu) that writes nothing. All with TCP_NODELAY=1. Times are those of
the requester from its start to its exit; the median of the rounds, the page cache warm for all. Then, from SPHERE,
small studies by one list of UIDs, and the time to the first response; and the CT from HDFS, where the other two cannot
read, beside one reader of the same bundles.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from pydicom.uid import generate_uid
from rich.console import Console
from rich.table import Table

from sphere.archive import Archive
from sphere.conf.loading import from_dict
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.base import Storage
from sphere.scp import client
from sphere.scp.client import retrieve as retrieve_client
from tests.support.dicom_tools import NO_NAGLE, require_tool, running, running_orthanc
from tests.support.hdfs import HdfsCluster
from tests.support.ports import free_port
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import make_instance

STUDY = "1.2.3.4"
RAW = 4 << 20  # bytes that the reader of raw bytes asks for at once: more is no faster
console = Console(width=140)


def make_ct(folder: Path, slices: int) -> list[Path]:
    """A study of `slices` CT images of 512 x 512 x 16 bit."""
    folder.mkdir(parents=True)
    series, pixels = generate_uid(), os.urandom(512 * 512 * 2)
    image = {
        "Rows": 512, "Columns": 512, "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "SamplesPerPixel": 1,
        "PixelRepresentation": 0, "PhotometricInterpretation": "MONOCHROME2", "PixelData": pixels,
    }  # fmt: skip
    return [
        make_instance(folder / f"{n}.dcm", StudyInstanceUID=STUDY, SeriesInstanceUID=series, InstanceNumber=n, **image)
        for n in range(slices)
    ]


@contextmanager
def sink(folder: Path) -> Iterator[int]:
    """A storescp that writes nothing; its port."""
    port = free_port()
    with running(
        [require_tool("storescp"), "--fork", "-pdu", "131072", "--ignore", str(port)], port, folder / "sink.log"
    ):
        yield port


@contextmanager
def sphere(folder: Path, files: list[Path], destination: int) -> Iterator[tuple[int, str, Receiver]]:
    """SPHERE with the files catalogued."""
    peers = [{"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": destination}]
    with Archive(from_dict({}, base=folder)) as archive:
        assert all(one.record is not None for one in archive.import_files(files))
        archive.extract()
    with running_receiver(folder, {"peers": peers}) as receiver:
        yield receiver.port, "SPHERE", receiver


@contextmanager
def orthanc(folder: Path, files: list[Path], destination: int) -> Iterator[tuple[int, str]]:
    """Orthanc with its defaults."""
    with running_orthanc(folder, {"dest": ("DEST", destination)}) as server:
        for path in files:
            server.post("/instances", path.read_bytes())
        yield server.dicom_port, server.ae_title


@contextmanager
def dcmqrscp(folder: Path, files: list[Path], destination: int) -> Iterator[tuple[int, str]]:
    """DCMTK's archive, as it ships but for its PDU size, which is the largest that it takes."""
    storage, port = folder / "storage", free_port()
    storage.mkdir(parents=True)
    config = folder / "dcmqrscp.cfg"
    config.write_text(
        f"NetworkTCPPort = {port}\nMaxPDUSize = 131072\nMaxAssociations = 16\n"
        f"HostTable BEGIN\ndest = (DEST, 127.0.0.1, {destination})\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
        f"AETable BEGIN\nQR {storage} RW (100, 4096mb) ANY\nAETable END\n"
    )
    with running([require_tool("dcmqrscp"), "-c", str(config)], port, folder / "dcmqrscp.log"):
        subprocess.run(
            [require_tool("storescu"), "-aec", "QR", "-xe", "+sd", "127.0.0.1", str(port), str(files[0].parent)],
            env=NO_NAGLE, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        yield port, "QR"


def ask(tool: str, port: int, ae_title: str, study: str = STUDY) -> float:
    """Seconds that movescu or getscu takes for a study."""
    where = ["-aem", "DEST"] if tool == "movescu" else ["--ignore", "-pdu", "131072"]
    keys = ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}"]
    started = time.monotonic()
    run = subprocess.run(
        [require_tool(tool), "-aet", "DEST", "-aec", ae_title, *where, "-S", *keys, "127.0.0.1", str(port)],
        env=NO_NAGLE, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    seconds = time.monotonic() - started
    assert run.returncode == 0 and "E:" not in run.stdout, (ae_title, tool, run.stdout[-2000:])
    return seconds


def compare(base: Path, files: list[Path], rounds: int) -> None:
    """The table of C-MOVE and C-GET, SPHERE against the others."""
    size = sum(path.stat().st_size for path in files) / 1e6
    table = Table("", "C-MOVE MB/s", "C-GET MB/s", title=f"{len(files)} slices, {size:.0f} MB, median of {rounds}")
    with ExitStack() as stack:
        destination = stack.enter_context(sink(base))
        servers: dict[str, tuple[int, str]] = {}
        port, ae_title, receiver = stack.enter_context(sphere(base / "sphere", files, destination))
        servers["SPHERE"] = port, ae_title
        for name, start in (("Orthanc", orthanc), ("dcmqrscp", dcmqrscp)):
            servers[name] = stack.enter_context(start(base / name, files, destination))
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds + 1):  # the first warms caches and is not counted
            for name, server in servers.items():
                for tool in ("movescu", "getscu"):
                    times.setdefault((name, tool), []).append(ask(tool, *server))
        for name in servers:
            rates = [size / statistics.median(times[name, tool][1:]) for tool in ("movescu", "getscu")]
            table.add_row(name, *(f"{rate:.0f}" for rate in rates))
        console.print(table)
        memory = psutil.Process(receiver.process.pid).memory_full_info()
        console.print(
            f"SPHERE's receiver: {memory.uss / 1e6:.0f} MB of its own, {memory.pss / 1e6:.0f} MB with its share, "
            f"{memory.rss / 1e6:.0f} MB resident"
        )
        first = statistics.median(_first_response(receiver) for _ in range(5))
        console.print(f"SPHERE: first instance out and answered after {1000 * first:.0f} ms")


def _first_response(receiver: Receiver) -> float:
    started = time.monotonic()
    responses = retrieve_client.move(
        receiver.peer, {"StudyInstanceUID": STUDY}, settings=receiver.settings, destination="DEST"
    )  # fmt: skip
    assert next(responses).completed == 1
    seconds = time.monotonic() - started
    list(responses)
    return seconds


def small_studies(base: Path, count: int) -> None:
    """`count` studies of one small instance each, by one list of UIDs."""
    (base / "small").mkdir()
    uids = [f"1.2.3.{number}" for number in range(count)]
    files = [make_instance(base / "small" / f"{uid}.dcm", StudyInstanceUID=uid) for uid in uids]
    with ExitStack() as stack:
        destination = stack.enter_context(sink(base))
        peers = [{"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": destination}]
        receiver = stack.enter_context(running_receiver(base / "sphere-small", {"peers": peers}))
        assert all(one.stored for one in client.store(receiver.peer, files, settings=receiver.settings))
        started = time.monotonic()
        *_, last = retrieve_client.move(
            receiver.peer, {"StudyInstanceUID": "\\".join(uids)}, settings=receiver.settings, destination="DEST"
        )
        seconds = time.monotonic() - started
    assert last.completed == count
    console.print(f"SPHERE: {count} small studies, not yet catalogued, by one list of UIDs: {count / seconds:.0f}/s")


def from_hdfs(base: Path, files: list[Path], rounds: int) -> None:
    """The same study from an HDFS of one NameNode and two DataNodes, beside one reader of the same bundles."""
    size = sum(path.stat().st_size for path in files) / 1e6
    with ExitStack() as stack:
        cluster = stack.enter_context(HdfsCluster(base / "hdfs"))
        destination = stack.enter_context(sink(base))
        tables = {
            "storage": {"root": f"{cluster.hdfs_url}/archive"},
            "peers": [{"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": destination}],
        }
        with Archive(from_dict(tables, base=base / "on-hdfs")) as archive:
            records = [one.record for one in archive.import_files(files)]
        assert all(records)
        receiver = stack.enter_context(running_receiver(base / "on-hdfs", tables))
        storage = open_storage(receiver.settings.storage.root)
        times: dict[str, list[float]] = {"raw": [], "movescu": [], "getscu": []}
        for _ in range(rounds + 1):  # the first warms caches and is not counted
            times["raw"].append(_raw(storage, records))
            for tool in ("movescu", "getscu"):
                times[tool].append(ask(tool, receiver.port, "SPHERE"))
    raw, move, get = (size / statistics.median(seconds[1:]) for seconds in times.values())
    console.print(
        f"From HDFS: one reader {raw:.0f} MB/s, C-MOVE {move:.0f} MB/s ({move / raw:.0%}), "
        f"C-GET {get:.0f} MB/s ({get / raw:.0%})"
    )


def _raw(storage: Storage, records: Sequence[MemberRecord | None]) -> float:
    """Seconds that one reader takes for the same bundles, RAW at once."""
    sizes = {bundle: storage.size(bundle) for bundle in {one.bundle for one in records if one}}
    started = time.monotonic()
    for bundle, size in sizes.items():
        for offset in range(0, size, RAW):
            assert storage.read(bundle, offset, min(RAW, size - offset))
    return time.monotonic() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("local", "hdfs"), help="one part; by default both")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="bench-retrieve-"))
    try:
        files = make_ct(base / "files", options.slices)
        if options.only != "hdfs":
            compare(base, files, options.rounds)
            small_studies(base, options.slices)
        if options.only != "local":
            from_hdfs(base, files, options.rounds)
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
