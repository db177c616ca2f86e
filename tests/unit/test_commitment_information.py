"""Data sets of Storage Commitment against pydicom, and what is none."""

from __future__ import annotations

from io import BytesIO

import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID
from pynetdicom.dsutils import decode, encode

from sphere.conf.errors import QueryError
from sphere.scp.commitment.information import read_information, write_information
from sphere.scp.commitment.transactions import Reference
from sphere.scp.contexts import ENCODABLE

pytestmark = pytest.mark.unit

REFERENCES = tuple(Reference("1.2.840.10008.5.1.4.1.1.2", f"1.2.{number}") for number in range(5))


def item(reference: Reference) -> Dataset:
    found = Dataset()
    found.ReferencedSOPClassUID = reference.SOPClassUID
    found.ReferencedSOPInstanceUID = reference.SOPInstanceUID
    return found


def request(syntax: UID, *, undefined: bool) -> bytes:
    """A request with elements that say nothing to us, in the items and around them."""
    dataset = Dataset()
    dataset.TransactionUID = "1.2.3"
    dataset.StorageMediaFileSetID = "none"
    dataset.ReferencedSOPSequence = Sequence([item(one) for one in REFERENCES])
    dataset.RequestAttributesSequence = Sequence([Dataset(), item(REFERENCES[0])])
    first = dataset.ReferencedSOPSequence[0]
    first.PurposeOfReferenceCodeSequence = Sequence([item(REFERENCES[1])])
    if undefined:
        for owner, keyword in (
            (dataset, "ReferencedSOPSequence"),
            (dataset, "RequestAttributesSequence"),
            (first, "PurposeOfReferenceCodeSequence"),
        ):
            owner[keyword].is_undefined_length = True
            for one in owner[keyword].value:
                one.is_undefined_length_sequence_item = True
    data = encode(dataset, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    assert data
    return data


@pytest.mark.parametrize("syntax", ENCODABLE, ids=lambda one: one.name)
@pytest.mark.parametrize("undefined", [False, True])
def test_a_request_as_pydicom_writes_it(syntax: UID, undefined: bool) -> None:
    assert read_information(request(syntax, undefined=undefined), syntax) == ("1.2.3", REFERENCES)


@pytest.mark.parametrize("syntax", ENCODABLE, ids=lambda one: one.name)
def test_a_report_as_pydicom_reads_it(syntax: UID) -> None:
    data = write_information("1.2.3", "SPHERE", REFERENCES[:3], [(one, 0x0112) for one in REFERENCES[3:]], syntax)
    expected = Dataset()
    expected.RetrieveAETitle, expected.TransactionUID = "SPHERE", "1.2.3"
    expected.FailedSOPSequence = Sequence([item(one) for one in REFERENCES[3:]])
    for one in expected.FailedSOPSequence:
        one.FailureReason = 0x0112
    expected.ReferencedSOPSequence = Sequence([item(one) for one in REFERENCES[:3]])
    found = decode(BytesIO(data), syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    assert found == expected
    if not syntax.is_deflated:
        assert data == encode(expected, syntax.is_implicit_VR, syntax.is_little_endian)
    only = write_information("1.2.3", "SPHERE", REFERENCES, [], syntax)
    assert "FailedSOPSequence" not in decode(
        BytesIO(only), syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated
    )


@pytest.mark.parametrize("syntax", ENCODABLE, ids=lambda one: one.name)
def test_what_is_cut_off_or_changed_says_so(syntax: UID) -> None:
    whole = request(syntax, undefined=True)
    for end in range(len(whole)):
        try:
            read_information(whole[:end], syntax)
        except QueryError:
            continue
    for at in range(len(whole)):
        for value in (0x00, 0x80, 0xFF):
            try:
                read_information(whole[:at] + bytes([value]) + whole[at + 1 :], syntax)
            except QueryError:
                continue


def test_sequences_without_end_are_refused() -> None:
    syntax = ENCODABLE[1]
    nested = b"\x08\x00\x99\x11\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 100_000
    with pytest.raises(QueryError, match="references cannot be read"):
        read_information(nested, syntax)
