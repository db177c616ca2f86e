"""STOW-RS: the store transaction (PS3.18 10.5), durable and judged as C-STORE is."""

from __future__ import annotations

import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import orjson
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response

from sphere.conf.errors import SphereError, StorageError
from sphere.conf.logs import hashed
from sphere.conf.uids import UID
from sphere.ingest.storage.paths import storage_error
from sphere.scp.store import OUT_OF_RESOURCES, PROCESSING_FAILURE, StoreAnswer, StoreRequest, identify_request
from sphere.scp.upper.dataset import Budget, WaitingFile
from sphere.scp.web.accept import accepted, choose, parse
from sphere.scp.web.allowance import Allowance
from sphere.scp.web.bulk_in import BulkParts, Unusable
from sphere.scp.web.incoming import ArrivingBody, ArrivingFile, pieces, take_in
from sphere.scp.web.metadata_in import Described, read_json
from sphere.scp.web.multipart_in import Data, Event, Head, MultipartReader
from sphere.scp.web.native_xml import native_model
from sphere.scp.web.native_xml_in import read_xml
from sphere.scp.web.operations import PREFIX, Operation, service_root, uids
from sphere.scp.web.problem import WebError
from sphere.scp.web.search import JSON, XML

log = logging.getLogger(__name__)

DICOM: Final = "application/dicom"
CANNOT_UNDERSTAND: Final = 0xC000  # PS3.18 Table 10.5.3-2
MISMATCH: Final = 0xA900
MAX_PARTS: Final = 100_000
MAX_METADATA: Final = 64 << 20  # bytes of a part with metadata
SMALL_METADATA: Final = 256 << 10  # bytes of a part with metadata that is read without waiting for others
IN_FLIGHT: Final = 8  # instances of one request that are stored at once, so that they share one sync (group commit)


class Store(Protocol):
    """What the store service does for us."""

    def land(self, request: StoreRequest) -> StoreAnswer:
        """Durable first, then Success; never raises."""


@dataclass(frozen=True, slots=True)
class Landing:
    """What storing takes; `memory`: of parts that wait, of all requests of the process.

    `reading`: texts of metadata that are objects at once, some 24 times their size.
    """

    store: Store
    folder: Path
    memory: Budget
    idle_s: float
    read_only: bool = False
    reading: Allowance = field(default_factory=lambda: Allowance(MAX_METADATA))
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4 * IN_FLIGHT, "stow"))

    def body(self, file: WaitingFile | None = None) -> ArrivingBody:
        """Room for one part, in memory or in a file."""
        return ArrivingBody(self.folder, self.memory, file)


@dataclass(slots=True)
class Outcome:
    """What became of one instance; `reason` 0: stored, `warning` what is to be remarked."""

    SOPClassUID: str
    SOPInstanceUID: str
    StudyInstanceUID: str = ""
    SeriesInstanceUID: str = ""
    reason: int = 0
    warning: int = 0
    comment: str = ""


def offered(landing: Landing) -> list[Operation]:
    """Storing, into any study or into one."""

    async def store(request: Request) -> Response:
        return await answer(landing, request)

    kinds = tuple(f'multipart/related; type="{kind}"' for kind in (DICOM, JSON, XML))
    return [
        Operation("POST", PREFIX + path, store, what, "STOW-RS", (JSON, XML), (), kinds, others=(202, 409))
        for path, what in (("/studies", "Store instances"), ("/studies/{study}", "Store into a study"))
    ]


