"""The OHIF viewer that the web server shows under /viewer: fetched from npm, checked, unpacked; `make viewer`.

viewer.toml pins the package by version and SHA-512. Its pages are built for the root of a web server: what names the
root in them is changed to /viewer/. Its scripts come as they were written, and a browser takes seconds to read them:
esbuild, pinned there too, makes them smaller; where it cannot be had, they stay as they are.
`python -m sphere.conf.viewer [FOLDER]` fetches it; nothing else needs it.
"""

from __future__ import annotations

import gzip
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from sphere.conf import minify, npm, toml
from sphere.conf.errors import ExternalMissing

PREFIX: Final = "/viewer/"
INDEX: Final = "index.html"
PINS: Final = Path(__file__).with_name("viewer.toml")
ENCODINGS: Final = {"zstd": ".zst", "gzip": ".gz"}
"""Content codings (RFC 9110 8.4.1, RFC 8878) of the copies beside files that gain by it, the best first, and their
suffixes. Browsers take zstd of at most 8 MiB of window (RFC 9659): level 19 has that."""
_ZSTD_LEVEL: Final = 19
_PAGES: Final = "package/dist/"
STAMP: Final = "installed.txt"  # says which build is installed
# The runtime of models that would have to be fetched from elsewhere, and what hands the pages to a service worker
_LEFT_OUT: Final = ("ort/", "sw.js", "init-service-worker.js", "google.js", "app-config.js", "_headers", "_redirects")
_COMPRESSED: Final = frozenset((".js", ".css", ".wasm", ".html", ".json", ".jsonc", ".svg"))
_SCRIPTS: Final = r"[\w-]+\.bundle\.\w+\.js"
_TITLE: Final = "<title>"
_LAYOUT: Final = 4  # raised when what is made of the package changes


@dataclass(frozen=True, slots=True)
class Installed:
    """What `install` found or did: whether the viewer is new, and why its scripts are not minified, if they are not."""

    new: bool
    plain: str = ""


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
    Rewrite(_SCRIPTS, '__webpack_require__.p = "/"', f'__webpack_require__.p = "{PREFIX}"'),
    Rewrite(r"app\.bundle\.\w+\.js", "'/dicom-microscopy-viewer/", f"'{PREFIX}dicom-microscopy-viewer/"),
    Rewrite(r"manifest\.json", '"/assets', f'"{PREFIX}assets'),
    # A context costs 0.3 s where WebGL is drawn in software, and a copy of a volume each; phones get one as it comes
    Rewrite(_SCRIPTS, "webGlContextCount: 7,", "webGlContextCount: 1,"),
    # A study whose series name no Modality has an empty ModalitiesInStudy, without Value (PS3.18 F.2.5)
    Rewrite(_SCRIPTS, "i < ModalitiesInStudy.Value.length", "i < (ModalitiesInStudy.Value || []).length"),
    # An item of a report need not have a name (PS3.3 C.17.3); at one without, the whole page ended
    Rewrite(_SCRIPTS, "} = ConceptNameCodeSequence;", "} = ConceptNameCodeSequence || {};"),
    Rewrite(r"app\.bundle\.css", "url(/", f"url({PREFIX}"),
)  # fmt: skip


def folder() -> Path:
    """Where the viewer is kept unless the settings say otherwise."""
    return Path(sys.prefix) / "share" / "sphere" / "viewer"


def pinned() -> dict[str, Any]:
    """The pins of viewer.toml: `viewer`, the package, and `minifier`, whose packages differ by machine."""
    pins: dict[str, Any] = toml.loads(PINS.read_text(encoding="utf-8"))
    return pins


