"""The headers of some studies read and asked a question: the work of one step of a query without a catalog.

It runs in the serving process or in others beside it (`Scanner`). A study's rows are rolled up as extraction does it,
from the instances that extraction would show; nothing of a study is kept but its roll-ups and what matches.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import orjson

from sphere.catalog.arrivals import HeadersOfMembers
from sphere.catalog.entity import Question
from sphere.catalog.fold import FoldedStudy
from sphere.catalog.headers import Attribute, attributes_of, take_private
from sphere.catalog.match_header import holds
from sphere.catalog.versions import Order, order
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from sphere.ingest.header import Header
from sphere.ingest.records import MemberRecord
from sphere.ingest.spool import open_readable

Study = tuple[str, list[MemberRecord]]
"""A StudyInstanceUID and its members."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class Found:
    """An entity that matches as far as its study says: `identity` orders it among the answers."""

    identity: tuple[str, ...]
    patient_key: str
    values: dict[int, Any]
    header: dict[str, Any]


@dataclass(slots=True)
class Summary:
    """What a study adds to its patient: its row of `studies`, and the elements asked for of its earliest instances."""

    row: dict[str, Any]
    elements: dict[str, tuple[Order, Any]]
    holds_below: bool


class Chains:
    """The series of a study that have an instance for which holds what is asked below the level, as far as instances
    say."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._series: set[str] = set()

    def add(self, row: dict[str, Any]) -> None:
        """One more instance."""
        if row["SeriesInstanceUID"] not in self._series and self._question.holds_below("i", row):
            self._series.add(row["SeriesInstanceUID"])

    def of_series(self, row: dict[str, Any]) -> bool:
        """Whether a series (its row of `series`) has all that is asked below it."""
        return row["SeriesInstanceUID"] in self._series

    def of_study(self, row: dict[str, Any], series: Sequence[dict[str, Any]]) -> bool:
        """Whether a study (its row of `studies`, and those of its series) has all that is asked below it, or is what
        a patient is asked for."""
        ask = self._question
        return ask.holds_below("t", row) and any(ask.holds_below("s", one) and self.of_series(one) for one in series)


@dataclass(slots=True)
class Earliest:
    """The elements of an entity, each of its earliest instance that has a value (see sphere.catalog.headers)."""

    wanted: Sequence[Attribute]
    elements: dict[str, tuple[Order, Any]] = field(default_factory=dict)

    def add(self, at: Order, header: dict[str, Any]) -> None:
        """One more instance of the entity."""
        found: dict[str, Any] = {}
        take_private(found, header, [one for one in self.wanted if one[1]])
        for tag, creator in self.wanted:
            element = header.get(f"{tag:08X}") if not creator else None
            if element and element.get("Value"):
                found[f"{tag:08X}"] = element
        for name, element in found.items():
            known = self.elements.get(name)
            if known is None or at < known[0]:
                self.elements[name] = at, element

    def header(self) -> dict[str, Any]:
        """The elements as one DICOM JSON object."""
        return {name: element for name, (_, element) in self.elements.items()}


def wanted_of(question: Question) -> list[Attribute]:
    """The attributes that headers must give."""
    return sorted(attributes_of(question.rest) | {(key.tag, key.creator) for key in question.header_keys})


def summaries(reader: HeadersOfMembers, question: Question, studies: Sequence[Study]) -> list[Summary]:
    """The summary of each study that has an instance."""
    wanted = wanted_of(question) if question.query.level == "PATIENT" else []
    found = []
    for uid, members in studies:
        folded, earliest, chains = FoldedStudy(uid), Earliest(wanted), Chains(question)
        for record, header in _headers(reader, members):
            row = _row(record, header)
            folded.add(row)
            chains.add(row)
            if wanted:
                earliest.add(order(record), orjson.loads(header.dataset))
        series = folded.series()
        found += [Summary(row, earliest.elements, chains.of_study(row, series)) for row in folded.study()]
    return found


def matches(reader: HeadersOfMembers, question: Question, studies: Sequence[Study]) -> list[Found]:
    """The entities of STUDY, SERIES or IMAGE level that match, patients' counts aside."""
    ask = {"STUDY": _studies, "SERIES": _series, "IMAGE": _instances}[question.query.level]
    return [found for study in studies for found in sorted(ask(reader, question, *study), key=lambda one: one.identity)]


def _studies(reader: HeadersOfMembers, question: Question, uid: str, members: list[MemberRecord]) -> Iterator[Found]:
    folded, earliest, chains = FoldedStudy(uid), Earliest(wanted_of(question)), Chains(question)
    for record, header in _headers(reader, members):
        row = _row(record, header)
        folded.add(row)
        chains.add(row)
        if question.needs_header:
            earliest.add(order(record), orjson.loads(header.dataset))
    for row in folded.study():
        fits = question.holds("t", row) and chains.of_study(row, folded.series())
        if fits and holds(question.rest, earliest.header()):
            yield Found((uid,), row["patient_key"], question.values("t", row), earliest.header())


def _series(reader: HeadersOfMembers, question: Question, uid: str, members: list[MemberRecord]) -> Iterator[Found]:
    folded, chains = FoldedStudy(uid), Chains(question)
    wanted = wanted_of(question)
    earliest: dict[str, Earliest] = {}
    for record, header in _headers(reader, members):
        row = _row(record, header)
        folded.add(row)
        chains.add(row)
        one = earliest.setdefault(header.values["SeriesInstanceUID"], Earliest(wanted))
        if question.needs_header:
            one.add(order(record), orjson.loads(header.dataset))
    for study in folded.study():
        if not question.holds("t", study):
            return
        values = question.values("t", study)
        for row in folded.series():
            header_ = earliest[row["SeriesInstanceUID"]].header()
            if question.holds("s", row) and chains.of_series(row) and holds(question.rest, header_):
                identity = uid, row["SeriesInstanceUID"]
                yield Found(identity, study["patient_key"], {**values, **question.values("s", row)}, header_)


