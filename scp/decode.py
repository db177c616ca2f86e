"""A data set that comes with a request (an identifier, or the information of N-ACTION), decoded in bounded memory."""

from __future__ import annotations

import zlib
from io import BytesIO
from typing import Final

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import decode

from sphere.catalog import wellformed
from sphere.conf.errors import QueryError
from sphere.ingest.header.dictionary import standard_vr
from sphere.ingest.header.element import Encoding, read_head

MAX_IDENTIFIER: Final = 1 << 22  # bytes, inflated where deflated; room for 60,000 UIDs
SMALL: Final = 1 << 18  # bytes up to which nothing is looked at: pydicom makes at most 50 MB of them
MAX_ELEMENTS: Final = 4096  # of a longer one: those are long because of a list of UIDs
_ITEM: Final = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # the tag of an item, little and big endian


def decode_identifier(data: bytes, syntax: UID, *, max_items: int = 0) -> Dataset:
    """The data set that the bytes are; raises QueryError where they are none, are not whole, or would take too much.

    pydicom makes more than 1 kB of an empty item of 8 bytes. So what is longer than SMALL may hold at most `max_items`
    items; with 0 it has to be plain elements, at most MAX_ELEMENTS.
    """
    try:
        if syntax.is_deflated:  # at most one byte too many, however much the bytes would give (PS3.5 A.5)
            stream = zlib.decompressobj(-zlib.MAX_WBITS)
            data = stream.decompress(data, MAX_IDENTIFIER + 1)
            if not stream.eof and len(data) <= MAX_IDENTIFIER:
                raise QueryError("deflated identifier ends early")
        if len(data) > MAX_IDENTIFIER:
            raise QueryError(f"identifier is longer than {MAX_IDENTIFIER} bytes")
        if len(data) > SMALL:
            _check(data, syntax, max_items)
        wellformed.check(data, Encoding(explicit=not syntax.is_implicit_VR, little=syntax.is_little_endian))
        return decode(BytesIO(data), syntax.is_implicit_VR, syntax.is_little_endian)
    except QueryError:
        raise
    except Exception as error:  # noqa: BLE001  pydicom raises whatever the bytes make of it
        raise QueryError(f"identifier cannot be decoded ({type(error).__name__})") from None


def _check(data: bytes, syntax: UID, max_items: int) -> None:
    if max_items and sum(map(data.count, _ITEM)) > max_items:
        raise QueryError(f"more than {max_items} items")
    encoding = Encoding(explicit=not syntax.is_implicit_VR, little=syntax.is_little_endian)
    if not max_items and not _is_plain(data, encoding):
        raise QueryError(f"over {SMALL >> 10} KiB an identifier may have plain elements only")


def _is_plain(data: bytes, encoding: Encoding) -> bool:
    """Whether this is exactly a row of at most MAX_ELEMENTS elements none of which pydicom would look into."""
    if not encoding.explicit and data[4:6].isalpha() and data[4:6].isupper():
        return False  # the length of the first element, which pydicom takes for a VR
    at = 0
    for _ in range(MAX_ELEMENTS):
        if at == len(data):
            return True
        head = read_head(data, at, encoding, len(data) - at)
        vr = head and (head.vr if encoding.explicit else standard_vr(head.tag))
        if head is None or vr in ("", None, "SQ", "UN") or head.length > len(data) - at - head.size:
            return False
        at += head.size + head.length
    return False
