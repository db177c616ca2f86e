"""kill -9 of a compaction at each of its steps, then again: bundles and tables of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from sphere.catalog.tombstones import open_tombstones
from sphere.conf.errors import BytesGone
from sphere.conf.settings import Settings
from sphere.ingest.journal import Landed
from sphere.ingest.recovery import recover, verify
from sphere.ingest.storage import open_storage
from sphere.jobs.compact import STEPS, run
from sphere.jobs.extract import run as extract
from tests.support.landing import all_tables, archive, by_uid, copy_of, land, new_member, slices, table_rows
from tests.support.tombs import delete

pytestmark = [pytest.mark.faults, pytest.mark.spark]

ORIGIN = "import:/cd/MARKER^NAME"
AGAIN = [("copy", 2), ("rename", 2), ("journal", 2)]


@pytest.fixture(scope="module")
def deleted(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An archive of four bundles: of two of them some members were deleted, of one all, of one a copy."""
    settings = archive(tmp_path_factory.mktemp("kill") / "deleted")
    theirs, others = slices(4, seed=1), slices(4, seed=2, study=2)
    land(settings, [new_member(others[0]), new_member(theirs[0], origin=ORIGIN), new_member(others[1])])
    land(settings, [new_member(theirs[1], second=1, origin=ORIGIN), new_member(others[2], second=1)])
    land(settings, [new_member(data, second=2, origin=ORIGIN) for data in theirs[2:]])
    land(settings, [new_member(theirs[2], second=3, origin=ORIGIN), new_member(others[3], second=3)])
    extract(spark, settings)
    delete(settings, [new_member(data).SOPInstanceUID for data in theirs])
    extract(spark, settings)
    return settings


@pytest.fixture(scope="module")
def undisturbed(deleted: Settings) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Tables and bundles after one run from beginning to end."""
    settings = copy_of(deleted, deleted.archive.state_dir.parent.with_name("undisturbed"))
    report = run(settings, after=timedelta(), vacuum=timedelta())
    assert (report.instances, report.members, report.rewritten, report.removed) == (4, 5, 3, 1)
    return tables(settings), bundles(settings)


def tables(settings: Settings) -> dict[str, Any]:
    """Every row; of when bytes went only whether."""
    found = all_tables(settings)
    for row in found["tombstones"]:
        row["erased_at"] = row["erased_at"] is not None
    return found


def bundles(settings: Settings) -> dict[str, bytes]:
    """Every file of the bundles, hidden ones too."""
    root = Path(settings.storage.root.removeprefix("file://"), "bundles")
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def live(settings: Settings) -> dict[str, bytes]:
    storage = open_storage(settings.storage.root)
    return {
        uid: storage.read(row["bundle"], row["offset"], row["length"]) for uid, row in sorted(by_uid(settings).items())
    }


@pytest.mark.parametrize(("step", "call"), [*((step, 1) for step in STEPS), *AGAIN])
def test_killed_and_run_again(
    deleted: Settings, undisturbed: tuple[dict[str, Any], dict[str, bytes]], tmp_path: Path, step: str, call: int
) -> None:
    settings = copy_of(deleted, tmp_path / "killed")
    before = live(settings)
    command = [sys.executable, "-m", "tests.support.compact_until", settings.model_dump_json(), step, str(call)]
    killed = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert live(settings) == before
    undone = back(settings)
    recover(open_storage(settings.storage.root), settings, now=lambda: 1e12)
    assert live(settings) == before
    run(settings, after=timedelta(), vacuum=timedelta())
    if undone:  # killed before it was said: undoing it was let in, and then nothing goes
        assert b"MARKER" in b"".join(bundles(settings).values())
        delete(settings, undone, like=settings)
        run(settings, after=timedelta(), vacuum=timedelta())
    assert bundles(settings) == undisturbed[1]
    assert tables(settings) == undisturbed[0]
    assert b"MARKER" not in b"".join(bundles(settings).values())
    assert live(settings) == before
    storage = open_storage(settings.storage.root)
    for state in Landed(storage).bundles():
        assert verify(storage, state.bundle).problems == ()


def back(settings: Settings) -> list[str]:
    """Have everything shown again that can be; what was said to go cannot."""
    uids = [row["SOPInstanceUID"] for row in table_rows(settings, "tombstones")]
    with closing(open_tombstones(settings)) as graves:
        try:
            return sorted(set(uids)) if graves.restore(uids, by="test") else []
        except BytesGone:
            return []
