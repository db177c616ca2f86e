"""Where the versions of an instance stand in time, and which is shown; extraction and recent arrivals share it.

A version is known by its digest and stands where its bytes first arrived; the same bytes again change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Protocol, TypeVar

from sphere.conf.settings import OnConflict

Policy = OnConflict
Order = tuple[datetime, str, int]
Place = tuple[str, int]


class Version(Protocol):
    """What a member of a bundle and a row of `instances` have in common."""

    @property
    def received_at(self) -> datetime: ...
    @property
    def bundle(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def sha256(self) -> str: ...


V = TypeVar("V", bound=Version)


def order(version: Version) -> Order:
    """Where a member stands in time; no two members stand at the same place."""
    return version.received_at, version.bundle, version.offset


def place(version: Version) -> Place:
    """Where a member's bytes are: bundle and offset."""
    return version.bundle, version.offset


def in_line(versions: Iterable[V]) -> list[V]:
    """The first arrival of each digest, in the order of arrival."""
    first: dict[str, V] = {}
    for version in sorted(versions, key=order):
        first.setdefault(version.sha256, version)
    return list(first.values())


def shown(versions: Iterable[V], policy: Policy) -> V:
    """The version (of at least one) that `instances` shows: ``replace`` the newest one, else the first."""
    return in_line(versions)[-1 if policy == "replace" else 0]
