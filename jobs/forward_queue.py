"""The queue of what is to be forwarded: table `forwards` of the catalog, filled from what changed in `instances`.

An entry is what came of one study, up to one version of `instances`, for one of `[[forwards]]`. The entries and the
version that they reach to are one commit, so that a killed process takes up exactly where it stopped. See
docs/decisions/0013-forwarding.md.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import orjson
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from sphere.catalog.lock import CatalogLock
from sphere.catalog.match_header import Header
from sphere.conf.errors import JobFailed
from sphere.conf.peers import Forward
from sphere.conf.settings import Settings
from sphere.jobs.tables import Tables, read
from sphere.scp.peers import CallingPolicy
from sphere.scp.policy import Conditions

MARK = "sphere.forwards"
"""Application of the Delta transaction identifier that holds one more than the version of `instances` taken up."""
LOCK_WAIT_S = 20.0  # seconds to wait for an extraction; what could not be written is written the next time

_COLUMNS = (
    "SOPInstanceUID", "StudyInstanceUID", "SOPClassUID", "transfer_syntax_uid", "source_aet", "origin", "collections",
    "sha256", "received_at", "bundle", "offset", "dataset",
)  # fmt: skip


@dataclass(slots=True)
class Entry:
    """A row of `forwards`: `instances` are the SOP Instance UIDs that are still to be sent, in the order of arrival."""

    forward: str
    StudyInstanceUID: str
    version: int
    destination: str
    state: str  # "waiting" or "sent"
    instances: list[str]
    sent: int = 0
    attempts: int = 0
    next_at: datetime | None = None
    last_error: str = ""
    queued_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    updated_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @property
    def line(self) -> tuple[str, str]:
        """Entries of one line are sent one after the other."""
        return self.forward, self.StudyInstanceUID

    def failed(self, left: list[str], error: str, *, retry_s: float, retry_max_s: float) -> None:
        """An attempt is over and left some: try again later, each time twice as late."""
        self.attempts = 1 if len(left) < len(self.instances) else self.attempts + 1
        self.sent += len(self.instances) - len(left)
        self.instances, self.last_error = left, error
        self.updated_at = datetime.now(timezone.utc)
        wait = min(retry_s * 2.0 ** min(self.attempts - 1, 30), retry_max_s)
        self.next_at = self.updated_at + timedelta(seconds=wait)

    def done(self) -> None:
        """Everything was sent."""
        self.sent += len(self.instances)
        self.instances, self.last_error, self.state = [], "", "sent"
        self.updated_at = datetime.now(timezone.utc)


@dataclass(frozen=True)
class _Row:
    """A row of `instances`, as conditions look at it."""

    row: Mapping[str, Any]

    @property
    def via(self) -> str:
        return str(self.row["origin"]).partition(":")[0]

    @property
    def calling_ae(self) -> str:
        return self.row["source_aet"] or ""

    @property
    def called_ae(self) -> str:
        return ""  # the catalog does not have it, and [[forwards]] cannot ask for it

    @property
    def address(self) -> str:
        return str(self.row["origin"]).rpartition("@")[2]

    @property
    def sop_class(self) -> str:
        return self.row["SOPClassUID"] or ""

    @property
    def transfer_syntax(self) -> str:
        return self.row["transfer_syntax_uid"] or ""

    @property
    def header(self) -> Header:
        header: Header = orjson.loads(self.row["dataset"] or "{}")
        return header


class Queue:
    """The entries that wait, in memory as in the table. For one process, which writes the table under the lock; its
    threads take turns."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError for a forward that cannot be matched."""
        self._tables = Tables(settings)
        extract = settings.extract.model_copy(update={"lock_wait_s": LOCK_WAIT_S})
        self._settings = settings.model_copy(update={"extract": extract})
        calling = CallingPolicy(settings.peers)
        self._forwards = [
            (forward, Conditions(f"forwards.{number}", forward, calling))
            for number, forward in enumerate(settings.forwards)
        ]
        self._taken = -1  # the version of `instances` that was looked at
        self.waiting: list[Entry] = []
        self._changing = threading.Lock()

    def open(self) -> None:
        """Read the table; made for the first time, it begins with what comes from now on.

        Raises LockHeld, JobFailed, CatalogError.
        """
        with CatalogLock(self._settings, job="forward"):
            table = self._tables.ensure("forwards")
            mark = table.transaction_version(MARK)
            if mark is None:
                instances = self._tables.open("instances")
                mark = instances.version() + 1 if instances is not None else 0
                self._tables.append("forwards", [], onto=table, mark=(MARK, mark))
        self._taken = mark - 1
        found = [entry for entry in entries(self._tables) if entry.state == "waiting"]
        self.waiting = sorted(found, key=lambda entry: (entry.version, entry.queued_at))

    def take_up(self) -> int:
        """Queue what came since; returns how many entries. Raises LockHeld and JobFailed."""
        with self._changing:
            return self._take_up()

    def _take_up(self) -> int:
        instances = self._tables.open("instances")
        if instances is None or instances.version() <= self._taken:
            return 0
        version = instances.version()
        found = self._entries(_came(instances, self._taken), version)
        with CatalogLock(self._settings, job="forward"):
            table = self._tables.ensure("forwards")
            mark = (MARK, version + 1)
            if found:
                self._tables.merge("forwards", [asdict(entry) for entry in found], onto=table, mark=mark)
            else:
                self._tables.append("forwards", [], onto=table, mark=mark)
        self._taken = version
        self.waiting += found
        return len(found)

    def _entries(self, rows: Iterable[Mapping[str, Any]], version: int) -> list[Entry]:
        found: dict[tuple[str, str], Entry] = {}
        for row in sorted(rows, key=lambda row: (row["received_at"], row["bundle"], row["offset"])):
            for forward, conditions in self._forwards:
                if _has_collection(forward, row) and conditions.hold(_Row(row)):
                    study = row["StudyInstanceUID"]
                    new = Entry(forward.name, study, version, forward.to, "waiting", [])
                    found.setdefault(new.line, new).instances.append(row["SOPInstanceUID"])
        return list(found.values())

    def record(self, changed: list[Entry]) -> None:
        """Write what became of entries. Raises LockHeld and JobFailed."""
        with self._changing, CatalogLock(self._settings, job="forward"):
            self._tables.merge("forwards", [asdict(entry) for entry in changed])
            recorded = {id(entry) for entry in changed if entry.state != "waiting"}
            self.waiting = [entry for entry in self.waiting if id(entry) not in recorded]


