"""Calls to a NameNode, each with a limited time: hdfs-native waits without end for one that accepts and says nothing.

A process has one `NameNode` for all its storages on it. The first call that gets no answer in time has it taken for
away: further calls fail at once, so that nobody waits for it a second time, and a thread asks until it answers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from hdfs_native import Client

from sphere.conf.errors import StorageAway, StorageError
from sphere.ingest.storage.deadline import LimitedCalls

NAMENODE_S = 5.0  # seconds that a NameNode has for an answer (1 to 50 ms as a rule)
PROBE_S = 16.0  # seconds after which it is asked by another connection: the old one may lead nowhere
PROBES = 8  # of that length; then they take twice as long, and so on
LONGEST_PROBE_S = 128.0
PAUSE_S = 0.5  # seconds between questions that are refused
# Connection attempts with 0.5 s doubling to 3 s between them: 15 s in all, where the client's default is 3 minutes.
CONFIG = {
    "dfs.client.failover.max.attempts": "6",
    "dfs.client.failover.sleep.base.millis": "500",
    "dfs.client.failover.sleep.max.millis": "3000",
}
Found = TypeVar("Found")
log = logging.getLogger(__name__)
_known: dict[tuple[int, str, str], NameNode] = {}


class NameNode:
    """What a process knows of a NameNode (or name service); safe to share between threads.

    `outages` counts how often it came back: what was connected before is to be connected anew.
    """

    def __init__(self, url: str) -> None:
        self.outages = 0
        self._url = url
        self._calls = LimitedCalls()
        self._lock = threading.Lock()
        self._away = False
        self._late: set[str] = set()

    def connect(self) -> Client:
        """A client of its own, which connects when it is first used."""
        return Client(self._url, CONFIG)

    def ask(self, call: Callable[..., Found], *arguments: Any, changes: str = "") -> Found:
        """What `call` gives, which asks the NameNode and nobody else.

        Raises what it raises, TimeoutError after NAMENODE_S, and StorageAway while it is away. `changes` is the path
        that the call changes: one that was given up may still do so, and until it has returned none other does.
        """
        if self._away:
            raise StorageAway(f"the NameNode {self._url} does not answer; it is asked on, and used when it does")
        if changes in self._late:
            raise StorageError(f"{changes}: an earlier change has not come to its end")
        try:
            return self.limited(NAMENODE_S, self._noting(changes, call) if changes else call, *arguments)
        except TimeoutError:
            self._lose()
            raise

    def limited(self, limit_s: float, call: Callable[..., Found], *arguments: Any) -> Found:
        """What `call` gives, which asks DataNodes; TimeoutError after `limit_s` seconds."""
        found: Found = self._calls(limit_s, call, *arguments)
        return found

    def _noting(self, path: str, call: Callable[..., Found]) -> Callable[..., Found]:
        def noted(*arguments: Any) -> Found:
            self._late.add(path)
            try:
                return call(*arguments)
            finally:
                self._late.discard(path)

        return noted

    def _lose(self) -> None:
        with self._lock:
            if self._away:
                return
            self._away = True
        log.error("the NameNode %s has not answered for %.0f s: it is taken for away", self._url, NAMENODE_S)
        threading.Thread(target=self._find, daemon=True, name="namenode").start()

    def _find(self) -> None:
        """Return when it answers."""
        client, hung = self.connect(), 0
        while True:
            try:
                self.limited(min(PROBE_S * 2 ** (hung // PROBES), LONGEST_PROBE_S), client.get_file_info, "/")
                break
            except TimeoutError:
                client, hung = self.connect(), hung + 1
            except BaseException as error:  # noqa: BLE001  refused, or a panic of the client's Rust code
                log.debug("the NameNode is asked again: %s", type(error).__name__)
                time.sleep(PAUSE_S)
        with self._lock:
            self.outages += 1
            self._away = False
        log.warning("the NameNode %s answers again", self._url)


def namenode(url: str, user: str) -> NameNode:
    """The one of this process (a client does not survive a fork); `user` becomes its HADOOP_USER_NAME, where the client
    reads it at each connection."""
    if user:
        os.environ["HADOOP_USER_NAME"] = user
    with suppress(KeyError):
        return _known[os.getpid(), url, user]
    return _known.setdefault((os.getpid(), url, user), NameNode(url))
