"""The matcher on one header: does a predicate hold for a DICOM JSON object (PS3.18 Annex F)?

It answers for attributes that no column holds (private ones, those inside sequences), and for headers that are in no
table. A test with generated headers holds it to the same answers as the SQL of `sphere.catalog.predicate`.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any, Final

from pydicom.datadict import tag_for_keyword

from sphere.catalog.match import TRAILING_ONLY_VRS, Empty, Test, Value, time_text
from sphere.catalog.match_parse import DECIMAL, DECIMAL_VRS, INTEGER_VRS
from sphere.catalog.predicate import AnyItem, Compare, CompareStored, Moment, Node, Predicate
from sphere.catalog.schema import BY_KEYWORD
from sphere.ingest.header.columns import FUNCTIONAL_GROUPS

_SHARED_FUNCTIONAL_GROUPS: Final = 0x52009229


def _macros_of() -> dict[int, list[int]]:
    """From the tag of an attribute to the functional group sequences whose macro defines it."""
    macros: dict[int, list[int]] = {}
    for group in FUNCTIONAL_GROUPS:
        for keyword in group.keywords:
            macros.setdefault(BY_KEYWORD[keyword].tag, []).append(tag_for_keyword(group.name) or 0)
    return macros


_MACROS_OF: Final = _macros_of()

Header = Mapping[str, Any]
"""A DICOM JSON object: "GGGGEEEE" to {"vr": ..., "Value": [...]}."""


def holds(predicate: Predicate, header: Header) -> bool:
    """Whether every node holds for the header."""
    return all(_node_holds(node, header) for node in predicate)


def _node_holds(node: Node, header: Header) -> bool:
    if isinstance(node, Compare):
        return _test_holds(node.test, header, tag_in(header, node.tag, node.creator), node.vr)
    if isinstance(node, CompareStored):
        tag = tag_in(header, node.tag, node.creator)
        vr = header.get(f"{tag:08X}", {}).get("vr", "")
        tests = node.asks.tests(vr)
        return tests is not None and all(_test_holds(test, header, tag, vr) for test in tests)
    if isinstance(node, AnyItem):
        return any(holds(node.nodes, item) for item in items(header, tag_in(header, node.tag, node.creator)))
    return any(moment_holds(node, day, time) for day, time in _moments(node, header))


def _test_holds(test: Test, header: Header, tag: int, vr: str) -> bool:
    values = column_values(header, tag, vr)
    if isinstance(test, Empty):
        return next(values, None) is None
    return any(test.matches(value) for value in values)


def _moments(node: Moment, header: Header) -> Iterator[tuple[Value, Value]]:
    for day in column_values(header, node.date_tag, "DA"):
        for time in column_values(header, node.time_tag, "TM"):
            yield day, time


def moment_holds(node: Moment, day: Value, time: Value) -> bool:
    """Whether a date and its time, in column form, lie in the range."""
    text = time_text(time)
    if text is None or not isinstance(day, date):
        return False
    moment = f"{day:%Y%m%d}{text}"
    return (node.low is None or moment >= node.low) and (node.high is None or moment <= node.high)


def tag_in(header: Header, tag: int, creator: str) -> int:
    """The tag that an attribute has in this data set: a private creator's block differs from one to the other (PS3.5
    7.8.1). 0, which no header has, where its creator reserved none; `tag` itself without a `creator`."""
    if not creator:
        return tag
    group = tag >> 16
    for name, element in header.items():
        if name.startswith(f"{group:04X}00") and (block := int(name[6:], 16)) >= 0x10:
            values = element.get("Value") or [""]
            if isinstance(values[0], str) and values[0].strip(" ") == creator:
                return group << 16 | block << 8 | tag & 0xFF
    return 0


def items(header: Header, tag: int) -> list[Header]:
    """The items of a sequence; none where it is absent or empty."""
    element = header.get(f"{tag:08X}", {})
    if element.get("vr") != "SQ":
        return []
    return [item for item in element.get("Value") or () if isinstance(item, Mapping)]


def column_values(header: Header, tag: int, vr: str) -> Iterator[Value]:
    """The values of an attribute of `vr` in column form, without empty ones and those that are none of it.

    They may be stored with another VR: that costs what `vr` cannot hold of them, as with columns. An attribute that
    only the shared functional groups hold (PS3.3 C.7.6.16) counts as the instance's, as in columns.
    """
    for value in _values(header, tag) or _shared_values(header, tag):
        formed = column_value(value, vr)
        if formed is not None:
            yield formed


def _values(header: Header, tag: int) -> list[Any]:
    element = header.get(f"{tag:08X}")
    if not element or element.get("vr") == "SQ":
        return []
    if element.get("vr") == "UN" and tag >> 16 & 1 and "InlineBinary" in element:
        return b64decode(element["InlineBinary"]).decode("latin-1").rstrip("\0").split("\\")  # text, most likely
    values: list[Any] = element.get("Value") or []
    return values


def _shared_values(header: Header, tag: int) -> list[Any]:
    """The values of an attribute in the functional group macros that define it; none where no group is shared."""
    for shared in items(header, _SHARED_FUNCTIONAL_GROUPS) if tag in _MACROS_OF else ():
        for macro in _MACROS_OF[tag]:
            for group in items(shared, macro):
                if values := _values(group, tag):
                    return values
    return []


def column_value(value: Any, vr: str) -> Value | None:
    """One JSON value in column form: PN as "Alphabetic=Ideographic=Phonetic", DA as a date, numbers as numbers."""
    if value is None:
        return None
    if isinstance(value, Mapping):  # a PN, whatever the attribute should be
        groups = [value.get(name) or "" for name in ("Alphabetic", "Ideographic", "Phonetic")]
        value = "=".join(groups).rstrip("=")
    if vr == "DA":
        return _date(str(value))
    if vr in INTEGER_VRS or vr in DECIMAL_VRS:
        return _number(value)
    text = str(value)
    return (text.rstrip(" ") if vr in TRAILING_ONLY_VRS else text.strip(" ")) or None


def _date(text: str) -> date | None:
    digits = re.fullmatch(r"([0-9]{4})(\.?)([0-9]{2})\2([0-9]{2})", text.strip(" "))
    if not digits:
        return None
    try:
        return date(int(digits[1]), int(digits[3]), int(digits[4]))
    except ValueError:
        return None


def _number(value: Any) -> int | float | None:
    if isinstance(value, (int, float)):
        return value
    text = str(value)
    return float(text) if DECIMAL.fullmatch(text) else None
