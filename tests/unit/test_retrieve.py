"""What a retrieve request may say, how reads are put together, and which contexts are proposed."""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from sphere import retrieve_commands
from sphere.catalog.service import StoredInstance
from sphere.cli import main
from sphere.conf.errors import QueryError, StorageError, StorageMissing
from sphere.scp import client
from sphere.scp.client import pull
from sphere.scp.client.pull import Target, find_targets, missing, read_targets, retrieve
from sphere.scp.client.retrieve import Progress
from sphere.scp.contexts import RetrieveModel
from sphere.scp.decode import decode_identifier
from sphere.scp.retrieve import read_ahead
from sphere.scp.retrieve.identifier import Selection, parse_selection
from sphere.scp.retrieve.locate import Locator
from sphere.scp.retrieve.outbound import Sender, groups
from sphere.scp.retrieve.read_ahead import Range, ReadAhead, windows
from sphere.scp.retrieve.transcode import NotConverted
from sphere.scp.retrieve.transcoder import Transcoder
from sphere.scp.upper.messages import Context
from sphere.scp.upper.outgoing import Ready
from sphere.scp.upper.protocol import PDV_HEADER, p_data_parts

pytestmark = pytest.mark.unit

LEVEL, PATIENT, STUDY, SERIES, SOP = 0x00080052, 0x00100020, 0x0020000D, 0x0020000E, 0x00080018
CT = "1.2.840.10008.5.1.4.1.1.2"
J2K = "1.2.840.10008.1.2.4.90"
MPEG = "1.2.840.10008.1.2.4.100"
RLE = "1.2.840.10008.1.2.5"
EXPLICIT = str(ExplicitVRLittleEndian)