async def answer(landing: Landing, request: Request) -> Response:
    """Take the body in as it comes; every instance is durable, or named with a reason, when this returns."""
    if landing.read_only:
        raise WebError("this archive takes nothing over HTTP (web.read_only)", http=403)
    study = uids(request).get("study", "")
    media_type = choose(accepted(request), (JSON, XML, "application/json"))
    taking = _taking(landing, request, study)
    try:
        try:
            await take_in(pieces(request, landing.idle_s), taking.feed)
            await to_thread.run_sync(taking.close)
        except Exception as error:
            request.state.found = stored = await to_thread.run_sync(taking.stored)
            if not isinstance(error, SphereError | OSError):
                raise
            known = storage_error(error, "keeping what came") if isinstance(error, OSError) else error
            told, later = (
                f"{known}; {stored} instances of the request had been stored",
                getattr(known, "retry_after", 0),
            )
            raise WebError(told, http=known.http, retry_after=later) from None
        outcomes = await to_thread.run_sync(taking.outcomes)
    finally:
        await to_thread.run_sync(taking.discard)
    request.state.found = sum(not one.reason for one in outcomes)
    return _response(outcomes, service_root(request), study, media_type)


class Taking(ABC):
    """One request's body, fed from one thread at a time."""

    def __init__(self, landing: Landing, reader: MultipartReader, study: str, who: str, address: str) -> None:
        self._landing, self._reader = landing, reader
        self._study, self._who, self._address = study, who, address
        self._sender = f"web-{secrets.token_hex(8)}"  # copies that landed before this request are recognised
        self._waiting: list[Future[Outcome]] = []
        self._done: list[Outcome] = []
        self._parts = 0

    def feed(self, data: bytes) -> None:
        """More of the body; raises WebError where it is not as it has to be."""
        for event in self._reader.feed(data):
            if isinstance(event, Head):
                self._parts += 1
                if self._parts > MAX_PARTS:
                    raise WebError(f"a request has at most {MAX_PARTS} parts", http=413)
            self.take(event)

    @abstractmethod
    def take(self, event: Event) -> None:
        """One event of the parts."""

    def close(self) -> None:
        """The body is over; raises WebError where it is not whole, or holds nothing."""
        self._reader.close()
        if not self._parts:
            raise WebError("the multipart body has no parts")

    def outcomes(self) -> list[Outcome]:
        """Of every instance, when all are durable."""
        self._settle(0)
        return self._done

    def stored(self) -> int:
        """How many were stored, of a request that went wrong."""
        return sum(not one.reason for one in self.outcomes())

    def discard(self) -> None:
        """Give back what waits."""
        self._settle(0)

    def land(self, file: ArrivingFile, *, wait: bool = False) -> None:
        """Store a file that is complete, in a thread of the pool."""
        self._settle(0 if wait else IN_FLIGHT - 1)
        self._waiting.append(self._landing.pool.submit(self._land, file))
        if not file.dataset.content.in_memory:  # its file is read from the beginning to the end
            self._settle(0)

    def fail(self, outcome: Outcome) -> None:
        """An instance that cannot be stored."""
        log.error("not stored instance=%s reason=0x%04X", hashed(outcome.SOPInstanceUID), outcome.reason)
        self._done.append(outcome)

    def _settle(self, most: int) -> None:
        """Wait until at most so many are under way."""
        while len(self._waiting) > most:
            self._done.append(self._waiting.pop(0).result())

    def _land(self, file: ArrivingFile) -> Outcome:
        try:
            return self._judged(file)
        except Exception as error:  # noqa: BLE001  a defect of ours costs one instance, and is told
            log.error("not stored: %s", type(error).__name__)
            return Outcome("", "", reason=PROCESSING_FAILURE, comment=type(error).__name__)
        finally:
            file.dataset.discard()

    def _judged(self, file: ArrivingFile) -> Outcome:
        origin = f"web:{self._who}@{self._address}"
        request = StoreRequest(
            AffectedSOPClassUID="", AffectedSOPInstanceUID="", TransferSyntaxUID=file.TransferSyntaxUID,
            dataset=file.stored, size=file.dataset.size, sha256=file.dataset.content.sha256, calling_ae="",
            address=self._address, via="web", problem=file.dataset.content.error, preamble=file.preamble, origin=origin,
            sender=self._sender,
        )  # fmt: skip
        if not file.is_part10 or not file.TransferSyntaxUID:
            return Outcome("", "", reason=CANNOT_UNDERSTAND, comment="no DICOM file with a transfer syntax")
        if request.problem is not None:
            answer = self._landing.store.land(request)
            return Outcome("", "", reason=answer.status, comment=answer.comment)
        found = identify_request(request)
        outcome = Outcome(found.SOPClassUID, found.SOPInstanceUID, found.StudyInstanceUID, found.SeriesInstanceUID)
        needed = (found.SOPInstanceUID, found.SOPClassUID, found.StudyInstanceUID, found.SeriesInstanceUID)
        if not all(map(UID.fullmatch, needed)):
            outcome.reason, outcome.comment = CANNOT_UNDERSTAND, "an identifying UID is missing, or is none"
        elif self._study and found.StudyInstanceUID != self._study:
            outcome.reason, outcome.comment = MISMATCH, "it is of another study than the request"
        else:
            answer = self._landing.store.land(request.of(found))
            outcome.comment = answer.comment
            if 0xB000 <= answer.status < 0xC000:
                outcome.warning = answer.status
            else:
                outcome.reason = answer.status
        return outcome


