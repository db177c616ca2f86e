"""`sphere serve`: receivers and scheduled extraction as child processes, watched, stopped together.

A child that ends by itself is started again (after a growing pause when it keeps ending). Children notice the death of
this process by the end of a pipe, and stop as if told to, so that the port is never left behind by an orphan.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from sphere.conf import logs
from sphere.conf.errors import SettingsError, SphereError
from sphere.conf.settings import Settings

log = logging.getLogger(__name__)

SPAWN = get_context("spawn")  # never fork: HDFS clients and Spark own threads
DRAIN_S = 30.0  # seconds that children have to finish associations and seal bundles after SIGTERM
RESTART_PAUSE_S = (
    0.5,
    30.0,
)  # seconds before a restart: first, longest; doubled each time a child ends within a minute
Target = Callable[[Settings, Callable[[int], None]], None]


@dataclass
class Child:
    """One supervised process."""

    name: str
    target: Target
    process: SpawnProcess | None = None
    lifeline: Connection | None = None  # closed by the death of the supervisor
    started: float = 0.0
    pause: float = RESTART_PAUSE_S[0]
    restarts: int = 0
    ready: Connection | None = None


@dataclass
class Supervisor:
    """Runs one archive; `announce` gets the lines meant for the person who started it."""

    settings: Settings
    announce: Callable[[str], None] = print
    children: list[Child] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status, 0 when every child stopped cleanly.

        Raises SettingsError when the DIMSE port is taken.
        """
        settings = with_port(self.settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        self.children = [Child(f"receiver-{n + 1}", receive) for n in range(settings.dimse.workers)]
        if settings.extract.every_s:
            self.children.append(Child("extract", extract_regularly))
        for child in self.children:
            self._start(child, settings)
        if self._wait_ready():
            self.announce(banner(settings))
        while not self._stop.wait(0.2):
            self._restart_ended(settings)
        return self._stop_all()

    def _start(self, child: Child, settings: Settings) -> None:
        theirs, child.lifeline = SPAWN.Pipe(duplex=False)
        child.ready, send_ready = SPAWN.Pipe(duplex=False)
        level = logging.getLogger("sphere").getEffectiveLevel()
        arguments = (child.target, settings, theirs, send_ready, level)
        child.process = SPAWN.Process(target=_run_child, args=arguments, name=child.name)
        child.process.start()
        theirs.close()
        send_ready.close()
        child.started = time.monotonic()
        log.info("child started name=%s pid=%s", child.name, child.process.pid)

    def _wait_ready(self) -> bool:
        """Wait until every child has said that it is ready; False when told to stop or one ended before."""
        waiting = [child.ready for child in self.children if child.ready]
        while waiting and not self._stop.is_set():
            for connection in wait(waiting, timeout=0.2):
                assert isinstance(connection, Connection)
                waiting.remove(connection)
                try:
                    connection.recv()
                except EOFError:
                    return False  # it ended; _restart_ended sees to it
        return not self._stop.is_set()

    def _restart_ended(self, settings: Settings) -> None:
        for child in self.children:
            if child.process is None or child.process.is_alive():
                continue
            lived = time.monotonic() - child.started
            child.pause = RESTART_PAUSE_S[0] if lived > 60 else min(2 * child.pause, RESTART_PAUSE_S[1])
            child.restarts += 1
            log.error(
                "child ended name=%s status=%s restarts=%s pause_s=%.1f",
                child.name, child.process.exitcode, child.restarts, child.pause,
            )  # fmt: skip
            if self._stop.wait(child.pause):
                return
            self._start(child, settings)

    def _stop_all(self) -> int:
        """SIGTERM to all, then SIGKILL to those that do not end in time."""
        alive = [child.process for child in self.children if child.process and child.process.is_alive()]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + DRAIN_S
        for process in alive:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                log.error("child killed name=%s: it did not stop within %s s", process.name, DRAIN_S)
                process.kill()
                process.join()
        return 0 if all(process.exitcode == 0 for process in alive) else 1


def _run_child(target: Target, settings: Settings, lifeline: Connection, ready: Connection, level: int) -> None:
    """The body of every child process."""
    logs.configure("info")
    logging.getLogger("sphere").setLevel(level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True, name="lifeline").start()
    try:
        target(settings, ready.send)
    except SphereError as error:
        log.error("%s", error)
        raise SystemExit(1) from None


def _end_with(lifeline: Connection) -> None:
    """Stop this process when the other end of the pipe is gone."""
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


def receive(settings: Settings, ready: Callable[[int], None]) -> None:
    """One receiver process."""
    from sphere.scp.server import run_receiver

    run_receiver(settings, ready=ready)


def extract_regularly(settings: Settings, ready: Callable[[int], None]) -> None:
    """Extract every `extract.every_s` seconds while something waits; Spark starts with the first need."""
    from sphere.archive import Archive

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    archive = Archive(settings)
    ready(0)
    while not stop.wait(settings.extract.every_s):
        try:
            if archive.waiting():
                log.info("extracted %s", archive.extract())
        except SphereError as error:
            log.error("extraction: %s", error)
    archive.close()


def with_port(settings: Settings) -> Settings:
    """The settings with a free port in place of 0; raises SettingsError when the wanted port is taken."""
    with socket.socket(socket.AF_INET6 if ":" in settings.dimse.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.dimse.host, settings.dimse.port))
        except OSError as error:
            where = f"{settings.dimse.host}:{settings.dimse.port}"
            raise SettingsError(
                f"dimse.port: cannot listen on {where}: {error.strerror}; choose another port"
            ) from None
        port = int(probe.getsockname()[1])
    return settings.model_copy(update={"dimse": settings.dimse.model_copy(update={"port": port})})


def banner(settings: Settings) -> str:
    """What a person wants to know first."""
    every = (
        f"extraction every {settings.extract.every_s:g} s" if settings.extract.every_s else "no scheduled extraction"
    )
    address = f"{settings.dimse.host}:{settings.dimse.port}"
    return (
        f"{settings.archive.ae_title} serves DICOM on {address} ({settings.dimse.workers} receivers, {every}); "
        f"storage {settings.storage.root}; Ctrl-C stops."
    )