def identifier(**values: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


RIGHT: list[tuple[RetrieveModel, bool, dict[str, Any], Selection]] = [
    ("STUDY_ROOT", False, {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "1"}, Selection("STUDY", study=("1",))),
    (
        "STUDY_ROOT", False, {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": ["1.2", "1.3", "1.2"]},
        Selection("STUDY", study=("1.2", "1.3")),
    ),
    (
        "STUDY_ROOT", False,
        {"QueryRetrieveLevel": "IMAGE", "StudyInstanceUID": "1", "SeriesInstanceUID": "2", "SOPInstanceUID": ["3", "4"],
        },
        Selection("IMAGE", study=("1",), series=("2",), sop=("3", "4")),
    ),
    ("STUDY_ROOT", True, {"QueryRetrieveLevel": "IMAGE", "SOPInstanceUID": "3"}, Selection("IMAGE", sop=("3",))),
    ("INSTANCE_ROOT", False, {"QueryRetrieveLevel": "IMAGE", "SOPInstanceUID": "3"}, Selection("IMAGE", sop=("3",))),
    ("PATIENT_ROOT", False, {"QueryRetrieveLevel": "PATIENT", "PatientID": "A*"}, Selection("PATIENT", "A*")),
    (
        "STUDY_ROOT", False,
        {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "1", "PatientID": "P", "StudyDate": ""},
        Selection("STUDY", "P", ("1",)),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "relational", "values", "selection"), RIGHT)
def test_identifiers(model: RetrieveModel, relational: bool, values: dict[str, Any], selection: Selection) -> None:
    assert parse_selection(identifier(**values), model=model, relational=relational) == selection


WRONG: list[tuple[RetrieveModel, bool, dict[str, Any], int]] = [
    ("STUDY_ROOT", False, {"StudyInstanceUID": "1"}, LEVEL),
    ("STUDY_ROOT", False, {"QueryRetrieveLevel": "PATIENT", "PatientID": "1"}, LEVEL),
    ("INSTANCE_ROOT", False, {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "1"}, LEVEL),
    ("STUDY_ROOT", False, {"QueryRetrieveLevel": "STUDY"}, STUDY),
    ("STUDY_ROOT", False, {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": ""}, STUDY),
    ("STUDY_ROOT", False, {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "*"}, STUDY),
    ("STUDY_ROOT", False, {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "1", "SeriesInstanceUID": "2"}, SERIES),
    ("STUDY_ROOT", False, {"QueryRetrieveLevel": "SERIES", "SeriesInstanceUID": "2"}, STUDY),
    (
        "STUDY_ROOT", False,
        {"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": ["1", "2"], "SeriesInstanceUID": "2"}, STUDY,
    ),
    ("PATIENT_ROOT", False, {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "1"}, PATIENT),
    ("STUDY_ROOT", False, {"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": "1", "StudyDate": "2024"}, 0x00080020),
    ("STUDY_ROOT", True, {"QueryRetrieveLevel": "IMAGE", "StudyInstanceUID": "1"}, SOP),
]  # fmt: skip


@pytest.mark.parametrize(("model", "relational", "values", "offending"), WRONG)
def test_wrong_identifiers(model: RetrieveModel, relational: bool, values: dict[str, Any], offending: int) -> None:
    with pytest.raises(QueryError, match=r"must|key|missing|no UID") as error:
        parse_selection(identifier(**values), model=model, relational=relational)
    assert error.value.offending == (offending,)
    assert error.value.dimse == 0xA900


def test_bytes_that_are_no_identifier() -> None:
    with pytest.raises(QueryError, match=r"no item"):
        parse_selection(decode_identifier(b"\xff" * 40, UID(ExplicitVRLittleEndian)), model="STUDY_ROOT")


class Bytes:
    """A storage whose bundles hold byte n at offset n."""

    def __init__(self, *, size: int = 1 << 30) -> None:
        self.size = size
        self.reads: list[tuple[str, int, int]] = []

    def read(self, bundle: str, offset: int, length: int) -> bytes:
        self.reads.append((bundle, offset, length))
        if bundle == "missing":
            raise StorageMissing("missing is not there")
        return bytes((offset + at) % 251 for at in range(min(length, max(0, self.size - offset))))


@examples(deadline=None)  # a loaded machine is no failure
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3000), st.integers(0, 900)), max_size=20),
    st.integers(1, 400),
    st.integers(0, 200),
)
def test_every_range_is_read_whole_whatever_the_windows(
    ranges: list[tuple[str, int, int]], window: int, gap: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_ahead, "WINDOW", window)
        patch.setattr(read_ahead, "GAP", gap)
        wanted = [Range(*one) for one in ranges]
        assert all(0 <= one.length <= max(window, gap + window) for one in windows(wanted, window))
        storage = Bytes()
        with ReadAhead(storage, wanted) as ahead:  # type: ignore[arg-type]
            for one in wanted:
                assert b"".join(ahead.next()) == bytes((one.offset + at) % 251 for at in range(one.length))


def test_neighbours_are_read_together() -> None:
    """1,000 instances of 500 kB with 2 kB of tar header between them: 250 reads, not 1,000."""
    ranges = [Range("a", number * 502_000, 500_000) for number in range(1000)]
    reads = list(windows(ranges, read_ahead.WINDOW))
    assert len(reads) <= 250
    assert max(one.length for one in reads) <= read_ahead.WINDOW


def test_bytes_that_cannot_be_read_cost_what_needs_them() -> None:
    storage = Bytes()
    with ReadAhead(storage, [Range("a", 0, 5), Range("missing", 0, 5), Range("b", 7, 2)]) as ahead:  # type: ignore[arg-type]
        assert b"".join(ahead.next()) == bytes(range(5))
        with pytest.raises(StorageError, match="missing is not there"):
            list(ahead.next())
        ahead.next()
    with ReadAhead(storage, [Range("a", 0, 9), Range("a", 20, 2)]) as ahead:  # type: ignore[arg-type]
        ahead.next()  # passed over without being looked at
        assert b"".join(ahead.next()) == bytes((20, 21))


def test_a_bundle_that_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "PUBLISHED_S", 0.0)
    with (
        ReadAhead(Bytes(size=3), [Range("a", 0, 5)]) as ahead,  # type: ignore[arg-type]
        pytest.raises(StorageError, match="ends at byte 3"),
    ):
        list(ahead.next())


