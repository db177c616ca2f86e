"""Answers without a catalog (``catalog.mode = "files"``): the headers in the bundles are read for each query.

The journals say which instances there are and of which studies; a query that names UIDs looks at their studies only,
any other at all of them. Studies are read and rolled up in parallel, and what matches is given as it is found, in the
order of unique keys. Slow, with the answers of the tables. See docs/decisions/0020-without-a-catalog.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from types import TracebackType
from typing import Any

from sphere.catalog.answer import Match, constants_of
from sphere.catalog.asof import AsOf
from sphere.catalog.cancel import Cancelled, never
from sphere.catalog.entity import Question, take_apart
from sphere.catalog.fold import Fold
from sphere.catalog.grant import Grant
from sphere.catalog.match import Exact
from sphere.catalog.match_header import holds
from sphere.catalog.members import UIDS, Members
from sphere.catalog.query import Query
from sphere.catalog.rollup import description
from sphere.catalog.scan import Scanner, Study, Summary, matches, pixel_offsets, summaries, whole_headers
from sphere.catalog.service import StoredInstance
from sphere.catalog.versions import Order
from sphere.conf.errors import CatalogError
from sphere.conf.settings import Settings
from sphere.ingest.records import MemberRecord

STEP = 200
"""Members of one step, whole studies: what one process reads before it gives its matches."""
ALONE = 400
"""Members up to which a query is answered without the processes beside this one."""

_NO_STATES = 'no earlier states are kept with catalog.mode = "files"; they need "delta" and sphere extract'


class FileQueries:
    """Finds patients, studies, series and instances in the bundles. One per process, shared by its threads."""

    def __init__(self, settings: Settings) -> None:
        self._ae_title = settings.archive.ae_title
        self._members = Members(settings)
        self._scanner = Scanner(settings)

    def __enter__(self) -> FileQueries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that read headers."""
        self._scanner.close()
        self._members.close()

    def restricted(self, grant: Grant) -> FileQueries:
        """The same as if nothing but what is granted had been stored; raises CatalogError for a grant of patients."""
        part = copy.copy(self)
        part._members = self._members.restricted(grant)
        return part

    def newest(self) -> AsOf:
        """Raises CatalogError."""
        raise CatalogError(_NO_STATES)

    def deletions(self) -> str:
        """As of sphere.catalog.queries.Queries."""
        return self._members.tombstones.state()

    def versions_of(self, study: str, *, seen: str, load: bool) -> None:
        """There is no index: what journals do not say is not known."""
        return

    def find(
        self, query: Query, *, as_of: AsOf | None = None, ae_title: str = "", cancelled: Cancelled = never
    ) -> Iterator[Match]:
        """The entities that match, in the order of their unique keys, as they are found; to be retrieved from
        `ae_title`, by default that of the archive.

        Closing the iterator cancels the query, and so does `cancelled`, asked after each step. Raises CatalogError for
        any `as_of`, and StorageError.
        """
        _refuse(as_of)
        title = ae_title or self._ae_title
        constants = constants_of(query, title)
        if constants is None:
            return
        self._members.catch_up()
        question = take_apart(query)
        ask = self._patients if query.level == "PATIENT" else self._below
        for values, header in ask(question, cancelled):
            yield Match(query.level, question.keys, {**constants, **values}, header, title, query.timezone)

    def count(self, query: Query, *, as_of: AsOf | None = None, cancelled: Cancelled = never) -> int:
        """How many entities match."""
        return sum(1 for _ in self.find(query, as_of=as_of, cancelled=cancelled))

    def lookup_instances(
        self,
        *,
        study: Sequence[str] = (),
        series: Sequence[str] = (),
        sop: Sequence[str] = (),
        as_of: AsOf | None = None,
    ) -> Iterator[StoredInstance]:
        """Where the instances of some studies, series or with some SOPInstanceUIDs are, in the order of the bundles.

        Given several, all must hold; given none, every instance. Raises CatalogError for any `as_of`, and StorageError.
        """
        _refuse(as_of)
        self._members.catch_up()
        wanted = {name: uids for name, uids in zip(UIDS, (study, series, sop), strict=True) if uids}
        work = ((page,) for page in _pages(self._members.by_place(wanted)))
        for found in self._scanner.run(pixel_offsets, work, alone=bool(wanted)):
            for record, sop_class, pixel_offset in found:
                yield _stored(record, sop_class, pixel_offset)

    def lookup_headers(
        self, *, study: str, series: str = "", sop: str = "", as_of: AsOf | None = None
    ) -> Iterator[tuple[StoredInstance, str]]:
        """The instances of a study, a series or with a SOPInstanceUID, each with its header as DICOM JSON text.

        Raises CatalogError for any `as_of`, and StorageError.
        """
        _refuse(as_of)
        self._members.catch_up()
        wanted: dict[str, Sequence[str]] = {
            name: [uid] for name, uid in zip(UIDS, (study, series, sop), strict=True) if uid
        }
        work = ((page,) for page in _pages(self._members.by_place(wanted)))
        for found in self._scanner.run(whole_headers, work, alone=True):
            for record, sop_class, pixel_offset, header in found:
                yield _stored(record, sop_class, pixel_offset), header

    def _below(self, question: Question, cancelled: Cancelled) -> Iterator[tuple[dict[int, Any], dict[str, Any]]]:
        """Matches of the levels below PATIENT; counts of patients take a look at every study first."""
        patients = dict(self._rolled(question, cancelled)) if question.uses("p") else {}
        for found in self._run(matches, question, self._studies(question.query), cancelled):
            for one in found:
                patient = patients[one.patient_key][0] if patients else {}
                if question.holds("p", patient):
                    yield {**one.values, **question.values("p", patient)}, one.header

    def _patients(self, question: Question, cancelled: Cancelled) -> Iterator[tuple[dict[int, Any], dict[str, Any]]]:
        """Matches of PATIENT level: one small row a patient is held."""
        for _, (row, header) in sorted(self._rolled(question, cancelled), key=lambda pair: pair[0]):
            if question.holds("p", row) and holds(question.rest, header):
                yield question.values("p", row), header

    def _rolled(
        self, question: Question, cancelled: Cancelled
    ) -> Iterator[tuple[str, tuple[dict[str, Any], dict[str, Any]]]]:
        """(patient_key, (row of `patients`, elements of headers)) of every patient; at PATIENT level of those that have
        what is asked of lower ones."""
        spec = description("patients")
        folds: dict[str, Fold] = {}
        having: set[str] = set()  # what is asked of levels below
        elements: dict[str, dict[str, tuple[Order, Any]]] = {}
        for found in self._run(summaries, question, None, cancelled):
            for summary in found:
                key = summary.row["patient_key"]
                folds.setdefault(key, Fold(spec)).add({**dict.fromkeys(spec.order), **summary.row})
                _take_earliest(elements.setdefault(key, {}), summary)
                if summary.holds_below or question.query.level != "PATIENT":
                    having.add(key)
        for key, fold in {} if cancelled() else folds.items():
            if key in having:
                yield key, (fold.row((key,)), {name: element for name, (_, element) in elements[key].items()})

    def _studies(self, query: Query) -> list[str] | None:
        """The studies that a query's UIDs leave; None where it names none."""
        wanted: dict[str, Sequence[str]] = {}
        for key in query.keys:
            if key.keyword in UIDS and isinstance(key.test, Exact):
                wanted[key.keyword] = key.test.texts
        return self._members.studies_of(wanted)

    def _run(self, step: Any, question: Question, studies: Sequence[str] | None, cancelled: Cancelled) -> Iterator[Any]:
        work = ((question, part) for part in _steps(self._members.by_study(studies)))
        results = self._scanner.run(step, work, alone=self._members.count(studies) <= ALONE)
        with closing(results):
            for result in results:
                if cancelled():
                    return
                yield result


