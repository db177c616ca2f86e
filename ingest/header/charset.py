"""Text by SpecificCharacterSet (PS3.3 C.12.1.1.2, PS3.5 6.1): what pydicom reads, but never raising."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from pydicom.charset import CODES_TO_ENCODINGS, convert_encodings, default_encoding, handled_encodings

_ESC: Final = b"\x1b"
_FRAGMENTS: Final = re.compile(rb"^[^\x1b]+|\x1b[^\x1b]*")
_DELIMITER: Final = re.compile(rb"[\\\r\n\t\f]")  # after these the first character set holds again (PS3.5 6.1.2.5.3)


@dataclass(frozen=True, slots=True)
class Charset:
    """The Python codecs of a SpecificCharacterSet, the first one in force at the beginning of a value.

    ``problem`` says what was wrong with the element, "" where nothing was.
    """

    encodings: tuple[str, ...] = (default_encoding,)
    problem: str = ""


DEFAULT: Final = Charset()


@lru_cache(maxsize=256)
def charset_of(value: bytes) -> Charset:
    """The character sets that the value of (0008,0005) names; unknown names fall back to ISO 8859-1 or a likely one."""
    terms = [term.strip(" \0") for term in value.decode("latin-1").rstrip(" \0").split("\\")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            encodings = convert_encodings(list(terms))
        except (LookupError, ValueError) as error:
            return Charset(problem=f"cannot be used ({type(error).__name__})")
    usable = tuple(encoding for encoding in encodings if _exists(encoding)) or (default_encoding,)
    unusual = bool(caught) or len(usable) < len(encodings)
    return Charset(usable, f"unknown or misspelt, read as {', '.join(usable)}" if unusual else "")


def _exists(encoding: str) -> bool:
    try:
        b"".decode(encoding)
    except LookupError:
        return False
    return True


def decode(value: bytes, charset: Charset) -> tuple[str, bool]:
    """The text of `value`, and whether every byte of it had a meaning (others become U+FFFD)."""
    first = charset.encodings[0]
    if _ESC not in value:
        return _plain(value, first)
    parts = [_fragment(fragment, charset.encodings) for fragment in _FRAGMENTS.findall(value)]
    return "".join(text for text, _ in parts), all(clean for _, clean in parts)


def _plain(value: bytes, encoding: str) -> tuple[str, bool]:
    try:
        return value.decode(encoding), True
    except UnicodeError:
        return value.decode(encoding, "replace"), False


def _fragment(fragment: bytes, encodings: tuple[str, ...]) -> tuple[str, bool]:
    """The text of a part without escape sequence, or of an escape sequence and what follows it."""
    first = encodings[0]
    if not fragment.startswith(_ESC):
        return _plain(fragment, first)
    length = 4 if fragment.startswith((b"\x1b$(", b"\x1b$)")) else 3
    encoding = CODES_TO_ENCODINGS.get(fragment[:length], "")
    if encoding not in encodings and encoding != default_encoding:
        return fragment.decode(first, "replace"), False
    try:
        if encoding in handled_encodings:  # the codec wants the escape sequence itself
            return fragment.decode(encoding), True
        rest = fragment[length:]
        reset = _DELIMITER.search(rest)
        cut = reset.start() if reset else len(rest)
        return rest[:cut].decode(encoding) + rest[cut:].decode(first), True
    except UnicodeError:
        return fragment.decode(first, "replace"), False