def stored(number: int, sop_class: str = CT, syntax: str = str(ExplicitVRLittleEndian), **more: Any) -> StoredInstance:
    one = StoredInstance("1.1", "1.1.1", f"1.2.{number}", sop_class, syntax, "a", number * 1000, 500, 100, None, "")
    return replace(one, **more)


def test_many_sop_classes_take_several_associations() -> None:
    instances = [stored(number, f"1.2.3.{number % 90}", J2K) for number in range(180)]
    found = list(groups(instances))
    assert [len(proposed) for proposed, _ in found] == [128, 52]
    assert sorted(one.SOPInstanceUID for _, group in found for one in group) == sorted(
        one.SOPInstanceUID for one in instances
    )
    assert [one.transfer_syntaxes for one in found[0][0][:2]] == [
        (J2K,), (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
    ]  # fmt: skip


class Channel:
    """An association that accepted some transfer syntaxes for CT."""

    def __init__(self, *syntaxes: str) -> None:
        self.user_contexts = [Context(2 * n + 1, UID(CT), UID(one), True) for n, one in enumerate(syntaxes)]
        self.asked: list[tuple[Context, Mapping[str, Any], bytes]] = []

    def ready(self, context: Context, command: Mapping[str, Any], dataset: Any) -> Ready:
        self.asked.append((context, command, b"".join(dataset.parts)))
        return Ready(1, command["CommandField"], iter(()))

    def start(self, request: Ready) -> None:
        raise AssertionError("nothing is sent here")

    def answer(self, request: Ready) -> dict[str, Any]:
        raise AssertionError("nothing was sent here")


@pytest.mark.parametrize(
    ("syntax", "accepted", "expected"),
    [
        (J2K, (str(ExplicitVRLittleEndian), J2K), J2K),
        (J2K, (str(ImplicitVRLittleEndian), str(ExplicitVRLittleEndian)), str(ExplicitVRLittleEndian)),
        (J2K, (str(ImplicitVRLittleEndian),), str(ImplicitVRLittleEndian)),
        ("", (str(ImplicitVRLittleEndian),), str(ImplicitVRLittleEndian)),
        (MPEG, (str(ExplicitVRLittleEndian),), "cannot be converted"),
        (J2K, (MPEG,), "not accepted: CT Image Storage"),
    ],
)
def test_routes(syntax: str, accepted: tuple[str, ...], expected: str) -> None:
    routes = Sender(Channel(*accepted), Transcoder(), {}).routes(stored(1, syntax=syntax))
    assert expected in (routes if isinstance(routes, str) else str(routes[0].transfer_syntax))


@pytest.mark.parametrize(
    ("syntax", "accepted", "preferred", "expected"),
    [
        (J2K, (J2K, RLE), (RLE,), [RLE, J2K]),
        (J2K, (J2K, RLE), (RLE, J2K), [J2K]),  # it lies in one of them: nothing to be gained
        (EXPLICIT, (EXPLICIT, RLE, J2K), (J2K, RLE), [J2K, RLE, EXPLICIT]),
        (EXPLICIT, (EXPLICIT,), (J2K,), [EXPLICIT]),
        (EXPLICIT, (RLE,), (), [RLE]),  # all that a requester of C-GET takes
        (MPEG, (MPEG, RLE), (RLE,), [MPEG]),
    ],
)
def test_routes_that_a_peer_prefers(
    syntax: str, accepted: tuple[str, ...], preferred: tuple[str, ...], expected: list[str]
) -> None:
    routes = Sender(Channel(*accepted), Transcoder(), {}, preferred=preferred).routes(stored(1, syntax=syntax))
    assert [str(one.transfer_syntax) for one in routes if isinstance(one, Context)] == expected
    [(proposed, _)] = groups([stored(1, syntax=syntax)], preferred=preferred)
    assert {*preferred, syntax} <= {one for context in proposed for one in context.transfer_syntaxes}


@pytest.mark.parametrize(
    ("padded", "sent"), [(None, b"12345\0"), (set(), b"12345"), ({"1.2.1"}, b"12345\0")], ids=["get", "first", "again"]
)
def test_odd_data_sets(padded: set[str] | None, sent: bytes) -> None:
    channel = Channel(str(ExplicitVRLittleEndian))
    one = stored(1, length=105)
    sender = Sender(channel, Transcoder(), {"MoveOriginatorMessageID": 7}, padded)
    request = sender.ready(one, channel.user_contexts, iter([memoryview(b"123"), memoryview(b"45")]))
    assert isinstance(request, Ready)
    assert channel.asked[0][2] == sent
    assert channel.asked[0][1]["MoveOriginatorMessageID"] == 7


def test_what_cannot_be_converted_says_why_and_the_next_can() -> None:
    transcoder = Transcoder()
    try:
        with pytest.raises(NotConverted, match="cannot be decoded"):
            transcoder.convert(b"", MPEG, str(ExplicitVRLittleEndian))
        with pytest.raises(NotConverted, match="cannot be inflated"):
            transcoder.convert(b"nonsense", "1.2.840.10008.1.2.1.99", str(ExplicitVRLittleEndian))
        transcoder._idle[0]._process.kill()
        with pytest.raises(NotConverted, match="crashed"):
            transcoder.convert(b"", str(ImplicitVRLittleEndian), str(ExplicitVRLittleEndian))
        implicit = struct.pack("<HHI", 0x0008, 0x0018, 4) + b"1.2\0"
        explicit = transcoder.convert(implicit, str(ImplicitVRLittleEndian), str(ExplicitVRLittleEndian))
        assert explicit == b"\x08\x00\x18\x00UI\x04\x001.2\0"
    finally:
        transcoder.close()


@examples(deadline=None)
@given(st.lists(st.binary(max_size=50)), st.integers(8, 60))
def test_fragments_join_to_the_data_set(parts: list[bytes], max_pdu: int) -> None:
    whole = b"".join(parts)
    wire = b"".join(p_data_parts(5, parts, len(whole), max_pdu=max_pdu))
    joined, at = b"", 0
    while at < len(wire):
        length, context, control = PDV_HEADER.unpack_from(wire, at + 6)
        assert length + 4 == int.from_bytes(wire[at + 2 : at + 6], "big") <= max_pdu
        joined += wire[at + 6 + PDV_HEADER.size : at + 10 + length]
        at += 10 + length
        assert (context, bool(control & 2)) == (5, at == len(wire))
        assert length % 2 == 0 or at == len(wire)
    assert joined == whole


@pytest.mark.parametrize("size", [3, 5])
def test_a_data_set_of_another_length_than_promised(size: int) -> None:
    with pytest.raises(ValueError, match=r"longer|early"):
        list(p_data_parts(1, [b"12", b"34"], size, max_pdu=100))


class Nothing:
    """A catalog without rows, or with some."""

    def __init__(self, rows: Sequence[StoredInstance] = ()) -> None:
        self.rows = rows

    def find(self, query: Any, *, as_of: Any = None) -> Iterator[Any]:
        return iter(())

    def lookup_instances(self, **keys: Any) -> Iterator[StoredInstance]:
        return iter(self.rows)


def test_each_instance_once_and_nobody_s_studies_are_nothing() -> None:
    locator = Locator(Nothing([stored(1), stored(2), stored(2)]))
    found = locator.locate(Selection("STUDY", study=("1.1",)))
    assert [one.SOPInstanceUID for one in found] == ["1.2.1", "1.2.2"]
    assert locator.locate(Selection("PATIENT", patient="NOBODY")) == []


def test_lists_of_what_to_retrieve() -> None:
    lines = ["1.2 # first", "", "# nothing", "1.3"]
    assert read_targets(lines, "STUDY") == [
        Target("STUDY", {"StudyInstanceUID": "1.2"}), Target("STUDY", {"StudyInstanceUID": "1.3"})
    ]  # fmt: skip
    assert read_targets(["1,2"], "SERIES")[0].keys == {"StudyInstanceUID": "1", "SeriesInstanceUID": "2"}
    assert [one.keys for one in read_targets([" P 1, ward # first\n", "\n"], "PATIENT")] == [{"PatientID": "P 1, ward"}]
    with pytest.raises(QueryError, match="line 2: level SERIES needs"):
        read_targets(["1 2", "1"], "SERIES")


def test_unique_keys_need_no_query(settings: Any) -> None:
    keys = {"StudyInstanceUID": "1.2"}
    assert find_targets(None, keys, "STUDY", settings=settings) == [Target("STUDY", keys)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (set(), [("STUDY", "1")]),
        ({"a", "b", "c"}, []),
        ({"a"}, [("IMAGE", "b"), ("IMAGE", "c")]),
        ({"c"}, [("IMAGE", "a\\b")]),
    ],
)
def test_what_is_here_is_not_asked_for(here: set[str], expected: list[tuple[str, str]]) -> None:
    there = {("1", "1.1"): {"a": CT, "b": CT}, ("1", "1.2"): {"c": CT}}
    found = missing(Target("STUDY", {"StudyInstanceUID": "1"}), there, here)
    assert [(one.level, one.keys[pull.KEYS[one.level][-1]]) for one in found] == expected
    assert all(one.sop_classes == {CT} for one in found)


