"""Lookups beside DuckDB: the answers that DuckDB gives to the same queries, and what is DuckDB's stays so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner

from sphere.archive import Archive
from sphere.catalog import direct
from sphere.catalog import rows as rows_module
from sphere.catalog.direct import look_up
from sphere.catalog.query import Query
from sphere.catalog.rows import RowStore
from sphere.catalog.schema import Level
from sphere.catalog.service import QueryService
from sphere.cli import main
from sphere.conf.errors import QueryError
from sphere.conf.settings import Settings
from tests.bench import hospital, hospital_catalog

pytestmark = pytest.mark.unit

STUDY = ("PatientName", "PatientID", "StudyDate", "ModalitiesInStudy", "StudyInstanceUID", "NumberOfStudyRelatedSeries")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, hospital.Hospital]:
    return hospital_catalog.kept(tmp_path_factory.mktemp("direct"), 120)


@pytest.fixture(scope="module")
def service(made: tuple[Settings, hospital.Hospital]) -> Iterator[QueryService]:
    with QueryService(made[0]) as opened:
        yield opened


def asked(made: hospital.Hospital) -> list[tuple[Level, dict[str, Any], bool]]:
    """Queries, and whether they take no database."""
    value = {keyword: made.study_values[keyword][7].as_py() for keyword in ("PatientID", "AccessionNumber")}
    uids = [made.study_uid[number].as_py() for number in (3, 50)]
    family = str(made.study_values["PatientName"][7].as_py()).partition("^")[0]
    return [
        ("STUDY", {"PatientID": value["PatientID"]}, True),
        ("STUDY", {"PatientID": "nobody"}, True),
        ("STUDY", {"AccessionNumber": value["AccessionNumber"], "PatientSex": "M"}, True),
        ("STUDY", {"StudyInstanceUID": uids}, True),
        ("STUDY", {"StudyInstanceUID": uids, "ModalitiesInStudy": ["CT", "DX"]}, True),
        ("STUDY", {"PatientName": f"{family.upper()}^*"}, True),
        ("STUDY", {"PatientName": family[:1] + "*", "StudyDate": "20100101-"}, True),
        ("STUDY", {"PatientName": "*a*"}, False),
        ("STUDY", {"StudyDate": "20150101-20191231", "ModalitiesInStudy": "MR"}, True),
        ("STUDY", {"StudyDate": "20300101-20000101"}, True),
        ("STUDY", {"StudyDate": "-20101231", "StudyTime": "08-12"}, True),
        ("STUDY", {"StudyTime": "08-12"}, False),
        ("STUDY", {"PatientID": value["PatientID"], "NumberOfPatientRelatedStudies": ""}, False),
        ("SERIES", {"StudyInstanceUID": uids}, True),
        ("SERIES", {"StudyInstanceUID": uids[0], "Modality": "MR", "PatientName": ""}, True),
        ("SERIES", {"StudyInstanceUID": uids[0], "Manufacturer": ""}, False),
        ("STUDY", {"PatientID": value["PatientID"], "Modality": "MR"}, True),
        ("STUDY", {"StudyDate": "20100101-20191231", "Modality": "MR", "BodyPartExamined": "H*"}, True),
        ("STUDY", {"StudyDate": "20100101-20191231", "Modality": "MR", "Manufacturer": "A*"}, False),
        ("STUDY", {"StudyDate": "20100101-20191231", "Modality": "CT", "InstanceNumber": "2"}, False),
        ("STUDY", {"Modality": "CT"}, False),
        ("SERIES", {"StudyInstanceUID": uids[0], "InstanceNumber": "1"}, False),
        ("PATIENT", {"PatientID": value["PatientID"], "StudyDate": "20000101-"}, True),
        ("PATIENT", {"PatientID": value["PatientID"], "StudyDate": "20000101-", "Modality": "??"}, True),
        ("PATIENT", {"PatientID": value["PatientID"], "Modality": "none"}, True),
        ("PATIENT", {"StudyDate": "20100101-20191231", "Modality": "US"}, False),
        ("PATIENT", {"PatientID": value["PatientID"]}, True),
        ("PATIENT", {"PatientID": value["PatientID"], "NumberOfPatientRelatedStudies": ""}, True),
    ]


def found(service: QueryService, query: Query) -> list[dict[int, Any]]:
    return [dict(match.columns) for match in service.find(query)]


def test_the_answers_of_the_database(
    made: tuple[Settings, hospital.Hospital], service: QueryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = service._indexes.current()
    assert index.rows is not None
    answered = 0
    for level, match, without in asked(made[1]):
        query = Query.build(level, match, return_keys=STUDY if level == "STUDY" else ("PatientName",))
        assert (look_up(query, index.rows, index.instance_columns) is not None) == without, match
        mine = found(service, query)
        with monkeypatch.context() as patch:
            patch.setattr("sphere.catalog.service.look_up", lambda *_: None)
            assert found(service, query) == mine, match
        answered += len(mine)
    assert answered > 100


def test_many_candidates_are_left_to_the_database(
    made: tuple[Settings, hospital.Hospital], service: QueryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "MOST", 5)
    index = service._indexes.current()
    assert index.rows is not None
    assert look_up(Query.build("STUDY", {"StudyDate": "20000101-"}), index.rows, index.instance_columns) is None


def test_columns_in_several_batches(
    made: tuple[Settings, hospital.Hospital], service: QueryService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with more than a million rows."""
    index = service._indexes.current()
    assert index.rows is not None
    begin = str(made[1].study_values["PatientName"][7].as_py())[:1].lower()
    expected = index.rows.by_name(begin, 1000)
    monkeypatch.setattr(rows_module, "SHIFT", 4)
    with duckdb.connect(shutil.copy(index.paths[0], tmp_path)) as base:
        rows_module.build(base, tmp_path / "few.rows")
    few = RowStore(tmp_path / "few.duckdb")
    every = np.arange(len(few.tables["studies"]))
    for name in ("StudyInstanceUID", "StudyDate", "ModalitiesInStudy"):
        assert few.tables["studies"].values(name, every) == index.rows.tables["studies"].values(name, every)
        assert few.tables["studies"].values(name, every[20:25]) == few.tables["studies"].values(name, every)[20:25]
    named = few.by_name(begin, 1000)
    assert named is not None and expected is not None and named.tolist() == expected.tolist() != []


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_without_rows_the_database_answers(
    made: tuple[Settings, hospital.Hospital], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings, some = made
    [folder] = (settings.archive.state_dir / "index").glob("*.rows")
    aside = folder.with_name("aside")
    shutil.copytree(folder, aside)
    try:
        if damage == "gone":
            shutil.rmtree(folder)
        else:
            (folder / "studies.arrow").write_bytes((folder / "studies.arrow").read_bytes()[:-8])
        with QueryService(settings) as opened:
            query = Query.build("STUDY", {"StudyInstanceUID": some.study_uid[3].as_py()})
            assert len(found(opened, query)) == 1
        assert "has no rows beside it" in caplog.text
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


IMAGES: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({}, ("InstanceNumber", "ImageType", "PixelSpacing")),
    ({"Modality": "CT"}, ("SOPClassUID",)),
    ({"InstanceNumber": "1"}, ("ConvolutionKernel", "AcquisitionDate")),
    ({"ImageType": "AXIAL"}, ()),
)


