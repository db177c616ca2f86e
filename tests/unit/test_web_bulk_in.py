"""Which part of a store request a BulkDataURI means (RFC 2557 5): the right one, or none."""

from __future__ import annotations

from pathlib import Path
from tempfile import gettempdir

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere.scp.upper.dataset import Budget
from sphere.scp.web import bulk_in
from sphere.scp.web.bulk_in import BulkParts, Unusable
from sphere.scp.web.incoming import ArrivingBody
from sphere.scp.web.problem import WebError
from tests.support.examples import examples

pytestmark = pytest.mark.unit


def parts_of(*locations: str) -> BulkParts:
    parts = BulkParts()
    for location in locations:
        parts.add(location, location, ArrivingBody(Path(gettempdir()), Budget(1 << 20)))
    return parts


def found(uri: object, *locations: str, base: str = "") -> str:
    """The location that is meant, or why there is none."""
    try:
        return parts_of(*locations).find(uri, base)[0][0]
    except Unusable as error:
        return str(error).rpartition(" ")[2]


@pytest.mark.parametrize(
    ("uri", "locations", "meant"),
    [
        ("bulk1", ("http://x/prebulk1", "bulk1"), "bulk1"),
        ("bulk1", ("http://x/prebulk1", "http://x/bulk1"), "http://x/bulk1"),
        ("k1", ("http://x/prebulk1",), "request"),
        ("a/1", ("http://x/ba/1", "http://x/a/1", "http://x/a/11"), "http://x/a/1"),
        ("1", ("http://x/a/1", "http://x/b/1"), "several"),
        ("1", ("http://x/a/1", "/b/1", "c/1", "1?x"), "several"),
        ("http://x/1", ("http://y/http://x/1", "http://y/1", "1"), "request"),
        ("//x/1", ("http://x/1",), "request"),
        ("x", ("http://x", "cid:x", "http://y/z?a=/x", "http://y/z#/x"), "request"),
        ("/a/1", ("http://x/b/a/1", "http://x/a/1"), "http://x/a/1"),
        ("/a/1", ("http://x/a/1", "http://y/a/1"), "several"),
        ("b?n=1", ("http://x/b", "http://x/b?n=11", "http://x/b?n=1"), "http://x/b?n=1"),
        ("?n=1", ("http://x/b?n=1",), "request"),
        ("", ("http://x/",), "text"),
        (7, ("7",), "text"),
        (["1"], ("1",), "text"),
    ],
)
def test_what_a_reference_means(uri: object, locations: tuple[str, ...], meant: str) -> None:
    assert found(uri, *locations) == meant
    assert found(uri, *reversed(locations)) == meant


@pytest.mark.parametrize(
    ("base", "locations", "meant"),
    [
        ("http://x/a/metadata", ("http://x/a/1", "http://x/b/1"), "http://x/a/1"),
        ("http://x/c/metadata", ("http://x/a/1", "http://x/b/1"), "several"),
        ("http://x/c/metadata", ("http://x/a/1",), "http://x/a/1"),
        ("http://x/a/metadata", ("http://x/a/1", "1"), "several"),
        ("http://[x/", ("http://x/a/1",), "http://x/a/1"),
    ],
)
def test_a_reference_is_resolved_where_its_metadata_are(base: str, locations: tuple[str, ...], meant: str) -> None:
    assert found("1", *locations, base=base) == meant


SEGMENTS = st.lists(st.sampled_from(["", "a", "b", "ab", "1", "a?b", "?", "#"]), min_size=1, max_size=4)
LOCATIONS = st.tuples(st.sampled_from(["", "/", "http://x/", "http://a"]), SEGMENTS).map(
    lambda t: t[0] + "/".join(t[1])
)


@given(LOCATIONS, st.sets(LOCATIONS, max_size=6))
@settings(max_examples=examples(500), deadline=None)
def test_the_same_as_looking_at_every_location(uri: str, locations: set[str]) -> None:
    def split(reference: str) -> tuple[str, str]:
        path = reference.partition("?")[0].partition("#")[0]
        return path, reference[len(path) :]

    path, rest = split(uri)
    fitting = [uri] if uri and uri in locations else []
    if not fitting and path and not path.startswith(("http:", "//")):
        for location in locations:
            theirs, more = split(location)
            if theirs.startswith("http://"):
                _, sign, theirs = theirs[len("http://") :].partition("/")
                theirs = sign + theirs
            elif theirs.startswith("//"):
                _, sign, theirs = theirs[2:].partition("/")
                theirs = sign + theirs
            same = theirs == path if path.startswith("/") else theirs.endswith("/" + path)
            if same and more == rest:
                fitting.append(location)
    expected = fitting[0] if len(fitting) == 1 else "several" if fitting else "request" if uri else "text"
    assert found(uri, *locations) == expected


def test_looking_does_not_read_all_locations_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = bulk_in._taken_apart

    def counted(reference: str) -> tuple[str, str, str, str]:
        read.append(reference)
        return real(reference)

    monkeypatch.setattr(bulk_in, "_taken_apart", counted)
    parts = parts_of(*(f"http://x/{number}/pixels" for number in range(500)))
    for number in range(500):
        with pytest.raises(Unusable, match="not in the request"):
            parts.find(f"{number}/missing")
        assert parts.find(f"{number}/pixels")[0][0] == f"http://x/{number}/pixels"
    assert len(read) == 500 + 2 * 500


def test_locations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_in, "MAX_LOCATIONS", 10)
    parts = parts_of("12345", "67890")
    with pytest.raises(WebError, match="Content-Locations") as refused:
        parts.add("x", "", ArrivingBody(Path(gettempdir()), Budget(0)))
    assert refused.value.http == 413
    assert len(parts.bodies()) == 3, "the last is given back with the others"
