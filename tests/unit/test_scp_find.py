"""What happens with one C-FIND, and identifiers from keys as people write them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom.dsutils import encode

from sphere.catalog.query import Features, Query
from sphere.conf.errors import CatalogError, QueryError
from sphere.scp.decode import MAX_IDENTIFIER
from sphere.scp.find import CANCELLED, PENDING, UNABLE, FindAnswer, FindRequest, FindService
from sphere.scp.identifier import DEFAULT_KEYS, build_identifier, tag_of

pytestmark = pytest.mark.unit


class FakeMatch:
    """A match that is told by its number."""

    more = False

    def __init__(self, number: int) -> None:
        self._number = number

    def identifier(self) -> Dataset:
        dataset = Dataset()
        dataset.PatientID = str(self._number)
        return dataset


class FakeFinder:
    """Gives `count` matches, then raises `error` where there is one."""

    def __init__(self, count: int = 0, error: Exception | None = None) -> None:
        self.queries: list[Query] = []
        self.looked_up = 0
        self._count = count
        self._error = error

    def find(self, query: Query, **_: Any) -> Iterator[Any]:
        self.queries.append(query)
        for number in range(self._count):
            self.looked_up += 1
            yield FakeMatch(number)
        if self._error is not None:
            raise self._error


def answers(finder: FakeFinder, identifier: bytes, **changes: Any) -> list[FindAnswer]:
    fields = {"model": "STUDY_ROOT", "identifier": identifier, "transfer_syntax": ExplicitVRLittleEndian} | changes
    return list(FindService(finder).answers(FindRequest(**fields), cancelled=lambda: False))


def encoded(keys: dict[str, str], syntax: Any = ExplicitVRLittleEndian, level: Any = "STUDY") -> bytes:
    data = encode(build_identifier(keys, level), syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    assert data is not None
    return data


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_every_encoding_of_an_identifier_asks_the_same(syntax: Any) -> None:
    finder = FakeFinder(2)
    found = answers(finder, encoded({"PatientID": "P*", "PatientName": "Müller"}, syntax), transfer_syntax=syntax)
    assert [(answer.status, answer.identifier.PatientID) for answer in found if answer.identifier] == [
        (PENDING, "0"),
        (PENDING, "1"),
    ]
    [query] = finder.queries
    reference = FakeFinder()
    answers(reference, encoded({"PatientID": "P*", "PatientName": "Müller"}))
    assert query == reference.queries[0]


def test_what_was_negotiated_reaches_the_query() -> None:
    finder = FakeFinder()
    features = Features(relational=True, combined_datetime=True)
    answers(finder, encoded({}, level="IMAGE"), features=features, model="PATIENT_ROOT")
    [query] = finder.queries
    assert (query.level, query.model, query.relational, query.combined_datetime) == (
        "IMAGE",
        "PATIENT_ROOT",
        True,
        True,
    )


@pytest.mark.parametrize(
    ("identifier", "status", "comment", "offending"),
    [
        (b"", 0xA900, "QueryRetrieveLevel is missing", (0x00080052,)),
        (encoded({}, level="PATIENT"), 0xA900, "QueryRetrieveLevel PATIENT is not in this model", (0x00080052,)),
        (encoded({"StudyDate": "yesterday"}), 0xA900, "StudyDate", (0x00080020,)),
        (
            encoded({"SeriesInstanceUID": ""}, level="SERIES"),
            0xA900,
            "StudyInstanceUID must have a value",
            (0x0020000D,),
        ),
        (b"\x08\x00\x52\x00CS\xff\xff", 0xA900, "", None),
        (b"\xff" * 1000, 0xA900, "", None),
        (bytes(MAX_IDENTIFIER + 1), 0xA900, "identifier is longer", ()),
    ],
    ids=lambda value: str(value)[:40],  # some are of 4 MiB
)
def test_identifiers_that_break_the_rules(
    identifier: bytes, status: int, comment: str, offending: tuple[int, ...] | None
) -> None:
    finder = FakeFinder(1)
    [answer] = answers(finder, identifier)
    assert (answer.status, answer.identifier) == (status, None)
    assert answer.comment.startswith(comment)
    assert len(answer.comment) <= 64
    assert offending is None or answer.offending == offending
    assert finder.queries == []


def test_a_deflated_identifier_is_inflated_up_to_a_limit() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = bomb.compress(bytes(64 << 20)) + bomb.flush()
    [answer] = answers(FakeFinder(), data, transfer_syntax=DeflatedExplicitVRLittleEndian)
    assert (answer.status, answer.comment) == (0xA900, f"identifier is longer than {MAX_IDENTIFIER} bytes")


@pytest.mark.parametrize(
    ("error", "status", "comment"),
    [
        (CatalogError("the catalog is missing"), 0x0110, "the catalog is missing"),
        (QueryError("PixelData cannot be matched", offending=(0x7FE00010,)), 0xA900, "PixelData cannot be matched"),
        (ZeroDivisionError("patient Doe"), UNABLE, "internal error (ZeroDivisionError)"),
    ],
)
def test_a_failure_after_matches_is_the_last_answer(error: Exception, status: int, comment: str) -> None:
    found = answers(FakeFinder(2, error), encoded({}))
    assert [answer.status for answer in found] == [PENDING, PENDING, status]
    assert found[-1].comment == comment


def test_a_cancelled_query_looks_nothing_more_up() -> None:
    finder = FakeFinder(1000)
    request = FindRequest(model="STUDY_ROOT", identifier=encoded({}), transfer_syntax=ExplicitVRLittleEndian)
    seen: list[int] = []
    for answer in FindService(finder).answers(request, cancelled=lambda: len(seen) == 3):
        seen.append(answer.status)
    assert seen == [PENDING, PENDING, PENDING, CANCELLED]
    assert finder.looked_up == 4


def test_keys_are_keywords_tags_and_paths() -> None:
    identifier = build_identifier(
        {
            "PatientName": "Дое*",
            "0010,0020": "7",
            "(0020,000D)": "1.2\\1.3",
            "StudyDate": "20240101-",
            "Rows": "512",
            "InstanceNumber": "3",
            "RequestAttributesSequence.ScheduledProcedureStepID": "S1",
            "RequestAttributesSequence.RequestedProcedureID": "",
            "ReferencedStudySequence": "",
            "00091001": "x",
        },
        "IMAGE",
    )
    assert identifier.SpecificCharacterSet == "ISO_IR 192"
    assert identifier.QueryRetrieveLevel == "IMAGE"
    assert (identifier.PatientID, identifier.StudyInstanceUID, identifier.Rows) == ("7", ["1.2", "1.3"], 512)
    [item] = identifier.RequestAttributesSequence
    assert (item.ScheduledProcedureStepID, item.RequestedProcedureID) == ("S1", None)
    assert len(identifier.ReferencedStudySequence) == 0
    assert identifier[0x00091001].value == "x"
    assert encode(identifier, False, True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PatientNaem", "", r"'PatientNaem' is neither a DICOM keyword nor a tag; did you mean PatientName\?"),
        ("0010", "", "'0010' is neither a DICOM keyword nor a tag"),
        ("Rows", "many", "Rows: 'many' is not a number"),
        ("InstanceNumber", "1-3", "InstanceNumber: '1-3' is not a number"),
        ("PatientID.Rows", "", "PatientID is not a sequence: it has no Rows"),
    ],
)
def test_keys_that_cannot_be_asked(name: str, value: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        build_identifier({name: value}, "STUDY")


def test_default_keys_are_known() -> None:
    assert all(tag_of(name) for names in DEFAULT_KEYS.values() for name in names)
