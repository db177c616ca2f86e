"""Rules of the settings: what is taken, what is refused, and in which collections an instance is catalogued.

The data set's bytes are never changed: a rule decides about an instance, it does not correct it (see
docs/decisions/0012-policy.md). The header is read only where a rule that could still decide asks for one of its keys.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import orjson
from pydicom._uid_dict import UID_dictionary

from sphere.catalog.match_header import Header, holds
from sphere.catalog.predicate import Predicate
from sphere.catalog.query import Query
from sphere.catalog.schema import COMPUTED
from sphere.conf.errors import QueryError, Refused, SettingsError
from sphere.conf.settings import Peer, Rule, Settings
from sphere.ingest.header import Header as ReadHeader
from sphere.ingest.header import HeaderReader
from sphere.ingest.members import NewMember
from sphere.scp.peers import CallingPolicy

Via = Literal["dimse", "web", "import"]

PREFIX = 64 * 1024  # bytes of an instance given to the header reader at first


@dataclass(frozen=True, kw_only=True)
class _Arrival:
    """An instance that wants to come in, and the way on which it comes."""

    member: NewMember
    via: Via
    called_ae: str
    address: str  # of the sender
    reader: Callable[[], HeaderReader]

    @cached_property
    def header(self) -> Header:
        """The header as DICOM JSON, empty where none can be read. Raises StorageError."""
        member, size = self.member, self.member.size
        found = self.reader().read(member.fetch(0, min(size, PREFIX)), size=size, fetch=member.fetch)
        return orjson.loads(found.dataset) if isinstance(found, ReadHeader) else {}


class Policy:
    """The rules of an archive, ready to be asked; shared by the threads of a process."""

    def __init__(self, settings: Settings, callers: CallingPolicy | None = None) -> None:
        """Raises SettingsError for a key that cannot be matched; it names the rule."""
        callers = callers or CallingPolicy(settings.peers)
        self._rules = [_Compiled(number, rule, callers) for number, rule in enumerate(settings.rules)]
        self._snapshots = {snapshot.ae_title.strip() for snapshot in settings.snapshots}
        self._max_header = settings.extract.max_header_mib << 20
        self._local = threading.local()

    def admit(self, member: NewMember, *, via: Via, called_ae: str = "", address: str = "") -> NewMember:
        """The member with the collections that the rules give it.

        Rules are taken in their order: each that matches adds its collections, the first that accepts or rejects ends
        it. Raises Refused, and StorageError where its waiting file cannot be read.
        """
        if called_ae in self._snapshots:
            raise Refused(f"{called_ae} is a snapshot of the catalog and takes no instances")
        if not self._rules:
            return member
        arrival = _Arrival(member=member, via=via, called_ae=called_ae, address=address, reader=self._reader)
        collections: dict[str, None] = {}
        for compiled in self._rules:
            if not compiled.matches(arrival):
                continue
            rule = compiled.rule
            if rule.action == "reject":
                raise Refused(f"refused by rule {compiled.name}", status=rule.status)
            collections |= dict.fromkeys(rule.collection)
            if rule.action == "accept":
                break
        return replace(member, collections=tuple(collections)) if collections else member

    def _reader(self) -> HeaderReader:
        """The header reader of this thread."""
        reader: HeaderReader | None = getattr(self._local, "reader", None)
        if reader is None:
            reader = self._local.reader = HeaderReader(max_header=self._max_header)
        return reader


class _Compiled:
    """One rule: everything that it asks must hold, cheapest first."""

    def __init__(self, number: int, rule: Rule, callers: CallingPolicy) -> None:
        self.rule = rule
        self.name = rule.name or f"rules.{number}"
        self._tests: list[Callable[[_Arrival], bool]] = list(_plain_tests(rule, callers))
        alternatives = _predicates(f"rules.{number}", rule)
        if alternatives:
            self._tests.append(lambda arrival: all(_any_holds(one, arrival.header) for one in alternatives))

    def matches(self, arrival: _Arrival) -> bool:
        return all(test(arrival) for test in self._tests)


def _plain_tests(rule: Rule, callers: CallingPolicy) -> Iterator[Callable[[_Arrival], bool]]:
    """Tests of what is known without the header."""
    if rule.via:
        yield lambda arrival: arrival.via in rule.via
    uids = tuple(map(_uid, rule.sop_class)), tuple(map(_uid, rule.transfer_syntax))
    tested: tuple[tuple[tuple[str, ...], Callable[[_Arrival], str]], ...] = (
        (rule.calling_ae, lambda arrival: arrival.member.source_aet),
        (rule.called_ae, lambda arrival: arrival.called_ae),
        (uids[0], lambda arrival: arrival.member.SOPClassUID),
        (uids[1], lambda arrival: arrival.member.TransferSyntaxUID),
    )
    for patterns, value in tested:
        if patterns:
            yield _wild(patterns, value)
    if rule.address:
        networks = [ipaddress.ip_network(text, strict=False) for text in rule.address]
        yield lambda arrival: _is_within(arrival.address, networks)
    if rule.peer:
        yield lambda arrival: _name(callers.peer(arrival.member.source_aet, arrival.address)) in rule.peer


def _wild(patterns: Sequence[str], value: Callable[[_Arrival], str]) -> Callable[[_Arrival], bool]:
    regex = re.compile("|".join(fnmatch.translate(pattern.replace("[", "[[]")) for pattern in patterns))
    return lambda arrival: regex.match(value(arrival)) is not None


def _name(peer: Peer | None) -> str:
    return peer.name if peer else ""


def _uid(text: str) -> str:
    """A UID of the keyword that PS3.6 Annex A gives it, or the text as it is: a UID or a wild card pattern."""
    return _UIDS.get(text, text)


_UIDS: Mapping[str, str] = {entry[4]: uid for uid, entry in UID_dictionary.items() if entry[4]}


def _is_within(address: str, networks: Sequence[Any]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def _predicates(where: str, rule: Rule) -> list[list[Predicate]]:
    """For each key of the header the predicates of which one must hold; raises SettingsError."""
    keys = {**({"Modality": rule.modality} if rule.modality else {}), **rule.keys}
    found = []
    for name, values in keys.items():
        if name in COMPUTED:
            raise SettingsError(f"{where}.keys: {name} is computed from many instances; no instance has it")
        try:
            alternatives = [Query.build("IMAGE", {name: value}).predicate() for value in values]
        except QueryError as error:
            raise SettingsError(f"{where}.keys: {error}") from None
        if not all(alternatives):
            raise SettingsError(f"{where}.keys: {name}: a value that matches everything; leave the key out")
        found.append(alternatives)
    return found


def _any_holds(alternatives: Sequence[Predicate], header: Header) -> bool:
    return any(holds(predicate, header) for predicate in alternatives)
