"""Where publishing takes a while, two bundles take turns: no write waits for it, and nothing is lost when it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest

from sphere.conf.errors import StorageError
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.bundle import PUBLISH_LOAD_S, BundleWriter
from sphere.ingest.journal import Landed
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import recover
from sphere.ingest.storage import Storage, open_storage
from tests.support.bundles import Clock, Failing, all_records, assert_sound, new_member

pytestmark = pytest.mark.unit


@pytest.fixture
def archive(tmp_path: Path) -> Settings:
    return from_dict({"storage": {"root": "file:storage"}}, base=tmp_path)


@pytest.fixture
def storage(archive: Settings) -> Storage:
    return open_storage(archive.storage.root)


class Slow:
    """A writer whose storage shows nothing before it is published, under load whenever `busy` was called."""

    def __init__(
        self, storage: Storage, archive: Settings, fail: Callable[[str, str], None], *, synced_is_shown: bool = False
    ) -> None:
        failing = Failing(storage, fail)
        failing.visible_at_once, failing.synced_is_shown = False, synced_is_shown
        self.clock = Clock()
        self.writer = BundleWriter(failing, archive, clock=self.clock)
        self.writer._stop.set()  # the keeper: what is due is done when a test says so
        self.writer._thread.join()
        self.records: list[MemberRecord] = []

    def store(self, dataset: bytes | None = None) -> MemberRecord:
        """Another member."""
        self.records.append(self.writer.store(new_member(len(self.records) + 1, dataset)))
        return self.records[-1]

    def busy(self) -> MemberRecord:
        """Two members, the first of which is due for publication; that of the second."""
        self.store()
        self.clock.now += PUBLISH_LOAD_S
        return self.store()

    def close(self, storage: Storage) -> None:
        """Nothing is lost, and nothing is there twice."""
        self.writer.close()
        assert all_records(storage) == sorted(self.records, key=attrgetter("bundle", "offset"))
        assert_sound(storage)


def test_two_bundles_take_turns(storage: Storage, archive: Settings) -> None:
    slow = Slow(storage, archive, lambda call, path: None)
    used = []
    for _ in range(6):
        used.append(slow.busy().bundle)
        slow.writer.tick()
        assert [state.sealed for state in Landed(storage).bundles()] == [False, False]
        assert len(all_records(storage)) == len(slow.records)
    assert used == [used[0], used[1]] * 3
    assert used[0] != used[1]
    slow.close(storage)
    assert len(list(Landed(storage).bundles())) == 2


def test_members_are_stored_while_a_bundle_is_published(storage: Storage, archive: Settings) -> None:
    publishing, go = threading.Event(), threading.Event()

    def hold(call: str, path: str) -> None:
        if call == "appender.publish" and path.endswith(".tar"):
            publishing.set()
            assert go.wait(60)

    slow = Slow(storage, archive, hold)
    first = slow.busy()
    keeper = threading.Thread(target=slow.writer.tick)
    keeper.start()
    assert publishing.wait(60)
    assert slow.store().bundle != first.bundle
    go.set()
    keeper.join()
    slow.close(storage)


def test_where_a_sync_shows_them_members_stay_in_one_bundle(storage: Storage, archive: Settings) -> None:
    slow = Slow(storage, archive, lambda call, path: None, synced_is_shown=True)
    for _ in range(4):
        slow.busy()
        assert len(all_records(storage)) < len(slow.records)
        slow.writer.tick()
        assert all_records(storage) == slow.records
    assert len({record.bundle for record in slow.records}) == 1
    slow.close(storage)


def test_a_trickle_stays_in_one_bundle(storage: Storage, archive: Settings) -> None:
    slow = Slow(storage, archive, lambda call, path: None)
    for _ in range(4):
        slow.store()
        slow.clock.now += PUBLISH_LOAD_S
        slow.writer.tick()
        assert all_records(storage) == slow.records
    assert len({record.bundle for record in slow.records}) == 1
    slow.close(storage)


@pytest.mark.parametrize("call", ["create", "appender.prepare"])
def test_without_a_second_bundle_the_first_is_published_between_writes(
    storage: Storage, archive: Settings, call: str
) -> None:
    armed = threading.Event()

    def fail(called: str, path: str) -> None:
        if armed.is_set() and called == call and path.endswith(".tar"):
            raise StorageError("injected")

    slow = Slow(storage, archive, fail)
    slow.store()
    armed.set()
    slow.clock.now += PUBLISH_LOAD_S
    bundle = slow.store().bundle
    slow.writer.tick()
    assert all_records(storage) == slow.records
    assert slow.store().bundle == bundle
    armed.clear()
    slow.close(storage)


@pytest.mark.parametrize("ending", [".tar", ".journal"])
def test_a_publication_that_fails_beside_the_writes(storage: Storage, archive: Settings, ending: str) -> None:
    armed = threading.Event()

    def fail(called: str, path: str) -> None:
        if armed.is_set() and called == "appender.publish" and path.endswith(ending):
            armed.clear()
            raise StorageError("injected")

    slow = Slow(storage, archive, fail)
    slow.store()
    armed.set()
    slow.clock.now += PUBLISH_LOAD_S
    failed = slow.store().bundle
    slow.writer.tick()
    assert not armed.is_set()
    assert all_records(storage) == slow.records  # by its repair, or by a journal that is written anew
    for _ in range(3):
        later = slow.busy().bundle
        slow.writer.tick()
        assert ending == ".journal" or later != failed
    slow.close(storage)


def test_a_bundle_that_is_full_while_another_is_made(storage: Storage, archive: Settings) -> None:
    small = archive.model_copy(update={"storage": archive.storage.model_copy(update={"seal_mib": 1})})
    slow: Slow
    once = threading.Event()

    def fill(called: str, path: str) -> None:
        if once.is_set() and called == "appender.prepare" and path.endswith(".tar"):
            once.clear()
            slow.store(b"x" * 1_100_000)

    slow = Slow(storage, small, fill)
    slow.store()
    once.set()
    slow.clock.now += PUBLISH_LOAD_S
    first = slow.store().bundle
    slow.writer.tick()
    assert not once.is_set()
    assert slow.store().bundle != first
    assert {state.bundle: state.sealed for state in Landed(storage).bundles()}[first]
    slow.close(storage)


def test_both_are_sealed_by_age_and_one_without_members_is_removed(storage: Storage, archive: Settings) -> None:
    slow = Slow(storage, archive, lambda call, path: None)
    slow.busy()
    slow.writer.tick()
    assert len(list(Landed(storage).bundles())) == 2
    slow.clock.now += archive.storage.seal_age_s
    slow.writer.tick()
    assert [state.sealed for state in Landed(storage).bundles()] == [True]
    slow.close(storage)


def test_recovery_finds_both(storage: Storage, archive: Settings) -> None:
    broken = threading.Event()

    def fail(call: str, path: str) -> None:
        if broken.is_set() and call in ("appender.close", "recover"):
            raise StorageError("injected")

    slow = Slow(storage, archive, fail)
    for _ in range(2):
        slow.busy()
        slow.writer.tick()
    broken.set()
    slow.writer.close()
    assert [found.error for found in recover(storage, archive).bundles] == ["", ""]
    slow.close(storage)
