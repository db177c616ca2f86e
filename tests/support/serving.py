"""`sphere serve` as a process of its own, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from sphere.conf import serving
from sphere.conf.loading import from_dict
from sphere.conf.serving import ChildState, ServeState
from sphere.conf.settings import Settings
from tests.support.ports import free_port
from tests.support.receiver import ROOT, STOP_S

START_S = 60.0  # seconds for a first start
FOREVER = 'while :; do "$@"; sleep 0.5; done'  # as a unit of systemd with Restart=always and RestartSec=0.5


@dataclass
class Serving:
    """A running supervisor."""

    process: subprocess.Popen[str]
    settings: Settings
    log_path: Path
    forever: bool = False  # `process` starts it again and again

    @property
    def port(self) -> int:
        return self.settings.dimse.port

    def state(self) -> ServeState:
        """What it says of itself."""
        state = serving.read(self.settings.archive.state_dir)
        assert state is not None, self.log_path.read_text()
        return state

    def wait(self, until: Callable[[ServeState], bool], *, within_s: float = START_S) -> ServeState:
        """Its state once `until` holds; fails after `within_s` seconds."""
        deadline = time.monotonic() + within_s
        while True:
            state = serving.read(self.settings.archive.state_dir)
            if state is not None and self.forever | (state.pid == self.process.pid) and until(state):
                return state
            assert time.monotonic() < deadline, (state, self.log_path.read_text()[-3000:])
            assert self.process.poll() is None, self.log_path.read_text()[-3000:]
            time.sleep(0.02)

    def stop(self) -> int:
        """SIGTERM, and the exit status; of one that is started again and again the end of that, and -9."""
        if self.forever:
            self.process.kill()
            last = psutil.Process(self.state().pid)
            last.terminate()
            last.wait(STOP_S)
            return self.process.wait()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)


def ready(state: ServeState) -> bool:
    """Whether every part serves."""
    return not state.not_ready


def send_signal(child: ChildState, number: signal.Signals) -> None:
    """To one child, by its process id."""
    os.kill(child.pid, number)


@contextmanager
def running_supervisor(
    base: Path,
    *,
    root: str = "file:storage",
    workers: int = 2,
    port: int = 0,
    web: bool = False,
    extract_every_s: float = 0,
    ingest: Mapping[str, Any] | None = None,
    peers: Sequence[Mapping[str, Any]] = (),
    forwards: Sequence[Mapping[str, Any]] = (),
    forwarding: Mapping[str, Any] | None = None,
    forever: bool = False,
    module: str = "sphere.cli",
) -> Iterator[Serving]:
    """`sphere serve` on an archive in `base`, every part ready; killed at the end where the test has not stopped it.

    With `forever` it is started again by itself, whatever ends it; `module` is its body.
    """
    base.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    ingest = {"verify_sealed": False, **(ingest or {})}  # children are counted, and its share of a small machine
    config = base / "sphere.toml"
    text = f'[dimse]\nport = {port}\nworkers = {workers}\n[storage]\nroot = "{root}"\n'
    text += f"[extract]\nevery_s = {extract_every_s}\n"
    text += f"[ingest]\n{_lines(ingest)}[forwarding]\n{_lines(forwarding or {})}"
    text += "".join(f"[[peers]]\n{_lines(peer)}" for peer in peers)
    text += "".join(f"[[forwards]]\n{_lines(forward)}" for forward in forwards)
    text += f"[web]\nenabled = {str(web).lower()}\nport = 0\n"
    config.write_text(text)
    tables = {
        "dimse": {"port": port, "workers": workers},
        "storage": {"root": root},
        "extract": {"every_s": extract_every_s},
        "ingest": ingest,
        "peers": list(peers),
        "forwards": list(forwards),
        "forwarding": dict(forwarding or {}),
    }
    with (base / "serve.log").open("a") as log:
        command = [sys.executable, "-m", module, "--config", str(config), "serve"]
        command = ["sh", "-c", FOREVER, "sh", *command] if forever else command
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True, start_new_session=forever)
    running = Serving(process, from_dict(tables, base=base), base / "serve.log", forever)
    try:
        running.wait(ready)
        yield running
    finally:
        if forever:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        process.wait()


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
