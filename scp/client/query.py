"""C-ECHO and C-FIND as a user, against any peer (PS3.4 Annexes A and C)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from io import BytesIO

from pydicom.dataset import Dataset
from pynetdicom.dsutils import decode, encode

from sphere.catalog.query import NO_FEATURES, Features, Model
from sphere.catalog.schema import Level
from sphere.conf.errors import PeerError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp import contexts
from sphere.scp.contexts import ENCODABLE, FIND_MODELS, VERIFICATION
from sphere.scp.identifier import build_identifier
from sphere.scp.libraries import prepare_libraries
from sphere.scp.peers import describe
from sphere.scp.upper.command import C_ECHO_RQ, C_FIND_RQ, Command
from sphere.scp.upper.messages import Context, Message
from sphere.scp.upper.outgoing import Outgoing
from sphere.scp.upper.requestor import Proposed, connect

PENDING = (0xFF00, 0xFF01)  # PS3.4 Table C.4-1
SUCCESS, CANCELLED = 0x0000, 0xFE00
ENCODINGS = tuple(map(str, ENCODABLE[:2]))  # every peer takes the second (PS3.5 10.1)


def echo(peer: Peer, *, settings: Settings) -> float:
    """Ask for a C-ECHO; returns the seconds that association and answer took. Raises PeerError."""
    started = time.monotonic()
    with connect(peer, settings, [Proposed(VERIFICATION, ENCODINGS)]) as association:
        context = association.user_contexts[0]
        response = association.ask(context, {"AffectedSOPClassUID": VERIFICATION, "CommandField": C_ECHO_RQ}, None)
        if response["Status"] != SUCCESS:
            raise PeerError(f"{describe(peer)} answered the echo with {failure(response)}")
    return time.monotonic() - started


def find(
    peer: Peer,
    keys: Mapping[str, str],
    *,
    settings: Settings,
    level: Level = "STUDY",
    model: Model = "STUDY_ROOT",
    features: Features = NO_FEATURES,
) -> Iterator[Dataset]:
    """The peer's matches for `keys` (attribute to value, "" to be told it) at `level`, as they come.

    `features` are negotiated (PS3.4 C.5.1.1). Raises QueryError for a bad key, PeerError when the peer refuses, fails,
    or does not grant a feature.
    """
    prepare_libraries()
    identifier = build_identifier(keys, level)
    sop_class = next(uid for uid, name in FIND_MODELS.items() if name == model)
    asked = contexts.application_information(features)
    wanted = {sop_class: asked} if asked else None
    with connect(peer, settings, [Proposed(sop_class, ENCODINGS)], extensions=wanted) as association:
        if refused := contexts.not_granted(features, association.extensions.get(sop_class, b"")):
            raise PeerError(f"{describe(peer)} does not answer queries with {', '.join(refused)}")
        context = association.user_contexts[0]
        command = {"AffectedSOPClassUID": sop_class, "CommandField": C_FIND_RQ, "Priority": 0}
        number = association.send(context, command, encoded(identifier, context))
        while True:
            message = association.response(C_FIND_RQ, number)
            try:
                status = message.command["Status"]
                match = _match(message, peer)
            finally:
                association.finish(message)
            if status not in PENDING:
                break
            if match is not None:
                yield match
        if status not in (SUCCESS, CANCELLED):
            raise PeerError(f"{describe(peer)} answered the query with {failure(message.command)}")


def encoded(identifier: Dataset, context: Context) -> Outgoing:
    """An identifier as it is sent in a context; raises PeerError when its values cannot be written."""
    syntax = context.transfer_syntax
    data: bytes | None = encode(identifier, syntax.is_implicit_VR, syntax.is_little_endian)
    if not data:
        raise PeerError("the identifier cannot be encoded")
    return Outgoing.of(data)


def failure(response: Command) -> str:
    """A response's status in words, with the peer's comment where it sent one."""
    comment = response.get("ErrorComment", "")
    return f"status 0x{response['Status']:04X}" + (f" ({comment})" if comment else "")


def _match(message: Message, peer: Peer) -> Dataset | None:
    if message.dataset is None or message.command["Status"] not in PENDING:
        return None
    syntax = message.context.transfer_syntax
    try:
        match: Dataset = decode(BytesIO(message.dataset.tobytes()), syntax.is_implicit_VR, syntax.is_little_endian)
    except Exception as error:  # noqa: BLE001  pydicom raises whatever the bytes make of it
        raise PeerError(f"{describe(peer)} sent a match that cannot be decoded ({type(error).__name__})") from None
    return match
