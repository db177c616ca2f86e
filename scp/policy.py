"""Rules of the settings: what is taken, what is refused, and in which collections an instance is catalogued.

The data set's bytes are never changed: a rule decides about an instance, it does not correct it (see
docs/decisions/0012-policy.md). The header is read only where a rule that could still decide asks for one of its keys.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import orjson
from pydicom._uid_dict import UID_dictionary

from sphere.catalog.match_header import Header, holds
from sphere.catalog.predicate import Predicate
from sphere.catalog.query import Query
from sphere.catalog.schema import COMPUTED
from sphere.catalog.wild import Wild
from sphere.conf.errors import QueryError, Refused, SettingsError
from sphere.conf.peers import Condition, Peer, Rule
from sphere.conf.settings import Settings
from sphere.ingest.header import HeaderReader
from sphere.ingest.members import NewMember
from sphere.scp.deleted import Deleted
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

    @property
    def calling_ae(self) -> str:
        return self.member.source_aet

    @property
    def sop_class(self) -> str:
        return self.member.SOPClassUID

    @property
    def transfer_syntax(self) -> str:
        return self.member.TransferSyntaxUID

    @cached_property
    def header(self) -> Header:
        """The header as DICOM JSON, empty where none can be read. Raises StorageError."""
        member, size = self.member, self.member.size
        found = self.reader().read(member.fetch(0, min(size, PREFIX)), size=size, fetch=member.fetch)
        header: Header = orjson.loads(found.dataset)
        return header


class Policy:
    """The rules of an archive, ready to be asked; shared by the threads of a process."""

    def __init__(self, settings: Settings, callers: CallingPolicy | None = None) -> None:
        """Raises SettingsError for a key that cannot be matched; it names the rule."""
        callers = callers or CallingPolicy(settings.peers)
        self._rules = [_Compiled(number, rule, callers) for number, rule in enumerate(settings.rules)]
        self._snapshots = {snapshot.ae_title.strip() for snapshot in settings.snapshots}
        self._deleted = Deleted(settings)
        self._max_header = settings.extract.max_header_mib << 20
        self._local = threading.local()

    def was_deleted(self, sop_instance_uid: str) -> bool:
        """Whether the instance was deleted here."""
        return self._deleted.holds(sop_instance_uid)

    def admit(
        self, member: NewMember, *, via: Via, called_ae: str = "", address: str = "", not_deleted: bool = False
    ) -> NewMember:
        """The member with the collections that the rules give it.

        Rules are taken in their order: each that matches adds its collections, the first that accepts or rejects ends
        it. What was deleted is not let in; `not_deleted`: that was looked at just now. Raises Refused, and StorageError
        where its waiting file cannot be read.
        """
        if called_ae in self._snapshots:
            raise Refused(f"{called_ae} is a snapshot of the catalog and takes no instances")
        if not not_deleted and self.was_deleted(member.SOPInstanceUID):
            raise Refused("this instance was deleted here (sphere undelete, unless erased)")
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
    """One rule."""

    def __init__(self, number: int, rule: Rule, callers: CallingPolicy) -> None:
        self.rule = rule
        self.name = rule.name or f"rules.{number}"
        self._conditions = Conditions(f"rules.{number}", rule, callers)
        self._called_ae = _wild(rule.called_ae) if rule.called_ae else None

    def matches(self, arrival: _Arrival) -> bool:
        if self._called_ae is not None and not self._called_ae(arrival.called_ae):
            return False
        return self._conditions.hold(arrival)


def check_forwards(settings: Settings) -> None:
    """Raise SettingsError for one of `[[forwards]]` that cannot be matched, or that nothing can be forwarded from."""
    if settings.forwards and settings.catalog.mode != "delta":
        raise SettingsError('forwards: the queue is a table of the catalog; it needs catalog.mode = "delta"')
    for number, forward in enumerate(settings.forwards):
        Conditions(f"forwards.{number}", forward, CallingPolicy(settings.peers))


class Incoming(Protocol):
    """What conditions look at; `header` last, as it may have to be read."""

    @property
    def via(self) -> str: ...
    @property
    def calling_ae(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def sop_class(self) -> str: ...
    @property
    def transfer_syntax(self) -> str: ...
    @property
    def header(self) -> Header: ...


class Conditions:
    """What one table of the settings asks of an instance: everything must hold, and the cheapest is looked at first."""

    def __init__(self, where: str, condition: Condition, callers: CallingPolicy) -> None:
        """Raises SettingsError for a key that cannot be matched; `where` names the table."""
        self._tests: list[Callable[[Incoming], bool]] = list(_plain_tests(where, condition, callers))
        alternatives = _predicates(where, condition)
        if alternatives:
            self._tests.append(lambda one: all(_any_holds(found, one.header) for found in alternatives))

    def hold(self, one: Incoming) -> bool:
        """Whether they all do. Raises what reading the header raises."""
        return all(test(one) for test in self._tests)


def _plain_tests(where: str, condition: Condition, callers: CallingPolicy) -> Iterator[Callable[[Incoming], bool]]:
    """Tests of what is known without the header."""
    if condition.via:
        yield lambda one: one.via in condition.via
    if condition.calling_ae:
        calling = _wild(condition.calling_ae)
        yield lambda one: calling(one.calling_ae)
    if condition.sop_class:
        sop_class = _wild(_uids(f"{where}.sop_class", condition.sop_class))
        yield lambda one: sop_class(one.sop_class)
    if condition.transfer_syntax:
        transfer_syntax = _wild(_uids(f"{where}.transfer_syntax", condition.transfer_syntax))
        yield lambda one: transfer_syntax(one.transfer_syntax)
    if condition.address:
        networks = [ipaddress.ip_network(text, strict=False) for text in condition.address]
        yield lambda one: _is_within(one.address, networks)
    if condition.peer:
        yield lambda one: _name(callers.peer(one.calling_ae, one.address)) in condition.peer


def _wild(patterns: Sequence[str]) -> Callable[[str], bool]:
    wild = list(map(Wild, patterns))
    return lambda value: any(one.matches(value) for one in wild)


def _name(peer: Peer | None) -> str:
    return peer.name if peer else ""


def _uids(where: str, texts: Sequence[str]) -> tuple[str, ...]:
    """The UIDs of keywords (PS3.6 Annex A); UIDs and patterns of them as they are. Raises SettingsError for others."""
    for text in texts:
        if text not in _UIDS and not _UID_PATTERN.fullmatch(text):
            near = difflib.get_close_matches(text, _UIDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SettingsError(f"{where}: {text!r} is no keyword, UID or UID with wild cards{hint}")
    return tuple(_UIDS.get(text, text) for text in texts)


_UID_PATTERN = re.compile(r"[0-9.*?]+")
_UIDS: Mapping[str, str] = {entry[4]: uid for uid, entry in UID_dictionary.items() if entry[4]}


def _is_within(address: str, networks: Sequence[Any]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def _predicates(where: str, rule: Condition) -> list[list[Predicate]]:
    """For each key of the header the predicates of which one must hold; raises SettingsError."""
    if rule.modality and "Modality" in rule.keys:
        raise SettingsError(f"{where}: `modality` and the key Modality are the same; give one of them")
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
