"""Deleting instances of this archive, and showing them again: each call is a record of the audit journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from sphere.caller import who_calls
from sphere.catalog.annotations import Annotations
from sphere.catalog.audit import AuditJournal, told
from sphere.catalog.queries import Queries
from sphere.catalog.service import StoredInstance
from sphere.catalog.tombstones import Named, Tombstone, open_tombstones
from sphere.catalog.withdrawn import Withdrawn
from sphere.conf.errors import NotThere
from sphere.conf.settings import Settings
from sphere.finding import find_instances, instances_matching
from sphere.ingest.storage import open_storage

NAMES = {"study": "StudyInstanceUID", "series": "SeriesInstanceUID", "sop": "SOPInstanceUID"}
"""Levels as `Queries.lookup_instances` names them, and what their UIDs are."""

Chosen = Mapping[str, Sequence[str]]
"""UIDs by level: everything in any of them."""


def choose(queries: Queries, chosen: Chosen) -> list[StoredInstance]:
    """The instances of these studies and series, and with these UIDs; raises NotThere where one names nothing."""
    found: dict[str, StoredInstance] = {}
    for level, uids in chosen.items():
        if uids:
            here = list(_looked_up(queries, level, list(uids)))
            _all_there(level, uids, here, "there is nothing here of")
            found |= {one.SOPInstanceUID: one for one in here}
    return list(found.values())


def _looked_up(queries: Queries, level: str, uids: Sequence[str]) -> Iterator[StoredInstance]:
    study, series, sop = (uids if level == name else () for name in NAMES)
    return queries.lookup_instances(study=study, series=series, sop=sop)


def choose_matching(queries: Queries, keys: Mapping[str, Any]) -> list[StoredInstance]:
    """The instances that match keys of any level, none of which matches everything; raises BadRequest, QueryError."""
    return list(find_instances(queries, instances_matching(keys)))


def choose_deleted(settings: Settings, chosen: Chosen) -> list[Tombstone]:
    """The deleted instances of these studies and series, and with these UIDs; raises NotThere where one names none."""
    found: dict[str, Tombstone] = {}
    with closing(open_tombstones(settings)) as tombstones:
        for level, uids in chosen.items():
            if uids:
                here = list(tombstones.find(**{level: list(uids)}))
                _all_there(level, uids, here, "nothing is deleted of")
                found |= {one.SOPInstanceUID: one for one in here}
    return list(found.values())


def delete(settings: Settings, instances: Collection[StoredInstance], *, reason: str = "") -> int:
    """Show these instances no more, anywhere; how many were shown before. Raises StorageError."""
    with closing(open_tombstones(settings)) as tombstones:
        return _recorded(
            settings,
            "DELETE",
            instances,
            lambda: tombstones.delete(instances, by=who_calls(), reason=reason),
        )


def annotations_of(settings: Settings, queries: Queries, instances: Iterable[Named]) -> int:
    """How many annotations are linked to these instances, and to studies and series of which they were the last."""
    with closing(open_tombstones(settings)) as tombstones, closing(Annotations(settings)) as annotations:
        uids = {getattr(one, name) for one in instances for name in NAMES.values()}
        return annotations.linked(Withdrawn(tombstones, queries).among(uids))


def undelete(settings: Settings, instances: Collection[Tombstone]) -> int:
    """Show these instances again; how many were deleted. Raises BytesGone where some are erased, StorageError."""
    with closing(open_tombstones(settings)) as tombstones:
        uids = [one.SOPInstanceUID for one in instances]
        return _recorded(settings, "UNDELETE", instances, lambda: tombstones.restore(uids, by=who_calls()))


def _all_there(level: str, uids: Iterable[str], found: Iterable[Named], text: str) -> None:
    missing = set(uids) - {getattr(one, NAMES[level]) for one in found}
    if missing:
        raise NotThere(f"{text} {NAMES[level]} {', '.join(sorted(missing))[:200]}")


def _recorded(settings: Settings, method: str, instances: Iterable[Named], act: Callable[[], int]) -> int:
    """Act, and record it: the studies concerned are the path, as of DICOMweb."""
    began, done = time.monotonic(), 0
    studies = sorted({one.StudyInstanceUID for one in instances})
    storage = open_storage(settings.storage.root, user=settings.storage.user)
    outcome = "failed"
    with closing(AuditJournal(storage, settings.archive.state_dir / "audit.jsonl")) as journal:
        try:
            done = act()
            outcome = "done"
        finally:
            journal.add(
                who=who_calls(),
                method=method,
                path=told(f"studies/{','.join(studies)}"),
                outcome=outcome,
                entities=done,
                seconds=round(time.monotonic() - began, 3),
            )
    return done
