"""`sphere find`: the same keys asked of a peer over C-FIND, or of this archive's own catalog; where what matches is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from pydicom.dataset import Dataset

from sphere.catalog.asof import parse_as_of
from sphere.catalog.queries import Queries, open_queries
from sphere.catalog.query import Features, Model, Query
from sphere.catalog.schema import Level
from sphere.catalog.service import StoredInstance
from sphere.conf.errors import BadRequest, QueryError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings

BATCH = 2000  # instances looked up at once
MOST = 10**12 - 1
"""Answers that an offset or a limit may count, as in a search of QIDO-RS (twelve digits)."""
T = TypeVar("T")


def part_of(answers: Iterable[T], *, offset: int, limit: int | None) -> Iterator[T]:
    """At most `limit` answers after the first `offset`; raises QueryError for numbers that count nothing."""
    if not 0 <= offset <= MOST or not 0 <= (limit or 0) <= MOST:
        raise QueryError(f"offset and limit count answers: they are not negative, nor above {MOST}")
    return islice(answers, offset, None if limit is None else offset + limit)


def find_there(
    peer: Peer,
    keys: Mapping[str, str],
    *,
    settings: Settings,
    level: Level,
    model: Model,
    features: Features,
    timezone: str,
) -> Iterator[Dataset]:
    """What a peer answers; raises QueryError for a bad key, PeerError where it refuses, fails or lacks a feature."""
    from sphere.scp.client.query import find

    asked = {**keys, "TimezoneOffsetFromUTC": timezone} if timezone else dict(keys)
    return find(peer, asked, settings=settings, level=level, model=model, features=features)


def find_here(
    settings: Settings,
    keys: Mapping[str, str],
    *,
    level: Level,
    model: Model,
    features: Features,
    timezone: str,
    as_of: str | None,
) -> Iterator[Dataset]:
    """What this archive's own catalog answers, as of a version or time where one is given; see `query_here`.

    Raises QueryError and CatalogError.
    """
    query = query_here(keys, level=level, model=model, features=features, timezone=timezone)
    when = None if as_of is None else parse_as_of(as_of)
    with open_queries(settings) as queries:
        for match in queries.find(query, as_of=when):
            yield match.identifier()


def query_here(keys: Mapping[str, str], *, level: Level, model: Model, features: Features, timezone: str) -> Query:
    """What is asked of this archive itself: every key is matched, those too that a peer passes over (PS3.4
    C.4.1.1.3.1).

    No unique keys above the level are needed, `""` finds what has no value, and several values what has all of them. A
    level that the model lacks is asked in Patient Root. Raises QueryError.
    """
    from sphere.scp.identifier import DEFAULT_KEYS, parse_keys

    return Query.build(
        level,
        parse_keys(keys),
        return_keys=() if any(not value for value in keys.values()) else DEFAULT_KEYS[level],
        model="PATIENT_ROOT" if level == "PATIENT" else model,
        combined_datetime=features.combined_datetime,
        fuzzy_names=features.fuzzy_names,
        empty_values=True,
        multiple_values=True,
        timezone=timezone,
    )


def instances_matching(keys: Mapping[str, Any]) -> Query:
    """The query for the instances that match keys of any level, with the meaning that `query_here` gives them.

    What is to be sent or deleted is chosen by this: raises BadRequest where a key matches everything, as one does that
    was left empty, and where there is none; QueryError for what PS3.4 C.2.2.2 does not allow.
    """
    if not keys:
        raise BadRequest("no key chooses everything there is: give one")
    for name, value in keys.items():
        query = _of_instances({name: value})
        if not query.predicate():
            raise BadRequest(f"{query.keys[0].name}: this value chooses everything there is; give another, or no key")
    return _of_instances(keys)


def every_instance() -> Query:
    """The query for all that the archive has."""
    return _of_instances({})


def _of_instances(keys: Mapping[str, Any]) -> Query:
    told = ("StudyInstanceUID", "SOPInstanceUID")
    return Query.build("IMAGE", dict(keys), return_keys=told, empty_values=True, multiple_values=True)


def find_instances(queries: Queries, query: Query) -> Iterator[StoredInstance]:
    """Where the instances are that a query of IMAGE level finds; raises CatalogError."""
    identifiers = (match.identifier() for match in queries.find(query))
    found = iter([(str(one.StudyInstanceUID), str(one.SOPInstanceUID)) for one in identifiers])
    while batch := list(islice(found, BATCH)):
        studies = list(dict.fromkeys(study for study, _ in batch))
        yield from queries.lookup_instances(study=studies, sop=[sop for _, sop in batch])
