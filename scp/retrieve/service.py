"""What happens with one C-MOVE or C-GET, whatever upper layer brought it (PS3.4 C.4.2, C.4.3)."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydicom.uid import UID

from sphere.conf.errors import QueryError, SphereError
from sphere.conf.settings import Settings
from sphere.ingest.storage.base import Readable
from sphere.scp.contexts import RetrieveModel
from sphere.scp.decode import decode_identifier
from sphere.scp.retrieve.deliver import Connect, Delivery, Outcomes
from sphere.scp.retrieve.identifier import Selection, parse_selection
from sphere.scp.retrieve.outbound import Channel, Converter, Counts, Sender, groups, preferred_by
from sphere.scp.retrieve.reading import reading
from sphere.scp.upper.requestor import connect

if TYPE_CHECKING:
    from sphere.catalog.service import StoredInstance

log = logging.getLogger(__name__)

PENDING, SUCCESS, CANCELLED = 0xFF00, 0x0000, 0xFE00  # PS3.4 Tables C.4-2, C.4-3
SOME_FAILED = 0xB000  # warning: sub-operations complete, one or more failures or warnings
NONE_PERFORMED = 0xA702  # refused: out of resources, unable to perform sub-operations
UNKNOWN_DESTINATION = 0xA801
UNABLE = 0xC000
PENDING_S = 0.02  # seconds between pending responses, which are optional (PS3.4 C.4.2.3.1): each wakes the requester
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
    called_ae: str = ""


@dataclass(frozen=True, slots=True)
class RetrieveAnswer:
    """One response; `counts` are those at this moment, None where no sub-operation was begun."""

    status: int
    counts: Counts | None = None
    comment: str = ""
    offending: tuple[int, ...] = ()


class Finds(Protocol):
    """What the locator does for us."""

    def locate(self, selection: Selection, called: str = "") -> list[StoredInstance]:
        """The instances of a selection, as this archive answers under the AE title `called`."""


Steps = Generator[None, None, None]


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
        self._read = reading(storage)
        self._locator = locator
        self._converter = converter
        self._connect = connect
        self._peers = {peer.ae_title.strip(): peer for peer in settings.peers}

    def move(self, request: RetrieveRequest, *, cancelled: Callable[[], bool]) -> Iterator[RetrieveAnswer]:
        """Every response to a C-MOVE, the final one last; never raises."""
        peer = self._peers.get(request.destination.strip())

        def perform(instances: list[StoredInstance], counts: Counts) -> Steps:
            assert peer is not None
            delivery = self._delivery(
                cancelled,
                MoveOriginatorApplicationEntityTitle=request.calling_ae,
                MoveOriginatorMessageID=request.message_id,
            )
            for proposed, group in groups(instances, preferred=preferred_by(peer)):
                yield from _counted(delivery.to_peer(peer, proposed, group), counts)

        if peer is None:
            yield _failure(UNKNOWN_DESTINATION, "move destination is not among the peers of the settings")
        else:
            yield from self._answers(request, perform)

    def get(
        self, request: RetrieveRequest, channel: Channel, *, cancelled: Callable[[], bool]
    ) -> Iterator[RetrieveAnswer]:
        """Every response to a C-GET, the final one last; sub-operations go over `channel`, and raise what it raises."""

        def perform(instances: list[StoredInstance], counts: Counts) -> Steps:
            preferred = preferred_by(self._peers.get(request.calling_ae))
            sender = Sender(channel, self._converter, {}, preferred=preferred)
            yield from _counted(self._delivery(cancelled).over(sender, deque(instances)), counts)

        yield from self._answers(request, perform)

    def _answers(
        self,
        request: RetrieveRequest,
        perform: Callable[[list[StoredInstance], Counts], Steps],
    ) -> Iterator[RetrieveAnswer]:
        try:
            selection = parse_selection(
                decode_identifier(request.identifier, request.transfer_syntax),
                model=request.model,
                relational=request.relational,
            )
            instances = self._locator.locate(selection, request.called_ae)
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
            told = float("-inf")
            for _ in steps:
                if counts.remaining and time.monotonic() - told >= PENDING_S:
                    yield RetrieveAnswer(PENDING, counts)
                    told = time.monotonic()
        yield _final(counts)

    def _delivery(self, stop: Callable[[], bool], **origin: str | int) -> Delivery[StoredInstance]:
        return Delivery(
            settings=self._settings, read=self._read, converter=self._converter, connect=self._connect, origin=origin,
            stop=stop,
        )  # fmt: skip


def _counted(outcomes: Outcomes[StoredInstance], counts: Counts) -> Steps:
    """One step for each sub-operation that is over."""
    with closing(outcomes):
        for outcome in outcomes:
            counts.add(outcome.instance, outcome.status, outcome.reason)
            yield None


def _final(counts: Counts) -> RetrieveAnswer:
    if counts.remaining:
        return RetrieveAnswer(CANCELLED, counts)
    if not counts.failed and not counts.warning:
        return RetrieveAnswer(SUCCESS, counts)
    status = SOME_FAILED if counts.completed or counts.warning else NONE_PERFORMED
    return RetrieveAnswer(status, counts, counts.reason[:MAX_COMMENT])


def _failure(status: int, reason: str, offending: tuple[int, ...] = ()) -> RetrieveAnswer:
    log.error("retrieve failed status=0x%04X offending=%s", status, ",".join(f"{tag:08X}" for tag in offending))
    return RetrieveAnswer(status, None, reason[:MAX_COMMENT], offending)
