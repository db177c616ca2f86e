"""What `sphere serve` says of itself: ``<state_dir>/serve.json``, for `sphere status` and health checks."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import orjson

from sphere.conf.errors import SettingsError
from sphere.conf.private import make_private

log = logging.getLogger(__name__)

FILE = "serve.json"
LOCK_FILE = "serve.lock"
SPOOL_FILE = "spool.json"
JOB_FILE = "extraction.json"
VERIFY_FILE = "verified.json"
STALE_S = 10.0  # seconds without a new state after which its writer is taken for dead or stopped


REFUSES, STORES = "refuses", "stores"


class Tell:
    """What a child tells its supervisor: that it is ready (with its port), and whether its storage refuses."""

    def __init__(self, send: Callable[[bool | str], None]) -> None:
        self._send = send

    def __call__(self, port: int) -> None:
        self._send(True)

    def refuses(self, refuses: bool) -> None:
        with suppress(OSError):  # the supervisor is gone: a C-STORE is not to fail for that
            self._send(REFUSES if refuses else STORES)


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
    refuses: bool = False  # a receiver whose storage takes nothing


@dataclass(frozen=True, slots=True)
class SpoolState:
    """What waits in the spool, and how shipping goes. Times are ISO 8601, UTC; "" for none. Sizes in bytes."""

    written_at: str = ""
    bundles: int = 0
    bytes: int = 0
    oldest: str = ""  # when the oldest bundle was begun
    shipped_bundles: int = 0  # since this shipper was started
    shipped_bytes: int = 0
    damaged: int = 0  # bundles that are not what their journals say: kept in the spool
    set_aside: int = 0  # members that have other bytes than arrived: kept in its folder `damaged`
    failing_since: str = ""
    error: str = ""  # of the last attempt

    def __str__(self) -> str:
        """A line for a person."""
        parts = [f"{self.bundles} bundles, {self.bytes / 1e6:.1f} MB to be shipped"]
        if self.oldest:
            age = datetime.now(timezone.utc) - datetime.fromisoformat(self.oldest)
            parts.append(f"the oldest begun {age.total_seconds():.0f} s ago")
        if self.damaged:
            parts.append(f"{self.damaged} DAMAGED and kept")
        if self.set_aside:
            parts.append(f"{self.set_aside} DAMAGED instances in its folder damaged")
        if self.failing_since:
            parts.append(f"failing since {self.failing_since}: {self.error}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class VerifyState:
    """How far sealed bundles were read back, each once. `written_at` is ISO 8601, UTC; "" for never. Sizes in bytes."""

    written_at: str = ""
    bundles: int = 0  # that were found as promised
    bytes: int = 0
    waiting: int = 0  # sealed, and not read yet
    damaged: int = 0  # not as promised: kept as they are
    named: tuple[str, ...] = ()  # the first of them, with what was found

    def __str__(self) -> str:
        """A line for a person, and one for each damaged bundle that is named."""
        line = f"{self.bundles} sealed bundles read back ({self.bytes / 1e6:.1f} MB), {self.waiting} waiting"
        if self.damaged:
            line += f", {self.damaged} DAMAGED and kept"
        return "\n            ".join([line, *self.named])


@dataclass(frozen=True, slots=True)
class JobState:
    """The extraction that runs, or the last one. Times are ISO 8601, UTC; "" for not yet."""

    began_at: str
    step: str = ""  # of those of sphere.jobs.extract
    done: int = 0  # members of the step that are done, of `total`
    total: int = 0  # 0: the step does not count
    ended_at: str = ""
    outcome: str = ""  # its report, or why it failed
    failed: bool = False


@dataclass(frozen=True, slots=True)
class ServeState:
    """The state of a supervisor and of its children."""

    pid: int
    port: int
    written_at: str  # ISO 8601, UTC
    stopping: bool
    children: tuple[ChildState, ...]
    spool: SpoolState | None = None  # where instances are spooled
    web_port: int = 0  # 0: no HTTP

    @property
    def not_ready(self) -> list[str]:
        """Names of the parts that do not serve now."""
        if self.stopping or not self.alive():
            return ["supervisor"]
        return [child.name for child in self.children if child.state != "ready"]

    @property
    def refuses(self) -> bool:
        """Whether a receiver refuses what comes, as its storage (or spool) takes nothing."""
        return any(child.refuses for child in self.children)

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
        web = f", HTTP port {self.web_port}" if self.web_port else ""
        lines = [f"pid {self.pid}, DIMSE port {self.port}{web}, {restarts} restarts"]
        for child in self.children:
            ended = f", last end: {child.last_end}" if child.last_end else ""
            refuses = ", REFUSES: its storage takes nothing" if child.refuses else ""
            lines.append(f"{child.name} {child.state} pid {child.pid}, {child.restarts} restarts{ended}{refuses}")
        return "\n            ".join(lines)


def now() -> str:
    """The time, as it is written here."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def check_writable(state_dir: Path) -> None:
    """Raise SettingsError where no file can be made in the folder of states, unless the disk is full: that may pass."""
    try:
        make_private(state_dir)
        with TemporaryFile(dir=state_dir):
            return
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise SettingsError(
                f"archive.state_dir: {state_dir} cannot be written to: {error.strerror}; choose another folder"
            ) from None


