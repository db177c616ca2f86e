"""Who is meant by a peer's name, and who may call."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sphere.conf.errors import SettingsError
from sphere.conf.loading import from_dict
from sphere.conf.peers import Peer
from sphere.conf.settings import Settings
from sphere.scp.peers import RESOLVED_S, CallingPolicy, addresses, plain_address, resolve

pytestmark = pytest.mark.unit

WARD = Peer(name="ward", ae_title="WARD", host="ward.example", port=104)


@pytest.fixture
def with_peer(tmp_path: Path) -> Settings:
    return from_dict({"peers": [WARD.model_dump()]}, base=tmp_path)


@pytest.mark.parametrize(
    ("text", "ae_title", "host", "port"),
    [
        ("ward", "WARD", "ward.example", 104),
        ("PACS@10.0.0.5:104", "PACS", "10.0.0.5", 104),
        ("PACS 1@pacs.example.org:11112", "PACS 1", "pacs.example.org", 11112),
        ("A@[::1]:104", "A", "::1", 104),
    ],
)
def test_a_peer_is_a_name_or_written_out(with_peer: Settings, text: str, ae_title: str, host: str, port: int) -> None:
    peer = resolve(text, with_peer)
    assert (peer.ae_title, peer.host, peer.port) == (ae_title, host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nobody",
        "A@host",
        "A@host:0",
        "A@host:65536",
        "@host:104",
        " @host:104",
        "A\\B@h:1",
        "SEVENTEEN_LETTERS@h:1",
    ],
)
def test_anything_else_is_refused_with_what_is_known(with_peer: Settings, text: str) -> None:
    with pytest.raises(SettingsError, match=r"neither a name in the settings \(ward\) nor AET@HOST:PORT"):
        resolve(text, with_peer)


@pytest.mark.parametrize(
    ("ae_title", "address", "admitted"),
    [
        ("ANYBODY", "127.0.0.1", True),
        ("ANYBODY", "127.8.9.10", True),
        ("ANYBODY", "::1", True),
        ("ANYBODY", "::ffff:127.0.0.1", True),
        ("WARD", "10.0.0.5", True),
        ("WARD ", "10.0.0.5", True),
        ("WARD", "::ffff:10.0.0.5", True),
        ("WARD", "fe80::1%eth0", True),
        ("WARD", "10.0.0.6", False),
        ("ward", "10.0.0.5", False),
        ("OTHER", "10.0.0.5", False),
        ("WARD", "", False),
    ],
)
def test_known_peers_are_known_by_title_and_address(ae_title: str, address: str, admitted: bool) -> None:
    policy = CallingPolicy((WARD,), lookup={"ward.example": frozenset(("10.0.0.5", "fe80::1"))}.__getitem__)
    assert policy.admits(ae_title, address) is admitted


def test_the_name_service_is_asked_again_after_a_while() -> None:
    asked: list[str] = []
    now = 0.0

    def lookup(host: str) -> frozenset[str]:
        asked.append(host)
        return frozenset(("10.0.0.5",))

    policy = CallingPolicy((WARD,), lookup=lookup, clock=lambda: now)
    assert policy.admits("WARD", "10.0.0.5")
    assert policy.admits("WARD", "10.0.0.5")
    assert asked == ["ward.example"]
    now = RESOLVED_S + 1
    assert policy.admits("WARD", "10.0.0.5")
    assert asked == ["ward.example"] * 2


def test_a_name_service_that_is_away_makes_no_peer_a_stranger() -> None:
    here, moved, gone = frozenset(("10.0.0.5",)), frozenset(("10.0.0.6",)), frozenset[str]()
    answers = [None, here, None, moved, here, gone]
    now = 0.0
    policy = CallingPolicy((WARD,), lookup=lambda _: answers.pop(0), clock=lambda: now)
    for admitted in (False, True, True, False, True, False):
        assert policy.admits("WARD", "10.0.0.5") is admitted
        now += RESOLVED_S + 1
    assert answers == []


def test_addresses_of_a_host() -> None:
    assert "127.0.0.1" in (addresses("127.0.0.1") or ())
    assert not addresses("no-such-host.invalid")  # nobody says so where there is no name service


@pytest.mark.parametrize(
    ("error", "found"), [(socket.EAI_NONAME, frozenset()), (socket.EAI_AGAIN, None), (socket.EAI_FAIL, None)]
)
def test_no_such_host_and_no_answer(monkeypatch: pytest.MonkeyPatch, error: int, found: object) -> None:
    def answer(*_: object, **__: object) -> None:
        raise socket.gaierror(error, "")

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    assert addresses("ward.example") == found


def test_plain_addresses() -> None:
    assert plain_address("not an address") == "not an address"
