"""Text by SpecificCharacterSet (PS3.3 C.12.1.1.2), with code extensions (PS3.5 6.1.2.5), never raising.

One decoder for what is stored and for what is asked.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from typing import Final

from sphere.conf.memo import remembered

JIS_X_0201: Final = "jis_x_0201"  # no codec of Python's
DEFAULT_CODEC: Final = "iso8859"  # the default repertoire, and as Latin-1 what should not be in it
_SINGLE: Final = {  # by ISO-IR number (PS3.3 Tables C.12-2 to C.12-4): the codec of G1 with ASCII in G0
    6: DEFAULT_CODEC,
    13: JIS_X_0201,
    100: "latin_1",
    101: "iso8859_2",
    109: "iso8859_3",
    110: "iso8859_4",
    126: "iso8859_7",
    127: "iso8859_6",
    138: "iso8859_8",
    144: "iso8859_5",
    148: "iso8859_9",
    166: "iso8859_11",
    203: "iso8859_15",
}
_MULTI: Final = {58: "gb2312", 87: "iso2022_jp", 149: "euc_kr", 159: "iso2022_jp_2"}
_ALONE: Final = {"ISO_IR 192": "UTF8", "GB18030": "GB18030", "GBK": "GBK"}  # Table C.12-5: without code extensions
_CODECS: Final = {**_SINGLE, **_MULTI, 192: "UTF8"}
_TERMS: Final = frozenset(f"ISO_IR {number}" for number in _SINGLE) | {
    f"ISO 2022 IR {number}" for number in (*_SINGLE, *_MULTI)
}  # of two bytes there are none without code extensions (Table C.12-4), and UTF-8 has none (Table C.12-5)
_LIKELY: Final = re.compile(r"ISO[ _.-]*(?:2022)?[ _.-]*(?:IR)?[ _.-]*(\d+)", re.IGNORECASE)

_ROMAN: Final = (b"\x1b(B", b"\x1b(J")  # to ISO 646 and to its Japanese version in G0; they need not be named
_G0: Final = {b"\x1b$B": "iso2022_jp", b"\x1b$(D": "iso2022_jp_2"}  # two bytes a character, each 21 to 7E
_G1: Final = {
    b"\x1b-A": "latin_1",
    b"\x1b-B": "iso8859_2",
    b"\x1b-C": "iso8859_3",
    b"\x1b-D": "iso8859_4",
    b"\x1b-F": "iso8859_7",
    b"\x1b-G": "iso8859_6",
    b"\x1b-H": "iso8859_8",
    b"\x1b-L": "iso8859_5",
    b"\x1b-M": "iso8859_9",
    b"\x1b-T": "iso8859_11",
    b"\x1b-b": "iso8859_15",
    b"\x1b)I": JIS_X_0201,
    b"\x1b$)A": "gb2312",
    b"\x1b$)C": "euc_kr",
}
_TOKEN: Final = re.compile(rb"\x1b(?:\$[()]?|[()-])?[A-Za-z]|[\x00-\x1f]|[\x20-\xff]+")
_PIECE: Final = re.compile(rb"[\x21-\x7e]+|[\x20\x7f-\xff]+")
_DELIMITERS: Final = {vr: re.compile(rb"([\\^=])" if vr == "PN" else rb"(\\)") for vr in ("PN", "SH", "LO", "UC")}


@dataclass(frozen=True, slots=True)
class Charset:
    """The Python codecs of a SpecificCharacterSet, the first one in force at the beginning of a value.

    ``problem`` says what was wrong with the element, "" where nothing was.
    """

    encodings: tuple[str, ...] = (DEFAULT_CODEC,)
    problem: str = ""


DEFAULT: Final = Charset()


@remembered(256, longest=256)
def charset_of(value: bytes) -> Charset:
    """The character sets that the value of (0008,0005) names.

    What looks like a defined term is taken for it, and what does not for ISO 8859-1.
    """
    terms = [term.strip(" \0") for term in value.decode("latin-1").rstrip(" \0").split("\\")]
    found = [_codec(term) for term in terms]
    codecs = tuple(codec for codec, _ in found if codec) or (DEFAULT_CODEC,)
    unusual = not all(exact for _, exact in found)
    if len(codecs) > 1 and set(codecs) & set(_ALONE.values()):
        codecs, unusual = (codecs[:1] if codecs[0] in _ALONE.values() else _extensible(codecs)), True
    return Charset(codecs, f"unknown or misspelt, read as {', '.join(codecs)}" if unusual else "")


def _extensible(codecs: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(codec for codec in codecs if codec not in _ALONE.values())


def _codec(term: str) -> tuple[str, bool]:
    """The codec of a term, "" for none, and whether it is a defined one."""
    if term in _ALONE:
        return _ALONE[term], True
    if not term:
        return DEFAULT_CODEC, True
    if likely := _LIKELY.fullmatch(term):
        codec = _CODECS.get(int(likely[1][:4]), "")
        return codec, term in _TERMS
    return _ALONE.get(term.upper(), "UTF8" if re.fullmatch("utf-?8", term, re.IGNORECASE) else ""), False


def decode(value: bytes, charset: Charset, vr: str = "LO") -> tuple[str, bool]:
    """The text of `value`, and whether every byte of it had a meaning (others become U+FFFD).

    The set in force at the beginning holds again at each control character and delimiter: a backslash where the VR has
    several values, in PN `^` and `=` too (PS3.5 6.1.2.5.3).
    """
    if b"\x1b" not in value or charset.encodings[0] in _ALONE.values():
        return _plain(value, charset.encodings[0])
    return _Extended(charset.encodings, vr).decode(value)


def _plain(value: bytes, encoding: str) -> tuple[str, bool]:
    if encoding == JIS_X_0201:
        return _jis_x_0201(value)
    try:
        return value.decode(encoding), True
    except UnicodeError:
        return value.decode(encoding, "replace"), False


_KATAKANA: Final = "".join(map(chr, range(0xFF61, 0xFFA0)))  # A1 to DF
_NONE: Final = "\ufffe"  # what codecs take for a byte without a meaning
_CELLS: Final = bytes(range(0x80)).decode("ascii") + _NONE * 0x21 + _KATAKANA + _NONE * 0x20


def _jis_x_0201(value: bytes) -> tuple[str, bool]:
    """Romaji and katakana, a byte each (PS3.5 6.1.2.3); 5C and 7E as in ASCII, as 5C is the delimiter of values.

    Other bytes mean nothing there. Many who write them mean Shift-JIS, so that they are read as that, but for 5C, which
    a character of two bytes may end with there.
    """
    try:
        return codecs.charmap_decode(value, "strict", _CELLS)[0], True
    except UnicodeError:
        return "\\".join(part.decode("shift_jis", "replace") for part in value.split(b"\\")), False


class _Extended:
    """One value with escape sequences: G0 is ISO 646 or a set of two bytes, G1 of one byte or two (PS3.5 6.1.2.5.1)."""

    def __init__(self, encodings: tuple[str, ...], vr: str) -> None:
        self._encodings = encodings
        self._first = DEFAULT_CODEC if encodings[0] in _G0.values() else encodings[0]
        self._delimiter = _DELIMITERS.get(vr)
        self._clean = True
        self._reset()

    def decode(self, value: bytes) -> tuple[str, bool]:
        """The text, and whether every byte of it had a meaning."""
        return "".join(map(self._token, _TOKEN.findall(value))), self._clean

    def _reset(self) -> None:
        self._g0, self._g1 = "", self._first

    def _token(self, token: bytes) -> str:
        if token[0] == 0x1B:
            return self._escape(token)
        if token[0] < 0x20:
            self._reset()
            return chr(token[0])
        return "".join(map(self._piece, _PIECE.findall(token))) if self._g0 else self._one_byte(token)

    def _escape(self, sequence: bytes) -> str:
        """ "" for one that was followed; what is named nowhere is left as it stands."""
        if sequence in _ROMAN:
            self._g0 = ""
        elif _G0.get(sequence) in self._encodings:
            self._g0 = _G0[sequence]
        elif _G1.get(sequence) in self._encodings:
            self._g1 = _G1[sequence]
        else:
            self._clean = False
            return sequence.decode("ascii")
        return ""

    def _one_byte(self, token: bytes) -> str:
        parts = self._delimiter.split(token) if self._delimiter else (token,)
        return "".join(map(self._part, parts))

    def _part(self, part: bytes) -> str:
        """A delimiter, or what is between two."""
        if self._delimiter and self._delimiter.fullmatch(part):
            self._reset()
            return part.decode("ascii")
        return self._run(part)

    def _run(self, run: bytes) -> str:
        text, clean = _plain(run, self._g1)
        self._clean &= clean
        return text

    def _piece(self, piece: bytes) -> str:
        """While G0 has two bytes a character: pairs of 21 to 7E, or what stands for G1 and blanks."""
        if not self._g0:
            return self._one_byte(piece)
        if not 0x20 < piece[0] < 0x7F:
            return self._run(piece)
        pairs = len(piece) // 2 * 2
        escape = next(escape for escape, codec in _G0.items() if codec == self._g0)
        text, clean = _plain(escape + piece[:pairs], self._g0)
        rest = piece[pairs:]
        self._clean &= clean and not rest
        return text + self._half(rest)

    def _half(self, rest: bytes) -> str:
        """What is left of pairs: a delimiter before which nobody switched back, as some write, or nothing known."""
        if rest not in (b"\\", b"^", b"="):
            return "\ufffd" if rest else ""
        if self._delimiter and self._delimiter.fullmatch(rest):
            self._reset()
        return rest.decode("ascii")
