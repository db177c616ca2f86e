"""DICOM objects that are annotations themselves: which classes they are of, and what their headers refer to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydicom._uid_dict import UID_dictionary

_KINDS: Final = {
    "SegmentationStorage": "SEG",
    "SurfaceSegmentationStorage": "SEG",
    "LabelMapSegmentationStorage": "SEG",
    "KeyObjectSelectionDocumentStorage": "KO",
}
_STUDY, _SERIES, _INSTANCE = "0020000D", "0020000E", "00081155"
_REFERENCED_SERIES = "00081115"
_REFERENCED_INSTANCES = ("00081199", "0008114A", "00081140")
"""Referenced SOP, Referenced Instance and Referenced Image Sequence."""
_OTHER_STUDIES = ("0040A375", "0040A385", "00081200")
"""Current Requested Procedure Evidence, Pertinent Other Evidence (PS3.3 C.17.2), Studies Containing Other Referenced
Instances (PS3.3 C.12.4): items name a study and its series."""


def _kind(keyword: str) -> str:
    if keyword in _KINDS:
        return _KINDS[keyword]
    if keyword.endswith("PresentationStateStorage"):
        return "PR"
    return "SR" if keyword.endswith("SRStorage") or keyword == "ProcedureLogStorage" else ""


KINDS: Final[Mapping[str, str]] = {
    uid: kind for uid, entry in UID_dictionary.items() if entry[1] == "SOP Class" and (kind := _kind(entry[4]))
}
"""By SOP Class UID, the Modality that such objects have: SEG, SR, PR (presentation states) or KO."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A series (or, with "", a study) that an object refers to, and the instances of it; none: all of it."""

    StudyInstanceUID: str
    SeriesInstanceUID: str
    instances: tuple[str, ...]

    def is_of(self, uid: str) -> bool:
        """Whether it is about what has this UID: the study, the series, or an instance of it."""
        return uid in (self.StudyInstanceUID, self.SeriesInstanceUID, *self.instances)


def references(header: Mapping[str, Any]) -> list[Reference]:
    """What a header, as DICOM JSON (PS3.18 Annex F), refers to; items that cannot be read are passed over."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    own = _text(header, _STUDY)
    for study, item in _parts(header, own):
        series = list(_items(item, _REFERENCED_SERIES))
        for one in series:
            instances = found.setdefault((study, _text(one, _SERIES)), {})
            for name in _REFERENCED_INSTANCES:
                instances |= dict.fromkeys(filter(None, (_text(each, _INSTANCE) for each in _items(one, name))))
    return [Reference(*key, tuple(instances)) for key, instances in found.items() if key[0]]


def _parts(header: Mapping[str, Any], own: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield own, header
    for name in _OTHER_STUDIES:
        for item in _items(header, name):
            yield _text(item, _STUDY) or own, item


def _items(header: Mapping[str, Any], tag: str) -> Iterator[Mapping[str, Any]]:
    element = header.get(tag)
    values = element.get("Value") if isinstance(element, Mapping) else None
    for item in values or ():
        if isinstance(item, Mapping):
            yield item


def _text(header: Mapping[str, Any], tag: str) -> str:
    element = header.get(tag)
    values = element.get("Value") if isinstance(element, Mapping) else None
    return str(values[0]) if values and values[0] is not None else ""
