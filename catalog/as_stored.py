"""Keys of attributes that PS3.6 does not know, private ones above all: what they ask depends on the VR that each data
set has them with.

An identifier in implicit VR says no VR, and what dictionaries know of a private creator is often not what its devices
write. So a key keeps what it came with, and is read as a value of the VR that is found: `35` by an IS as a number, by
an LO as text, eight bytes by an FD as its number. A value that is none of that VR does not match.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

from sphere.catalog.match import Test
from sphere.catalog.match_parse import PLAIN, Rules, parse_values
from sphere.ingest.header.values import NUMBERS


@dataclass(frozen=True, slots=True)
class AsStored:
    """The key `text`, or the bytes `raw` that it was, where these are known; `said` is the VR that came with it, "" for
    none."""

    text: str
    raw: bytes | None = None
    said: str = ""
    rules: Rules = PLAIN

    def tests(self, vr: str) -> tuple[Test, ...] | None:
        """What it asks of an attribute that is stored with a VR ("" where it is absent), as `parse_values` says; None
        where nothing of that VR can pass."""
        text: str | None = self.text
        if self.said in NUMBERS and vr in ("DA", "DT", "TM"):  # its sign would be that of a range
            return None
        if vr == "UN":  # bytes, which the values of such an attribute are compared as
            text = (self.text.encode() if self.raw is None else self.raw).decode("latin-1")
        elif self.raw is not None and not self.said and (vr in NUMBERS or vr == "AT"):
            text = binary_text(self.raw, vr, "<")
        elif not vr and self.raw and not self.raw.strip(b"\0"):  # a number, most likely, which nothing absent is
            text = None
        return None if text is None else _tests(text, vr or "UN", self.rules)


@functools.lru_cache(1024)
def _tests(text: str, vr: str, rules: Rules) -> tuple[Test, ...] | None:
    try:
        return parse_values(text, vr, rules=rules)
    except ValueError:
        return None


def parse_as_stored(text: str, *, raw: bytes | None, said: str, rules: Rules) -> AsStored | None:
    """What a key asks; None where it matches everything, whatever is stored.

    Raises ValueError for a text that is too long, or not allowed for the VR that it says.
    """
    known = parse_values(text, said or "UT", rules=rules)
    if not known and (said or not raw):
        return None
    return AsStored(text, raw, said, rules)


def binary_text(value: bytes, vr: str, order: str) -> str | None:
    """Binary numbers, or tags, as text with backslashes between them; None where the length is none of their VR's.

    `order` is the byte order in the notation of `struct`.
    """
    size = 4 if vr == "AT" else struct.calcsize(order + NUMBERS[vr])
    if not value or len(value) % size:
        return None
    if vr == "AT":
        words = struct.unpack(f"{order}{len(value) // 2}H", value)
        return "\\".join(f"{group:04X}{number:04X}" for group, number in zip(words[::2], words[1::2], strict=True))
    return "\\".join(map(str, struct.unpack(f"{order}{len(value) // size}{NUMBERS[vr]}", value)))
