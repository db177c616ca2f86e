"""What the children of `sphere serve` do: receive, serve HTTP, extract, forward, ship, read back.

Every child reads this module: what its work needs is imported when it begins.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sphere.conf import serving
from sphere.conf.errors import SphereError
from sphere.conf.footprint import keep_small
from sphere.conf.settings import Settings

if TYPE_CHECKING:
    from sphere.archive import Archive

log = logging.getLogger(__name__)


def receive(settings: Settings, ready: serving.Tell) -> None:
    """One receiver process."""
    keep_small(settings)
    from sphere.scp.server import run_receiver

    run_receiver(settings, ready=ready, refuses=ready.refuses)


def serve_http(settings: Settings, ready: Callable[[int], None]) -> None:
    """The HTTP process."""
    from sphere.scp.web.server import run_web

    run_web(settings, ready=ready)


class _Stopping(BaseException):
    """SIGTERM came during an extraction; no Exception, so that no step takes it for its own failure."""


def extract_regularly(settings: Settings, ready: Callable[[int], None]) -> None:
    """Extract every `extract.every_s` seconds while something waits; Spark starts with the first need.

    SIGTERM ends a running extraction where it is, its Spark jobs with it: it may be killed at any step. While Spark
    starts it waits for the first step, since a JVM that nobody is connected to would be left behind.
    """
    from sphere.archive import Archive

    stop, at_work = threading.Event(), threading.Event()
    archive = Archive(settings)

    def told(*_: object) -> None:
        stop.set()
        if at_work.is_set():
            at_work.clear()  # raised once: what follows puts in order
            raise _Stopping

    signal.signal(signal.SIGTERM, told)
    ready(0)
    try:
        while not stop.wait(settings.extract.every_s):
            try:
                if archive.waiting() or archive.annotated() or archive.buried():
                    _extract(archive, settings.archive.state_dir, stop, at_work)
                else:
                    archive.load_audit()
            except SphereError as error:
                log.error("extraction: %s", error)
            finally:
                at_work.clear()
    except _Stopping:
        log.info("extraction stopped before its end: what it had not committed waits for the next one")
    with ThreadPoolExecutor(1) as beside:  # with its own connection to the JVM: this one's may have an answer under way
        beside.submit(archive.close).result()


def _extract(archive: Archive, state_dir: Path, stop: threading.Event, at_work: threading.Event) -> None:
    """One extraction, its steps told to who watches, `at_work` set from the first on; raises SphereError, and
    _Stopping where a step begins after `stop`."""
    state = serving.JobState(serving.now())

    def tell(step: str, done: int = 0, total: int = 0) -> None:
        if threading.current_thread() is threading.main_thread():  # and not who tells of Spark's progress meanwhile
            at_work.set()
            if stop.is_set():  # it came before the first step, or what the signal raised got lost in a finalizer
                at_work.clear()
                raise _Stopping
        serving.write_job(state_dir, replace(state, step=step, done=done, total=total))

    outcome, failed = "ended by a defect", True
    try:
        outcome, failed = str(archive.extract(on_step=tell)), False
        log.info("extracted %s", outcome)
    except SphereError as error:
        outcome = str(error)
        raise
    except _Stopping:
        outcome, failed = "stopped before its end", False
        raise
    finally:
        serving.write_job(state_dir, replace(state, ended_at=serving.now(), outcome=outcome, failed=failed))


def forward_regularly(settings: Settings, ready: Callable[[int], None]) -> None:
    """Send on to peers what `[[forwards]]` name."""
    from sphere.jobs.forward import run_forwarder

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ready(0)
    run_forwarder(settings, stop)


def ship_regularly(settings: Settings, ready: Callable[[int], None]) -> None:
    """Ship what the spool holds, again and again."""
    from sphere.ingest.shipping import run_shipper

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ready(0)
    run_shipper(settings, stop)


def verify_regularly(settings: Settings, ready: Callable[[int], None]) -> None:
    """Read sealed bundles back, each once."""
    from sphere.ingest.verifying import run_verifier

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ready(0)
    run_verifier(settings, stop)
