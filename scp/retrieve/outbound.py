"""C-STORE sub-operations: which context carries an instance, and what became of each (PS3.4 C.4.2.3, C.4.3.3)."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydicom.uid import UID

from sphere.conf.errors import StorageError
from sphere.conf.logs import hashed
from sphere.conf.peers import Peer
from sphere.scp.retrieve.read_ahead import Range
from sphere.scp.retrieve.transcode import CONVERTIBLE, ENCODERS, NAMED, TARGETS, NotConverted
from sphere.scp.retrieve.transcoder import MAX_SOURCE
from sphere.scp.upper.command import C_STORE_RQ, Command
from sphere.scp.upper.messages import Context
from sphere.scp.upper.outgoing import Outgoing, Ready
from sphere.scp.upper.requestor import MAX_CONTEXTS, Proposed

if TYPE_CHECKING:
    from sphere.catalog.service import StoredInstance

log = logging.getLogger(__name__)

SUCCESS = 0x0000
WARNINGS = range(0xB000, 0xC000)  # of a C-STORE: stored, with a remark (PS3.4 Table B.2-1)
DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT = "1.2.840.10008.1.2"  # what a data set without transfer syntax is taken for (PS3.5 10.1)


class Instance(Protocol):
    """What can be sent: stored here, or a file."""

    @property
    def SOPInstanceUID(self) -> str:
        """PS3.3 C.12.1."""

    @property
    def SOPClassUID(self) -> str:
        """PS3.3 C.12.1."""

    @property
    def transfer_syntax_uid(self) -> str:
        """Of its data set; "" where it is not known."""

    @property
    def dataset_length(self) -> int:
        """Bytes of its data set."""


T = TypeVar("T", bound=Instance)


class Channel(Protocol):
    """An association on which we may send instances."""

    @property
    def user_contexts(self) -> list[Context]:
        """Contexts in which we may ask."""

    def ready(self, context: Context, command: Mapping[str, Any], dataset: Outgoing | None) -> Ready:
        """A request as it will be sent; raises what the data set raises."""

    def start(self, request: Ready) -> None:
        """Send it."""

    def answer(self, request: Ready) -> Command:
        """Wait for the command set of its response."""


class Converter(Protocol):
    """What changes the transfer syntax."""

    def convert(self, dataset: bytes, source: str, target: str) -> bytes:
        """The data set in `target`; raises NotConverted."""


@dataclass(slots=True)
class Counts:
    """The sub-operations of one retrieve (PS3.7 9.1.4.1.7 and following)."""

    remaining: int
    completed: int = 0
    failed: int = 0
    warning: int = 0
    failed_uids: list[str] = field(default_factory=list)
    reason: str = ""  # of the first failure

    def add(self, instance: Instance, status: int | None, reason: str = "") -> None:
        """One sub-operation is over; `status` is that of its C-STORE, None where there was none."""
        self.remaining -= 1
        if status == SUCCESS:
            self.completed += 1
        elif status is not None and status in WARNINGS:
            self.warning += 1
        else:
            self.failed += 1
            self.failed_uids.append(instance.SOPInstanceUID)
            self.reason = self.reason or reason or f"status 0x{status or 0:04X}"
            log.warning(
                "sub-operation failed instance=%s: %s",
                hashed(instance.SOPInstanceUID), reason or f"status 0x{status or 0:04X}",
            )  # fmt: skip


def syntax_of(instance: Instance) -> str:
    """The transfer syntax in which it lies."""
    return instance.transfer_syntax_uid or IMPLICIT


def range_of(instance: StoredInstance) -> Range:
    """Its data set's bytes."""
    return Range(instance.bundle, instance.offset + instance.dataset_offset, instance.dataset_length)


def is_odd(instance: Instance) -> bool:
    """Whether its data set has an odd length, which PS3.5 7.1 forbids."""
    return bool(instance.dataset_length % 2)


def preferred_by(peer: Peer | None) -> tuple[str, ...]:
    """The transfer syntaxes that a peer is to be sent, the best first."""
    return tuple(NAMED[name] for name in peer.transfer_syntaxes) if peer else ()


def groups(
    instances: Sequence[T], *, convert: bool = True, preferred: Sequence[str] = ()
) -> Iterator[tuple[list[Proposed], list[T]]]:
    """Instances that one association can carry, and the contexts to propose for them.

    For each SOP class one context for each transfer syntax that they have or that is `preferred`, and for `convert`
    one for what we can decompress to.
    """
    syntaxes: dict[str, set[str]] = {}
    for instance in instances:
        syntaxes.setdefault(instance.SOPClassUID, set()).add(syntax_of(instance))
    group: list[Proposed] = []
    classes: set[str] = set()
    for sop_class, stored in syntaxes.items():
        needed = _proposed(sop_class, stored.union(preferred), convert) if sop_class else []
        if len(group) + len(needed) > MAX_CONTEXTS:
            yield group, [one for one in instances if one.SOPClassUID in classes]
            group, classes = [], set()
        group += needed
        classes.add(sop_class)
    if classes:
        yield group, [one for one in instances if one.SOPClassUID in classes]


