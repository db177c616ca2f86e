"""The answer to an A-ASSOCIATE-RQ (PS3.8 7.1, 9.3.2; PS3.7 Annex D), by pynetdicom's PDU and presentation classes."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pydicom.uid import UID
from pynetdicom._globals import APPLICATION_CONTEXT_NAME
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassExtendedNegotiation,
)
from pynetdicom.presentation import negotiate_as_acceptor

from sphere.ingest.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from sphere.scp import contexts
from sphere.scp.upper import protocol
from sphere.scp.upper.messages import Context
from sphere.scp.upper.protocol import PDU_HEADER, Rejection, Violation

FIXED: Final = 68  # bytes of an A-ASSOCIATE-RQ between its header and its variable items (PS3.8 Table 9-11)
APPLICATION_CONTEXT, PRESENTATION_CONTEXT, USER_INFORMATION = 0x10, 0x20, 0x50  # item types
SUB_ITEMS: Final = {  # that are understood; of user identity (0x58, PS3.7 D.3.3.7) we know none, and may be silent
    PRESENTATION_CONTEXT: (0x30, 0x40),
    USER_INFORMATION: (0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57),
}
AE_TITLES: Final = slice(4, 20), slice(20, 36)  # bytes of the called and of the calling one
MAX_CONTEXTS: Final = 128  # odd ids of one byte (PS3.8 9.3.2.2)
MAX_SYNTAXES: Final = 128  # sub-items of one context; PS3.6 knows some 60 transfer syntaxes
MAX_USER_ITEMS: Final = 2048  # sub-items of the user information
MAX_KNOWN: Final = 32  # agreements kept, of at most some 100 kB
_ITEM = struct.Struct(">BxH")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A decoded A-ASSOCIATE-RQ; `digest` is that of its bytes."""

    calling: str
    called: str
    primitive: A_ASSOCIATE
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What was negotiated. `max_pdu`: bytes that the peer takes in a P-DATA-TF PDU, 0: any (PS3.8 D.1)."""

    contexts: dict[int, Context]
    refused: int
    max_pdu: int
    extensions: dict[str, bytes]  # application information granted, by SOP class (PS3.7 D.3.3.5)
    answer: bytes  # the A-ASSOCIATE-AC PDU


def read_request(body: memoryview) -> Proposal:
    """Decode an A-ASSOCIATE-RQ without its header; raises Violation, and Rejection when we cannot take it."""
    understood = _understood(body)
    for place, rejection in zip(
        AE_TITLES, (protocol.CALLED_AE_NOT_RECOGNIZED, protocol.CALLING_AE_NOT_RECOGNIZED), strict=True
    ):
        if not understood[place].strip():
            raise Rejection(*rejection)
    pdu = A_ASSOCIATE_RQ()
    try:
        pdu.decode(PDU_HEADER.pack(protocol.ASSOCIATE_RQ, len(understood)) + understood)
        primitive = pdu.to_primitive()
    except Exception as error:  # noqa: BLE001  pynetdicom raises whatever the bytes make of it
        raise _invalid(f"A-ASSOCIATE-RQ ({type(error).__name__})") from None
    if not pdu.protocol_version & 1:
        raise Rejection(*protocol.PROTOCOL_VERSION_NOT_SUPPORTED)
    if primitive.application_context_name != APPLICATION_CONTEXT_NAME:
        raise Rejection(*protocol.APPLICATION_CONTEXT_NOT_SUPPORTED)
    ids = [cx.context_id for cx in primitive.presentation_context_definition_list]
    if len(set(ids)) != len(ids):
        raise _invalid("a presentation context id that is used twice")
    return Proposal(
        calling=pdu.calling_ae_title.strip(),
        called=pdu.called_ae_title.strip(),
        primitive=primitive,
        digest=hashlib.sha256(body).digest(),
    )


class Agreements:
    """Agreements with those who ask byte for byte the same again, as programs do: one on 121 contexts takes 9 ms.

    Thread-safe: at worst two find the same.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int], Agreement] = {}

    def on(self, proposal: Proposal, *, max_pdu: int) -> Agreement:
        """`agree`."""
        key = proposal.digest, max_pdu
        found = self._known.get(key)
        if found is None:
            found = agree(proposal, max_pdu=max_pdu)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = found
        return found


