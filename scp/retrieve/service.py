"""What happens with one C-MOVE or C-GET, whatever upper layer brought it (PS3.4 C.4.2, C.4.3)."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from pydicom.uid import UID

from sphere.catalog.service import StoredInstance
from sphere.conf.errors import PeerError, QueryError, SphereError, StorageError
from sphere.conf.settings import Peer, Settings
from sphere.ingest.storage.base import Readable
from sphere.scp.contexts import RetrieveModel
from sphere.scp.retrieve.identifier import Selection, decode_identifier, parse_selection
from sphere.scp.retrieve.outbound import Channel, Converter, Counts, Sender, groups, is_odd, range_of
from sphere.scp.retrieve.read_ahead import ReadAhead
from sphere.scp.upper.messages import Context
from sphere.scp.upper.requestor import PeerSilent, Proposed, Requested, connect

log = logging.getLogger(__name__)

PENDING, SUCCESS, CANCELLED = 0xFF00, 0x0000, 0xFE00  # PS3.4 Tables C.4-2, C.4-3
SOME_FAILED = 0xB000  # warning: sub-operations complete, one or more failures or warnings
NONE_PERFORMED = 0xA702  # refused: out of resources, unable to perform sub-operations
UNKNOWN_DESTINATION = 0xA801
UNABLE = 0xC000
MAX_COMMENT = 64  # characters of an Error Comment, LO (PS3.7 Table E.2-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveRequest:
    """A C-MOVE-RQ or C-GET-RQ, with what was negotiated for its SOP class."""

    model: RetrieveModel
    identifier: bytes  # encoded in `transfer_syntax`
    transfer_syntax: UID
    relational: bool = False
    destination: str = ""  # AE title, of a C-MOVE
    message_id: int = 0
    calling_ae: str = ""


@dataclass(frozen=True, slots=True)
class RetrieveAnswer:
    """One response; `counts` are those at this moment, None where no sub-operation was begun."""

    status: int
    counts: Counts | None = None
    comment: str = ""
    offending: tuple[int, ...] = ()


class Finds(Protocol):
    """What the locator does for us."""

    def locate(self, selection: Selection) -> list[StoredInstance]:
        """The instances of a selection."""


Steps = Generator[None, None, None]
Connect = Callable[[Peer, Settings, Sequence[Proposed]], Requested]


class RetrieveService:
    """Sends what is asked for; one per receiver process."""

    def __init__(
        self,
        settings: Settings,
        storage: Readable,
        locator: Finds,
        converter: Converter,
        *,
        connect: Connect = connect,
    ) -> None:
        self._settings = settings
        self._storage = storage
        self._locator = locator
        self._converter = converter
        self._connect = connect
        self._peers = {peer.ae_title.strip(): peer for peer in settings.peers}

    def move(self, request: RetrieveRequest, *, cancelled: Callable[[], bool]) -> Iterator[RetrieveAnswer]:
        """Every response to a C-MOVE, the final one last; never raises."""
        peer = self._peers.get(request.destination.strip())

        def perform(instances: list[StoredInstance], counts: Counts) -> Steps:
            assert peer is not None
            origin = {
                "MoveOriginatorApplicationEntityTitle": request.calling_ae,
                "MoveOriginatorMessageID": request.message_id,
            }
            for proposed, group in groups(instances):
                yield from self._to_peer(peer, proposed, group, counts, origin)

        if peer is None:
            yield _failure(UNKNOWN_DESTINATION, "move destination is not among the peers of the settings")
        else:
            yield from self._answers(request, perform, cancelled)

    def get(
        self, request: RetrieveRequest, channel: Channel, *, cancelled: Callable[[], bool]
    ) -> Iterator[RetrieveAnswer]:
        """Every response to a C-GET, the final one last; sub-operations go over `channel`, and raise what it raises."""

        def perform(instances: list[StoredInstance], counts: Counts) -> Steps:
            with closing(self._over(channel, deque(instances), counts, {})) as steps:
                yield from steps

        yield from self._answers(request, perform, cancelled)

    def _answers(
        self,
        request: RetrieveRequest,
        perform: Callable[[list[StoredInstance], Counts], Steps],
        cancelled: Callable[[], bool],
    ) -> Iterator[RetrieveAnswer]:
        try:
            selection = parse_selection(
                decode_identifier(request.identifier, request.transfer_syntax),
                model=request.model,
                relational=request.relational,
            )
            instances = self._locator.locate(selection)
        except QueryError as error:
            yield _failure(error.dimse, str(error), error.offending)
            return
        except SphereError as error:
            yield _failure(UNABLE, str(error))
            return
        except Exception as error:  # noqa: BLE001  a defect of ours must be answered, and not end the association
            yield _failure(UNABLE, f"internal error ({type(error).__name__})")
            return
        counts = Counts(len(instances))
        with closing(perform(instances, counts)) as steps:
            for _ in steps:
                if counts.remaining and cancelled():
                    yield RetrieveAnswer(CANCELLED, counts)
                    return
                if counts.remaining:
                    yield RetrieveAnswer(PENDING, counts)
        yield _final(counts)

    def _to_peer(
        self,
        peer: Peer,
        proposed: list[Proposed],
        group: list[StoredInstance],
        counts: Counts,
        origin: Mapping[str, Any],
    ) -> Steps:
        """Send a group; where the association is lost after something went well, go on over a new one."""
        left = deque(group)
        padded: set[str] = set()
        while left:
            sent = counts.completed + counts.warning
            try:
                if not proposed:
                    raise PeerError("no SOP class is known of these instances")
                with self._connect(peer, self._settings, proposed) as association:
                    yield from self._over(association, left, counts, origin, padded)
            except (PeerError, StorageError) as error:
                if is_odd(left[0]) and left[0].SOPInstanceUID not in padded and not isinstance(error, PeerSilent):
                    padded.add(left[0].SOPInstanceUID)
                    continue
                counts.add(left.popleft(), None, str(error))
                yield None
                if isinstance(error, PeerSilent) or counts.completed + counts.warning == sent:
                    yield from _give_up(left, counts, str(error))

    def _over(
        self,
        channel: Channel,
        left: deque[StoredInstance],
        counts: Counts,
        origin: Mapping[str, Any],
        padded: set[str] | None = None,
    ) -> Steps:
        """Sub-operations on one association, one step each; what is done is taken off `left`.

        Raises what the channel raises: the first that is left is then the one that failed.
        """
        sender = Sender(channel, self._converter, origin, padded)
        sendable: list[tuple[StoredInstance, Context]] = []
        refused: list[tuple[StoredInstance, str]] = []
        for instance in left:
            route = sender.route(instance)
            if isinstance(route, Context):
                sendable.append((instance, route))
            else:
                refused.append((instance, route))
        left.clear()
        left.extend(instance for instance, _ in sendable)
        for instance, reason in refused:
            counts.add(instance, None, reason)
            yield None
        with ReadAhead(self._storage, [range_of(instance) for instance in left]) as bytes_ahead:
            for instance, context in sendable:
                outcome = sender.send(instance, context, bytes_ahead.next())
                left.popleft()
                counts.add(instance, *outcome)
                yield None


def _give_up(left: deque[StoredInstance], counts: Counts, reason: str) -> Steps:
    if left:
        while left:
            counts.add(left.popleft(), None, reason)
        yield None


def _final(counts: Counts) -> RetrieveAnswer:
    if not counts.failed and not counts.warning:
        return RetrieveAnswer(SUCCESS, counts)
    status = SOME_FAILED if counts.completed or counts.warning else NONE_PERFORMED
    return RetrieveAnswer(status, counts, counts.reason[:MAX_COMMENT])


def _failure(status: int, reason: str, offending: tuple[int, ...] = ()) -> RetrieveAnswer:
    log.error("retrieve failed status=0x%04X offending=%s", status, ",".join(f"{tag:08X}" for tag in offending))
    return RetrieveAnswer(status, None, reason[:MAX_COMMENT], offending)
