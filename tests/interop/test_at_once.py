"""What is stored by one process is found and retrieved by every other the moment it is answered (`sphere serve`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from sphere.conf.peers import Peer
from sphere.ingest.header import identify
from sphere.scp.client.retrieve import get, move
from sphere.scp.store import StoreAnswer, StoreRequest
from tests.bench.query_client import STUDY_ROOT_FIND, Association, question
from tests.support.landing import slices
from tests.support.raw_peer import CT, RawPeer, associate_rq
from tests.support.receiver import Receiver, running_receiver
from tests.support.serving import Serving, running_supervisor

pytestmark = pytest.mark.interop

ROUNDS = 20
TRIES = 60  # associations until each receiver has taken one
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
DICOM = "application/dicom"


class Lands:
    """Keeps digests of what a C-GET brings."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def land(self, request: StoreRequest) -> StoreAnswer:
        self.digests[request.AffectedSOPInstanceUID] = hashlib.sha256(b"".join(request.dataset)).hexdigest()
        return StoreAnswer(0)


@contextmanager
def one_with_each(serving: Serving, sop_class: str, syntax: str) -> Iterator[list[RawPeer]]:
    """An association with each of the receivers: whichever process has the other end of its connection."""
    receivers = [child.pid for child in serving.state().children if child.name.startswith("receiver")]
    with ExitStack() as stack:
        found: dict[int, RawPeer] = {}
        for _ in range(TRIES):
            peer = RawPeer.connect(serving.port)
            stack.callback(peer.close)
            peer.associate(associate_rq([sop_class], syntax=syntax))
            [pid] = [pid for pid in receivers if peer.sock.getsockname() in _others(pid)]
            found.setdefault(pid, peer)
            if len(found) == len(receivers):
                break
        assert len(found) == len(receivers) == 2
        yield list(found.values())


def _others(pid: int) -> set[tuple[str, int]]:
    return {tuple(one.raddr) for one in psutil.Process(pid).net_connections("tcp") if one.raddr}


class Instance:
    """A file, and what its data set is."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        found = identify(data, size=len(data))
        self.uid, self.study, self.series = found.SOPInstanceUID, found.StudyInstanceUID, found.SeriesInstanceUID
        self.dataset = data[found.dataset_offset :]
        self.digest = hashlib.sha256(self.dataset).hexdigest()
        self.url = f"/studies/{self.study}/series/{self.series}/instances/{self.uid}"


class Services:
    """All services of one archive, each asked for the instances of a study."""

    def __init__(self, serving: Serving, destination: Receiver, web: httpx.Client, finds: list[RawPeer]) -> None:
        self.peer = Peer(name="tested", ae_title="SPHERE", host="127.0.0.1", port=serving.port)
        self.settings, self.destination, self.web = serving.settings, destination, web
        self.finds = [Association(peer) for peer in finds]

    def ask(self, which: int, held: list[Instance]) -> None:
        """Hold the service of this number to the instances of one study."""
        asked = (self.find_first, self.find_second, self.search, self.load, self.get, self.move)
        asked[which % len(asked)](held)

    def find_first(self, held: list[Instance], at: int = 0) -> None:
        keys = {"StudyInstanceUID": held[0].study, "SeriesInstanceUID": held[0].series, "SOPInstanceUID": ""}
        assert self.finds[at].ask(question("IMAGE", keys)).answers == len(held), "C-FIND"
        counted = {"StudyInstanceUID": held[0].study, "NumberOfStudyRelatedInstances": str(len(held))}
        assert self.finds[at].ask(question("STUDY", counted)).answers == 1, "C-FIND, counts"

    def find_second(self, held: list[Instance]) -> None:
        self.find_first(held, 1)

    def search(self, held: list[Instance]) -> None:
        found = self.web.get(f"/studies/{held[0].study}/instances").json()
        assert sorted(one["00080018"]["Value"][0] for one in found) == sorted(one.uid for one in held), "QIDO-RS"
        [study] = self.web.get("/studies", params={"StudyInstanceUID": held[0].study}).json()
        assert study["00201208"]["Value"] == [len(held)], "QIDO-RS, counts"

    def load(self, held: list[Instance]) -> None:
        for one in held:
            data = self.web.get(one.url, headers={"accept": f"{DICOM}; transfer-syntax=*"}).content
            assert data[identify(data, size=len(data)).dataset_offset :] == one.dataset, "WADO-RS"

    def get(self, held: list[Instance]) -> None:
        lands = Lands()
        keys = {"StudyInstanceUID": held[0].study}
        *_, last = get(self.peer, keys, settings=self.settings, store=lands, sop_classes=[CT])
        assert (last.status, last.completed) == (0, len(held)), "C-GET"
        assert lands.digests == {one.uid: one.digest for one in held}

    def move(self, held: list[Instance]) -> None:
        keys = {"StudyInstanceUID": held[0].study}
        *_, last = move(self.peer, keys, settings=self.settings, destination="DEST")
        assert (last.status, last.completed) == (0, len(held)), "C-MOVE"
        there = {one.SOPInstanceUID: one.sha256 for one in self.destination.members()}
        assert {one.uid: there.get(one.uid) for one in held} == {one.uid: one.digest for one in held}


def test_every_service_has_it_at_once(tmp_path: Path) -> None:
    """Every round a study by C-STORE to one receiver, then STOW-RS into it; who is asked first changes."""
    with (
        running_receiver(tmp_path / "destination") as destination,
        running_supervisor(
            tmp_path / "archive", workers=2, web=True,
            peers=[{"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": destination.port}],
        ) as serving,
        one_with_each(serving, CT, EXPLICIT) as stores,
        one_with_each(serving, STUDY_ROOT_FIND, IMPLICIT) as finds,
        httpx.Client(base_url=f"http://127.0.0.1:{serving.state().web_port}/dicom-web", timeout=60) as web,
    ):  # fmt: skip
        services = Services(serving, destination, web, finds)
        for turn in range(ROUNDS):
            first, second = map(Instance, slices(2, seed=turn, study=turn))
            assert stores[turn % 2].store(first.uid, [first.dataset], context=1) == 0
            for which in range(6):
                services.ask(turn + which, [first])
            stored = web.post(
                "/studies", content=b"--B\r\nContent-Type: application/dicom\r\n\r\n" + second.data + b"\r\n--B--\r\n",
                headers={"content-type": f'multipart/related; type="{DICOM}"; boundary=B'},
            )  # fmt: skip
            assert stored.status_code == 200, stored.text
            for which in range(6):
                services.ask(turn + which, [first, second])
        assert serving.stop() == 0
