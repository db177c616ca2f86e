"""Find the Java that Spark, Delta and the HDFS of the tests run on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from sphere.conf.errors import ExternalMissing

SUPPORTED = (17, 21)
PACKAGES = ("openjdk-17-jre-headless", "openjdk-21-jre-headless")  # Debian 13 has no 17, Debian 12 no 21
HINT = f"install it with: apt-get install {' or '.join(PACKAGES)} (Debian, Ubuntu), or set JAVA_HOME to a JDK 17 or 21"


def java() -> Path:
    """The `java` program of JAVA_HOME, else of PATH; raises ExternalMissing with the package to install."""
    home = os.environ.get("JAVA_HOME")
    found = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if not found or not Path(found).exists():
        raise ExternalMissing(f"Java is missing: {HINT}")
    version = java_version(Path(found))
    if version not in SUPPORTED:
        raise ExternalMissing(f"{found} is Java {version}; Java 17 or 21 is needed: {HINT}")
    return Path(found)


def java_version(program: Path) -> int:
    """Feature release of a `java` program: 17 for "17.0.15", 8 for "1.8.0"; 0 when it does not run."""
    try:
        run = subprocess.run([str(program), "-version"], capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', run.stderr + run.stdout)
    return int(match.group(1)) if match else 0


def install() -> None:
    """Make sure that Java is there: as root on Debian or Ubuntu by apt-get, else raise ExternalMissing."""
    try:
        java()
        return
    except ExternalMissing:
        if os.geteuid() != 0 or not shutil.which("apt-get") or os.environ.get("JAVA_HOME"):
            raise
    print("Java is missing: installing it with apt-get", flush=True)
    if status := _apt_get("update", "-q"):
        raise ExternalMissing(f"apt-get update failed with status {status}; {HINT}")
    for package in PACKAGES:
        if not (status := _apt_get("install", "-q", "-y", "--no-install-recommends", package)):
            java()
            return
    raise ExternalMissing(f"apt-get install failed with status {status}; {HINT}")


def _apt_get(*arguments: str) -> int:
    """Run it; its exit status."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(["apt-get", *arguments], env=environment, stdout=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    try:
        install()
    except ExternalMissing as error:
        raise SystemExit(str(error)) from None