class _Files(Taking):
    """Parts that are DICOM files."""

    _file: ArrivingFile | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, Head):
            kind = event.headers.get("content-type", DICOM).partition(";")[0].strip().lower()
            if kind != DICOM:
                raise WebError(f"a part is {kind[:100]!r}, and not {DICOM}", http=415)
            self._file = ArrivingFile(self._landing.body)
        elif isinstance(event, Data):
            assert self._file is not None
            self._file.add(event.data)
        else:
            assert self._file is not None
            self._file.end()
            file, self._file = self._file, None
            self.land(file)

    def discard(self) -> None:
        super().discard()
        if self._file is not None:
            self._file.dataset.discard()


class _Described(Taking):
    """Metadata first, then the bulk data that they refer to by Content-Location."""

    def __init__(
        self, landing: Landing, reader: MultipartReader, study: str, who: str, address: str, root: str
    ) -> None:
        super().__init__(landing, reader, study, who, address)
        self._root = root
        self._waiting_parts = WaitingFile(landing.folder)
        self._bulk = BulkParts()
        self._metadata: list[ArrivingBody] = []
        self._bases: list[str] = []  # Content-Location of each metadata
        self._body: ArrivingBody | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, Head):
            self._body = self._landing.body(self._waiting_parts)
            kind = event.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind in (self._root, "application/json", "application/xml", "text/xml"):
                self._metadata.append(self._body)
                self._bases.append(event.headers.get("content-location", ""))
            elif location := event.headers.get("content-location"):
                self._bulk.add(location, event.headers.get("content-type", ""), self._body)
            else:
                self._metadata.append(self._body)  # to be given back
                raise WebError("a part with bulk data has no Content-Location")
        elif isinstance(event, Data):
            assert self._body is not None
            self._body.add(event.data)
            if self._metadata and self._body is self._metadata[-1] and self._body.size > MAX_METADATA:
                raise WebError(f"metadata has at most {MAX_METADATA >> 20} MiB", http=413)

    def close(self) -> None:
        super().close()
        if not self._metadata:
            raise WebError(f"there is no part of type {self._root}")
        for body, base in zip(self._metadata, self._bases, strict=True):
            with nullcontext() if body.size <= SMALL_METADATA else self._landing.reading.taking(body.size):
                self._read(body, Described(self._bulk, base))

    def _read(self, body: ArrivingBody, described: Described) -> None:
        text = body.tobytes(MAX_METADATA, "metadata")
        for header in read_json(text) if self._root == JSON else read_xml(text):
            self._make(described, header)

    def _make(self, described: Described, header: Any) -> None:
        file = ArrivingFile(self._landing.body)
        try:
            described.write(header, file)
        except (Unusable, StorageError, OSError) as error:
            file.dataset.discard()
            reason = CANNOT_UNDERSTAND if isinstance(error, Unusable) else OUT_OF_RESOURCES
            comment = str(error.strerror if isinstance(error, OSError) else error)
            sop_class, sop = _named(header, "00080016"), _named(header, "00080018")
            self.fail(Outcome(sop_class, sop, reason=reason, comment=comment))
            return
        except BaseException:
            file.dataset.discard()
            raise
        self.land(file, wait=True)

    def discard(self) -> None:
        super().discard()
        for body in (*self._metadata, *self._bulk.bodies()):
            body.discard()
        self._waiting_parts.close()


