"""`sphere serve`: receivers and scheduled extraction as child processes, watched, stopped together.

A child that ends by itself, or that no longer sends its heartbeat, is started again and counted. Children notice the
death of this process by the end of a pipe, and stop as if told to, so that the port is never left behind by an orphan.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import current_process, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from sphere.children import (
    extract_regularly,
    forward_regularly,
    receive,
    serve_http,
    ship_regularly,
    verify_regularly,
)
from sphere.conf import logs, serving
from sphere.conf.errors import SettingsError, SphereError
from sphere.conf.private import is_open
from sphere.conf.settings import Settings

log = logging.getLogger(__name__)

SPAWN = get_context("spawn")  # never fork: HDFS clients and Spark own threads
DRAIN_S = 30.0  # seconds that children have to finish associations and seal bundles after SIGTERM
RESTART_PAUSE_S = 0.2, 5.0  # seconds before a restart: first, longest; doubled while a child ends before it is ready
DESCRIPTORS = 1 << 16  # of a child at most
HEARTBEAT_S = 1.0  # seconds between heartbeats of a child
PATIENCE_S = 6.0  # seconds without a heartbeat after which a receiver is killed: service resumes within 10 s
JOB_PATIENCE_S = 60.0  # the same for jobs, which may wait long for memory or disk
JOB_SETTLES_S = 10.0  # seconds that a job goes on before its start counts: it is ready before it has done anything
START_S = 60.0  # seconds until the first heartbeat of a child, on a busy machine
STATE_S = 1.0  # seconds between writes of the state file while nothing changes
TICK_S = 0.2  # seconds between looks at the clock
PAUSED_S = 2.0  # seconds between two looks from which on this process, and so maybe the whole host, stood still
Target = Callable[[Settings, serving.Tell], None]


@dataclass
class Child:
    """One supervised process."""

    name: str
    target: Target
    patience_s: float = PATIENCE_S
    settles_s: float = 0.0  # seconds that it goes on after it is ready before its start counts
    process: SpawnProcess | None = None
    lifeline: Connection | None = None  # closed by the death of the supervisor
    messages: Connection | None = None  # True: it is ready; False: a heartbeat; and what serving.Tell says
    state: Literal["starting", "ready", "waiting"] = "waiting"
    due: float = 0.0  # monotonic time of its next start, where it waits for that
    settled: float = 0.0  # monotonic time from which on its start counts
    deadline: float = 0.0  # monotonic time at which its next heartbeat must have come
    pause: float = RESTART_PAUSE_S[0]
    restarts: int = 0
    unanswered: int = 0
    last_heartbeat: str = ""
    last_end: str = ""
    refuses: bool = False

    def wait(self, pause_s: float) -> None:
        """Be started again in `pause_s` seconds, and in not more than the longest pause."""
        self.pause = min(pause_s, RESTART_PAUSE_S[1])
        self.state, self.due = "waiting", time.monotonic() + self.pause

    @property
    def ended_well(self) -> bool:
        """Whether it ended as SIGTERM has it: with status 0, or by the signal before its work had begun."""
        status = self.process.exitcode if self.process else 0
        return status == 0 or (status == -signal.SIGTERM and self.state == "starting")

    def told(self) -> serving.ChildState:
        """What the state file says of it."""
        pid = self.process.pid or 0 if self.process and self.state != "waiting" else 0
        return serving.ChildState(
            name=self.name, state=self.state, pid=pid, restarts=self.restarts, unanswered=self.unanswered,
            last_heartbeat=self.last_heartbeat, last_end=self.last_end, refuses=self.refuses,
        )  # fmt: skip


@dataclass
class Supervisor:
    """Runs one archive; `announce` gets the lines meant for the person who started it."""

    settings: Settings
    announce: Callable[[str], None] = print
    children: list[Child] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _announced: bool = False
    _spools: bool = False
    _told: list[serving.ChildState] = field(default_factory=list)
    _tell_again: float = 0.0
    _looked: float = field(default_factory=time.monotonic)

    def run(self) -> int:
        """Serve until SIGTERM, SIGINT or SIGHUP; returns the exit status, 0 when every child stopped cleanly.

        Raises SettingsError when a port is taken, another supervisor serves the archive, `archive.state_dir` cannot be
        written to, a rule asks for what cannot be matched, or TLS files cannot be used.
        """
        from sphere.scp.policy import Policy, check_forwards  # here, not above: this module is read by every child
        from sphere.scp.upper.tls import check_tls

        serving.check_writable(self.settings.archive.state_dir)
        check_forwards(self.settings)
        Policy(self.settings)  # a rule that cannot be matched ends this here, not one receiver after the other
        check_tls(self.settings)  # and so do files of TLS that cannot be used
        with serving.claimed(self.settings.archive.state_dir):
            return self._run()

    def _run(self) -> int:
        from sphere.ingest.spool import in_use  # here, not above: this module is read by every child

        self.settings = settings = with_ports(self.settings)
        for folder in open_folders(settings):
            log.warning(
                "every account of this host may look into %s, which holds patients: chmod o= %s", folder, folder
            )
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda *_: self._stop.set())
        self.children = [Child(f"receiver-{n + 1}", receive) for n in range(settings.dimse.workers)]
        if settings.web.enabled:
            self.children.append(Child("web", serve_http))
        if settings.extract.every_s and settings.catalog.mode == "delta":
            self.children.append(_job("extract", extract_regularly))
        if settings.forwards:
            self.children.append(_job("forwarder", forward_regularly))
        self._spools = in_use(settings)
        if self._spools:
            self.children.append(_job("shipper", ship_regularly))
        if settings.ingest.verify_sealed and settings.ingest.durability == "storage":
            self.children.append(_job("verifier", verify_regularly))
        for child in self.children:
            self._start(child)
        while not self._stop.is_set():
            self._watch()
            if not self._announced and all(child.state == "ready" for child in self.children):
                self._announced = True
                self.announce(banner(settings))
                if line := without_tokens(settings):
                    self.announce(line)
        return self._stop_all()

    def _watch(self) -> None:
        """Wait for a message, an end or the next tick, and do what follows from it."""
        running = [child for child in self.children if child.state != "waiting"]
        sources: list[Connection | int] = [child.messages for child in running if child.messages]
        sources += [child.process.sentinel for child in running if child.process]
        if sources:
            wait(sources, timeout=TICK_S)
        else:
            self._stop.wait(TICK_S)
        self._forgive()
        for child in self.children:
            if child.state == "waiting":
                if time.monotonic() >= child.due:
                    self._start(child)
                continue
            self._listen(child)
            self._check(child)
        self._tell()

    def _forgive(self) -> None:
        """Give children the time in which this process did not run: a container or machine that is paused stops them
        as well, and they need not be the first to go on."""
        before, self._looked = self._looked, time.monotonic()
        if self._looked - before > PAUSED_S:
            for child in self.children:
                child.deadline += self._looked - before

    def _start(self, child: Child) -> None:
        theirs, child.lifeline = SPAWN.Pipe(duplex=False)
        child.messages, send = SPAWN.Pipe(duplex=False)
        level = logging.getLogger("sphere").getEffectiveLevel()
        arguments = (child.target, self.settings, theirs, send, level)
        process = SPAWN.Process(target=_run_child, args=arguments, name=child.name)
        try:
            process.start()
        except OSError as error:  # no memory, or no room for another process: as short as that may be what ended it
            child.lifeline.close()
            child.messages.close()
            child.wait(2 * child.pause)
            log.error("child not started name=%s: %s pause_s=%.1f", child.name, error.strerror, child.pause)
            return
        finally:
            theirs.close()
            send.close()
        child.process = process
        child.refuses = False
        child.state, child.deadline = "starting", time.monotonic() + START_S
        log.info("child started name=%s pid=%s", child.name, process.pid)

    def _listen(self, child: Child) -> None:
        """Take what the child has said."""
        assert child.messages is not None
        try:
            while child.messages.poll():
                said = child.messages.recv()
                if said in (serving.REFUSES, serving.STORES):
                    child.refuses = said == serving.REFUSES
                elif said:
                    child.state, child.settled = "ready", time.monotonic() + child.settles_s
                child.deadline = time.monotonic() + child.patience_s
                child.last_heartbeat = serving.now()
        except (EOFError, OSError):
            return  # it has ended, or ends: _check sees to it

    def _check(self, child: Child) -> None:
        """Have a child that ended, or does not answer, started again."""
        process = child.process
        assert process is not None
        if process.is_alive():
            if time.monotonic() < child.deadline:
                return
            child.unanswered += 1
            log.error("child killed name=%s pid=%s: no heartbeat", child.name, process.pid)
            process.kill()
            process.join()
        started = child.state == "ready" and time.monotonic() >= child.settled
        for connection in (child.lifeline, child.messages):
            if connection is not None:
                connection.close()
        status = process.exitcode or 0
        child.last_end = f"signal {-status}" if status < 0 else f"status {status}"
        child.restarts += 1
        child.wait(RESTART_PAUSE_S[0] if started else 2 * child.pause)
        log.error(
            "child ended name=%s by %s restarts=%s pause_s=%.1f",
            child.name, child.last_end, child.restarts, child.pause,
        )  # fmt: skip

    def _tell(self, *, stopping: bool = False) -> None:
        """Write the state file when something changed, and from time to time."""
        told = [child.told() for child in self.children]
        if time.monotonic() < self._tell_again and _changes(told) == _changes(self._told) and not stopping:
            return
        self._told, self._tell_again = told, time.monotonic() + STATE_S
        state_dir, web = self.settings.archive.state_dir, self.settings.web
        try:
            spool = serving.read_spool(state_dir) if self._spools else None
            serving.write(
                state_dir, pid=os.getpid(), port=self.settings.dimse.port, web_port=web.port if web.enabled else 0,
                stopping=stopping, children=told, spool=spool,
            )  # fmt: skip
        except OSError as error:  # a full disk must not end the supervisor
            log.error("state file: %s", error.strerror)

    def _stop_all(self) -> int:
        """SIGTERM to all, then SIGKILL to those that do not end in time."""
        self._tell(stopping=True)
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
        serving.remove(self.settings.archive.state_dir)
        return 0 if all(child.ended_well for child in self.children if child.process in alive) else 1


def _job(name: str, target: Target) -> Child:
    return Child(name, target, JOB_PATIENCE_S, JOB_SETTLES_S)


def leave_at_sigterm() -> None:
    """End this process with status 0 at SIGTERM, until what it does has a better way: it has done nothing yet.

    At once: an exception may meet a finalizer, as those of imports, which goes on without it.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def _wake_at_the_end_of_parent() -> None:
    """Have the kernel continue this process, should it be stopped, when the supervisor dies: it is to notice that by
    its lifeline, let go of port and locks, and end (prctl(2), PR_SET_PDEATHSIG)."""
    with suppress(AttributeError, OSError):  # Linux only
        ctypes.CDLL(None).prctl(1, signal.SIGCONT, 0, 0, 0)


