"""Every defined term of PS3.3 C.12.1.1.2, and the examples of PS3.5 Annexes H to K, byte by byte.

They are held to the standard: pydicom leaves the escape sequences of ISO 2022 IR 58 in its text, reads ISO_IR 203 as
Latin-1, and goes on after a delimiter with the set of the last escape sequence.
"""

from __future__ import annotations

from io import BytesIO

import orjson
import pytest
from pydicom.filereader import read_dataset

from sphere.catalog.identifier import elements, plain_elements
from sphere.ingest.header.charset import charset_of, decode
from tests.support.headers import element, header, instance, item, sequence

pytestmark = pytest.mark.unit

SINGLE = {  # ISO-IR number: (escape sequence to G1, text, its bytes)
    100: (b"\x1b-A", "Buc^Jérôme", b"Buc^J\xe9r\xf4me"),  # PS3.5 H.1 and Tables C.12-2, C.12-3 of PS3.3
    101: (b"\x1b-B", "Wałęsa^Łukasz", b"Wa\xb3\xeasa^\xa3ukasz"),
    109: (b"\x1b-C", "Ħal^Ġorġ", b"\xa1al^\xd5or\xf5"),
    110: (b"\x1b-D", "Bērziņš^Ģ", b"B\xbarzi\xf1\xb9^\xab"),
    126: (b"\x1b-F", "Διονυσιος", b"\xc4\xe9\xef\xed\xf5\xf3\xe9\xef\xf2"),
    127: (b"\x1b-G", "قباني^لنزار", b"\xe2\xc8\xc7\xe6\xea^\xe4\xe6\xd2\xc7\xd1"),
    138: (b"\x1b-H", "שרון^דבורה", b"\xf9\xf8\xe5\xef^\xe3\xe1\xe5\xf8\xe4"),
    144: (b"\x1b-L", "Люк^Иван", b"\xbb\xee\xda^\xb8\xd2\xd0\xdd"),
    148: (b"\x1b-M", "Çavuşoğlu^Işık", b"\xc7avu\xfeo\xf0lu^I\xfe\xfdk"),
    166: (b"\x1b-T", "สมชาย", b"\xca\xc1\xaa\xd2\xc2"),
    203: (b"\x1b-b", "Œuvre^€Žž", b"\xbcuvre^\xa4\xb4\xb8"),
    13: (b"\x1b)I", "ﾔﾏﾀﾞ^ﾀﾛｳ", b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3"),
}
NAMES = [  # SpecificCharacterSet, the bytes of a name, the name
    *((f"ISO_IR {number}", raw, text) for number, (_, text, raw) in SINGLE.items()),
    *((f"ISO 2022 IR {number}", raw, text) for number, (_, text, raw) in SINGLE.items()),
    ("", b"Yamada^Tarou", "Yamada^Tarou"),
    ("ISO_IR 6", b"Yamada^Tarou", "Yamada^Tarou"),
    ("ISO 2022 IR 6", b"Yamada^Tarou", "Yamada^Tarou"),
    ("\\ISO 2022 IR 87",  # H.3.1
     b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
     "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    ("ISO 2022 IR 6\\ISO 2022 IR 87",
     b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "Yamada^Tarou=山田^太郎"),
    ("ISO 2022 IR 13\\ISO 2022 IR 87",  # H.3.2
     b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J",
     "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"),
    ("\\ISO 2022 IR 87\\ISO 2022 IR 13",  # H.3.2 with katakana as an extension
     b"\x1b)I\xd4\xcf\xc0\xde^\x1b)I\xc0\xdb\xb3=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎"),
    ("\\ISO 2022 IR 159", b"A=\x1b$(D\x2b\x2e\x1b(B", "A=ç"),
    ("\\ISO 2022 IR 87\\ISO 2022 IR 159", b"\x1b$B;3\x1b$(D0!\x1b$BED\x1b(B^A", "山丂田^A"),
    ("\\ISO 2022 IR 149",  # I.2
     b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
     "Hong^Gildong=洪^吉洞=홍^길동"),
    ("ISO_IR 192", b"Wang^XiaoDong=\xe7\x8e\x8b^\xe5\xb0\x8f\xe6\x9d\xb1", "Wang^XiaoDong=王^小東"),  # J.1
    ("GB18030", b"Wang^XiaoDong=\xcd\xf5^\xd0\xa1\xb6\xab", "Wang^XiaoDong=王^小东"),  # J.3
    ("GBK", b"Wang^XiaoDong=\xcd\xf5^\xd0\xa1\xb6\xab", "Wang^XiaoDong=王^小东"),
    ("GB18030", b"\xd5^=\xd5\\^A", "誢=誠^A"),  # second bytes that are ^ and a backslash
    ("\\ISO 2022 IR 58",  # K.2
     b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab", "Zhang^XiaoDong=张^小东"),
]  # fmt: skip
LINES = [  # of LT
    ("\\ISO 2022 IR 149",  # I.3
     b"\x1b$)CThe 1st line includes \xb1\xe6\xb5\xbf.\r\n\x1b$)CThe 2nd line includes \xb1\xe6\xb5\xbf, too.\r\n"
     b"The 3rd line.",
     "The 1st line includes 길동.\r\nThe 2nd line includes 길동, too.\r\nThe 3rd line."),
    ("ISO_IR 192",  # J.2
     b"The first line includes \xe4\xb8\xad\xe6\x96\x87.\r\nThe second line includes \xe4\xb8\xad\xe6\x96\x87, too.\r\n"
     b"The third line.",
     "The first line includes 中文.\r\nThe second line includes 中文, too.\r\nThe third line."),
    ("GB18030",  # J.4
     b"The first line includes \xd6\xd0\xce\xc4.\r\nThe second line includes \xd6\xd0\xce\xc4, too.\r\nThe third line.",
     "The first line includes 中文.\r\nThe second line includes 中文, too.\r\nThe third line."),
    ("\\ISO 2022 IR 58",  # K.3
     b"\x1b$)A1.\xb5\xda\xd2\xbb\xd0\xd0\xce\xc4\xd7\xd6\xa1\xa3\r\n\x1b$)A2.\xb5\xda\xb6\xfe\xd0\xd0\xce\xc4\xd7\xd6\xa1\xa3\r\n"
     b"\x1b$)A3.\xb5\xda\xc8\xfd\xd0\xd0\xce\xc4\xd7\xd6\xa1\xa3\r\n",
     "1.第一行文字。\r\n2.第二行文字。\r\n3.第三行文字。\r\n"),
]  # fmt: skip
LATIN_GREEK = "ISO 2022 IR 100\\ISO 2022 IR 126"


@pytest.mark.parametrize(("charset", "raw", "name"), NAMES)
def test_a_name_is_read_alike_where_it_is_stored_and_where_it_is_asked(charset: str, raw: bytes, name: str) -> None:
    assert charset_of(charset.encode()).problem == ""
    assert decode(raw, charset_of(charset.encode()), "PN") == (name, True)
    found = header(instance(*data_set(charset, raw)))
    assert [one for one in found.warnings if "PatientName" in one] == []
    assert found.values["PatientName"] == name
    groups = ("Alphabetic", "Ideographic", "Phonetic")
    assert orjson.loads(found.dataset)["00100010"]["Value"] == [dict(zip(groups, name.split("="), strict=False))]
    assert asked(charset, raw) == [name] * 3


def data_set(charset: str, raw: bytes) -> tuple[bytes, ...]:
    term = charset.encode()
    return (
        element("SpecificCharacterSet", "CS", term + b" " * (len(term) % 2)),
        element("PatientName", "PN", raw + b" " * (len(raw) % 2)),
    )


def asked(charset: str, raw: bytes) -> list[str]:
    """The name as the readers of identifiers have it: as a plain element, in a data set, in an item."""
    plain = plain_elements(b"".join(data_set(charset, raw)), explicit=True)
    whole = read_dataset(BytesIO(b"".join(data_set(charset, raw))), is_implicit_VR=False, is_little_endian=True)
    inner = sequence("ReferencedPatientSequence", item(data_set(charset, raw)[1]))
    within = read_dataset(BytesIO(data_set(charset, raw)[0] + inner), is_implicit_VR=False, is_little_endian=True)
    assert plain is not None
    items = elements(within)[-1].items
    assert items is not None
    return [one.text.rstrip(" ") for one in (plain[-1], elements(whole)[-1], items[0][0])]


@pytest.mark.parametrize(("charset", "raw", "text"), LINES)
def test_text_of_several_lines(charset: str, raw: bytes, text: str) -> None:
    assert decode(raw, charset_of(charset.encode()), "LT") == (text, True)


@pytest.mark.parametrize("number", SINGLE)
def test_a_set_of_one_byte_as_an_extension(number: int) -> None:
    """Invoked anew in each component, as PS3.5 6.1.2.5.3 has it."""
    escape, text, raw = SINGLE[number]
    value = b"=".join((b"A", b"^".join(escape + part for part in raw.split(b"^"))))
    for first in ("", "ISO 2022 IR 6", "ISO 2022 IR 100"):
        assert decode(value, charset_of(f"{first}\\ISO 2022 IR {number}".encode()), "PN") == (f"A={text}", True)


@pytest.mark.parametrize(
    ("vr", "raw", "text"),
    [
        ("PN", b"\x1b-F\xc4\xe9\xef^M\xfcller", "Διο^Müller"),
        ("PN", b"\x1b-F\xc4\xe9\xef=M\xfcller", "Διο=Müller"),
        ("PN", b"\x1b-F\xc4\xe9\xef\\M\xfcller", "Διο\\Müller"),
        ("LO", b"\x1b-F\xc4\xe9\xef\\M\xfcller", "Διο\\Müller"),
        ("SH", b"\x1b-F\xc4\xe9\xef\\M\xfcller", "Διο\\Müller"),
        ("UC", b"\x1b-F\xc4\xe9\xef\\M\xfcller", "Διο\\Müller"),
        ("LO", b"\x1b-F\xc4^\xe9=\xef", "Δ^ι=ο"),  # which delimit nothing but names
        ("LT", b"\x1b-F\xc4\\\xe9\xef", "Δ\\ιο"),  # nor does a backslash where there is one value
        ("ST", b"\x1b-F\xc4\\\xe9\xef", "Δ\\ιο"),
        ("UT", b"\x1b-F\xc4\\\xe9\xef", "Δ\\ιο"),
        *(("LT", b"\x1b-F\xc4%c\xfc" % control, f"Δ{control:c}ü") for control in b"\r\n\f\t"),
        ("LO", b"\x1b-F\xc4 \xe9", "Δ ι"),
        ("LO", b"\x1b-F\xc4\x1b-A\xe9", "Δé"),
    ],
)
def test_where_the_first_set_holds_again(vr: str, raw: bytes, text: str) -> None:
    assert decode(raw, charset_of(LATIN_GREEK.encode()), vr) == (text, True)


@pytest.mark.parametrize(
    ("charset", "raw", "text"),
    [
        ("\\ISO 2022 IR 87", b"\x1b$B=P\x1b(B^A", "出^A"),  # = as the first byte of two
        ("\\ISO 2022 IR 87", b"\x1b$B0^0\\0=\x1b(B=A", "緯移綾=A"),  # ^ \ = as the second
        ("\\ISO 2022 IR 87", b"\x1b$B;3ED\r\nABC", "山田\r\nABC"),
        ("\\ISO 2022 IR 87", b"\x1b$B;3 ED\x1b(J", "山 田"),
    ],
)
def test_bytes_of_characters_are_no_delimiters(charset: str, raw: bytes, text: str) -> None:
    assert decode(raw, charset_of(charset.encode()), "PN") == (text, True)


@pytest.mark.parametrize(
    ("charset", "raw", "text"),
    [
        ("\\ISO 2022 IR 87", b"\x1b$B;3E", "山\ufffd"),
        ("\\ISO 2022 IR 87", b"\x1b$B;3=\x1b$BED", "山=田"),  # not switched back before the delimiter
        ("\\ISO 2022 IR 87", b"\x1b$B;3\\\x1b$BED", "山\\田"),
        ("\\ISO 2022 IR 58", b"\x1b$)A\xd5", "\ufffd"),
        ("\\ISO 2022 IR 58", b"\x1b$)C\xd5\xc5", "\x1b$)CÕÅ"),  # not named
        ("ISO_IR 100", b"\x1b", "\x1b"),
        ("ISO_IR 100", b"A\x1b%Gx", "A\x1b%Gx"),
    ],
)
def test_what_breaks_the_rules_is_told(charset: str, raw: bytes, text: str) -> None:
    found, clean = decode(raw, charset_of(charset.encode()), "PN")
    assert (found, clean) == (text, False)


def test_any_bytes_are_text() -> None:
    for charset in ("\\ISO 2022 IR 87\\ISO 2022 IR 58", "ISO 2022 IR 13\\ISO 2022 IR 159\\ISO 2022 IR 149", "GBK"):
        for first in range(256):
            for lead in (b"\x1b$B", b"\x1b$(D", b"\x1b$)A", b"\x1b", b"\x1b$B;3="):
                for vr in ("PN", "LT"):
                    decode(lead + bytes((first, 0x5C, first, 0x21, 0xA1)), charset_of(charset.encode()), vr)


@pytest.mark.parametrize(
    ("raw", "text", "clean"),
    [
        (bytes(range(0xA1, 0xE0)), "".join(map(chr, range(0xFF61, 0xFFA0))), True),
        (bytes(range(0x20, 0x7F)), bytes(range(0x20, 0x7F)).decode(), True),
        (b"\xd4\xcf\\\xc0\xde", "ﾔﾏ\\ﾀﾞ", True),
        (b"\x8e\x52\x93\x63", "山田", False),  # Shift-JIS, as some write under this term
        (b"\x81\x5c\x95\x5c\x5cX", "\ufffd\\\ufffd\\\\X", False),  # which must not take in a delimiter
        (b"\xe0\\\xd4", "\ufffd\\ﾔ", False),
        (b"A\x80\xa0\xff", "A\ufffd\ufffd\ufffd", False),
    ],
)
def test_jis_x_0201_has_one_byte_a_character(raw: bytes, text: str, clean: bool) -> None:
    for term in (b"ISO_IR 13", b"ISO 2022 IR 13\\ISO 2022 IR 87"):
        for vr in ("LO", "LT", "PN"):
            assert decode(raw, charset_of(term), vr) == (text, clean)
    found = header(instance(*data_set("ISO_IR 13", raw)))
    assert any("has bytes that are not jis_x_0201" in one for one in found.warnings) != clean


NO_TERMS = ["ISO 2022 IR 192", "ISO_IR 58", "ISO_IR 87", "ISO_IR 149", "ISO_IR 159", "ISO_IR 014", "ISO_IR 0100",
            "ISO 2022 IR 999", "ISO_IR 14"]  # fmt: skip


@pytest.mark.parametrize("term", NO_TERMS)
def test_terms_that_no_table_defines(term: str) -> None:
    """PS3.3 Tables C.12-2 to C.12-5: what they look like is read, and said."""
    assert "unknown or misspelt" in charset_of(term.encode()).problem
