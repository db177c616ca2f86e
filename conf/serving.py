"""What `sphere serve` says of itself: ``<state_dir>/serve.json``, for `sphere status` and health checks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import orjson

FILE = "serve.json"
STALE_S = 10.0  # seconds without a new state after which its writer is taken for dead or stopped


@dataclass(frozen=True, slots=True)
class ChildState:
    """One supervised process. Times are ISO 8601, UTC; "" for never."""

    name: str
    state: Literal["starting", "ready", "waiting"]  # waiting: ended, to be started again
    pid: int  # 0: none
    restarts: int
    unanswered: int  # restarts because it did not answer its heartbeat
    last_heartbeat: str
    last_end: str  # how it ended the last time: "status N" or "signal N"


@dataclass(frozen=True, slots=True)
class ServeState:
    """The state of a supervisor and of its children."""

    pid: int
    port: int
    written_at: str  # ISO 8601, UTC
    stopping: bool
    children: tuple[ChildState, ...]

    @property
    def not_ready(self) -> list[str]:
        """Names of the parts that do not serve now."""
        if self.stopping or not self.alive():
            return ["supervisor"]
        return [child.name for child in self.children if child.state != "ready"]

    def alive(self) -> bool:
        """Whether the supervisor that wrote this still works."""
        age = datetime.now(timezone.utc) - datetime.fromisoformat(self.written_at)
        if age.total_seconds() > STALE_S:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it is another user's
            return True
        return True

    def __str__(self) -> str:
        """A few lines for a person."""
        restarts = sum(child.restarts for child in self.children)
        lines = [f"pid {self.pid}, DIMSE port {self.port}, {restarts} restarts"]
        for child in self.children:
            ended = f", last end: {child.last_end}" if child.last_end else ""
            lines.append(f"{child.name} {child.state} pid {child.pid}, {child.restarts} restarts{ended}")
        return "\n            ".join(lines)


def now() -> str:
    """The time, as it is written here."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def write(state_dir: Path, *, pid: int, port: int, stopping: bool, children: Sequence[ChildState]) -> None:
    """Replace the state file atomically; raises OSError."""
    state = ServeState(pid, port, now(), stopping, tuple(children))
    state_dir.mkdir(parents=True, exist_ok=True)
    temporary = state_dir / f".{FILE}.{pid}"
    temporary.write_bytes(orjson.dumps(asdict(state), option=orjson.OPT_INDENT_2))
    temporary.replace(state_dir / FILE)


def read(state_dir: Path) -> ServeState | None:
    """The last state written, None where nothing serves or served; `ServeState.alive` says whether it still holds."""
    try:
        data: dict[str, Any] = orjson.loads((state_dir / FILE).read_bytes())
        children = tuple(ChildState(**child) for child in data.pop("children"))
        return ServeState(**data, children=children)
    except (OSError, ValueError, TypeError, KeyError):  # none, or of another version
        return None


def remove(state_dir: Path) -> None:
    """Say that nothing serves any more."""
    (state_dir / FILE).unlink(missing_ok=True)
