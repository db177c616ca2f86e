"""`sphere compact`: what it says, what it refuses, and that it is recorded."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner, Result

import sphere
from sphere.catalog.tombstones import open_tombstones
from sphere.cli import main
from sphere.conf.loading import load
from sphere.conf.settings import Settings
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage import open_storage
from sphere.jobs.tables import Tables
from tests.support.landing import land, new_member, slices, table_rows

pytestmark = pytest.mark.unit


@pytest.fixture
def settings(config: Path) -> Settings:
    return load(config, environ={})


@pytest.fixture
def records(settings: Settings) -> list[MemberRecord]:
    """Three members of one bundle, the second and third of deleted instances, as an extraction leaves it."""
    records = land(settings, [new_member(data) for data in slices(3, seed=1)])
    with closing(open_tombstones(settings)) as graves:
        graves.delete(records[1:], by="test")
    tables = Tables(settings)
    names = ("bundle", "offset", "length", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
    now = {"deleted_at": datetime.now(timezone.utc), "deleted_by": "test", "reason": ""}
    tables.merge("tombstones", [{**{name: getattr(one, name) for name in names}, **now} for one in records[1:]])
    tables.merge("bundles", [{"bundle": records[0].bundle, "journal_bytes": 1, "members": 3, "sealed": True}])
    return records


def call(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--config", str(config), *arguments])


def audited(settings: Settings) -> list[dict[str, object]]:
    folder = Path(settings.storage.root.removeprefix("file://")) / "audit"
    lines = [line for path in sorted(folder.rglob("*.jsonl")) for line in path.read_bytes().splitlines()]
    return [found for line in lines if (found := orjson.loads(line))["method"] == "COMPACT"]


def test_nothing_is_deleted(config: Path) -> None:
    result = call(config, "compact")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("0 instances (0 members, 0.0 MB) erased from 0 of 0 bundles, 0 of them removed; ")


def test_what_goes_and_what_stays(config: Path, settings: Settings, records: list[MemberRecord]) -> None:
    size = sum(one.length for one in records[1:])
    assert "kept until sphere compact" in call(config, "status").stdout
    assert orjson.loads(call(config, "status", "--json").stdout)["compactable_bytes"] == size
    result = call(config, "compact")
    assert (result.exit_code, "staying: 2 deleted too lately" in result.stdout) == (0, True)
    result = call(config, "compact", "--after", "0", "--dry-run", "--json")
    told = orjson.loads(result.stdout)
    assert (told["dry_run"], told["instances"], told["members"], told["bytes"]) == (True, 2, 2, size)
    assert "would be erased from 1 of 1 bundles" in call(config, "compact", "--after", "0", "--dry-run").stdout
    storage = open_storage(settings.storage.root)
    kept = storage.read(records[0].bundle, records[0].offset, records[0].length)
    assert storage.read(records[1].bundle, records[1].offset, 4096).strip(b"\0")
    result = call(config, "compact", "--after", "0")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("2 instances (2 members, 0.0 MB) erased from 1 of 1 bundles, 0 of them removed; ")
    assert not storage.read(records[1].bundle, records[1].offset, records[1].length).strip(b"\0")
    assert storage.read(records[0].bundle, records[0].offset, records[0].length) == kept
    assert all(row["erased_at"] for row in table_rows(settings, "tombstones"))
    assert "kept until sphere compact" not in call(config, "status").stdout
    done, first = audited(settings)[-1], audited(settings)[0]
    assert (done["outcome"], done["entities"], done["bytes"], done["failed"]) == ("done", 2, size, 0)
    assert (first["entities"], len(audited(settings))) == (0, 2)
    assert str(done["who"]).startswith("cli:")


def test_undelete_is_refused(config: Path, settings: Settings, records: list[MemberRecord]) -> None:
    call(config, "compact", "--after", "0")
    study = records[0].StudyInstanceUID
    result = call(config, "undelete", "--study", study)
    assert result.exit_code == 1
    assert result.stderr.startswith("sphere: the bytes of 2 of these instances are gone since compaction")
    with closing(open_tombstones(settings)) as graves:
        graves.delete(records[:1], by="test")
        assert graves.count() == 3
    assert call(config, "undelete", "--study", study).exit_code == 1
    result = call(config, "undelete", "--study", study, "--remaining")
    assert (result.exit_code, result.stdout[:6]) == (0, "1 are ")


def test_a_bundle_that_is_damaged_is_named(config: Path, settings: Settings, records: list[MemberRecord]) -> None:
    storage = open_storage(settings.storage.root)
    data = storage.read(records[0].bundle)
    storage.write(records[0].bundle, data[:-512])
    result = call(config, "compact", "--after", "0")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"bundle {records[0].bundle}: at byte ")
    assert "1 failed" in result.stdout
    assert audited(settings)[-1]["outcome"] == "incomplete"
    assert all(row["erased_at"] is None for row in table_rows(settings, "tombstones"))
    storage.write(records[0].bundle, data)
    assert call(config, "compact").stdout.startswith("2 instances ")  # the decision was made


@pytest.mark.parametrize(
    "arguments",
    [
        ["--after", "7"],
        ["--after", "-1d"],
        ["--after", "1.5d"],
        ["--after", ""],
        ["--vacuum", "forever"],
        ["--vacuum", "9999999d"],
        ["everything"],
        ["--after"],
    ],
)
def test_bad_input_changes_nothing(
    config: Path, settings: Settings, records: list[MemberRecord], arguments: list[str]
) -> None:
    before = open_storage(settings.storage.root).read(records[0].bundle)
    result = call(config, "compact", *arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert open_storage(settings.storage.root).read(records[0].bundle) == before
    assert audited(settings) == []


def test_without_a_catalog(config: Path) -> None:
    result = CliRunner().invoke(main, ["--config", str(config), "compact"], env={"SPHERE_CATALOG__MODE": "files"})
    assert (result.exit_code, "what is deleted is in no table" in result.stderr) == (2, True)


def test_from_python(config: Path, records: list[MemberRecord]) -> None:
    with sphere.open(config) as archive:
        assert archive.compact(dry_run=True).members == 0
        steps: list[str] = []
        report = archive.compact(after=timedelta(), vacuum=timedelta(), on_step=lambda name, *_: steps.append(name))
    assert (report.instances, report.rewritten, dict(report.failures)) == (2, 1, {})
    assert steps[0] == "lock"
    assert steps[-1] == "done"
