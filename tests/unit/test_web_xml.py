"""The Native DICOM Model (PS3.19 A.1), written and read: every element, the private ones with their creators."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from xml.etree import ElementTree

import orjson
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere.ingest.header import Header, HeaderReader
from sphere.scp.upper.dataset import Budget
from sphere.scp.web import native_xml_in
from sphere.scp.web.bulk_in import BulkParts, Unusable
from sphere.scp.web.incoming import ArrivingBody, ArrivingFile
from sphere.scp.web.metadata_in import Broken, Described
from sphere.scp.web.native_xml import native_model
from sphere.scp.web.native_xml_in import read_xml
from sphere.scp.web.problem import WebError
from tests.support.dicom_tools import run_tool
from tests.support.examples import examples
from tests.support.samples import sendable_files

pytestmark = pytest.mark.unit

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
NAME = "http://dicom.nema.org/PS3.19/models/NativeDICOM"
NUMBERS = ("DS", "IS", "FL", "FD", "US", "SS", "UL", "SL", "UV", "SV")


def header_of(path: Path) -> dict[str, Any] | None:
    """The header of a file as the catalog has it."""
    data = path.read_bytes()
    found = HeaderReader(max_header=64 << 20).read(data[:65536], size=len(data), fetch=lambda at, n: data[at : at + n])
    return dict(orjson.loads(found.dataset)) if isinstance(found, Header) else None


def plain(header: dict[str, Any]) -> dict[str, Any]:
    """What both forms can say: numbers by value, nothing of empty values at the end, and of XML what it forbids."""
    return {tag: _element(element) for tag, element in header.items()}


def _element(element: dict[str, Any]) -> dict[str, Any]:
    vr, values = element["vr"], element.get("Value") or []
    if vr == "SQ":
        values = [plain(item or {}) for item in values]
    elif vr == "PN":
        values = [
            {group: text.rstrip("^") for group, text in (one or {}).items() if text.rstrip("^")} for one in values
        ]
    elif vr in NUMBERS:
        values = [_number(one) for one in values]
    else:
        values = [one or "" for one in values]
    rest = {name: value for name, value in element.items() if name in ("BulkDataURI", "InlineBinary") and value}
    return {"vr": vr, "values": values, **rest}


def _number(value: Any) -> Any:
    """By its value, where it is a number: files have others."""
    try:
        return None if value in (None, "") else float(value)
    except ValueError:
        return value


def read(*attributes: str) -> dict[str, Any]:
    model = f'<NativeDicomModel xmlns="{NAME}">{"".join(attributes)}</NativeDicomModel>'
    [header] = read_xml(model.encode())
    return header


def test_xml_says_what_json_says_of_every_element() -> None:
    """Private blocks and sequences of real files, through the text and back."""
    elements = 0
    for path in sendable_files():
        if (header := header_of(path)) is None:
            continue
        [back] = read_xml(native_model(header))
        assert not isinstance(back, Broken), (path.name, back.reason)
        assert plain(back) == plain(header), path.name
        elements += len(header)
    assert elements > 3000


def attributes(model: ElementTree.Element) -> Iterator[tuple[str, str, str]]:
    """(tag, VR, private creator) of the elements of a model, those of items too."""
    for one in model.iter():
        if one.tag.rpartition("}")[2] == "DicomAttribute":
            yield one.get("tag", ""), one.get("vr", ""), one.get("privateCreator", "")


def test_private_elements_are_named_as_dcmtk_names_them(tmp_path: Path) -> None:
    compared = 0
    for path in sorted(FILES.glob("*.dcm")):
        if (header := header_of(path)) is None:
            continue
        ours = {one for one in attributes(ElementTree.fromstring(native_model(header))) if int(one[0][:4], 16) % 2}
        run = run_tool("dcm2xml", "--native-format", path, tmp_path / path.name) if ours else None
        if run and run.returncode == 0 and "Cannot write private creator" not in run.stdout:  # of a creator in UN
            theirs = set(attributes(ElementTree.parse(tmp_path / path.name).getroot()))
            assert {one[::2] for one in ours} == {one[::2] for one in theirs if int(one[0][:4], 16) % 2}, path.name
            compared += len(ours)
    assert compared > 100


def test_texts_and_names_come_through() -> None:
    """Carriage returns, which XML readers change; names of more than five components; values that are empty."""
    header = {
        "00091001": {"vr": "LO", "Value": ["whose block nobody knows"]},
        "00100010": {"vr": "PN", "Value": [{"Alphabetic": "A^B^C^D^E^F"}]},
        "00280030": {"vr": "DS", "Value": [None, 0.5]},
        "00204000": {"vr": "LT", "Value": ["one\r\ntwo\rthree\n<&>"]},
    }
    [back] = read_xml(native_model(header))
    assert plain(back) == plain(header)
    assert b'tag="00091001" vr="LO">' in native_model(header)


A = '<DicomAttribute tag="{}" vr="LO" privateCreator="{}"><Value number="1">{}</Value></DicomAttribute>'
PLAIN = '<DicomAttribute tag="{}" vr="{}"><Value number="1">{}</Value></DicomAttribute>'


def values(header: dict[str, Any]) -> dict[str, Any]:
    return {tag: element["Value"][0] for tag, element in header.items()}


def test_two_creators_of_a_group_have_a_block_each() -> None:
    both = A.format("00090001", "ACME", "a"), A.format("00090001", "OTHER", "o"), A.format("00090002", "ACME", "b")
    made = {"00090010": "ACME", "00090011": "OTHER", "00091001": "a", "00091002": "b", "00091101": "o"}
    assert values(read(*both)) == made
    told = PLAIN.format("00090012", "LO", "ACME"), PLAIN.format("00090011", "LO", "OTHER")
    told_of = {"00090011": "OTHER", "00090012": "ACME", "00091201": "a", "00091202": "b", "00091101": "o"}
    assert values(read(*both, *told)) == told_of, "where the blocks are said to be"
    item = f'<Item number="1">{"".join(both)}</Item>'
    inside = read(f'<DicomAttribute tag="00400555" vr="SQ">{item}</DicomAttribute>')
    assert values(inside["00400555"]["Value"][0]) == made, "an item has blocks of its own"


def test_two_blocks_of_one_creator() -> None:
    creators = PLAIN.format("00090010", "LO", "ACME"), PLAIN.format("00090020", "LO", "ACME")
    header = read(*creators, A.format("00090001", "ACME", "a"), A.format("00090001", "ACME", "b"))
    assert values(header) == {"00090010": "ACME", "00090020": "ACME", "00091001": "a", "00092001": "b"}


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (PLAIN.format("00100020", "LO", "P") * 2, "twice"),
        (PLAIN.format("0010004f", "LO", "P") + PLAIN.format("0010004F", "LO", "P"), "twice"),
        (A.format("00090001", "ACME", "a") * 2, "twice"),
        (A.format("00100020", "ACME", "a"), "not private"),
        (A.format("0009000", "ACME", "a"), "not private"),
        (PLAIN.format("00090027", "SL", "1"), "nothing says whose"),
        ("".join(A.format("00090001", f"C{n}", "a") for n in range(241)), "no free block"),
    ],
    ids=["twice", "letters", "private twice", "not private", "no tag", "no creator", "blocks"],
)
def test_what_no_data_set_can_have_is_refused(written: str, says: str) -> None:
    header = read(written)
    assert isinstance(header, Broken)
    assert says in header.reason


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [(("1", "3"), ["v", None, "v"]), (("", ""), ["v", "v"]), (("2", "1"), None), (("1", "1"), None), (("x",), None),
     (("999999999",), None), (("0",), None), (("1", "65536"), 65536), (("65537",), 65537), (("65538",), None)],
)  # fmt: skip
def test_values_stand_where_their_numbers_say(numbers: tuple[str, ...], expected: Any) -> None:
    inner = "".join(f'<Value number="{number}">v</Value>' for number in numbers)
    element = read(f'<DicomAttribute tag="00080008" vr="CS">{inner}</DicomAttribute>')["00080008"]
    if expected is None:
        assert isinstance(element, Broken) and re.search("numbered|left out", element.reason)
    else:
        assert element["Value"] == expected or len(element["Value"]) == expected


def test_gaps_are_counted_over_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_xml_in, "MAX_GAPS", 5)
    gap = '<DicomAttribute tag="{}" vr="US"><Value number="3">1</Value></DicomAttribute>'
    item = f'<DicomAttribute tag="00081140" vr="SQ"><Item number="1">{gap.format("00280010")}</Item></DicomAttribute>'
    first, second = read_xml(
        f"<models><NativeDicomModel>{item}{gap.format('00280011')}</NativeDicomModel>"
        f"<NativeDicomModel>{gap.format('00280010')}</NativeDicomModel></models>".encode()
    )
    assert first["00081140"]["Value"][0]["00280010"]["Value"] == first["00280011"]["Value"] == [None, None, 1]
    assert isinstance(second["00280010"], Broken) and "left out" in second["00280010"].reason


TAGS = st.sampled_from(["00100020", "00091001", "00090010", "00090001", "0009000", "000900ff", "7FE00010", "", "x" * 9])


@given(
    st.lists(
        st.tuples(
            TAGS,
            st.sampled_from(["LO", "SQ", "UN", "PN", "DS", "", "XX"]),
            st.sampled_from(["", " ", "ACME", "OTHER"]),
            st.sampled_from(["Value", "Item", "PersonName", "InlineBinary", "BulkData", "Other"]),
            st.sampled_from(["", "1", "2", "x", "70000"]),
            st.sampled_from(["", "A", "1.5", "===", "A^B"]),
        ),
        max_size=6,
    )
)
@settings(max_examples=examples(100), deadline=None)
def test_whatever_comes_makes_a_file_or_is_refused(rows: list[tuple[str, ...]]) -> None:
    header = read(
        *(
            f'<DicomAttribute tag="{tag}" vr="{vr}" privateCreator="{creator}">'
            f'<{child} number="{number}">{text}</{child}></DicomAttribute>'
            for tag, vr, creator, child, number, text in rows
        )
    )
    file = ArrivingFile(lambda: ArrivingBody(Path(gettempdir()), Budget(1 << 20)))
    with suppress(Unusable, WebError):
        Described(BulkParts()).write(header, file)
    file.dataset.discard()
