"""DICOMweb beside Orthanc with its DICOMweb plugin, and the viewer's first image: ``make bench-web``.

Both servers of one part run on this machine at the same time and are asked in turn, over loopback; medians of --rounds,
the page cache warm for both. QIDO asks about studies that both have: Orthanc gets as many as load in --load seconds,
SPHERE answers from the whole catalog. ``WEB="--parts qido,metadata --slices 100"`` runs some parts, or smaller ones.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sphere.conf import viewer
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.jobs.synthetic import ct_series
from sphere.scp.web.server import run_web
from tests.bench.first_image import measure, watched
from tests.bench.hospital_catalog import kept
from tests.bench.query_client import percentile
from tests.bench.query_servers import load
from tests.support.dicom_tools import require_tool, running, wait_for_port
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member
from tests.support.ports import free_port
from tests.support.receiver import ROOT

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
PIECE = 1 << 20  # bytes that a client reads at once
FRAMES = 'multipart/related; type="application/octet-stream"'
DICOM = 'multipart/related; type="application/dicom"'
JSON = "application/dicom+json"
SPEED_BYTES = 64 << 20


@dataclass
class Server:
    """A DICOMweb server: its port and process."""

    name: str
    port: int
    pid: int
    dicom_port: int = 0

    def ask(self, path: str, accept: str, link: http.client.HTTPConnection | None = None) -> int:
        """GET, read to the end; returns the bytes of the body."""
        link = link or self.link()
        link.request("GET", f"/dicom-web{path}", headers={"Accept": accept})
        answer = link.getresponse()
        size = 0
        buffer = memoryview(bytearray(PIECE))
        while got := answer.readinto(buffer):
            size += got
        assert answer.status == 200, (self.name, path, answer.status)
        return size

    def link(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def send(self, path: str, body: Iterator[bytes], size: int, content_type: str) -> None:
        """POST of a body that is made on the way."""
        link = self.link()
        link.request("POST", path, body, {"Content-Type": content_type, "Content-Length": str(size), "Accept": JSON})
        answer = link.getresponse()
        text = answer.read()
        assert answer.status == 200, (self.name, answer.status, text[:300])

    def peak_mib(self) -> int:
        """MiB of memory that its process had at most."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) >> 10


