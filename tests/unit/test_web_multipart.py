"""The reader of multipart bodies, whatever it is given and wherever the pieces end (RFC 2046 5.1.1)."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere.scp.web.multipart_in import Data, End, Head, MultipartReader
from sphere.scp.web.problem import WebError
from tests.support.examples import examples

pytestmark = pytest.mark.unit


@given(st.lists(st.tuples(st.dictionaries(st.sampled_from(["a", "b-c"]), st.sampled_from(["", "x", "y; z=1"])),
                          st.binary(max_size=60) | st.sampled_from([b"\r\n--", b"\r\n--Bx\r\n", b"--B", b"\r\n"]))),
       st.lists(st.integers(1, 40), min_size=1))  # fmt: skip
@settings(max_examples=examples(150), deadline=None)
def test_parts_come_out_as_they_went_in(parts: list[tuple[dict[str, str], bytes]], cuts: list[int]) -> None:
    delimiter = re.compile(rb"\r\n--B(--|[ \t]*\r\n)")
    parts = [(head, data) for head, data in parts if not delimiter.search(b"\r\n" + data + b"\r\n")]
    whole = b"".join(
        b"\r\n--B\r\n" + "".join(f"{k}: {v}\r\n" for k, v in head.items()).encode() + b"\r\n" + data
        for head, data in parts
    )
    whole += b"\r\n--B--\r\n"
    reader, got, at, turn = MultipartReader("B"), [], 0, 0
    while at < len(whole):
        size = cuts[turn % len(cuts)]
        for event in reader.feed(whole[at : at + size]):
            if isinstance(event, Head):
                got.append((dict(event.headers), b""))
            elif isinstance(event, Data):
                got[-1] = (got[-1][0], got[-1][1] + event.data)
            else:
                assert isinstance(event, End)
        at, turn = at + size, turn + 1
    reader.close()
    assert got == [({k: v.strip() for k, v in head.items()}, data) for head, data in parts]


@given(st.binary(max_size=300), st.integers(1, 50))
@settings(max_examples=examples(150), deadline=None)
def test_the_reader_never_fails_otherwise(data: bytes, step: int) -> None:
    """Nor does it give more than it was given."""
    reader, events = MultipartReader("B"), []
    with suppress(WebError):
        for at in range(0, len(data), step):
            events += reader.feed(data[at : at + step])
        reader.close()
    assert sum(len(event.data) for event in events if isinstance(event, Data)) <= len(data)
