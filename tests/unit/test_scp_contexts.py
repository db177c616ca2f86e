"""Association negotiation: what is taken for storage, and which transfer syntax is chosen."""

from __future__ import annotations

import pytest
from pynetdicom import AllStoragePresentationContexts
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor

from sphere.catalog.query import Features
from sphere.scp import contexts

pytestmark = pytest.mark.unit

CT = "1.2.840.10008.5.1.4.1.1.2"
STUDY_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
J2K, PRIVATE = "1.2.840.10008.1.2.4.90", "1.2.3.4.5.99"


def proposed(abstract_syntax: str, *transfer_syntaxes: str, number: int = 1) -> PresentationContext:
    context = PresentationContext()
    context.context_id = number
    context.abstract_syntax = abstract_syntax
    context.transfer_syntax = list(transfer_syntaxes)
    return context


@pytest.mark.parametrize(
    ("uid", "storage"),
    [
        (CT, True),
        ("1.2.840.10008.5.1.4.1.1.5", True),  # Nuclear Medicine Image Storage, retired
        ("1.2.840.10008.5.1.4.1.1.12.77", True),  # retired, its name withdrawn
        ("1.2.840.10008.5.1.4.1.1.501.1", True),  # DICOS
        ("1.2.840.10008.5.1.4.39.1", True),  # Color Palette Storage
        ("1.2.840.10008.5.1.4.1.1.9999.1", True),  # none yet
        ("1.3.12.2.1107.5.9.1", True),  # private
        ("1.2.840.10008.5.1.4.1.2.2.99", False),
        ("1.2.840.10008.5.1.4.1.2.2.2", False),  # Study Root MOVE
        ("1.2.840.10008.5.1.1.9", False),  # Basic Grayscale Print Management
        ("1.2.840.10008.1.20.1", False),  # Storage Commitment
        ("1.2.840.10008.1.3.10", False),  # a DICOMDIR
        ("1.2.840.10008.5.1.4.1.1.200.4", False),  # a FIND class among the storage UIDs
        (IMPLICIT, False),
        (contexts.VERIFICATION, False),
    ],
)
def test_what_is_taken_for_storage(uid: str, storage: bool) -> None:
    assert contexts.is_storage(uid) is storage


def test_every_storage_class_that_pynetdicom_knows_is_storage() -> None:
    assert all(contexts.is_storage(str(cx.abstract_syntax)) for cx in AllStoragePresentationContexts)


def test_each_context_is_answered_for_itself() -> None:
    """Two contexts of one class each get what they propose first; pynetdicom alone would prefer by class."""
    narrowed = contexts.narrow(
        [
            proposed(CT, J2K, EXPLICIT, number=1),
            proposed(CT, EXPLICIT, J2K, number=3),
            proposed(CT, PRIVATE, number=5),
            proposed("1.2.3.4", BIG, number=7),
            proposed(STUDY_FIND, J2K, BIG, IMPLICIT, number=9),
            proposed(STUDY_FIND, J2K, number=11),
            proposed("1.2.840.10008.5.1.1.9", EXPLICIT, number=13),
        ]
    )
    answers, _ = negotiate_as_acceptor(narrowed, contexts.supported(narrowed))
    assert [(cx.context_id, cx.result, cx.transfer_syntax[0]) for cx in answers] == [
        (1, 0, J2K),
        (3, 0, EXPLICIT),
        (5, 0, PRIVATE),
        (7, 0, BIG),
        (9, 0, BIG),
        (11, 4, J2K),  # transfer syntaxes not supported
        (13, 3, EXPLICIT),  # abstract syntax not supported
    ]


def test_contexts_without_a_syntax_are_not_answered() -> None:
    assert contexts.narrow([proposed(CT), PresentationContext(), proposed(CT, EXPLICIT)]) == [proposed(CT, EXPLICIT)]


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        (b"", b""),
        (b"\x01", b"\x01"),
        (b"\x00\x01", b"\x00\x01"),
        (b"\x01" * 9, b"\x01\x01\x01\x01\x00\x01\x01\x00\x00"),
        (b"\x00\x00\x01\x00\x00\x01", b"\x00\x00\x01\x00\x00\x01"),
        (b"\xff\x02\x01", b"\x00\x00\x01"),
    ],
)
def test_find_extensions(asked: bytes, granted: bytes) -> None:
    assert contexts.find_extensions(asked) == granted
    assert contexts.extension(granted, contexts.RELATIONAL) is (granted[:1] == b"\x01")
    features = contexts.find_features(granted)
    given = (features.relational, features.combined_datetime, features.fuzzy_names, features.timezone_adjustment)
    assert given == tuple(value == 1 for value in granted[:4].ljust(4, b"\0"))
    assert contexts.application_information(features) == granted.rstrip(b"\0")
    assert (features.empty_values, features.multiple_values) == tuple(v == 1 for v in granted[5:7].ljust(2, b"\0"))


def test_features_that_a_peer_does_not_grant_are_named() -> None:
    features = Features(relational=True, fuzzy_names=True, multiple_values=True)
    assert contexts.application_information(features) == b"\x01\0\x01\0\0\0\x01"
    assert contexts.not_granted(features, b"\x01\x01") == ["fuzzy names", "multiple values"]
    assert contexts.application_information(Features()) == b""
