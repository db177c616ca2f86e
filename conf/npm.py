"""Packages that set-up fetches from npm: pinned by version and SHA-512, and nothing of them is run by npm."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sphere.conf.errors import ExternalMissing

FETCH_S: Final = 600  # seconds that npm may take


@dataclass(frozen=True, slots=True)
class Pin:
    """The package that is wanted; `integrity` as npm writes it: sha512- and base64."""

    package: str
    version: str
    integrity: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


def fetch(pin: Pin, folder: Path) -> Path:
    """The package's archive (.tgz), with the pinned digest, in an empty folder. Raises ExternalMissing."""
    npm = shutil.which("npm")
    if npm is None:
        raise ExternalMissing("npm is missing: install it (Debian: apt-get install npm), then make viewer")
    command = [npm, "pack", "--silent", "--ignore-scripts", f"{pin.package}@{pin.version}"]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_S, check=False)
    except subprocess.TimeoutExpired:
        raise ExternalMissing(f"{pin.package} could not be fetched within {FETCH_S} s; try again") from None
    found = list(folder.glob("*.tgz"))
    if run.returncode or len(found) != 1:
        tail = " ".join((run.stderr or run.stdout).split()[-40:])
        raise ExternalMissing(f"{pin.package} could not be fetched (npm ended with {run.returncode}): {tail}")
    digest = base64.b64encode(hashlib.sha512(found[0].read_bytes()).digest()).decode()
    if f"sha512-{digest}" != pin.integrity:
        raise ExternalMissing(f"{found[0].name}: SHA-512 is {digest}, another is pinned")
    return found[0]
