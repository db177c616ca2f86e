"""What `sphere compact` takes: ``python -m tests.bench.bench_compact [--root URL] [--instances N] [--lines N]``.

Lands instances, has every TENTH deleted, and compacts; then once more beside journals of so many lines, which are read
to find copies.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

from sphere.catalog.tombstones import open_tombstones
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.journal import Landed, journal_path
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from sphere.jobs.compact import run
from sphere.jobs.tables import Tables
from tests.support.bundles import new_member

TENTH = 10


def main() -> None:
    """Print one line for the bundles, one for the journals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="file:storage")
    parser.add_argument("--instances", type=int, default=2000)
    parser.add_argument("--kib", type=int, default=514)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data = {"storage": {"root": options.root}, "catalog": {"root": "file:catalog"}}
        settings = from_dict(data, base=Path(folder))
        records = _landed(settings, options.instances, options.kib)
        _deleted(settings, records)
        began = time.perf_counter()
        report = run(settings, after=timedelta())
        took = time.perf_counter() - began
        size = sum(one.length for one in records)
        print(f"{size / 1e6:.0f} MB in {report.bundles} bundles: {took:.1f} s, {size / 1e6 / took:.0f} MB/s; {report}")
        _journals(settings, options.lines)


def _landed(settings: Settings, count: int, kib: int) -> list[MemberRecord]:
    writer = BundleWriter(open_storage(settings.storage.root, user=settings.storage.user), settings)
    data = os.urandom(kib << 10)
    try:
        return [writer.store(new_member(number, b"%12d" % number + data)) for number in range(count)]
    finally:
        writer.close()


def _deleted(settings: Settings, records: list[MemberRecord]) -> None:
    """As an extraction leaves it."""
    gone = records[::TENTH]
    with closing(open_tombstones(settings)) as graves:
        graves.delete(gone, by="bench")
    names = ("bundle", "offset", "length", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
    said = {"deleted_at": datetime.now(timezone.utc), "deleted_by": "bench", "reason": ""}
    tables = Tables(settings)
    tables.merge("tombstones", [{**{name: getattr(one, name) for name in names}, **said} for one in gone])
    rows = [
        {"bundle": one, "journal_bytes": 1, "members": 1, "sealed": True} for one in {one.bundle for one in records}
    ]
    tables.merge("bundles", rows)


def _journals(settings: Settings, lines: int) -> None:
    """A tar of one member with a long journal stands for many bundles: only its journal is read."""
    storage = open_storage(settings.storage.root, user=settings.storage.user)
    bundle = next(iter(Landed(storage).bundles())).bundle
    line = next(iter(Landed(storage).records(bundle)[0])).to_json() + b"\n"
    each = 5000
    for number in range(lines // each):
        other = bundle.removesuffix(".tar") + f"-{number}.tar"
        storage.write(other, b"")
        storage.write(journal_path(other), line * each)
    [record] = _landed(settings, 1, 1)
    _deleted(settings, [record])
    began = time.perf_counter()
    report = run(settings, after=timedelta())
    print(f"{lines} journal lines in {report.bundles} bundles: {time.perf_counter() - began:.1f} s; {report}")


if __name__ == "__main__":
    main()