def _proposed(sop_class: str, stored: Iterable[str], convert: bool) -> list[Proposed]:
    as_they_lie = sorted(stored)[: MAX_CONTEXTS - 1]
    plain = tuple(syntax for syntax in TARGETS if syntax not in as_they_lie) if convert else ()
    proposed = [Proposed(sop_class, (syntax,)) for syntax in as_they_lie]
    return [*proposed, Proposed(sop_class, plain)] if plain else proposed


class Sender:
    """Sends instances on one association."""

    def __init__(
        self,
        channel: Channel,
        converter: Converter | None,
        origin: Mapping[str, Any],
        padded: Container[str] | None = None,
        preferred: Sequence[str] = (),
    ) -> None:
        """`converter` is None where instances go as they lie or not at all.

        `origin` are further elements of every C-STORE request: who asked for the C-MOVE (PS3.7 9.1.1.1). A data set of
        odd length, which PS3.5 forbids, gets a NUL more if its SOP Instance UID is in `padded`, or if that is None:
        some peers end the association over it. `preferred` are the transfer syntaxes to be made of an instance that is
        in none of them, the best first.
        """
        self._channel = channel
        self._converter = converter
        self._origin = origin
        self._padded = padded
        self._preferred = preferred
        self._routes: dict[tuple[str, str], list[Context] | str] = {}
        self._contexts = {(str(cx.abstract_syntax), str(cx.transfer_syntax)): cx for cx in channel.user_contexts}

    def routes(self, instance: Instance) -> list[Context] | str:
        """The contexts for an instance, the best first: its own transfer syntax, or those to convert to; or why none.

        Where it has to be converted, a context may turn out impossible, and the next one be taken.
        """
        kind = instance.SOPClassUID, syntax_of(instance)
        if kind not in self._routes:
            self._routes[kind] = self._found(*kind)
        return self._routes[kind]

    def _found(self, sop_class: str, syntax: str) -> list[Context] | str:
        own = self._contexts.get((sop_class, syntax))
        if own is not None and (not self._preferred or syntax in self._preferred):
            return [own]
        others = dict.fromkeys((*self._preferred, *TARGETS, *ENCODERS)) if self._converter else {}
        accepted = [self._contexts[sop_class, one] for one in others if (sop_class, one) in self._contexts]
        if own is not None:
            wanted = [context for context in accepted if context.transfer_syntax in self._preferred]
            return [*wanted, own] if syntax in CONVERTIBLE else [own]
        if not accepted:
            return f"not accepted: {UID(sop_class).name or 'no SOP class'} in {UID(syntax).name}"
        if syntax not in CONVERTIBLE:
            return f"{UID(syntax).name} is not accepted and cannot be converted"
        return accepted

    def ready(self, instance: Instance, contexts: Sequence[Context], parts: Iterator[memoryview]) -> Ready | str:
        """The C-STORE request of an instance in the first of `contexts` that works; or why it cannot be sent."""
        try:
            context, dataset = self._made(instance, contexts, parts)
            if dataset.size % 2 and self._is_padded(instance, context):
                dataset = Outgoing(dataset.size + 1, _padded(dataset.parts))
            return self._channel.ready(context, self._request(instance), dataset)
        except (StorageError, NotConverted) as error:
            return str(error)

    def start(self, request: Ready) -> None:
        """Send it. Raises what the channel raises when the association is over, and StorageError when bytes failed that
        were not at hand: then it cannot go on."""
        self._channel.start(request)

    def answer(self, request: Ready) -> tuple[int, str]:
        """The status of its response, and what it says. Raises what the channel raises when the association is over."""
        response = self._channel.answer(request)
        status, comment = int(response["Status"]), response.get("ErrorComment", "")
        return status, f"status 0x{status:04X}" + (f" ({comment})" if comment else "")

    def _made(
        self, instance: Instance, contexts: Sequence[Context], parts: Iterator[memoryview]
    ) -> tuple[Context, Outgoing]:
        """The data set as it is sent, and the context for it."""
        syntax, size = syntax_of(instance), instance.dataset_length
        if size > MAX_SOURCE:  # it can go as it lies, but not be converted
            contexts = [context for context in contexts if context.transfer_syntax == syntax]
            if not contexts:
                raise NotConverted(f"too large to be converted ({size >> 20} MiB)")
        if contexts[0].transfer_syntax == syntax:
            return contexts[0], Outgoing(size, parts)
        whole, reason = b"".join(parts), ""
        for context in contexts:
            if context.transfer_syntax == syntax:
                return context, Outgoing.of(whole)
            assert self._converter is not None  # or `routes` had found no such context
            try:
                return context, Outgoing.of(self._converter.convert(whole, syntax, str(context.transfer_syntax)))
            except NotConverted as error:
                reason = reason or str(error)
        raise NotConverted(reason)

    def _is_padded(self, instance: Instance, context: Context) -> bool:
        return context.transfer_syntax == DEFLATED or self._padded is None or instance.SOPInstanceUID in self._padded

    def _request(self, instance: Instance) -> dict[str, Any]:
        return {
            "AffectedSOPClassUID": instance.SOPClassUID,
            "CommandField": C_STORE_RQ,
            "Priority": 0,  # medium
            "AffectedSOPInstanceUID": instance.SOPInstanceUID,
            **self._origin,
        }


def _padded(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """A data set made even with a NUL (for a deflated one see PS3.5 A.5)."""
    yield from parts
    yield b"\0"
