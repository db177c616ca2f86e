"""Instances to a peer, over as many associations as they need (PS3.4 Annex B): of C-MOVE, forwarding and `store`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from sphere.conf.errors import PeerError, SettingsError, StorageError
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp.retrieve.outbound import Channel, Converter, Instance, Sender, is_odd, preferred_by
from sphere.scp.upper.messages import Context
from sphere.scp.upper.outgoing import Ready
from sphere.scp.upper.requestor import NoneAccepted, PeerSilent, Proposed, Requested

T = TypeVar("T", bound=Instance)
LARGE = 4 << 20  # bytes of a data set that takes long: what is known is told before it is sent


class Reads(Protocol):
    """The bytes of some instances, in order."""

    def next(self) -> Iterator[memoryview]:
        """Those of the next one's data set; reading raises StorageError."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What became of one instance; `status` is that of its C-STORE, None where there was none.

    `lost` says that the peer was not reached, or left before it answered: another time it may work.
    """

    instance: T
    status: int | None
    reason: str = ""
    lost: bool = False


Read = Callable[[Sequence[T]], AbstractContextManager[Reads]]
Connect = Callable[[Peer, Settings, Sequence[Proposed]], Requested]
Outcomes = Generator[Outcome[T], None, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery(Generic[T]):
    """How instances get to a peer.

    `read` gives the bytes of instances. `converter` is what makes another transfer syntax of them where the peer does
    not take theirs, None: nothing does. `origin` are further elements of every C-STORE request. Once `stop` says so,
    no further one is sent.
    """

    settings: Settings
    read: Read[T]
    converter: Converter | None
    connect: Connect
    origin: Mapping[str, Any]
    stop: Callable[[], bool] = lambda: False

    def to_peer(self, peer: Peer, proposed: list[Proposed], group: Sequence[T]) -> Outcomes[T]:
        """Send a group (see outbound.groups), one outcome for each until `stop`, as they come; never raises.

        Where the association is lost after something was answered, it goes on over a new one; a peer that is silent,
        or that an association was lost to without any answer, is not asked for the rest.
        """
        left = deque(group)
        padded: set[str] = set()
        while left and not self.stop():
            answered = False
            try:
                if not proposed:
                    raise NoneAccepted("no SOP class is known of these instances")
                with self.connect(peer, self.settings, proposed) as association:
                    sender = Sender(association, self.converter, self.origin, padded, preferred_by(peer))
                    for outcome in self.over(sender, left):
                        answered = answered or outcome.status is not None
                        yield outcome
            except (PeerError, SettingsError, StorageError) as error:  # settings: a file of TLS is gone
                if not left:
                    return
                if is_odd(left[0]) and left[0].SOPInstanceUID not in padded and _may_be_over_it(error):
                    padded.add(left[0].SOPInstanceUID)
                    continue
                yield _lost(left.popleft(), error)
                if isinstance(error, PeerSilent | NoneAccepted) or not (answered or isinstance(error, StorageError)):
                    while left:
                        yield _lost(left.popleft(), error)

    def over(self, sender: Sender, left: deque[T]) -> Outcomes[T]:
        """Sub-operations on one association; what is done is taken off `left`.

        While the answer to one is awaited, the next is made ready, and it is sent before the outcome of the one is
        yielded: the peer need not wait for what is done with that. Raises what the channel raises: the first that is
        left is then the one that failed.
        """
        sendable: list[tuple[T, list[Context]]] = []
        refused: list[tuple[T, str]] = []
        for instance in left:
            routes = sender.routes(instance)
            if isinstance(routes, str):
                refused.append((instance, routes))
            else:
                sendable.append((instance, routes))
        left.clear()
        left.extend(instance for instance, _ in sendable)
        for instance, reason in refused:
            yield Outcome(instance, None, reason)
        yield from self._in_turn(sender, left, sendable)

    def _in_turn(self, sender: Sender, left: deque[T], sendable: Sequence[tuple[T, list[Context]]]) -> Outcomes[T]:
        sent: tuple[T, Ready] | None = None
        with self.read(left) as bytes_ahead:
            for instance, routes in sendable:
                request = sender.ready(instance, routes, bytes_ahead.next())
                done: list[Outcome[T]] = []
                if sent is not None:
                    done.append(Outcome(sent[0], *sender.answer(sent[1])))
                    left.popleft()
                if self.stop():
                    yield from done
                    return
                if isinstance(request, str):
                    left.popleft()
                    yield from (*done, Outcome(instance, None, request))
                    sent = None
                    continue
                if instance.dataset_length > LARGE:
                    while done:
                        yield done.pop()
                try:
                    sender.start(request)
                finally:
                    yield from done
                sent = instance, request
            if sent is not None:
                done = [Outcome(sent[0], *sender.answer(sent[1]))]
                left.popleft()
                yield from done


def _may_be_over_it(error: Exception) -> bool:
    return not isinstance(error, (PeerSilent, NoneAccepted))


def _lost(instance: T, error: Exception) -> Outcome[T]:
    lost = isinstance(error, PeerError | SettingsError) and not isinstance(error, NoneAccepted)
    return Outcome(instance, None, str(error), lost)


__all__ = ["Channel", "Connect", "Delivery", "Outcome", "Outcomes", "Read", "Reads"]
