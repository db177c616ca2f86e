"""One element's value as DICOM JSON (PS3.18 Annex F) and as the typed value of its column."""

from __future__ import annotations

import math
import re
import struct
from base64 import b64encode
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, Final, NamedTuple

import orjson

from sphere.ingest.header.charset import Charset, decode
from sphere.ingest.header.columns import COLUMNS
from sphere.ingest.header.dictionary import label

INLINE_LIMIT: Final = 1024  # bytes of a binary value up to which it stands in the JSON itself
BINARY_VRS: Final = frozenset(("OB", "OD", "OF", "OL", "OV", "OW", "UN"))
_WORD: Final = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}
NUMBERS: Final = {  # binary ones, as `struct` names them
    "US": "H",
    "SS": "h",
    "UL": "I",
    "SL": "i",
    "UV": "Q",
    "SV": "q",
    "FL": "f",
    "FD": "d",
}
_SINGLE_TEXT: Final = frozenset(("ST", "LT", "UT"))  # no multiplicity: a backslash is a character (PS3.5 6.4)
_CHARSET_VRS: Final = frozenset(("SH", "LO", "UC", "PN")) | _SINGLE_TEXT
_JSON_NUMBER: Final = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.\d+)?(?:[eE][+-]?\d{1,2})?", re.ASCII)
_JSON_NUMBERS: Final = re.compile(rb"(?:-?(?:0|[1-9]\d{0,14})(?:\.\d{1,16})?(?:\\(?=.)|$))+")
_JSON_INTEGERS: Final = re.compile(rb"(?:-?(?:0|[1-9]\d{0,14})(?:\\(?=.)|$))+")
_NUMBER: Final = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_INTEGER: Final = re.compile(r"[+-]?\d{1,400}", re.ASCII)
_DATE: Final = re.compile(r"(\d{4})(\.?)(\d\d)\2(\d\d)", re.ASCII)
_INT64: Final = range(-(1 << 63), 1 << 63)


class Hit(NamedTuple):
    """An element, ready: its JSON member (b"" for none), its column and typed value (None for none), what was wrong."""

    tag: int
    json: bytes
    keyword: str | None
    value: Any
    warnings: tuple[str, ...]


class _Decoded(NamedTuple):
    """JSON of the values in brackets (b"" where there are none), the values, and what was wrong."""

    json: bytes
    values: Sequence[Any]
    problem: str = ""


def member(tag: int, vr: str, rest: bytes = b"") -> bytes:
    """A DICOM JSON member; `rest` is what follows the VR, with its comma."""
    return b'"%08X":{"vr":"%s"%s}' % (tag, vr.encode("ascii"), rest)


def element_hit(tag: int, vr: str, value: bytes, *, little: bool, charset: Charset) -> Hit:
    """The element whose complete value is `value`. Never raises: a value that cannot be read costs itself."""
    if tag & 0xFFFF == 0:  # a group length is an artefact of encoding, not content
        return Hit(tag, b"", None, None, ())
    if vr in BINARY_VRS:
        return _binary(tag, vr, value, little)
    try:
        decoded = _DECODERS.get(vr, _codes)(value, vr, little, charset)
    except (ValueError, struct.error):
        hit = _binary(tag, "UN", value, little)
        return hit._replace(warnings=(f"{label(tag)}: {len(value)} bytes are not a value of {vr}",))
    json, values, problem = decoded
    if not json:
        return Hit(tag, member(tag, vr), None, None, ())
    problems = [problem] if problem else []
    target = _TARGETS.get(tag)
    typed = _typed(target, values, problems) if target is not None else None
    warnings = tuple([f"{label(tag)}: {problem}" for problem in problems]) if problems else ()
    keyword = target.keyword if target is not None and typed is not None else None
    return Hit(tag, member(tag, vr, b',"Value":' + json), keyword, typed, warnings)


def bulk_hit(tag: int, vr: str, *, offset: int, length: int, inflated: bool) -> Hit:
    """A binary value too large for the JSON: where it lies in the member, or in the inflated data set."""
    name = b"inflated_offset" if inflated else b"offset"
    uri = b',"BulkDataURI":"?%s=%d&length=%d"' % (name, offset, length)
    return Hit(tag, member(tag, vr, uri), None, None, ())


