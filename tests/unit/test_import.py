"""Import of what lies in folders of others: files that are none, that change, and folders that cannot be read."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter, NewMember
from sphere.ingest.media import Imported, find_files, import_files
from sphere.ingest.recovery import verify
from sphere.ingest.storage import open_storage
from sphere.scp.client.store import _look_at
from tests.support.bundles import all_records
from tests.support.landing import slices

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]  # a pipe that is opened waits for ever


def imported(settings: Settings, *paths: Path, memory_bytes: int = 1 << 20, **options: object) -> dict[str, Imported]:
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    try:
        results = list(import_files(paths, writer, memory_bytes=memory_bytes, **options))  # type: ignore[arg-type]
    finally:
        writer.close()
    return {os.fsdecode(one.path.name): one for one in results}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file in it."""
    found = tmp_path / "of others"
    found.mkdir()
    (found / "a.dcm").write_bytes(slices(1)[0])
    return found


def test_pipes_sockets_and_devices_are_named_and_the_others_go_on(settings: Settings, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "nowhere").symlink_to("/nowhere")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(folder / "socket"))
    (folder / "z.dcm").write_bytes(slices(1, seed=5)[0])
    found = imported(settings, folder)
    assert [name for name, one in found.items() if one.record] == ["a.dcm", "z.dcm"]
    assert found["pipe"].error == found["device"].error == "is no regular file"
    assert found["nowhere"].error == "No such file or directory"
    assert found["socket"].error
    for name in ("pipe", "device"):  # nor are they sent to a peer
        assert _look_at(folder / name).error == "cannot be read: is no regular file"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [b"new\nline", b"not\xffutf-8", b"-rf", b"\x1b[31mred", "\u202egpj.dcm".encode()])
def test_names_are_no_matter(settings: Settings, folder: Path, name: bytes) -> None:
    (folder / "a.dcm").rename(folder / os.fsdecode(name))
    [one] = imported(settings, folder).values()
    assert one.record is not None
    [record] = all_records(open_storage(settings.storage.root))
    assert record == one.record


def test_a_folder_that_cannot_be_read_is_named(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "closed").mkdir()
    scandir = os.scandir

    def refused(path: str) -> object:  # as for who is not root
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert [path.name for path in find_files([folder])] == ["a.dcm", "closed"]
    found = imported(settings, folder)
    assert found["a.dcm"].record is not None
    assert found["closed"].error


def test_a_file_that_is_written_to_meanwhile_is_refused(settings: Settings, folder: Path) -> None:
    """Its digest would be of other bytes than its member: it is read once for each."""
    path = folder / "a.dcm"
    path.write_bytes(slices(1, rows=300, columns=300)[0])
    status = path.stat()

    def admit(member: NewMember) -> NewMember:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        return member

    found = imported(settings, folder, memory_bytes=16, admit=admit)
    assert "was written to while it was stored; store it again" in found["a.dcm"].error
    assert imported(settings, folder, memory_bytes=16)["a.dcm"].record is not None
    storage = open_storage(settings.storage.root)
    assert [verify(storage, record.bundle).problems for record in all_records(storage)] == [()]
