"""In which order a delivery asks, hears and tells, and what becomes of an instance that was ready meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pytest
from pydicom.uid import UID

from sphere.catalog.service import StoredInstance
from sphere.conf.errors import PeerError, StorageError
from sphere.conf.peers import Peer
from sphere.scp.retrieve import deliver
from sphere.scp.retrieve.deliver import Delivery, Outcome
from sphere.scp.upper.messages import Context
from sphere.scp.upper.outgoing import Outgoing, Ready
from sphere.scp.upper.requestor import PeerSilent, Proposed

pytestmark = pytest.mark.unit

CT, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"
PEER = Peer(name="dest", ae_title="DEST", host="127.0.0.1", port=104)
Fails = Mapping[str, Exception]


def instance(number: int, length: int = 10) -> StoredInstance:
    return StoredInstance("1.1", "1.1.1", f"1.2.{number}", CT, EXPLICIT, "a", 0, length, 0, None, "")


@dataclass
class Script:
    """What happens, in its order, and what is to go wrong: by the event, once each."""

    fails: dict[str, Exception] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def happens(self, event: str) -> None:
        self.events.append(event)
        if event in self.fails:
            raise self.fails.pop(event)


class Peered:
    """An association, and the bytes that go over it."""

    user_contexts = [Context(1, UID(CT), UID(EXPLICIT), True)]

    def __init__(self, script: Script, instances: Sequence[StoredInstance] = ()) -> None:
        self.script = script
        self.numbers = [int(one.SOPInstanceUID.split(".")[-1]) for one in instances]

    def __enter__(self) -> Peered:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        return None

    def next(self) -> Iterator[memoryview]:
        number = self.numbers.pop(0)
        self.script.happens(f"read {number}")
        yield memoryview(b"")

    def ready(self, context: Context, command: Mapping[str, Any], dataset: Outgoing | None) -> Ready:
        assert dataset is not None
        number = int(command["AffectedSOPInstanceUID"].split(".")[-1])
        list(dataset.parts)
        return Ready(number, command["CommandField"], iter(()))

    def start(self, request: Ready) -> None:
        self.script.happens(f"send {request.number}")

    def answer(self, request: Ready) -> dict[str, Any]:
        self.script.happens(f"hear {request.number}")
        return {"Status": 0}


def delivered(
    script: Script, instances: Sequence[StoredInstance], stop: Callable[[], bool] = lambda: False
) -> list[tuple[str, bool]]:
    """What became of each; telling it is an event, too."""

    def connect(peer: Peer, settings: Any, proposed: Sequence[Proposed]) -> Any:
        script.happens("connect")
        return Peered(script)

    delivery = Delivery(
        settings=None, read=lambda some: Peered(script, some), converter=None, connect=connect, origin={},
        stop=stop,
    )  # type: ignore[arg-type]  # fmt: skip
    told: list[Outcome[StoredInstance]] = []
    for outcome in delivery.to_peer(PEER, [Proposed(CT, (EXPLICIT,))], instances):
        script.events.append(f"tell {outcome.instance.SOPInstanceUID.split('.')[-1]}")
        told.append(outcome)
    return [(one.instance.SOPInstanceUID, one.status == 0) for one in told]


def outcomes(text: str) -> list[tuple[str, bool]]:
    """'1 2! 3': the second failed."""
    return [(f"1.2.{word.rstrip('!')}", not word.endswith("!")) for word in text.split()]


def test_the_next_is_ready_before_the_answer_and_sent_before_it_is_told() -> None:
    script = Script()
    assert delivered(script, [instance(n) for n in (1, 2, 3)]) == outcomes("1 2 3")
    assert script.events == [
        "connect", "read 1", "send 1", "read 2", "hear 1", "send 2", "tell 1", "read 3", "hear 2", "send 3", "tell 2",
        "hear 3", "tell 3",
    ]  # fmt: skip


def test_what_is_known_is_told_before_a_large_one_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliver, "LARGE", 10)
    script = Script()
    assert delivered(script, [instance(1), instance(2, 12), instance(3)]) == outcomes("1 2 3")
    assert script.events.index("tell 1") < script.events.index("send 2")
    assert script.events.index("send 3") < script.events.index("tell 2")


@pytest.mark.parametrize(
    ("fails", "expected", "connections"),
    [
        ({"hear 2": PeerError("lost")}, "1 2! 3 4", 2),
        ({"send 2": PeerError("lost")}, "1 2! 3 4", 2),
        ({"send 1": PeerError("lost")}, "1! 2! 3! 4!", 1),  # nothing went well before
        ({"hear 1": PeerError("lost")}, "1! 2! 3! 4!", 1),
        ({"hear 2": PeerError("lost"), "hear 3": PeerError("lost")}, "1 2! 3! 4!", 2),
        ({"hear 2": PeerSilent("hangs")}, "1 2! 3! 4!", 1),
        ({"send 4": PeerError("lost")}, "1 2 3 4!", 1),
        ({"read 1": StorageError("gone")}, "1! 2 3 4", 1),
        ({"read 2": StorageError("gone")}, "1 2! 3 4", 1),
        ({"read 4": StorageError("gone")}, "1 2 3 4!", 1),
        ({"send 1": StorageError("gone")}, "1! 2 3 4", 2),  # the peer has no part in it
        ({"send 2": StorageError("gone"), "send 3": StorageError("gone")}, "1 2! 3! 4", 3),
        ({"read 3": StorageError("gone"), "hear 2": PeerError("lost")}, "1 2! 3 4", 2),  # it was not told yet
    ],
)
def test_what_goes_wrong_costs_one(fails: Fails, expected: str, connections: int) -> None:
    script = Script(dict(fails))
    assert delivered(script, [instance(n) for n in (1, 2, 3, 4)]) == outcomes(expected)
    assert script.events.count("connect") == connections


@pytest.mark.parametrize("after", ["connect", "send 1", "read 2", "hear 1", "send 2", "tell 2", "hear 4"])
def test_nothing_is_sent_after_a_stop_and_what_was_sent_is_told(after: str) -> None:
    script = Script()
    told = delivered(script, [instance(n) for n in (1, 2, 3, 4)], lambda: after in script.events)
    sent = [event for event in script.events if event.startswith("send")]
    assert told == outcomes(" ".join(event.split()[1] for event in sent))
    assert (
        len(sent) == {"connect": 0, "send 1": 1, "read 2": 1, "hear 1": 1, "send 2": 2, "tell 2": 3, "hear 4": 4}[after]
    )