def _binary(tag: int, vr: str, value: bytes, little: bool) -> Hit:
    if not value:
        return Hit(tag, member(tag, vr), None, None, ())
    word = _WORD.get(vr, 1)
    if not little and word > 1 and len(value) % word == 0:
        value = b"".join(value[i : i + word][::-1] for i in range(0, len(value), word))
    rest = b',"InlineBinary":"%s"' % b64encode(value)
    warnings = (f"{label(tag)}: has VR {vr}, so its column stays empty",) if tag in _TARGETS else ()
    return Hit(tag, member(tag, vr, rest), None, None, warnings)


_Decoder = Callable[[bytes, str, bool, Charset], _Decoded]


def _codes(value: bytes, vr: str, little: bool, charset: Charset) -> _Decoded:
    """AE AS CS DA DT TM UI: text of the default repertoire, blanks around each value without meaning."""
    parts: list[str | None] = [part.strip(" \0") or None for part in value.decode("latin-1").split("\\")]
    if parts == [None]:
        return _Decoded(b"", ())
    return _Decoded(orjson.dumps(parts), parts)


def _text(value: bytes, vr: str, little: bool, charset: Charset) -> _Decoded:
    """SH LO UC, and ST LT UT UR without multiplicity: trailing blanks have no meaning."""
    text, clean = (value.decode("latin-1"), True) if vr == "UR" else decode(value, charset, vr)
    single = vr in _SINGLE_TEXT or vr == "UR"
    parts: list[str | None] = [part.rstrip(" \0") or None for part in ([text] if single else text.split("\\"))]
    if parts == [None]:
        return _Decoded(b"", ())
    problem = "" if clean else f"has bytes that are not {charset.encodings[0]}"
    return _Decoded(orjson.dumps(parts), parts, problem)


def _names(value: bytes, vr: str, little: bool, charset: Charset) -> _Decoded:
    """PN: up to three component groups (PS3.5 6.2.1)."""
    text, clean = decode(value.rstrip(b" \0"), charset, vr)
    parts: list[str | None] = [part.rstrip(" \0=") or None for part in text.split("\\")]
    if parts == [None]:
        return _Decoded(b"", ())
    problem = "" if clean else f"has bytes that are not {charset.encodings[0]}"
    return _Decoded(orjson.dumps([part and _groups(part) for part in parts]), parts, problem)


def _groups(name: str) -> dict[str, str]:
    keys = ("Alphabetic", "Ideographic", "Phonetic")
    return {key: group.rstrip(" \0") for key, group in zip(keys, name.split("="), strict=False) if group.rstrip(" \0")}


def _decimals(value: bytes, vr: str, little: bool, charset: Charset) -> _Decoded:
    plain = value.rstrip(b" \0")
    if _JSON_NUMBERS.fullmatch(plain):
        return _as_they_stand(plain)
    return _numbers_from_text(value, _decimal)


def _integers(value: bytes, vr: str, little: bool, charset: Charset) -> _Decoded:
    plain = value.rstrip(b" \0")
    if _JSON_INTEGERS.fullmatch(plain):
        return _as_they_stand(plain)
    return _numbers_from_text(value, _integer)


def _as_they_stand(value: bytes) -> _Decoded:
    """Numbers that JSON writes as DICOM does."""
    json = b"[" + value.replace(b"\\", b",") + b"]"
    return _Decoded(json, orjson.loads(json))


def _numbers_from_text(value: bytes, read: Callable[[str], tuple[str, Any]]) -> _Decoded:
    parts = [part.strip(" \0\t\r\n") for part in value.decode("latin-1").split("\\")]
    if parts == [""]:
        return _Decoded(b"", ())
    read_parts = [read(part) for part in parts]
    unread = sum(1 for part, (_, number) in zip(parts, read_parts, strict=True) if part and number is None)
    problem = f"{unread} of {len(parts)} values are not numbers" if unread else ""
    json = "[" + ",".join(token for token, _ in read_parts) + "]"
    return _Decoded(json.encode("utf-8"), [number for _, number in read_parts], problem)


