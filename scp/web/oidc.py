"""Bearer tokens of an OpenID Connect provider: JWTs, checked against its key set."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

import jwt

from sphere.conf.settings import Web
from sphere.scp.web.tokens import ROLES, Role

log = logging.getLogger(__name__)

ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
LEEWAY_S: Final = 30  # between the clocks of the provider and of this host
FETCH_S: Final = 10  # seconds that a key set may take to come
MAX_KEYS: Final = 1 << 20  # bytes of a key set
FRESH_S: Final = 600.0  # seconds that a key set is used
AGAIN_S: Final = 30.0  # seconds between looks for a key that is not in it: keys were rotated, or somebody guesses


@dataclass(frozen=True, slots=True)
class Known:
    """Whose token it is: its subject, the highest of its roles, if any, and what a researcher is granted, by name."""

    subject: str
    role: Role | None
    collections: tuple[str, ...] = ()
    cohorts: tuple[str, ...] = ()


def _listed(claims: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """The texts of a claim: a list, or one; full stops lead into objects."""
    found: Any = claims
    for name in path.split(".") if path else ():
        found = found.get(name) if isinstance(found, dict) else None
    listed = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return tuple(one for one in listed if isinstance(one, str))


def _keys_of(data: bytes) -> dict[str, Any]:
    """The keys of a set by their ids; raises ValueError where it is none."""
    try:
        return {one.key_id or "": one.key for one in jwt.PyJWKSet.from_dict(json.loads(data)).keys}
    except (jwt.PyJWTError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"no key set ({type(error).__name__})") from None


class Oidc:
    """One provider. Safe to share between threads."""

    def __init__(self, settings: Web, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._changed = threading.Condition()
        self._keys: dict[str, Any] = {}
        self._read_at = float("-inf")
        self._reading = False

    def check(self, token: str) -> Known | None:
        """Whose a valid token is; None where it is not."""
        try:
            key = self._key(str(jwt.get_unverified_header(token).get("kid", "")))
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(ALGORITHMS),
                audience=self._settings.oidc_audience,
                issuer=self._settings.oidc_issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, LookupError, ValueError, OSError) as error:
            log.warning("bearer token refused: %s", type(error).__name__)
            return None
        named = _listed(claims, self._settings.oidc_roles_claim)
        role = next((role for role in reversed(ROLES) if role in named), None)
        collections = _listed(claims, self._settings.oidc_collections_claim)
        return Known(str(claims["sub"]), role, collections, _listed(claims, self._settings.oidc_cohorts_claim))

    def _key(self, kid: str) -> Any:
        """The key of this id; raises LookupError, and OSError or ValueError where no set can be had.

        The set is read again where it is old, or has no such key, by the one caller who notices; the others answer by
        the set that is known, and wait for the very first only.
        """
        with self._changed:
            age = self._clock() - self._read_at
            if self._reading or not (age > FRESH_S or (kid not in self._keys and age > AGAIN_S)):
                if not self._keys:
                    self._changed.wait_for(lambda: not self._reading, FETCH_S)
                return self._keys[kid]
            self._reading, self._read_at = True, self._clock()
        keys = None
        try:
            keys = _keys_of(self._fetch())
        finally:
            with self._changed:
                self._reading = False
                self._keys = self._keys if keys is None else keys
                self._changed.notify_all()
        return keys[kid]

    def _fetch(self) -> bytes:
        """What the provider gives; raises OSError and ValueError."""
        where = self._settings.oidc_jwks
        if not where.startswith(("https://", "http://")):
            return Path(where).read_bytes()
        ends = time.monotonic() + FETCH_S  # of all of it: the timeout below is that of each piece
        data = b""
        try:
            with urllib.request.urlopen(where, timeout=FETCH_S) as answer:  # only these two schemes come here
                while piece := answer.read1(MAX_KEYS + 1 - len(data)):
                    data += piece
                    if time.monotonic() > ends:
                        raise TimeoutError("the key set takes too long")
                if len(data) <= MAX_KEYS and answer.length:
                    raise ValueError("the key set breaks off")
        except HTTPException as error:  # neither an OSError nor a ValueError
            raise ValueError(f"no answer of HTTP ({type(error).__name__})") from None
        if len(data) > MAX_KEYS:
            raise ValueError("the key set is too large")
        return data
