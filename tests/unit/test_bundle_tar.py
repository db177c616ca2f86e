"""The tar format: what is written is what tarfile reads, and no bytes make the scanner fail."""

from __future__ import annotations

import io
import tarfile
from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphere.conf.errors import StorageError
from sphere.ingest import tar
from sphere.ingest.members import FileRange, line_start, prepare
from tests.support.bundles import new_member

pytestmark = pytest.mark.unit

TEXT = st.text(max_size=40)
MEMBERS = st.lists(
    st.builds(
        new_member,
        st.integers(0, 1000),
        dataset=st.binary(max_size=2000),
        preamble=st.binary(max_size=600),
        SOPInstanceUID=st.one_of(st.from_regex(r"\A[0-9][0-9.]{0,63}\Z"), TEXT),
        StudyInstanceUID=TEXT,
        source_aet=TEXT,
        collections=st.sampled_from([(), ("trial", "é")]),
        origin=st.one_of(TEXT, st.just("import:/data/\udcff\udc80.dcm")),
        received_at=st.datetimes(datetime(1990, 1, 1), datetime(2200, 1, 1), timezones=st.just(timezone.utc)),
    ),
    max_size=6,
)


def build(members: list) -> tuple[bytes, list]:
    """The tar without its end, and the records."""
    data = bytearray()
    records = []
    for member in members:
        prepared = prepare(member)
        record = prepared.record("bundles/b.tar", len(data))
        assert prepared.line(line_start("bundles/b.tar"), record) == record.to_json()
        records.append(record)
        data += prepared.header + b"".join(map(bytes, prepared.buffers)) + prepared.padding
    return bytes(data), records


def fetcher(data: bytes) -> tar.Fetch:
    """Reads from memory as a storage does."""
    return lambda offset, length: data[offset : offset + length]


@given(MEMBERS)
def test_tarfile_reads_what_we_write_and_so_do_we(members: list) -> None:
    data, records = build(members)
    with tarfile.open(fileobj=io.BytesIO(data + tar.END)) as archive:
        read = [archive.extractfile(item).read() for item in archive.getmembers()]  # type: ignore[union-attr]
    assert read == [member.preamble + member.dataset for member in members]
    found = tar.scan(fetcher(data + tar.END), len(data) + len(tar.END))
    assert (found.sealed, found.damage, found.good) == (True, "", len(data))
    assert [member.record("bundles/b.tar") for member in found.members] == records
    assert [member.record("bundles/b.tar").to_json() for member in found.members] == [one.to_json() for one in records]
    assert [tar.digest(fetcher(data), one, chunk=100) for one in found.members] == [one.sha256 for one in records]


@given(MEMBERS, st.data())
def test_a_torn_tar_gives_its_complete_members(members: list, draw: st.DataObject) -> None:
    data, records = build(members)
    data += tar.END
    place = draw.draw(st.integers(0, len(data)))
    found = tar.scan(fetcher(data[:place]), place)
    ends = [record.offset + record.length + -record.length % 512 for record in records]
    assert len(found.members) == sum(1 for end in ends if end <= place)
    assert found.good == max([0, *(end for end in ends if end <= place)])
    assert found.sealed == (place == len(data))
    assert bool(found.damage) == (place not in (found.good, len(data)))


@given(st.binary(max_size=3000))
def test_any_bytes_are_scanned(data: bytes) -> None:
    found = tar.scan(fetcher(data), len(data))
    assert found.members == []
    assert found.good == 0


@given(st.integers(0, 3000), st.integers(0, 255))
def test_a_changed_byte_is_damage_or_another_record(place: int, value: int) -> None:
    data, _ = build([new_member(1), new_member(2)])
    changed = bytearray(data)
    changed[place % len(data)] = value
    found = tar.scan(fetcher(bytes(changed)), len(changed))
    assert len(found.members) == 2 or found.damage
    assert found.good == (found.members[-1].end if found.members else 0)


@pytest.mark.parametrize(
    ("uid", "name"),
    [
        ("1.2.3", "1.2.3.dcm"),
        ("1" * 64, "1" * 64 + ".dcm"),
        ("1" * 65, "digest.bin"),
        ("", "digest.bin"),
        ("../../etc/passwd", "digest.bin"),
        ("..", "digest.bin"),
        ("1.2/3", "digest.bin"),
        ("1.2.3\n", "digest.bin"),
        ("١.٢", "digest.bin"),
    ],
)
def test_member_names_are_plain(uid: str, name: str) -> None:
    assert tar.member_name(uid, "digest") == name


def test_sizes_over_8_gib_stand_in_the_extended_header() -> None:
    size = (8 << 30) + 5
    said = prepare(new_member(1)).said
    header = tar.member_header("1.2.dcm", size, datetime(2026, 1, 1, tzinfo=timezone.utc), said)
    total = len(header) + size + len(tar.padding(size))
    found = tar.scan(fetcher(header), total)
    (member,) = found.members
    assert (member.offset, member.length, member.end) == (len(header), size, total)
    assert tarfile.TarInfo.frombuf(header[:512], "utf-8", "strict").type == tarfile.XHDTYPE


def test_naive_and_other_times_become_utc() -> None:
    naive = prepare(new_member(1, received_at=datetime(2026, 1, 2, 3)))
    assert naive.fields["received_at"] == datetime(2026, 1, 2, 3, tzinfo=timezone.utc)


def test_a_waiting_file_that_is_too_short_or_gone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "waiting"
    with pytest.raises(StorageError, match="No such file"):
        prepare(new_member(1, dataset=FileRange(path, 0, 5)))
    path.write_bytes(b"123")
    with pytest.raises(StorageError, match="ends 2 bytes early"):
        prepare(new_member(1, dataset=FileRange(path, 0, 5)))