def _decimal(text: str) -> tuple[str, float | None]:
    """A DS as a JSON token, and its number; the text as a JSON string where it is none."""
    if not text:
        return "null", None
    if _NUMBER.fullmatch(text):
        number = float(text)
        if math.isfinite(number):
            return (text if _JSON_NUMBER.fullmatch(text) else repr(number)), number
    return orjson.dumps(text).decode("utf-8"), None


def _integer(text: str) -> tuple[str, int | None]:
    if not text:
        return "null", None
    if _INTEGER.fullmatch(text):
        number = int(text)
        return (str(number) if number in _INT64 else orjson.dumps(text).decode("ascii")), number
    token, decimal = _decimal(text)
    if decimal is not None and decimal.is_integer():
        return str(int(decimal)), int(decimal)
    return (token if decimal is None else orjson.dumps(text).decode("ascii")), None


def _binary_numbers(value: bytes, vr: str, little: bool, charset: Charset) -> _Decoded:
    """US SS UL SL UV SV FL FD; a length that is no multiple of the VR's raises struct.error."""
    code = NUMBERS[vr]
    if not value:
        return _Decoded(b"", ())
    size = struct.calcsize("=" + code)
    if len(value) % size:
        raise struct.error
    numbers = struct.unpack(f"{'<' if little else '>'}{len(value) // size}{code}", value)
    if code in "fd" and not all(map(math.isfinite, numbers)):
        return _Decoded(orjson.dumps([n if math.isfinite(n) else _special(n) for n in numbers]), numbers)
    return _Decoded(orjson.dumps(numbers), numbers)


def _special(number: float) -> str:
    """NaN and the infinities, which JSON has no numbers for."""
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _tags(value: bytes, vr: str, little: bool, charset: Charset) -> _Decoded:
    if not value:
        return _Decoded(b"", ())
    if len(value) % 4:
        raise ValueError
    halves = struct.unpack(f"{'<' if little else '>'}{len(value) // 2}H", value)
    tags = [f"{group:04X}{element:04X}" for group, element in zip(halves[::2], halves[1::2], strict=True)]
    return _Decoded(orjson.dumps(tags), tags)


_DECODERS: Final[dict[str, _Decoder]] = {
    **dict.fromkeys(_CHARSET_VRS | {"UR"}, _text),
    **dict.fromkeys(NUMBERS, _binary_numbers),
    "PN": _names,
    "DS": _decimals,
    "IS": _integers,
    "AT": _tags,
}


class _Target(NamedTuple):
    """A column, as values are put into it."""

    keyword: str
    multiple: bool
    convert: Callable[[Any], Any]


def _typed(target: _Target, values: Sequence[Any], problems: list[str]) -> Any:
    """The column's value; what cannot be typed becomes None and is told in `problems`."""
    if target.multiple:
        typed = [_converted(target.convert, value, problems) for value in values]
        return None if all(value is None for value in typed) else typed
    if len(values) > 1:
        problems.append(f"has {len(values)} values where one is allowed, the first is taken")
    return _converted(target.convert, values[0], problems)


def _converted(convert: Callable[[Any], Any], value: Any, problems: list[str]) -> Any:
    if value is None:
        return None
    try:
        return convert(value)
    except (ValueError, OverflowError):
        problem = "a value does not fit its column"
        if problem not in problems:
            problems.append(problem)
        return None


def _to_date(value: Any) -> date:
    found = _DATE.fullmatch(str(value))
    if not found:
        raise ValueError
    return date(int(found[1]), int(found[3]), int(found[4]))


def _to_float(value: Any) -> float:
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            raise ValueError
        value = float(value)
        if not math.isfinite(value):
            raise ValueError
    return float(value)


def _to_int(value: Any) -> int:
    if isinstance(value, str):
        value = int(value) if _INTEGER.fullmatch(value) else _to_float(value)
    number = int(value)
    if number != value or number not in _INT64:
        raise ValueError
    return number


_CONVERTERS: Final[dict[str, Callable[[Any], Any]]] = {
    "string": str,
    "double": _to_float,
    "int64": _to_int,
    "date32[day]": _to_date,
}
_TARGETS: Final[dict[int, _Target]] = {
    column.tag: _Target(
        column.keyword,
        column.multiple,
        _CONVERTERS[str(column.arrow.value_type if column.multiple else column.arrow)],
    )
    for column in COLUMNS
}
