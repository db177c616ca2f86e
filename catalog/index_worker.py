"""What the process behind sphere.catalog.index_maker does: it listens, and watches.

It makes refreshes, each of which is about what changed. What has to be made from nothing takes up to 1 GB, and has a
process of its own. It ends when nobody is connected to it any more, in the middle of its work if need be: what it
leaves, the next one removes.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import duckdb
import orjson

from sphere.catalog.asof import AsOf, parse_as_of
from sphere.catalog.index_build import RebuildNeeded
from sphere.catalog.index_folder import IndexFolder
from sphere.catalog.index_note import note_of
from sphere.catalog.index_process import IndexProcess
from sphere.catalog.tables import CatalogTables
from sphere.conf.errors import SphereError
from sphere.conf.footprint import give_back
from sphere.conf.settings import Settings

log = logging.getLogger(__name__)

WATCH_S: Final = 0.05
"""Seconds between looks for a new version on a local disk: one `stat`."""
WATCH_ELSEWHERE_S: Final = 1.0
"""The same where a look is a question to a server; who asks meanwhile looks as well."""
AWAY_S: Final = 5.0
"""Seconds after which what could not be made is tried again without being asked for."""


class Worker:
    """Makes what is asked for, and before anybody asks, what will be."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings, self._listener = settings, listener
        self._tables = CatalogTables(settings)
        self._folder = IndexFolder(settings, keep=True)
        self._newest = threading.Lock()
        self._counting = threading.Lock()
        self._connections = 0
        self._version = -1  # of `bundles`, in the index that is the newest

    def serve(self) -> None:
        """Answer whoever connects; ends the process when nobody is connected any more."""
        threading.Thread(target=self._watch, daemon=True, name="watch").start()
        while True:
            connection, _ = self._listener.accept()
            with self._counting:
                self._connections += 1
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        """A line of JSON for each line of JSON."""
        try:
            with connection, connection.makefile("rb") as lines:
                for line in lines:
                    connection.sendall(orjson.dumps(self._told(orjson.loads(line)["as_of"])) + b"\n")
        except OSError:  # who asked is gone
            pass
        finally:
            with self._counting:
                self._connections -= 1
                if not self._connections and not select.select([self._listener], [], [], 0)[0]:
                    os._exit(0)  # whatever is being made

    def _told(self, as_of: str) -> dict[str, str]:
        try:
            return {"path": str(self._made(parse_as_of(as_of)) if as_of else self.newest())}
        except SphereError as error:
            return {"error": str(error)}

    def newest(self) -> Path:
        """The index of the newest version. Raises CatalogError."""
        with self._newest:
            path = self._folder.newest() or self._made(None)
            try:
                self._version = note_of(path).versions["bundles"]
            except (OSError, duckdb.Error):  # damaged, or a newer one was made: who opens it finds out
                pass
        return path

    def _made(self, as_of: AsOf | None) -> Path:
        try:
            return self._folder.make(as_of, small=True)
        except RebuildNeeded:
            made = IndexProcess(self._settings, None).make(as_of)
            if as_of is None:
                threading.Thread(target=self._rehearse, daemon=True, name="rehearsal").start()
            return made
        finally:
            give_back()

    def _rehearse(self) -> None:
        """Load what the first refresh of a base needs."""
        with suppress(SphereError):  # what cannot be read is told of when an index is made
            self._folder.rehearse()
        give_back()

    def _watch(self) -> None:
        every = WATCH_S if self._tables.is_local else WATCH_ELSEWHERE_S
        self._rehearse()
        while True:
            try:
                if self._version < 0 or self._tables.has_moved("bundles", self._version):
                    self.newest()
                time.sleep(every)
            except SphereError as error:
                log.warning("no index is made for now: %s", error)
                time.sleep(AWAY_S)
