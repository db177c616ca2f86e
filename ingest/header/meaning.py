"""What an element means in its context: its VR, its value, and what it changes for the elements after it."""

from __future__ import annotations

from typing import Final

from sphere.ingest.header.charset import charset_of
from sphere.ingest.header.dictionary import PIXEL_DATA, UNDEFINED, label, private_vr, standard_vr
from sphere.ingest.header.element import Head, read_head
from sphere.ingest.header.memo import Context
from sphere.ingest.header.values import Hit, element_hit

_SPECIFIC_CHARACTER_SET: Final = 0x00080005
_PIXEL_REPRESENTATION: Final = 0x00280103


def fresh(raw: bytes, context: Context) -> Hit | None:
    """Decode and remember an element of which head and length are known already; None for a sequence."""
    encoding = context.encoding
    head = read_head(raw, 0, encoding, len(raw))
    if head is None:
        return None
    vr = head.vr if head.vr and head.vr != "UN" else resolve(head, context)
    if vr == "SQ":
        return None
    hit = element_hit(head.tag, vr, raw[head.size :], little=encoding.little, charset=context.charset)
    context.remember(raw, hit)
    return hit


def turn(head: Head, raw: bytes, hit: Hit, context: Context) -> tuple[Hit, Context | None]:
    """The context after an element that changes the meaning of others, None after any other one.

    The element gets a warning where what it says cannot be followed.
    """
    tag, value = head.tag, raw[head.size :]
    if tag == _SPECIFIC_CHARACTER_SET:
        charset = charset_of(value)
        if charset.problem:
            hit = hit._replace(warnings=(*hit.warnings, f"{label(tag)}: {charset.problem}"))
        return hit, context.using(charset=charset)
    if tag == _PIXEL_REPRESENTATION and head.vr in ("", "UN"):
        return hit, context.using(signed=value.strip(b"\0") == b"\x01")
    if tag >> 16 & 1 and 0x10 <= tag & 0xFFFF <= 0xFF:
        return hit, context.reserving(tag, value.decode("latin-1").strip(" \0"))
    return hit, None


def allow(head: Head, raw: bytes, context: Context) -> None:
    """Let the fast loop take elements that begin like this one."""
    if head.tag in PIXEL_DATA or (context.encoding.explicit and not head.vr):
        return  # ends the walk elsewhere; its length was guessed from what follows
    context.lengths[raw[: head.size]] = len(raw)


def resolve(head: Head, context: Context) -> str:
    """The VR to read an element by: its own, else what the dictionaries say; UN where nobody knows."""
    vr = head.vr
    if vr and (vr != "UN" or (head.length >= 0xFFFF and head.length != UNDEFINED)):
        return vr
    if head.tag >> 16 & 1:
        return private_vr(head.tag, context.creator(head.tag)) or "UN"
    known = standard_vr(head.tag)
    if known == "US or SS":
        return "SS" if context.signed else "US"
    return known or "UN"
