"""What extended negotiation adds to matching (PS3.4 C.5.1.1.1): fuzzy names, empty and multiple values, time zones; and
private attributes by their creator. Asked of the query service, and of SQL and Python side by side."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import date
from typing import Any

import duckdb
import pytest
from pydicom.dataset import Dataset
from pynetdicom.dsutils import decode, encode

from sphere.catalog.fuzzy import FuzzyName
from sphere.catalog.match import normal_name_sql
from sphere.catalog.match_parse import Rules, parse_values
from sphere.catalog.query import Features, Query, parse_identifier
from sphere.catalog.schema import Level
from sphere.catalog.service import QueryService
from sphere.catalog.zones import dated, dated_sql, minutes_of, moved, moved_sql, text_of
from sphere.conf.errors import QueryError
from tests.support.catalog import Row, archive, instance, write_catalog

pytestmark = pytest.mark.unit

FUZZY = [  # name, key, whether it matches
    ("Müller^John", "jon mueller", True),
    ("Müller^John", "MULLER", True),
    ("Mueller^Hans", "müller", True),
    ("Miller^John", "mueller", False),
    ("Mayer^Anna", "Meier", True),
    ("MEYR^ANNA", "Mayer", False),
    ("Smith^Anna", "smi", True),
    ("Smith^Anna", "anna smith", True),
    ("Smith^Anna", "ann^smit", True),
    ("Smith^Anna", "mith", False),
    ("Schmidt^Eva", "smit", True),
    ("Philips^Zoë", "filip zoe", True),
    ("Filip^X", "Phillip", True),
    ("O'Neil^Tim", "neal", False),
    ("O'Neil^Tim", "nei o", True),
    ("Garcia-Lopez^Ana", "lopez garcia", True),
    ("Łukasz^Wałęsa", "lukasz walesa", True),
    ("Nguyễn^Văn", "nguyen van", True),
    ("Nguye\u0302\u0303n^Van", "nguyen", True),  # letters and marks apart
    ("Christian^Bo", "kristian", True),
    ("Christian^Bo", "kristina", False),
    ("Yamada^Tarou=山田^太郎=やまだ^たろう", "山田", True),
    ("Yamada^Tarou=山田^太郎=やまだ^たろう", "yamada 太郎", True),
    ("ПЕТРОВ^ИВАН", "иван", True),
    ("ПЕТРОВ^ИВАН", "сидоров", False),
    ("Doe^Jane", "d?e", True),
    ("Doe^Jane", "d*e jan*", True),
    ("Doe^Jane", "*", True),
    ("Doe^Jane", "^,-", True),
    ("Doe[^J.+", "doe[", True),
    ("Doe^J", "doe|x", False),
    ("Straße^Eva", "strasse", True),
    ("100%^A", "100%", True),
]


@pytest.fixture(scope="module")
def database() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        yield connection


@pytest.mark.parametrize(("name", "key", "expected"), FUZZY)
def test_fuzzy_names(database: duckdb.DuckDBPyConnection, name: str, key: str, expected: bool) -> None:
    test = FuzzyName.parse(key)
    if test is None:
        assert expected
        return
    sql, values = test.sql(normal_name_sql("v"))
    [(found,)] = database.execute(f"SELECT {sql} FROM (SELECT ? AS v)", [*values, name]).fetchall()
    assert (found, test.matches(name)) == (expected, expected)


MOVED = [  # date, time, offset of the entity, zone asked for, date and time there
    (date(2024, 1, 1), "003000.5", "+0100", 0, date(2023, 12, 31), "233000.5"),
    (date(2024, 1, 1), "2330", "-0500", 330, date(2024, 1, 2), "1000"),
    (date(2024, 1, 1), "10", "+0530", 0, date(2024, 1, 1), "0430"),
    (date(2024, 1, 1), "10:00:30", "+0100", 0, date(2024, 1, 1), "090030"),
    (date(2024, 1, 1), "235960", "+0100", 60, date(2024, 1, 1), "235960"),
    (date(2024, 1, 1), "235960", "+0100", 120, date(2024, 1, 2), "005960"),
    (date(2024, 1, 1), "1000", None, 60, date(2024, 1, 1), "1000"),
    (date(2024, 1, 1), "1000", "+01", 60, date(2024, 1, 1), "1000"),
    (date(2024, 1, 1), "noon", "+0100", 0, date(2024, 1, 1), "noon"),
    (date(2024, 1, 1), None, "+0100", 0, date(2024, 1, 1), None),
    (None, "1000", "+0100", 0, None, "1000"),
]


@pytest.mark.parametrize(("day", "time", "stored", "asked", "new_day", "new_time"), MOVED)
def test_dates_and_times_move_together(
    database: duckdb.DuckDBPyConnection, day: Any, time: Any, stored: Any, asked: int, new_day: Any, new_time: Any
) -> None:
    assert moved(day, time, stored, asked) == (new_day, new_time)
    sql = ", ".join(moved_sql("d", "t", "z", asked))
    source = "(SELECT ?::DATE AS d, ?::VARCHAR AS t, ?::VARCHAR AS z)"
    assert database.execute(f"SELECT {sql} FROM {source}", [day, time, stored]).fetchall() == [(new_day, new_time)]


@pytest.mark.parametrize(
    ("value", "stored", "expected"),
    [
        ("20240101103000", "+0100", "20240101103000+0100"),
        ("2024", None, "2024-0330"),
        ("20240101103000+0200", "+0100", "20240101103000+0200"),
        ("nonsense", "+0100", "nonsense"),
        (None, "+0100", None),
    ],
)
def test_date_times_say_their_offset(
    database: duckdb.DuckDBPyConnection, value: Any, stored: Any, expected: Any
) -> None:
    assert dated(value, stored, -210) == expected
    sql = f"SELECT {dated_sql('v', 'z', -210)} FROM (SELECT ?::VARCHAR AS v, ?::VARCHAR AS z)"
    assert database.execute(sql, [value, stored]).fetchall() == [(expected,)]


def test_offsets() -> None:
    assert [minutes_of(text) for text in ("+0100", "-0330", "+1400", "+2500", "", "0100")] == [
        60, -210, 840, None, None, None,
    ]  # fmt: skip
    assert [text_of(minutes) for minutes in (60, -210, 0)] == ["+0100", "-0330", "+0000"]


def private(block: int, creator: str, *values: str, vr: str = "LO") -> dict[str, Any]:
    """(0029,bb01) in a block that `creator` reserved."""
    return {
        f"002900{block:02X}": {"vr": "LO", "Value": [creator]},
        f"0029{block:02X}01": {"vr": vr, "Value": list(values)},
    }


def study(number: int, **attributes: Any) -> Row:
    uids = {"StudyInstanceUID": f"9.{number}", "SeriesInstanceUID": f"9.{number}.1"}
    return instance(number, **{"PatientID": f"P{number}", "IssuerOfPatientID": None, **uids, **attributes})


ROWS = [
    study(1, PatientName="Müller^John", StudyDate=date(2024, 1, 1), StudyTime="0030", TimezoneOffsetFromUTC="+0100",
          ImageType=["ORIGINAL", "PRIMARY"], AccessionNumber="A", Modality="CT", AcquisitionDateTime="20240101003000",
          extra=private(0x10, "ACME", "one")),
    study(2, PatientName="Mueller^Jon", StudyDate=date(2024, 1, 1), StudyTime="0030", TimezoneOffsetFromUTC="+0000",
          ImageType=["PRIMARY", "ORIGINAL", "AXIAL"], AccessionNumber="  ", AcquisitionDateTime="20240101003000",
          extra=private(0x11, "ACME", "one")),
    study(3, PatientName="Doe^Jane", StudyDate=date(2024, 1, 1), StudyTime="0030", ImageType=["ORIGINAL"],
          AccessionNumber=None, extra=private(0x10, "OTHER", "one") | private(0x12, "ACME", "two")),
    study(4, PatientName=None, ImageType=None, AccessionNumber='""'),
]  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueryService]:
    settings = archive(tmp_path_factory.mktemp("extended"))
    write_catalog(settings, ROWS)
    with QueryService(settings) as service:
        yield service


CASES: list[tuple[Level, dict[str, Any], dict[str, Any], str]] = [
    ("STUDY", {"PatientName": "jon muller"}, {"fuzzy_names": True}, "1 2"),
    ("STUDY", {"PatientName": "jon muller"}, {}, ""),
    ("PATIENT", {"PatientName": "jon muller"}, {"fuzzy_names": True}, "1 2"),
    ("STUDY", {"PatientName": '""'}, {"empty_values": True}, "4"),
    ("STUDY", {"PatientName": '""'}, {}, ""),
    ("STUDY", {"AccessionNumber": '""'}, {"empty_values": True}, "2 3"),
    ("STUDY", {"AccessionNumber": '""'}, {}, "4"),
    ("STUDY", {"StudyDate": '""'}, {"empty_values": True}, "4"),
    ("STUDY", {"ModalitiesInStudy": '""'}, {"empty_values": True}, "2 3 4"),
    ("IMAGE", {"ImageType": '""'}, {"empty_values": True}, "4"),
    ("IMAGE", {"ImageType": "ORIGINAL\\PRIMARY"}, {"multiple_values": True}, "1 2"),
    ("IMAGE", {"ImageType": ["AXIAL", "ORIGINAL"]}, {"multiple_values": True}, "2"),
    ("STUDY", {"ModalitiesInStudy": "CT\\MR"}, {}, "1"),
    ("STUDY", {"ModalitiesInStudy": "CT\\MR"}, {"multiple_values": True}, ""),
    ("STUDY", {"StudyDate": "20231231"}, {"timezone": "+0000"}, "1"),
    ("STUDY", {"StudyDate": "20240101"}, {"timezone": "+0000"}, "2 3"),
    ("STUDY", {"StudyDate": "20240101"}, {}, "1 2 3"),
    ("STUDY", {"StudyTime": "2330"}, {"timezone": "+0000"}, "1"),
    ("SERIES", {"StudyDate": "20231231"}, {"timezone": "+0000"}, "1"),
    ("IMAGE", {"StudyDate": "20231231"}, {"timezone": "+0000"}, "1"),
    (
        "STUDY",
        {"StudyDate": "20231231-20240101", "StudyTime": "2300-0015"},
        {"timezone": "+0000", "combined_datetime": True},
        "1",
    ),
    ("IMAGE", {"AcquisitionDateTime": "202312312330"}, {"timezone": "+0000"}, "1"),
    ("IMAGE", {"AcquisitionDateTime": "202401010030"}, {"timezone": "+0100"}, "1"),
    ("IMAGE", {"AcquisitionDateTime": "202401010030"}, {}, "1 2"),
    ("IMAGE", {"00291001,ACME": "one"}, {}, "1 2"),
    ("IMAGE", {"00297701,ACME": "one"}, {}, "1 2"),
    ("IMAGE", {"00291001": "one"}, {}, "1 3"),  # without a creator: the tag as it stands
    ("IMAGE", {"00291001,NOBODY": "one"}, {}, ""),
    ("IMAGE", {"00291001,NOBODY": '""'}, {"empty_values": True}, "1 2 3 4"),
    ("STUDY", {"00291001,ACME": "t*"}, {}, "3"),
    ("SERIES", {"00291001,ACME": "o*", "00291001,OTHER": '""'}, {"empty_values": True}, "1 2"),
    ("PATIENT", {"00291001,ACME": "one"}, {}, "1 2"),
]


@pytest.mark.parametrize(("level", "match", "options", "expected"), CASES)
def test_queries(
    service: QueryService, level: Level, match: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    query = Query.build(level, match, return_keys=["PatientID"], **options)
    answers = [match.identifier() for match in service.find(query)]
    assert " ".join(sorted(str(one.PatientID).removeprefix("P") for one in answers)) == expected
    assert service.count(query) == len(answers)


def test_answers_are_in_the_time_zone_asked_for(service: QueryService) -> None:
    query = Query.build("IMAGE", {"SOPInstanceUID": "1.2.1"}, timezone="-0330", return_keys=[
        "StudyDate", "StudyTime", "AcquisitionDateTime"
    ])  # fmt: skip
    [answer] = (match.identifier() for match in service.find(query))
    assert (answer.StudyDate, answer.StudyTime, answer.TimezoneOffsetFromUTC) == ("20231231", "2000", "-0330")
    assert answer.AcquisitionDateTime == "20240101003000+0100"


def sent(identifier: Dataset, *, implicit: bool) -> Dataset:
    """The identifier as it arrives."""
    data = encode(identifier, implicit, True)
    assert data is not None
    return decode(io.BytesIO(data), implicit, True)


@pytest.mark.parametrize("implicit", [False, True])
def test_an_identifier_names_private_creators(service: QueryService, implicit: bool) -> None:
    asked = Dataset()
    asked.QueryRetrieveLevel = "STUDY"
    asked.StudyInstanceUID = ""
    asked.QueryRetrieveView = "CLASSIC"  # of a conversion that was not agreed on
    block = asked.private_block(0x0029, "ACME", create=True)
    block.add_new(0x01, "LO", "one")
    query = parse_identifier(sent(asked, implicit=implicit), model="STUDY_ROOT")
    answers = [match.identifier() for match in service.find(query)]
    assert [str(one.StudyInstanceUID) for one in answers] == ["9.1", "9.2"]
    assert all(str(one.private_block(0x0029, "ACME")[0x01].value) == "one" for one in answers)
    assert all(encode(one, implicit, True) for one in answers)


def test_features_are_given_where_negotiated_only() -> None:
    asked = Dataset()
    asked.QueryRetrieveLevel = "STUDY"
    asked.TimezoneOffsetFromUTC = "+0100"
    asked.PatientName = "Doe"
    asked.AccessionNumber = '""'
    plain = parse_identifier(asked, model="STUDY_ROOT")
    assert plain.timezone is None
    assert plain == Query.build(
        "STUDY", {"AccessionNumber": '""', "PatientName": "Doe"}, relational=False
    )  # fmt: skip
    every = Features(fuzzy_names=True, timezone_adjustment=True, empty_values=True, multiple_values=True)
    asked.PhysiciansOfRecord = "A\\B"
    query = parse_identifier(asked, model="STUDY_ROOT", features=every)
    assert query.timezone == 60
    assert len(query.predicate()) == 4
    asked.TimezoneOffsetFromUTC = "1 h"
    with pytest.raises(QueryError, match="TimezoneOffsetFromUTC is not an offset") as caught:
        parse_identifier(asked, model="STUDY_ROOT", features=every)
    assert caught.value.offending == (0x00080201,)


def test_multiple_values_take_no_wild_cards_and_few_representations() -> None:
    rules = Rules(multiple_values=True)
    assert len(parse_values("A^B\\C^D", "PN", vm="1-n", rules=rules)) == 2
    for text, vr, vm in (("A\\B*", "LO", "1-n"), ("A\\B", "LO", "1"), ("1\\2", "DS", "2"), ("2024\\2023", "DA", "1-n")):
        with pytest.raises(ValueError, match=r"only a UID|no wild cards"):
            parse_values(text, vr, vm=vm, rules=rules)
