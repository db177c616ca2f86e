"""What `bench_landing` sends to: SPHERE's receivers, DCMTK's storescp, Orthanc, and a plain pynetdicom server."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]
from pynetdicom import AE, AllStoragePresentationContexts, evt

from sphere.ingest.part10 import file_meta
from tests.support.dicom_tools import require_tool, wait_for_port
from tests.support.ports import free_port
from tests.support.serving import running_supervisor

NODELAY = {"TCP_NODELAY": "1"}  # read by DCMTK, and so by storescp and Orthanc

SYNCING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

int fclose(FILE *file)
{
    int (*next)(FILE *) = (int (*)(FILE *)) dlsym(RTLD_NEXT, "fclose");
    if ((fcntl(fileno(file), F_GETFL) & O_ACCMODE) != O_RDONLY && (fflush(file) || fdatasync(fileno(file))))
        return EOF;
    return next(file);
}
"""

Server = tuple[int, list[psutil.Process], Callable[[], None]]  # port, processes, and what makes all of it durable


@contextmanager
def sphere(
    folder: Path, *, workers: int = 2, root: str = "file:storage", durability: str = "storage"
) -> Iterator[Server]:
    """`sphere serve` with receivers alone; Success means durable, so that nothing is left to be done."""
    ingest = {"durability": durability}
    with running_supervisor(folder, workers=workers, root=root, ingest=ingest) as serving:
        receivers = [child.pid for child in serving.state().children if child.name.startswith("receiver")]
        yield serving.port, [psutil.Process(pid) for pid in receivers], _nothing
        serving.stop()


@contextmanager
def receivers(
    folder: Path, kind: Literal["null", "counted"], *, workers: int = 2, root: str = "file:storage"
) -> Iterator[Server]:
    """Receivers without a supervisor: "null" keep nothing, "counted" count their groups, for `counted`."""
    port = free_port()
    data = json.dumps({"dimse": {"port": port}, "storage": {"root": root}})
    command = [sys.executable, "-m", "tests.bench.landing_receiver", kind, data, str(folder)]
    with _processes([command] * workers, folder, port) as processes:
        yield port, processes, _nothing


@contextmanager
def storescp(folder: Path, *, tuned: bool, synced: bool = False) -> Iterator[Server]:
    """storescp writes files and syncs none: one syncfs at the end, counted in, is the least that durable can mean.

    `synced`: each file is synced when it is closed, which is before its Success, so that both sides promise the same.
    """
    port, output = free_port(), folder / "output"
    output.mkdir(parents=True)
    command = [require_tool("storescp"), "--fork", "-od", str(output), str(port)]  # else one association at a time
    environment = dict(NODELAY) if tuned else {}
    if synced:
        environment["LD_PRELOAD"] = str(_syncing_library(folder))
    with _processes([command], folder, port, environment) as processes:
        yield port, processes, _nothing if synced else lambda: _syncfs(output)


def _syncing_library(folder: Path) -> Path:
    """A library whose fclose syncs what was written: for a program that has no setting for it."""
    source, library = folder / "syncing.c", folder / "syncing.so"
    source.write_text(SYNCING)
    subprocess.run([require_tool("cc"), "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@contextmanager
def orthanc(folder: Path, *, tuned: bool) -> Iterator[Server]:
    """Orthanc with its defaults: it syncs each file (SyncStorageArea) and its database by itself."""
    folder.mkdir(parents=True)
    port = free_port()
    configuration = {
        "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "DicomPort": port,
        "HttpPort": free_port(), "DicomCheckCalledAet": False, "DicomAlwaysAllowStore": True, "Plugins": [],
    }  # fmt: skip
    path = folder / "orthanc.json"
    path.write_text(json.dumps(configuration))
    with _processes([[require_tool("Orthanc"), str(path)]], folder, port, NODELAY if tuned else {}) as processes:
        yield port, processes, _nothing


@contextmanager
def pynetdicom(folder: Path) -> Iterator[Server]:
    """pynetdicom's own server with the handler of its documentation, and an fsync for each file."""
    folder.mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.landing_servers", str(port), str(folder)]
    with _processes([command], folder, port) as processes:
        yield port, processes, _nothing


def cpu_s(processes: list[psutil.Process]) -> float:
    """Seconds of CPU that the processes and their ended children have used."""
    return float(sum(sum(process.cpu_times()[:4]) for process in processes))


def peak_mb(processes: list[psutil.Process]) -> float:
    """MB (10^6 bytes) that the largest of the processes ever had resident."""
    peaks = []
    for process in processes:
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peaks += [int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmHWM:")]
    return max(peaks)


@contextmanager
def _processes(
    commands: list[list[str]], folder: Path, port: int, environment: dict[str, str] | None = None
) -> Iterator[list[psutil.Process]]:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: value for name, value in os.environ.items() if name not in NODELAY}
    running = []
    try:
        for number, command in enumerate(commands):
            with (folder / f"server{number}.log").open("wb") as log:
                process = subprocess.Popen(command, env=plain | (environment or {}), stdout=log, stderr=log)
            running.append(process)
            _wait_until_ready(process, folder / f"server{number}.log", port, says_so=sys.executable in command)
        yield [psutil.Process(process.pid) for process in running]
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait(60)


def _wait_until_ready(process: subprocess.Popen[Any], log: Path, port: int, *, says_so: bool) -> None:
    """Receivers share a port: each has to say itself that it listens."""
    wait_for_port(port, process)
    deadline = time.monotonic() + 30
    while says_so and "ready" not in log.read_text(errors="replace"):
        if time.monotonic() > deadline:
            raise AssertionError(log.read_text())
        time.sleep(0.05)


def _nothing() -> None:
    """Everything that was acknowledged is on disk already."""


def _syncfs(folder: Path) -> None:
    """Bring the file system of `folder` to disk (Linux syncfs)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle):
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(handle)


def _serve_pynetdicom(port: int, folder: Path) -> None:
    def on_store(event: Any) -> int:
        syntax = event.context.transfer_syntax
        uid = str(event.request.AffectedSOPInstanceUID)
        meta = file_meta(
            sop_class_uid=str(event.request.AffectedSOPClassUID), sop_instance_uid=uid, transfer_syntax_uid=syntax
        )
        with (folder / f"{uid}.dcm").open("wb") as file:
            file.write(meta)
            file.write(event.encoded_dataset(include_meta=False))
            file.flush()
            os.fsync(file.fileno())
        return 0

    ae = AE()
    ae.maximum_associations = 64
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(str(context.abstract_syntax), ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, on_store)])
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM])
    assert server is not None
    server.shutdown()


def counted(folder: Path) -> tuple[int, int]:
    """Members stored and syncs that they took, of all receivers of kind "counted" on this folder."""
    counts = [tuple(map(int, path.read_text().split())) for path in folder.glob("*.groups")]
    return sum(count[0] for count in counts), sum(count[1] for count in counts)


def main(arguments: list[str]) -> None:
    """The pynetdicom server: ``PORT FOLDER``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    _serve_pynetdicom(int(arguments[0]), Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
