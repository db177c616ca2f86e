"""Rules of the settings: which instance they match, in which order, and what they make of it."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from sphere.conf import toml
from sphere.conf.errors import Refused, SettingsError
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.bundle import BundleWriter
from sphere.ingest.journal import Landed
from sphere.ingest.media import import_files
from sphere.ingest.members import FileRange, NewMember
from sphere.ingest.part10 import file_meta
from sphere.ingest.records import MemberRecord
from sphere.ingest.recovery import rebuild_journal
from sphere.ingest.storage import open_storage
from sphere.scp.policy import Policy
from tests.support.samples import CT_STORAGE, dataset_of, make_instance

pytestmark = pytest.mark.unit

EXPLICIT = "1.2.840.10008.1.2.1"
TAG = {"action": "tag", "collection": "x"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("made") / "1.dcm"
    item = Dataset()
    item.RequestedProcedureID = "8"
    values: dict[str, Any] = {"PatientID": "TRIAL7", "StudyDate": "20240315", "SOPInstanceUID": "1.2.3.1"}
    values |= {"RequestAttributesSequence": [item]}
    return dataset_of(make_instance(path, **values))


def member(data: bytes, **changes: Any) -> NewMember:
    fields: dict[str, Any] = {
        "SOPInstanceUID": "1.2.3.1", "SOPClassUID": CT_STORAGE, "StudyInstanceUID": "1.2.3.2",
        "SeriesInstanceUID": "1.2.3.3", "TransferSyntaxUID": EXPLICIT, "source_aet": "CT1", "origin": "test",
        "received_at": datetime(2026, 11, 24, tzinfo=timezone.utc), "dataset": data,
        "preamble": file_meta(
            sop_class_uid=CT_STORAGE, sop_instance_uid="1.2.3.1", transfer_syntax_uid=EXPLICIT
        ),
    } | changes  # fmt: skip
    return NewMember(**fields)


def with_rules(*rules: dict[str, Any], **sections: Any) -> Settings:
    ward = {"name": "ward", "ae_title": "CT1", "host": "10.0.0.5"}
    return from_dict({"peers": [ward], "rules": list(rules), **sections}, base=Path("/"))


def test_the_rules_of_the_guide_do_what_it_says(data: bytes) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    example = guide.partition("### Rules")[2].partition("```toml\n")[2].partition("```")[0]
    policy = Policy(from_dict(toml.loads(example), base=Path("/")))
    assert policy.admit(member(data), via="dimse", address="10.1.0.7").collections == ("trial",)
    with pytest.raises(Refused, match=r"refused by rule rules\.1"):
        policy.admit(member(data, source_aet="MR1"), via="dimse", address="10.1.0.7")
    assert policy.admit(member(data, source_aet="MR1"), via="dimse", address="10.2.0.7").collections == ()


@pytest.mark.parametrize(
    "uids", [{"SOPInstanceUID": "1.2.x"}, {"StudyInstanceUID": "1." * 33 + "1"}, {"SeriesInstanceUID": ""}]
)
def test_rules_ask_what_will_be_no_row_as_well(tmp_path: Path, uids: dict[str, str]) -> None:
    """Its UIDs are none: extraction would put it in quarantine, and its bytes would be kept."""
    data = dataset_of(make_instance(tmp_path / "1.dcm", PatientID="SECRET7", **uids))
    policy = Policy(with_rules({"keys": {"PatientID": "SECRET*"}, "action": "reject"}))
    with pytest.raises(Refused, match=r"refused by rule rules\.0"):
        policy.admit(member(data), via="dimse")


@pytest.mark.parametrize(
    ("condition", "matches"),
    [
        ({}, True),
        ({"calling_ae": "CT1"}, True),
        ({"calling_ae": ["MR*", "CT?"]}, True),
        ({"calling_ae": "CT"}, False),
        ({"calling_ae": "ct1"}, False),
        ({"calling_ae": "C[T]1"}, False),
        ({"called_ae": "SPH*"}, True),
        ({"called_ae": "OTHER"}, False),
        ({"peer": "ward"}, True),
        ({"address": "10.0.0.5"}, True),
        ({"address": ["192.168.0.0/16", "10.0.0.0/8"]}, True),
        ({"address": "10.0.0.6"}, False),
        ({"via": "dimse"}, True),
        ({"via": ["web", "import"]}, False),
        ({"modality": "CT"}, True),
        ({"modality": ["MR", "PT"]}, False),
        ({"sop_class": "CTImageStorage"}, True),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.2*"}, True),
        ({"sop_class": "MRImageStorage"}, False),
        ({"transfer_syntax": "ExplicitVRLittleEndian"}, True),
        ({"transfer_syntax": "1.2.840.10008.1.2"}, False),
        ({"keys": {"PatientID": "TRIAL*"}}, True),
        ({"keys": {"00100020": "TRIAL?"}}, True),
        ({"keys": {"PatientID": ["A*", "TRIAL7"]}}, True),
        ({"keys": {"StudyDate": "20240101-20240401"}}, True),
        ({"keys": {"StudyDate": "20240401-"}}, False),
        ({"keys": {"PatientID": "TRIAL*", "StudyDate": "-20240101"}}, False),
        ({"keys": {"PatientName": "test^*"}}, True),
        ({"keys": {"RequestAttributesSequence": {"RequestedProcedureID": "7"}}}, False),
        ({"keys": {"RequestAttributesSequence": {"RequestedProcedureID": "8"}}}, True),
        ({"calling_ae": "CT1", "modality": "MR"}, False),
    ],
)
def test_conditions(data: bytes, condition: dict[str, Any], matches: bool) -> None:
    policy = Policy(with_rules({**condition, **TAG}))
    admitted = policy.admit(member(data), via="dimse", called_ae="SPHERE", address="10.0.0.5")
    assert admitted.collections == (("x",) if matches else ())


def test_tags_add_up_and_the_first_that_accepts_or_rejects_ends_it(data: bytes) -> None:
    tags = [{"action": "tag", "collection": "a"}, {"action": "tag", "collection": ["b", "a"]}]
    reject = {"action": "reject", "status": 0xA700, "name": "none"}
    assert Policy(with_rules(*tags)).admit(member(data), via="web").collections == ("a", "b")
    accept = {"action": "accept", "collection": "c", "calling_ae": "CT*"}
    assert Policy(with_rules(*tags, accept, reject)).admit(member(data), via="dimse").collections == ("a", "b", "c")
    with pytest.raises(Refused, match="refused by rule none") as refused:
        Policy(with_rules(*tags, reject, accept)).admit(member(data), via="dimse")
    assert refused.value.dimse == 0xA700


def test_the_header_is_read_only_where_a_rule_still_needs_it(data: bytes, tmp_path: Path) -> None:
    missing = FileRange(tmp_path / "missing", 0, 10)
    rules = [{"calling_ae": "MR1", "modality": "MR", **TAG}, {"action": "accept"}, {"modality": "CT", **TAG}]
    assert Policy(with_rules(*rules)).admit(member(data, dataset=missing), via="dimse").collections == ()


def test_bytes_that_are_no_header_match_no_key() -> None:
    policy = Policy(with_rules({"modality": "CT", **TAG}, {"action": "tag", "collection": "all"}))
    assert policy.admit(member(b"\xff" * 40), via="dimse").collections == ("all",)


@pytest.mark.parametrize("cut", [0, 3, 100])
def test_fragments_and_files_are_read_as_one(data: bytes, tmp_path: Path, cut: int) -> None:
    policy = Policy(with_rules({"keys": {"PatientID": "TRIAL7"}, **TAG}))
    fragments = [memoryview(data)[:cut], memoryview(data)[cut:]]
    assert policy.admit(member(data, dataset=fragments), via="dimse").collections == ("x",)
    path = tmp_path / "waiting"
    path.write_bytes(bytes(cut) + data)
    streamed = member(data, dataset=FileRange(path, cut, len(data)))
    assert policy.admit(streamed, via="dimse").collections == ("x",)
    assert streamed.fetch(0, streamed.size) == streamed.preamble + data


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"action": "tag"}, "rules.0: a rule that tags needs a `collection`"),
        ({"action": "reject", "collection": "x"}, "rules.0: a rule that rejects takes no `collection`"),
        ({"action": "accept", "status": 0xA700}, "`status` is for a rule that rejects"),
        ({"action": "reject", "status": 0x0000}, "rules.0.status: is no failure status of C-STORE"),
        ({"action": "reject", "status": 0xB000}, "rules.0.status: is no failure status of C-STORE"),
        ({"action": "drop"}, "rules.0.action: Input should be 'tag', 'accept' or 'reject'"),
        ({"action": "tag", "collection": "a b"}, "rules.0.collection.0: String should match"),
        ({"action": "accept", "adress": "10.0.0.1"}, "nearest known key is 'rules.address'"),
        ({"action": "accept", "address": "10.0.0.300"}, "rules.0.address.0: is neither an IP address nor a network"),
        ({"action": "accept", "peer": "north"}, "rules.0.peer: no peer is called 'north'"),
        ({"action": "accept", "keys": {"PatientIdentity": "1"}}, "rules.0.keys: 'PatientIdentity' is neither"),
        ({"action": "accept", "keys": {"StudyDate": "yesterday"}}, "rules.0.keys: StudyDate: is not a date"),
        ({"action": "accept", "keys": {"ModalitiesInStudy": "CT"}}, "ModalitiesInStudy .* no instance has"),
        ({"action": "accept", "keys": {"PatientID": "*"}}, "rules.0.keys: PatientID: .* matches everything"),
        ({"action": "accept", "sop_class": "CTImageStorag"}, "rules.0.sop_class: .* did you mean CTImageStorage"),
        ({"action": "accept", "transfer_syntax": "jpeg"}, "rules.0.transfer_syntax: 'jpeg' is no keyword"),
        (
            {"action": "accept", "modality": "US", "keys": {"Modality": "CT"}},
            "rules.0: `modality` and the key Modality",
        ),
    ],
)
def test_bad_rules_are_named(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Policy(with_rules(rule))


def test_collections_are_in_journal_and_tar(settings: Settings, data: bytes) -> None:
    storage = open_storage(settings.storage.root)
    writer = BundleWriter(storage, settings)
    tagged = writer.store(member(data, SOPInstanceUID="1.1", collections=("a", "b")))
    plain = writer.store(member(data, SOPInstanceUID="1.2"))
    writer.close()
    [state] = Landed(storage).bundles()
    assert Landed(storage).records(state.bundle)[0] == [tagged, plain]
    assert tagged.collections == ("a", "b")
    journal_path = state.bundle.replace(".tar", ".journal")
    journal = storage.read(journal_path)
    rebuild_journal(storage, state.bundle)
    assert storage.read(journal_path) == journal
    assert journal.count(b"collections") == storage.read(state.bundle).count(b'"collections":["a","b"]') == 1


def test_journals_of_before_are_read_and_written_as_they_were() -> None:
    line = (
        b'{"bundle":"b.tar","offset":1,"length":2,"dataset_offset":0,"SOPInstanceUID":"1.2","SOPClassUID":"",'
        b'"StudyInstanceUID":"","SeriesInstanceUID":"","TransferSyntaxUID":"","sha256":"00",'
        b'"received_at":"2026-11-24T00:00:00.000001Z","source_aet":"A","origin":"o"}'
    )
    record = MemberRecord.from_json(line)
    assert record.collections == ()
    assert record.to_json() == line


def test_an_import_follows_the_rules(settings: Settings, tmp_path: Path) -> None:
    rules = [{"via": "import", "modality": "MR", "action": "reject"}, {"action": "tag", "collection": "cd"}]
    policy = Policy(with_rules(*rules))
    files = [make_instance(tmp_path / "1.dcm"), make_instance(tmp_path / "2.dcm", Modality="MR")]
    writer = BundleWriter(open_storage(settings.storage.root), settings)
    stored, refused = import_files(
        files, writer, memory_bytes=1 << 20, admit=lambda member: policy.admit(member, via="import")
    )
    writer.close()
    assert stored.record is not None
    assert stored.record.collections == ("cd",)
    assert (refused.record, refused.error) == (None, "refused by rule rules.0")