@contextmanager
def sphere(settings: Settings, *more: str) -> Iterator[Server]:
    """The HTTP process of an archive."""
    base = settings.archive.state_dir.parent
    command = [sys.executable, "-m", "tests.bench.bench_web", "--serve", str(base), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Server("SPHERE", int(process.stdout.readline()), process.pid)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def orthanc(folder: Path) -> Iterator[Server]:
    """Orthanc with its DICOMweb plugin, SQLite, and nothing synced to disk."""
    folder.mkdir(parents=True, exist_ok=True)
    dicom, port = free_port(), free_port()
    configuration = {
        "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "HttpPort": port,
        "DicomPort": dicom, "DicomAet": "ORTHANC", "DicomCheckCalledAet": False, "DicomAlwaysAllowStore": True,
        "LimitFindResults": 0, "LimitFindInstances": 0, "SyncStorageArea": False, "DefaultEncoding": "Utf8",
        "Plugins": [str(PLUGIN)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}, "KeepAlive": True,
        "AuthenticationEnabled": False, "RemoteAccessAllowed": False, "HttpThreadsCount": 16,
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    with running([require_tool("Orthanc"), folder / "orthanc.json"], port, folder / "orthanc.log") as process:
        wait_for_port(dicom, process)
        yield Server("Orthanc", port, process.pid, dicom)


@contextmanager
def both(folder: Path, files: Sequence[bytes]) -> Iterator[list[Server]]:
    """The two with the same files in them."""
    settings = archive(folder / "sphere")
    (folder / "sphere").mkdir(parents=True, exist_ok=True)
    land(settings, [new_member(data) for data in files])
    extract(settings)
    with sphere(settings) as ours, orthanc(folder / "orthanc") as theirs:
        for data in files:
            theirs.send("/instances", iter((data,)), len(data), "application/dicom")
        yield [ours, theirs]


def compare(what: str, servers: Sequence[Server], once: Callable[[Server], float], rounds: int, target: float) -> None:
    """Print the medians of seconds, and by how much the first server is faster."""
    medians = {server.name: statistics.median(once(server) for _ in range(rounds + 1)) for server in servers}
    ours, theirs = (medians[server.name] for server in servers)
    peaks = ", ".join(f"{server.name} {server.peak_mib()} MiB" for server in servers)
    print(
        f"{what:38} SPHERE {ours * 1000:9.1f} ms  Orthanc {theirs * 1000:9.1f} ms  {theirs / ours:6.1f} x "
        f"(target {target:g})  peak {peaks}",
        flush=True,
    )


def retrieving(folder: Path, options: argparse.Namespace) -> None:
    """A whole CT, and its frames one by one."""
    with both(folder, list(ct_series(options.slices))) as servers:
        answer = json.loads(_text(servers[0], "/instances?limit=100000"))
        paths = [
            f"/studies/{one['0020000D']['Value'][0]}/series/{one['0020000E']['Value'][0]}/instances/"
            f"{one['00080018']['Value'][0]}/frames/1"
            for one in answer
        ]
        study = "/studies/" + answer[0]["0020000D"]["Value"][0]

        def whole(server: Server) -> float:
            return _timed(lambda: server.ask(study, DICOM))

        compare(f"WADO-RS of a CT of {options.slices}", servers, whole, options.rounds, 1.5)
        for clients in (1, 8):

            def frames(server: Server, clients: int = clients) -> float:
                def some(mine: Sequence[str]) -> None:
                    link = server.link()
                    for path in mine:
                        server.ask(path, FRAMES, link)

                with ThreadPoolExecutor(clients) as pool:
                    return _timed(lambda: list(pool.map(some, [paths[n::clients] for n in range(clients)])))

            compare(f"{len(paths)} single frames, {clients} clients", servers, frames, options.rounds, 1.5)


def metadata(folder: Path, options: argparse.Namespace) -> None:
    """The headers of a study with many instances."""
    with both(folder, list(ct_series(options.instances, rows=16, columns=16))) as servers:
        [one] = json.loads(_text(servers[0], "/studies"))
        path = f"/studies/{one['0020000D']['Value'][0]}/metadata"

        def once(server: Server) -> float:
            return _timed(lambda: server.ask(path, JSON))

        compare(f"metadata of {options.instances} instances", servers, once, options.rounds, 5)


def storing(folder: Path, options: argparse.Namespace) -> None:
    """One STOW request; new instances each time."""
    with both(folder, list(ct_series(1))) as servers:
        turn = iter(range(1, 1000))

        def once(server: Server) -> float:
            parts = [
                b"\r\n--B\r\nContent-Type: application/dicom\r\n\r\n" + data
                for data in ct_series(max(1, options.stow_mib * 2), seed=next(turn))
            ]
            parts.append(b"\r\n--B--")
            size = sum(map(len, parts))
            return _timed(lambda: server.send("/dicom-web/studies", iter(parts), size, f"{DICOM}; boundary=B"))

        compare(f"STOW-RS of {options.stow_mib} MiB", servers, once, options.rounds, 1.5)


def qido(folder: Path, options: argparse.Namespace) -> None:
    """Studies by patient and by date."""
    base = (options.folder or folder).absolute()
    settings, hospital = kept(base / "hospital", options.studies)
    with orthanc(base / "orthanc") as theirs, sphere(settings) as ours:
        loaded = load(theirs.dicom_port, settings, base / "loaded.json", seconds=options.load)
        print(
            f"QIDO-RS: SPHERE has {options.studies} studies, "
            f"Orthanc {len(loaded.studies)} ({loaded.instances} instances)",
            flush=True,
        )
        if not options.repeat:
            return
        held = set(loaded.studies)
        known = [place for place, uid in enumerate(hospital.study_uid.to_pylist()) if uid in held]
        chance = random.Random(5)

        def patient() -> str:
            return f"PatientID={hospital.study_values['PatientID'][chance.choice(known)].as_py()}"

        def date() -> str:
            day = np.datetime64("2004-01-01") + int(hospital.day[chance.choice(known)])
            return f"StudyDate={str(day).replace('-', '')}"

        for what, make in (("patient", patient), ("date", date)):
            queries = [f"/studies?{make()}" for _ in range(options.repeat)]
            for server in (ours, theirs):
                link = server.link()
                server.ask(queries[0], JSON, link)
                times = [1000 * _timed(lambda: server.ask(one, JSON, link)) for one in queries]  # noqa: B023  at once
                shown = "  ".join(f"p{round(100 * share)} {percentile(times, share):8.2f}" for share in (0.5, 0.99))
                print(f"  by {what:8} {server.name:8} {shown} ms  peak {server.peak_mib()} MiB", flush=True)


def viewing(folder: Path, options: argparse.Namespace) -> None:
    """The first image of a CT in OHIF: a browser's first visit, and later ones."""
    settings = archive(folder / "viewed")
    (folder / "viewed").mkdir(parents=True)
    land(settings, [new_member(data) for data in ct_series(300)])
    extract(settings)
    shown = watched(viewer.folder(), folder / "viewer")
    with sphere(settings, "--viewer", str(shown)) as ours:
        study = json.loads(_text(ours, "/studies"))[0]["0020000D"]["Value"][0]
        print("first image of a CT of 300 in OHIF, each round in a fresh profile (target 3 s)", flush=True)
        measure(folder, f"http://127.0.0.1:{ours.port}", study, options.rounds, lambda line: print(line, flush=True))
    print(f"  this machine: {_speed():.0f} ms for {SPEED_BYTES >> 20} MiB of SHA-256 by Python")


def _speed() -> float:
    """Milliseconds of one thread for work that is always the same: how fast the machine is just now."""
    data = bytes(SPEED_BYTES)
    return 1000 * min(_timed(lambda: hashlib.sha256(data)) for _ in range(5))


def _text(server: Server, path: str) -> str:
    link = server.link()
    link.request("GET", f"/dicom-web{path}", headers={"Accept": JSON})
    return link.getresponse().read().decode()


def _timed(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


PARTS = {"qido": qido, "retrieve": retrieving, "metadata": metadata, "stow": storing, "viewer": viewing}


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--studies", type=int, default=50_000, help="of SPHERE's catalog for QIDO")
    parser.add_argument("--load", type=float, default=600, help="seconds that Orthanc has to load of them")
    parser.add_argument("--folder", type=Path, help="where that catalog and Orthanc's are kept for the next time")
    parser.add_argument("--repeat", type=int, default=300, help="queries of a kind; 0: load only")
    parser.add_argument("--slices", type=int, default=1000, help="of the CT")
    parser.add_argument("--instances", type=int, default=2000, help="of the study whose metadata is asked for")
    parser.add_argument("--stow-mib", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--viewer", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        ae_title = "TESTED"  # as the catalogs of tests.bench.hospital_catalog have it
        settings = from_dict(
            {"archive": {"ae_title": ae_title}, "web": {"port": 0, "viewer_dir": options.viewer}}, base=options.serve
        )
        run_web(settings, ready=lambda port: print(port, flush=True))
        return
    for name in options.parts.split(","):
        with tempfile.TemporaryDirectory(prefix="sphere-bench-") as folder:
            PARTS[name](Path(folder), options)


if __name__ == "__main__":
    main()
