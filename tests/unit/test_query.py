"""Identifiers become queries, or 0xA900 with their offending elements (PS3.4 C.4.1)."""

from __future__ import annotations

from datetime import date
from io import BytesIO
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from sphere.catalog.match import DateRange, Exact, Number, PersonName, TimeRange, WildCard
from sphere.catalog.predicate import AnyItem, Compare, Moment
from sphere.catalog.query import Features, Model, Query, parse_identifier
from sphere.conf.errors import QueryError

pytestmark = pytest.mark.unit

ALL_MODELS: tuple[Model, ...] = ("PATIENT_ROOT", "STUDY_ROOT", "PATIENT_STUDY_ONLY")


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    """An element in Explicit VR Little Endian, of a VR with a short length."""
    value += b" " * (len(value) % 2)
    return tag.to_bytes(4, "little")[2:] + tag.to_bytes(4, "little")[:2] + vr + len(value).to_bytes(2, "little") + value


def received(*parts: bytes) -> Dataset:
    """An identifier as it comes from a network: nothing converted yet."""
    return read_dataset(BytesIO(b"".join(parts)), is_implicit_VR=False, is_little_endian=True)


def level(text: bytes) -> bytes:
    return element(0x00080052, b"CS", text)


def identifier(**attributes: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def asked_by(query: Query) -> dict[str, Any]:
    return {key.keyword: key.test for key in query.keys}


def test_keys_and_their_tests() -> None:
    query = parse_identifier(
        received(
            element(0x00080020, b"DA", b"20240101-"),
            element(0x00080030, b"TM", b"1000-1130"),
            level(b"STUDY "),
            element(0x00080061, b"CS", b"CT\\MR"),
            element(0x00081030, b"LO", b"A_B*"),
            element(0x00100010, b"PN", b"Doe^J*"),
            element(0x00100020, b"LO", b"*"),
            element(0x0020000D, b"UI", b"1.2\\1.3"),
            element(0x00201208, b"IS", b"12"),
        ),
        model="STUDY_ROOT",
    )
    assert query.level == "STUDY"
    assert asked_by(query) == {
        "StudyDate": DateRange(date(2024, 1, 1), None),
        "StudyTime": TimeRange("10", "113060.999999"),
        "ModalitiesInStudy": Exact(("CT", "MR")),
        "StudyDescription": WildCard("A_B*"),
        "PatientName": PersonName(("doe^j*",)),
        "PatientID": None,
        "StudyInstanceUID": Exact(("1.2", "1.3")),
        "NumberOfStudyRelatedInstances": Number(12),
    }


@pytest.mark.parametrize(
    ("charset", "encoded", "expected"),
    [
        (b"ISO_IR 100", "Müller^*".encode("latin-1"), "müller^*"),
        (b"ISO_IR 192", "山田*".encode(), "山田*"),
        (b"ISO_IR 144", "Люкceмбypг".encode("iso8859-5"), "люкceмбypг"),
        (b"GB18030", "王^小东".encode("gb18030"), "王^小东"),
        (b"ISO_IR 13", "ﾔﾏﾀﾞ^ﾀﾛｳ".encode("shift_jis"), "ﾔﾏﾀﾞ^ﾀﾛｳ"),
        (b"\\ISO 2022 IR 87", b"\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "山田^太郎"),
        (b"\\ISO 2022 IR 149", b"\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7", "洪^吉洞"),
        (b"", b"Plain", "plain"),
    ],
)
def test_text_is_decoded_by_its_character_set(charset: bytes, encoded: bytes, expected: str) -> None:
    parts = (element(0x00080005, b"CS", charset), level(b"STUDY"), element(0x00100010, b"PN", encoded))
    query = parse_identifier(received(*parts), model="STUDY_ROOT")
    assert asked_by(query) == {"PatientName": PersonName((expected,))}


def test_a_dataset_made_in_python_reads_the_same() -> None:
    item = identifier(CodeValue="T-1", CodeMeaning="")
    made = identifier(
        QueryRetrieveLevel="STUDY", PatientName="Müller*", StudyInstanceUID=["1.2", "1.3"], ProcedureCodeSequence=[item]
    )
    made.SpecificCharacterSet = "ISO_IR 100"
    raw = DicomBytesIO()
    raw.is_little_endian, raw.is_implicit_VR = True, True
    write_dataset(raw, made)
    sent = read_dataset(BytesIO(raw.getvalue()), is_implicit_VR=True, is_little_endian=True)
    assert parse_identifier(made, model="STUDY_ROOT") == parse_identifier(sent, model="STUDY_ROOT")
    assert parse_identifier(made, model="STUDY_ROOT").predicate()[0] == AnyItem(
        0x00081032, "ProcedureCodeSequence", (Compare(0x00080100, "CodeValue", "SH", Exact(("T-1",))),)
    )


BROKEN = [
    ("STUDY_ROOT", {}, 0x00080052, "is missing"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": ""}, 0x00080052, "is missing"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "WORKLIST"}, 0x00080052, "is none of"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "study"}, 0x00080052, "is none of"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "PATIENT"}, 0x00080052, "not in this model"),
    ("PATIENT_STUDY_ONLY", {"QueryRetrieveLevel": "SERIES"}, 0x00080052, "not in this model"),
    ("PATIENT_ROOT", {"QueryRetrieveLevel": "STUDY"}, 0x00100020, "PatientID must have a value"),
    ("PATIENT_ROOT", {"QueryRetrieveLevel": "STUDY", "PatientID": ""}, 0x00100020, "PatientID must have a value"),
    ("PATIENT_ROOT", {"QueryRetrieveLevel": "STUDY", "PatientID": "A*"}, 0x00100020, "must be a single value"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "SERIES"}, 0x0020000D, "StudyInstanceUID must have a value"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": "*"}, 0x0020000D, "must have a value"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": ["1", "2"]}, 0x0020000D, "single value"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "IMAGE", "StudyInstanceUID": "1"}, 0x0020000E, "SeriesInstanceUID must"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "STUDY", "Modality": "CT"}, 0x00080060, "key of SERIES, below STUDY"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "STUDY", "SeriesInstanceUID": "1"}, 0x0020000E, "below STUDY"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "STUDY", "InstanceNumber": "1"}, 0x00200013, "below STUDY"),
    ("PATIENT_ROOT", {"QueryRetrieveLevel": "PATIENT", "StudyDate": "20240101"}, 0x00080020, "below PATIENT"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "STUDY", "StudyDate": "1/1/2024"}, 0x00080020, "not a date"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "STUDY", "StudyTime": "noon"}, 0x00080030, "not a time"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "1.x"}, 0x0020000D, "not a UID"),
    ("STUDY_ROOT", {"QueryRetrieveLevel": "STUDY", "StudyDescription": ["A", "B"]}, 0x00081030, "only a UID"),
]


