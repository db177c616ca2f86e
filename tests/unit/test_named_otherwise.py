"""C-STOREs whose command names another instance than the data set: the latter says what is known, deleted and found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from sphere.catalog.known import KnownInstances
from sphere.catalog.queries import Queries, open_queries
from sphere.conf.settings import Settings
from sphere.ingest.header import identify
from sphere.ingest.journal import Landed
from sphere.ingest.media import import_files
from sphere.ingest.part10 import read_file_meta
from sphere.ingest.records import MemberRecord
from sphere.ingest.spool import open_writer
from sphere.ingest.storage import open_storage
from sphere.scp.policy import Policy
from sphere.scp.store import StoreRequest, StoreService
from tests.support.extracted import extract
from tests.support.landing import archive, by_uid, changed, slices, table_rows
from tests.support.tombs import delete, restore

pytestmark = pytest.mark.unit

SUCCESS, DUPLICATE, REFUSED, WARNING = 0x0000, 0x0111, 0x0124, 0xB007
POLICIES = ("keep-first", "replace", "reject")


class Receiver:
    """What one receiver process has of its own; each instance is sent on an association of its own."""

    def __init__(self, settings: Settings, queries: Queries, closed: ExitStack) -> None:
        writer = closed.enter_context(closing(open_writer(settings)))
        known = KnownInstances(settings, queries)
        self._service = StoreService(writer, Policy(settings), known, on_conflict=settings.ingest.on_conflict)
        self._sent = 0

    def store(self, data: bytes, uid: str = "") -> int:
        """The status for the data set of a file, with the UID of a command, its own by default."""
        found = identify(data, size=len(data))
        dataset = memoryview(data)[found.dataset_offset :]
        self._sent += 1
        request = StoreRequest(
            AffectedSOPClassUID=found.SOPClassUID, AffectedSOPInstanceUID=uid or found.SOPInstanceUID,
            TransferSyntaxUID=found.TransferSyntaxUID, dataset=b"", size=0, calling_ae="CT1", address="10.0.0.5",
            sender=str(self._sent),
        )  # fmt: skip
        self._service.begin(request)  # what is made and looked up ahead is of the command alone
        request.dataset, request.size = dataset, len(dataset)
        return self._service.land(request).status


Starts = Callable[[Settings], tuple[Receiver, Receiver, Queries]]


@pytest.fixture
def start() -> Iterator[Starts]:
    """Starts two receivers and a query service of an archive; they end with the test."""
    with ExitStack() as closed:

        def started(settings: Settings) -> tuple[Receiver, Receiver, Queries]:
            queries = closed.enter_context(closing(open_queries(settings)))
            one, two = (Receiver(settings, queries, closed) for _ in range(2))
            return one, two, queries

        yield started


def uid_of(data: bytes) -> str:
    return identify(data, size=len(data)).SOPInstanceUID


def landed(settings: Settings) -> list[MemberRecord]:
    found = Landed(open_storage(settings.storage.root))
    return [record for one in found.bundles() for record in found.records(one.bundle)[0]]


def found(queries: Queries, *uids: str) -> list[str]:
    """Those of the instances that there are: what C-MOVE, WADO-RS and Storage Commitment look up."""
    return sorted(one.SOPInstanceUID for one in queries.lookup_instances(sop=list(uids)))


@pytest.mark.parametrize("mode", ["delta", "files"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_known_and_what_contradicts_it(tmp_path: Path, policy: str, mode: str, start: Starts) -> None:
    settings = archive(tmp_path, ingest={"on_conflict": policy}, catalog={"mode": mode})
    one, two, queries = start(settings)
    x, y = slices(2)
    other = changed(y, PatientComments="corrected")
    named = {uid_of(x), uid_of(y)}
    assert one.store(y, uid_of(x)) == WARNING
    assert found(queries, *named, "1.2.3") == [uid_of(y)]  # before extraction
    assert two.store(x) == SUCCESS  # there was no such instance
    assert two.store(y) == one.store(x) == SUCCESS
    assert two.store(y, "1.2.3") == WARNING  # a copy, once more by another name
    assert len(landed(settings)) == 2
    refused = policy == "reject"
    assert two.store(other, "1.2.3") == (DUPLICATE if refused else WARNING)
    assert one.store(other) == (DUPLICATE if refused else SUCCESS)
    assert {record.SOPInstanceUID for record in landed(settings)} == named
    assert len(landed(settings)) == 3  # what is refused is kept once: see decision 0012
    assert found(queries, *named, "1.2.3") == sorted(named)
    if mode == "files":
        return
    extract(settings)
    assert by_uid(settings).keys() == named
    [row] = table_rows(settings, "conflicts")
    assert row["SOPInstanceUID"] == uid_of(y)
    three, four, queries = start(settings)  # after extraction, and a restart
    assert three.store(other, uid_of(x)) == (DUPLICATE if refused else WARNING)
    assert four.store(x, "1.2.3") == three.store(y, uid_of(x)) == WARNING
    assert four.store(x) == SUCCESS
    assert len(landed(settings)) == 3
    assert found(queries, *named, "1.2.3") == sorted(named)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_deleted_comes_in_by_no_other_name(tmp_path: Path, policy: str, start: Starts) -> None:
    settings = archive(tmp_path, ingest={"on_conflict": policy})
    one, two, _ = start(settings)
    x, y = slices(2)
    assert (one.store(x), one.store(y, uid_of(x))) == (SUCCESS, WARNING)
    extract(settings)
    delete(settings, [uid_of(x)])
    for receiver in (one, two, *start(settings)[:2]):
        assert receiver.store(x) == receiver.store(x, "1.2.3") == receiver.store(x, uid_of(y)) == REFUSED
        assert receiver.store(changed(x, PatientComments="corrected"), "1.2.3") == REFUSED
        assert receiver.store(changed(x, SOPInstanceUID=[uid_of(x), "1.2.3"]), "1.2.3") == REFUSED  # the first counts
        assert receiver.store(y, uid_of(x)) == WARNING  # that one was not deleted
    storage = open_storage(settings.storage.root)
    for record in landed(settings):
        head = read_file_meta(storage.read(record.bundle, record.offset, record.length))
        assert head.MediaStorageSOPInstanceUID == record.SOPInstanceUID
    assert len(landed(settings)) == 2
    restore(settings, [uid_of(x)])
    assert two.store(x, "1.2.3") == WARNING
    assert len(landed(settings)) == 2


def test_what_cannot_be_catalogued_contradicts_nothing(tmp_path: Path, start: Starts) -> None:
    """It is a version of no instance: the first that can be is no duplicate of it. Its copies are stored once."""
    settings = archive(tmp_path, ingest={"on_conflict": "reject"})
    one, two, queries = start(settings)
    [x] = slices(1)
    broken = [changed(x, StudyInstanceUID=""), changed(x, SeriesInstanceUID="none"), changed(x, SOPInstanceUID="none")]
    for data in broken:
        assert one.store(data, uid_of(x)) in (SUCCESS, WARNING)
        assert two.store(data, uid_of(x)) in (SUCCESS, WARNING)
    assert len(landed(settings)) == 3
    assert two.store(x) == SUCCESS
    assert one.store(changed(x, PatientComments="corrected")) == DUPLICATE
    assert found(queries, uid_of(x)) == [uid_of(x)]
    assert start(settings)[0].store(x) == SUCCESS  # after a restart, from the journals
    assert len(landed(settings)) == 5


def test_import_goes_by_the_data_set(tmp_path: Path, start: Starts) -> None:
    """A file whose Media Storage SOP Instance UID is another; and a data set with a UID of 70,000 characters."""
    settings = archive(tmp_path / "archive")
    [x] = slices(1)
    named = x.replace(uid_of(x).encode(), uid_of(x)[:-1].encode() + b"\0", 1)  # in group 0002
    assert uid_of(named) == uid_of(x) and named != x
    syntax = "1.2.840.10008.1.2"
    long = b"\x08\0\x16\0\x1a\0\0\x001.2.840.10008.5.1.4.1.1.2\0" + b"\x08\0\x18\0" + (70_000).to_bytes(4, "little")
    paths = [tmp_path / "named", tmp_path / "long"]
    for path, data in zip(paths, (named, long + b"9" * 70_000), strict=True):
        path.write_bytes(data)
    assert identify(paths[1].read_bytes(), size=paths[1].stat().st_size).TransferSyntaxUID == syntax
    with closing(open_writer(settings)) as writer:
        outcomes = list(import_files(paths, writer, memory_bytes=1 << 20))
    assert [one.error for one in outcomes] == ["", ""]
    assert [one.SOPInstanceUID for one in landed(settings)] == [uid_of(x), "9" * 70_000]
