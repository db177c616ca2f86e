"""C-MOVE and C-GET as a user, against any peer (PS3.4 C.4.2.2, C.4.3.2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, Protocol

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import decode
from pynetdicom.presentation import StoragePresentationContexts

from sphere.catalog.query import Model
from sphere.catalog.schema import Level
from sphere.conf.errors import PeerError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp.client.query import ENCODINGS, encoded
from sphere.scp.contexts import GET_MODELS, MOVE_MODELS, is_storage
from sphere.scp.identifier import build_identifier
from sphere.scp.peers import describe
from sphere.scp.retrieve.transcode import DECODERS, TARGETS
from sphere.scp.store import StoreAnswer, StoreRequest
from sphere.scp.upper.command import C_GET_RQ, C_MOVE_RQ, C_STORE_RQ, RESPONSE
from sphere.scp.upper.messages import Message
from sphere.scp.upper.requestor import MAX_CONTEXTS, Proposed, Requested, connect

PENDING = (0xFF00, 0xFF01)
CANNOT_UNDERSTAND = 0xC000  # PS3.4 Table B.2-1
NOT_DECODED: Final = (  # transfer syntaxes that we keep and cannot convert: video, JPEG XL
    "1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.101", "1.2.840.10008.1.2.4.102", "1.2.840.10008.1.2.4.103",
    "1.2.840.10008.1.2.4.104", "1.2.840.10008.1.2.4.105", "1.2.840.10008.1.2.4.106", "1.2.840.10008.1.2.4.107",
    "1.2.840.10008.1.2.4.108", "1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.111", "1.2.840.10008.1.2.4.112",
)  # fmt: skip
_LOSSLESS = (
    "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202",
)  # fmt: skip
LOSSLESS_FIRST: Final = tuple(  # what is not plain, in the order in which one of them is asked for
    dict.fromkeys((*_LOSSLESS, *sorted(DECODERS), "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2", *NOT_DECODED))
)


@dataclass(frozen=True, slots=True)
class Progress:
    """One response: numbers of sub-operations, `remaining` 0 where it says none; `status` is pending or final."""

    status: int
    remaining: int = 0
    completed: int = 0
    failed: int = 0
    warning: int = 0
    comment: str = ""
    failed_uids: tuple[str, ...] = ()

    @property
    def pending(self) -> bool:
        """Whether more responses follow."""
        return self.status in PENDING


class Lands(Protocol):
    """What keeps an instance that a C-GET brings."""

    def land(self, request: StoreRequest) -> StoreAnswer:
        """Return when it is durable, or say why it is not; never raises."""


def move(
    peer: Peer,
    keys: Mapping[str, str],
    *,
    settings: Settings,
    destination: str,
    level: Level = "STUDY",
    model: Model = "STUDY_ROOT",
) -> Iterator[Progress]:
    """Have a peer send what `keys` (unique keys to UIDs) select to the AE title `destination`; the last is final.

    Raises QueryError for a bad key, PeerError when the peer cannot be reached or the association is lost.
    """
    sop_class = next(uid for uid, name in MOVE_MODELS.items() if name == model)
    with connect(peer, settings, [Proposed(sop_class, ENCODINGS)]) as association:
        context = association.user_contexts[0]
        command = {
            "AffectedSOPClassUID": sop_class, "CommandField": C_MOVE_RQ, "Priority": 0, "MoveDestination": destination
        }  # fmt: skip
        number = association.send(context, command, encoded(build_identifier(keys, level), context))
        while True:
            message = association.response(C_MOVE_RQ, number)
            progress = _progress(message)
            association.finish(message)
            yield progress
            if not progress.pending:
                return


def get(
    peer: Peer,
    keys: Mapping[str, str],
    *,
    settings: Settings,
    store: Lands,
    level: Level = "STUDY",
    model: Model = "STUDY_ROOT",
    sop_classes: Collection[str] = (),
) -> Iterator[Progress]:
    """Have a peer send what `keys` select over this association, into `store`; the last is final.

    `sop_classes` are those to be expected: the fewer, the more transfer syntaxes can be told apart, and the surer the
    peer sends each instance as it has it. Raises QueryError for a bad key, PeerError when the peer cannot be reached or
    the association is lost.
    """
    sop_class = next(uid for uid, name in GET_MODELS.items() if name == model)
    proposed = [Proposed(sop_class, ENCODINGS), *_storage(sop_classes)]
    with connect(peer, settings, proposed) as association:
        context = next((cx for cx in association.user_contexts if cx.abstract_syntax == sop_class), None)
        if context is None:
            raise PeerError(f"{describe(peer)} does not offer C-GET")
        command = {"AffectedSOPClassUID": sop_class, "CommandField": C_GET_RQ, "Priority": 0}
        association.send(context, command, encoded(build_identifier(keys, level), context))
        while True:
            message = association.receive()
            try:
                field = message.command["CommandField"]
                if field == C_STORE_RQ:
                    _take(message, association, peer, store)
                    continue
                if field != C_GET_RQ | RESPONSE:
                    raise PeerError(f"{describe(peer)} sent command 0x{field:04X} during a C-GET")
                progress = _progress(message)
            finally:
                association.finish(message)
            yield progress
            if not progress.pending:
                return


def _take(message: Message, association: Requested, peer: Peer, store: Lands) -> None:
    """One C-STORE sub-operation: durable before it is answered Success."""
    if message.dataset is None or "AffectedSOPInstanceUID" not in message.command:
        association.respond(message, CANNOT_UNDERSTAND)
        return
    answer = store.land(
        StoreRequest(
            AffectedSOPClassUID=message.command.get("AffectedSOPClassUID", ""),
            AffectedSOPInstanceUID=message.command["AffectedSOPInstanceUID"],
            TransferSyntaxUID=message.context.transfer_syntax,
            dataset=message.dataset.content(),
            size=message.dataset.size,
            calling_ae=peer.ae_title,
            address=peer.host,
            problem=message.dataset.error,
            abstract_syntax=message.context.abstract_syntax,
        )
    )
    association.respond(message, answer.status, **({"ErrorComment": answer.comment} if answer.comment else {}))


def _storage(sop_classes: Collection[str]) -> Iterator[Proposed]:
    """Contexts for what may come: for few classes one for each transfer syntax, else one or two for each class."""
    known = [str(cx.abstract_syntax) for cx in StoragePresentationContexts]
    classes = [uid for uid in sop_classes or known if is_storage(uid)][: MAX_CONTEXTS - 1]
    each = (MAX_CONTEXTS - 1) // max(1, len(classes))
    for uid in classes:
        if each > len(LOSSLESS_FIRST):
            for syntax in LOSSLESS_FIRST:
                yield Proposed(uid, (syntax,), as_scp=True)
            yield Proposed(uid, TARGETS, as_scp=True)
        elif each > 1:
            yield Proposed(uid, TARGETS, as_scp=True)
            yield Proposed(uid, LOSSLESS_FIRST, as_scp=True)
        else:
            yield Proposed(uid, (*TARGETS, *LOSSLESS_FIRST), as_scp=True)


def _progress(message: Message) -> Progress:
    command: Mapping[str, Any] = message.command
    if "Status" not in command:
        raise PeerError("a response without status")
    return Progress(
        command["Status"],
        command.get("NumberOfRemainingSuboperations", 0),
        command.get("NumberOfCompletedSuboperations", 0),
        command.get("NumberOfFailedSuboperations", 0),
        command.get("NumberOfWarningSuboperations", 0),
        command.get("ErrorComment", ""),
        _failed_uids(message),
    )


def _failed_uids(message: Message) -> tuple[str, ...]:
    if message.dataset is None or message.command["Status"] in PENDING:
        return ()
    syntax: UID = message.context.transfer_syntax
    try:
        identifier: Dataset = decode(
            BytesIO(message.dataset.tobytes()), syntax.is_implicit_VR, syntax.is_little_endian
        )  # fmt: skip
        uids = identifier.get("FailedSOPInstanceUIDList") or ()
    except Exception:  # noqa: BLE001  a list that cannot be read only costs the names of what failed
        return ()
    return (str(uids),) if isinstance(uids, str) else tuple(map(str, uids))
