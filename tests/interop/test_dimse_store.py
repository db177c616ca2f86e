"""C-ECHO and C-STORE with other people's programs: what arrives is kept byte for byte."""

from __future__ import annotations

import hashlib
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian
from pynetdicom import AE, AllStoragePresentationContexts, build_context

from sphere.conf.errors import PeerError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.ingest.header import identify
from sphere.ingest.journal import Landed
from sphere.ingest.storage import open_storage
from sphere.scp import client
from tests.support.dicom_tools import (
    STORESCU_OPTIONS,
    part10_dataset,
    require_tool,
    run_tool,
    running_orthanc,
    running_storescp,
)
from tests.support.hdfs import HdfsCluster
from tests.support.ports import free_port
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import CT_STORAGE, dataset_of, make_instance, sendable_files

pytestmark = pytest.mark.interop


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    with running_receiver(tmp_path / "archive") as running:
        yield running


def digests(receiver: Receiver) -> Counter[str]:
    """SHA-256 of every data set in the bundles, checked against what lies there."""
    found: Counter[str] = Counter()
    for record in receiver.members():
        digest = hashlib.sha256(receiver.dataset_bytes(record)).hexdigest()
        assert digest == record.sha256
        found[digest] += 1
    return found


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def as_sent(path: Path) -> bytes:
    """The file's data set; a deflated one of odd length with the NUL that PS3.5 A.5 wants."""
    data = dataset_of(path)
    return data + bytes(len(data) % 2) if _syntax(path) == DeflatedExplicitVRLittleEndian else data


def _syntax(path: Path) -> str:
    return identify(path.read_bytes(), size=path.stat().st_size).TransferSyntaxUID


def test_echoscu(receiver: Receiver) -> None:
    run = run_tool("echoscu", "-aet", "ANYBODY", "-v", "127.0.0.1", receiver.port)
    assert run.returncode == 0, run.stdout
    assert "Received Echo Response (Success)" in run.stdout


def test_storescu_in_every_transfer_syntax(receiver: Receiver, tmp_path: Path) -> None:
    """storescu sends the same files to DCMTK's storescp, which writes exactly what it receives: the reference."""
    require_tool("storescu")
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in sendable_files():
        if (syntax := _syntax(path)) in STORESCU_OPTIONS:
            groups[syntax].append(path)
    assert len(groups) >= 8
    with running_storescp(tmp_path / "reference") as reference_port:
        for syntax, paths in groups.items():
            for port in (reference_port, receiver.port):
                run_tool("storescu", "-nh", "-R", STORESCU_OPTIONS[syntax], "127.0.0.1", port, *paths)
    sent = Counter(sha256(part10_dataset(path.read_bytes())) for path in (tmp_path / "reference").iterdir())
    assert sum(sent.values()) > 0.9 * sum(len(paths) for paths in groups.values())
    received = digests(receiver)
    assert sent - received == Counter()
    assert sum((received - sent).values()) <= 5  # what storescp refuses, and we do not


def test_our_client_sends_files_as_they_are(receiver: Receiver) -> None:
    files = sendable_files()
    results = list(client.store(receiver.peer, files, settings=receiver.settings))
    assert sorted(str(result.source) for result in results) == sorted(map(str, files))
    refused = [result for result in results if not result.stored]
    assert all("Media Storage Directory" in result.error for result in refused), refused
    stored = [Path(result.source) for result in results if result.stored]
    assert digests(receiver) == Counter(sha256(as_sent(path)) for path in stored)


@pytest.mark.hdfs
def test_storescu_to_hdfs(hdfs_cluster: HdfsCluster, tmp_path: Path) -> None:
    """Durable on HDFS before Success, and the same bytes after the bundle is sealed."""
    files = [path for path in sendable_files() if _syntax(path) == ExplicitVRLittleEndian][:60]
    tables = {"storage": {"root": f"{hdfs_cluster.hdfs_url}/receivers"}}
    with running_storescp(tmp_path / "reference") as port:
        run_tool("storescu", "-nh", "-R", "-xe", "127.0.0.1", port, *files)
    with running_receiver(tmp_path / "archive", tables) as receiver:
        run_tool("storescu", "-nh", "-R", "-xe", "127.0.0.1", receiver.port, *files)
        acknowledged = receiver.log.count("status=0x0000") + receiver.log.count("status=0xB007")
    sent = Counter(sha256(part10_dataset(path.read_bytes())) for path in (tmp_path / "reference").iterdir())
    assert digests(receiver) == sent
    assert acknowledged == sum(sent.values()) >= 50


