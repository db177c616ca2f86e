"""The query service over real Delta tables: every level, every kind of answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from sphere.catalog.answer import Match
from sphere.catalog.kept_rows import PAGE
from sphere.catalog.plan import make_plan
from sphere.catalog.query import Key, Model, Query, parse_identifier
from sphere.catalog.schema import TABLES, Level
from sphere.catalog.service import QueryService
from tests.support.catalog import Row, archive, instance, write_catalog

pytestmark = pytest.mark.unit

CT, MR, SR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.88.11"


def code_sequence(*values: str) -> dict[str, Any]:
    items = [
        {"00080100": {"vr": "SH", "Value": [value]}, "00080104": {"vr": "LO", "Value": [f"meaning of {value}"]}}
        for value in values
    ]
    return {"00081032": {"vr": "SQ", "Value": items}}


def study(number: int, first: int, series: list[tuple[str, int]], **attributes: Any) -> list[Row]:
    """A study "9.<number>" of series (modality, count) with instances numbered from `first`."""
    rows = []
    extra = attributes.pop("extra", None)
    for ordinal, (modality, count) in enumerate(series, 1):
        for index in range(1, count + 1):
            row = instance(
                first + len(rows),
                extra=extra,
                **{
                    "StudyInstanceUID": f"9.{number}",
                    "SeriesInstanceUID": f"9.{number}.{ordinal}",
                    "SOPClassUID": {"CT": CT, "MR": MR, "SR": SR}[modality],
                    "Modality": modality,
                    "SeriesNumber": ordinal,
                    "InstanceNumber": index,
                    "PatientID": None,
                    "IssuerOfPatientID": None,
                    **attributes,
                },
            )
            rows.append(row)
    return rows


ROWS = [
    *study(
        1,
        100,
        [("CT", 3), ("SR", 1)],
        PatientID="P1",
        PatientName="Doe^John",
        PatientBirthDate=date(1970, 5, 1),
        PatientSex="M",
        StudyDate=date(2024, 1, 1),
        StudyTime="101530.25",
        AccessionNumber="A_B1",
        StudyDescription="CHEST 100%",
        PatientWeight=70.5,
        PatientSize=1.0,
        ReferringPhysicianName="House^Gregory",
        OperatorsName=["Op^One", "Op^Two"],
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
        extra={**code_sequence("C1", "C2"), "00091001": {"vr": "LO", "Value": ["secret 1"]}},
    ),
    *study(
        2,
        200,
        [("MR", 2)],
        PatientID="P1",
        PatientName="DOE^JOHN",
        StudyDate=date(2024, 1, 2),
        StudyTime="235959",
        AccessionNumber="AxB1",
        StudyDescription="chest",
        extra={"00091001": {"vr": "LO", "Value": ["secret 2"]}},
    ),
    *study(
        3,
        300,
        [("CT", 1)],
        PatientID="P1",
        IssuerOfPatientID="OTHER",
        PatientName="Yamada^Tarou=山田^太郎=やまだ^たろう",
        StudyDate=date(2023, 12, 31),
        StudyTime="10",
        AccessionNumber="%",
        PhysiciansOfRecord=["Müller^Ännchen", "ΠΑΠΑΔΟΠΟΥΛΟΣ"],
    ),
    *study(4, 400, [("CT", 1)], PatientName="Unknown^One", StudyDate=date(2024, 1, 1)),
    *study(5, 500, [("MR", 1)], PatientName="Unknown^Two", StudyDate=None, StudyTime=None),
    *study(6, 600, [("CT", 1), ("CT", 1)], PatientID="P[6]*", PatientName='O\'Neil^"A"', StudyTime="0000"),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueryService]:
    settings = archive(tmp_path_factory.mktemp("archive with spaces"))
    write_catalog(settings, ROWS, files=3)
    with QueryService(settings) as service:
        yield service


def found(service: QueryService, level: Level, match: dict[str, Any], **options: Any) -> list[str]:
    """The last part of the unique keys of the answers, which must be as many as `count` says."""
    query = Query.build(level, match, **options)
    names = {
        "PATIENT": "PatientName",
        "STUDY": "StudyInstanceUID",
        "SERIES": "SeriesInstanceUID",
        "IMAGE": "SOPInstanceUID",
    }
    asked = Query.build(level, match, return_keys=[names[level]], **options)
    answers = [str(one.identifier()[names[level]].value) for one in service.find(asked)]
    assert service.count(query) == len(answers)
    return [answer.removeprefix("9.").removeprefix("1.2.") for answer in answers]


STUDY_CASES: list[tuple[dict[str, Any], str]] = [
    ({}, "1 2 3 4 5 6"),
    ({"PatientID": "P1"}, "1 2 3"),
    ({"PatientID": "p1"}, ""),
    ({"PatientID": "P?"}, "1 2 3"),
    ({"PatientID": "*"}, "1 2 3 4 5 6"),
    ({"PatientID": "?*"}, "1 2 3 6"),
    ({"PatientID": "P[6]*"}, "6"),
    ({"PatientID": "P[16]"}, ""),
    ({"PatientID": "P1", "IssuerOfPatientID": "OTHER"}, "3"),
    ({"PatientName": "doe^john"}, "1 2"),
    ({"PatientName": "doe*"}, "1 2"),
    ({"PatientName": "*^j*"}, "1 2"),
    ({"PatientName": "山田*"}, "3"),
    ({"PatientName": "やまだ^たろう"}, "3"),
    ({"PatientName": "o'neil*"}, "6"),
    ({"PatientName": 'o\'neil^"a"'}, "6"),
    ({"PatientName": "%"}, ""),
    ({"PatientName": "Unknown^*"}, "4 5"),
    ({"PatientBirthDate": "19700501"}, "1"),
    ({"PatientBirthDate": "-19691231"}, ""),
    ({"PatientSex": "M"}, "1"),
    ({"StudyDate": "20240101"}, "1 4"),
    ({"StudyDate": "20240101-"}, "1 2 4"),
    ({"StudyDate": "-20231231"}, "3"),
    ({"StudyDate": "20231231-20240101"}, "1 3 4"),
    ({"StudyDate": "20240101-20231231"}, ""),
    ({"StudyDate": ""}, "1 2 3 4 5 6"),
    ({"StudyTime": "10"}, "1 3"),
    ({"StudyTime": "1015"}, "1"),
    ({"StudyTime": "101530.25"}, "1"),
    ({"StudyTime": "1200-"}, "2"),
    ({"StudyTime": "-0000"}, "6"),
    ({"AccessionNumber": "A_B1"}, "1"),
    ({"AccessionNumber": "A_B*"}, "1"),
    ({"AccessionNumber": "A?B*"}, "1 2"),
    ({"AccessionNumber": "%"}, "3"),
    ({"AccessionNumber": "A*", "StudyDate": "20240102"}, "2"),
    ({"StudyDescription": "CHEST 100%"}, "1"),
    ({"StudyDescription": "*%"}, "1"),
    ({"StudyDescription": "chest"}, "2"),
    ({"StudyInstanceUID": "9.1"}, "1"),
    ({"StudyInstanceUID": ["9.1", "9.6", "9.99"]}, "1 6"),
    ({"StudyInstanceUID": [f"9.{number}" for number in range(2, 2000)]}, "2 3 4 5 6"),
    ({"ModalitiesInStudy": "SR"}, "1"),
    ({"ModalitiesInStudy": ["SR", "MR"]}, "1 2 5"),
    ({"ModalitiesInStudy": "?T"}, "1 3 4 6"),
    ({"SOPClassesInStudy": SR}, "1"),
    ({"NumberOfStudyRelatedInstances": "4"}, "1"),
    ({"NumberOfStudyRelatedSeries": 2}, "1 6"),
    ({"PatientWeight": "70.50"}, "1"),
    ({"ReferringPhysicianName": "house*"}, "1"),
    ({"PhysiciansOfRecord": "müller^*"}, "3"),
    ({"PhysiciansOfRecord": "παπαδοπουλος"}, "3"),
    ({"InstanceAvailability": "ONLINE", "PatientID": "P1"}, "1 2 3"),
    ({"InstanceAvailability": "OFFLINE"}, ""),
    ({"RetrieveAETitle": "TESTED", "AccessionNumber": "%"}, "3"),
    ({"RetrieveAETitle": "ANOTHER"}, ""),
    ({"NumberOfPatientRelatedStudies": 2}, "1 2"),
    ({"ProcedureCodeSequence": {"CodeValue": "C2"}}, "1"),
    ({"ProcedureCodeSequence": {"CodeValue": "C2", "CodeMeaning": "*C1"}}, ""),
    ({"ProcedureCodeSequence": {"CodeValue": "C?", "CodeMeaning": "*C1"}}, "1"),
    ({"ProcedureCodeSequence": {"CodeValue": ""}}, "1 2 3 4 5 6"),
    ({"00091001": "secret*"}, "1 2"),
    ({"00091001": "secret 2", "PatientID": "P1"}, "2"),
    ({"00091001": "secret 2", "PatientID": "none"}, ""),
]


@pytest.mark.parametrize(("match", "expected"), STUDY_CASES)
def test_study_level(service: QueryService, match: dict[str, Any], expected: str) -> None:
    assert found(service, "STUDY", match) == expected.split()


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({}, ["Doe^John", "Yamada^Tarou=山田^太郎=やまだ^たろう", 'O\'Neil^"A"', "Unknown^One", "Unknown^Two"]),
        ({"PatientID": "P1"}, ["Doe^John", "Yamada^Tarou=山田^太郎=やまだ^たろう"]),
        ({"PatientName": "unknown*"}, ["Unknown^One", "Unknown^Two"]),
        ({"NumberOfPatientRelatedStudies": "2"}, ["Doe^John"]),
        ({"NumberOfPatientRelatedInstances": "6"}, ["Doe^John"]),
        ({"00091001": "secret 1"}, ["Doe^John"]),
        ({"00091001": "secret 2"}, []),  # of a patient, the value of the earliest instance that has one
    ],
)
def test_patient_level(service: QueryService, match: dict[str, Any], expected: list[str]) -> None:
    assert sorted(found(service, "PATIENT", match)) == sorted(expected)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({}, "1.1 1.2 2.1 3.1 4.1 5.1 6.1 6.2"),
        ({"Modality": "CT"}, "1.1 3.1 4.1 6.1 6.2"),
        ({"StudyInstanceUID": "9.1", "Modality": "SR"}, "1.2"),
        ({"PatientID": "P1", "Modality": "MR"}, "2.1"),
        ({"StudyDate": "20240101", "SeriesNumber": 1}, "1.1 4.1"),
        ({"SeriesInstanceUID": ["9.6.1", "9.6.2"]}, "6.1 6.2"),
        ({"NumberOfSeriesRelatedInstances": 3}, "1.1"),
        ({"OperatorsName": "op^two"}, "1.1 1.2"),
        ({"ProcedureCodeSequence": {"CodeValue": "C1"}, "Modality": "CT"}, "1.1"),
        ({"NumberOfPatientRelatedStudies": 2, "Modality": "CT"}, "1.1"),
    ],
)
def test_series_level(service: QueryService, match: dict[str, Any], expected: str) -> None:
    assert found(service, "SERIES", match) == expected.split()


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({}, "100 101 102 103 200 201 300 400 500 600 601"),
        ({"StudyInstanceUID": "9.1", "SeriesInstanceUID": "9.1.1"}, "100 101 102"),
        ({"StudyInstanceUID": "9.1", "SeriesInstanceUID": "9.1.1", "InstanceNumber": 2}, "101"),
        ({"SOPInstanceUID": ["1.2.101", "1.2.600"]}, "101 600"),
        ({"SOPClassUID": MR}, "200 201 500"),
        ({"PatientName": "doe*", "Modality": "CT"}, "100 101 102"),
        ({"ImageType": "AXIAL", "InstanceNumber": "1"}, "100 103"),
        ({"PatientID": "nobody"}, ""),
        ({"StudyDate": "20240102"}, "200 201"),
        ({"00091001": "secret 2"}, "200 201"),
        ({"ProcedureCodeSequence": {"CodeValue": "C2"}, "Modality": "SR"}, "103"),
        ({"NumberOfStudyRelatedInstances": 4, "InstanceNumber": 3}, "102"),
    ],
)
def test_image_level(service: QueryService, match: dict[str, Any], expected: str) -> None:
    assert found(service, "IMAGE", match) == expected.split()


def test_enough_cases() -> None:
    assert len(STUDY_CASES) >= 60


def answers(service: QueryService, *, model: Model = "STUDY_ROOT", **attributes: Any) -> list[Dataset]:
    identifier = Dataset()
    for keyword, value in attributes.items():
        setattr(identifier, keyword, value)
    return [match.identifier() for match in service.find(parse_identifier(identifier, model=model))]


def as_text(identifier: Dataset) -> dict[str, str]:
    """Each element but the service's own as it goes over the wire."""
    own = ("SpecificCharacterSet", "QueryRetrieveLevel", "RetrieveAETitle")
    return {
        element.keyword: "\\".join(map(str, element.value))
        if element.VM > 1
        else str(element.value if element.value is not None else "")
        for element in identifier
        if element.keyword not in own
    }


