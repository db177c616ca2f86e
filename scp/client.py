"""Services as a user: echo, store and find against any peer (PS3.4 Annexes A, B and C)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType

from pydicom.dataset import Dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.presentation import PresentationContext, build_context

from sphere.catalog.query import Model
from sphere.catalog.schema import Level
from sphere.conf.errors import PeerError
from sphere.conf.settings import Peer, Settings
from sphere.ingest.header import identify
from sphere.scp.contexts import ENCODABLE, FIND_MODELS, RELATIONAL, VERIFICATION, extension
from sphere.scp.identifier import build_identifier
from sphere.scp.requestor import MAX_CONTEXTS, association, describe, failure, no_answer, open_association

WINDOW = 256  # files looked at before an association is asked for: it proposes what they need
PREFIX = 1 << 16  # bytes of a file read to find its UIDs
PENDING = (0xFF00, 0xFF01)  # PS3.4 Table C.4-1
WARNINGS = range(0xB000, 0xC000)  # of a C-STORE: stored, with a remark (PS3.4 Table B.2-1)
SUCCESS, CANCELLED = 0x0000, 0xFE00


@dataclass(frozen=True, slots=True)
class StoreResult:
    """What became of one file; `status` is None where the peer was not asked or did not answer."""

    path: Path
    status: int | None
    error: str = ""

    @property
    def stored(self) -> bool:
        """Whether the peer has the instance."""
        return self.status is not None and (self.status == SUCCESS or self.status in WARNINGS)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    path: Path
    SOPClassUID: str
    SOPInstanceUID: str
    TransferSyntaxUID: str
    dataset_offset: int

    @property
    def context(self) -> tuple[str, str]:
        return self.SOPClassUID, self.TransferSyntaxUID


def echo(peer: Peer, *, settings: Settings) -> float:
    """Ask for a C-ECHO; returns the seconds that association and answer took. Raises PeerError."""
    started = time.monotonic()
    with association(peer, settings, [build_context(VERIFICATION, list(ENCODABLE))]) as assoc:
        status = assoc.send_c_echo()
        if not status:
            raise PeerError(no_answer(assoc, peer, settings))
        if status.Status != SUCCESS:
            raise PeerError(f"{describe(peer)} answered the echo with {failure(status)}")
    return time.monotonic() - started


def find(
    peer: Peer,
    keys: Mapping[str, str],
    *,
    settings: Settings,
    level: Level = "STUDY",
    model: Model = "STUDY_ROOT",
    relational: bool = False,
) -> Iterator[Dataset]:
    """The peer's matches for `keys` (attribute to value, "" to be told it) at `level`, as they come.

    `relational` lets keys of levels above and below be used freely (PS3.4 C.4.1.2.2.1), where the peer grants it.
    Raises QueryError for a bad key, PeerError when the peer refuses or fails.
    """
    identifier = build_identifier(keys, level)
    sop_class = next(uid for uid, name in FIND_MODELS.items() if name == model)
    wanted = {sop_class: b"\x01"} if relational else None
    with association(peer, settings, [build_context(sop_class, list(ENCODABLE))], extensions=wanted) as assoc:
        if relational and not extension(assoc.acceptor.sop_class_extended.get(UID(sop_class), b""), RELATIONAL):
            raise PeerError(f"{describe(peer)} does not answer relational queries")
        for status, match in assoc.send_c_find(identifier, sop_class):
            if not status:
                raise PeerError(no_answer(assoc, peer, settings))
            if status.Status not in PENDING:
                if status.Status not in (SUCCESS, CANCELLED):
                    raise PeerError(f"{describe(peer)} answered the query with {failure(status)}")
                break
            if match is not None:
                yield match


def store(peer: Peer, paths: Iterable[Path], *, settings: Settings) -> Iterator[StoreResult]:
    """Send files as they are, one result for each, in their order.

    A file that is no DICOM, that the peer does not accept or that ends the association has its error in its result, and
    the next ones go on. Raises PeerError when the peer cannot be reached (again).
    """
    with _Sender(peer, settings) as sender:
        for window in _windows(paths):
            for item in window:
                if isinstance(item, StoreResult):
                    yield item
                else:
                    yield sender.send(item, window)


_Window = list["_Outgoing | StoreResult"]


def _windows(paths: Iterable[Path]) -> Iterator[_Window]:
    """The files in groups that one association can serve."""
    window: _Window = []
    contexts: set[tuple[str, str]] = set()
    for path in paths:
        item = _look_at(path)
        needed = contexts | {item.context} if isinstance(item, _Outgoing) else contexts
        if len(window) >= WINDOW or len(needed) > MAX_CONTEXTS:
            yield window
            window, needed = [], {item.context} if isinstance(item, _Outgoing) else set()
        window.append(item)
        contexts = needed
    yield window


def _look_at(path: Path) -> _Outgoing | StoreResult:
    """What the file is, by its first bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            found = identify(file.read(PREFIX), size=size)
    except OSError as error:
        return StoreResult(path, None, f"cannot be read: {error.strerror}")
    if not (found.SOPClassUID and found.SOPInstanceUID and found.TransferSyntaxUID):
        return StoreResult(path, None, "not a DICOM instance: no SOP Class UID, SOP Instance UID or transfer syntax")
    return _Outgoing(path, found.SOPClassUID, found.SOPInstanceUID, found.TransferSyntaxUID, found.dataset_offset)


