"""Where instances are, from a process of its own."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import orjson
import pytest

from sphere.catalog import lookup_process
from sphere.catalog.lookup_process import LookupProcess, serve
from sphere.catalog.queries import LateQueries
from sphere.catalog.stored import StoredInstance
from sphere.conf.errors import CatalogError, SphereError, StorageError
from sphere.conf.settings import Settings
from tests.support.landing import land, new_member, slices

pytestmark = pytest.mark.unit

ONE = StoredInstance(
    "1.2.9", "1.2.8", "1.2.3", "1.2.840.10008.5.1.4.1.1.2", "1.2", "bundles/b.tar", 1, 2, 3, None, "ab"
)


def test_what_landed_is_found_and_a_process_that_ended_is_begun_anew(settings: Settings) -> None:
    records = land(settings, [new_member(one) for one in slices(3)])
    uids = [record.SOPInstanceUID for record in records]
    with LateQueries(settings) as queries, closing(LookupProcess(settings, queries)) as lookup:
        found = list(lookup.lookup_instances(sop=[*uids, "1.2.3.4.5"]))
        assert {(one.SOPInstanceUID, one.bundle, one.offset, one.sha256) for one in found} == {
            (one.SOPInstanceUID, one.bundle, one.offset, one.sha256) for one in records
        }
        first = lookup._process
        assert first is not None
        first.kill()
        first.wait()
        assert list(lookup.lookup_instances(sop=uids)) == found
        assert not queries.is_open, "an index in this process"
        assert list(queries.lookup_instances(sop=uids)) == found
        lookup.close()
        assert list(lookup.lookup_instances(sop=uids[:1])) == found[:1], "by queries that are open now"


def test_once_closed_none_is_begun(settings: Settings) -> None:
    with LateQueries(settings) as queries:
        lookup = LookupProcess(settings, queries)
        lookup.close()
        with pytest.raises(CatalogError, match="ended"):
            lookup.lookup_instances(sop=["1.2.3"])
        assert lookup._process is None


def test_a_process_that_cannot_begin_is_an_error_of_the_catalog(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup_process.sys, "executable", "/bin/false")
    with (
        LateQueries(settings) as queries,
        closing(LookupProcess(settings, queries)) as lookup,
        pytest.raises(CatalogError, match="the process that looks up instances ended"),
    ):
        lookup.lookup_instances(sop=["1.2.3"])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CatalogError("no catalog"), {"error": "no catalog", "storage": False}),
        (StorageError("away"), {"error": "away", "storage": True}),
        (KeyError("a name"), {"error": "internal error (KeyError)"}),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_is_answered(error: Exception, told: dict[str, Any]) -> None:
    answers = io.BytesIO()

    def look(sop: list[str]) -> Iterator[StoredInstance]:
        if sop == ["1.2.3"]:
            yield replace(ONE, SOPInstanceUID=sop[0])
        else:
            raise error

    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb", buffering=0) as requests, os.fdopen(theirs, "wb", buffering=0) as end:
        end.write(pickle.dumps(["1.2.4"]) + pickle.dumps(["1.2.3"]))
        end.close()
        serve(requests, answers, look)
    first, second = map(orjson.loads, answers.getvalue().splitlines())
    assert first == told
    assert [StoredInstance(*one) for one in second["found"]] == [ONE]


def test_it_ends_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup_process, "IDLE_S", 0.01)
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb", buffering=0) as requests, os.fdopen(theirs, "wb"):
        serve(requests, io.BytesIO(), lambda _: iter(()))


def test_errors_keep_their_kind(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with LateQueries(settings) as queries, closing(LookupProcess(settings, queries)) as lookup:
        for kind, said in ((StorageError, b'{"error":"away","storage":true}'), (CatalogError, b'{"error":"none"}')):
            monkeypatch.setattr(lookup, "_answer", lambda _, said=said: said)
            with pytest.raises(SphereError) as raised:
                lookup.lookup_instances(sop=["1.2.3"])
            assert type(raised.value) is kind
