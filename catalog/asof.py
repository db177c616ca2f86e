"""An earlier state of the catalog: which version of each table belongs to a batch of extraction, or to a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone

from sphere.catalog.tables import CatalogTables, Snapshot
from sphere.conf.errors import CatalogError, QueryError

SETTLED = timedelta(minutes=1)
"""How long ago a time must be for every commit before it to be there: what clocks of hosts may differ by."""

AsOf = int | datetime
"""A version of table `bundles`, which extraction commits last in each batch; or a time (UTC where it has no zone): the
last batch that was complete by then."""


def parse_as_of(text: str) -> AsOf:
    """A version, or an RFC 3339 date or time; raises QueryError where it is neither."""
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    try:
        return datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    except ValueError:
        raise QueryError(f"as of {text!r}: neither a version (a number) nor a time (2026-01-31T12:00:00Z)") from None


def is_settled(as_of: AsOf) -> bool:
    """Whether later commits cannot change what it means: a version, or a time a while ago."""
    if not isinstance(as_of, datetime):
        return True
    aware = as_of if as_of.tzinfo else as_of.replace(tzinfo=timezone.utc)
    return aware < datetime.now(timezone.utc) - SETTLED


def snapshots_as_of(tables: CatalogTables, names: Sequence[str], as_of: AsOf) -> Mapping[str, Snapshot | None]:
    """The versions of the tables as of then.

    A batch begins after the one before is complete, and one process writes at a time: what was committed up to the
    commit of `bundles` is that batch. Raises CatalogError where there is no such version, or the log no longer has it.
    """
    batch, moment = _batch(tables, as_of)
    found = {name: batch if name == "bundles" else _last(tables.commits(name), moment) for name in names}
    return {name: None if version is None else tables.snapshot(name, version) for name, version in found.items()}


def _batch(tables: CatalogTables, as_of: AsOf) -> tuple[int, int]:
    """The version of `bundles`, and when it was committed, in ms since 1970."""
    commits = tables.commits("bundles")
    if isinstance(as_of, datetime):
        aware = as_of if as_of.tzinfo else as_of.replace(tzinfo=timezone.utc)
        version = _last(commits, int(aware.timestamp() * 1000))
    else:
        version = as_of if as_of in commits else None
    if version is None:
        known = f"versions {min(commits)} to {max(commits)} are known" if commits else "nothing was extracted yet"
        raise CatalogError(f"the catalog has no version as of {as_of}: {known}")
    return version, commits[version]


def _last(commits: Mapping[int, int], moment: int) -> int | None:
    return max((version for version, time in commits.items() if time <= moment), default=None)
