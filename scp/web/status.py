"""The state of the archive for the page at `/`: small answers, kept for seconds, so that many may watch."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import orjson
from starlette.requests import Request
from starlette.responses import Response

from sphere.catalog.overview import Overview
from sphere.catalog.queries import Queries
from sphere.catalog.query import Query
from sphere.catalog.tombstones import Tombstones
from sphere.conf import serving
from sphere.conf.settings import Settings
from sphere.scp.client.echoes import echo_all
from sphere.scp.web.landed import Arrivals
from sphere.scp.web.operations import Endpoint, Operation, parameter
from sphere.scp.web.problem import WebError

PATH: Final = "/status"
KEPT_S: Final = 5.0  # seconds for which what the tables say is kept
ECHO_S: Final = 5.0  # seconds that a peer has to connect, and to answer
ECHO_PAUSE_S: Final = 2.0  # seconds after an echo in which its answer is given again
MAX_LINES: Final = 200  # of the logs
TAIL: Final = 64 << 10  # bytes of a log that are read
MAX_LIMIT: Final = 1000
_LINE: Final = re.compile(r"(\S+Z) (WARNING|ERROR|CRITICAL) +(\S+)\[\d+\] (.*)")


class State:
    """What the operations ask. Safe to share between threads."""

    def __init__(
        self, settings: Settings, arrivals: Arrivals, overview: Overview, finder: Queries, tombstones: Tombstones
    ) -> None:
        self.settings, self.arrivals, self.overview = settings, arrivals, overview
        self._finder, self._tombstones = finder, tombstones
        self._lost: tuple[str, frozenset[str], frozenset[str]] = "", frozenset(), frozenset()
        self._lock, self._echoing = threading.Lock(), threading.Lock()
        self._kept: dict[str, tuple[float, Any]] = {}
        self._echoes: list[dict[str, Any]] = [
            {**_peer(peer), "at": "", "ms": None, "error": ""} for peer in settings.peers
        ]
        self._echoed = float("-inf")

    def kept(self, name: str, ask: Callable[[], Any]) -> Any:
        """The answer to a question to the tables, asked again after KEPT_S."""
        with self._lock:
            at, answer = self._kept.get(name, (float("-inf"), None))
            if time.monotonic() - at > KEPT_S:
                answer = ask()
                self._kept[name] = time.monotonic(), answer
            return answer

    def now(self) -> dict[str, Any]:
        """Processes and jobs, what landed, and what waits."""
        state_dir = self.settings.archive.state_dir
        running, landing = serving.read(state_dir), self.arrivals.look()
        catalogued = self.kept("catalogued", self.overview.catalogued)
        alive = running is not None and running.alive()
        verified = serving.read_verify(state_dir)
        return {
            "archive": self.settings.archive.ae_title,
            "landed": landing.members,
            "waiting": max(0, landing.members - catalogued) if self.settings.catalog.mode == "delta" else 0,
            "processes": [asdict(child) for child in running.children] if running and alive else [],
            "extraction": _plain(serving.read_job(state_dir)),
            "spool": _plain(running.spool) if running and alive else None,
            "damaged": verified.damaged if verified else 0,
            "forwards": self.kept("forwards", self.overview.forwards),
        }

    def studies(self) -> list[dict[str, Any]]:
        """Studies of which instances arrived, the latest first; of those that lost some by deletion, as many as are
        shown, and nothing where none is."""
        found = self.arrivals.look().studies
        lost = self._that_lost(frozenset(one.study for one in found))
        left = {uid: self._finder.count(Query.build("IMAGE", {"StudyInstanceUID": uid})) for uid in lost}
        shown = [replace(one, instances=min(one.instances, left.get(one.study, one.instances))) for one in found]
        return [asdict(one) for one in shown if one.instances]

    def _that_lost(self, studies: frozenset[str]) -> frozenset[str]:
        """Those of the studies with deleted instances; looked up again after a deletion, and for other studies."""
        state = self._tombstones.state()
        if (state, studies) != self._lost[:2]:
            named = sorted(studies - {""})
            deleted = self._tombstones.find(study=named) if named else ()
            self._lost = state, studies, frozenset(one.StudyInstanceUID for one in deleted)
        return self._lost[2]

    def storage(self) -> dict[str, Any]:
        """Where the bytes are, how many, and how many rows the tables have; sizes in bytes."""
        settings, landing = self.settings, self.arrivals.look()
        return {
            "storage_root": settings.storage.root,
            "catalog_root": settings.catalog_root,
            "bundles": landing.bundles,
            "bundles_open": landing.open,
            "bytes": landing.bytes,
            "members": landing.members,
            "deleted": self._tombstones.count(),
            "disk": _disk(settings.storage.root),
            "verified": _plain(serving.read_verify(settings.archive.state_dir)),
            "tables": self.kept("counts", self.overview.counts),
        }

    def quarantine(self, limit: int, offset: int) -> dict[str, Any]:
        """Members that could not become rows: how many by reason, and a page of them, the latest first."""
        reasons = self.kept("reasons", self.overview.reasons)
        rows = self.overview.rejected(limit=limit, offset=offset)
        return {"total": sum(reasons.values()), "reasons": reasons, "members": rows}

    def peers(self) -> list[dict[str, Any]]:
        """The peers of the settings, each with its last answer to C-ECHO; `at` "" where it was not asked."""
        return self._echoes

    def echo(self) -> list[dict[str, Any]]:
        """Ask the peers now; one round at a time."""
        with self._echoing:
            if time.monotonic() - self._echoed > ECHO_PAUSE_S:
                at = serving.now()
                answers = echo_all(self.settings, timeout_s=ECHO_S)
                self._echoes = [{**_peer(one.peer), "at": at, "ms": one.ms, "error": one.error} for one in answers]
                self._echoed = time.monotonic()
            return self._echoes

    def errors(self) -> list[dict[str, str]]:
        """Warnings and errors that the processes of `sphere serve` on this host logged, the latest first."""
        found = [line for file in sorted(self.settings.archive.state_dir.glob("log/*.log")) for line in _tail(file)]
        return sorted(found, key=lambda line: line["at"], reverse=True)[:MAX_LINES]


def offered(state: State) -> list[Operation]:
    """What the page asks. What tells of the archive's inside needs a writer."""
    limit = parameter("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT}, "At most so many.")
    offset = parameter("offset", {"type": "integer", "minimum": 0}, "So many are passed over.")

    def quarantine(request: Request) -> dict[str, Any]:
        found = state.quarantine(_number(request, "limit", 100, MAX_LIMIT), _number(request, "offset", 0, 10**9))
        request.state.found = len(found["members"])
        return found

    def arrivals(request: Request) -> list[dict[str, Any]]:
        studies = state.studies()
        request.state.found = len(studies)
        return studies

    def operation(method: str, path: str, answer: Callable[[Request], Any], what: str, **more: Any) -> Operation:
        return Operation(
            method, PATH + path, _answered(answer, inside=more.pop("inside", True)), what, "status", **more
        )

    return [
        operation("GET", "", lambda _: state.now(), "Processes, jobs, and what waits", inside=False),
        operation("GET", "/arrivals", arrivals,
                  "Studies of which instances arrived, the latest first", inside=False),
        operation("GET", "/quarantine", quarantine, "Members that could not become rows, and why",
                  parameters=(limit, offset)),
        operation("GET", "/peers", lambda _: state.peers(), "Peers, and what they last answered to C-ECHO"),
        operation("POST", "/peers", lambda _: state.echo(), "Ask the peers by C-ECHO now"),
        operation("GET", "/storage", lambda _: state.storage(), "Where the bytes are, and how many"),
        operation("GET", "/errors", lambda _: state.errors(), "Warnings and errors of the processes"),
    ]  # fmt: skip


def _answered(answer: Callable[[Request], Any], *, inside: bool) -> Endpoint:
    """An endpoint that answers in JSON; `inside`: to a writer only."""

    def endpoint(request: Request) -> Response:
        if inside and request.state.role not in ("writer", "admin"):
            raise WebError("this needs the role writer", http=403)
        return Response(
            orjson.dumps(answer(request)), headers={"Cache-Control": "no-store"}, media_type="application/json"
        )

    return endpoint


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= most):
        raise WebError(f"{name} must be a whole number up to {most}")
    return int(text)


def _plain(state: serving.JobState | serving.SpoolState | serving.VerifyState | None) -> dict[str, Any] | None:
    return None if state is None else asdict(state)


def _peer(peer: Any) -> dict[str, Any]:
    return {"name": peer.name, "ae_title": peer.ae_title, "host": peer.host, "port": peer.port, "may": list(peer.may)}


def _disk(root: str) -> dict[str, int] | None:
    """Bytes of the disk below a storage on this host; None for others."""
    parts = urlsplit(root)
    if parts.scheme != "file":
        return None
    folder = Path(unquote(parts.path))
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return {"total": usage.total, "free": usage.free}


def _tail(file: Path) -> list[dict[str, str]]:
    """The last lines of a log."""
    try:
        with file.open("rb") as lines:
            lines.seek(max(0, file.stat().st_size - TAIL))
            text = lines.read().decode("utf-8", "replace")
    except OSError:
        return []
    found = [match for line in text.splitlines() if (match := _LINE.fullmatch(line))]
    return [
        {"at": match[1], "level": match[2], "process": file.stem, "source": match[3], "message": match[4]}
        for match in found
    ]
