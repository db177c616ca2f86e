"""Peers: what each may do and how much of it at once, and what `sphere peers` says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pynetdicom import AE

from sphere.cli import main
from sphere.scp.callers import take_slot
from sphere.scp.identifier import build_identifier
from tests.support.dicom_tools import run_tool, running_storescp
from tests.support.ports import free_port
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import make_instance

pytestmark = pytest.mark.interop

STUDY_FIND, STUDY_MOVE = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_GET = "1.2.840.10008.5.1.4.1.2.2.3"
RIGHTS = {
    "STORER": {"may": ["store"], "max_associations": 2},
    "FINDER": {"may": ["find"], "max_queries": 1},
    "NOBODY": {"may": []},
    "SLOW": {"max_instances_s": 2},
    "HEAVY": {"max_mb_s": 0.02},
    "HURRIED": {"idle_s": 0.3},
}


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    peers = [
        {"name": title.lower(), "ae_title": title, "host": "127.0.0.1", **rights} for title, rights in RIGHTS.items()
    ]
    tables = {"peers": peers, "strangers": {"may": ["find", "retrieve"]}}
    with running_receiver(tmp_path_factory.mktemp("peers") / "archive", tables) as running:
        yield running


def associate(receiver: Receiver, title: str, sop_class: str = STUDY_FIND) -> Any:
    ae = AE(ae_title=title)
    ae.add_requested_context(sop_class)
    return ae.associate("127.0.0.1", receiver.port)


def find_status(assoc: Any) -> int:
    return [int(status.Status) for status, _ in assoc.send_c_find(build_identifier({}, "STUDY"), STUDY_FIND)][-1]


@pytest.mark.parametrize(
    ("title", "said"), [("STORER", "0x0000"), ("FINDER", "0x0124"), ("NOBODY", "0x0124"), ("ANYBODY", "0x0124")]
)
def test_who_may_store(receiver: Receiver, tmp_path: Path, title: str, said: str) -> None:
    path = make_instance(tmp_path / "1.dcm")
    run = run_tool("storescu", "-d", "-aet", title, "127.0.0.1", receiver.port, path)
    assert f"DIMSE Status                  : {said}" in run.stdout, run.stdout


@pytest.mark.parametrize(("title", "said"), [("FINDER", 0x0000), ("STORER", 0x0124), ("ANYBODY", 0x0000)])
def test_who_may_find(receiver: Receiver, title: str, said: int) -> None:
    assoc = associate(receiver, title)
    assert find_status(assoc) == said
    assoc.release()


@pytest.mark.parametrize(("title", "said"), [("FINDER", 0x0124), ("ANYBODY", 0xA801)])
def test_who_may_retrieve(receiver: Receiver, title: str, said: int) -> None:
    assoc = associate(receiver, title, STUDY_MOVE)
    identifier = build_identifier({"StudyInstanceUID": "1.2"}, "STUDY")
    statuses = [int(status.Status) for status, _ in assoc.send_c_move(identifier, "NOWHERE", STUDY_MOVE)]
    assoc.release()
    assert statuses == [said]


@pytest.mark.parametrize(("title", "said"), [("FINDER", 0x0124), ("STORER", 0x0124), ("ANYBODY", 0x0000)])
def test_who_may_retrieve_by_c_get(receiver: Receiver, title: str, said: int) -> None:
    assoc = associate(receiver, title, STUDY_GET)
    identifier = build_identifier({"StudyInstanceUID": "1.2"}, "STUDY")
    statuses = [int(status.Status) for status, _ in assoc.send_c_get(identifier, STUDY_GET)]
    assoc.release()
    assert statuses == [said]


def test_everybody_is_answered_an_echo(receiver: Receiver) -> None:
    assert run_tool("echoscu", "-aet", "NOBODY", "127.0.0.1", receiver.port).returncode == 0


def test_too_many_associations_are_refused_for_now(receiver: Receiver) -> None:
    """Slots are shared by all processes: this one takes one, the receiver the other."""
    slot = take_slot(receiver.settings.archive.state_dir / "limits", "peer-storer.association", 2)
    assert slot is not None
    first = associate(receiver, "STORER")
    assert first.is_established
    second = associate(receiver, "STORER")
    answer = second.acceptor.primitive
    assert (answer.result, answer.result_source, answer.diagnostic) == (2, 3, 2)
    other = associate(receiver, "FINDER")
    assert other.is_established
    slot.release()
    third = associate(receiver, "STORER")
    assert third.is_established
    for assoc in (first, other, third):
        assoc.release()


def test_too_many_queries_are_out_of_resources(receiver: Receiver) -> None:
    slot = take_slot(receiver.settings.archive.state_dir / "limits", "peer-finder.query", 1)
    assert slot is not None
    assoc = associate(receiver, "FINDER")
    assert find_status(assoc) == 0xA700
    slot.release()
    assert find_status(assoc) == 0x0000
    assoc.release()


@pytest.mark.parametrize("title", ["SLOW", "HEAVY"])
def test_a_rate_is_held_by_answering_later(receiver: Receiver, tmp_path: Path, title: str) -> None:
    """Two instances a second, or 20 kB, which are two instances as well."""
    files = [make_instance(tmp_path / f"{n}.dcm", PatientComments="x" * 9_600) for n in range(4)]
    before = len(receiver.log)
    run_tool("storescu", "-aet", title, "127.0.0.1", receiver.port, *files)
    waits = [float(line.rpartition("=")[2]) for line in receiver.log[before:].splitlines() if "store delayed" in line]
    assert 1 <= len(waits) <= 2  # a second's worth at once, then one after the other
    assert all(0 < wait <= 0.5 for wait in waits)


def test_an_idle_association_is_kept_as_long_as_its_peer_may(receiver: Receiver) -> None:
    assoc = associate(receiver, "HURRIED")
    assoc.join(20)
    assert assoc.is_aborted


def test_sphere_peers_says_what_each_answered(receiver: Receiver, tmp_path: Path) -> None:
    with running_storescp(tmp_path / "received") as port:
        known = {"dcmtk": port, "sphere": receiver.port, "gone": free_port()}
        tables = "".join(
            f'[[peers]]\nname = "{name}"\nae_title = "{name.upper()}"\nhost = "127.0.0.1"\nport = {port}\n'
            for name, port in known.items()
        )
        config = tmp_path / "sphere.toml"
        config.write_text(tables + 'may = ["find"]\ntransfer_syntaxes = ["RLELossless"]\n')
        run = CliRunner().invoke(main, ["--config", str(config), "peers", "--json"])
        assert run.exit_code == 1, run.output
        rows = {row["name"]: row for row in json.loads(run.output)}
        assert [rows[name]["answered"] for name in known] == [True, True, False]
        assert rows["dcmtk"]["ms"] > 0
        assert "cannot connect" in rows["gone"]["error"]
        assert rows["gone"]["may"] == ["find"]
        assert (rows["gone"]["transfer_syntaxes"], rows["gone"]["tls"]) == (["RLELossless"], False)
        config.write_text(tables.replace(str(known["gone"]), str(port)))
        run = CliRunner().invoke(main, ["--config", str(config), "peers"])
        assert run.exit_code == 0, run.output
        assert run.output.count(" ms") == 3