def test_values_come_back_as_they_were(service: QueryService) -> None:
    [identifier] = answers(
        service,
        QueryRetrieveLevel="STUDY",
        StudyInstanceUID="9.1",
        StudyDate="",
        StudyTime="",
        PatientName="",
        PatientWeight=None,
        PatientSize=None,
        PatientAge="",
        ModalitiesInStudy="",
        SOPClassesInStudy="",
        NumberOfStudyRelatedSeries=None,
        NumberOfStudyRelatedInstances=None,
        InstanceAvailability="",
    )
    assert as_text(identifier) == {
        "StudyInstanceUID": "9.1",
        "StudyDate": "20240101",
        "StudyTime": "101530.25",
        "PatientName": "Doe^John",
        "PatientWeight": "70.5",
        "PatientSize": "1",
        "PatientAge": "",
        "ModalitiesInStudy": "CT\\SR",
        "SOPClassesInStudy": f"{CT}\\{SR}",
        "NumberOfStudyRelatedSeries": "2",
        "NumberOfStudyRelatedInstances": "4",
        "InstanceAvailability": "ONLINE",
    }
    assert identifier.SpecificCharacterSet == "ISO_IR 192"
    assert (identifier.QueryRetrieveLevel, identifier.RetrieveAETitle) == ("STUDY", "TESTED")


