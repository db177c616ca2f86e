"""One SOP Instance UID, several contents: which of them `instances` shows, and what `conflicts` says of the others.

The outcome depends on the set of versions alone, not on the order or the batches in which they were read. A version is
known by its digest and stands where its bytes first arrived; the same bytes again change nothing, even an older version
sent anew after a correction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sphere.catalog.versions import Order, Place, Policy, in_line, order, place
from sphere.ingest.records import MemberRecord

__all__ = ["Order", "Place", "Settled", "order", "place", "settle"]


@dataclass(frozen=True, slots=True)
class Settled:
    """The member that `instances` shows, and the rows of `conflicts` for this SOP Instance UID."""

    winner: MemberRecord
    conflicts: tuple[Mapping[str, Any], ...]


def settle(uid: str, versions: Iterable[MemberRecord], policy: Policy) -> Settled:
    """Settle the versions (at least one) of a SOP Instance UID.

    ``keep-first`` and ``reject`` show the version that arrived first, ``replace`` the newest one. Each version but the
    first has one row in `conflicts`, keyed by its place: kept against the first one, or put in the place of the one
    before.
    """
    line = in_line(versions)
    if policy != "replace":
        return Settled(line[0], tuple(_row(uid, line[0], later, later, policy) for later in line[1:]))
    pairs = zip(line[1:], line, strict=False)
    return Settled(line[-1], tuple(_row(uid, later, earlier, later, policy) for later, earlier in pairs))


def _row(uid: str, kept: MemberRecord, other: MemberRecord, later: MemberRecord, policy: Policy) -> dict[str, Any]:
    return {
        "bundle": later.bundle,
        "offset": later.offset,
        "length": later.length,
        "kind": "SOP_INSTANCE",
        "SOPInstanceUID": uid,
        "StudyInstanceUID": later.StudyInstanceUID,
        "decision": policy,
        "kept_bundle": kept.bundle,
        "kept_offset": kept.offset,
        "kept_sha256": kept.sha256,
        "other_bundle": other.bundle,
        "other_offset": other.offset,
        "other_sha256": other.sha256,
        "received_at": later.received_at,
        "source_aet": later.source_aet,
        "origin": later.origin,
        "detail": "same SOPInstanceUID, other bytes",
        "subject": uid,
    }
