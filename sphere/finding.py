"""`sphere find`: the same keys asked of a peer over C-FIND, or of this archive's own catalog; where what matches is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from pydicom.dataset import Dataset

from sphere.catalog.asof import parse_as_of
from sphere.catalog.queries import Queries, open_queries
from sphere.catalog.query import Features, Model, Query, parse_identifier
from sphere.catalog.schema import Level
from sphere.catalog.service import StoredInstance
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings

BATCH = 2000  # instances looked up at once


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
    """What this archive's own catalog answers, as of a version or time where one is given.

    No unique keys above the level are needed, `""` finds what has no value, and several values what has all of them. A
    level that the model lacks is asked in Patient Root. Raises QueryError and CatalogError.
    """
    from sphere.scp.identifier import DEFAULT_KEYS, build_identifier

    shown = () if any(not value for value in keys.values()) else DEFAULT_KEYS[level]
    asked = {**dict.fromkeys(shown, ""), **keys}
    if timezone:
        asked["TimezoneOffsetFromUTC"] = timezone
    query = parse_identifier(
        build_identifier(asked, level),
        model="PATIENT_ROOT" if level == "PATIENT" else model,
        features=replace(features, relational=True, empty_values=True, multiple_values=True),
    )
    when = None if as_of is None else parse_as_of(as_of)
    with open_queries(settings) as queries:
        for match in queries.find(query, as_of=when):
            yield match.identifier()


def find_instances(queries: Queries, keys: Mapping[str, Any]) -> Iterator[StoredInstance]:
    """Where the instances are that match keys of any level; raises QueryError and CatalogError."""
    query = Query.build("IMAGE", dict(keys), return_keys=("StudyInstanceUID", "SOPInstanceUID"))
    identifiers = (match.identifier() for match in queries.find(query))
    found = iter([(str(one.StudyInstanceUID), str(one.SOPInstanceUID)) for one in identifiers])
    while batch := list(islice(found, BATCH)):
        studies = list(dict.fromkeys(study for study, _ in batch))
        yield from queries.lookup_instances(study=studies, sop=[sop for _, sop in batch])
