"""The audit journal, and the table that it is loaded into: every record once."""

from __future__ import annotations

import re
import time
import zlib
from pathlib import Path
from threading import Event
from typing import Any

import orjson
import pytest

from sphere.catalog.audit import FOLDER, AuditJournal
from sphere.conf.settings import Settings
from sphere.ingest.header import identify
from sphere.ingest.storage import open_storage
from sphere.jobs import audit
from sphere.scp import client
from tests.interop.test_storage_commitment import asked, information
from tests.support.headers import DEFLATED, EXPLICIT_LE, element, item, sequence, text
from tests.support.landing import archive, land, new_member, slices, table_rows
from tests.support.ports import free_port
from tests.support.receiver import running_receiver

pytestmark = pytest.mark.unit


def record(settings: Settings, *names: str) -> None:
    storage = open_storage(settings.storage.root)
    journal = AuditJournal(storage, settings.archive.state_dir / "audit.jsonl")
    for name in names:
        journal.add(who=name, method="GET", status=200, outcome="done", entities=1, bytes=2, seconds=0.5)
    journal.close()


def who(settings: Settings) -> list[str]:
    return sorted(row["who"] or row["outcome"] for row in table_rows(settings, "audit"))


def test_records_are_loaded_once(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    assert audit.run(settings) == 0
    record(settings, "anna", "ben")
    assert (audit.run(settings), audit.run(settings)) == (2, 0)
    record(settings, "carl")
    cache = settings.archive.state_dir / "audit-loaded.json"
    cache.unlink()  # nothing depends on it
    assert (audit.run(settings), audit.run(settings)) == (1, 0)
    [row] = [row for row in table_rows(settings, "audit") if row["who"] == "anna"]
    assert (row["method"], row["status"], row["entities"], row["seconds"]) == ("GET", 200, 1, 0.5)
    assert row["at"].tzinfo is not None
    cache.write_text("rubbish")
    assert audit.run(settings) == 0
    assert who(settings) == ["anna", "ben", "carl"]


def test_lines_that_are_not_whole_or_not_records(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    path = tmp_path / "storage" / FOLDER / "2026" / "01" / "01" / "x.jsonl"
    path.parent.mkdir(parents=True)
    whole = orjson.dumps({"at": "2026-01-01T00:00:00+00:00", "who": "anna"}) + b"\n"
    path.write_bytes(whole + b'{"at": "2026-01-0')
    assert (audit.run(settings), audit.run(settings)) == (1, 0)
    path.write_bytes(whole + whole.replace(b"anna", b"ben!") + b"not JSON\n" + b"[1]\n" + b'{"at":"then"}\n')
    assert audit.run(settings) == 4
    assert who(settings) == ["anna", "ben!", "unreadable", "unreadable", "unreadable"]


def test_a_load_that_dies_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its commit nothing is there; after it, nothing comes twice."""
    settings = archive(tmp_path)
    record(settings, "anna")
    for name in ("append", "learn"):

        def die(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        owner = audit.Tables if name == "append" else audit._Known
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(owner, name, die)
            audit.run(settings)
    assert audit.run(settings) == 0
    assert who(settings) == ["anna"]


def test_what_the_storage_refused_comes_later(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    fallback = settings.archive.state_dir / "audit.jsonl"
    fallback.parent.mkdir(parents=True, exist_ok=True)
    fallback.write_bytes(orjson.dumps({"at": "2026-01-01T00:00:00+00:00", "who": "late"}) + b"\n")
    assert audit.run(settings) == 0  # set aside: a writer may be in the middle of a line
    assert (audit.run(settings), audit.run(settings)) == (1, 0)
    assert who(settings) == ["late"]
    assert not fallback.exists()


def test_a_storage_that_hangs_holds_up_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HDFS does for a while when a DataNode died: what it has not confirmed is kept on this host."""
    settings = archive(tmp_path)
    answered, storage = Event(), open_storage(settings.storage.root)
    monkeypatch.setattr("sphere.catalog.audit.CLOSE_S", 0.3)
    create = storage.create
    monkeypatch.setattr(storage, "create", lambda path: answered.wait(60) and create(path))
    journal = AuditJournal(storage, settings.archive.state_dir / "audit.jsonl")
    journal.add(who="given")
    while journal._waiting.qsize():
        time.sleep(0.01)
    journal.add(who="waiting")
    journal.close()
    lines = (settings.archive.state_dir / "audit.jsonl").read_bytes().splitlines()
    assert [orjson.loads(line)["who"] for line in lines] == ["given", "waiting"]
    answered.set()


def test_files_of_the_table_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "JOINED", 3)
    settings = archive(tmp_path)
    for number in range(4):
        record(settings, f"caller-{number}")
        assert audit.run(settings) == 1
    table = audit.Tables(settings).ensure("audit")
    assert len(table.file_uris()) < 4
    assert who(settings) == [f"caller-{number}" for number in range(4)]


def test_requests_of_dimse_are_recorded(tmp_path: Path) -> None:
    files = []
    for number, data in enumerate(slices(3)):
        files.append(tmp_path / f"{number}.dcm")
        files[-1].write_bytes(data)
    land(archive(tmp_path / "a"), [new_member(data) for data in slices(1, study=4)])
    rights = {"strangers": {"may": ["store", "find"]}}
    with running_receiver(tmp_path / "a", {**rights, "extract": {"every_s": 0}}) as receiver:
        settings, peer = receiver.settings, receiver.peer
        assert all(one.stored for one in client.store(peer, files, settings=settings))
        assert len(list(client.find(peer, {"PatientID": "P*"}, settings=settings))) == 2
        *_, last = client.get(peer, {"StudyInstanceUID": "1.2"}, settings=settings, store=lambda one: None)
        assert last.status == 0x0124
        client.echo(peer, settings=settings)
    assert audit.run(settings) == 3
    by_method = {row["method"]: row for row in table_rows(settings, "audit")}
    assert set(by_method) == {"C-STORE", "C-FIND", "C-GET"}
    assert {(row["who"], row["role"], row["address"]) for row in by_method.values()} == {
        ("ae:SPHERE", "strangers", "127.0.0.1")
    }
    stored, found, refused = by_method["C-STORE"], by_method["C-FIND"], by_method["C-GET"]
    assert (stored["entities"], stored["failed"], stored["outcome"]) == (3, 0, "done")
    assert (found["entities"], found["status"], found["outcome"]) == (2, 0, "done")
    assert "P*" in orjson.loads(found["query"])["00100020"]["Value"]
    assert found["path"] == "SPHERE/1.2.840.10008.5.1.4.1.2.2.1"
    assert (refused["status"], refused["outcome"]) == (0x0124, "refused")
    assert "P*" not in receiver.log


def test_an_identifier_is_whole_or_says_what_is_not_there(tmp_path: Path) -> None:
    """Nobody hides a key behind a list of UIDs."""

    def uids(count: int) -> str:
        return "\\".join(f"1.2.{'1' * 40}.{number}" for number in range(count))

    asked = [{"PatientID": f"HIDDEN-{count}", "StudyInstanceUID": uids(count)} for count in (800, 1600)]
    rights = {"strangers": {"may": ["store", "find"]}, "extract": {"every_s": 0}}
    with running_receiver(tmp_path / "a", rights) as receiver:
        settings = receiver.settings
        for keys in asked:
            assert not list(client.find(receiver.peer, keys, settings=settings))
    assert audit.run(settings) == 2
    whole, cut = sorted((row["query"] for row in table_rows(settings, "audit")), key=lambda one: "cut" in one)
    assert orjson.loads(whole)["00100020"]["Value"] == ["HIDDEN-800"]
    assert orjson.loads(whole)["0020000D"]["Value"] == uids(800).split("\\")
    begin, _, rest = cut.partition("... ")
    assert b"HIDDEN-1600" in bytes.fromhex(begin)
    assert re.fullmatch(r"\[cut: \d{5} bytes with SHA-256 [0-9a-f]{64}\]", rest)


def test_a_key_does_not_hide_another(tmp_path: Path) -> None:
    """What JSON would not tell all of is recorded as it came."""
    settings, name = archive(tmp_path), text("PatientName", "PN", "HIDDEN")
    told, hidden = [name, sequence("ReferencedPatientSequence", item(name))], [name + name, name[:-2]]
    hidden += [name + element(0x00420011, "OB", bytes(2000)), sequence("ReferencedPatientSequence", item(name, name))]
    journal = AuditJournal(open_storage(settings.storage.root), settings.archive.state_dir / "audit.jsonl")
    deflated = zlib.compressobj(wbits=-15)
    for data in (*told, *hidden):
        journal.add(who="told" if data in told else data.hex(), identifier=data.hex(), transfer_syntax=EXPLICIT_LE)
    packed = deflated.compress(name) + deflated.flush()
    journal.add(who="told", identifier=packed.hex(), transfer_syntax=DEFLATED)
    journal.close()
    assert audit.run(settings) == 7
    rows = table_rows(settings, "audit")
    assert all("HIDDEN" in row["query"] for row in rows if row["who"] == "told")
    assert all(row["query"] == row["who"] for row in rows if row["who"] != "told")


def test_what_is_sent_elsewhere_and_what_is_promised_is_recorded(tmp_path: Path) -> None:
    """C-MOVE, done and to nobody that is known; N-ACTION of Storage Commitment."""
    [data] = slices(1, study=4)
    one = identify(data, size=len(data))
    land(archive(tmp_path / "a"), [new_member(data)])
    with running_receiver(tmp_path / "other", {"archive": {"ae_title": "OTHER"}}) as other:
        peers = [{"name": "other", "ae_title": "OTHER", "host": "127.0.0.1", "port": other.port},
                 {"name": "me", "ae_title": "SPHERE", "host": "127.0.0.1", "port": free_port()}]  # fmt: skip
        with running_receiver(tmp_path / "a", {"peers": peers, "extract": {"every_s": 0}}) as receiver:
            settings, keys = receiver.settings, {"StudyInstanceUID": one.StudyInstanceUID}
            for destination, status in (("OTHER", 0), ("NOBODY", 0xA801)):
                *_, last = client.move(receiver.peer, keys, settings=settings, destination=destination)
                assert last.status == status
            wanted = information((one.SOPClassUID, one.SOPInstanceUID), transaction="1.2.3.4")
            assert asked(receiver, wanted, title="SPHERE") == [0]
        assert len(other.members()) == 1
    assert audit.run(settings) == 3
    rows = table_rows(settings, "audit")
    assert {(row["who"], row["role"], row["address"]) for row in rows} == {("ae:SPHERE", "peer-me", "127.0.0.1")}
    told = {(row["method"], row["status"], row["outcome"], row["entities"], row["failed"]) for row in rows}
    assert told == {("C-MOVE", 0, "done", 1, 0), ("C-MOVE", 0xA801, "failed", 0, 0), ("N-ACTION", 0, "done", 0, 0)}
    [promised] = [row for row in rows if row["method"] == "N-ACTION"]
    assert promised["path"].endswith("/1.2.840.10008.1.20.1")
    for row in rows:
        if row["method"] == "C-MOVE":
            assert orjson.loads(row["query"])["0020000D"]["Value"] == [one.StudyInstanceUID]