def test_all_groups_of_a_name(service: QueryService) -> None:
    [identifier] = answers(service, QueryRetrieveLevel="STUDY", PatientName="yamada*", PhysiciansOfRecord="")
    assert str(identifier.PatientName) == "Yamada^Tarou=山田^太郎=やまだ^たろう"
    assert [str(name) for name in identifier.PhysiciansOfRecord] == ["Müller^Ännchen", "ΠΑΠΑΔΟΠΟΥΛΟΣ"]


def test_unique_keys_of_the_model_come_unasked(service: QueryService) -> None:
    above = {"PatientID": "P1", "StudyInstanceUID": "9.1", "SeriesInstanceUID": "9.1.1"}
    [identifier] = answers(service, model="PATIENT_ROOT", QueryRetrieveLevel="IMAGE", InstanceNumber="3", **above)
    assert as_text(identifier) == {**above, "SOPInstanceUID": "1.2.102", "InstanceNumber": "3"}
    del above["PatientID"]
    [identifier] = answers(service, QueryRetrieveLevel="IMAGE", InstanceNumber="3", **above)
    assert "PatientID" not in identifier


def test_only_the_asked_attributes_of_an_item(service: QueryService) -> None:
    item = Dataset()
    item.CodeValue = ""
    [identifier] = answers(service, QueryRetrieveLevel="STUDY", StudyInstanceUID="9.1", ProcedureCodeSequence=[item])
    assert [[element.keyword for element in one] for one in identifier.ProcedureCodeSequence] == [["CodeValue"]] * 2
    [identifier] = answers(service, QueryRetrieveLevel="STUDY", StudyInstanceUID="9.1", ProcedureCodeSequence=[])
    assert [one.CodeMeaning for one in identifier.ProcedureCodeSequence] == ["meaning of C1", "meaning of C2"]


