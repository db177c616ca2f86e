"""A receiver looks at a bounded number of elements, whatever the bytes."""

from __future__ import annotations

from typing import Any

import pytest

from sphere.ingest.header import identify, identity

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
@pytest.mark.parametrize("element", [bytes(8), b"\x08\x00\x05\x00\0\0\0\0"], ids=["zeros", "empty elements"])
def test_a_data_set_of_a_million_empty_elements(element: bytes, syntax: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = identity.read_head

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments)

    monkeypatch.setattr(identity, "read_head", counted)
    found = identify(element * (1 << 20), transfer_syntax_uid=syntax, size=8 << 20)
    assert (found.SOPInstanceUID, found.complete) == ("", True)
    assert calls <= 20_000