@contextmanager
def claimed(state_dir: Path) -> Iterator[None]:
    """Within, no other process of this host serves the archive; the kernel lets go of it when this one ends, however
    it does, and its children do not hold it. Raises SettingsError where another one serves.
    """
    path, fd = state_dir / LOCK_FILE, -1
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        state = read(state_dir)
        pid = f", process {state.pid}," if state else ""
        raise SettingsError(f"another `sphere serve`{pid} has archive.state_dir {state_dir}; stop it first") from None
    except OSError as error:
        log.warning("%s: %s; another `sphere serve` would not be noticed", path, error.strerror)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def write(
    state_dir: Path,
    *,
    pid: int,
    port: int,
    stopping: bool,
    children: Sequence[ChildState],
    spool: SpoolState | None = None,
    web_port: int = 0,
) -> None:
    """Replace the state file atomically; raises OSError."""
    _replace(state_dir, FILE, ServeState(pid, port, now(), stopping, tuple(children), spool, web_port))


def write_spool(state_dir: Path, state: SpoolState) -> None:
    """What the shipper says; a disk that is full must not end it."""
    with suppress(OSError):
        _replace(state_dir, SPOOL_FILE, state)


def write_job(state_dir: Path, state: JobState) -> None:
    """What the extraction says; a disk that is full must not end it."""
    with suppress(OSError):
        _replace(state_dir, JOB_FILE, state)


def write_verify(state_dir: Path, state: VerifyState) -> None:
    """What who reads bundles back says; a disk that is full must not end it."""
    with suppress(OSError):
        _replace(state_dir, VERIFY_FILE, state)


def read_verify(state_dir: Path) -> VerifyState | None:
    """What it said last; None where no bundle was ever read back by itself."""
    try:
        data: dict[str, Any] = orjson.loads((state_dir / VERIFY_FILE).read_bytes())
        return VerifyState(**{**data, "named": tuple(data["named"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_job(state_dir: Path) -> JobState | None:
    """What the extraction said last; None where there was none."""
    try:
        return JobState(**orjson.loads((state_dir / JOB_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _replace(state_dir: Path, name: str, state: ServeState | SpoolState | JobState | VerifyState) -> None:
    make_private(state_dir)
    temporary = state_dir / f".{name}.{os.getpid()}"
    temporary.write_bytes(orjson.dumps(asdict(state), option=orjson.OPT_INDENT_2))
    temporary.replace(state_dir / name)


def read(state_dir: Path) -> ServeState | None:
    """The last state written, None where nothing serves or served; `ServeState.alive` says whether it still holds."""
    try:
        data: dict[str, Any] = orjson.loads((state_dir / FILE).read_bytes())
        children = tuple(ChildState(**child) for child in data.pop("children"))
        spool = data.pop("spool", None)
        return ServeState(**data, children=children, spool=SpoolState(**spool) if spool else None)
    except (OSError, ValueError, TypeError, KeyError):  # none, or of another version
        return None


def read_spool(state_dir: Path) -> SpoolState | None:
    """What a shipper said last; None where there was none."""
    try:
        return SpoolState(**orjson.loads((state_dir / SPOOL_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def remove(state_dir: Path) -> None:
    """Say that nothing serves any more."""
    (state_dir / FILE).unlink(missing_ok=True)
