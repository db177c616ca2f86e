"""Packages of npm that tests need: installed once beside the virtual environment, from a lock file with checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "dcmjs"  # package.json, package-lock.json
FOLDER = Path(sys.prefix) / "share" / "sphere" / "npm"
_STAMP = FOLDER / "installed"


def install() -> str:
    """Install what the lock file names; "" or why that is not possible."""
    lock = (PACKAGES / "package-lock.json").read_bytes()
    digest = hashlib.sha256(lock).hexdigest()
    if _STAMP.exists() and _STAMP.read_text() == digest:
        return ""
    if not (shutil.which("node") and shutil.which("npm")):
        return "node and npm are missing: install the Debian packages nodejs and npm"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(PACKAGES / name, FOLDER / name)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    run = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    if run.returncode:
        return f"npm ci failed: {(run.stderr or run.stdout).strip().splitlines()[-1:]}"
    _STAMP.write_text(digest)
    return ""


def require_npm() -> Path:
    """The folder of installed modules; without it the test is skipped, or fails with SPHERE_REQUIRE_ALL=1."""
    if not _STAMP.exists():
        line = "npm packages are missing: run python -m tests.support.install"
        if os.environ.get("SPHERE_REQUIRE_ALL") == "1":
            pytest.fail(line, pytrace=False)
        pytest.skip(line)
    return FOLDER / "node_modules"
