"""The codec of command sets, held against pynetdicom's."""

from __future__ import annotations

import struct
from io import BytesIO

import pytest
from pynetdicom.dimse_messages import C_ECHO_RSP, C_FIND_RSP, C_MOVE_RSP, C_STORE_RQ, C_STORE_RSP, DIMSEMessage
from pynetdicom.dsutils import decode as reference_decode
from pynetdicom.dsutils import encode as reference_encode

from sphere.scp.upper import command
from sphere.scp.upper.command import CommandError

pytestmark = pytest.mark.unit

UID = "1.2.840.10008.5.1.4.1.1.2"
MESSAGES = [
    (C_STORE_RQ, {"CommandField": 0x0001, "MessageID": 7, "Priority": 2, "CommandDataSetType": 1,
                  "AffectedSOPClassUID": UID, "AffectedSOPInstanceUID": "1.2.3",
                  "MoveOriginatorApplicationEntityTitle": "MOVER", "MoveOriginatorMessageID": 3}),
    (C_STORE_RSP, {"CommandField": 0x8001, "MessageIDBeingRespondedTo": 65535, "CommandDataSetType": 0x0101,
                   "Status": 0xA700, "AffectedSOPClassUID": UID, "AffectedSOPInstanceUID": "1.2.34",
                   "ErrorComment": "no room"}),
    (C_FIND_RSP, {"CommandField": 0x8020, "MessageIDBeingRespondedTo": 1, "CommandDataSetType": 0x0101,
                  "Status": 0xA900, "AffectedSOPClassUID": UID, "OffendingElement": [0x00080052]}),
    (C_MOVE_RSP, {"CommandField": 0x8021, "MessageIDBeingRespondedTo": 1, "CommandDataSetType": 0x0101,
                  "Status": 0xFF00, "AffectedSOPClassUID": UID, "NumberOfRemainingSuboperations": 4,
                  "NumberOfCompletedSuboperations": 3, "NumberOfFailedSuboperations": 2,
                  "NumberOfWarningSuboperations": 1}),
    (C_ECHO_RSP, {"CommandField": 0x8030, "MessageIDBeingRespondedTo": 1, "CommandDataSetType": 0x0101, "Status": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields"), MESSAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_same_as_pynetdicom(kind: type[DIMSEMessage], fields: command.Command) -> None:
    encoded = command.encode(fields)
    reference = reference_decode(BytesIO(encoded), True, True)
    for keyword, value in fields.items():
        read = reference[keyword].value
        assert (read if not isinstance(value, list) else [int(read)]) == value
    assert reference.CommandGroupLength == len(encoded) - 12
    assert reference_encode(reference, True, True) == encoded
    decoded = command.decode(encoded)
    assert {keyword: decoded[keyword] for keyword in fields} == fields


def element(number: int, value: bytes, *, group: int = 0, length: int | None = None) -> bytes:
    return struct.pack("<HHI", group, number, len(value) if length is None else length) + value


FIELD, NO_SET = element(0x0100, b"\x30\x00"), element(0x0800, b"\x01\x01")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no Command Field"),
        (FIELD, "or no Command Data Set Type"),
        (FIELD + NO_SET + b"\0\0\0", "cut off"),
        (FIELD + element(0x0800, b"\x01\x01", length=0xFFFFFFFF), "too long"),
        (FIELD + element(0x0800, b"\x01\x01", length=3), "too long"),
        (FIELD + NO_SET + element(0x0052, b"STUDY ", group=8), "not of group 0000"),
        (element(0x0100, b"\x30") + NO_SET, "other than 2 bytes"),
        (element(0x0100, b"") + NO_SET, "other than 2 bytes"),
        (FIELD + NO_SET + element(0x0110, b"\1\0\1\0"), "other than 2 bytes"),
        (FIELD + NO_SET + element(0x0901, b"\x08\x00\x52"), "other than 4 bytes"),
    ],
)
def test_bytes_that_are_no_command_set(data: bytes, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        command.decode(data)


def test_what_is_unknown_or_badly_spelt_is_tolerated() -> None:
    data = FIELD + NO_SET + element(0x7777, b"??") + element(0x1000, b"1.2\xff\0") + element(0x0002, b" 1.2.3 ")
    assert command.decode(data) == {
        "CommandField": 0x30,
        "CommandDataSetType": 0x0101,
        "AffectedSOPInstanceUID": "1.2\ufffd",
        "AffectedSOPClassUID": "1.2.3",
    }


def test_a_response_repeats_its_request() -> None:
    request = {"CommandField": 0x0130, "MessageID": 9, "RequestedSOPClassUID": UID, "RequestedSOPInstanceUID": "1.2"}
    assert command.response_to(request, 0x0110, ActionTypeID=1) == {
        "CommandField": 0x8130, "MessageIDBeingRespondedTo": 9, "CommandDataSetType": 0x0101, "Status": 0x0110,
        "AffectedSOPClassUID": UID, "AffectedSOPInstanceUID": "1.2", "ActionTypeID": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "status", "more"),
    [
        ({"CommandField": 0x0020, "AffectedSOPClassUID": "1.2.840.10008.5.1.4.1.2.2.1"}, 0xFF00, {}),
        ({"CommandField": 0x0020, "AffectedSOPClassUID": "1.2.3"}, 0xFF00, {"CommandDataSetType": 0}),
        ({"CommandField": 0x0020, "AffectedSOPClassUID": "1.2.3"}, 0xA900, {"ErrorComment": "no level"}),
        ({"CommandField": 0x0001, "AffectedSOPClassUID": "1.2", "AffectedSOPInstanceUID": "1.2.3.4"}, 0x0000, {}),
        ({"CommandField": 0x0130, "RequestedSOPClassUID": "1.2", "RequestedSOPInstanceUID": "1.2.3"}, 0x0000, {}),
        ({"CommandField": 0x0030}, 0x0000, {}),
    ],
)
def test_responses_made_once_are_those_made_each_time(
    fields: command.Command, status: int, more: dict[str, object]
) -> None:
    """Also where the number of the request looks like the head of its element (0000,0120)."""
    for number in (1, 0x0120, 0, 0xFFFF, 1):
        request = {**fields, "MessageID": number}
        expected = command.encode(command.response_to(request, status, **more))
        assert command.encoded_response(request, status, **more) == expected
