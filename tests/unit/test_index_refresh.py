"""Refreshing an index: the same answers as one made from nothing, and nothing opened that did not change."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any, get_args

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from sphere.catalog import index as index_module
from sphere.catalog import index_base, index_build, overlay
from sphere.catalog.index import IndexCache
from sphere.catalog.index_folder import IndexFolder
from sphere.catalog.index_note import note_of, parts_of
from sphere.catalog.query import Query
from sphere.catalog.rollup import roll_up_sql, source_columns
from sphere.catalog.rows import folder_of
from sphere.catalog.schema import TABLES, Level
from sphere.catalog.service import QueryService
from sphere.conf.settings import Settings
from tests.bench import hospital_catalog
from tests.support.catalog import Row, archive, instance, roll_up, write_catalog, write_table

pytestmark = pytest.mark.unit

ASKED: dict[Level, tuple[str, ...]] = {
    "PATIENT": ("PatientName", "NumberOfPatientRelatedStudies", "NumberOfPatientRelatedInstances"),
    "STUDY": ("PatientName", "ModalitiesInStudy", "NumberOfStudyRelatedInstances", "NumberOfPatientRelatedStudies"),
    "SERIES": ("Modality", "PatientID", "NumberOfSeriesRelatedInstances"),
    "IMAGE": ("InstanceNumber", "PatientID", "Modality"),
}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come from the newest version, however long that takes on a loaded machine."""
    monkeypatch.setattr(index_module, "REFRESH_WAIT_S", 60.0)


def row(number: int, study: int, patient: int, **more: Any) -> Row:
    return instance(
        number,
        StudyInstanceUID=f"9.{study}",
        SeriesInstanceUID=f"9.{study}.{number % 2}",
        PatientID=f"P{patient}" if patient else None,
        IssuerOfPatientID=None,
        PatientName=f"Name{patient}",
        Modality=random.Random(number).choice(["CT", "MR"]),
        InstanceNumber=number,
        **more,
    )


def commit(settings: Settings, rows: list[Row], new: list[Row]) -> None:
    """A batch of extraction: `new` in a file of its own, the roll-ups of all `rows`."""
    write_table(settings, TABLES["instances"], new, "append")
    rolled(settings, rows)


def rolled(settings: Settings, rows: list[Row]) -> None:
    studies = roll_up(TABLES["studies"].roll_up, rows)
    for study in studies:
        of_patient = f"{len(study['PatientID'])}:{study['PatientID']}" if study["PatientID"] else None
        study["patient_key"] = of_patient or f"0:{study['StudyInstanceUID']}"
    write_table(settings, TABLES["series"], roll_up(TABLES["series"].roll_up, rows))
    write_table(settings, TABLES["studies"], studies)
    write_table(settings, TABLES["patients"], roll_up(TABLES["patients"].roll_up, studies))
    write_table(settings, TABLES["bundles"], [{"bundle": "x", "journal_bytes": len(rows), "members": 1}])


def everything(service: QueryService) -> dict[str, Any]:
    """Answers of every level, and how many they are said to be."""
    found: dict[str, Any] = {}
    for level in get_args(Level):
        for match in ({}, {"PatientID": "P1"}, {"StudyInstanceUID": ["9.1", "9.2"]} if level != "PATIENT" else {}):
            query = Query.build(level, match, return_keys=ASKED[level])
            answers = [one.identifier().to_json_dict() for one in service.find(query)]
            assert service.count(Query.build(level, match)) == len(answers)
            found[f"{level} {match}"] = answers
    found["stored"] = list(service.lookup_instances())
    found["series"] = list(service.lookup_instances(series=["9.1.0", "9.2.1"]))
    return found


def files(settings: Settings) -> list[Path]:
    return sorted((settings.archive.state_dir / "index").glob("*.duckdb"))


