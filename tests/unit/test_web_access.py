"""Who may ask what over HTTP."""

from __future__ import annotations

import ssl
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from sphere.cli import main
from sphere.conf.errors import SettingsError
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.scp.web.app import make_app
from sphere.scp.web.server import services_of
from sphere.scp.web.tokens import PATH, Role, Tokens
from tests.support.certificates import Authority
from tests.support.oidc import NOW, asked, provided
from tests.support.web import serving_web

pytestmark = pytest.mark.unit

STORE = {"content-type": 'multipart/related; type="application/dicom"; boundary=B'}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return provided(tmp_path_factory.mktemp("access"))


def tokens(settings: Settings) -> Tokens:
    return Tokens(open_storage(settings.storage.root))


def test_from_elsewhere_nothing_without_a_token(far: TestClient) -> None:
    response = far.get("/dicom-web/studies")
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    assert response.headers["content-type"] == "application/problem+json"
    assert far.get("/metrics").status_code == far.get("/wado").status_code == 401
    assert far.get("/healthz").status_code == far.get("/openapi.json").status_code == 200


@pytest.mark.parametrize(
    "value", ["Basic YTpi", "Bearer", "Bearer x", "Bearer sphere_x", "Bearer " + "a" * 20_000, "x"]
)
def test_what_is_no_token(far: TestClient, value: str) -> None:
    assert asked(far, {"authorization": value}) == 401


def test_roles_of_tokens(settings: Settings) -> None:
    known = tokens(settings)
    roles: tuple[Role, ...] = ("reader", "writer", "admin")
    secrets = {role: known.create(f"a {role}", role, None) for role in roles}
    shown = {role: {"authorization": f"Bearer {secret}"} for role, secret in secrets.items()}
    with services_of(settings) as services:
        far = TestClient(make_app(settings, services), client=("10.0.0.5", 40000))
        assert [asked(far, headers) for headers in shown.values()] == [204, 204, 204]
        posts = [asked(far, {**headers, **STORE}, "POST") for headers in shown.values()]
        assert posts == [403, 400, 400]  # the body is empty
        assert [asked(far, headers, "DELETE") for headers in shown.values()] == [403, 403, 405]
    assert not any(secret in open_storage(settings.storage.root).read(PATH).decode() for secret in secrets.values())


def test_a_token_expires_and_is_taken_back(settings: Settings) -> None:
    known = tokens(settings)
    secret = known.create("short", "reader", NOW + timedelta(hours=1))
    assert Tokens(open_storage(settings.storage.root)).check(secret) is not None
    later = Tokens(open_storage(settings.storage.root), clock=lambda: NOW + timedelta(hours=2))
    assert later.check(secret) is None
    [one] = [one for one in known.all() if one.name == "short"]
    known.revoke(one.id)
    assert Tokens(open_storage(settings.storage.root)).check(secret) is None
    with pytest.raises(SettingsError, match="no token"):
        known.revoke(one.id)


def test_the_command(tmp_path: Path) -> None:
    config = tmp_path / "sphere.toml"
    config.write_text('[storage]\nroot = "file:storage"\n')

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["--config", str(config), "token", *arguments])

    made = call("create", "--role", "reader", "--name", "notebook", "--expires", "2h")
    assert made.exit_code == 0 and made.output.startswith("sphere_")
    listed = call("list").output
    assert "reader  notebook  made " in listed and "until " in listed and made.output.strip() not in listed
    assert call("revoke", listed.split()[0]).exit_code == 0
    assert call("list").output == ""
    assert call("create", "--role", "reader", "--name", "x", "--expires", "soon").exit_code == 2


def test_who_is_of_this_host(settings: Settings) -> None:
    def status(**changes: Any) -> int:
        host, auth = changes.get("host", "localhost:8080"), changes.get("auth", "remote")
        changed = settings.model_copy(update={"web": settings.web.model_copy(update={"auth": auth})})
        client = TestClient(make_app(changed, services), client=(changes.get("address", "127.0.0.1"), 1))
        return asked(client, {"host": host})

    with services_of(settings) as services:
        assert status() == status(host="127.0.0.1") == status(address="::1", host="[::1]:80") == 204
        assert status(host="rebound.example") == 401
        assert status(address="10.0.0.5") == 401
        assert status(auth="all") == 401


@pytest.mark.parametrize(
    "name",
    ["Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded", "X-Real-IP", "Via"],
)
def test_what_a_proxy_on_this_host_passes_on_is_not_local(settings: Settings, name: str) -> None:
    """Whoever it is for, and though it calls us by our address, as nginx and Apache do by default."""
    with services_of(settings) as services:
        client = TestClient(make_app(settings, services), client=("127.0.0.1", 1), base_url="http://127.0.0.1:8080")
        assert asked(client) == 204
        for value in ("203.0.113.9", "127.0.0.1", "for=127.0.0.1", "1.1 proxy", ""):
            assert asked(client, {name: value}) == asked(client, {name: value}, "DELETE") == 401
        secret = services.tokens.create("behind a proxy", "reader", None)
        assert asked(client, {name: "203.0.113.9", "authorization": f"Bearer {secret}"}) == 204


def test_https_with_a_token(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ca")
    pair = authority.issue("pacs")
    web = {"tls_certificate": str(pair.path), "tls_key": str(pair.key), "auth": "all"}
    settings = from_dict({"web": web}, base=tmp_path)
    secret = tokens(settings).create("far", "reader", None)
    with serving_web(settings) as running:
        url = f"https://127.0.0.1:{running.port}/dicom-web/studies"
        trusted = ssl.create_default_context(cafile=str(authority.path))
        with httpx.Client(verify=trusted, timeout=60) as client:
            assert client.get(url).status_code == 401
            assert client.get(url, headers={"authorization": f"Bearer {secret}"}).status_code == 204
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http"))
