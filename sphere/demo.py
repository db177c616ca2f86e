"""`make demo`: the pipeline at work on a new archive, with the commands that a person would type.

Samples are pydicom's packaged real files and a generated CT series. Every step is the `sphere` command line itself,
shown, timed, and stopped at the first failure.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

SPHERE = [sys.executable, "-m", "sphere.cli"]
CT_SLICES = 120


def main() -> int:
    """Run the demonstration; returns its exit status."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--exit", action="store_true", help="stop the archive at the end instead of leaving it serving")
    parser.add_argument("--port", type=int, default=0, help="DIMSE port (0: a free one)")
    options = parser.parse_args()
    folder = Path(".demo") / datetime.now().strftime("%Y%m%d-%H%M%S")
    samples = folder / "samples"
    config = folder / "archive" / "sphere.toml"
    with timed("make samples: pydicom's packaged files and a generated CT series"):
        print(f"  {write_samples(samples)} files in {samples}")
    port = options.port or free_port()
    web_port = free_port()
    run("init", str(config.parent), "--port", str(port), "--web-port", str(web_port))
    disable_schedule(config)
    with serving(config) as server:
        tell_story(config, samples, f"SPHERE@127.0.0.1:{port}")
        if options.exit:
            return 0
        print(f"\nThe archive goes on serving: C-STORE and C-FIND to SPHERE@127.0.0.1:{port}; Ctrl-C stops it.")
        print(f"  its page: http://127.0.0.1:{web_port}/{viewer_note(config, web_port)}")
        print(f"  try: {shown(['--config', str(config), 'sql', 'SELECT * FROM studies LIMIT 3'])}")
        return wait(server)


def tell_story(config: Path, samples: Path, peer: str) -> None:
    """Send, extract, find, count: each a command."""
    at = ["--config", str(config)]
    run(*at, "echo", peer)
    run(*at, "store", peer, str(samples))
    run(*at, "extract")
    run(*at, "find", peer, "--level", "STUDY", "-k", "PatientName", "-k", "StudyDate", "-k", "ModalitiesInStudy",
        "-k", "NumberOfStudyRelatedInstances")  # fmt: skip
    run(*at, "sql", "SELECT Modality, count(*) AS instances, count(DISTINCT StudyInstanceUID) AS studies, "
        "round(sum(length) / 1e6, 1) AS MB FROM instances GROUP BY Modality ORDER BY instances DESC")  # fmt: skip
    run(*at, "status")


def write_samples(folder: Path) -> int:
    """Write the sample files, of pydicom's those that belong to a study; returns how many."""
    import pydicom.data

    from sphere.ingest.header import identify
    from sphere.jobs.synthetic import ct_series

    samples = {f"ct/{number:04}.dcm": data for number, data in enumerate(ct_series(CT_SLICES), start=1)}
    packaged = Path(pydicom.data.__file__).parent / "test_files"  # what came with it: nothing is downloaded
    for file in sorted(packaged.glob("*.dcm")):
        data = file.read_bytes()
        found = identify(data, size=len(data))
        if found.SOPInstanceUID and found.StudyInstanceUID and found.SeriesInstanceUID and found.TransferSyntaxUID:
            samples[f"pydicom/{file.name}"] = data
    for name, data in samples.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return len(samples)


def run(*arguments: str) -> None:
    """Run one sphere command, shown and timed; SystemExit with its status when it fails."""
    with timed(shown(list(arguments))):
        status = subprocess.run([*SPHERE, *arguments], check=False).returncode
    if status:
        raise SystemExit(status)


def shown(arguments: list[str]) -> str:
    """A command as a person would type it from here."""
    return shlex.join([".venv/bin/sphere", *arguments])


@contextmanager
def timed(title: str) -> Iterator[None]:
    """Print a step and, after it, how long it took."""
    print(f"\n$ {title}" if title.startswith(".venv") else f"\n# {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"  [{time.monotonic() - start:.1f} s]", flush=True)


@contextmanager
def serving(config: Path) -> Iterator[subprocess.Popen[str]]:
    """`sphere serve` in the background; stopped at the end."""
    command = ["--config", str(config), "--log-level", "warning", "serve"]
    with timed(shown(command)):
        server = subprocess.Popen([*SPHERE, *command], stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise SystemExit(f"the archive did not start: status {server.wait()}")
        print(f"  {line.strip()}")
    try:
        yield server
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            server.wait()
            print("archive stopped")


def wait(server: subprocess.Popen[str]) -> int:
    """Until Ctrl-C, or until the archive ends by itself."""
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0


def disable_schedule(config: Path) -> None:
    """Extraction only when asked, so that the demonstration can show it."""
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("# every_s = 60.0", "every_s = 0"), encoding="utf-8")


def viewer_note(config: Path, web_port: int) -> str:
    """Where the viewer is, if it is installed."""
    from sphere.conf.loading import load
    from sphere.conf.viewer import PREFIX
    from sphere.scp.web.viewer import installed

    return f", the viewer: http://127.0.0.1:{web_port}{PREFIX}" if installed(load(config).web) else ""


def free_port() -> int:
    """A port that nothing listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start() -> NoReturn:
    """The demonstration as a program: whatever ends it, a terminal that is closed too, leaves no archive serving."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        _leave(signal.SIGINT, None)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    print("demo: interrupted", file=sys.stderr)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    start()