def _has_collection(forward: Forward, row: Mapping[str, Any]) -> bool:
    return not forward.collection or bool(set(forward.collection) & set(row["collections"] or ()))


def _came(instances: DeltaTable, since: int) -> list[Mapping[str, Any]]:
    """The rows that came after a version; those that a rewrite of their file only moved are not among them."""
    try:
        columns = [f'"{name}"' for name in (*_COLUMNS, "_change_type")]
        upto = instances.version()  # not what was committed since it was opened: that would be taken up twice
        feed = instances.load_cdf(
            starting_version=since + 1, ending_version=upto, columns=columns, allow_out_of_range=True
        )
        rows = pa.table(pa.RecordBatchReader.from_stream(feed)).to_pylist()
    except DeltaError as error:
        raise JobFailed(
            f"forwarding: what came into instances after version {since} can no longer be told ({error}); "
            "remove the table forwards to begin anew with what comes from now on"
        ) from None
    balance: Counter[tuple[str, str]] = Counter()
    newest: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        key = row["SOPInstanceUID"], row["sha256"]
        came = row["_change_type"] in ("insert", "update_postimage")
        balance[key] += 1 if came else -1
        if came:
            newest[key] = row
    return [row for key, row in newest.items() if balance[key] > 0]


def entries(tables: Tables) -> list[Entry]:
    """Every row of `forwards`."""
    names = tuple(Entry.__dataclass_fields__)
    return [Entry(**row) for piece in read(tables.open("forwards"), names) for row in piece.to_pylist()]


@dataclass(frozen=True, slots=True)
class ForwardState:
    """What a forward has done and has to do: numbers of instances, of studies that wait, and the last failure."""

    forward: str
    destination: str
    sent: int
    waiting: int
    studies_waiting: int
    attempts: int  # of the entry that failed most often in a row
    next_at: str  # RFC 3339, UTC: the next attempt at what failed; "": none is waited for
    last_error: str

    def __str__(self) -> str:
        text = f"{self.forward} to {self.destination}: {self.sent} sent, {self.waiting} waiting"
        if self.last_error:
            text += f" after {self.attempts} attempts, next {self.next_at}: {self.last_error}"
        return text


def states(tables: Tables) -> list[ForwardState]:
    """One for each forward that ever queued something, by name."""
    by_forward: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries(tables):
        by_forward.setdefault((entry.forward, entry.destination), []).append(entry)
    return [_state(name, found) for name, found in sorted(by_forward.items())]


def _state(name: tuple[str, str], found: list[Entry]) -> ForwardState:
    waiting = [entry for entry in found if entry.state == "waiting"]
    failed = sorted((entry for entry in waiting if entry.next_at), key=lambda entry: entry.updated_at)
    return ForwardState(
        *name,
        sent=sum(entry.sent for entry in found),
        waiting=sum(len(entry.instances) for entry in waiting),
        studies_waiting=len({entry.StudyInstanceUID for entry in waiting}),
        attempts=max((entry.attempts for entry in waiting), default=0),
        next_at=min((entry.next_at.isoformat(timespec="seconds") for entry in failed if entry.next_at), default=""),
        last_error=failed[-1].last_error if failed else "",
    )