def _taking(landing: Landing, request: Request, study: str) -> Taking:
    """What takes in a body of this Content-Type; raises WebError (415)."""
    text = request.headers.get("content-type", "")
    kind = next(iter(parse(text)), None)
    if kind is None or kind.type != "multipart/related":
        raise WebError("Content-Type must be multipart/related", http=415)
    root = kind.parameters.get("type", DICOM).lower()
    who = str(getattr(request.state, "who", "") or "")
    address = request.client.host if request.client else ""
    reader = MultipartReader(kind.parameters.get("boundary", ""))
    if root == DICOM:
        return _Files(landing, reader, study, who, address)
    if root in (JSON, XML):
        return _Described(landing, reader, study, who, address, root)
    raise WebError(f"cannot store {root!r}; {DICOM}, {JSON} and {XML} can be stored", http=415)


def _named(header: Any, tag: str) -> str:
    """A UID of metadata that could not be stored, if it is one."""
    try:
        text = str(header[tag]["Value"][0])
    except (LookupError, TypeError):
        return ""
    return text if UID.fullmatch(text) else ""


def _response(outcomes: Iterable[Outcome], base: str, study: str, media_type: str) -> Response:
    """The Store Instances Response Module (PS3.18 I.2)."""
    stored = [one for one in outcomes if not one.reason]
    failed = [one for one in outcomes if one.reason]
    studies = {study} if study else {one.StudyInstanceUID for one in stored}
    body: dict[str, Any] = {}
    if len(studies) == 1:
        body["00081190"] = {"vr": "UR", "Value": [f"{base}/studies/{studies.pop()}"]}
    if failed:
        body["00081198"] = {"vr": "SQ", "Value": [_failed(one) for one in failed]}
    if stored:
        body["00081199"] = {"vr": "SQ", "Value": [_referenced(one, base) for one in stored]}
    warned = any(one.warning for one in stored)
    status = 409 if failed and not stored else 202 if failed or warned else 200
    if media_type == XML:
        return Response(native_model(body), status, media_type=XML)
    return Response(orjson.dumps(body), status, media_type=media_type)


def _of(outcome: Outcome) -> dict[str, Any]:
    item: dict[str, Any] = {}
    for tag, uid in (("00081150", outcome.SOPClassUID), ("00081155", outcome.SOPInstanceUID)):
        item[tag] = {"vr": "UI", "Value": [uid]} if uid else {"vr": "UI"}
    return item


def _failed(one: Outcome) -> dict[str, Any]:
    comment = {"00000902": {"vr": "LO", "Value": [one.comment[:64]]}} if one.comment else {}  # Error Comment
    return {**comment, **_of(one), "00081197": {"vr": "US", "Value": [one.reason]}}


def _referenced(one: Outcome, base: str) -> dict[str, Any]:
    url = f"{base}/studies/{one.StudyInstanceUID}/series/{one.SeriesInstanceUID}/instances/{one.SOPInstanceUID}"
    item = {**_of(one), "00081190": {"vr": "UR", "Value": [url]}}
    if one.warning:
        item["00081196"] = {"vr": "US", "Value": [one.warning]}
    return dict(sorted(item.items()))
