"""Other people's DICOM programs in tests: DCMTK and Orthanc, as processes on 127.0.0.1."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest

from tests.support.packages import PACKAGES, program
from tests.support.ports import free_port

START_S = 30  # seconds that a server may take to listen
RUN_S = 120  # seconds that a client may take
NO_NAGLE = os.environ | {"TCP_NODELAY": "1"}  # DCMTK's own programs stall for 45 ms an instance on each other otherwise

# storescu's option that proposes a transfer syntax; without one it proposes the uncompressed ones
STORESCU_OPTIONS = {
    "1.2.840.10008.1.2": "-xi",
    "1.2.840.10008.1.2.1": "-xe",
    "1.2.840.10008.1.2.2": "-xb",
    "1.2.840.10008.1.2.1.99": "-xd",
    "1.2.840.10008.1.2.4.50": "-xy",
    "1.2.840.10008.1.2.4.51": "-xx",
    "1.2.840.10008.1.2.4.70": "-xs",
    "1.2.840.10008.1.2.4.80": "-xt",
    "1.2.840.10008.1.2.4.81": "-xu",
    "1.2.840.10008.1.2.4.90": "-xv",
    "1.2.840.10008.1.2.4.91": "-xw",
    "1.2.840.10008.1.2.4.100": "-xm",
    "1.2.840.10008.1.2.4.102": "-xn",
    "1.2.840.10008.1.2.5": "-xr",
}


def require_tool(name: str, package: str = "") -> str:
    """The path of program `name`; without it the test is skipped, or fails with SPHERE_REQUIRE_ALL=1."""
    path = program(name)
    if path is not None:
        return path
    line = f"{name} is missing: install the Debian package {package or PACKAGES.get(name, 'dcmtk')}"
    if os.environ.get("SPHERE_REQUIRE_ALL") == "1":
        pytest.fail(line, pytrace=False)
    pytest.skip(line)


def run_tool(name: str, *arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    """Run a DCMTK program; its output is for messages, its status for the test to judge."""
    command = [require_tool(name), *map(str, arguments)]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=RUN_S,
        check=False,
    )


def findscu(
    port: int, folder: Path, keys: Sequence[str], *options: str, query: Path | None = None
) -> list[pydicom.Dataset]:
    """The answers that findscu got to `keys`, or to those and a file of keys; fails the test when the query did."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments: list[str | int] = [*options, *(item for key in keys for item in ("-k", key)), "127.0.0.1", port]
    run = run_tool("findscu", "-v", "-aec", "SPHERE", "-X", "-od", folder, *arguments, *([query] if query else []))
    assert run.returncode == 0 and "(Success)" in run.stdout, run.stdout
    return [pydicom.dcmread(path) for path in sorted(folder.glob("rsp*.dcm"))]


def wait_for_port(port: int, process: subprocess.Popen[Any]) -> None:
    """Return when 127.0.0.1:`port` accepts connections; fails when the process ends or START_S pass."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"{process.args!r} does not listen on {port}")


@contextmanager
def running(command: Sequence[str | Path], port: int, log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that listens on `port`, ended by its process id."""
    with log_path.open("wb") as log:
        process = subprocess.Popen([str(part) for part in command], env=NO_NAGLE, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_port(port, process)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def running_storescp(folder: Path, *options: str, port: int = 0) -> Iterator[int]:
    """DCMTK's storescp writing exactly what it receives into `folder`; gives its port, a free one for 0."""
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    arguments: list[str | Path] = ["+xa", "+B", "-pm", "+uf", *options, "-od", folder, str(port)]
    with running([require_tool("storescp"), *arguments], port, folder.parent / f"storescp-{port}.log"):
        yield port


@dataclass(frozen=True)
class Orthanc:
    """A running Orthanc; REST by its own paths, parsed from and to JSON."""

    http_port: int
    dicom_port: int
    ae_title: str

    def get(self, path: str) -> Any:
        return self._ask(path, None, "GET")

    def post(self, path: str, body: Any) -> Any:
        return self._ask(path, body, "POST")

    def put(self, path: str, body: Any) -> Any:
        return self._ask(path, body, "PUT")

    def file(self, instance: str) -> bytes:
        """The Part 10 file of an instance, by Orthanc's own name of it."""
        return self._bytes(f"/instances/{instance}/file", None, "GET")

    def _ask(self, path: str, body: Any, method: str) -> Any:
        text = self._bytes(path, body, method)
        return json.loads(text) if text[:1] in b"[{" and text else text.decode()

    def _bytes(self, path: str, body: Any, method: str) -> bytes:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=RUN_S) as answer:
            read: bytes = answer.read()
        return read


@contextmanager
def running_orthanc(folder: Path, modalities: Mapping[str, tuple[str, int]]) -> Iterator[Orthanc]:
    """An Orthanc with its database in `folder`, knowing `modalities` (name: AE title, port) on 127.0.0.1."""
    folder.mkdir(parents=True, exist_ok=True)
    orthanc = Orthanc(free_port(), free_port(), "ORTHANC")
    configuration = {
        "Name": "test", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
        "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "HttpPort": orthanc.http_port,
        "DicomAet": orthanc.ae_title, "DicomPort": orthanc.dicom_port, "DicomCheckCalledAet": False,
        "DicomServerEnabled": True, "Plugins": [], "DefaultEncoding": "Utf8", "TranscodeDicomProtocol": False,
        "DicomModalities": {
            name: {"AET": ae_title, "Host": "127.0.0.1", "Port": port}
            for name, (ae_title, port) in modalities.items()
        },
    }  # fmt: skip
    path = folder / "orthanc.json"
    path.write_text(json.dumps(configuration))
    with running([require_tool("Orthanc"), path], orthanc.http_port, folder / "orthanc.log") as process:
        wait_for_port(orthanc.dicom_port, process)
        yield orthanc


def part10_dataset(data: bytes) -> bytes:
    """The data set bytes of a Part 10 file, as the File Meta Information's group length says."""
    assert data[128:132] == b"DICM" and data[132:136] == b"\x02\x00\x00\x00"
    return data[144 + int.from_bytes(data[140:144], "little") :]
