"""What `bench_query` asks: SPHERE's receivers over a generated catalog, and Orthanc with either of its databases."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from pydicom.uid import ExplicitVRLittleEndian

from sphere.conf.loading import from_dict
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp.upper.command import C_STORE_RQ
from sphere.scp.upper.outgoing import Outgoing
from sphere.scp.upper.requestor import MAX_CONTEXTS, Proposed, connect
from sphere.scp.web.server import run_web
from tests.bench.hospital import KINDS
from tests.support.dicom_tools import require_tool, running, wait_for_port
from tests.support.ports import free_port

PLUGINS = Path("/usr/share/orthanc/plugins")
SPREAD = 20
SAID_S = 60.0
"""Seconds between two words on how far loading is."""
POSTGRES = Path("/usr/lib/postgresql/15/bin")


@dataclass(frozen=True, slots=True)
class Ports:
    """Where a server listens."""

    dicom: int
    http: int


@contextmanager
def orthanc(folder: Path, *, postgresql: int = 0) -> Iterator[Ports]:
    """Orthanc with its DICOMweb plugin; its index is SQLite, or the PostgreSQL that listens on port `postgresql`."""
    folder.mkdir(parents=True, exist_ok=True)
    plugins = ["libOrthancDicomWeb.so", *(["libOrthancPostgreSQLIndex.so"] if postgresql else [])]
    dicom, http = free_port(), free_port()
    configuration = {
        "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "HttpPort": http,
        "DicomPort": dicom, "DicomAet": "ORTHANC", "DicomCheckCalledAet": False, "DicomAlwaysAllowStore": True,
        "DicomAlwaysAllowFind": True, "LimitFindResults": 0, "LimitFindInstances": 0, "SyncStorageArea": False,
        "SaveJobs": False, "DefaultEncoding": "Utf8", "Plugins": [str(PLUGINS / name) for name in plugins],
        "DicomThreadsCount": 16, "DicomScpTimeout": 300, "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        "KeepAlive": True, "AuthenticationEnabled": False, "RemoteAccessAllowed": False, "HttpThreadsCount": 16,
    }  # fmt: skip
    if postgresql:
        configuration["PostgreSQL"] = {
            "EnableIndex": True, "EnableStorage": False, "Host": "127.0.0.1", "Port": postgresql,
            "Database": "postgres", "Username": "postgres", "Password": "",
        }  # fmt: skip
    path = folder / "orthanc.json"
    path.write_text(json.dumps(configuration))
    with running([require_tool("Orthanc"), path], http, folder / "orthanc.log") as process:
        wait_for_port(dicom, process)
        yield Ports(dicom, http)


def orthanc_study(patient_id: str, study_instance_uid: str) -> str:
    """Orthanc's own name for a study: SHA-1 of its identifiers, in groups of eight digits."""
    digest = hashlib.sha1(f"{patient_id}|{study_instance_uid}".encode(), usedforsecurity=False).hexdigest()
    return "-".join(digest[at : at + 8] for at in range(0, 40, 8))


