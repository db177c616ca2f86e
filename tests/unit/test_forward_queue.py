"""What is queued for which forward, once and in order, and when it is tried again."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from sphere.conf.errors import SettingsError
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.jobs.forward_queue import Entry, Queue, entries, states
from sphere.jobs.tables import Tables
from sphere.scp.policy import check_forwards
from tests.support.forwarder import catalogue
from tests.support.landing import changed, land, new_member, slices

pytestmark = pytest.mark.unit

DEST = {"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": 1}


SENDERS = [  # of one AE title
    {"name": "ct", "ae_title": "MODALITY", "host": "10.0.0.7"},
    {"name": "elsewhere", "ae_title": "MODALITY", "host": "10.0.0.8"},
]


def with_forwards(folder: Path, *forwards: dict[str, Any]) -> Settings:
    tables = [{"name": "all", "to": "dest", **one} for one in forwards]
    return from_dict({"peers": [DEST, *SENDERS], "forwards": tables}, base=folder)


def test_only_what_comes_is_queued_and_only_once(tmp_path: Path) -> None:
    settings = with_forwards(tmp_path, {})
    before, first, second, third = slices(4)
    catalogue(settings, land(settings, [new_member(before)]))
    queue = Queue(settings)
    queue.open()
    assert queue.take_up() == 0
    members = [new_member(second, second=2), new_member(first, second=1)]
    catalogue(settings, land(settings, members))
    assert queue.take_up() == 1
    assert queue.take_up() == 0
    [entry] = queue.waiting
    assert entry.instances == [members[1].SOPInstanceUID, members[0].SOPInstanceUID]
    catalogue(settings, land(settings, [new_member(third, second=3)]))
    again = Queue(settings)  # killed, and started anew
    again.open()
    assert again.waiting == [entry]
    assert again.take_up() == 1
    assert [len(one.instances) for one in again.waiting] == [2, 1]


def test_what_is_committed_while_the_queue_looks_is_queued_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_forwards(tmp_path, {})
    first, second = slices(2)
    queue = Queue(settings)
    queue.open()
    catalogue(settings, land(settings, [new_member(first)]))
    opened = Tables(settings).open("instances")
    catalogue(settings, land(settings, [new_member(second, second=1)]))
    with monkeypatch.context() as patch:
        newest = queue._tables.open
        patch.setattr(queue._tables, "open", lambda name: opened if name == "instances" else newest(name))
        assert queue.take_up() == 1
    assert queue.take_up() == 1
    assert [entry.instances for entry in queue.waiting] == [
        [new_member(data).SOPInstanceUID] for data in (first, second)
    ]


def test_rows_that_a_rewrite_moved_are_not_new(tmp_path: Path) -> None:
    settings = with_forwards(tmp_path, {})
    [data] = slices(1)
    records = land(settings, [new_member(data)])
    file = catalogue(settings, records)
    queue = Queue(settings)
    queue.open()
    file = catalogue(settings, records, instead=[file])
    assert queue.take_up() == 0
    other = land(settings, [new_member(changed(data, PatientComments="corrected"), second=1)])
    catalogue(settings, other, instead=[file])
    assert queue.take_up() == 1


@pytest.mark.parametrize(
    ("condition", "queued"),
    [
        ({"collection": "trial"}, True),
        ({"collection": ["a", "b"]}, False),
        ({"modality": "CT"}, True),
        ({"modality": "MR"}, False),
        ({"calling_ae": "MOD*", "keys": {"PatientID": "*"}, "modality": "CT"}, None),
        ({"calling_ae": "MOD*"}, True),
        ({"peer": "dest"}, False),
        ({"peer": "ct"}, True),
        ({"peer": "elsewhere"}, False),
        ({"via": "import"}, False),
        ({"sop_class": "CTImageStorage"}, True),
    ],
)
def test_conditions(tmp_path: Path, condition: dict[str, Any], queued: bool | None) -> None:
    settings = with_forwards(tmp_path, condition)
    if queued is None:
        with pytest.raises(SettingsError, match=r"forwards\.0\.keys: PatientID: .* matches everything"):
            check_forwards(settings)
        return
    queue = Queue(settings)
    queue.open()
    member = new_member(slices(1)[0], origin="dimse:MODALITY@10.0.0.7")
    catalogue(settings, land(settings, [replace(member, collections=("trial",))]))
    assert queue.take_up() == queued


def test_attempts_are_further_and_further_apart(tmp_path: Path) -> None:
    entry = Entry("all", "1.2", 1, "dest", "waiting", ["1", "2", "3"])
    waits = []
    for left in (["1", "2", "3"], ["1", "2", "3"], ["1", "2", "3"], ["3"], ["3"]):
        entry.failed(left, "away", retry_s=10, retry_max_s=35)
        assert entry.next_at is not None
        waits.append(round((entry.next_at - entry.updated_at).total_seconds()))
    assert waits == [10, 20, 35, 10, 20]
    assert (entry.sent, entry.instances) == (2, ["3"])
    settings = with_forwards(tmp_path, {})
    queue = Queue(settings)
    queue.open()
    queue.waiting = [entry]
    queue.record([entry])
    [state] = states(Tables(settings))
    assert (state.sent, state.waiting, state.attempts, state.last_error) == (2, 1, 2, "away")
    entry.done()
    queue.record([entry])
    assert queue.waiting == []
    assert [(one.state, one.sent) for one in entries(Tables(settings))] == [("sent", 3)]
    assert "3 sent, 0 waiting" in str(states(Tables(settings))[0])
    assert entry.updated_at <= datetime.now(timezone.utc)


@pytest.mark.parametrize(
    ("forwards", "message"),
    [
        ([{"to": "nobody"}], r"forwards\.0\.to: no peer is called 'nobody'"),
        ([{"peer": "nobody"}], r"forwards\.0\.peer: no peer is called 'nobody'"),
        ([{}, {}], "forwards: each name may stand once only"),
        ([{"colection": "x"}], r"nearest known key is 'forwards\.collection'"),
    ],
)
def test_bad_forwards_are_named(tmp_path: Path, forwards: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        with_forwards(tmp_path, *forwards)
