"""Where answers come from: the Delta tables, or the headers in the bundles (``catalog.mode``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from sphere.catalog.cancel import Cancelled, never
from sphere.conf.settings import Settings

if TYPE_CHECKING:
    from sphere.catalog.answer import Match
    from sphere.catalog.asof import AsOf
    from sphere.catalog.grant import Grant
    from sphere.catalog.known import KnownVersion
    from sphere.catalog.query import Query
    from sphere.catalog.service import StoredInstance


class Queries(Protocol):
    """What answers queries, whatever it answers from. One per process, shared by its threads."""

    def __enter__(self) -> Queries: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """Let go of what was opened."""

    def restricted(self, grant: Grant) -> Queries:
        """The same as if the archive held what is granted alone: counts, roll-ups and all. Closed with this one."""

    def find(
        self, query: Query, *, as_of: AsOf | None = None, ae_title: str = "", cancelled: Cancelled = never
    ) -> Iterator[Match]:
        """The entities that match, in the order of their unique keys, as they are found; to be retrieved from
        `ae_title`, by default that of the archive. Ends early where `cancelled`. Raises CatalogError and
        StorageError."""

    def count(self, query: Query, *, as_of: AsOf | None = None, cancelled: Cancelled = never) -> int:
        """How many entities match; of no meaning where it was `cancelled`."""

    def lookup_instances(
        self,
        *,
        study: Sequence[str] = (),
        series: Sequence[str] = (),
        sop: Sequence[str] = (),
        as_of: AsOf | None = None,
    ) -> Iterator[StoredInstance]:
        """Where instances are, in the order of the bundles. Given several, all must hold; given none, every one."""

    def lookup_headers(
        self, *, study: str, series: str = "", sop: str = "", as_of: AsOf | None = None
    ) -> Iterator[tuple[StoredInstance, str]]:
        """The instances of a study, a series or with a SOPInstanceUID, each with its header as DICOM JSON text."""

    def newest(self) -> AsOf:
        """The version that is complete now, for `as_of`; raises CatalogError where nothing was extracted yet."""

    def deletions(self) -> str:
        """A text that is another one after every deletion and its undoing: what was remembered before is to be looked
        up again. Raises StorageError."""

    def versions_of(self, study: str, *, seen: str, load: bool) -> tuple[str, list[KnownVersion]] | None:
        """What the catalog shows of a study, and the name of the index that says so; None where that is the one `seen`,
        or where there is no index at hand. `load` has one opened in the background. Raises CatalogError."""


def open_queries(settings: Settings, *, apart: bool = False) -> Queries:
    """What ``catalog.mode`` names; `apart` where the process serves others, who should not notice that an index is
    made."""
    if settings.catalog.mode == "delta":
        from sphere.catalog.service import QueryService

        return QueryService(settings, apart=apart)
    from sphere.catalog.files import FileQueries

    return FileQueries(settings)


class LateQueries:
    """Queries that are opened, and their libraries loaded, when the first one comes.

    DuckDB, Arrow and their kin are 35 MB, of which a process that only receives needs nothing.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._opened: Queries | None = None

    def __enter__(self) -> LateQueries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what was opened, if anything was."""
        with self._lock:
            if self._opened is not None:
                self._opened.close()

    @property
    def is_open(self) -> bool:
        """Whether a query has come."""
        return self._opened is not None

    def restricted(self, grant: Grant) -> Queries:
        """As of Queries."""
        return self._queries().restricted(grant)

    def find(
        self, query: Query, *, as_of: AsOf | None = None, ae_title: str = "", cancelled: Cancelled = never
    ) -> Iterator[Match]:
        """As of Queries."""
        return self._queries().find(query, as_of=as_of, ae_title=ae_title, cancelled=cancelled)

    def lookup_instances(
        self,
        *,
        study: Sequence[str] = (),
        series: Sequence[str] = (),
        sop: Sequence[str] = (),
        as_of: AsOf | None = None,
    ) -> Iterator[StoredInstance]:
        """As of Queries."""
        return self._queries().lookup_instances(study=study, series=series, sop=sop, as_of=as_of)

    def versions_of(self, study: str, *, seen: str, load: bool) -> tuple[str, list[KnownVersion]] | None:
        """As of Queries; nothing is opened for it without `load`."""
        if self._opened is None and not load:
            return None
        return self._queries().versions_of(study, seen=seen, load=load)

    def _queries(self) -> Queries:
        with self._lock:
            if self._opened is None:
                self._opened = open_queries(self._settings, apart=True)
            return self._opened
