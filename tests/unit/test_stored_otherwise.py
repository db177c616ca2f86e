"""Attributes that are stored with another VR than PS3.6 gives them, private ones, and keys that do not say a VR: every
door gives one answer, and no data set takes it from the others."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from sphere.catalog.queries import Queries, open_queries
from sphere.catalog.query import Features, Query
from sphere.catalog.schema import Level
from sphere.conf.errors import QueryError
from sphere.ingest.header.charset import charset_of, decode
from sphere.scp.answers import AnswerEncoder
from sphere.scp.find import PENDING, FindRequest, FindService
from sphere.scp.identifier import build_identifier
from sphere.scp.web.dicom_json import as_object
from sphere.scp.web.search_request import parse_search
from tests.support.examples import examples
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices

pytestmark = pytest.mark.unit

VALUES: dict[str, bytes] = {
    "AE": b"STATION ", "AS": b"030Y", "AT": struct.pack("<HH", 0x28, 0x10), "CS": b"CODE", "DA": b"20240102",
    "DS": b"0.5 ", "DT": b"20240102", "FD": struct.pack("<d", 0.5), "FL": struct.pack("<f", 0.5), "IS": b"35",
    "LO": b"Smith^J ", "LT": b"text", "OB": b"\1\2", "OW": b"\1\2", "OF": struct.pack("<f", 0.5), "PN": b"Smith^J ",
    "SH": b"0.5 ", "SL": struct.pack("<l", -2), "SS": struct.pack("<h", -2000), "ST": b"35",
    "SV": struct.pack("<q", -2), "TM": b"1030", "UC": b"Smith",
    "UI": b"1.2\0", "UL": struct.pack("<L", 35), "UN": b"35", "UR": b"a:b ",
    "US": struct.pack("<H", 35), "UT": b"Smith^J ", "UV": struct.pack("<Q", 35),
    "SQ": b"\xfe\xff\x00\xe0\x0e\x00\x00\x00\x08\x00\x00\x01SH\x06\x00CODE  ",
}  # fmt: skip
"""A value of each VR."""
KINDS = {  # an attribute of each VR of PS3.6, with and without a column
    "AE": "ScheduledStationAETitle", "AS": "PatientAge", "AT": "FrameIncrementPointer", "CS": "Modality",
    "DA": "StudyDate", "DS": "SliceThickness", "DT": "AcquisitionDateTime", "FD": "RealWorldValueSlope",
    "FL": "TableSpeed", "IS": "SeriesNumber", "LO": "PatientID", "LT": "ImageComments", "PN": "PatientName",
    "SH": "AccessionNumber", "SL": "DisplayedAreaTopLeftHandCorner", "SS": "TagAngleSecondAxis",
    "ST": "DerivationDescription", "TM": "StudyTime", "UC": "LongCodeValue", "UI": "FrameOfReferenceUID",
    "UL": "SelectorULValue", "UR": "URNCodeValue", "US": "Rows", "US or SS": "PixelPaddingValue", "UT": "TextValue",
    "SQ": "ProcedureCodeSequence", "LO of no column": "CurrentPatientLocation", "PN of no column": "PersonName",
    "PN in a sequence": "VerifyingObserverName", "DA of no column": "AdmittingDate",
    "DS of no column": "DoseGridScaling", "US of no column": "SelectorUSValue", "AT of no column": "SelectorATValue",
}  # fmt: skip
LONG = ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
GROUP, CREATOR, UNKNOWN = 0x01F1, "ELSCINT1", "NOBODY KNOWS"
BY_NUMBER = {0x26: "DS", 0x54: "IS"}  # of ELSCINT1; the dictionary says FD of the first
PRIVATE = [vr for vr in VALUES if vr not in ("SQ", "OB", "OW", "OF", "AT")]


def element(tag: int, vr: str, value: bytes) -> bytes:
    """In explicit VR little endian; implicit with vr ""."""
    value += b"\0" * (len(value) % 2)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if not vr:
        return head + struct.pack("<L", len(value)) + value
    form = "2xL" if vr in LONG else "H"
    return head + vr.encode() + struct.pack("<" + form, len(value)) + value


def item(content: bytes) -> bytes:
    return struct.pack("<HHL", 0xFFFE, 0xE000, len(content)) + content


def tag_of(keyword: str) -> int:
    return pydicom.datadict.tag_for_keyword(keyword) or 0


OBSERVER = tag_of("VerifyingObserverSequence")


def stored(number: int, more: dict[int, tuple[str, bytes]]) -> bytes:
    """A file of its own study, with some elements instead of those it has."""
    dataset = pydicom.dcmread(io.BytesIO(slices(1, seed=900 + number, study=900 + number)[0]))
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = (f"8.{number}.{n}" for n in (1, 2, 3))
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for keyword in (*KINDS.values(), "PixelData"):
        if keyword in dataset and keyword not in ("Rows", "Modality"):
            del dataset[keyword]
    for tag in more:
        if tag in dataset:
            del dataset[tag]
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    whole = buffer.getvalue()
    head = whole.index(struct.pack("<HH", 8, 0x16) + b"UI")  # SOPClassUID: all that comes before has a lower tag
    start = whole.index(struct.pack("<HH", 8, 5) + b"CS") if struct.pack("<HH", 8, 5) + b"CS" in whole[:head] else head
    parts = {int(one.tag): one for one in dataset if one.tag.group > 2}
    made = {tag: element(tag, vr, value) for tag, (vr, value) in more.items()}
    body = b"".join(made[tag] if tag in made else _plain(parts[tag]) for tag in sorted({*parts, *made}))
    return whole[:start] + body


def _plain(one: Any) -> bytes:
    buffer = io.BytesIO()
    alone = Dataset()
    alone.add(one)
    pydicom.dcmwrite(buffer, alone, implicit_vr=False, little_endian=True)
    return buffer.getvalue()


def files() -> Iterator[bytes]:
    number = 0
    for vr, value in VALUES.items():
        number += 1
        names = [name for name in KINDS.values() if name != "VerifyingObserverName"]
        if vr in ("SQ", "UN"):
            names.remove("Modality")
        inner = element(tag_of("VerifyingObserverName"), vr, value)
        yield stored(number, {**{tag_of(name): (vr, value) for name in names}, OBSERVER: ("SQ", item(inner))})
    for vr in PRIVATE:
        number += 1
        blocks = {GROUP << 16 | 0x10: ("LO", CREATOR.encode()), GROUP << 16 | 0x11: ("LO", UNKNOWN.encode())}
        known = {GROUP << 16 | 0x1000 | byte: (vr, VALUES[vr]) for byte in BY_NUMBER}
        yield stored(number, {**blocks, **known, GROUP << 16 | 0x1101: (vr, VALUES[vr])})


class Doors:
    """The archive before and after extraction."""

    def __init__(self, several: dict[str, Queries]) -> None:
        self.several = several


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    made = list(files())
    bases = [archive(tmp_path_factory.mktemp(name)) for name in ("recent", "extracted")]
    for base in bases:
        land(base, [new_member(data, second=number) for number, data in enumerate(made)])
    extract(bases[1])
    catalog = bases[0].catalog.model_copy(update={"mode": "files", "scan_workers": 0})
    without = bases[0].model_copy(update={"catalog": catalog})
    with open_queries(bases[0]) as recent, open_queries(bases[1]) as tables, open_queries(without) as bundles:
        yield Doors({"extracted": tables, "recent": recent, "files": bundles})


def ask(queries: Queries, query: Query) -> list[str]:
    """The studies of all matches, each of them encoded in all ways."""
    found = []
    for match in queries.find(query):
        for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
            AnswerEncoder(syntax).encode(match)
        as_object(match)
        found.append(str(match.identifier().StudyInstanceUID))
    return sorted(found)


def by_find(queries: Queries, level: Level, keys: bytes, *, explicit: bool) -> list[str]:
    """C-FIND of some keys, as bytes; relational."""
    syntax = ExplicitVRLittleEndian if explicit else ImplicitVRLittleEndian
    request = FindRequest(
        model="STUDY_ROOT", identifier=keys, transfer_syntax=syntax, features=Features(relational=True)
    )  # fmt: skip
    answers = list(FindService(queries).answers(request, cancelled=lambda: False))
    assert all(one.status == PENDING for one in answers), (hex(answers[-1].status), answers[-1].comment)
    return sorted(str(one.identifier.StudyInstanceUID) for one in answers if one.identifier is not None)


def identifier(level: str, keys: dict[int, tuple[str, bytes]], *, explicit: bool) -> bytes:
    whole: dict[int, tuple[str, bytes]] = {0x00080052: ("CS", level.encode()), 0x0020000D: ("UI", b""), **keys}
    if level == "IMAGE":
        whole.setdefault(0x00080018, ("UI", b""))
    return b"".join(element(tag, vr if explicit else "", value) for tag, (vr, value) in sorted(whole.items()))


LEVELS: list[Level] = ["STUDY", "IMAGE"]
TEXTS = ["Smith*", "35", "0.5", "-2000", "20240102", "1.2", "?*"]


@pytest.mark.parametrize("vr", KINDS)
def test_no_vr_takes_answers_from_other_data_sets(doors: Doors, vr: str) -> None:
    """An attribute of this VR stored with every other: each door answers, and all answer alike."""
    keyword, asked = KINDS[vr], 0
    for level in LEVELS:
        for text in TEXTS:
            match: Any = {keyword: text}
            if vr == "SQ":
                match = {keyword: {"CodeValue": text}}
            elif keyword == "VerifyingObserverName":
                match = {"VerifyingObserverSequence": {keyword: text}}
            try:
                query = Query.build(level, match, return_keys=("StudyInstanceUID",), empty_values=True)
            except QueryError:
                continue
            asked += 1
            answers = {name: ask(queries, query) for name, queries in doors.several.items()}
            assert answers["recent"] == answers["files"] == answers["extracted"], (level, text)
    assert asked >= 2


def test_what_is_stored_as_text_is_found_by_its_name(doors: Doors) -> None:
    """VerifyingObserverName as LO, PN and UT; PatientName as anything that is text."""
    query = Query.build("STUDY", {"VerifyingObserverSequence": {"VerifyingObserverName": "smith*"}})
    for queries in doors.several.values():
        assert len(ask(queries, query)) == len([one for one in VALUES.values() if one.startswith(b"Smith")])


def test_whole_sequences_are_returned_without_what_is_wrong_in_them(doors: Doors) -> None:
    query = Query.build("STUDY", {}, return_keys=("StudyInstanceUID", "VerifyingObserverSequence", *KINDS.values()))
    for queries in doors.several.values():
        found = list(queries.find(query))
        assert len(ask(queries, query)) == len(VALUES) + len(PRIVATE)
        full = [one.identifier().get("VerifyingObserverSequence") for one in found]
        assert sum(bool(one) for one in full) == len(VALUES)


def holders(vrs: Callable[[str], bool]) -> list[str]:
    first = len(VALUES) + 1
    return sorted(f"8.{first + number}.1" for number, vr in enumerate(PRIVATE) if vrs(vr))


KEYS: list[tuple[str, str, bytes, tuple[str, ...]]] = [
    ("DS", "0.5", b"0.5 ", ("DS", "FD", "FL", "SH")),
    ("DS", "0.999", b"0.999 ", ()),
    ("IS", "35", b"35", ("IS", "ST", "UN", "US", "UL", "UV")),
    ("LO", "Smith^J", b"Smith^J ", ("LO", "PN", "UT")),
    ("PN", "Smith^J", b"Smith^J ", ("LO", "PN", "UT")),
    ("LO", "Sm*", b"Sm* ", ("LO", "PN", "UC", "UT")),
    ("DA", "20240101-", b"20240101- ", ("DA", "DT")),
    ("UI", "1.2", b"1.2\0", ("UI",)),
    ("US", "35", struct.pack("<H", 35), ("IS", "ST", "UN", "US", "UL", "UV")),
    ("SS", "-2000", struct.pack("<h", -2000), ("SS", "TM")),
    ("SL", "-2", struct.pack("<l", -2), ("SL", "SV")),
    ("FD", "0.5", struct.pack("<d", 0.5), ("DS", "FD", "FL", "SH")),
    ("FD", "0.25", struct.pack("<d", 0.25), ()),
]
"""A VR, a text and its bytes, and with which VRs the private attribute is stored that they find."""


@pytest.mark.parametrize(("vr", "text", "raw", "finds"), KEYS, ids=[f"{vr} {text}" for vr, text, _, _ in KEYS])
@pytest.mark.parametrize("creator", [CREATOR, UNKNOWN])
def test_private_keys_mean_what_is_stored(
    doors: Doors, vr: str, text: str, raw: bytes, finds: tuple[str, ...], creator: str
) -> None:
    """By explicit, by implicit VR and by a URL; dictionaries have no say in it."""
    tag = GROUP << 16 | (0x1026 if creator == CREATOR else 0x1001)
    keys = {GROUP << 16 | 0x10: ("LO", creator.encode()), tag: (vr, raw)}
    number = vr in ("US", "SS", "SL", "FD")
    by_explicit = set(finds) - ({"UN", "TM"} if number else set())  # a UN is compared by its bytes
    # Bytes are those of a number where one is stored, and of the text elsewhere.
    by_implicit = (
        {one for one in finds if VALUES[one] == raw} if number else set(finds) - {"US", "UL", "UV", "FD", "FL"}
    )
    url = [(f"{GROUP:04X}{0x1026 if creator == CREATOR else 0x1101:04X}", text)]
    for name, queries in doors.several.items():
        for level in LEVELS:
            explicit = by_find(queries, level, identifier(level, keys, explicit=True), explicit=True)
            implicit = by_find(queries, level, identifier(level, keys, explicit=False), explicit=False)
            built = ask(queries, Query.build(level, {f"{tag:08X},{creator}": text}, return_keys=("StudyInstanceUID",)))
            expected = holders(lambda one: one in finds)
            assert built == expected, (name, level, "built")
            assert explicit == holders(lambda one: one in by_explicit), (name, level, "explicit")
            assert implicit == holders(lambda one: one in by_implicit), (name, level, "implicit")
        by_url = ask(queries, parse_search(url, "IMAGE", {}).query)
        assert by_url == expected, (name, "QIDO-RS")


@given(raw=st.binary(min_size=1, max_size=12))
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_can_be_a_private_key_in_implicit_vr(doors: Doors, raw: bytes) -> None:
    """Never an internal error; and everything only for what is a universal text: escape sequences alone are none."""
    keys = {GROUP << 16 | 0x10: ("LO", CREATOR.encode()), GROUP << 16 | 0x1026: ("", raw)}
    answers = [
        by_find(queries, "IMAGE", identifier("IMAGE", keys, explicit=False), explicit=False)
        for queries in doors.several.values()
    ]
    assert answers[0] == answers[1] == answers[2]
    text, _ = decode(raw, charset_of(b""))
    assert not set(text) - set(" \0*") or len(answers[0]) < len(PRIVATE)


def test_a_number_of_zero_bytes_is_no_universal_key(doors: Doors) -> None:
    keys = {GROUP << 16 | 0x10: ("LO", CREATOR.encode()), GROUP << 16 | 0x1026: ("", b"\0\0")}
    for queries in doors.several.values():
        found = by_find(queries, "IMAGE", identifier("IMAGE", keys, explicit=False), explicit=False)
        assert not set(found) & set(holders(lambda vr: vr in ("US", "SS", "UL", "SL", "FD", "FL", "SV", "UV")))


def test_zero_is_a_value(tmp_path: Path) -> None:
    """Of a private attribute, at every level, and in implicit VR not that of what is absent."""
    settings, tag = archive(tmp_path), GROUP << 16 | 0x1001
    creator = {GROUP << 16 | 0x10: ("LO", CREATOR.encode())}
    for number, value in enumerate([b"\0\0", b"\7\0", b""]):
        land(settings, [new_member(stored(number, {**creator, **({tag: ("US", value)} if value else {})}))])
    extract(settings)
    files = settings.catalog.model_copy(update={"mode": "files", "scan_workers": 0})
    for one in (settings, settings.model_copy(update={"catalog": files})):
        with open_queries(one) as queries:
            for level in LEVELS:
                query = Query.build(level, {f"{tag:08X},{CREATOR}": "0"}, return_keys=("StudyInstanceUID",))
                assert ask(queries, query) == ["8.0.1"], level
                keys = {GROUP << 16 | 0x10: ("LO", CREATOR.encode()), tag: ("US", b"\0\0")}
                for explicit in (True, False):
                    found = by_find(queries, level, identifier(level, keys, explicit=explicit), explicit=explicit)
                    assert found == ["8.0.1"], (level, explicit)


PADDING = 0x00280120


def test_us_or_ss_is_what_the_identifier_says(doors: Doors) -> None:
    """-2000 is stored as SS; the same bytes are 63536 as US, which nothing has."""
    raw = struct.pack("<h", -2000)
    several: list[tuple[str, bytes, bool, bool]] = [
        ("SS", raw, True, True), ("US", raw, True, False), ("", raw, False, True), ("US", b"#\0", True, False),
    ]  # fmt: skip
    for name, queries in doors.several.items():
        by_url = ask(queries, parse_search([("PixelPaddingValue", "-2000")], "IMAGE", {}).query)
        assert by_url and not ask(queries, parse_search([("PixelPaddingValue", "63536")], "IMAGE", {}).query)
        for vr, value, explicit, finds in several:
            keys = identifier("IMAGE", {PADDING: (vr, value)}, explicit=explicit)
            found = by_find(queries, "IMAGE", keys, explicit=explicit)
            assert (found == by_url) == finds, (name, vr, value)


def test_the_client_writes_a_number_with_its_sign() -> None:
    assert build_identifier({"PixelPaddingValue": "-2000"}, "IMAGE")[PADDING].VR == "SS"
    assert build_identifier({"PixelPaddingValue": "63536"}, "IMAGE")[PADDING].VR == "US"
    assert build_identifier({"PixelPaddingValue": ""}, "IMAGE")[PADDING].VR == "US"
    for value in ("-40000", "70000"):
        with pytest.raises(QueryError, match="too large"):
            build_identifier({"PixelPaddingValue": value}, "IMAGE")
