"""A server of the upper layer whose services are the tests' own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.members import FileRange
from sphere.scp.upper import command
from sphere.scp.upper.association import Acceptor, Association, Response
from sphere.scp.upper.messages import Limits, Message
from sphere.scp.upper.negotiation import Proposal
from sphere.scp.upper.protocol import CALLING_AE_NOT_RECOGNIZED, Rejection
from sphere.scp.upper.server import Server
from tests.support.raw_peer import VERIFICATION, RawPeer, p_data, pdv

MEMORY = 1 << 20
MANY = 0x0020  # a request that is answered a thousand times
ASKS = 0x0FE1  # a service that asks the peer
FLOODS = 0x0FE2  # a service that has FLOOD answers at hand, of 1 KiB each
FLOOD = 32_768


class Bench:
    """A server whose services remember what they got."""

    def __init__(self, tmp_path: Path, **dimse: Any) -> None:
        self.settings: Settings = from_dict({"dimse": {"port": 0, "max_pdu": 16384, **dimse}}, base=tmp_path)
        self.stored: list[tuple[str, bytes, bool]] = []
        self.answered = self.closed = 0
        self.may_answer = threading.Event()  # a thousand times
        self.may_answer.set()
        self.places = threading.BoundedSemaphore(self.settings.dimse.max_associations)
        self.limits = Limits(
            memory=MEMORY,
            folder=tmp_path / "incoming",
            idle_s=self.settings.dimse.network_timeout_s,
            message_s=self.settings.dimse.dimse_timeout_s,
        )
        acceptor = Acceptor(
            services={0x30: self.echo, 0x01: self.store, MANY: self.many, ASKS: self.asks, FLOODS: self.flood},
            admit=self.admit,
            places=self.places,
            max_pdu=self.settings.dimse.max_pdu,
            artim_s=self.settings.dimse.artim_s,
        )
        self.server = Server(self.settings, acceptor)
        threading.Thread(target=self.server.serve, daemon=True).start()

    def admit(self, proposal: Proposal, address: str) -> Bench:
        if proposal.calling != "RAW":
            raise Rejection(*CALLING_AE_NOT_RECOGNIZED)
        return self

    def close(self) -> None:
        self.closed += 1

    def echo(self, message: Message, association: Association) -> Iterator[Response]:
        yield Response(0)

    def store(self, message: Message, association: Association) -> Iterator[Response]:
        assert message.dataset is not None
        in_file = isinstance(message.dataset.content(), FileRange)
        self.stored.append((message.command["AffectedSOPInstanceUID"], message.dataset.tobytes(), in_file))
        yield Response(0)

    def many(self, message: Message, association: Association) -> Iterator[Response]:
        assert self.may_answer.wait(60)
        for number in range(1000):
            if association.cancelled(message):
                yield Response(0xFE00)
                return
            self.answered = number + 1
            yield Response(0xFF00, dataset=b"\0" * 64)
        yield Response(0)

    def flood(self, message: Message, association: Association) -> Iterator[Response]:
        for number in range(FLOOD):
            self.answered = number + 1
            yield Response(0xFF00, dataset=bytes(1024), more=True)
        yield Response(0)

    def asks(self, message: Message, association: Association) -> Iterator[Response]:
        association.ask(message.context, {"CommandField": 0x30, "AffectedSOPClassUID": VERIFICATION}, None)
        yield Response(0)

    def peer(self) -> RawPeer:
        return RawPeer.connect(self.server.port)

    def associated(self, **options: Any) -> RawPeer:
        peer = self.peer()
        peer.associate(**options)
        return peer


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.stop()
    made.server.drain(5)


@pytest.fixture
def bench_with(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**dimse: Any) -> Bench:
        made.append(Bench(tmp_path, **dimse))
        return made[-1]

    yield make
    for each in made:
        each.server.stop()
        each.server.drain(5)


def many_rq(message_id: int = 5) -> bytes:
    """A request that is answered a thousand times."""
    fields = {"CommandField": MANY, "MessageID": message_id, "CommandDataSetType": 0x0101}
    return p_data(pdv(1, 3, command.encode(fields)))