@pytest.mark.parametrize(("model", "attributes", "offending", "reason"), BROKEN)
def test_identifier_that_breaks_the_rules(
    model: Model, attributes: dict[str, Any], offending: int, reason: str, recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(QueryError, match=reason) as caught:
        parse_identifier(identifier(**attributes), model=model)
    assert caught.value.offending == (offending,)
    assert caught.value.dimse == 0xA900


def test_bad_numbers_name_their_tag() -> None:
    with pytest.raises(QueryError, match="not an integer") as caught:
        parse_identifier(received(level(b"STUDY"), element(0x00201208, b"IS", b"many")), model="STUDY_ROOT")
    assert caught.value.offending == (0x00201208,)


def test_two_items_in_a_sequence_key() -> None:
    broken = identifier(QueryRetrieveLevel="STUDY", ProcedureCodeSequence=[Dataset(), Dataset()])
    with pytest.raises(QueryError, match="has one item") as caught:
        parse_identifier(broken, model="STUDY_ROOT")
    assert caught.value.offending == (0x00081032,)


@pytest.mark.parametrize(
    ("model", "attributes"),
    [
        ("PATIENT_ROOT", {"QueryRetrieveLevel": "STUDY"}),
        ("PATIENT_ROOT", {"QueryRetrieveLevel": "IMAGE", "PatientID": "A*"}),
        ("STUDY_ROOT", {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": ["1.2", "1.3"]}),
        ("STUDY_ROOT", {"QueryRetrieveLevel": "IMAGE", "SOPInstanceUID": "1.2"}),
    ],
)
def test_relational_queries_may_leave_out_keys_above(model: Model, attributes: dict[str, Any]) -> None:
    assert parse_identifier(identifier(**attributes), model=model, features=Features(relational=True)).relational


def test_relational_queries_have_keys_below() -> None:
    asked = identifier(QueryRetrieveLevel="STUDY", StudyDate="20240101", Modality="CT", InstanceNumber="1")
    query = parse_identifier(asked, model="STUDY_ROOT", features=Features(relational=True))
    assert [getattr(node, "keyword", "") for node in query.predicate()] == ["StudyDate"]
    assert {getattr(node, "keyword", "") for node in query.below()} == {"Modality", "InstanceNumber"}
    lowest = query.of_lowest()
    assert (lowest.level, len(lowest.predicate()), lowest.below()) == ("IMAGE", 3, ())


def test_what_may_differ_below_a_patient_is_not_asked_there() -> None:
    query = Query.build("PATIENT", {"PatientID": "P", "PatientName": "DOE", "00291008": "1", "StudyDate": "20240101"})
    lowest = query.of_lowest()
    assert (lowest.level, [key.keyword for key in lowest.keys]) == ("STUDY", ["PatientID", "StudyDate"])


def test_relational_queries_have_no_keys_that_are_below_the_model() -> None:
    broken = identifier(QueryRetrieveLevel="STUDY", Modality="CT")
    with pytest.raises(QueryError, match="below STUDY") as caught:
        parse_identifier(broken, model="PATIENT_STUDY_ONLY", features=Features(relational=True))
    assert caught.value.offending == (0x00080060,)


def test_return_keys_below_the_level_are_allowed() -> None:
    query = parse_identifier(identifier(QueryRetrieveLevel="STUDY", Modality="", SOPInstanceUID=""), model="STUDY_ROOT")
    assert query.predicate() == ()


@pytest.mark.parametrize(
    ("days", "times", "low", "high"),
    [
        ("20240101-20240103", "1000-1800", "2024010110", "20240103180060.999999"),
        ("20240101-", "1000-", "2024010110", None),
        ("-20240103", "-1800", None, "20240103180060.999999"),
        ("20240101-", "1000-1800", "2024010110", None),
        ("20240101-20240103", "1000-", "2024010110", "20240103235960.999999"),
        ("20240101", "101530", "20240101101530", "20240101101530.999999"),
    ],
)
def test_combined_date_and_time(days: str, times: str, low: str | None, high: str | None) -> None:
    match = {"StudyDate": days, "StudyTime": times}
    combined = Query.build("STUDY", match, combined_datetime=True)
    assert combined.predicate() == (Moment(0x00080020, "StudyDate", 0x00080030, "StudyTime", low, high),)
    assert len(Query.build("STUDY", match).predicate()) == 2


def test_combined_needs_both() -> None:
    query = Query.build("STUDY", {"StudyDate": "20240101-"}, return_keys=["StudyTime"], combined_datetime=True)
    assert query.predicate() == (Compare(0x00080020, "StudyDate", "DA", DateRange(date(2024, 1, 1), None)),)


def test_build() -> None:
    query = Query.build(
        "IMAGE",
        {
            "StudyInstanceUID": ["1.2", "1.3"],
            "StudyDate": date(2024, 1, 1),
            "InstanceNumber": 5,
            "00091001": "private*",
            "RequestAttributesSequence": {"RequestedProcedureID": "R1"},
        },
        return_keys=["StudyDate", "ImageType", "RequestAttributesSequence"],
    )
    assert [key.name for key in query.keys] == [
        "StudyInstanceUID",
        "StudyDate",
        "InstanceNumber",
        "(0009,1001)",
        "RequestAttributesSequence",
        "ImageType",
    ]
    assert len(query.predicate()) == 5
    assert (query.model, query.relational) == ("STUDY_ROOT", True)


@pytest.mark.parametrize("value", ["1", " ", 1, 0, "*", [{"RequestedProcedureID": "1"}]])
def test_a_sequence_with_a_value(value: Any) -> None:
    """It would match everything; without a value it does."""
    with pytest.raises(QueryError, match="RequestAttributesSequence is a sequence") as caught:
        Query.build("SERIES", {"RequestAttributesSequence": value})
    assert caught.value.offending == (0x00400275,)
    with pytest.raises(QueryError, match="RequestAttributesSequence is a sequence"):
        Query.build("STUDY", {"ProcedureCodeSequence": {"RequestAttributesSequence": value}})
    assert Query.build("SERIES", {"RequestAttributesSequence": ""}).predicate() == ()
    assert Query.build("SERIES", {"RequestAttributesSequence": None}).predicate() == ()


def test_items_of_what_is_no_sequence() -> None:
    with pytest.raises(QueryError, match="PatientID is not a sequence"):
        Query.build("STUDY", {"PatientID": {"CodeValue": "1"}})


@pytest.mark.parametrize("name", ["PatientNmae", "0010", "0010xx20", ""])
def test_unknown_keyword(name: str) -> None:
    with pytest.raises(QueryError, match="neither a keyword"):
        Query.build("STUDY", {name: "x"})


def test_patient_level_needs_a_model_that_has_it() -> None:
    assert Query.build("PATIENT").model == "PATIENT_ROOT"
    with pytest.raises(QueryError, match="not in model STUDY_ROOT"):
        Query.build("PATIENT", model="STUDY_ROOT")


def test_messages_hold_no_values() -> None:
    with pytest.raises(QueryError, match="StudyDate") as caught:
        Query.build("STUDY", {"StudyDate": "secret"})
    assert "secret" not in str(caught.value)
