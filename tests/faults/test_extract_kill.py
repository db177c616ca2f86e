"""kill -9 of an extraction at each of its steps, then again: the tables of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyspark.sql import SparkSession

from sphere.conf.settings import Settings
from sphere.jobs.extract import STEPS, run
from tests.support.extract_until import environment
from tests.support.landing import (
    all_tables,
    annotate,
    archive,
    by_uid,
    changed,
    copy_of,
    land,
    mixture,
    new_member,
    slices,
    table_rows,
)
from tests.support.tombs import delete, restore

pytestmark = [pytest.mark.faults, pytest.mark.spark]

SECTIONS: dict[str, Any] = {
    "ingest": {"on_conflict": "replace"},
    "spark": {"master": "local[1]", "driver_memory": "512m"},
}
OWN_JVM = {("headers", 2), ("instances", 1), ("replace", 1), ("bundles", 1)}
"""Steps whose run has a JVM that goes with it; the others' is a second driver of the tests' session, there at once."""


@pytest.fixture(scope="module")
def landed(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An archive that holds catalogued instances, and landed ones that touch every step."""
    settings = archive(tmp_path_factory.mktemp("kill") / "landed", **SECTIONS)
    land(settings, [new_member(data, second=-10) for data in slices(3, seed=1)])
    run(spark, settings)
    mixture(settings)
    annotate(settings)
    return settings


@pytest.fixture(scope="module")
def undisturbed(spark: SparkSession, landed: Settings) -> dict[str, Any]:
    """The tables after one run from beginning to end."""
    settings = copy_of(landed, landed.archive.state_dir.parent.with_name("undisturbed"), **SECTIONS)
    run(spark, settings)
    return all_tables(settings)


@pytest.mark.parametrize(("step", "call"), [*((step, 1) for step in STEPS), ("headers", 2), ("discover", 2)])
def test_killed_and_run_again(
    spark: SparkSession, landed: Settings, undisturbed: dict[str, Any], tmp_path: Path, step: str, call: int
) -> None:
    settings = copy_of(landed, tmp_path / "killed", **SECTIONS)
    own = (step, call) in OWN_JVM
    seen = killed(settings, step, call, None if own else spark)
    report = run(spark, settings)  # at once: the JVM of the killed run may still be about to end
    assert report.read == report.rows + report.duplicates + report.rejected
    assert all_tables(settings) == undisturbed
    assert run(spark, settings).read == 0
    gone, alive = psutil.wait_procs(seen, timeout=60)
    assert not alive, "the killed run's JVM and workers go with it"
    assert bool(gone) == own
    assert all_tables(settings) == undisturbed


@pytest.fixture(scope="module")
def buried(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An archive of which some is deleted, some restored after it had left the tables, and some of it comes again."""
    settings = archive(tmp_path_factory.mktemp("kill") / "buried", **SECTIONS)
    mixture(settings)
    run(spark, settings)
    uids = sorted(by_uid(settings))
    [rejected] = {row["SOPInstanceUID"] for row in table_rows(settings, "quarantine")} - {""}
    delete(settings, [*uids[:3], rejected])
    run(spark, settings)
    restore(settings, [*uids[1:3], rejected])
    delete(settings, uids[3:5])
    again = slices(4, seed=1)
    land(settings, [new_member(changed(data, PatientComments="again"), second=60) for data in again])
    return settings


@pytest.fixture(scope="module")
def followed(spark: SparkSession, buried: Settings) -> dict[str, Any]:
    """Its tables after one run from beginning to end."""
    settings = copy_of(buried, buried.archive.state_dir.parent.with_name("followed"), **SECTIONS)
    report = run(spark, settings)
    assert report.deleted and report.restored and report.read > report.restored
    return all_tables(settings)


@pytest.mark.parametrize(
    ("step", "call"),
    [
        ("tombstones", 1),
        ("conflicts", 1),
        ("quarantine", 1),
        ("replace", 1),
        ("roll up", 1),
        ("instances", 1),  # of what is restored
        ("bundles", 1),  # in the tables, and in tombstones still
        ("bundles", 2),
        ("headers", 2),  # of what came again: tombstones has what is deleted
    ],
)
def test_killed_while_tombstones_are_followed(
    spark: SparkSession, buried: Settings, followed: dict[str, Any], tmp_path: Path, step: str, call: int
) -> None:
    settings = copy_of(buried, tmp_path / "killed", **SECTIONS)
    killed(settings, step, call, spark)
    report = run(spark, settings)
    assert report.read == report.rows + report.duplicates + report.rejected
    assert all_tables(settings) == followed
    again = run(spark, settings)
    assert (again.read, again.deleted) == (0, 0)
    assert all_tables(settings) == followed


def killed(settings: Settings, step: str, call: int, spark: SparkSession | None) -> set[psutil.Process]:
    """Kill an extraction at a step, in the JVM of `spark` or one of its own; returns the processes that it started."""
    kind = "own" if spark is None else "shared"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.extract_until", settings.model_dump_json(), step, str(call), kind],
        env=os.environ | (environment(spark) if spark else {}),
        stderr=subprocess.PIPE,
        text=True,
    )
    driver = psutil.Process(process.pid)
    seen: set[psutil.Process] = set()
    watch(lambda: process.poll() is not None, lambda: seen.update(_children(driver)))
    assert process.returncode == -signal.SIGKILL, process.stderr.read()[-2000:] if process.stderr else ""
    return seen


def watch(done: Callable[[], bool], look: Callable[[], object]) -> None:
    """Look again and again until it is done."""
    import time

    while not done():
        look()
        time.sleep(0.1)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
