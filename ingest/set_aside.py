"""Members of the spool that are not what arrived: they are kept beside it, and the others of their bundle go on.

Each is a file ``damaged/<bundle>-<offset>.dcm`` below the spool, as it was read, and a ``.json`` of what was known of
it. In its bundle are zeros then, marked as an erased member (sphere.ingest.erasing): the others stay where they are.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from sphere.conf.errors import BundleDamaged, StorageError
from sphere.conf.logs import hashed
from sphere.conf.private import make_private
from sphere.conf.settings import Settings
from sphere.ingest.erasing import erase
from sphere.ingest.journal import bundle_id, journal_path, parse
from sphere.ingest.records import MemberRecord
from sphere.ingest.storage.local import LocalStorage, sync_folder
from sphere.ingest.storage.paths import storage_error

CHUNK = 4 << 20  # bytes copied at a time
log = logging.getLogger(__name__)


def set_aside(spool: LocalStorage, bundle: str, offsets: Collection[int]) -> None:
    """Keep the members that begin at `offsets`, and take them out of their bundle. Killed anywhere and done again, it
    goes on. Raises BundleDamaged where the journal has no such members, and StorageError."""
    records = {one.offset: one for one in parse(spool.read(journal_path(bundle)), bundle).records}
    if unknown := set(offsets) - records.keys():
        raise BundleDamaged(f"bundle {bundle}: its journal has no member at byte {min(unknown)}")
    folder = spool.root / "damaged"
    try:
        make_private(folder)
        for offset in offsets:
            _keep(spool, records[offset], folder)
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise storage_error(error, f"keeping damaged members in {folder}") from error
    erase(spool, bundle, offsets)
    for offset in offsets:
        log.error(
            "damaged and set aside instance=%s file=%s-%s.dcm: the others of its bundle are shipped; send it again",
            hashed(records[offset].SOPInstanceUID), bundle_id(bundle), offset,
        )  # fmt: skip


def kept_aside(settings: Settings) -> int:
    """How many members are kept so."""
    with suppress(FileNotFoundError):
        return sum(path.suffix == ".dcm" for path in (settings.ingest.spool_dir / "damaged").iterdir())
    return 0


def _keep(spool: LocalStorage, record: MemberRecord, folder: Path) -> None:
    """Write the bytes of a member, and what is known of it, to files of their own, synced."""
    stem = f"{bundle_id(record.bundle)}-{record.offset}"
    sha, at, end = hashlib.sha256(), record.offset, record.offset + record.length
    with (folder / f"{stem}.dcm").open("wb") as file:
        while at < end:
            data = spool.read(record.bundle, at, min(CHUNK, end - at))
            if not data:
                raise StorageError(f"bundle {record.bundle} ends at byte {at}")
            file.write(data)
            sha.update(data[max(0, record.offset + record.dataset_offset - at) :])
            at += len(data)
        file.flush()
        os.fsync(file.fileno())
    if sha.hexdigest() == record.sha256:
        raise StorageError(f"bundle {record.bundle}: the member at byte {record.offset} was read as it should be now")
    with (folder / f"{stem}.json").open("wb") as file:
        file.write(record.to_json() + b"\n")
        file.flush()
        os.fsync(file.fileno())
