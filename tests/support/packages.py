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
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *packages]):
        run = subprocess.run(["apt-get", *arguments], env=environment, stdout=subprocess.DEVNULL, check=False)
        if run.returncode:
            print(f"apt-get {arguments[0]} ended with status {run.returncode}")
            return


if __name__ == "__main__":
    install()