@pytest.mark.parametrize(
    ("answers", "tries", "completed", "error"),
    [
        ([[Progress(0xFF00, 1, 1), Progress(0x0000, 0, 2)]], 1, 2, ""),
        ([[Progress(0xA801)], [Progress(0x0000, 0, 2)]], 2, 2, ""),
        ([[Progress(0xA801)], [Progress(0xA801, comment="who?")]], 2, 0, "status 0xA801 (who?)"),
        ([[Progress(0xB000, 0, 1, 1, failed_uids=("1.2",))]], 1, 1, "1 instances failed"),
        ([[Progress(0xB000, 0, 1, 0, 1)]], 1, 1, ""),
    ],
)
def test_tries(answers: list[list[Progress]], tries: int, completed: int, error: str) -> None:
    left, pauses = iter(answers), []
    outcome = retrieve(
        Target("STUDY", {"StudyInstanceUID": "1"}), lambda target: iter(next(left)),
        on_progress=lambda progress: None, tries=2, sleep=pauses.append,
    )  # fmt: skip
    assert (outcome.tries, outcome.completed, outcome.error, len(pauses)) == (tries, completed, error, tries - 1)
    assert len(pull.failures([outcome])) == bool(error)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stderr", "shown"), [(Terminal(), True), (io.StringIO(), False)], ids=["terminal", "pipe"])
def test_a_pause_between_requests_and_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, shown: bool
) -> None:
    config, listed = tmp_path / "sphere.toml", tmp_path / "uids.txt"
    config.write_text('[[peers]]\nname = "ward"\nae_title = "WARD"\nhost = "127.0.0.1"\n')
    listed.write_text("1.1\n1.2\n1.3\n")
    events: list[Any] = []

    def move(peer: Any, keys: Mapping[str, str], **more: Any) -> Iterator[Progress]:
        events.append(keys["StudyInstanceUID"])
        return iter([Progress(0xFF00, 1, 1), Progress(0x0000, 0, 2)])

    monkeypatch.setattr(client, "move", move)
    monkeypatch.setattr(retrieve_commands, "time", SimpleNamespace(sleep=events.append))
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    arguments = ["--config", str(config), "move", "ward", "--to", "DEST", "--from", str(listed), "--pause", "2.5"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(arguments)
    assert events == ["1.1", 2.5, "1.2", 2.5, "1.3"]  # none before the first, none after the last
    text = stderr.getvalue()
    assert ("3/3" in text and "2 instances" in text) if shown else text == ""