def test_absent_sequences_and_lower_levels_are_zero_length(service: QueryService) -> None:
    [identifier] = answers(
        service, QueryRetrieveLevel="STUDY", StudyInstanceUID="9.2", ProcedureCodeSequence=[], Modality="", Rows=None
    )
    assert (len(identifier.ProcedureCodeSequence), identifier.Modality, identifier.Rows) == (0, None, None)


@pytest.mark.parametrize(
    ("tag", "element", "expected"),
    [
        ("00280008", {"vr": "IS", "Value": ["1A"]}, None),
        ("00091105", {"vr": "DS", "Value": ["1.9.10.0"]}, None),
        ("00091001", {"vr": "UN", "InlineBinary": "AAE="}, b"\0\1"),
        ("00091001", {"vr": "OB", "BulkDataURI": "?offset=1&length=2"}, None),
        ("00091001", {"vr": "LO"}, None),
    ],
)
def test_header_elements_of_any_kind(tag: str, element: dict[str, Any], expected: Any) -> None:
    number = int(tag, 16)
    match = Match("IMAGE", (Key(number, "", element["vr"]),), {}, {tag: element}, "AE")
    assert match.identifier()[number].value in (expected, expected or "")


def test_a_bad_element_of_an_item_costs_itself(service: QueryService) -> None:
    item = {"00280008": {"vr": "IS", "Value": ["1A"]}, "00080100": {"vr": "SH", "Value": ["C1"]}}
    match = Match("IMAGE", (Key(0x00081032, "", "SQ"),), {}, {"00081032": {"vr": "SQ", "Value": [item]}}, "AE")
    [found] = match.identifier().ProcedureCodeSequence
    assert (found.CodeValue, found.get("NumberOfFrames")) == ("C1", None)


