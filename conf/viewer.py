"""The OHIF viewer that the web server shows under /viewer: fetched from npm, checked, unpacked; `make viewer`.

viewer.toml pins the package by version and SHA-512. Its pages are built for the root of a web server: what names the
root in them is changed to /viewer/. `python -m sphere.conf.viewer [FOLDER]` fetches it; nothing else needs it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sphere.conf import toml
from sphere.conf.errors import ExternalMissing

PREFIX: Final = "/viewer/"
PINS: Final = Path(__file__).with_name("viewer.toml")
FETCH_S: Final = 600  # seconds that npm may take
_PAGES: Final = "package/dist/"
_STAMP: Final = "installed.txt"
# The runtime of models that would have to be fetched from elsewhere, and what hands the pages to a service worker
_LEFT_OUT: Final = ("ort/", "sw.js", "init-service-worker.js", "google.js", "app-config.js", "_headers", "_redirects")
_COMPRESSED: Final = frozenset((".js", ".css", ".wasm", ".html", ".json", ".jsonc", ".svg"))
_LAYOUT: Final = 1  # raised when what is made of the package changes


@dataclass(frozen=True, slots=True)
class Pin:
    """The package that is wanted."""

    package: str
    version: str
    integrity: str

    @property
    def stamp(self) -> str:
        """What an installed viewer says of itself."""
        return f"{self.package} {self.version} {self.integrity} {_LAYOUT}\n"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A text in files by a pattern of their names, and what stands there below /viewer/."""

    files: str
    old: str
    new: str


_MODULE: Final = 'rel="preload" as="script" type="module"'
_SERVICE_WORKER: Final = f'<script {_MODULE} src="{PREFIX}init-service-worker.js"></script>'
REWRITES: Final = (
    Rewrite(r"index\.html", '"/', f'"{PREFIX}'),
    Rewrite(r"index\.html", _SERVICE_WORKER, ""),
    Rewrite(r"[\w-]+\.bundle\.\w+\.js", '__webpack_require__.p = "/"', f'__webpack_require__.p = "{PREFIX}"'),
    Rewrite(r"app\.bundle\.\w+\.js", "'/dicom-microscopy-viewer/", f"'{PREFIX}dicom-microscopy-viewer/"),
    Rewrite(r"app\.bundle\.css", "url(/", f"url({PREFIX}"),
)  # fmt: skip


def folder() -> Path:
    """Where the viewer is kept unless the settings say otherwise."""
    return Path(sys.prefix) / "share" / "sphere" / "viewer"


def pinned() -> Pin:
    """The pin of viewer.toml."""
    return Pin(**toml.loads(PINS.read_text(encoding="utf-8")))


def install(target: Path) -> bool:
    """Have the pinned viewer in `target`; False where it was there. Raises ExternalMissing when it cannot be had."""
    pin, stamp = pinned(), target / _STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == pin.stamp:
        return False
    if target.exists() and not stamp.is_file() and any(target.iterdir()):
        raise ExternalMissing(f"{target} holds something else than a viewer: name an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".viewer-") as work:
        package = _fetch(pin, Path(work))
        pages = Path(work) / "pages"
        _unpack(package, pages)
        _adapt(pages)
        (pages / _STAMP).write_text(pin.stamp, encoding="utf-8")
        if target.exists():
            target.rename(Path(work) / "before")
        pages.rename(target)
    return True


def _fetch(pin: Pin, work: Path) -> Path:
    """The package's archive, with the pinned digest."""
    npm = shutil.which("npm")
    if npm is None:
        raise ExternalMissing("npm is missing: install it (Debian: apt-get install npm), then make viewer")
    command = [npm, "pack", "--silent", "--ignore-scripts", f"{pin.package}@{pin.version}"]
    try:
        run = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=FETCH_S, check=False)
    except subprocess.TimeoutExpired:
        raise ExternalMissing(f"{pin.package} could not be fetched within {FETCH_S} s; try again") from None
    found = list(work.glob("*.tgz"))
    if run.returncode or len(found) != 1:
        tail = " ".join((run.stderr or run.stdout).split()[-40:])
        raise ExternalMissing(f"{pin.package} could not be fetched (npm ended with {run.returncode}): {tail}")
    digest = base64.b64encode(hashlib.sha512(found[0].read_bytes()).digest()).decode()
    if f"sha512-{digest}" != pin.integrity:
        raise ExternalMissing(f"{found[0].name}: SHA-512 is {digest}, another is pinned in {PINS.name}")
    return found[0]


def _unpack(package: Path, pages: Path) -> None:
    """The built pages and the licence."""
    pages.mkdir()
    with tarfile.open(package) as archive:
        for member in archive:
            name = member.name.removeprefix(_PAGES)
            if member.name == "package/LICENSE":
                name = "LICENSE"
            elif name == member.name or name.startswith(_LEFT_OUT) or name.endswith(".map"):
                continue
            data = archive.extractfile(member)
            if data is None:
                continue
            path = pages / name
            if ".." in path.parts:
                raise ExternalMissing(f"{package.name} holds a file outside of itself: {member.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.read())


def _adapt(pages: Path) -> None:
    """Change what names the root of the server, and put a compressed copy beside every file that gains by it.

    Raises ExternalMissing where a text is nowhere: this is another build than the one that was tried.
    """
    for rewrite in REWRITES:
        if not sum(_replace(path, rewrite) for path in _named(pages, rewrite.files)):
            raise ExternalMissing(f"the viewer has no {rewrite.old!r} in {rewrite.files}: another build than was tried")
    for path in [path for path in pages.rglob("*") if path.suffix in _COMPRESSED]:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 6, mtime=0))


def _named(pages: Path, pattern: str) -> Iterator[Path]:
    return (path for path in pages.iterdir() if re.fullmatch(pattern, path.name))


def _replace(path: Path, rewrite: Rewrite) -> int:
    """Change a file; returns how many times the text stood there."""
    text = path.read_text(encoding="utf-8")
    found = text.count(rewrite.old)
    if found:
        path.write_text(text.replace(rewrite.old, rewrite.new), encoding="utf-8")
    return found


def main(arguments: list[str]) -> None:
    """Fetch it, into the named folder or where it is looked for."""
    target = Path(arguments[0]).absolute() if arguments else folder()
    try:
        new = install(target)
    except ExternalMissing as error:
        raise SystemExit(f"the viewer is not installed: {error}") from None
    print(f"{pinned().package} {pinned().version} {'is now' if new else 'was already'} in {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
