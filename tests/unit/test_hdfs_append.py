"""A file of HDFS opened to append, by a client that stands for NameNode and DataNodes."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from sphere.conf.errors import StorageError
from sphere.ingest.storage import hdfs
from sphere.ingest.storage.hdfs import HdfsStorage

pytestmark = pytest.mark.unit


class Client:
    """Refuses the first `refusals` syncs of what is appended to; gives a lease back at once, or never."""

    def __init__(self, refusals: int, error: type[Exception] = OSError, *, lets_go: bool = True) -> None:
        self.refusals, self.error, self.lets_go = refusals, error, lets_go
        self.calls: list[str] = []

    def append(self, path: str) -> Any:
        self.calls.append("append")
        return SimpleNamespace(hsync=self.hsync, close=lambda: self.calls.append("close"))

    def hsync(self) -> None:
        self.calls.append("hsync")
        if self.refusals:
            self.refusals -= 1
            raise self.error("Datanode connection closed while waiting for ack")

    def get_file_info(self, path: str) -> Any:
        return SimpleNamespace(length=7)

    def recover_lease(self, path: str) -> bool:
        self.calls.append("recover_lease")
        return self.lets_go


def storage(client: Client) -> HdfsStorage:
    found = HdfsStorage("hdfs://namenode:8020/sphere")
    found._connected = (os.getpid(), 0, client)  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("refusals", range(hdfs.APPENDS))
def test_a_datanode_that_is_not_ready_is_asked_again(refusals: int) -> None:
    client = Client(refusals)
    assert storage(client).append("a.journal").tell() == 7
    assert client.calls == ["append", "hsync", "close", "recover_lease"] * refusals + ["append", "hsync"]


@pytest.mark.parametrize(
    ("client", "attempts"),
    [(Client(99), hdfs.APPENDS), (Client(99, TimeoutError), 1), (Client(99, lets_go=False), 1)],
    ids=["never ready", "no answer", "the lease stays"],
)
def test_what_is_not_tried_again(client: Client, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdfs, "RELEASE_S", 0.0)
    with pytest.raises(StorageError, match="to append: Datanode connection closed"):
        storage(client).append("a.journal")
    assert client.calls.count("append") == client.calls.count("close") == attempts