def test_combined_date_and_time(service: QueryService) -> None:
    for times, expected in (("0900-0930", ["3"]), ("1100-1200", ["1"]), ("0900-1200", ["1", "3"])):
        match = {"StudyDate": "20231231-20240101", "StudyTime": times}
        assert found(service, "STUDY", match, combined_datetime=True) == expected
    assert found(service, "STUDY", {**match, "StudyTime": "0900-0930"}) == []


def test_lookup_instances(service: QueryService) -> None:
    stored = list(service.lookup_instances(study=["9.1", "9.2"], series=["9.1.1", "9.2.1"]))
    assert [one.SOPInstanceUID for one in stored] == ["1.2.100", "1.2.101", "1.2.102", "1.2.200", "1.2.201"]
    assert (stored[1].bundle, stored[1].offset, stored[1].length) == ("bundles/2024/01/01/25.tar", 1536, 1000)
    assert list(service.lookup_instances(sop=["1.2.1"])) == []
    assert len(list(service.lookup_instances())) == len(ROWS)


def test_closing_cancels_and_threads_share(service: QueryService) -> None:
    partial = service.find(Query.build("IMAGE"))
    next(partial)
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(len(list(service.find(Query.build("IMAGE")))))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [len(ROWS)] * 4
    partial.close()
    assert list(partial) == []


def test_nothing_extracted_yet(tmp_path: Path) -> None:
    with QueryService(archive(tmp_path)) as service:
        for level in ("PATIENT", "STUDY", "SERIES", "IMAGE"):
            assert found(service, level, {}) == []
        assert list(service.lookup_instances()) == []


def test_more_answers_than_a_page(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    count = 2 * PAGE + 1
    write_catalog(settings, [row for number in range(count) for row in study(number, number, [("CT", 1)])], files=1)
    with QueryService(settings) as service:
        assert len(set(found(service, "STUDY", {}))) == count
        assert len(set(found(service, "IMAGE", {"00091001": ""}))) == count


def test_broad_queries_are_given_as_they_are_found(service: QueryService) -> None:
    """The base is in the order of the keys: nothing is sorted first."""
    columns = frozenset(TABLES["instances"].schema.names)
    broad = make_plan(Query.build("STUDY", {"StudyDate": "20000101-"}), columns)
    assert "ORDER BY" not in broad.select(in_order=True)
    assert "ORDER BY" in broad.select()  # of the rows beside it
    by_key = make_plan(Query.build("STUDY", {"PatientID": "P1"}), columns)
    assert "ORDER BY" in by_key.select(in_order=True), "rows come in the order of the index of PatientID"
    joined = make_plan(Query.build("SERIES", {"PatientID": "P*"}), columns)
    assert "ORDER BY" in joined.select(in_order=True)
