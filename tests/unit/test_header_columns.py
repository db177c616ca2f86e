"""The typed columns: what modules.toml lists, against the data dictionary."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword

from sphere.ingest.header.columns import COLUMNS, FUNCTIONAL_GROUPS, MODULES, Column

pytestmark = pytest.mark.unit

BY_KEYWORD = {column.keyword: column for column in COLUMNS}
BINARY = {"SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UN"}


@pytest.mark.parametrize("module", MODULES + FUNCTIONAL_GROUPS, ids=lambda module: module.name)
def test_every_keyword_of_a_module_is_a_column(module):
    assert module.keywords
    assert module.clause.startswith("C.")
    tags = [tag_for_keyword(keyword) for keyword in module.keywords]
    assert None not in tags
    assert tags == sorted(set(tags))
    assert set(module.keywords) <= BY_KEYWORD.keys()
    assert not BINARY & {vr for tag in tags for vr in dictionary_VR(tag).split(" or ")}


def test_functional_groups_are_sequences():
    assert {dictionary_VR(tag_for_keyword(group.name)) for group in FUNCTIONAL_GROUPS} == {"SQ"}


def test_columns_are_unique_for_an_engine_that_ignores_case():
    assert [name for name, count in Counter(c.keyword.lower() for c in COLUMNS).items() if count > 1] == []


@pytest.mark.parametrize(
    ("keyword", "vr", "arrow"),
    [
        ("StudyDate", "DA", pa.date32()),
        ("StudyTime", "TM", pa.string()),
        ("PatientName", "PN", pa.string()),
        ("SliceThickness", "DS", pa.float64()),
        ("PixelSpacing", "DS", pa.list_(pa.float64())),
        ("InstanceNumber", "IS", pa.int64()),
        ("Rows", "US", pa.int64()),
        ("SmallestImagePixelValue", "US or SS", pa.int64()),
        ("ImageType", "CS", pa.list_(pa.string())),
        ("FrameIncrementPointer", "AT", pa.list_(pa.string())),
        ("RevolutionTime", "FD", pa.float64()),
        ("SOPInstanceUID", "UI", pa.string()),
        ("PatientAge", "AS", pa.string()),
        ("AcquisitionDateTime", "DT", pa.string()),
    ],
)
def test_types(keyword: str, vr: str, arrow: pa.DataType):
    column = BY_KEYWORD[keyword]
    assert column == Column(keyword, tag_for_keyword(keyword), vr, column.vm, arrow)
    assert column.multiple == pa.types.is_list(arrow)


@pytest.mark.parametrize(
    "keyword",
    [
        *("PatientID", "AccessionNumber", "BodyPartExamined", "StationName", "FrameOfReferenceUID", "KVP", "CTDIvol"),
        *("EchoTime", "MagneticFieldStrength", "Units", "NumberOfSlices", "TransducerType", "PositionerPrimaryAngle"),
        *("ViewPosition", "ImageLaterality", "CompletionFlag", "WindowCenter", "RescaleSlope", "NumberOfFrames"),
        *("CineRate", "DiffusionBValue", "SpecificCharacterSet", "ClinicalTrialProtocolID", "PatientWeight"),
    ],
)
def test_what_people_look_for_is_there(keyword: str):
    assert keyword in BY_KEYWORD