@contextmanager
def postgres(folder: Path) -> Iterator[int]:
    """The port of a PostgreSQL with Debian's defaults; where we are root, it runs as its own user. What it holds is
    kept in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    as_user: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        for parent in folder.parents:
            if not parent.stat().st_mode & 1:
                parent.chmod(parent.stat().st_mode | 0o711)
        as_user = ["runuser", "-u", "postgres", "--"]
    port, data = free_port(), folder / "data"
    if not data.exists():
        subprocess.run(
            [*as_user, str(POSTGRES / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    command = [*as_user, str(POSTGRES / "postgres"), "-D", str(data), "-p", str(port), "-k", "", "-h", "127.0.0.1"]
    with running(command, port, folder / "postgres.log"):
        yield port


@contextmanager
def web(settings: Settings) -> Iterator[tuple[int, int]]:
    """Port and process id of the web server of an archive."""
    settings = settings.model_copy(update={"web": settings.web.model_copy(update={"port": 0})})
    context = multiprocessing.get_context("spawn")
    ports: Any = context.Queue()
    process = context.Process(target=_serve_web, args=(settings, ports))
    process.start()
    try:
        assert process.pid is not None
        yield ports.get(timeout=60), process.pid
    finally:
        process.terminate()
        process.join()


def _serve_web(settings: Settings, ports: Any) -> None:
    run_web(settings, ready=ports.put)


@dataclass
class Loaded:
    """What an Orthanc was given of a catalog, kept beside its database: loading goes on where it stopped."""

    seconds: float = 0.0
    instances: int = 0
    studies: list[str] = field(default_factory=list)


def load(port: int, settings: Settings, note: Path, *, seconds: float, first: str = "") -> Loaded:
    """C-STORE instances of the catalog without their pixels, study by study, the study `first` before all others, until
    that took so long in all."""
    loaded = Loaded(**orjson.loads(note.read_bytes())) if note.exists() else Loaded()
    if loaded.seconds < seconds:
        began = time.monotonic()
        _store(port, settings, loaded, first, until=began + seconds - loaded.seconds)
        loaded.seconds += time.monotonic() - began
        note.write_bytes(orjson.dumps(loaded))
    return loaded


def _store(port: int, settings: Settings, loaded: Loaded, first: str, *, until: float) -> None:
    peer = Peer(name="bench", ae_title="ORTHANC", host="127.0.0.1", port=port)
    proposed = [Proposed(kind.sop_class, (str(ExplicitVRLittleEndian),)) for kind in KINDS][:MAX_CONTEXTS]
    with connect(peer, from_dict({}, base=Path.cwd()), proposed) as requested:
        contexts = {str(context.abstract_syntax): context for context in requested.user_contexts}
        said = time.monotonic()
        for uid, header in islice(_headers(settings, first), loaded.instances, None):
            if not loaded.studies or uid != loaded.studies[-1]:
                if time.monotonic() > until:
                    break
                if time.monotonic() > said + SAID_S:
                    said = time.monotonic()
                    print(f"  loading: {loaded.instances:,} instances, {until - said:,.0f} s left", flush=True)
                loaded.studies.append(uid)
            elements = orjson.loads(header)
            sop_class, instance = (elements[tag]["Value"][0] for tag in ("00080016", "00080018"))
            command = {
                "CommandField": C_STORE_RQ, "Priority": 0, "AffectedSOPClassUID": sop_class,
                "AffectedSOPInstanceUID": instance,
            }  # fmt: skip
            status = requested.ask(contexts[sop_class], command, Outgoing.of(encoded(elements)))["Status"]
            assert status == 0, f"0x{status:04X}"
            loaded.instances += 1


def encoded(elements: dict[str, Any]) -> bytes:
    """A generated header in Explicit VR Little Endian (PS3.5 7.1.2): pydicom takes as long for it as Orthanc does to
    store it."""
    parts: list[bytes] = []
    for tag, element in sorted(elements.items()):
        vr, values = element["vr"], element.get("Value", [])
        if vr == "SQ":
            items = [encoded(item) for item in values]
            data = b"".join(b"\xfe\xff\x00\xe0" + len(item).to_bytes(4, "little") + item for item in items)
        elif vr in _NUMBERS:
            data = struct.pack(f"<{len(values)}{_NUMBERS[vr]}", *values)
        else:
            texts = ("=".join(one.values()) if isinstance(one, dict) else _text(one) for one in values)
            data = "\\".join(texts).encode()
            data += (b"\0" if vr == "UI" else b" ") * (len(data) % 2)
        size = b"\0\0" + len(data).to_bytes(4, "little") if vr in _LONG else len(data).to_bytes(2, "little")
        number = int(tag, 16)
        parts.append(struct.pack("<HH", number >> 16, number & 0xFFFF) + vr.encode() + size + data)
    return b"".join(parts)


_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_LONG = frozenset(("SQ", "UC", "UR", "UT"))


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _headers(settings: Settings, before: str) -> Iterator[tuple[str, str]]:
    """StudyInstanceUIDs and headers of the catalog, study by study: the study `before`, where one is given, then in
    turns that each take some studies of every file.

    A file is sorted by study, and the UIDs of a modality begin alike: its first studies are all of one modality.
    """
    actions = pa.table(DeltaTable(f"{settings.catalog_root}/instances").get_add_actions(flatten=True))
    order = sorted(zip(actions["min.received_at"].to_pylist(), actions["path"].to_pylist(), strict=True))
    folder = Path(settings.catalog_root.removeprefix("file://")) / "instances"
    for _, path in order if before else ():
        found = pq.read_table(folder / path, columns=["dataset"], filters=[("StudyInstanceUID", "=", before)])
        yield from ((before, header) for header in found["dataset"].to_pylist())
    for turn in range(SPREAD):
        for _, path in order:
            for batch in pq.ParquetFile(folder / path).iter_batches(2048, columns=["StudyInstanceUID", "dataset"]):
                for uid, dataset in zip(batch[0].to_pylist(), batch[1].to_pylist(), strict=True):
                    if zlib.crc32(uid.encode()) % SPREAD == turn and uid != before:
                        yield uid, dataset


def memory_mib(pids: list[int]) -> float:
    """MiB that processes have in memory, what they share counted once (PSS)."""
    every = {
        pid for top in pids for pid in (top, *(child.pid for child in psutil.Process(top).children(recursive=True)))
    }
    return sum(psutil.Process(pid).memory_full_info().pss for pid in every) / (1 << 20)
