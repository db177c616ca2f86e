"""What is here, what is waiting, and what failed: read from the journals and the tables, no Spark needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace

import orjson

from sphere.catalog.overview import COUNTED, Overview
from sphere.catalog.tombstones import open_tombstones
from sphere.conf import serving
from sphere.conf.errors import SphereError
from sphere.conf.serving import ServeState, SpoolState, VerifyState
from sphere.conf.settings import Settings
from sphere.ingest.journal import BundleState, Landed
from sphere.ingest.spool import backlog, in_use
from sphere.ingest.storage import open_storage
from sphere.jobs.compact import pending
from sphere.jobs.forward_queue import ForwardState, states
from sphere.jobs.tables import Tables, read
from sphere.jobs.tombstones import waiting as tombstones_waiting


@dataclass(frozen=True, slots=True)
class Status:
    """The state of an archive; sizes in bytes.

    `landed` members are in bundles on the storage, `waiting` of them are not yet catalogued. `catalogued` counts rows
    by table, `quarantine` rejected members by reason. `serving`: the running `sphere serve` of this host, None where
    none runs.
    """

    storage_root: str
    catalog_root: str
    bundles: int
    bundles_open: int
    bundle_bytes: int
    landed: int
    waiting: int
    catalogued: dict[str, int]
    quarantine: dict[str, int]
    serving: ServeState | None
    spool: SpoolState | None  # what waits to be shipped, where instances are spooled
    forwards: tuple[ForwardState, ...] = ()  # what is sent on to peers
    deleted: int = 0  # instances that are shown no more
    compactable_bytes: int = 0  # of what is deleted and has its bytes: sphere compact erases them after a while
    deletions_waiting: bool = False  # what was deleted or restored since the last extraction: the tables do not show it
    verified: VerifyState | None = None  # what reading sealed bundles back found; None where none ever was
    problem: str = ""  # why storage and catalog could not be read: what is said of them is then 0

    def to_json(self) -> str:
        """One JSON object."""
        return orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2).decode()

    def __str__(self) -> str:
        """A few lines for a person."""
        lines = [f"PROBLEM     {self.problem}"] if self.problem else self._stored()
        if self.spool is not None:
            lines.append(f"spool       {self.spool}")
        if self.verified is not None:
            lines.append(f"verified    {self.verified}")
        lines += [f"forward     {forward}" for forward in self.forwards]
        return "\n".join([*lines, f"serving     {self.serving or 'no'}"])

    def _stored(self) -> list[str]:
        rows = ", ".join(f"{count} {name}" for name, count in self.catalogued.items())
        why = ", ".join(f"{reason} {count}" for reason, count in sorted(self.quarantine.items()))
        return [
            f"storage     {self.storage_root}: {self.bundles} bundles ({self.bundles_open} open), "
            f"{self.bundle_bytes / 1e6:.1f} MB, {self.landed} members",
            f"waiting     {self.waiting} members" + (" (sphere extract)" if self.waiting else ""),
            f"catalog     {self.catalog_root}: {rows}",
            f"quarantine  {why or 'empty'}",
            *([f"deleted     {self._deleted()}"] if self.deleted else ()),
        ]

    def _deleted(self) -> str:
        """Rows are counted as extraction left them: a deletion of since is in every answer, and not in their number."""
        late = ", not all of them taken out of the rows above yet (sphere extract)"
        kept = (
            f", {self.compactable_bytes / 1e6:.1f} MB of them kept until sphere compact"
            if self.compactable_bytes
            else ""
        )
        return f"{self.deleted} instances{kept}" + (late if self.deletions_waiting else "")


def take(settings: Settings) -> Status:
    """Look at the storage, the catalog and the spool; `Status.problem` says why one of the first two cannot be read."""
    spool, running, verified = _spool(settings), _serving(settings), serving.read_verify(settings.archive.state_dir)
    try:
        return replace(_stored(settings), spool=spool, serving=running, verified=verified)
    except SphereError as error:
        return replace(_nothing(settings), spool=spool, serving=running, verified=verified, problem=str(error))


def _nothing(settings: Settings) -> Status:
    roots = settings.storage.root, settings.catalog_root
    return Status(*roots, 0, 0, 0, 0, 0, dict.fromkeys(COUNTED, 0), {}, None, None)


def _stored(settings: Settings) -> Status:
    """What storage and catalog hold; raises StorageError or CatalogError where they cannot be read."""
    tables = Tables(settings)
    done = _catalogued(tables)
    bundles = size = opened = landed = waiting = 0
    for state, members in _members(settings):
        bundles += 1
        size += state.size
        opened += not state.sealed
        landed += members
        waiting += members - done.get(state.bundle, 0)
    with closing(Overview(settings)) as overview, closing(open_tombstones(settings)) as tombstones:
        catalogued, reasons, deleted = overview.counts(), overview.reasons(), tombstones.count()
    return replace(
        _nothing(settings),
        bundles=bundles,
        bundles_open=opened,
        bundle_bytes=size,
        landed=landed,
        waiting=waiting if settings.catalog.mode == "delta" else 0,
        catalogued=catalogued,
        quarantine=reasons,
        forwards=tuple(states(tables)),
        deleted=deleted,
        compactable_bytes=pending(tables).bytes if deleted else 0,
        deletions_waiting=settings.catalog.mode == "delta" and tombstones_waiting(settings),
    )


def _spool(settings: Settings) -> SpoolState | None:
    """What the shipper says, with what the spool holds now; None where nothing is spooled."""
    if not in_use(settings):
        return None
    said = serving.read_spool(settings.archive.state_dir) or SpoolState()
    left = backlog(settings)
    oldest = left.oldest.isoformat(timespec="milliseconds") if left.oldest else ""
    return replace(said, bundles=left.bundles, bytes=left.bytes, oldest=oldest)


def _serving(settings: Settings) -> ServeState | None:
    state = serving.read(settings.archive.state_dir)
    return state if state is not None and state.alive() else None


def waiting(settings: Settings) -> int:
    """Members that landed and are not catalogued."""
    done = _catalogued(Tables(settings))
    return sum(members - done.get(state.bundle, 0) for state, members in _members(settings))


def _members(settings: Settings) -> Iterator[tuple[BundleState, int]]:
    """(state, members that its journal lists) of each bundle; the journals of open ones are read whole."""
    landed = Landed(open_storage(settings.storage.root, user=settings.storage.user), settings.archive.state_dir)
    for state in landed.bundles():
        yield state, len(landed.records(state.bundle)[0]) if state.records is None else state.records


def _catalogued(tables: Tables) -> dict[str, int]:
    """Members catalogued, by bundle."""
    pieces = read(tables.open("bundles"), ("bundle", "members"))
    return {row["bundle"]: row["members"] for piece in pieces for row in piece.to_pylist()}
