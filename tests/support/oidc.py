"""A provider of OpenID Connect: its keys, its key set in a file, and bearer tokens of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.testclient import TestClient

from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.scp.web.app import make_app
from sphere.scp.web.server import services_of

KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
NOW = datetime.now(timezone.utc)


def jwks(path: Path, **keys: rsa.RSAPrivateKey) -> Path:
    """Write the key set with these keys, by key id."""
    entries = [
        {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key())), "kid": kid} for kid, key in keys.items()
    ]
    path.write_text(json.dumps({"keys": entries}))
    return path


def bearer(key: Any = KEY, kid: str = "one", algorithm: str = "RS256", **changes: Any) -> dict[str, str]:
    """The header with a token whose claims are those of a reader but for the `changes`; None leaves one out."""
    claims = {
        "iss": "https://issuer",
        "aud": "sphere",
        "sub": "anna",
        "exp": NOW + timedelta(hours=1),
        "roles": ["reader"],
    }
    claims = {name: value for name, value in {**claims, **changes}.items() if value is not None}
    return {"authorization": f"Bearer {jwt.encode(claims, key, algorithm, headers={'kid': kid})}"}


def provided(folder: Path) -> Settings:
    """Settings of an archive that takes tokens of this provider; its key set is ``keys.json``."""
    jwks(folder / "keys.json", one=KEY)
    web = {"oidc_issuer": "https://issuer", "oidc_audience": "sphere", "oidc_jwks": "keys.json"}
    return from_dict({"web": web}, base=folder)


@contextmanager
def far_client(settings: Settings) -> Iterator[TestClient]:
    """A client of another host."""
    with services_of(settings) as services:
        yield TestClient(make_app(settings, services), client=("10.0.0.5", 40000), base_url="http://pacs.example")


def asked(client: TestClient, headers: dict[str, str] | None = None, method: str = "GET") -> int:
    """The status for a list of studies."""
    return client.request(method, "/dicom-web/studies", headers=headers or {}).status_code
