"""Identifiers of C-FIND responses: byte for byte what pydicom writes."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom.dsutils import encode

from sphere.catalog.answer import Match
from sphere.catalog.query import Key
from sphere.scp.answers import AnswerEncoder

pytestmark = pytest.mark.unit

VALUES: dict[str, list[Any]] = {
    "PatientName": ["Müller^Anna", "Yamada^Tarou=山田^太郎=やまだ^たろう", "Doe^John^", "", "=山田", None],
    "PatientID": ["1", "12", "Иванов"],
    "PatientBirthDate": [date(1970, 1, 2), date(1, 1, 1), None],
    "StudyTime": ["101500.123", "10"],
    "ModalitiesInStudy": [["CT"], ["CT", "MR"], [], [None, "MR"], None],
    "StudyInstanceUID": ["1.2.3", "1.2.33"],
    "OtherPatientIDsSequence": [None],
    "PatientWeight": [70.0, 1 / 3, -1e-30, 1e22],
    "SeriesNumber": [7, -12, None],
    "PixelSpacing": [[0.5, 0.25], [0.703125, 0.1]],
    "Rows": [512, None],
    "AcquisitionMatrix": [[0, 256, 256, 0]],
    "SAR": [0.9],
    "ImageComments": ["a long text\\with a backslash ", "x" * 70_000],
    "AccessionNumber": ["A 1 "],
    "SpecificCharacterSet": [],
    "FrameIncrementPointer": [["00181063"]],
    "SmallestImagePixelValue": [-3, 3],
    "StudyID": ["ÄÖ"],
    "BodyPartExamined": ["TÊTE"],
    "RetrieveAETitle": ["TESTED"],
}


def value(name: str, row: int) -> Any:
    return VALUES[name][row % len(VALUES[name])]


def matches() -> list[Match]:
    """Each value of each attribute, in matches that have all attributes."""
    names = [name for name, values in VALUES.items() if values]
    keys = tuple(Key(tag_for_keyword(name) or 0, name, dictionary_VR(name)) for name in names)
    rows = max(map(len, VALUES.values()))
    return [
        Match(
            "STUDY", keys, {key.tag: VALUES[key.keyword][row % len(VALUES[key.keyword])] for key in keys}, {}, "TESTED"
        )
        for row in range(rows)
    ]


def one_by_one() -> list[Match]:
    keys = {name: Key(tag_for_keyword(name) or 0, name, dictionary_VR(name)) for name in VALUES}
    return [
        Match("IMAGE", (keys[name],), {keys[name].tag: value}, {}, "ODD")
        for name, values in VALUES.items()
        for value in values
    ]


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
@pytest.mark.parametrize("made", [matches, one_by_one])
def test_the_bytes_are_those_of_pydicom(syntax: Any, made: Any) -> None:
    encoder, compared = AnswerEncoder(syntax), 0
    for match in made():
        try:
            wanted = encode(match.identifier(), syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
        except UnicodeEncodeError:
            wanted = None
        if wanted is None:
            continue
        assert encoder.encode(match) == wanted, match.columns
        compared += 1
    assert compared >= 3


def test_common_answers_take_no_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in VALUES if dictionary_VR(name) not in ("SQ", "AT", "US or SS") and VALUES[name]]
    keys = tuple(Key(tag_for_keyword(name) or 0, name, dictionary_VR(name)) for name in names)
    match = Match(
        "STUDY", keys, {key.tag: VALUES[key.keyword][0] for key in keys if key.keyword != "BodyPartExamined"}, {}, "A"
    )

    def never(self: Match) -> Dataset:
        raise AssertionError

    monkeypatch.setattr(Match, "identifier", never)
    assert AnswerEncoder(ExplicitVRLittleEndian).encode(match)
