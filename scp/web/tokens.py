"""API tokens: made once, shown once, and kept as hashes only, beside the bytes that they open."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, Final, Literal

import orjson

from sphere.conf.errors import SettingsError, StorageMissing
from sphere.ingest.storage.base import Storage

log = logging.getLogger(__name__)

Role = Literal["researcher", "reader", "writer", "admin"]
ROLES: Final[tuple[Role, ...]] = ("researcher", "reader", "writer", "admin")
"""Each may what those before it may: read what is granted; read; store; everything."""
PATH: Final = "access/tokens.json"
PREFIX: Final = "sphere_"  # so that scanners for leaked secrets can know one
FRESH_S: Final = 2.0  # seconds that what was read is used


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept of a token. Times are ISO 8601, UTC; `expires` "" for never. `collections` and `cohorts` are what a
    researcher is granted, by name."""

    id: str
    name: str
    role: Role
    sha256: str
    created: str
    expires: str
    collections: tuple[str, ...] = ()
    cohorts: tuple[str, ...] = ()

    def expired(self, now: datetime) -> bool:
        """Whether it no longer opens anything."""
        return bool(self.expires) and datetime.fromisoformat(self.expires) <= now


class Tokens:
    """The tokens of an archive. Safe to share between threads; one process changes them at a time."""

    def __init__(self, storage: Storage, *, clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc)) -> None:
        self._storage, self._clock = storage, clock
        self._lock = threading.Lock()
        self._known: dict[str, Token] = {}
        self._read_at = -FRESH_S

    def create(
        self,
        name: str,
        role: Role,
        expires: datetime | None,
        *,
        collections: Sequence[str] = (),
        cohorts: Sequence[str] = (),
    ) -> str:
        """A new token; only its hash is kept. Raises SettingsError where role and what is granted do not go together,
        and StorageError."""
        if (role == "researcher") != bool(collections or cohorts):
            raise SettingsError("a researcher needs a collection or a cohort to see, and no other role has any")
        secret = PREFIX + secrets.token_urlsafe(32)
        digest = _hashed(secret)
        now = self._clock().isoformat(timespec="seconds")
        until = expires.astimezone(timezone.utc).isoformat(timespec="seconds") if expires else ""
        made = Token(digest[:8], name, role, digest, now, until, tuple(collections), tuple(cohorts))
        self._write([*self.all(), made])
        return secret

    def revoke(self, id: str) -> Token:
        """Forget a token by its id; raises SettingsError where there is none."""
        tokens = self.all()
        for token in tokens:
            if token.id == id:
                self._write([one for one in tokens if one is not token])
                return token
        raise SettingsError(f"there is no token {id!r}; `sphere token list` names them")

    def all(self) -> list[Token]:
        """Every token, expired ones too; raises StorageError."""
        try:
            found: list[dict[str, Any]] = orjson.loads(self._storage.read(PATH))
        except StorageMissing:
            return []
        granted = ("collections", "cohorts")
        return [Token(**{**one, **{name: tuple(one.get(name, ())) for name in granted}}) for one in found]

    def check(self, secret: str) -> Token | None:
        """The token that a client shows, if it is one and has not expired; raises StorageError."""
        digest = _hashed(secret)
        with self._lock:
            if time.monotonic() - self._read_at >= FRESH_S:
                self._known = {token.sha256: token for token in self.all()}
                self._read_at = time.monotonic()
            token = self._known.get(digest)
        if token is None or not hmac.compare_digest(token.sha256, digest) or token.expired(self._clock()):
            return None
        return token

    def _write(self, tokens: list[Token]) -> None:
        self._storage.write(PATH, orjson.dumps([asdict(one) for one in tokens], option=orjson.OPT_INDENT_2))


def _hashed(secret: str) -> str:
    """Of 256 random bits: a plain hash is enough, there is nothing to guess."""
    return hashlib.sha256(secret.encode()).hexdigest()
