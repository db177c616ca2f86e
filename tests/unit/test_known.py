"""Copies are stored once, wherever the first came from; contradictions are seen; what is gone is stored again."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from sphere.catalog import known
from sphere.catalog.known import Catalog, KnownInstances
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.conf.settings import Settings
from sphere.ingest import reservations
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.members import NewMember, with_digest
from sphere.ingest.spool import SpoolWriter, open_writer, spool_storage
from sphere.ingest.storage import open_storage
from tests.support.extracted import extract
from tests.support.landing import archive, changed, land, new_member, slices

pytestmark = pytest.mark.unit


@pytest.fixture
def finder(settings: Settings) -> Iterator[QueryService]:
    with QueryService(settings) as finder:
        yield finder


def meet(instances: KnownInstances, member: NewMember, sender: str = "a") -> str:
    whole = with_digest(member)
    return instances.meet(whole.SOPInstanceUID, whole.StudyInstanceUID, whole.sha256, sender=sender)


def test_what_this_process_stored(settings: Settings, finder: QueryService) -> None:
    [data] = slices(1)
    first, other = new_member(data), new_member(changed(data, PatientComments="corrected"))
    instances = KnownInstances(settings, finder)
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    assert meet(instances, first) == "new"
    instances.add(writer.store(first))
    assert meet(instances, first) == "copy"
    assert meet(instances, other) == "other"
    instances.add(writer.store(other))
    assert meet(instances, other) == "refused copy"
    assert meet(instances, first) == "copy"
    writer.close()


def test_what_another_process_stored_before_the_association(settings: Settings, finder: QueryService) -> None:
    instances = KnownInstances(settings, finder)
    one, two = map(new_member, slices(2))
    land(settings, [one])
    assert meet(instances, one, "a") == "copy"
    land(settings, [two])
    assert meet(instances, two, "a") == "new"  # stored twice; extraction merges it
    assert meet(instances, two, "b") == "copy"


@pytest.mark.parametrize("policy", ["keep-first", "reject"])
def test_what_the_catalog_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """After a restart, and so long ago that the journals in memory do not reach back to it."""
    monkeypatch.setattr(known, "KEPT", 0)
    settings = archive(tmp_path, ingest={"on_conflict": policy})
    first, second = map(new_member, slices(2))
    other = new_member(changed(slices(1)[0], PatientComments="corrected"))
    land(settings, [first])
    extract(settings)
    with QueryService(settings) as finder:
        instances = KnownInstances(settings, finder)
        if policy == "reject":  # an index is opened for it, in the background
            deadline = time.monotonic() + 60
            while finder._indexes.at_hand(load=True) is None and time.monotonic() < deadline:
                time.sleep(0.01)
        else:
            assert meet(instances, first) == "new"
            finder.count(Query.build("STUDY"))
        monkeypatch.setattr(known, "KEPT", 100)
        assert meet(instances, first, "b") == "copy"
        assert meet(instances, other, "b") == "other"
        assert meet(instances, second, "b") == "new"


def test_the_newest_journals_are_known_after_a_restart(settings: Settings, finder: QueryService) -> None:
    first, other = new_member(slices(1)[0]), new_member(changed(slices(1)[0], PatientComments="corrected"))
    land(settings, [first])
    land(settings, [other])
    assert meet(KnownInstances(settings, finder), other) == "refused copy"
    assert meet(KnownInstances(settings, finder), first) == "copy"


@pytest.mark.parametrize("damage", ["gone", "changed", "short"])
def test_a_copy_counts_only_where_its_bytes_are(settings: Settings, finder: QueryService, damage: str) -> None:
    instances = KnownInstances(settings, finder)
    member = new_member(slices(1)[0])
    [record] = land(settings, [member])
    path = open_storage(settings.storage.root).root / record.bundle  # type: ignore[union-attr]
    data = path.read_bytes()
    where = record.offset + record.dataset_offset + 40
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:where] if damage == "short" else data[:where] + b"\xff" + data[where + 1 :])
    assert meet(instances, member) == "lost copy"  # the same bytes: no contradiction, whatever became of the first
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    for expected in ("lost copy", "copy"):
        assert instances.store(member, writer.store, sender="b")[0] == expected
    writer.close()


def test_memory_is_bounded_and_a_storage_that_is_away_costs_nothing(
    settings: Settings, finder: QueryService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "KEPT", 3)
    instances = KnownInstances(settings, finder)
    record = land(settings, [new_member(slices(1)[0])])[0]
    for number in range(10):
        instances.add(replace(record, SOPInstanceUID=f"1.{number}"))
    assert len(instances._versions) == 3
    monkeypatch.setattr(known, "SENDERS", 4)
    for number in range(10):
        meet(instances, new_member(slices(1)[0]), str(number))
    assert len(instances._senders) <= 4


@pytest.mark.parametrize("policy", ["keep-first", "reject"])
def test_nobody_waits_for_a_storage_that_is_away_where_a_spool_takes_what_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """What the spool has is known all the same, also of a receiver before; what cannot be read again is no "other"."""
    settings = archive(
        tmp_path,
        ingest={"durability": "spool", "on_conflict": policy},
        storage={"root": "hdfs://127.0.0.1:1/archive"},
    )
    monkeypatch.setattr(known, "PATIENCE_S", 0.05)
    back, looks = threading.Event(), []
    monkeypatch.setattr(KnownInstances, "_look_now", lambda self, study, tail: looks.append(back.wait(60)) or True)
    [data] = slices(1)
    member, other = new_member(data), new_member(changed(data, PatientComments="corrected"))
    with closing(SpoolWriter(settings)) as writer:
        record = writer.store(member)
    instances = KnownInstances(settings, cast("Catalog", None))
    for sender in "abc":
        assert meet(instances, member, sender) == "copy"
        assert meet(instances, other, sender) == "other"
        assert not back.is_set() and (sender, member.StudyInstanceUID) in instances._senders
    spool_storage(settings).delete(record.bundle)  # as when it is shipped
    assert meet(instances, member, "a") == "lost copy"
    assert instances._beside is not None and instances._beside._late == 1  # one was asked, and nobody after it
    back.set()
    deadline = time.monotonic() + 60
    while instances._beside._late and time.monotonic() < deadline:
        time.sleep(0.01)
    assert looks == [True]


def at_once(calls: Sequence[Callable[[], str]]) -> Counter[str]:
    """What the calls return that begin at the same moment."""
    gate, found = threading.Barrier(len(calls)), []

    def run(call: Callable[[], str]) -> None:
        gate.wait()
        found.append(call())

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return Counter(found)


@pytest.mark.parametrize("durability", ["storage", "spool"])
def test_of_instances_at_the_same_moment_one_is_the_first(tmp_path: Path, durability: str) -> None:
    """Twelve threads of two processes (here: what each of them has of its own), beside others that store other UIDs."""
    settings = archive(tmp_path, ingest={"durability": durability})
    data = slices(12)
    with ExitStack() as closed:
        ways = []
        for _ in range(2):
            instances = KnownInstances(settings, cast("Catalog", NoCatalog()))
            ways.append((instances, closed.enter_context(closing(open_writer(settings)))))

        def call(number: int, member: NewMember) -> Callable[[], str]:
            instances, writer = ways[number % 2]
            return lambda: instances.store(member, writer.store, sender=str(number))[0]

        same = [call(number, new_member(data[0])) for number in range(12)]
        assert at_once(same) == {"new": 1, "copy": 11}
        others = [new_member(changed(data[1], PatientComments=str(number))) for number in range(12)]
        assert at_once([call(number, other) for number, other in enumerate(others)]) == {"new": 1, "other": 11}
        found = at_once([call(number, other) for number, other in enumerate(others)])
        assert found == {"copy": 1, "refused copy": 11}
        assert at_once([call(number, new_member(one)) for number, one in enumerate(data[2:])]) == {"new": 10}


def test_what_was_pushed_out_of_its_place_is_looked_for_in_the_journals(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservations, "PLACES", 1)
    one, two = (KnownInstances(settings, cast("Catalog", NoCatalog())) for _ in range(2))
    data = slices(8)
    with closing(open_writer(settings)) as writer:
        assert two.store(new_member(data[0]), writer.store, sender="two")[0] == "new"
        for member in map(new_member, data[1:]):
            assert one.store(member, writer.store, sender="one")[0] == "new"
        for member in map(new_member, data):
            assert two.store(member, writer.store, sender="two")[0] == "copy"


class NoCatalog:
    """There is none."""

    def versions_of(self, study: str, *, seen: str, load: bool) -> None:
        """Of Catalog."""
