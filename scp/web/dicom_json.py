"""Answers of the query service as DICOM JSON objects (PS3.18 Annex F)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from sphere.catalog.match_header import Header
from sphere.catalog.query import Key
from sphere.catalog.service import Match

Element = dict[str, Any]

SPECIFIC_CHARACTER_SET, RETRIEVE_URL = "00080005", "00081190"
_GROUPS = ("Alphabetic", "Ideographic", "Phonetic")


def as_object(match: Match, retrieve_url: str = "") -> dict[str, Element]:
    """One match with the keys asked for, an attribute without a value having its VR alone."""
    found: dict[str, Element] = {SPECIFIC_CHARACTER_SET: {"vr": "CS", "Value": ["ISO_IR 192"]}}
    for key in match.keys:
        name = f"{key.tag:08X}"
        if key.tag in match.columns:
            found[name] = _of_column(key.vr, match.columns[key.tag])
        else:
            found[name] = _of_header(key, match.header.get(name))
    if retrieve_url:
        found[RETRIEVE_URL] = {"vr": "UR", "Value": [retrieve_url]}
    return dict(sorted(found.items()))


def _of_column(vr: str, value: Any) -> Element:
    values: Sequence[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if vr.startswith("US or "):
        vr = "SS" if any(one is not None and one < 0 for one in values) else "US"
    shown = [_json_value(vr, one) for one in values]
    return {"vr": vr, "Value": shown} if shown else {"vr": vr}


def _json_value(vr: str, value: Any) -> Any:
    if value is None:
        return None
    if vr == "PN":
        return {name: group for name, group in zip(_GROUPS, str(value).split("="), strict=False) if group}
    if isinstance(value, date):
        return f"{value.year:04}{value:%m%d}"
    return value


def _of_header(key: Key, element: Mapping[str, Any] | None) -> Element:
    """An element of a header; of a sequence only what the key names in it, if it names anything."""
    if element is None:
        vr = key.vr.split(" or ")[0]
        return {"vr": vr}
    if element.get("vr") != "SQ" or not key.items:
        return without_places(element)
    items = [_item(key.items, item) for item in element.get("Value") or [] if item is not None]
    return {"vr": "SQ", "Value": items} if items else {"vr": "SQ"}


def _item(keys: Sequence[Key], header: Header) -> dict[str, Element]:
    return {f"{key.tag:08X}": _of_header(key, header.get(f"{key.tag:08X}")) for key in keys}


def without_places(element: Mapping[str, Any]) -> Element:
    """An element without where its bulk data lie in the file, which means nothing to who asks."""
    kept = {name: value for name, value in element.items() if name != "BulkDataURI"}
    if kept.get("vr") == "SQ" and "Value" in kept:
        kept["Value"] = [
            None if item is None else {tag: without_places(inner) for tag, inner in item.items()}
            for item in kept["Value"]
        ]
    return kept
