"""docs/conformance.md says what the code does."""

from __future__ import annotations

import re

import pytest

from sphere.catalog.query import MODEL_LEVELS
from sphere.conf import errors
from sphere.conf.settings import Settings, documented_keys
from sphere.ingest.header.charset import charset_of
from sphere.ingest.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from sphere.scp import find, handlers, store
from sphere.scp.commitment import handlers as commitment
from sphere.scp.commitment import report, verify
from sphere.scp.decode import MAX_IDENTIFIER
from sphere.scp.retrieve import service
from sphere.scp.upper import protocol, tls
from sphere.scp.upper.association import MAX_WAITING
from sphere.scp.web import stow
from tests.support.conformance import IDENTIFIER_WRONG, PAGE, STATUSES, rendered

pytestmark = pytest.mark.unit

TEXT = PAGE.read_text(encoding="utf-8")
SAID = " ".join(TEXT.split())


def test_its_tables_are_those_of_the_code() -> None:
    assert rendered(TEXT) == TEXT, "run: python -m tests.support.conformance"


def test_every_status_of_the_services_is_in_it() -> None:
    """Whatever a module of a service names as a status is said of that service."""
    of = {
        "C-STORE": (store,),
        "C-FIND": (find,),
        "C-MOVE": (service,),
        "N-ACTION": (commitment,),
        "Failure Reason of N-EVENT-REPORT": (verify,),
    }
    others = {"PENDING_WARNING", "N_ACTION_RQ", "BATCH", "SMALL"}  # the first is never sent: every key is matched
    for name, modules in of.items():
        constants = {key: value for module in modules for key, value in vars(module).items() if key not in others}
        told = {code for code, _ in STATUSES[name]}
        for key, value in constants.items():
            if key.isupper() and not key.startswith("MAX") and isinstance(value, int) and 0x0100 <= value <= 0xFFFF:
                assert value in told, (name, key)
    assert errors.QueryError("").dimse == IDENTIFIER_WRONG
    assert handlers.CANNOT_UNDERSTAND in {code for code, _ in STATUSES["C-STORE"]}


def test_what_it_says_in_words(settings: Settings) -> None:
    assert f"`{IMPLEMENTATION_CLASS_UID}`" in SAID and f"`{IMPLEMENTATION_VERSION_NAME}`" in SAID
    assert f"up to {MAX_WAITING} further requests" in SAID
    assert f"{protocol.MAX_SENT_PDU:,} bytes" in SAID
    assert f"{MAX_IDENTIFIER >> 20} MiB" in SAID
    assert f"within {report.HERE_S:g} s" in SAID
    rejections = [value for value in vars(protocol).values() if isinstance(value, tuple) and len(value) == 3]
    assert len(rejections) > 3
    for result, source, reason in rejections:
        assert f"| {result} | {source} | {reason} |" in TEXT
    for cipher in tls.CIPHERS.split(":")[:-1]:
        assert f"`{cipher}`" in SAID
    for levels in MODEL_LEVELS.values():
        assert ", ".join(levels) in SAID
    for code in (stow.CANNOT_UNDERSTAND, stow.MISMATCH, store.OUT_OF_RESOURCES):
        assert f"{code:04X}" in SAID


def test_character_sets_that_it_names_are_known() -> None:
    [named] = re.findall(r"Read are (.*?)\. ", SAID)
    terms = re.findall(r"`([^`]+)`", named)
    assert len(terms) > 25
    assert {term: charset_of(term.encode()).problem for term in terms} == dict.fromkeys(terms, "")


def test_settings_that_it_names_are_there() -> None:
    known = {key for key, _ in documented_keys()}
    named = set(
        re.findall(
            r"`((?:dimse|web|ingest|storage|catalog|peers|strangers|rules|archive|extract|snapshots)\.\w+)", TEXT
        )
    )
    assert len(named) > 10
    assert named <= known
