"""dcmjs-dimse, a DIMSE implementation in JavaScript, as a peer in both roles."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
import pytest

from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp import client
from sphere.scp.store import StoreAnswer, StoreRequest
from tests.support.dicom_tools import RUN_S, require_tool, running
from tests.support.npm import require_npm
from tests.support.ports import free_port
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import make_instance

pytestmark = pytest.mark.interop

SCRIPT = Path(__file__).parents[1] / "dcmjs" / "peer.cjs"


def scu(port: int, folder: Path, *asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What a client by dcmjs-dimse was answered; what it got by C-GET is in `folder`."""
    command = [require_tool("node", "nodejs"), SCRIPT, require_npm(), "scu", str(port), json.dumps(asked), folder]
    run = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert run.returncode == 0, run.stderr
    told: list[dict[str, Any]] = json.loads(run.stdout)
    return told


@contextmanager
def scp(port: int, folder: Path, destinations: dict[str, int]) -> Iterator[None]:
    """A server by dcmjs-dimse that writes what it receives into `folder`."""
    folder.mkdir()
    command = [
        require_tool("node", "nodejs"),
        SCRIPT,
        require_npm(),
        "scp",
        str(port),
        folder,
        json.dumps(destinations),
    ]
    with running(command, port, folder.parent / "dcmjs.log"):
        yield


def files(folder: Path) -> dict[str, Path]:
    """Two instances of a study and one of another, by SOP Instance UID."""
    studies = {"1.2.1.1": "1.2.1", "1.2.1.2": "1.2.1", "1.2.2.1": "1.2.2"}
    return {
        uid: make_instance(
            folder / f"{uid}.dcm", SOPInstanceUID=uid, StudyInstanceUID=study, PatientID=f"P{study[-1]}",
            EncapsulatedDocument=bytes(range(256)) * 300,
        )
        for uid, study in studies.items()
    }  # fmt: skip


def same(made: dict[str, Path], folder: Path) -> set[str]:
    """The instances in `folder`, each of which is what was made."""
    found = {path.stem: path for path in folder.iterdir()}
    for uid, path in found.items():
        assert pydicom.dcmread(path) == pydicom.dcmread(made[uid])
    return set(found)


def test_it_asks(tmp_path: Path) -> None:
    """C-ECHO, C-STORE, C-FIND, C-GET, and C-MOVE to a server of its own."""
    made, port, destination = files(tmp_path), free_port(), free_port()
    peers = [{"name": "dcmjs", "ae_title": "DCMJS", "host": "127.0.0.1", "port": destination}]
    (tmp_path / "got").mkdir()
    with (
        running_receiver(tmp_path / "archive", {"dimse": {"port": port}, "peers": peers}),
        scp(destination, tmp_path / "moved", {}),
    ):
        stores = [{"verb": "store", "file": str(path)} for path in made.values()]
        assert [one["status"] for one in scu(port, tmp_path, {"verb": "echo"}, *stores)] == [0] * 4
        keys = {"StudyInstanceUID": "", "PatientID": "P1", "PatientName": ""}
        *matches, last = scu(port, tmp_path, {"verb": "find", "keys": keys})
        assert last["status"] == 0x0000
        assert [one["elements"]["StudyInstanceUID"] for one in matches] == ["1.2.1"]
        got = scu(port, tmp_path / "got", {"verb": "get", "study": "1.2.1"})
        assert (got[-1]["status"], got[-1]["completed"], got[-1]["failed"]) == (0x0000, 2, 0)
        assert same(made, tmp_path / "got") == {"1.2.1.1", "1.2.1.2"}
        moved = scu(port, tmp_path, {"verb": "move", "study": "1.2.1", "destination": "DCMJS"})
        assert (moved[-1]["status"], moved[-1]["completed"], moved[-1]["failed"]) == (0x0000, 2, 0)
        assert same(made, tmp_path / "moved") == {"1.2.1.1", "1.2.1.2"}


def test_it_is_asked(tmp_path: Path, settings: Settings) -> None:
    made, port, back = files(tmp_path), free_port(), free_port()
    peer = Peer(name="dcmjs", ae_title="DCMJS", host="127.0.0.1", port=port)
    with (
        running_receiver(tmp_path / "archive", {"dimse": {"port": back}}) as receiver,
        scp(port, tmp_path / "stored", {"SPHERE": back}),
    ):
        assert client.echo(peer, settings=settings) > 0
        assert all(result.stored for result in client.store(peer, made.values(), settings=settings))
        assert same(made, tmp_path / "stored") == set(made)
        found = client.find(peer, {"StudyInstanceUID": "", "PatientID": ""}, settings=settings)
        assert {(one.StudyInstanceUID, one.PatientID) for one in found} == {("1.2.1", "P1"), ("1.2.2", "P2")}
        kept = Kept()
        *_, last = client.get(peer, {"StudyInstanceUID": "1.2.1"}, settings=settings, store=kept)
        assert (last.status, last.completed, kept.uids) == (0x0000, 2, ["1.2.1.1", "1.2.1.2"])
        *_, last = client.move(peer, {"StudyInstanceUID": "1.2.2"}, settings=settings, destination="SPHERE")
        assert (last.status, last.completed) == (0x0000, 1)
        assert uids(receiver) == ["1.2.2.1"]


class Kept:
    """Notes what a C-GET brings."""

    def __init__(self) -> None:
        self.uids: list[str] = []

    def land(self, request: StoreRequest) -> StoreAnswer:
        self.uids.append(request.AffectedSOPInstanceUID)
        return StoreAnswer(0)


def uids(receiver: Receiver) -> list[str]:
    return [record.SOPInstanceUID for record in receiver.members()]
