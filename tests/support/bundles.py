"""Members to be stored, and what must hold of a bundle afterwards."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sphere.ingest.bundle import NewMember
from sphere.ingest.journal import Landed, bundle_id, journal_path
from sphere.ingest.members import Dataset
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import verify
from sphere.ingest.storage import Storage

PREAMBLE = bytes(128) + b"DICM" + bytes(range(100))


def new_member(number: int = 1, dataset: Dataset | None = None, **fields: Any) -> NewMember:
    """A member whose UIDs and bytes come from `number`; other values by name."""
    values: dict[str, Any] = {
        "SOPInstanceUID": f"1.2.826.0.1.{number}",
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "StudyInstanceUID": "1.2.826.0.2",
        "SeriesInstanceUID": "1.2.826.0.3",
        "TransferSyntaxUID": "1.2.840.10008.1.2.1",
        "source_aet": "MODALITY",
        "origin": "dimse:MODALITY@127.0.0.1",
        "received_at": datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=timezone.utc),
        "preamble": PREAMBLE,
        "dataset": dataset_bytes(number) if dataset is None else dataset,
    }
    return NewMember(**(values | fields))


def dataset_bytes(number: int) -> bytes:
    """0 to about 3,000 bytes that only `number` gives."""
    return hashlib.sha256(b"%d" % number).digest() * (number * 7 % 97)


def member_bytes(storage: Storage, record: MemberRecord) -> bytes:
    """What a range read gives for the record."""
    return storage.read(record.bundle, record.offset, record.length)


def all_records(storage: Storage) -> list[MemberRecord]:
    """Every record of every published journal."""
    landed = Landed(storage)
    return [record for state in landed.bundles() for record in landed.records(state.bundle)[0]]


def assert_sound(storage: Storage) -> None:
    """Every bundle is sealed, agrees with its journal, and is extracted whole by tarfile."""
    landed = Landed(storage)
    for state in landed.bundles():
        assert state.sealed, state
        assert verify(storage, state.bundle).problems == ()
        lines = landed.lines(state.bundle)
        assert (len(lines.members), lines.next_byte) == (state.records, state.journal_size)
        assert lines.sealed is not None
        with tarfile.open(fileobj=io.BytesIO(storage.read(state.bundle))) as archive:
            members = archive.getmembers()
            assert [(item.offset_data, item.size) for item in members] == [
                (one.offset, one.length) for one in lines.members
            ]


def gnu_tar(storage: Storage, bundle: str, folder: Path) -> dict[str, bytes]:
    """The files that GNU tar extracts, by name; it may not complain."""
    folder.mkdir()
    run = subprocess.run(["tar", "xf", "-"], input=storage.read(bundle), cwd=folder, capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (0, b"")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leave_behind(storage: Storage, state_dir: Path, bundle: str, data: bytes, journal: bytes | None) -> None:
    """What a killed writer leaves: the tar so far, the journal so far, and a lock that nobody holds."""
    storage.write(bundle, data)
    if journal is None:
        storage.delete(journal_path(bundle))
    else:
        storage.write(journal_path(bundle), journal)
    locks = state_dir / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    (locks / f"{bundle_id(bundle)}.lock").touch()


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Failing(Storage):
    """A storage that does what another one does, until `fail` raises for (call, path); one file for the same bytes
    unless `attempts` says otherwise."""

    def __init__(self, inner: Storage, fail: Callable[[str, str], None], *, attempts: int = 1) -> None:
        self._inner = inner
        self._fail = fail
        self.url = inner.url
        self.visible_at_once, self.synced_is_shown = inner.visible_at_once, inner.synced_is_shown
        self.attempts = attempts

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name in ("url", "visible_at_once", "synced_is_shown", "attempts"):
            return object.__getattribute__(self, name)
        fail, inner = self._fail, self._inner

        def call(path: str = "", *arguments: Any, **options: Any) -> Any:
            fail(name, path)
            done = getattr(inner, name)(path, *arguments, **options)
            return _FailingAppender(done, path, fail) if name in ("create", "append") else done

        return call


class _FailingAppender:
    def __init__(self, inner: Any, path: str, fail: Callable[[str, str], None]) -> None:
        self._inner, self._path, self._fail = inner, path, fail

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._inner, name)
        if name in ("tell", "abandon"):
            return function

        def call(*arguments: Any) -> Any:
            self._fail(f"appender.{name}", self._path)
            return function(*arguments)

        return call


# Failing serves every method by __getattribute__.
Failing.__abstractmethods__ = frozenset()


def sizes(records: Iterable[MemberRecord]) -> int:
    """Bytes of all members."""
    return sum(record.length for record in records)