def _changes(children: list[serving.ChildState]) -> list[tuple[str, int, int, bool]]:
    return [(child.state, child.pid, child.restarts, child.refuses) for child in children]


def _run_child(target: Target, settings: Settings, lifeline: Connection, messages: Connection, level: int) -> None:
    """The body of every child process."""
    leave_at_sigterm()
    _wake_at_the_end_of_parent()
    done = threading.Event()
    atexit.register(_leave, done)  # the first: called last
    logs.configure("info")
    logging.getLogger("sphere").setLevel(level)
    logs.keep(settings.archive.state_dir / "log" / f"{current_process().name}.log")
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C and a closed terminal reach the whole group
        signal.signal(number, signal.SIG_IGN)  # the supervisor decides
    raise_descriptors()
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True, name="lifeline").start()
    sending = threading.Lock()

    def say(what: bool | str) -> None:
        with sending:
            messages.send(what)

    threading.Thread(target=_beat, args=(say,), daemon=True, name="heartbeat").start()
    try:
        target(settings, serving.Tell(say))
    except SphereError as error:
        log.error("%s", error)
        raise SystemExit(1) from None
    done.set()


def raise_descriptors() -> None:
    """Let this process have as many descriptors as the system lets it, up to DESCRIPTORS: each connection takes one or
    two, and the usual soft limit of 1,024 is there for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft not in (resource.RLIM_INFINITY, most) and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _leave(done: threading.Event) -> None:
    """End the process, if its work is `done`, before the interpreter is taken down around threads that go on.

    A thread that a storage client keeps waiting in native code may come back just then; Python before 3.14 ends it by
    unwinding its stack, which native code answers by aborting the process (cpython issue 87135).
    """
    if done.is_set():
        logging.shutdown()
        os._exit(0)


def _beat(say: Callable[[bool], None]) -> None:
    """Send heartbeats for as long as somebody hears them."""
    try:
        while True:
            say(False)
            time.sleep(HEARTBEAT_S)
    except OSError:  # the supervisor is gone; the lifeline ends this process
        return


def _end_with(lifeline: Connection) -> None:
    """Stop this process when the other end of the pipe is gone."""
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


def with_ports(settings: Settings) -> Settings:
    """The settings with free ports in place of 0; raises SettingsError when a wanted port is taken."""
    dimse, web = settings.dimse, settings.web
    if web.enabled and web.port and web.port in (dimse.port, dimse.tls_port) and _overlap(web.host, dimse.host):
        raise SettingsError(f"web.port: {web.port} is a port of dimse on {dimse.host} too; choose another port")
    update: dict[str, object] = {
        "dimse": dimse.model_copy(update={"port": _port("dimse.port", dimse.host, dimse.port)})
    }
    if dimse.tls_port not in (0, dimse.port):
        _port("dimse.tls_port", dimse.host, dimse.tls_port)
    if web.enabled:
        update["web"] = web.model_copy(update={"port": _port("web.port", web.host, web.port)})
    return settings.model_copy(update=update)


def _overlap(host: str, other: str) -> bool:
    """Whether who listens on one address takes the ports of the other as well: it is the same, or all of them."""
    return host == other or bool({host, other} & {"0.0.0.0", "::"})


def _port(key: str, host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            where = f"{host}:{port}"
            raise SettingsError(f"{key}: cannot listen on {where}: {error.strerror}; choose another port") from None
        return int(probe.getsockname()[1])


def banner(settings: Settings) -> str:
    """What a person wants to know first."""
    every = (
        f"extraction every {settings.extract.every_s:g} s" if settings.extract.every_s else "no scheduled extraction"
    )
    if settings.catalog.mode == "files":
        every = "no catalog: every query reads headers"
    address = f"{settings.dimse.host}:{settings.dimse.port}"
    if settings.dimse.tls_port:
        same = settings.dimse.tls_port == settings.dimse.port
        address += " with TLS" if same else f", with TLS on {settings.dimse.tls_port}"
    return (
        f"{settings.archive.ae_title} serves DICOM on {address} ({settings.dimse.workers} receivers, {every}); "
        f"{_pages(settings)}storage {settings.storage.root}; Ctrl-C stops."
    )


def _pages(settings: Settings) -> str:
    """Where a browser and a DICOMweb client find it; nothing without a web server."""
    if not settings.web.enabled:
        return ""
    host = f"[{settings.web.host}]" if ":" in settings.web.host else settings.web.host
    page = f"{'https' if settings.web.tls_certificate else 'http'}://{host}:{settings.web.port}/"
    return f"its page on {page}, DICOMweb on {page}dicom-web; "


def without_tokens(settings: Settings) -> str:
    """Who needs no token; nothing where everybody does."""
    if not settings.web.enabled or settings.web.auth == "all":
        return ""
    return (
        "Who uses this host may do everything over HTTP without a token; behind a reverse proxy, or where others have "
        'accounts here, set web.auth = "all".'
    )


def open_folders(settings: Settings) -> list[Path]:
    """Folders of the archive that other accounts of this host may look into: made by hand, or long ago."""
    urls = (settings.storage.root, settings.catalog_root)
    local = [Path(unquote(urlsplit(url).path)) for url in urls if url.startswith("file:")]
    found = dict.fromkeys((settings.archive.state_dir, settings.ingest.spool_dir, *local))
    return [one for one in found if is_open(one)]