def install(target: Path) -> Installed:
    """Have the pinned viewer in `target`; raises ExternalMissing when it cannot be had."""
    pins, stamp = pinned(), target / STAMP
    found = stamp.read_text(encoding="utf-8") if stamp.is_file() else ""
    if found == _stamp(pins, minified=True):
        return Installed(new=False)
    if target.exists() and not found and any(target.iterdir()):
        raise ExternalMissing(f"{target} holds something else than a viewer: name an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".viewer-") as name:
        work = Path(name)
        program, plain = _minifier(pins["minifier"], work)
        if program is None and found == _stamp(pins, minified=False):
            return Installed(new=False, plain=plain)
        pages = work / "pages"
        _unpack(npm.fetch(_package(pins), _made(work / "viewer")), _made(pages))
        _adapt(pages)
        _preload(pages, pins["viewer"]["start"])
        if program is not None:
            plain = _minified(program, pages)
        _compress(pages)
        (pages / STAMP).write_text(_stamp(pins, minified=not plain), encoding="utf-8")
        if target.exists():
            target.rename(work / "before")
        pages.rename(target)
    return Installed(new=True, plain=plain)


def _stamp(pins: dict[str, Any], *, minified: bool) -> str:
    """What an installed viewer says of itself."""
    smaller = f"esbuild {pins['minifier']['version']}" if minified else "not minified"
    return f"{_package(pins)} {pins['viewer']['integrity']} {_LAYOUT}, {smaller}\n"


def _package(pins: dict[str, Any]) -> npm.Pin:
    return npm.Pin(**{name: pins["viewer"][name] for name in ("package", "version", "integrity")})


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _minifier(pins: dict[str, Any], work: Path) -> tuple[Path | None, str]:
    """esbuild's program; or None, and why it cannot be had."""
    try:
        return minify.fetch(minify.pin(pins), _made(work / "minifier")), ""
    except ExternalMissing as error:
        return None, str(error)


def _minified(program: Path, pages: Path) -> str:
    """Make the scripts smaller, all or none; why not, or ""."""
    smaller = _made(pages.with_name("smaller"))
    try:
        minify.minify(program, sorted(_named(pages, _SCRIPTS)), smaller)
    except ExternalMissing as error:
        return str(error)
    for path in smaller.iterdir():
        path.replace(pages / path.name)
    return ""


def _unpack(package: Path, pages: Path) -> None:
    """The built pages and the licence."""
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
    """Change what names the root of the server; raises ExternalMissing where a text is nowhere: this is another build
    than the one that was tried."""
    for rewrite in REWRITES:
        if not sum(_replace(path, rewrite) for path in _named(pages, rewrite.files)):
            raise ExternalMissing(f"the viewer has no {rewrite.old!r} in {rewrite.files}: another build than was tried")


def _preload(pages: Path, chunks: Sequence[str]) -> None:
    """Have the page name the chunks that its first image needs, so that a browser asks for them at once, and not for
    one after the other as the scripts before them run. Raises ExternalMissing where one is nowhere."""
    lines = []
    for chunk in chunks:
        found = list(_named(pages, rf"{chunk}\.bundle\.\w+\.js"))
        if len(found) != 1:
            raise ExternalMissing(f"the viewer has no chunk {chunk}: another build than was tried")
        lines.append(f'<link rel="preload" as="script" href="{PREFIX}{found[0].name}">')
    if not _replace(pages / INDEX, Rewrite(INDEX, _TITLE, "".join(lines) + _TITLE)):
        raise ExternalMissing(f"the viewer has no {_TITLE!r} in {INDEX}: another build than was tried")


def _compress(pages: Path) -> None:
    """Put compressed copies beside every file that gains by them."""
    smallest = pa.Codec("zstd", compression_level=_ZSTD_LEVEL)
    for path in [path for path in pages.rglob("*") if path.suffix in _COMPRESSED]:
        data = path.read_bytes()
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data, 6, mtime=0))
        path.with_name(f"{path.name}.zst").write_bytes(smallest.compress(data, asbytes=True))


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
        done = install(target)
    except ExternalMissing as error:
        raise SystemExit(f"the viewer is not installed: {error}") from None
    print(f"{_package(pinned())} {'is now' if done.new else 'was already'} in {target}")
    if done.plain:
        print(f"its scripts are not minified, so that a first visit takes longer: {done.plain}")


if __name__ == "__main__":
    main(sys.argv[1:])