def _instances(reader: HeadersOfMembers, question: Question, uid: str, members: list[MemberRecord]) -> Iterator[Found]:
    """What no instance of the study can change is asked after the last one."""
    rolled = any(question.uses(alias) for alias in "pts")
    folded = FoldedStudy(uid)
    wanted = [f"{key.tag:08X}" for key in question.header_keys if not key.creator]
    kept: list[Found] = []
    for record, header in _headers(reader, members):
        row = _row(record, header)
        if rolled:
            folded.add(row)
        dataset = orjson.loads(header.dataset) if question.needs_header else {}
        if question.holds("i", row) and holds(question.rest, dataset):
            elements = {name: dataset[name] for name in wanted if name in dataset}
            take_private(elements, dataset, [(key.tag, key.creator) for key in question.header_keys if key.creator])
            identity = uid, row["SeriesInstanceUID"], row["SOPInstanceUID"]
            kept.append(Found(identity, "", question.values("i", row), elements))
    if not rolled:
        yield from kept
        return
    series = {row["SeriesInstanceUID"]: row for row in folded.series()} if kept else {}
    for study in folded.study() if kept else ():
        if question.holds("t", study):
            fits = {name: question.values("s", row) for name, row in series.items() if question.holds("s", row)}
            for found in kept:
                if found.identity[1] in fits:
                    values = {**question.values("t", study), **fits[found.identity[1]], **found.values}
                    yield Found(found.identity, study["patient_key"], values, found.header)


def _headers(reader: HeadersOfMembers, members: Iterable[MemberRecord]) -> Iterator[tuple[MemberRecord, Header]]:
    for record, header, _ in reader.headers(members):
        if header is not None:
            yield record, header


def _row(record: MemberRecord, header: Header) -> dict[str, Any]:
    """What roll-ups are made of."""
    return {
        **header.values,
        "received_at": record.received_at,
        "bundle": record.bundle,
        "offset": record.offset,
        "length": record.length,
    }


def pixel_offsets(
    reader: HeadersOfMembers, members: Sequence[MemberRecord]
) -> list[tuple[MemberRecord, str, int | None]]:
    """(member, SOP class, where its pixel data begin) of those that are instances."""
    return [
        (record, header.values.get("SOPClassUID") or record.SOPClassUID, header.pixel_offset)
        for record, header in _headers(reader, members)
    ]


def whole_headers(
    reader: HeadersOfMembers, members: Sequence[MemberRecord]
) -> list[tuple[MemberRecord, str, int | None, str]]:
    """(member, SOP class, where its pixel data begin, header as DICOM JSON) of those that are instances."""
    return [
        (record, header.values.get("SOPClassUID") or record.SOPClassUID, header.pixel_offset, header.dataset.decode())
        for record, header in _headers(reader, members)
    ]


class Scanner:
    """Reads headers for queries: small steps in this process, others in `catalog.scan_workers` processes beside it.

    These start with the first large query, and end with this process, however it ends.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._local = threading.local()
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def run(self, step: Callable[..., R], work: Iterable[tuple[Any, ...]], *, alone: bool) -> Generator[R, None, None]:
        """`step(reader, *arguments)` for each of `work`, results in order and as they come; a few steps ahead at most.

        `alone`: in this process. Raises CatalogError where a process beside it died.
        """
        if alone or not self._settings.catalog.scan_workers:
            for arguments in work:
                yield step(self._reader(), *arguments)
            return
        ahead: deque[tuple[ProcessPoolExecutor, Future[R]]] = deque()
        pool = self._workers()
        try:
            for arguments in work:
                pool = self._workers()
                ahead.append((pool, pool.submit(_step, step, arguments)))
                if len(ahead) > 2 * self._settings.catalog.scan_workers:
                    pool, first = ahead.popleft()
                    yield first.result()
            while ahead:
                pool, first = ahead.popleft()
                yield first.result()
        except BrokenProcessPool:
            self._drop(pool)
            raise CatalogError("a process that reads headers died; ask again") from None
        finally:
            for _, future in ahead:
                future.cancel()

    def close(self) -> None:
        """End the processes, after the steps that they are at."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _reader(self) -> HeadersOfMembers:
        if not hasattr(self._local, "reader"):
            self._local.reader = open_reader(self._settings)
        reader: HeadersOfMembers = self._local.reader
        return reader

    def _workers(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    self._settings.catalog.scan_workers,
                    mp_context=get_context("spawn"),  # never fork: HDFS clients own threads
                    initializer=_begin,
                    initargs=(self._settings,),
                )
            return self._pool

    def _drop(self, broken: ProcessPoolExecutor) -> None:
        """Let go of processes one of which died; others, that were started since, are at work for other queries."""
        with self._lock:
            if self._pool is broken:
                self._pool = None
        broken.shutdown(wait=False, cancel_futures=True)


def open_reader(settings: Settings) -> HeadersOfMembers:
    """Reads headers of everything that landed."""
    return HeadersOfMembers(open_readable(settings), settings.extract.max_header_mib << 20)


_own_reader: HeadersOfMembers | None = None  # of a process beside the serving one


def _begin(settings: Settings) -> None:
    global _own_reader  # noqa: PLW0603  a process of the pool has no other place
    _own_reader = open_reader(settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the serving process decides about Ctrl-C
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.join,), daemon=True, name="end-with-parent").start()


def _end_with(wait: Callable[[], None]) -> None:
    wait()
    os._exit(1)


def _step(step: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    assert _own_reader is not None
    return step(_own_reader, *arguments)