class _Sender:
    """Keeps an association that fits what is to be sent."""

    def __init__(self, peer: Peer, settings: Settings) -> None:
        self._peer = peer
        self._settings = settings
        self._assoc: Association | None = None
        self._proposed: frozenset[tuple[str, str]] = frozenset()
        self._message = 0

    def __enter__(self) -> _Sender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._release()

    def send(self, item: _Outgoing, window: _Window) -> StoreResult:
        """One C-STORE; `window` is what an association, if a new one is needed, should propose contexts for."""
        needed = frozenset(other.context for other in window if isinstance(other, _Outgoing))
        try:
            assoc = self._association(needed)
            context = _context_for(assoc, item)
            if context is None:
                syntax, kind = UID(item.TransferSyntaxUID).name, UID(item.SOPClassUID).name
                return StoreResult(item.path, None, f"{describe(self._peer)} does not accept {kind} in {syntax}")
            status = self._c_store(assoc, context, item)
        except (OSError, ValueError) as error:  # the file went away, or has UIDs that no command can carry
            return StoreResult(item.path, None, f"cannot be sent: {error}")
        if not status:
            reason = no_answer(assoc, self._peer, self._settings)
            self._release()
            return StoreResult(item.path, None, reason)
        return StoreResult(item.path, status.Status, failure(status) if status.Status != SUCCESS else "")

    def _association(self, needed: frozenset[tuple[str, str]]) -> Association:
        if self._assoc is not None and needed <= self._proposed and not self._assoc.acse.is_aborted():
            return self._assoc
        self._release()
        contexts = [build_context(sop_class, syntax) for sop_class, syntax in sorted(needed)]
        self._assoc = open_association(self._peer, self._settings, contexts)
        self._proposed = needed
        return self._assoc

    def _c_store(self, assoc: Association, context: PresentationContext, item: _Outgoing) -> Dataset:
        """Send the file's bytes from the data set on, unchanged; an empty Dataset when there was no answer.

        pynetdicom's own send_c_store decodes the file, and refuses one without File Meta Information.
        """
        self._message = self._message % 0xFFFF + 1
        request = C_STORE()
        request.MessageID = self._message
        request.Priority = 0  # medium (PS3.7 9.1.1.1.5)
        request.AffectedSOPClassUID = UID(item.SOPClassUID)
        request.AffectedSOPInstanceUID = UID(item.SOPInstanceUID)
        if item.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
            request.DataSet = BytesIO(_padded(item))
        else:
            request._dataset_path = (item.path, item.dataset_offset)
        assoc.dimse.send_msg(request, context.context_id or 0)
        _, response = assoc.dimse.get_msg(block=True)
        return Dataset() if response is None else assoc._check_received_status(response)

    def _release(self) -> None:
        if self._assoc is not None:
            if self._assoc.acse.is_aborted():
                self._assoc.abort()  # it is over already: ends our threads
            else:
                self._assoc.release()
        self._assoc = None


def _padded(item: _Outgoing) -> bytes:
    """A deflated data set, made even with a NUL as PS3.5 A.5 wants: DCMTK ends an association over an odd one."""
    with item.path.open("rb") as file:
        file.seek(item.dataset_offset)
        data = file.read()
    return data + bytes(len(data) % 2)


def _context_for(assoc: Association, item: _Outgoing) -> PresentationContext | None:
    """The accepted context for the file's SOP class and transfer syntax."""
    for context in assoc.accepted_contexts:
        if context.abstract_syntax == item.SOPClassUID and context.transfer_syntax[0] == item.TransferSyntaxUID:
            return context
    return None
