"""A forwarder that can be killed, and a catalog made without Spark; `python -m tests.support.forwarder` is its body."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from sphere.catalog.schema import TABLES
from sphere.conf import logs
from sphere.conf.settings import Settings
from sphere.ingest.header import Header, HeaderReader, RowBuilder
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from sphere.jobs.forward import run_forwarder
from sphere.jobs.parquet import FileWriter
from sphere.jobs.tables import NewFile, Tables
from tests.support.receiver import ROOT


def catalogue(settings: Settings, records: Iterable[MemberRecord], *, instead: Sequence[NewFile] = ()) -> NewFile:
    """Put rows of these members into `instances` as one file, in place of the files `instead`."""
    storage, schema = open_storage(settings.storage.root), TABLES["instances"].schema
    rows = RowBuilder(schema)
    for record in records:
        data = storage.read(record.bundle, record.offset, record.length)
        header = HeaderReader(max_header=1 << 20).read(data, size=len(data), fetch=lambda offset, count: b"")
        assert isinstance(header, Header)
        rows.append(header, record)
    writer, tables = FileWriter(TABLES["instances"]), Tables(settings)
    writer.add(rows.batch())
    instances = tables.ensure("instances")
    file = writer.finish(open_storage(settings.catalog_root), "instances")
    tables.append("instances", [file], removed={one.path: one.size for one in instead}, onto=instances)
    return file


@contextmanager
def running_forwarder(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A process that forwards; killed at the end."""
    command = [sys.executable, "-m", "tests.support.forwarder", settings.model_dump_json()]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    logs.configure("info")
    run_forwarder(Settings.model_validate_json(sys.argv[1]), threading.Event())
