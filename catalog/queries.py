"""Where answers come from: the Delta tables, or the headers in the bundles (``catalog.mode``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol

from sphere.catalog.answer import Match
from sphere.catalog.asof import AsOf
from sphere.catalog.files import FileQueries
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService, StoredInstance
from sphere.conf.settings import Settings


class Queries(Protocol):
    """What answers queries, whatever it answers from. One per process, shared by its threads."""

    def __enter__(self) -> Queries: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """Let go of what was opened."""

    def find(self, query: Query, *, as_of: AsOf | None = None, ae_title: str = "") -> Iterator[Match]:
        """The entities that match, in the order of their unique keys, as they are found; to be retrieved from
        `ae_title`, by default that of the archive. Raises CatalogError and StorageError."""

    def count(self, query: Query, *, as_of: AsOf | None = None) -> int:
        """How many entities match."""

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


def open_queries(settings: Settings) -> Queries:
    """What ``catalog.mode`` names."""
    return QueryService(settings) if settings.catalog.mode == "delta" else FileQueries(settings)
