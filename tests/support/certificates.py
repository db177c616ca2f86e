"""A CA and certificates of a test's own, made by openssl in half a second."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.dicom_tools import require_tool


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key, in PEM."""

    path: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """A CA in a folder; it and those that it certifies have one key, as making them is what takes time."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Authority:
        """A new one."""
        folder.mkdir(parents=True, exist_ok=True)
        _openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / "ca.key", "-out", folder / "ca.pem",
            "-days", "2", "-subj", f"/CN=CA {folder.name}",
            "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip
        return cls(folder)

    @property
    def path(self) -> Path:
        return self.folder / "ca.pem"

    def issue(self, name: str, *, host: str = "IP:127.0.0.1", days: int = 2) -> Certificate:
        """A certificate for `name` at `host`; `days` below 0: it has expired."""
        made = Certificate(self.folder / f"{name}.pem", self.folder / "ca.key")
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        _openssl("req", "-new", "-key", made.key, "-out", request, "-subj", f"/CN={name}")
        extensions.write_text(f"subjectAltName={host}\n")
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.path, "-CAkey", self.folder / "ca.key", "-CAcreateserial",
            "-days", days, "-extfile", extensions, "-out", made.path,
        )  # fmt: skip
        return made


def _openssl(*arguments: str | Path | int) -> None:
    run = subprocess.run([require_tool("openssl"), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
