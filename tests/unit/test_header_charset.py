"""Text in character sets of PS3.3 C.12.1.1.2: what pydicom reads, where that is what PS3.5 says."""

from __future__ import annotations

import io
import warnings

import orjson
import pytest
from pydicom import dcmread
from pydicom.charset import python_encoding

from sphere.ingest.header.charset import charset_of, decode
from tests.support.headers import element, header, instance, item, part10, sequence, text

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore")]

SAMPLES = {
    "": "Aneas^Rudiger",
    "ISO_IR 13": "ﾔﾏﾀﾞ^ﾀﾛｳ",
    "ISO_IR 100": "Äneas^Rüdiger",
    "ISO_IR 101": "Wałęsa^Łukasz",
    "ISO_IR 109": "Ġorġ^Ħal",
    "ISO_IR 110": "Ģirts^Ķ",
    "ISO_IR 126": "Διονυσιος",
    "ISO_IR 127": "قباني^لنزار",
    "ISO_IR 138": "שרון^דבורה",
    "ISO_IR 144": "Люкceмбypг",
    "ISO_IR 148": "Çavuşoğlu^İğne",
    "ISO_IR 166": "นามสกุล^ชื่อ",
    "ISO_IR 192": "Wang^XiaoDong=王^小東",
    "GB18030": "Wang^XiaoDong=王^小东",
    "GBK": "Wang^XiaoDong=王^小东",
    "ISO 2022 IR 100": "Buc^Jérôme",
}


def patient(charset: bytes, name: bytes) -> bytes:
    return instance(
        element("SpecificCharacterSet", "CS", charset + b" " * (len(charset) % 2)),
        element("PatientName", "PN", name + b" " * (len(name) % 2)),
        element("StudyDescription", "LO", name + b"\\" + name),
        element("PatientComments", "LT", b"1\r\n" + name + b"\\"),
    )


def pydicom_reads(data: bytes) -> tuple[str, list[str], str]:
    ds = dcmread(io.BytesIO(data))
    return str(ds.PatientName), list(ds.StudyDescription), ds.PatientComments


@pytest.mark.parametrize("charset", SAMPLES)
def test_single_character_sets(charset: str):
    name = SAMPLES[charset]
    data = patient(charset.encode(), name.encode(python_encoding[charset]))
    found = header(data)
    assert found.warnings == ["(0008,1030) StudyDescription: has 2 values where one is allowed, the first is taken"]
    assert found.values["PatientName"] == name
    assert found.values["StudyDescription"] == name
    assert (found.values["PatientName"], [name, name], f"1\r\n{name}\\") == pydicom_reads(data)
    json = orjson.loads(found.dataset)
    assert json["00081030"]["Value"] == [name, name]
    assert json["00104000"]["Value"] == [f"1\r\n{name}\\"]
    keys = ("Alphabetic", "Ideographic", "Phonetic")
    assert json["00100010"]["Value"] == [dict(zip(keys, name.split("="), strict=False))]


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        (b"\\ISO 2022 IR 87", b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B"),
        (b"ISO 2022 IR 13\\ISO 2022 IR 87", b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J"),
        (b"\\ISO 2022 IR 149", b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6"),
        (b"\\ISO 2022 IR 159", b"A=\x1b$(D\x2b\x2e\x1b(B"),
        (b"ISO 2022 IR 100\\ISO 2022 IR 126", b"J\xe9r\xf4me^\x1b-F\xc4\xe9\xef\x1b-A"),
        (b"ISO 2022 IR 6\\ISO 2022 IR 87", b"plain"),
        (b"ISO_IR 100", b"\x1b-F\xc4\xe9\xef"),  # an escape to a set that is not named
        (b"\\ISO 2022 IR 149", b"\x1b$)C\xfb\xf3\\\x1b$)C\xfb\xf3^abc"),
    ],
)
def test_code_extensions(charset: bytes, name: bytes):
    data = patient(charset, name)
    found = header(data)
    wanted = pydicom_reads(data)
    ds = dcmread(io.BytesIO(data))
    wanted_name = str(ds.PatientName[0]) if b"\\" in name else wanted[0]
    assert found.values["PatientName"] == wanted_name
    assert orjson.loads(found.dataset)["00081030"]["Value"] == wanted[1]
    assert found.values["PatientComments"] == wanted[2]


@pytest.mark.parametrize(
    ("charset", "raw", "wanted"),
    [
        (b"ISO-IR 100", b"J\xe9r\xf4me", "Jérôme"),
        (b"ISO 100", b"J\xe9r\xf4me", "Jérôme"),
        (b"WHATEVER", b"J\xe9r\xf4me", "Jérôme"),
        (b"\xff\xfe", b"J\xe9r\xf4me", "Jérôme"),
        (b"ISO_IR 192\\ISO 2022 IR 87", "Jérôme".encode(), "Jérôme"),
    ],
)
def test_wrong_character_sets_fall_back_with_a_warning(charset: bytes, raw: bytes, wanted: str):
    found = header(patient(charset, raw))
    assert found.values["PatientName"] == wanted
    assert any(text.startswith("(0008,0005) SpecificCharacterSet: ") for text in found.warnings)


def test_bytes_that_mean_nothing_become_replacement_characters():
    found = header(patient(b"ISO_IR 192", b"J\xe9r\xf4me"))
    assert found.values["PatientName"] == "J\ufffdr\ufffdme"
    assert "(0010,0010) PatientName: has bytes that are not UTF8" in found.warnings


def test_the_first_character_set_holds_again_after_a_backslash():
    """PS3.5 6.1.2.5.3; pydicom goes on with the set of the last escape sequence."""
    value = b"\x1b-F\xc4\xe9\xef\\J\xe9r\xf4me"
    charset = charset_of(b"ISO 2022 IR 100\\ISO 2022 IR 126")
    assert decode(value, charset) == ("Διο\\Jérôme", True)


def test_items_have_their_own_character_set_and_give_it_back():
    name = "王^小東"
    inner = item(text("SpecificCharacterSet", "CS", "ISO_IR 192"), element("PatientName", "PN", name.encode() + b" "))
    inherits = item(element("PatientName", "PN", "Jérô".encode("latin-1")))
    data = instance(
        text("SpecificCharacterSet", "CS", "ISO_IR 100"),
        sequence("ReferencedPatientSequence", inner, inherits),
        element("PatientName", "PN", "Jérô".encode("latin-1")),
    )
    found = header(data)
    items = orjson.loads(found.dataset)["00081120"]["Value"]
    assert [one["00100010"]["Value"][0]["Alphabetic"] for one in items] == [name, "Jérô"]
    assert found.values["PatientName"] == "Jérô"
    assert found.values["SpecificCharacterSet"] == ["ISO_IR 100"]


def test_a_reader_does_not_mix_character_sets():
    raw = b"\xc4\xe9\xef "
    for charset, wanted in (("ISO_IR 100", "Äéï"), ("ISO_IR 126", "Διο"), ("ISO_IR 144", "Фщя"), ("", "Äéï")):
        data = part10(text("SpecificCharacterSet", "CS", charset) + instance(element("PatientName", "PN", raw))[300:])
        assert decode(raw.rstrip(), charset_of(charset.encode())) == (wanted, True), data[:0]


def test_nothing_is_warned_aloud():
    charset_of.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(b"\xe4", charset_of(b"ISO-IR 100"))[0] == "ä"
        decode(b"\x1b%G\xff", charset_of(b"ISO_IR 192"))