def agree(proposal: Proposal, *, max_pdu: int) -> Agreement:
    """Our answer; `max_pdu` are the bytes of a P-DATA-TF PDU that we take."""
    items = proposal.primitive.user_information
    roles: dict[Any, Any] = {
        item.sop_class_uid: (item.scu_role, item.scp_role)
        for item in items
        if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
    }
    narrowed = contexts.narrow(proposal.primitive.presentation_context_definition_list)
    results, ac_roles = negotiate_as_acceptor(narrowed, contexts.supported(narrowed), roles)
    accepted = [Context(*cx.as_tuple, as_scu=bool(cx.as_scu)) for cx in results if cx.result == 0]
    extensions = dict(_extensions(items))
    theirs = [item.maximum_length_received for item in items if isinstance(item, MaximumLengthNotification)]
    return Agreement(
        contexts={cx.id: cx for cx in accepted},
        refused=len(results) - len(accepted),
        max_pdu=(theirs or [0])[0] or 0,
        extensions=extensions,
        answer=_accept(proposal, results, [*own_items(max_pdu), *ac_roles, *_granted(extensions)]),
    )


def _extensions(items: list[Any]) -> Iterator[tuple[str, bytes]]:
    for item in items:
        if isinstance(item, SOPClassExtendedNegotiation) and contexts.is_extended(str(item.sop_class_uid)):
            uid = str(item.sop_class_uid)
            yield uid, contexts.extensions(uid, item.service_class_application_information)


def _accept(proposal: Proposal, results: list[Any], user_information: list[Any]) -> bytes:
    answer = A_ASSOCIATE()
    answer.application_context_name = UID(APPLICATION_CONTEXT_NAME)
    answer.calling_ae_title = proposal.primitive.calling_ae_title
    answer.called_ae_title = proposal.primitive.called_ae_title
    answer.result, answer.result_source = 0, 1
    answer.presentation_context_definition_results_list = results
    answer.user_information = user_information
    pdu = A_ASSOCIATE_AC()
    pdu.from_primitive(answer)
    return bytes(pdu.encode())


def own_items(max_pdu: int) -> Iterator[Any]:
    """What every association of ours says of itself (PS3.7 D.3.3.1, D.3.3.2)."""
    length = MaximumLengthNotification()
    length.maximum_length_received = max_pdu
    yield length
    uid = ImplementationClassUIDNotification()
    uid.implementation_class_uid = UID(IMPLEMENTATION_CLASS_UID)
    yield uid
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    yield version


def _granted(extensions: dict[str, bytes]) -> Iterator[Any]:
    for uid, information in extensions.items():
        item = SOPClassExtendedNegotiation()
        item.sop_class_uid = UID(uid)
        item.service_class_application_information = information
        yield item


def _understood(body: memoryview) -> bytes:
    """The A-ASSOCIATE-RQ without items that nobody here knows, which are to be ignored (PS3.8 9.3.1).

    More items than an honest peer sends are refused before objects are made of them.
    """
    if len(body) < FIXED:
        raise _invalid("an A-ASSOCIATE-RQ that is cut off")
    kept, found = [bytes(body[:FIXED])], 0
    for kind, item in _items(body[FIXED:]):
        found += kind == PRESENTATION_CONTEXT
        if found > MAX_CONTEXTS:
            raise _invalid("an A-ASSOCIATE-RQ with items without end")
        if kind in SUB_ITEMS:
            kept.append(_item(kind, _with_known(kind, item)))
        elif kind == APPLICATION_CONTEXT:
            kept.append(_item(kind, item))
    return b"".join(kept)


def _with_known(kind: int, item: memoryview) -> bytes:
    """The value of an item with those of its sub-items alone that are understood."""
    begin, limit = (4, MAX_SYNTAXES) if kind == PRESENTATION_CONTEXT else (0, MAX_USER_ITEMS)
    kept = [bytes(item[:begin])]
    for number, (sub_kind, value) in enumerate(_items(item[begin:])):
        if number >= limit:
            raise _invalid("an A-ASSOCIATE-RQ with items without end")
        if sub_kind in SUB_ITEMS[kind]:
            kept.append(_item(sub_kind, value))
    return b"".join(kept)


def _item(kind: int, value: bytes | memoryview) -> bytes:
    return _ITEM.pack(kind, len(value)) + value


def _items(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and value of the items in `data` (PS3.8 9.3.2); raises Violation where one is cut off."""
    at = 0
    while at < len(data):
        if len(data) - at < _ITEM.size:
            raise _invalid("an item that is cut off")
        kind, length = _ITEM.unpack_from(data, at)
        end = at + _ITEM.size + length
        if end > len(data):
            raise _invalid("an item that overruns the PDU")
        yield kind, data[at + _ITEM.size : end]
        at = end


def _invalid(what: str) -> Violation:
    return Violation(what, reason=protocol.INVALID_PARAMETER)
