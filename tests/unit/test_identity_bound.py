"""A receiver looks at a bounded number of elements, whatever the bytes."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
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


def test_a_deflate_bomb() -> None:
    """An element of 64 MiB, deflated to 64 kB, before every UID: 4 MiB of it are inflated, and not all at once."""
    press = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    parts = [press.compress(struct.pack("<HH2sxxI", 8, 1, b"OB", 64 << 20))]
    parts += [press.compress(bytes(1 << 20)) for _ in range(64)]
    bomb = b"".join((*parts, press.flush()))
    tracemalloc.start()
    try:
        found = identify(bomb, transfer_syntax_uid="1.2.840.10008.1.2.1.99", size=len(bomb))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.SOPInstanceUID, found.complete) == ("", True)
    assert peak < 4 << 20