@pytest.mark.parametrize(("match", "more"), IMAGES)
def test_instances_out_of_one_row_group(
    made: tuple[Settings, hospital.Hospital],
    service: QueryService,
    match: dict[str, Any],
    more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answers, places and headers that DuckDB reads from the same files."""
    uids = [made[1].study_uid[number].as_py() for number in range(0, 120, 9)]
    query = Query.build("IMAGE", {"StudyInstanceUID": uids, **match}, return_keys=more)
    narrow = {"study": uids[:2], "series": [f"{uids[0]}.1", f"{uids[1]}.2"]}

    def everything() -> tuple[Any, ...]:
        headers = list(service.lookup_headers(study=uids[3]))
        return found(service, query), list(service.lookup_instances(**narrow)), headers

    mine = everything()
    assert len(mine[1]) > 0 < len(mine[2])
    monkeypatch.setattr("sphere.catalog.service.part_of", lambda *_: None)
    assert everything() == mine


def test_a_part_of_the_answers(made: tuple[Settings, hospital.Hospital]) -> None:
    """By number, in the order of unique keys: from Python and from the command line."""
    settings, _ = made
    uids = sorted(made[1].study_uid.to_pylist())
    with Archive(settings) as opened:
        found = list(opened.find("STUDY", return_keys=("PatientID",), limit=7, offset=5))
        assert [one["StudyInstanceUID"] for one in found] == uids[5:12]
        assert list(opened.find("STUDY", limit=0)) == []
        for wrong in ({"limit": -1}, {"offset": -1}):
            with pytest.raises(QueryError, match="not negative"):
                list(opened.find("STUDY", **wrong))
    config = settings.archive.state_dir.parent / "sphere.toml"
    config.write_text('[storage]\nroot = "file:storage"\n')
    told = ["find", "-k", "StudyInstanceUID", "--offset", "118", "--limit", "7", "--format", "csv"]
    result = CliRunner().invoke(main, ["--config", str(config), *told])
    assert [line.partition(",")[2] for line in result.stdout.split()[1:]] == uids[118:], result.output


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["a", None, "", "Grüße", "x" * 1000]),
        pa.array(["a", "b"]),
        pa.array(["a", "b", None, "c"])[1:],
        pa.array([], pa.string()),
        pa.array([None, None], pa.string()),
        pa.array([1, None, -(2**63), 2**63 - 1]),
        pa.array([7, -7], pa.int32()),
        pa.array([date(1969, 12, 31), None, date(1, 1, 1), date(9999, 12, 31)]),
        pa.array([["a"], None, []], pa.list_(pa.string())),
        pa.array([0.5, None]),
        pa.array([*range(20), None, 21]),
    ],
    ids=str,
)
def test_a_cell_is_what_arrow_gives(array: pa.Array, tmp_path: Path) -> None:
    """Also of a mapped file, whose buffers are padded."""
    with (
        pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file,
        pa.ipc.new_file(file, pa.schema([("x", array.type)])) as out,
    ):
        out.write_table(pa.table({"x": array}))
    mapped = pa.ipc.open_file(pa.memory_map(str(tmp_path / "x.arrow"))).read_all().column("x").chunks
    for one in (array, *mapped):
        cell = rows_module._cell(one)
        assert [cell(at) for at in range(len(one))] == one.to_pylist()