@pytest.mark.parametrize("found", ["by key", "by number", "without rows"])
def test_the_same_answers_as_one_made_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    """Whichever way the rows of patients that are taken over are found."""
    monkeypatch.setattr(overlay, "NUMBERED", 0 if found == "by number" else 200)
    chance = random.Random(7)
    settings = archive(tmp_path)
    rows = [row(number, number // 4, number // 8) for number in range(80)]
    write_catalog(settings, rows, files=5)
    with QueryService(settings) as service:
        everything(service)
        [base] = files(settings)
        if found == "without rows":
            monkeypatch.setattr(IndexFolder, "mend_rows", lambda self, base: None)
            shutil.rmtree(folder_of(base))
        for turn in range(3):
            new = [
                row(100 * (turn + 1) + number, chance.randrange(25 + turn), chance.randrange(12)) for number in range(5)
            ]
            if turn == 1:  # a file is gone: one of those that a batch rewrote
                table = DeltaTable(f"{settings.catalog_root}/instances")
                table.delete("\"StudyInstanceUID\" = '9.2'")
                rows = [one for one in rows if one["StudyInstanceUID"] != "9.2"]
            rows += new
            commit(settings, rows, new)
            seen = everything(service)
            assert base in files(settings), "only a refresh was made"
    fresh = settings.archive.model_copy(update={"state_dir": tmp_path / "fresh"})
    with QueryService(settings.model_copy(update={"archive": fresh})) as reference:
        assert seen == everything(reference)
    with QueryService(settings) as again:  # another process begins with what is there
        assert everything(again) == seen


@pytest.mark.parametrize("memory", ["400MB", "1KB"])  # all that was read, and less than DuckDB can let go of
def test_who_keeps_the_base_goes_on_from_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    """Refreshes, another base below them, and one that was damaged: as by who keeps none."""
    monkeypatch.setattr(index_base, "KEPT_MEMORY", memory)
    settings = archive(tmp_path)
    rows = [row(number, number // 4, number // 8) for number in range(40)]
    write_catalog(settings, rows, files=5)
    kept = IndexFolder(settings, keep=True)
    kept.make()
    kept.rehearse()
    for turn in range(6):
        new = [row(100 * (turn + 1) + number, turn * 3 + number, turn) for number in range(3)]
        rows += new
        commit(settings, rows, new)
        with monkeypatch.context() as patch:
            if turn == 2:  # too much for a refresh
                patch.setattr(index_build, "LEAST", 0)
                patch.setattr(index_build, "SHARE", 0.0)
            made = kept.make()
        assert bool(note_of(made).base) is (turn not in (2, 4))
        if turn == 3:
            parts_of(made, note_of(made))[0].write_bytes(b"not a database")
        else:
            with QueryService(settings) as service:
                seen = everything(service)
                assert made in files(settings)
    kept.close()
    fresh = settings.archive.model_copy(update={"state_dir": tmp_path / "fresh"})
    with QueryService(settings.model_copy(update={"archive": fresh})) as reference:
        assert seen == everything(reference)


def test_what_did_not_change_is_not_opened(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    rows = [row(number, number // 2, number // 4) for number in range(40)]
    write_catalog(settings, rows, files=10)
    cache = IndexCache(settings)
    holding = cache.current().files
    kept = holding.of_studies(cache.current().connection.cursor(), ["9.3"])
    new = [row(100, 3, 1), row(101, 77, 1)]
    commit(settings, [*rows, *new], new)
    for path in set(holding.all()) - set(kept):
        Path(path).unlink()
    for name in ("series", "studies", "patients"):
        for path in DeltaTable(f"{settings.catalog_root}/{name}").file_uris():
            Path(path).unlink()
    cache.close()
    with QueryService(settings) as service:
        asked = Query.build("STUDY", {"PatientID": "P1"}, return_keys=ASKED["STUDY"])
        counts = {
            str(found.identifier().StudyInstanceUID): (
                found.identifier().NumberOfStudyRelatedInstances,
                found.identifier().NumberOfPatientRelatedStudies,
            )
            for found in service.find(asked)
        }
    assert counts == {"9.2": (2, 3), "9.3": (3, 3), "9.77": (1, 3)}


@pytest.mark.parametrize("left", [0, 1, 3, 8])
def test_rows_that_only_leave(tmp_path: Path, left: int) -> None:
    """What was deleted: some rows of a file, whole files, everything; nothing came."""
    settings = archive(tmp_path)
    rows = [row(number, number // 2, number // 4) for number in range(16)]
    write_catalog(settings, rows, files=8)
    with QueryService(settings) as service:
        everything(service)
        [base] = files(settings)
        kept = rows[:left]
        stays = ", ".join(f"'{one['SOPInstanceUID']}'" for one in kept)
        DeltaTable(f"{settings.catalog_root}/instances").delete(f'"SOPInstanceUID" NOT IN ({stays})' if kept else None)
        rolled(settings, kept)
        seen = everything(service)
        assert len(seen["stored"]) == left
        assert base in files(settings), "only a refresh was made"
    fresh = settings.archive.model_copy(update={"state_dir": tmp_path / "fresh"})
    with QueryService(settings.model_copy(update={"archive": fresh})) as reference:
        assert seen == everything(reference)


@pytest.mark.parametrize("what", ["another table", "roll-ups alone"])
def test_made_anew_where_instances_do_not_tell_all(tmp_path: Path, what: str) -> None:
    settings = archive(tmp_path)
    rows = [row(number, number // 2, number // 4) for number in range(8)]
    write_catalog(settings, rows)
    with QueryService(settings) as service:
        assert service.count(Query.build("STUDY")) == 4
        [before] = files(settings)
        if what == "another table":
            (settings.archive.state_dir / "away").mkdir()
            instances = Path(settings.catalog_root.removeprefix("file://")) / "instances"
            instances.rename(settings.archive.state_dir / "away" / "instances")
            write_table(settings, TABLES["instances"], rows[:4])
        rolled(settings, rows[:4])
        assert service.count(Query.build("STUDY")) == 2
        assert before not in files(settings)


def test_a_damaged_base_below_a_refresh(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    rows = [row(number, number // 2, number // 4) for number in range(8)]
    write_catalog(settings, rows)
    new = [row(100, 3, 1)]
    with QueryService(settings) as service:
        assert service.count(Query.build("IMAGE")) == 8
        [base] = files(settings)
        commit(settings, [*rows, *new], new)
        assert service.count(Query.build("IMAGE")) == 9
    base.write_bytes(b"not a database")
    with QueryService(settings) as service:
        assert service.count(Query.build("IMAGE")) == 9


def test_the_generated_hospital_is_one_that_extraction_could_have_written(tmp_path: Path) -> None:
    settings, made = hospital_catalog.kept(tmp_path, 40)
    instances = table(settings, "instances")
    assert len(instances) == made.instances == len(set(instances["SOPInstanceUID"].to_pylist()))
    for name, source in (("series", "instances"), ("studies", "instances"), ("patients", "studies")):
        with duckdb.connect() as db:
            db.execute("SET TimeZone = 'UTC'")
            db.register(source, table(settings, source).select(list(source_columns(name))))
            expected = db.sql(roll_up_sql(name, source)).to_arrow_table().select(TABLES[name].schema.names)
        keys = [(key, "ascending") for key in TABLES[name].key]
        found = table(settings, name).sort_by(keys).to_pylist()
        assert found == expected.cast(TABLES[name].schema).sort_by(keys).to_pylist()
    header = instances["dataset"][0].as_py()
    assert 1_500 < len(header) < 5_000


def table(settings: Settings, name: str) -> pa.Table:
    paths = DeltaTable(f"{settings.catalog_root}/{name}").file_uris()
    return pa.concat_tables([pq.read_table(path.removeprefix("file://"), schema=TABLES[name].schema) for path in paths])
