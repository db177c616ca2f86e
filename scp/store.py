"""What happens with one C-STORE, whatever upper layer brought it (PS3.4 Annex B)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from math import inf

from sphere.catalog.known import KnownInstances, OnceWriter, Writer
from sphere.conf.errors import SphereError
from sphere.conf.logs import hashed
from sphere.conf.settings import OnConflict
from sphere.conf.uids import UID
from sphere.ingest.bundle import FileRange, NewMember
from sphere.ingest.header import Identifier, Identity
from sphere.ingest.members import Dataset
from sphere.ingest.part10 import file_meta
from sphere.scp.policy import Policy, Via

log = logging.getLogger(__name__)

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700  # PS3.4 Table B.2-1
MISMATCH = 0xB007  # warning: data set does not match SOP class (PS3.4 Table B.2-1)
PROCESSING_FAILURE = 0x0110  # PS3.7 C.5.9
PREFIXES = (1 << 16, 1 << 23)  # bytes given to the header reader to find the UIDs: first, and if that is too little
LOOK_S = 1.0  # seconds that a data set may take to come after its command, or deletions are looked at again
MAX_COMMENT = 64  # characters of an Error Comment, LO (PS3.7 Table E.2-1)

_threads = threading.local()  # of each, its Identifier


@dataclass(slots=True, kw_only=True)
class StoreRequest:
    """A complete C-STORE-RQ; the data set is encoded as the presentation context says and is not looked at.

    It is begun while the data set is still to come, which `dataset`, `size`, `sha256` and `problem` say then.
    """

    AffectedSOPClassUID: str
    AffectedSOPInstanceUID: str
    TransferSyntaxUID: str
    dataset: Dataset  # a file where it is too large for memory
    size: int  # bytes of the data set
    sha256: str = ""  # of the data set, hexadecimal; "": to be computed
    digested: Callable[[], str] | None = None  # gives it, where another thread computes it
    calling_ae: str
    called_ae: str = ""
    address: str  # of the sender
    via: Via = "dimse"
    sender: str = ""  # what came with it: the association; copies that landed before it are recognised
    problem: OSError | None = None  # the disk failed while it arrived: `dataset` is not whole
    preamble: bytes = b""  # what came before the data set, to be kept; b"": made from the UIDs (PS3.10 7.1)
    origin: str = ""  # where it came from; "": from the calling AE title
    abstract_syntax: str = ""  # of its presentation context; "": there was none
    head: bytes = b""  # `meta`, made ahead
    not_deleted_at: float = -inf  # monotonic time of a look that said so of the command's instance

    def meta(self) -> bytes:
        """What is put before a data set that names what it asks for (PS3.10 7.1)."""
        return file_meta(
            sop_class_uid=self.AffectedSOPClassUID,
            sop_instance_uid=self.AffectedSOPInstanceUID,
            transfer_syntax_uid=self.TransferSyntaxUID,
            source_aet=self.calling_ae,
        )

    def of(self, found: Identity) -> StoreRequest:
        """The same, asking for what the data set itself says that it is."""
        return replace(self, AffectedSOPClassUID=found.SOPClassUID, AffectedSOPInstanceUID=found.SOPInstanceUID)


@dataclass(frozen=True, slots=True)
class StoreAnswer:
    """Status and Error Comment of the C-STORE-RSP."""

    status: int
    comment: str = ""


class StoreService:
    """Lands instances: durable first, then Success."""

    def __init__(
        self,
        writer: Writer,
        policy: Policy | None = None,
        known: KnownInstances | None = None,
        *,
        on_conflict: OnConflict = "keep-first",
    ) -> None:
        """`policy` decides what is let in; without one everything is. `known` says what need not be stored again."""
        self._writer = writer
        self._policy = policy
        self._once = OnceWriter(writer, known, on_conflict) if known is not None else None

    def begin(self, request: StoreRequest) -> StoreRequest:
        """Itself, with all that can be made of it while its data set is still to come."""
        request.origin = request.origin or f"dimse:{request.calling_ae}@{request.address}"
        request.head = b"" if request.preamble else request.meta()
        if self._policy is not None and not self._policy.was_deleted(request.AffectedSOPInstanceUID):
            request.not_deleted_at = time.monotonic()
        return request

    def land(self, request: StoreRequest) -> StoreAnswer:
        """Store the bytes as they came; never raises.

        The instance is the one that the data set names; the command's UIDs count only where it names none. Success and
        warnings mean that the bytes are durable. The warning 0xB007 says that the data set names another
        instance or class than the command, that its identifying UIDs cannot be read, or that its presentation context
        is of another class: it is kept all the same.
        """
        if request.problem is not None:
            return self._failed(request, OUT_OF_RESOURCES, f"no room: {request.problem.strerror}")
        try:
            found = identify_request(request)
            member = _member(request, found)
            if self._policy is not None:
                member = self._policy.admit(
                    member,
                    via=request.via,
                    called_ae=request.called_ae,
                    address=request.address,
                    not_deleted=member.SOPInstanceUID == request.AffectedSOPInstanceUID
                    and time.monotonic() - request.not_deleted_at < LOOK_S,
                )
            if self._once is None:
                self._writer.store(member)
            else:
                self._once.store(member, sender=request.sender)
        except SphereError as error:
            return self._failed(request, error.dimse, str(error))
        except OSError as error:  # the file that it waits in cannot be opened or read
            return self._failed(request, OUT_OF_RESOURCES, f"no room: {error.strerror or type(error).__name__}")
        except Exception as error:  # noqa: BLE001  a defect of ours must be answered, and not end the association
            return self._failed(request, PROCESSING_FAILURE, f"internal error ({type(error).__name__})")
        return _judge(request, found)

    def _failed(self, request: StoreRequest, status: int, reason: str) -> StoreAnswer:
        log.error("not stored instance=%s status=0x%04X: %s", hashed(request.AffectedSOPInstanceUID), status, reason)
        return StoreAnswer(status, reason[:MAX_COMMENT])


def identify_request(request: StoreRequest) -> Identity:
    """The UIDs that the data set itself gives; raises OSError."""
    identifier = _of_this_thread()
    syntax, wanted = request.TransferSyntaxUID, identifier.wants
    if wanted and (known := identifier.again(_first(request.dataset, wanted), transfer_syntax_uid=syntax)):
        return known
    for length in PREFIXES:
        prefix = _first(request.dataset, length)
        found = identifier.identify(prefix, transfer_syntax_uid=syntax, size=request.size)
        if found.complete or len(prefix) >= request.size:
            break
    return found


def _of_this_thread() -> Identifier:
    """A thread serves one association, or one request after the other."""
    found: Identifier | None = getattr(_threads, "identifier", None)
    if found is None:
        found = _threads.identifier = Identifier()
    return found


def _first(dataset: Dataset, length: int) -> bytes:
    """Up to `length` bytes from the begin, fewer only where there are no more."""
    if isinstance(dataset, list) and dataset and len(dataset[0]) >= length:  # as most of them come
        return bytes(dataset[0][:length])
    if isinstance(dataset, FileRange):
        with dataset.path.open("rb") as file:
            file.seek(dataset.offset)
            return file.read(min(length, dataset.length))
    if isinstance(dataset, (bytes, bytearray, memoryview)):
        return bytes(dataset[:length])
    parts, missing = [], length
    for part in dataset:
        parts.append(bytes(part[:missing]))
        missing -= len(parts[-1])
        if not missing:
            break
    return b"".join(parts)


def _member(request: StoreRequest, found: Identity) -> NewMember:
    """What the bundle gets, and every decision is made of: the UIDs of the data set where they can be read, as in the
    catalog, those of the command otherwise."""
    return NewMember(
        SOPInstanceUID=found.SOPInstanceUID or request.AffectedSOPInstanceUID,
        SOPClassUID=found.SOPClassUID or request.AffectedSOPClassUID,
        StudyInstanceUID=found.StudyInstanceUID,
        SeriesInstanceUID=found.SeriesInstanceUID,
        TransferSyntaxUID=request.TransferSyntaxUID,
        source_aet=request.calling_ae,
        origin=request.origin or f"dimse:{request.calling_ae}@{request.address}",
        received_at=datetime.now(timezone.utc),
        preamble=request.preamble or _head(request, found),
        dataset=request.dataset,
        sha256=request.sha256,
        digested=request.digested,
    )


def _head(request: StoreRequest, found: Identity) -> bytes:
    """The File Meta Information: it names what the data set after it is (PS3.10 7.1), by the command where that does
    not say so."""
    sop_class, instance = request.AffectedSOPClassUID, request.AffectedSOPInstanceUID
    if found.SOPInstanceUID == instance and found.SOPClassUID == sop_class:
        return request.head or request.meta()
    named = replace(
        request,
        AffectedSOPClassUID=found.SOPClassUID if UID.fullmatch(found.SOPClassUID) else sop_class,
        AffectedSOPInstanceUID=found.SOPInstanceUID if UID.fullmatch(found.SOPInstanceUID) else instance,
    )
    return named.meta()


def _judge(request: StoreRequest, found: Identity) -> StoreAnswer:
    """The answer for a stored instance: does the data set say what the command said (PS3.4 B.2.3)?"""
    if found.SOPInstanceUID != request.AffectedSOPInstanceUID:
        named = "names another instance" if found.SOPInstanceUID else "has no readable SOP Instance UID"
        return StoreAnswer(MISMATCH, f"stored, but the data set {named}")
    if found.SOPClassUID != request.AffectedSOPClassUID:
        named = "names another SOP class" if found.SOPClassUID else "has no readable SOP Class UID"
        return StoreAnswer(MISMATCH, f"stored, but the data set {named}")
    if not (found.StudyInstanceUID and found.SeriesInstanceUID):
        return StoreAnswer(MISMATCH, "stored, but Study or Series Instance UID is not readable")
    if request.abstract_syntax not in ("", request.AffectedSOPClassUID):
        return StoreAnswer(MISMATCH, "stored, but its presentation context is of another SOP class")
    return StoreAnswer(SUCCESS)