def _refuse(as_of: AsOf | None) -> None:
    if as_of is not None:
        raise CatalogError(_NO_STATES)


def _take_earliest(known: dict[str, tuple[Order, Any]], summary: Summary) -> None:
    for name, (at, element) in summary.elements.items():
        if name not in known or at < known[name][0]:
            known[name] = at, element


def _steps(members: Iterator[MemberRecord]) -> Iterator[list[Study]]:
    """Whole studies of about STEP members together."""
    part: list[Study] = []
    size = 0
    for uid, group in groupby(members, key=lambda record: record.StudyInstanceUID):
        part.append((uid, list(group)))
        size += len(part[-1][1])
        if size >= STEP:
            yield part
            part, size = [], 0
    if part:
        yield part


def _pages(members: Iterable[MemberRecord]) -> Iterator[list[MemberRecord]]:
    page: list[MemberRecord] = []
    for member in members:
        page.append(member)
        if len(page) == STEP:
            yield page
            page = []
    if page:
        yield page


def _stored(record: MemberRecord, sop_class: str, pixel_offset: int | None) -> StoredInstance:
    return StoredInstance(
        record.StudyInstanceUID, record.SeriesInstanceUID, record.SOPInstanceUID, sop_class, record.TransferSyntaxUID,
        record.bundle, record.offset, record.length, record.dataset_offset, pixel_offset, record.sha256,
    )  # fmt: skip
