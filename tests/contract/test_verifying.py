"""Sealed bundles are read back, each once, on every back end: damage is found, named and kept as it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from sphere.conf import serving
from sphere.conf.errors import StorageError
from sphere.conf.serving import VerifyState
from sphere.conf.settings import Settings
from sphere.ingest import verifying
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.journal import journal_path
from sphere.ingest.recovery import Verification, verify
from sphere.ingest.storage import Storage
from sphere.ingest.verifying import AGAIN_S, DAMAGED_S, TRIES, Checked, Paced, Stopped, Verifier
from sphere.status import take
from tests.contract.backends import Backend, Hdfs, Local, WebHdfs
from tests.support.bundles import Clock, all_records, new_member
from tests.support.hdfs import HdfsCluster


@contextmanager
def verifier_of(archive: Settings, clock: Clock | None = None) -> Iterator[Verifier]:
    with closing(Checked(archive.archive.state_dir)) as checked:
        yield Verifier(archive, checked, threading.Event(), clock=clock or Clock())


def land(storage: Storage, archive: Settings, *numbers: int) -> str:
    """A sealed bundle of these members."""
    writer = BundleWriter(storage, archive)
    try:
        return [writer.store(new_member(number)) for number in numbers][-1].bundle
    finally:
        writer.close()


def told(archive: Settings) -> VerifyState:
    state = serving.read_verify(archive.archive.state_dir)
    assert state is not None
    return state


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bundles that are read whole from now on."""
    bundles: list[str] = []

    def counted(storage: Storage, bundle: str) -> Verification:
        bundles.append(bundle)
        return verify(storage, bundle)

    monkeypatch.setattr(verifying, "verify", counted)
    return bundles


class VerifyingContract(Backend):
    """Every promise once."""

    def test_each_sealed_bundle_is_read_once(self, storage: Storage, archive: Settings, read: list[str]) -> None:
        bundles = [land(storage, archive, 1, 2), land(storage, archive, 3)]
        writer = BundleWriter(storage, archive)
        open_one = writer.store(new_member(4)).bundle
        with verifier_of(archive) as verifier:
            verifier.round()
            assert read == bundles[::-1], "the newest first, and none that is written to"
            writer.close()
            verifier.round()
            verifier.round()
        with verifier_of(archive) as verifier:  # another process
            verifier.round()
        assert sorted(read) == sorted([*bundles, open_one])
        state = told(archive)
        assert (state.bundles, state.waiting, state.damaged, state.named) == (3, 0, 0, ())
        assert state.bytes == sum(storage.size(bundle) for bundle in read)

    def test_other_bytes_are_found_and_named_until_they_are_put_right(
        self, storage: Storage, archive: Settings
    ) -> None:
        good, bad, clock = land(storage, archive, 1), land(storage, archive, 2, 3, 4), Clock()
        record = next(one for one in all_records(storage) if one.bundle == bad)
        whole = storage.read(bad)
        damaged = flipped(whole, record.offset + record.dataset_offset + 3)
        storage.write(bad, damaged)
        with verifier_of(archive, clock) as verifier:
            verifier.round()
            state = told(archive)
            assert (state.bundles, state.damaged) == (1, 1)
            assert state.named == (f"{bad}: member at byte {record.offset}: sha256 differs",)
            assert storage.read(bad) == damaged, "as it was found"
            shown = str(take(archive))
            assert "1 sealed bundles read back" in shown and "1 DAMAGED and kept" in shown and state.named[0] in shown
            storage.write(bad, whole)
            clock.now += DAMAGED_S + 1
            verifier.round()
        assert (told(archive).bundles, told(archive).damaged) == (2, 0)
        assert storage.exists(good)

    def test_a_bundle_that_is_gone_is_named(self, storage: Storage, archive: Settings) -> None:
        bundle = land(storage, archive, 1)
        with verifier_of(archive) as verifier:
            verifier.round()
            storage.delete(bundle)
            verifier.round()
            assert told(archive).damaged == 0, "it may be on its way"
            verifier.round()
            assert told(archive).named == (f"{bundle}: is gone, and its journal is there",)
            storage.delete(journal_path(bundle))
            verifier.round()
            assert told(archive).damaged == 0, "nothing promises it any more"


class TestLocal(Local, VerifyingContract):
    def test_a_storage_that_fails_is_tried_again(
        self, storage: Storage, archive: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle, clock, failing = land(storage, archive, 1), Clock(), [True]

        def read(storage: Storage, bundle: str) -> Verification:
            if failing[0]:
                raise StorageError("input/output error")
            return verify(storage, bundle)

        monkeypatch.setattr(verifying, "verify", read)
        with verifier_of(archive, clock) as verifier:
            for attempt in range(TRIES):
                assert serving.read_verify(archive.archive.state_dir) is None or told(archive).damaged == 0, attempt
                verifier.round()
                verifier.round()  # too early
                clock.now += AGAIN_S
            assert told(archive).named == (f"{bundle}: cannot be read: input/output error",)
            failing[0] = False
            verifier.round()
        assert (told(archive).bundles, told(archive).damaged) == (1, 0)

    def test_it_is_slow_and_can_be_stopped(self, storage: Storage, archive: Settings) -> None:
        bundle = land(storage, archive, *range(20))

        class Stop(threading.Event):
            waited = 0.0
            stops = False

            def wait(self, timeout: float | None = None) -> bool:
                self.waited = timeout or 0.0  # nothing passes meanwhile: what is owed adds up
                return self.stops

        stop = Stop()
        paced, size = Paced(storage, 1000.0, stop), storage.size(bundle)
        assert verify(paced, bundle).problems == ()
        assert stop.waited > size / 1000 - 10, "every byte is paid for"
        stop.stops = True
        with pytest.raises(Stopped):
            paced.read(bundle, 0, 1)
        with closing(Checked(archive.archive.state_dir)) as checked:
            Verifier(archive, checked, stop).round()
            assert checked.good() == (0, 0)

    def test_what_is_remembered_is_a_cache(self, storage: Storage, archive: Settings, read: list[str]) -> None:
        bundle = land(storage, archive, 1)
        with verifier_of(archive) as verifier:
            verifier.round()
        for file in archive.archive.state_dir.glob("verified.sqlite*"):
            file.write_bytes(b"no database, " * 1000)
        with verifier_of(archive) as verifier:
            verifier.round()
        assert read == [bundle] * 2


class TestHdfs(Hdfs, VerifyingContract):
    def test_bytes_that_changed_on_the_disks_of_every_datanode(
        self, storage: Storage, archive: Settings, hdfs_cluster: HdfsCluster
    ) -> None:
        """HDFS sees that itself by its checksums, and gives nothing; that counts as damage after a while."""
        bundle, clock = land(storage, archive, 7, 8), Clock()
        block = storage.read(bundle, 0, 4096)
        replicas = [path for path in _blocks(hdfs_cluster.folder) if path.read_bytes()[:4096] == block]
        assert len(replicas) == 2
        for path in replicas:
            path.write_bytes(flipped(path.read_bytes(), 2500))
        with verifier_of(archive, clock) as verifier:
            for _ in range(TRIES):
                verifier.round()
                clock.now += AGAIN_S
        assert told(archive).damaged == 1
        assert told(archive).named[0].startswith(f"{bundle}: ")


class TestWebHdfs(WebHdfs, VerifyingContract):
    pass


def _blocks(folder: Path) -> Iterator[Path]:
    """The files of blocks of every DataNode."""
    return (path for path in folder.glob("datanode*/current/**/blk_*") if path.suffix != ".meta")
