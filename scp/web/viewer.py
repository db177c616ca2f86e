"""The OHIF viewer under /viewer: its files as conf/viewer.py left them, its settings, and what it may do in a browser.

A study opens at ``/viewer/viewer?StudyInstanceUIDs=UID``. Where no viewer is installed, everything here is 404.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from stat import S_ISREG
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from sphere.conf import viewer
from sphere.conf.settings import Web

SETTINGS: Final = Path(__file__).with_name("viewer_config.js")
WORKER: Final = Path(__file__).with_name("viewer_worker.js")
INDEX: Final = "index.html"
PIECE: Final = 1 << 20  # bytes that are read of a file at a time: each read is a turn of a thread
FOREVER: Final = "public, max-age=31536000, immutable"
_HASHED: Final = re.compile(r"(.*\.bundle\.)?[0-9a-f]{16}\.(js|wasm|woff2)")  # such a name has one meaning for ever
_TAKES: Final = r"(^|,)\s*{}\s*(,|$|;\s*q=(?!0(\.0*)?\s*(,|$)))"  # a coding in Accept-Encoding (RFC 9110 12.5.3)
_NAMED: Final = re.compile(rf'"{viewer.PREFIX}([^"/]+\.js)"')
_INLINE: Final = re.compile(r"<script>(.*?)</script>", re.DOTALL)
TYPES: Final = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".json": "application/json", ".jsonc": "application/json",
    ".wasm": "application/wasm", ".svg": "image/svg+xml", ".png": "image/png",
    ".ico": "image/x-icon", ".woff2": "font/woff2", ".xml": "application/xml",
}  # fmt: skip


def installed(settings: Web) -> bool:
    """Whether /viewer shows something."""
    return (_folder(settings) / INDEX).is_file()


def routes(settings: Web) -> list[Route]:
    """The viewer's files; every other path whose last part has no suffix is one of its own pages."""
    files = StaticFiles(directory=_folder(settings), check_dir=False)

    def at_root(request: Request) -> Response:
        return RedirectResponse(viewer.PREFIX)

    def file(request: Request) -> Response:
        if not installed(settings):
            raise HTTPException(404, "no viewer is installed here: make viewer, or python -m sphere.conf.viewer")
        path = str(request.path_params["path"])
        if path == "app-config.js":
            response = Response(SETTINGS.read_bytes(), media_type=TYPES[".js"])
        elif path == "service-worker.js":
            response = Response(_worker(files), media_type=TYPES[".js"])
            response.headers["Content-Security-Policy"] = "default-src 'none'; connect-src 'self'"
        else:
            response = _file(files, path if Path(path).suffix else INDEX, request)
        response.headers["Cache-Control"] = FOREVER if _HASHED.fullmatch(path) else "no-cache"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    return [Route("/viewer", at_root), Route(viewer.PREFIX + "{path:path}", file)]


def _folder(settings: Web) -> Path:
    return Path(settings.viewer_dir) if settings.viewer_dir else viewer.folder()


def _file(files: StaticFiles, path: str, request: Request) -> Response:
    """A file, or its smallest copy that the client takes; raises HTTPException (404)."""
    taken = request.headers.get("accept-encoding", "")
    copies = [
        (coding, suffix) for coding, suffix in viewer.ENCODINGS.items() if re.search(_TAKES.format(coding), taken)
    ]
    for coding, suffix in (*copies, ("", "")):
        try:
            full, stat = files.lookup_path(path + suffix)
        except (OSError, ValueError):  # a name that no file can have
            break
        if stat is None or not S_ISREG(stat.st_mode):
            continue
        response = files.file_response(full, stat, request.scope)
        response.headers["Vary"] = "Accept-Encoding"
        response.headers["Content-Security-Policy"] = policy(_scripts(files) if path == INDEX else ())
        if isinstance(response, FileResponse):
            response.chunk_size = PIECE
            response.headers["Content-Type"] = TYPES.get(Path(path).suffix, "application/octet-stream")
            if coding:
                response.headers["Content-Encoding"] = coding
        return response
    raise HTTPException(404, "the viewer has no such file")


def _scripts(files: StaticFiles) -> list[str]:
    """The scripts in the page itself."""
    return _INLINE.findall(_page(files))


def _page(files: StaticFiles) -> str:
    return Path(files.lookup_path(INDEX)[0]).read_text(encoding="utf-8")


def _worker(files: StaticFiles) -> str:
    """The service worker: it keeps the scripts that the page names, under a name of this build."""
    page = _page(files)
    names = list(dict.fromkeys(name for name in _NAMED.findall(page) if _HASHED.fullmatch(name)))
    full, stat = files.lookup_path(viewer.STAMP)
    stamp = Path(full).read_text(encoding="utf-8") if stat else ""
    build = hashlib.sha256(f"{len(stamp)}:{stamp}{page}".encode()).hexdigest()[:16]
    text = WORKER.read_text(encoding="utf-8").replace("CACHE_NAME", json.dumps(f"viewer-{build}"))
    return text.replace("FILE_NAMES", json.dumps([viewer.PREFIX + name for name in names]))


def policy(inline: Iterable[str] = ()) -> str:
    """The Content-Security-Policy: this origin alone, the scripts `inline`, and what the decoders of images need.

    They are WebAssembly whose glue makes functions from text (unsafe-eval), in workers, some from blobs; styles are
    set by script.
    """
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline)
    scripts = " ".join(["'self'", "'unsafe-eval'", "blob:", *(f"'sha256-{digest}'" for digest in digests)])
    return (
        f"default-src 'none'; script-src {scripts}; worker-src 'self' blob:; connect-src 'self' blob: data:; "
        "img-src 'self' blob: data:; media-src 'self' blob:; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
        "frame-src 'self' blob:; object-src 'self' blob:; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    )