def test_a_file_that_cannot_be_sent_is_named_and_the_others_go_on(receiver: Receiver, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not DICOM")
    files = [make_instance(tmp_path / "1.dcm"), text, tmp_path / "missing.dcm", make_instance(tmp_path / "2.dcm")]
    results = {one.source: one for one in client.store(receiver.peer, files, settings=receiver.settings)}
    assert [results[path].stored for path in files] == [True, False, False, True]
    assert "not a DICOM instance" in results[files[1]].error
    assert "cannot be read: No such file or directory" in results[files[2]].error


def test_every_storage_class_is_accepted_in_what_is_proposed_first(receiver: Receiver) -> None:
    classes = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
    for start in range(0, len(classes), 128):
        ae = AE()
        for uid in classes[start : start + 128]:
            ae.add_requested_context(uid, ["1.2.3.4.5.6", "1.2.840.10008.1.2"])  # a private syntax, then the default
        assoc = ae.associate("127.0.0.1", receiver.port)
        assert assoc.is_established
        assert {str(context.transfer_syntax[0]) for context in assoc.accepted_contexts} == {"1.2.3.4.5.6"}
        assert assoc.rejected_contexts == []
        assoc.release()


def test_what_is_no_storage_is_refused_alone(receiver: Receiver) -> None:
    ae = AE()
    refused = ["1.2.840.10008.5.1.4.1.2.2.99", "1.2.840.10008.5.1.1.9", "1.2.840.10008.5.1.4.31"]
    for uid in [*refused, CT_STORAGE]:
        ae.add_requested_context(uid)
    assoc = ae.associate("127.0.0.1", receiver.port)
    assert [str(context.abstract_syntax) for context in assoc.accepted_contexts] == [CT_STORAGE]
    assert {(str(cx.abstract_syntax), cx.result) for cx in assoc.rejected_contexts} == {(uid, 3) for uid in refused}
    assoc.release()


@pytest.mark.parametrize(
    ("sop_class", "syntax"),
    [
        ("1.3.12.2.1107.5.9.1", "1.2.840.10008.1.2.1"),
        ("1.2.840.10008.5.1.4.1.1.6", "1.2.840.10008.1.2.1"),  # retired
        ("1.2.840.10008.5.1.4.1.1.9999", "1.2.840.10008.1.2.1"),  # unknown, where PS3.6 puts storage classes
        (CT_STORAGE, "1.2.826.0.1.3680043.9.7.1"),  # a private transfer syntax
    ],
)
def test_private_and_unknown_classes(receiver: Receiver, tmp_path: Path, sop_class: str, syntax: str) -> None:
    path = make_instance(tmp_path / "one.dcm", SOPClassUID=sop_class, transfer_syntax=syntax)
    [result] = client.store(receiver.peer, [path], settings=receiver.settings)
    assert result.stored, result
    [record] = receiver.members()
    assert (record.SOPClassUID, record.TransferSyntaxUID) == (sop_class, syntax)
    assert receiver.dataset_bytes(record) == dataset_of(path)


def test_more_contexts_than_one_association_has(receiver: Receiver, tmp_path: Path) -> None:
    files = [make_instance(tmp_path / f"{n}.dcm", SOPClassUID=f"1.2.3.{n}") for n in range(1, 140)]
    results = list(client.store(receiver.peer, files, settings=receiver.settings))
    assert all(result.stored for result in results)
    assert len(receiver.members()) == len(files)
    assert receiver.log.count("association accepted") == 2


def test_orthanc_stores_to_us(receiver: Receiver, tmp_path: Path) -> None:
    names = {"CT_small.dcm", "MR_small.dcm", "JPEG2000.dcm", "SC_rgb_rle.dcm", "rtplan.dcm"}
    files = [path for path in sendable_files() if path.name in names]
    with running_orthanc(tmp_path / "orthanc", {"sphere": ("SPHERE", receiver.port)}) as orthanc:
        ids = [orthanc.post("/instances", path.read_bytes())["ID"] for path in files]
        report = orthanc.post("/modalities/sphere/store", ids)
    assert report["InstancesCount"] == len(files)
    assert report["FailedInstancesCount"] == 0
    assert len(digests(receiver)) == len(files)
    assert {record.source_aet for record in receiver.members()} == {"ORTHANC"}


def test_an_instance_larger_than_the_memory_allowed(tmp_path: Path) -> None:
    path = make_instance(tmp_path / "large.dcm", EncapsulatedDocument=bytes(range(256)) * (20 << 12))
    with running_receiver(tmp_path / "archive", {"storage": {"memory_mib": 1}}) as receiver:
        [result] = client.store(receiver.peer, [path], settings=receiver.settings)
        assert (result.status, result.error) == (0, "")
        [record] = receiver.members()
        assert receiver.dataset_bytes(record) == dataset_of(path)
        assert list((receiver.settings.archive.state_dir / "incoming").iterdir()) == []


def test_receivers_share_the_port(tmp_path: Path) -> None:
    port = free_port()
    with (
        running_receiver(tmp_path / "one", {"dimse": {"port": port}}) as one,
        running_receiver(tmp_path / "two", {"dimse": {"port": port}}) as two,
    ):
        for _ in range(40):
            client.echo(one.peer, settings=one.settings)
        counts = [receiver.log.count("association accepted") for receiver in (one, two)]
        assert sum(counts) == 40
        assert min(counts) > 0


def test_sigterm_lets_a_running_association_finish(tmp_path: Path) -> None:
    files = [make_instance(tmp_path / f"{n}.dcm") for n in range(3)]
    with running_receiver(tmp_path / "archive", clean=False) as receiver:
        results = client.store(receiver.peer, files, settings=receiver.settings)
        assert next(results).stored
        receiver.process.send_signal(signal.SIGTERM)
        with pytest.raises(PeerError, match=r"cannot connect|connection lost"):  # or reset in the moment of its closing
            while True:  # until the port is closed
                client.echo(receiver.peer, settings=receiver.settings)
        assert all(result.stored for result in results)
        assert receiver.process.wait(30) == 0
        assert len(receiver.members()) == 3
        assert "aborted" not in receiver.log
        storage = open_storage(receiver.settings.storage.root)
        assert [(state.sealed, state.records) for state in Landed(storage).bundles()] == [(True, 3)]


def as_peer(port: int) -> Peer:
    return Peer(name="dcmtk", ae_title="DCMTK", host="127.0.0.1", port=port)


def test_our_client_against_storescp(tmp_path: Path, settings: Settings) -> None:
    files = [path for path in sendable_files() if "dicomdir" not in path.name.lower()][:40]
    with running_storescp(tmp_path / "peer") as port:
        assert client.echo(as_peer(port), settings=settings) > 0
        results = list(client.store(as_peer(port), files, settings=settings))
    accepted = [Path(result.source) for result in results if result.stored]
    assert len(accepted) > 30
    assert all("not accepted" in result.error for result in results if not result.stored)
    received = Counter(sha256(part10_dataset(path.read_bytes())) for path in (tmp_path / "peer").iterdir())
    assert received == Counter(sha256(as_sent(path)) for path in accepted)


def test_a_peer_that_aborts_costs_one_file_each_time(tmp_path: Path, settings: Settings) -> None:
    files = [make_instance(tmp_path / f"{n}.dcm") for n in range(3)]
    with running_storescp(tmp_path / "peer", "--abort-after") as port:
        results = list(client.store(as_peer(port), files, settings=settings))
    assert [result.source for result in results] == files
    assert all("aborted the association" in result.error and result.status is None for result in results)


def test_peers_that_cannot_be_used_say_why(tmp_path: Path, settings: Settings) -> None:
    with running_storescp(tmp_path / "peer", "--refuse") as port, pytest.raises(PeerError, match="rejected the asso"):
        client.echo(as_peer(port), settings=settings)
    with pytest.raises(PeerError, match=r"peer DCMTK at 127.0.0.1:\d+: cannot connect \(Connection refused\); check"):
        client.echo(as_peer(free_port()), settings=settings)
    unknown = as_peer(104).model_copy(update={"host": "no-such-host.invalid"})
    with pytest.raises(PeerError, match="host name cannot be resolved"):
        client.echo(unknown, settings=settings)
    with running_storescp(tmp_path / "peer") as port, pytest.raises(PeerError, match="accepts none of the services"):
        next(client.find(as_peer(port), {"PatientID": ""}, settings=settings))


def test_a_context_that_pynetdicom_builds(receiver: Receiver) -> None:
    """Verification in a compressed transfer syntax only: there is nothing to encode, and it is refused all the same."""
    ae = AE()
    ae.requested_contexts = [build_context("1.2.840.10008.1.1", "1.2.840.10008.1.2.4.90")]
    assoc = ae.associate("127.0.0.1", receiver.port)
    assert [context.result for context in assoc.rejected_contexts] == [4]
    assoc.abort()


def test_rules_decide_what_storescu_is_answered(tmp_path: Path) -> None:
    rules = [
        {"keys": {"RequestAttributesSequence": {"RequestedProcedureID": "7*"}}, "action": "tag", "collection": "seven"},
        {"calling_ae": "TRIAL*", "action": "tag", "collection": "trial"},
        {"modality": "MR", "action": "reject", "status": 0xA7FF, "name": "no-mr"},
    ]
    ct, other, mr = (
        make_instance(tmp_path / f"{number}.dcm", Modality=modality)
        for number, modality in enumerate(("CT", "CT", "MR"))
    )
    asked, wrong = Dataset(), Dataset()
    asked.RequestedProcedureID, wrong.RequestedProcedureID = "71", "17"
    items = [[wrong, asked], [wrong]]
    seven, none = (make_instance(tmp_path / f"{n}.dcm", RequestAttributesSequence=items[n - 3]) for n in (3, 4))
    stored = [("TRIAL1", ct), ("OTHER", other), ("OTHER", seven), ("OTHER", none)]
    with running_receiver(tmp_path / "archive", {"rules": rules}) as receiver:
        for title, path, said in (*((*one, "0x0000") for one in stored), ("TRIAL1", mr, "0xa7ff")):
            run = run_tool("storescu", "-d", "-aet", title, "127.0.0.1", receiver.port, path)
            assert f"DIMSE Status                  : {said}" in run.stdout, run.stdout
        assert [record.collections for record in receiver.members()] == [("trial",), (), ("seven",), ()]
    assert "refused by rule no-mr" in receiver.log


@pytest.mark.parametrize(("policy", "said"), [("keep-first", "0x0000"), ("reject", "0x0111")])
def test_copies_are_stored_once_and_contradictions_answered(tmp_path: Path, policy: str, said: str) -> None:
    path = make_instance(tmp_path / "1.dcm", SOPInstanceUID="1.2.3.4")
    dataset = dcmread(path)
    dataset.PatientComments = "corrected"
    dataset.save_as(tmp_path / "2.dcm")
    other = tmp_path / "2.dcm"
    with running_receiver(tmp_path / "archive", {"ingest": {"on_conflict": policy}}) as receiver:
        sent = [(path, "0x0000"), (path, "0x0000"), (other, said), (other, said), (path, "0x0000")]
        for file, status in sent:
            run = run_tool("storescu", "-d", "127.0.0.1", receiver.port, file)
            assert f"DIMSE Status                  : {status}" in run.stdout, run.stdout
        assert digests(receiver) == Counter([sha256(dataset_of(path)), sha256(dataset_of(other))])
    assert receiver.log.count("not stored again") == 3
