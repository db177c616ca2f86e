"""A NameNode that hangs is waited for once, asked on in the background, and used when it answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sphere.conf.errors import StorageAway, StorageError
from sphere.ingest.storage import namenode as module
from sphere.ingest.storage.deadline import LimitedCalls
from sphere.ingest.storage.namenode import NameNode, namenode

pytestmark = pytest.mark.unit


class Server:
    """What a NameNode of a test does: `hang` until `goes_on`; how many clients asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.clients = 0
        self.errors: list[Exception] = []
        monkeypatch.setattr(NameNode, "connect", self.connect)

    def connect(self) -> Any:
        self.clients += 1
        return SimpleNamespace(get_file_info=self.answer)

    def answer(self, path: str = "") -> str:
        if self.errors:
            raise self.errors.pop()
        self.goes_on.wait(60)
        return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(module, "NAMENODE_S", 0.05)
    return Server(monkeypatch)


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_waited_for_once(server: Server) -> None:
    asked = NameNode("hdfs://namenode")
    server.goes_on.clear()
    with pytest.raises(TimeoutError, match="no answer"):
        asked.ask(server.answer)
    calls: list[str] = []
    for _ in range(20):
        with pytest.raises(StorageAway, match="hdfs://namenode does not answer"):
            asked.ask(calls.append, "asked")
    assert calls == []
    server.goes_on.set()
    wait(lambda: asked.outages == 1)
    assert asked.ask(server.answer, "/a") == "/a"
    assert server.clients == 1


def test_another_connection_is_tried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_S", 0.05)
    server.goes_on.clear()
    asked = NameNode("hdfs://namenode")
    with pytest.raises(TimeoutError, match="no answer"):
        asked.ask(server.answer)
    wait(lambda: server.clients >= 3)
    assert asked.outages == 0
    server.goes_on.set()
    wait(lambda: asked.outages == 1)


def test_a_refusal_is_no_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    asked = NameNode("hdfs://namenode")
    hung = threading.Event()
    server.errors = [ConnectionRefusedError(), ConnectionRefusedError()]
    with pytest.raises(TimeoutError, match="no answer"):
        asked.ask(hung.wait)
    wait(lambda: asked.outages == 1)
    assert (server.errors, server.clients) == ([], 1)
    hung.set()


def test_a_change_that_was_given_up_is_not_overtaken(server: Server) -> None:
    asked = NameNode("hdfs://namenode")
    hung = threading.Event()
    with pytest.raises(TimeoutError, match="no answer"):
        asked.ask(hung.wait, changes="/a")
    wait(lambda: asked.outages == 1)  # to others it answers
    with pytest.raises(StorageError, match="/a: an earlier change has not come to its end"):
        asked.ask(server.answer, changes="/a")
    assert asked.ask(server.answer, "/b", changes="/b") == "/b"
    hung.set()
    wait(lambda: "/a" not in asked._late)
    assert asked.ask(server.answer, "/a", changes="/a") == "/a"


def test_errors_of_the_client_come_through(server: Server) -> None:
    server.errors = [FileNotFoundError("/a")]
    asked = NameNode("hdfs://namenode")
    with pytest.raises(FileNotFoundError, match="/a"):
        asked.ask(server.answer)
    assert asked.outages == 0


def test_a_process_has_one() -> None:
    assert namenode("hdfs://one-of-a-test", "") is namenode("hdfs://one-of-a-test", "")
    assert namenode("hdfs://one-of-a-test", "") is not namenode("hdfs://another-of-a-test", "")


def test_threads_are_kept_for_later_calls() -> None:
    calls = LimitedCalls()
    assert len({calls(60, threading.get_ident) for _ in range(20)}) == 1
    hung = threading.Event()
    with pytest.raises(TimeoutError, match="no answer"):
        calls(0.01, hung.wait)
    assert calls(60, len, b"12") == 2
    hung.set()
