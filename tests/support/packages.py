"""Debian packages that some tests need: `python -m tests.support.packages` installs them where it may.

As root on Debian or Ubuntu by apt-get; elsewhere it names what is missing. It needs nothing but Python, and so goes on
beside the making of the virtual environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess

PACKAGES = {  # program: Debian package
    "storescu": "dcmtk", "Orthanc": "orthanc", "dciodvfy": "dicom3tools", "openssl": "openssl",
    "node": "nodejs", "npm": "npm", "chromium": "chromium",
}  # fmt: skip
INSTALL = ("install", "-q", "-y", "--no-install-recommends")
SBIN = "/usr/sbin:/sbin"  # where Debian puts Orthanc


def program(name: str) -> str | None:
    """The path of a program, looked for in the system's folders too."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")


def missing() -> dict[str, str]:
    """Programs that are not there, with their packages."""
    return {name: package for name, package in PACKAGES.items() if program(name) is None}


def install() -> None:
    """Install what is missing, or say what it was."""
    packages = sorted(set(missing().values()))
    if not packages:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"tests that need them will be skipped; install with: apt-get install {' '.join(packages)}")
        return
    print(f"installing with apt-get: {' '.join(packages)}", flush=True)
    if status := _apt_get("update", "-q"):
        print(f"apt-get update ended with status {status}")
        return
    if not _apt_get(*INSTALL, *packages):
        return
    for package in packages:  # one that a distribution does not have is no reason to go without the others
        if status := _apt_get(*INSTALL, package):
            print(f"apt-get install {package} ended with status {status}")


def _apt_get(*arguments: str) -> int:
    """Run it; its exit status."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(["apt-get", *arguments], env=environment, stdout=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    install()
