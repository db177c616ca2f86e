"""The Native DICOM Model (PS3.19 A.1): DICOM JSON objects as XML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from pydicom.datadict import keyword_for_tag

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NAME_PARTS = ("FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix")
HEAD = '<?xml version="1.0" encoding="UTF-8"?>'


def native_model(header: Mapping[str, Mapping[str, Any]]) -> bytes:
    """One DICOM JSON object as an XML document in UTF-8; characters that XML forbids become U+FFFD."""
    inner = "".join(_attributes(header))
    text = f'{HEAD}<NativeDicomModel xmlns="http://dicom.nema.org/PS3.19/models/NativeDICOM">{inner}</NativeDicomModel>'
    return text.encode("utf-8", "replace")


def _attributes(header: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for tag, element in header.items():
        if creator := _creator(header, tag):
            named, tag = f" privateCreator={quoteattr(_clean(creator))}", f"{tag[:4]}00{tag[6:]}"
        else:
            keyword = keyword_for_tag(int(tag, 16))
            named = f' keyword="{keyword}"' if keyword else ""
        yield f'<DicomAttribute tag="{tag}" vr="{element.get("vr", "UN")}"{named}>'
        yield from _content(element)
        yield "</DicomAttribute>"


def _creator(header: Mapping[str, Mapping[str, Any]], tag: str) -> str:
    """Who reserved the block of a private element (PS3.5 7.8.1), "" of other elements.

    Such an element has its creator for the number of its block (PS3.19 Table A.1.5-2); where nobody reserved the block,
    the number is all that there is, and stays.
    """
    return creator_of(header, tag[:4], tag[4:6]) if tag[3] in "13579BDF" and tag[4:6] != "00" else ""


def creator_of(header: Mapping[str, Mapping[str, Any]], group: str, block: str) -> str:
    """Who reserved a block of a private group, both in hexadecimal digits; "" for nobody."""
    values = header.get(f"{group}00{block}", {}).get("Value") or [""]
    return values[0].strip() if isinstance(values[0], str) else ""


def _content(element: Mapping[str, Any]) -> Iterator[str]:
    if "BulkDataURI" in element:
        yield f"<BulkData uri={quoteattr(element['BulkDataURI'])}/>"
    elif "InlineBinary" in element:
        yield f"<InlineBinary>{element['InlineBinary']}</InlineBinary>"
    vr = element.get("vr")
    for number, value in enumerate(element.get("Value") or [], 1):
        if vr == "SQ":
            yield f'<Item number="{number}">{"".join(_attributes(value or {}))}</Item>'
        elif vr == "PN":
            yield f'<PersonName number="{number}">{"".join(_names(value or {}))}</PersonName>'
        else:
            yield f'<Value number="{number}">{_text(value)}</Value>'


def _names(groups: Mapping[str, str]) -> Iterator[str]:
    for group in ("Alphabetic", "Ideographic", "Phonetic"):
        if text := groups.get(group):
            parts = zip(_NAME_PARTS, text.split("^", 4), strict=False)
            inner = "".join(f"<{name}>{_text(part)}</{name}>" for name, part in parts if part)
            yield f"<{group}>{inner}</{group}>"


def _text(value: Any) -> str:
    return "" if value is None else escape(_clean(str(value)), {"\r": "&#13;"})  # a bare one is read as a line feed


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
