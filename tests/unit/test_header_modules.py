"""The typed columns against PS3.3 as others have it: the tables of its modules in highdicom, which are made from the
standard's text.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword

from sphere.ingest.header.columns import COLUMNS, FUNCTIONAL_GROUPS

pytestmark = pytest.mark.unit

IODS = (
    "ct-image",
    "mr-image",
    "positron-emission-tomography-image",
    "nuclear-medicine-image",
    "ultrasound-image",
    "ultrasound-multi-frame-image",
    "x-ray-angiographic-image",
    "x-ray-radiofluoroscopic-image",
    "digital-x-ray-image",
    "digital-mammography-x-ray-image",
    "breast-tomosynthesis-image",
    "basic-text-sr",
    "enhanced-sr",
    "comprehensive-sr",
    "comprehensive-3d-sr",
    "enhanced-ct-image",
    "enhanced-mr-image",
    "enhanced-mr-color-image",
    "mr-spectroscopy",
    "enhanced-pet-image",
    "enhanced-us-volume",
    "enhanced-xa-image",
    "enhanced-xrf-image",
    "legacy-converted-enhanced-ct-image",
    "legacy-converted-enhanced-mr-image",
    "legacy-converted-enhanced-pet-image",
)
"""The objects of which every module is looked at: what they share (Patient, Study, ..., SOP Common) is among them."""
NO_VALUES = {"SQ", "OB", "OW", "OF", "OD", "OL", "OV", "UN"}  # sequences and binary data
SEVERAL = {
    "BiopsyTargetSequence",
    "ConversionSourceAttributesSequence",
    "DerivationImageSequence",
    "ExposureControlSensingRegionsSequence",
    "FramePixelShiftSequence",
    "PixelIntensityRelationshipLUTSequence",
    "RealWorldValueMappingSequence",
    "ReferencedImageSequence",
}
"""Functional groups that may have several items ("one or more"): no attribute of theirs has a single value."""
ITEMS_ONLY = {"ReferencedPathIndex", "ReferencedXRaySourceIndex"}
"""Tie items of groups together where there are several (C.8.15.3): each such group has its own."""
CONTENT_ITEMS = {
    "DateTime", "Date", "Time", "PersonName", "UID", "TextValue", "TemporalRangeType", "ReferencedSamplePositions",
    "ReferencedTimeOffsets", "ReferencedDateTime", "PixelOriginInterpretation", "GraphicData", "GraphicType",
    "FiducialUID", "ReferencedFrameOfReferenceUID",
}  # fmt: skip
"""Of content items of other value types than CONTAINER, which the root of a document has (C.17.3.1)."""

COLUMN_NAMES = {column.keyword for column in COLUMNS}


@functools.cache  # every worker reads this module in
def _table(name: str) -> Any:
    return json.loads(files("highdicom").joinpath("_standard", f"{name}.json").read_text(encoding="utf-8"))


def _has_values(keyword: str) -> bool:
    """False for repeating groups too (overlays, PS3.5 7.6), of which no keyword is that of one tag."""
    tag = tag_for_keyword(keyword)
    return tag is not None and not NO_VALUES & set(dictionary_VR(tag).split(" or "))


ATTRIBUTES = _table("module_attribute_map")
_MODULES_OF = _table("iod_module_map")
MODULES = sorted({module["key"] for iod in IODS for module in _MODULES_OF[iod]})


def test_the_modules_are_those_that_are_meant() -> None:
    wanted = {
        *("patient", "general-study", "patient-study", "general-series", "general-equipment", "frame-of-reference"),
        *("general-image", "image-pixel", "image-plane", "ct-image", "mr-image", "pet-series", "pet-image", "nm-image"),
        *("us-image", "xa-positioner", "x-ray-acquisition", "dx-image", "mammography-image", "sop-common"),
        *("sr-document-general", "sr-document-content", "enhanced-mr-image"),
        "enhanced-mr-image-multi-frame-functional-groups",
    }
    assert wanted <= set(MODULES)
    assert len(MODULES) > 100


@pytest.mark.parametrize("module", MODULES)
def test_attributes_of_a_module_are_columns(module: str) -> None:
    """Those of the first level that have one value or several."""
    values = {one["keyword"] for one in ATTRIBUTES[module] if not one["path"] and _has_values(one["keyword"])}
    left_out = CONTENT_ITEMS if module == "sr-document-content" else set()
    assert values - left_out <= COLUMN_NAMES


@pytest.mark.parametrize("module", [one for one in MODULES if one.endswith("-functional-groups")])
def test_attributes_of_shared_functional_groups_are_columns(module: str) -> None:
    groups: dict[str, set[str]] = {}
    for one in ATTRIBUTES[module]:
        if len(one["path"]) == 2 and one["path"][0] == "SharedFunctionalGroupsSequence" and _has_values(one["keyword"]):
            groups.setdefault(one["path"][1], set()).add(one["keyword"])
    ours = {group.name: set(group.keywords) for group in FUNCTIONAL_GROUPS}
    missing = {name: left for name, has in groups.items() if (left := has - ours.get(name, set()) - ITEMS_ONLY)}
    assert missing.keys() <= SEVERAL, missing


def test_what_is_left_out_is_not_there() -> None:
    """Or it would not have to be named here."""
    assert not ITEMS_ONLY & COLUMN_NAMES
    assert not CONTENT_ITEMS & COLUMN_NAMES
    assert not SEVERAL & {group.name for group in FUNCTIONAL_GROUPS}
