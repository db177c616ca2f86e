"""Behind reverse proxies: whom they ask for is recorded, links are theirs, and nobody becomes local by them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from sphere.conf.errors import SettingsError
from sphere.conf.loading import from_dict
from sphere.conf.settings import Settings
from sphere.scp.web.app import Services, make_app
from sphere.scp.web.protocol import Crowd
from sphere.scp.web.proxies import Trusted
from sphere.scp.web.server import services_of
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.unit.test_web_audit import records

pytestmark = pytest.mark.unit

ONE = new_member(slices(1)[0])
STUDY = f"/studies/{ONE.StudyInstanceUID}"
PUBLIC = "https://pacs.example/archive"
PROXIES = ["10.1.0.0/16", "127.0.0.1", "fd00::1"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    found = archive(tmp_path_factory.mktemp("proxies"), web={"trusted_proxies": PROXIES})
    land(found, [new_member(one) for one in slices(3)])
    extract(found)
    return found


@pytest.fixture(scope="module")
def services(settings: Settings) -> Iterator[Services]:
    with services_of(settings) as found:
        yield found


def client_at(settings: Settings, services: Services, address: str, **web: Any) -> TestClient:
    changed = settings.model_copy(update={"web": settings.web.model_copy(update=web)})
    return TestClient(make_app(changed, services), client=(address, 1), base_url="http://127.0.0.1:8080")


@pytest.mark.parametrize(
    ("peer", "headers", "recorded"),
    [
        ("10.1.0.1", {}, "10.1.0.1"),
        ("10.1.0.1", {"x-forwarded-for": "203.0.113.9"}, "203.0.113.9"),
        ("10.1.0.1", {"x-forwarded-for": "198.51.100.7, 203.0.113.9"}, "203.0.113.9"),
        ("10.1.0.1", {"x-forwarded-for": "203.0.113.9,10.1.0.2"}, "203.0.113.9"),
        ("10.1.0.1", {"x-forwarded-for": "10.1.0.3, 10.1.0.2"}, "10.1.0.3"),
        ("10.1.0.1", {"x-forwarded-for": "203.0.113.9:4711"}, "203.0.113.9"),
        ("10.1.0.1", {"x-forwarded-for": "[2001:db8::1]:4711"}, "2001:db8::1"),
        ("10.1.0.1", {"x-forwarded-for": "2001:db8::1"}, "2001:db8::1"),
        ("10.1.0.1", {"x-forwarded-for": "::ffff:203.0.113.9"}, "203.0.113.9"),
        ("10.1.0.1", {"x-forwarded-for": "203.0.113.9, unknown"}, "10.1.0.1"),
        ("10.1.0.1", {"x-forwarded-for": "unknown, 10.1.0.2"}, "10.1.0.2"),
        ("10.1.0.1", {"x-forwarded-for": ""}, "10.1.0.1"),
        ("10.1.0.1", {"x-forwarded-for": "127.0.0.1"}, "127.0.0.1"),
        ("10.1.0.1", {"x-real-ip": "203.0.113.9"}, "10.1.0.1"),
        ("10.1.0.1", {"forwarded": "for=203.0.113.9;proto=https"}, "203.0.113.9"),
        ("10.1.0.1", {"forwarded": 'For="[2001:db8::1]:4711";by=x, for=10.1.0.2'}, "2001:db8::1"),
        ("10.1.0.1", {"forwarded": "for=_hidden"}, "10.1.0.1"),
        ("10.1.0.1", {"forwarded": "proto=https"}, "10.1.0.1"),
        ("10.1.0.1", {"forwarded": ';;=,"'}, "10.1.0.1"),
        ("10.1.0.1", {"forwarded": "for=1.1.1.1", "x-forwarded-for": "203.0.113.9"}, "10.1.0.1"),
        ("127.0.0.1", {"x-forwarded-for": "203.0.113.9"}, "203.0.113.9"),
        ("fd00::1", {"x-forwarded-for": "203.0.113.9"}, "203.0.113.9"),
        ("10.2.0.1", {"x-forwarded-for": "203.0.113.9"}, "10.2.0.1"),
        ("10.2.0.1", {"x-forwarded-for": "10.1.0.1"}, "10.2.0.1"),
        ("10.2.0.1", {"forwarded": "for=203.0.113.9"}, "10.2.0.1"),
    ],
)
def test_the_address_is_that_of_who_asked_the_proxy(
    settings: Settings, services: Services, peer: str, headers: dict[str, str], recorded: str
) -> None:
    """The last that is no trusted proxy, and only where a trusted one says so."""
    response = client_at(settings, services, peer).get("/dicom-web/studies", headers=headers)
    assert response.status_code == 401
    services.journal.flush()
    assert records(settings)[-1]["address"] == recorded


@pytest.mark.parametrize(
    "headers", [{}, {"x-forwarded-for": "127.0.0.1"}, {"forwarded": "for=127.0.0.1"}, {"x-forwarded-proto": "http"}]
)
@pytest.mark.parametrize("peer", ["127.0.0.1", "10.1.0.1"])
def test_what_a_trusted_proxy_sends_is_never_local(
    settings: Settings, services: Services, peer: str, headers: dict[str, str]
) -> None:
    """Also where it writes nothing, and asks from this host: it shows a token."""
    client = client_at(settings, services, peer)
    assert client.get("/dicom-web/studies", headers=headers).status_code == 401
    assert client.delete(f"/dicom-web{STUDY}", headers=headers).status_code == 401
    assert client_at(settings, services, "127.0.0.1", trusted_proxies=()).get("/status").status_code == 200


def test_links_are_those_of_the_proxy(settings: Settings, services: Services) -> None:
    """Every URL in an answer, whatever the Host header says."""
    client = client_at(settings, services, "127.0.0.1", trusted_proxies=(), public_url=PUBLIC)
    service = f"{PUBLIC}/dicom-web"
    searched = client.get("/dicom-web/instances?limit=1&count=true&includefield=all")
    assert searched.json()[0]["00081190"]["Value"][0].startswith(f"{service}{STUDY}/series/")
    link = searched.headers["link"]
    assert link.startswith(f"<{service}/instances?") and link.endswith('>; rel="next"')
    followed = client.get(link[1:].partition(">")[0].replace(PUBLIC, ""))
    assert followed.status_code == 200 and followed.json() != searched.json()
    [header, *_] = client.get(f"/dicom-web{STUDY}/metadata").json()
    bulk = header["7FE00010"]["BulkDataURI"]
    assert bulk.startswith(f"{service}{STUDY}/") and client.get(bulk.replace(PUBLIC, "")).status_code == 200
    body = b"--B\r\nContent-Type: application/dicom\r\n\r\n" + slices(1, study=9)[0] + b"\r\n--B--\r\n"
    kind = {"content-type": 'multipart/related; type="application/dicom"; boundary=B'}
    stored = client.post("/dicom-web/studies", content=body, headers=kind).json()
    assert stored["00081190"]["Value"][0].startswith(f"{service}/studies/")
    assert stored["00081199"]["Value"][0]["00081190"]["Value"][0].startswith(f"{service}/studies/")
    wadl = client.options("/dicom-web", headers={"accept": "application/vnd.sun.wadl+xml"})
    assert f'base="{PUBLIC}/"' in wadl.text
    for one in (searched.text, link, bulk, str(stored), wadl.text):
        assert "127.0.0.1" not in one


def test_without_a_public_url_the_scheme_is_the_proxys(settings: Settings, services: Services) -> None:
    secret = services.tokens.create("proxied", "reader", None)
    shown = {"authorization": f"Bearer {secret}", "host": "pacs.example"}

    def begins(peer: str, **headers: str) -> str:
        client = client_at(settings, services, peer)
        [found] = client.get("/dicom-web/studies?limit=1", headers={**shown, **headers}).json()
        return str(found["00081190"]["Value"][0]).partition("/dicom-web")[0]

    assert begins("10.1.0.1", **{"x-forwarded-proto": "https"}) == "https://pacs.example"
    assert begins("10.1.0.1", forwarded="for=1.2.3.4;proto=https") == "https://pacs.example"
    assert begins("10.1.0.1", **{"x-forwarded-proto": "javascript"}) == "http://pacs.example"
    assert begins("10.2.0.1", **{"x-forwarded-proto": "https"}) == "http://pacs.example"


@pytest.mark.parametrize(
    "url",
    ["pacs.example", "ftp://pacs.example", "https://", "https:///dicom", "https://a:b@c", "https://x?y", "https://x#y",
     "https://x:port", "https://x:0", "https://x y", 'https://x">', "javascript:alert(1)", "https://[::1"],
)  # fmt: skip
def test_a_public_url_that_is_none(tmp_path: Path, url: str) -> None:
    with pytest.raises(SettingsError, match=r"web\.public_url: must be such as https://pacs\.example"):
        from_dict({"web": {"public_url": url}}, base=tmp_path)


def test_settings_of_proxies(tmp_path: Path) -> None:
    web = from_dict({"web": {"public_url": "https://x.org:8443/pacs/", "trusted_proxies": "::1"}}, base=tmp_path).web
    assert (web.public_url, web.trusted_proxies) == ("https://x.org:8443/pacs", ("::1",))
    with pytest.raises(SettingsError, match=r"trusted_proxies\.0: is neither an IP address nor a network"):
        from_dict({"web": {"trusted_proxies": ["proxy.example"]}}, base=tmp_path)


def test_a_trusted_proxy_has_connections_for_all_its_clients() -> None:
    class Connection:
        address, crowded, idle, since = "10.1.0.1", False, False, 0.0

    one: Any = Connection()
    assert "2 connections at once" in Crowd(4, 2).refused(one, [one, one])
    assert Crowd(4, 2, Trusted(PROXIES)).refused(one, [one, one, one]) == ""
    assert "4 connections at once" in Crowd(4, 2, Trusted(PROXIES)).refused(one, [one] * 4)
