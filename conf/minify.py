"""esbuild, which makes scripts smaller: its program for this machine, as it is pinned, from npm; used at set-up."""

from __future__ import annotations

import platform
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sphere.conf import npm
from sphere.conf.errors import ExternalMissing

RUN_S: Final = 300  # seconds that it may take
_PROGRAM: Final = "package/bin/esbuild"
_MACHINES: Final = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}


def pin(pins: Mapping[str, Any]) -> npm.Pin:
    """The package for this machine, of table `minifier` in viewer.toml; raises ExternalMissing where there is none."""
    system, machine = platform.system().lower(), platform.machine().lower()
    name = f"{system}-{_MACHINES.get(machine, machine)}"
    if name not in pins["integrity"]:
        raise ExternalMissing(f"no esbuild is pinned for {name}")
    return npm.Pin(f"@esbuild/{name}", pins["version"], pins["integrity"][name])


def fetch(wanted: npm.Pin, folder: Path) -> Path:
    """Its program, in an empty folder; raises ExternalMissing."""
    package = npm.fetch(wanted, folder)
    with tarfile.open(package) as archive:
        try:
            data = archive.extractfile(_PROGRAM)
        except KeyError:
            data = None
        if data is None:
            raise ExternalMissing(f"{package.name} holds no {_PROGRAM}")
        program = folder / "esbuild"
        program.write_bytes(data.read())
    program.chmod(0o755)
    return program


def minify(program: Path, scripts: Sequence[Path], folder: Path) -> None:
    """Write each of the scripts, smaller, to `folder`, and notices of their licences beside them (.LEGAL.txt).

    What comes out is ASCII: a script with one other character takes V8 twice the memory. Raises ExternalMissing.
    """
    command: list[str | Path] = [
        program,
        "--minify",
        "--legal-comments=external",
        "--log-level=error",
        f"--outdir={folder}",
        *scripts,
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExternalMissing(f"esbuild did not run: {error}") from None
    if run.returncode:
        raise ExternalMissing(f"esbuild ended with {run.returncode}: {' '.join(run.stderr.split()[:40])}")
