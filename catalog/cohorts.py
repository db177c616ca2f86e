"""Cohorts: named lists of studies, series or patients, kept beside the bundles, that researchers can be granted."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, Final, Literal

import orjson

from sphere.catalog.grant import Grant
from sphere.conf.errors import SettingsError, StorageMissing
from sphere.conf.uids import UID
from sphere.ingest.storage.base import Storage

log = logging.getLogger(__name__)

Kind = Literal["study", "series", "patient"]
FOLDER: Final = "access/cohorts"
FRESH_S: Final = 2.0  # seconds that what was read is used
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Cohort:
    """What is kept of a cohort: StudyInstanceUIDs, SeriesInstanceUIDs or PatientIDs. `made` is ISO 8601, UTC; `origin`
    says what the list was made from."""

    name: str
    kind: Kind
    members: tuple[str, ...]
    made: str
    origin: str


class Cohorts:
    """The cohorts of an archive. Safe to share between threads; servers know a change within FRESH_S."""

    def __init__(self, storage: Storage, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage, self._clock = storage, clock
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Cohort | None]] = {}

    def create(self, name: str, kind: Kind, members: Iterable[str], origin: str) -> Cohort:
        """Write a cohort down; one of that name is replaced. Raises SettingsError, StorageError."""
        listed = tuple(sorted({one.strip() for one in members} - {""}))
        if not listed:
            raise SettingsError(f"cohort {name}: there is nothing in the list")
        wrong = next((one for one in listed if kind != "patient" and not UID.fullmatch(one)), None)
        if wrong is not None:
            raise SettingsError(f"cohort {name}: {wrong[:80]!r} is not a UID (PS3.5 9.1)")
        made = datetime.now(timezone.utc).isoformat(timespec="seconds")
        cohort = Cohort(name, kind, listed, made, origin)
        self._storage.write(_path(name), orjson.dumps(asdict(cohort)))
        return cohort

    def all(self) -> list[Cohort]:
        """Every cohort by name; raises StorageError."""
        return [_read(self._storage.read(one.path)) for one in self._storage.walk(FOLDER) if one.path.endswith(".json")]

    def get(self, name: str) -> Cohort:
        """A cohort; raises SettingsError where there is none."""
        try:
            return _read(self._storage.read(_path(name)))
        except StorageMissing:
            raise SettingsError(f"there is no cohort {name!r}; `sphere cohort list` names them") from None

    def delete(self, name: str) -> None:
        """Forget a cohort: who was granted it sees nothing of it any more. Raises SettingsError where there is none."""
        self.get(name)
        self._storage.delete(_path(name))

    def grant(self, collections: Iterable[str], cohorts: Iterable[str]) -> Grant:
        """What these names stand for now; a cohort that is gone grants nothing. Raises StorageError."""
        listed: dict[Kind, set[str]] = {"study": set(), "series": set(), "patient": set()}
        for name in cohorts:
            cohort = self._cohort(name)
            if cohort is not None:
                listed[cohort.kind] |= set(cohort.members)
        studies, series, patients = (frozenset(listed[kind]) for kind in ("study", "series", "patient"))
        return Grant(frozenset(collections), studies, series, patients)

    def _cohort(self, name: str) -> Cohort | None:
        with self._lock:
            read_at, cohort = self._known.get(name, (float("-inf"), None))
            if self._clock() - read_at < FRESH_S:
                return cohort
        try:
            cohort = self.get(name)
        except SettingsError:
            log.warning("a token names cohort %s, which there is not", name[:64])
            cohort = None
        with self._lock:
            self._known = {**dict(list(self._known.items())[-100:]), name: (self._clock(), cohort)}
        return cohort


def _path(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{name[:80]!r} cannot name a cohort: letters, digits, and _ . - within, at most 64")
    return f"{FOLDER}/{name}.json"


def _read(data: bytes) -> Cohort:
    found: dict[str, Any] = orjson.loads(data)
    return Cohort(**{**found, "members": tuple(found["members"])})
