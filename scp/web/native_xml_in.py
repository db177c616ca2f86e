"""The Native DICOM Model (PS3.19 A.1) that came with a request, into DICOM JSON objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from sphere.scp.web.metadata_in import MAX_DEPTH, Header, broken
from sphere.scp.web.native_xml import creator_of
from sphere.scp.web.problem import WebError

_TWICE: Final = "is in the metadata twice"
_PRIVATE = re.compile("[0-9A-F]{3}[13579BDF][0-9A-F]{4}")
_TEXTS: Final = frozenset(("LO", "SH", "CS", "LT", "ST", "UC", "UT", "UN"))  # VRs that creators were seen with
MAX_GAPS: Final = 1 << 16  # values of a document that are left out by the numbers of those after them


def read_xml(text: bytes) -> Iterator[Header]:
    """The data sets of the Native DICOM Model; raises WebError (400), for entities and DTDs as well."""
    try:
        root = fromstring(text, forbid_dtd=True)
    except DefusedXmlException:
        raise WebError("the metadata has a DTD or entities, which are not read") from None
    except (ParseError, ValueError, LookupError):
        raise WebError("the metadata is not XML") from None
    models = [root] if _name(root) == "NativeDicomModel" else [one for one in root if _name(one) == "NativeDicomModel"]
    if not models:
        raise WebError("the metadata is no NativeDicomModel (PS3.19 A.1)")
    gaps = _Gaps(MAX_GAPS)
    for model in models:
        yield _of_model(model, 0, gaps)


@dataclass(slots=True)
class _Gaps:
    """Empty values that the numbers of a document may still make: a few letters each, and a place in memory."""

    left: int

    def take(self, number: int) -> bool:
        """Whether so many could be had; they are then taken."""
        granted = 0 <= number <= self.left
        self.left -= number if granted else 0
        return granted


def _name(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _of_model(model: Element, depth: int, gaps: _Gaps) -> Header:
    if depth > MAX_DEPTH:
        raise WebError("sequences are too deep in one another")
    header: Header = {}
    private: list[tuple[str, str, Header]] = []
    for attribute in model:
        if _name(attribute) != "DicomAttribute":
            continue
        tag, element = attribute.get("tag", "").upper(), _of_attribute(attribute, depth, gaps)
        if creator := attribute.get("privateCreator", "").strip():
            private.append((tag, creator, element))
        elif tag in header:
            return broken(header, f"{tag[:20]} {_TWICE}")
        elif _PRIVATE.fullmatch(tag) and tag[4:6] == "00" and tag[6:] != "00" and element["vr"] not in _TEXTS:
            return broken(header, f"{tag} is private, and nothing says whose")
        else:
            header[tag] = element
    for tag, creator, element in private:
        if reason := _place(header, tag, creator, element):
            return broken(header, f"{tag[:20]} {reason}")
    return header


def _place(header: Header, tag: str, creator: str, element: Header) -> str:
    """A private element into a block of its creator, which is reserved where it is missing; or why it cannot be.

    A creator may have several blocks, which XML does not tell apart: what is there already belongs to the next one.
    """
    if not _PRIVATE.fullmatch(tag):
        return "has a privateCreator, and is not private"
    group, low = tag[:4], tag[6:]
    blocks = [f"{number:02X}" for number in range(0x10, 0x100)]
    owned = [block for block in blocks if creator_of(header, group, block) == creator]
    for block in owned:
        if f"{group}{block}{low}" not in header:
            header[f"{group}{block}{low}"] = element
            return ""
    if owned:
        return _TWICE
    taken = {one[6:] if one[4:6] == "00" else one[4:6] for one in header if one[:4] == group}
    free = next((block for block in blocks if block not in taken), "")
    if not free:
        return "finds no free block in its group"
    header[f"{group}00{free}"] = {"vr": "LO", "Value": [creator]}
    header[f"{group}{free}{low}"] = element
    return ""


def _of_attribute(attribute: Element, depth: int, gaps: _Gaps) -> Header:
    element: Header = {"vr": attribute.get("vr", "")}
    values: list[tuple[str, Any]] = []
    for child in attribute:
        name, number = _name(child), child.get("number", "")
        if name == "Value":
            values.append((number, _number(child.text, element["vr"])))
        elif name == "Item":
            values.append((number, _of_model(child, depth + 1, gaps)))
        elif name == "PersonName":
            values.append((number, {_name(group): _of_name(group) for group in child}))
        elif name == "InlineBinary":
            element["InlineBinary"] = (child.text or "").strip()
        elif name == "BulkData":
            element["BulkDataURI"] = child.get("uri", "")
    return _numbered(element, values, gaps) if values else element


def _numbered(element: Header, values: list[tuple[str, Any]], gaps: _Gaps) -> Header:
    """The values at their numbers, from 1 on; those that are left out are empty."""
    found: list[Any] = []
    for text, value in values:
        number = int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else 0
        gap = number - len(found) - 1 if text else 0
        if gap < 0 or not gaps.take(gap):
            return broken(
                element, "its values are not numbered from 1 on" if gap < 0 else "too many values are left out"
            )
        found += [None] * gap + [value]
    element["Value"] = found
    return element


def _number(text: str | None, vr: str) -> Any:
    """A value as JSON has it; DS and IS stay the text that they are in a data set."""
    if text is None:
        return None
    if vr in ("US", "SS", "UL", "SL", "UV", "SV"):
        return int(text) if re.fullmatch(r"\s*[+-]?\d{1,20}\s*", text, re.ASCII) else text
    if vr in ("FL", "FD"):
        return float(text) if re.fullmatch(r"\s*[+-]?[\d.]{1,30}([eE][+-]?\d{1,3})?\s*", text, re.ASCII) else text
    return text


def _of_name(group: Element) -> str:
    parts = {_name(part): part.text or "" for part in group}
    names = ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")
    return "^".join(parts.get(name, "") for name in names).rstrip("^")
