"""The viewer's files: fetched and changed for their place, and served; what it shows is tested in tests/pages."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from sphere.conf import viewer
from sphere.conf.errors import ExternalMissing
from sphere.scp.web.app import make_app
from sphere.scp.web.server import services_of
from tests.support.landing import archive

pytestmark = pytest.mark.unit

DIST = {
    "index.html": '<script rel="preload" as="script" type="module" src="/init-service-worker.js"></script>'
    '<script>window.PUBLIC_URL="/"</script><script defer src="/app.bundle.0f6159c501addfe9.js"></script>',
    "app.bundle.0f6159c501addfe9.js": "__webpack_require__.p = \"/\"; load('/dicom-microscopy-viewer/x.js')",
    "12.bundle.b4688cdbdd856b75.js": "nothing of its place",
    "app.bundle.css": "src: url(/a34f9d1faa5f3315.woff2)",
    "a34f9d1faa5f3315.woff2": "font",
    "37fa160cc3a47cfd.wasm": "code",
    "app-config.js": "theirs",
    "ort/ort.js": "left out",
    "app.js.map": "left out",
    "assets/one.png": "image",
}
Package = Callable[[dict[str, str]], None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Have npm give a package with these files in `dist`, and it be the pinned one."""

    def give(files: dict[str, str]) -> None:
        path = tmp_path / "package.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for name, text in ({"../LICENSE": "MIT"} | files).items():
                member = tarfile.TarInfo("package/LICENSE" if name == "../LICENSE" else f"package/dist/{name}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        npm = tmp_path / "bin" / "npm"
        npm.parent.mkdir(exist_ok=True)
        npm.write_text(f"#!/bin/sh\ncp '{path}' app.tgz\n")
        npm.chmod(0o755)
        monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        pin = replace(viewer.pinned(), integrity=f"sha512-{digest}")
        monkeypatch.setattr(viewer, "pinned", lambda: pin)

    return give


def test_it_is_made_for_its_place(tmp_path: Path, package: Package) -> None:
    package(DIST)
    target = tmp_path / "viewer"
    assert viewer.install(target)
    app = (target / "app.bundle.0f6159c501addfe9.js").read_text()
    assert app == "__webpack_require__.p = \"/viewer/\"; load('/viewer/dicom-microscopy-viewer/x.js')"
    assert gzip.decompress((target / "app.bundle.0f6159c501addfe9.js.gz").read_bytes()).decode() == app
    index = (target / "index.html").read_text()
    assert 'PUBLIC_URL="/viewer/"' in index and "service-worker" not in index
    assert (target / "app.bundle.css").read_text() == "src: url(/viewer/a34f9d1faa5f3315.woff2)"
    assert (target / "LICENSE").read_text() == "MIT"
    assert not [path for path in ("ort", "app.js.map", "app-config.js") if (target / path).exists()]
    assert not viewer.install(target), "it was there"
    assert sorted(path.name for path in tmp_path.glob("*viewer*")) == ["viewer"]


def test_another_pin_takes_its_place(tmp_path: Path, package: Package) -> None:
    target = tmp_path / "viewer"
    package(DIST)
    viewer.install(target)
    package(DIST | {"new.js": "2"})
    assert viewer.install(target) and (target / "new.js").exists()


def test_what_cannot_be_had_is_said(tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = viewer.pinned()
    package({name: text for name, text in DIST.items() if name != "app.bundle.css"})
    with pytest.raises(ExternalMissing, match=r"no 'url\(/' in app.*another build than was tried"):
        viewer.install(tmp_path / "viewer")
    package(DIST | {"../../outside": "x"})
    with pytest.raises(ExternalMissing, match="holds a file outside of itself"):
        viewer.install(tmp_path / "viewer")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.doc").touch()
    with pytest.raises(ExternalMissing, match="holds something else than a viewer"):
        viewer.install(tmp_path / "taken")
    monkeypatch.setattr(viewer, "pinned", lambda: pin)
    with pytest.raises(ExternalMissing, match=r"SHA-512 is .*another is pinned in viewer\.toml"):
        viewer.install(tmp_path / "viewer")
    (tmp_path / "bin" / "npm").write_text("#!/bin/sh\necho 'E404 not found' >&2; exit 1\n")
    with pytest.raises(ExternalMissing, match=r"could not be fetched \(npm ended with 1\): E404 not found"):
        viewer.install(tmp_path / "viewer")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExternalMissing, match="npm is missing: install it"):
        viewer.install(tmp_path / "viewer")
    assert not (tmp_path / "viewer").exists() and not list(tmp_path.glob(".viewer-*"))


@pytest.fixture
def far(tmp_path: Path, package: Package) -> Iterator[TestClient]:
    """A client of another host, without a token."""
    package(DIST)
    viewer.install(tmp_path / "viewer")
    settings = archive(tmp_path / "archive", web={"viewer_dir": str(tmp_path / "viewer")})
    with services_of(settings) as services:
        client = TestClient(make_app(settings, services), client=("10.0.0.5", 40000), base_url="http://pacs.example")
        client.headers["accept-encoding"] = "identity"
        yield client


def test_pages_and_files(far: TestClient) -> None:
    page = far.get("/viewer/viewer?StudyInstanceUIDs=1.2.3")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text == far.get("/viewer").text == far.get("/viewer/").text == far.get("/viewer/index.html").text
    digest = base64.b64encode(hashlib.sha256(b'window.PUBLIC_URL="/viewer/"').digest()).decode()
    assert f"'sha256-{digest}'" in page.headers["content-security-policy"]
    again = far.get("/viewer/", headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    types = {
        "app.bundle.0f6159c501addfe9.js": "text/javascript; charset=utf-8",
        "37fa160cc3a47cfd.wasm": "application/wasm",
        "a34f9d1faa5f3315.woff2": "font/woff2",
        "assets/one.png": "image/png",
        "LICENSE": "text/html; charset=utf-8",  # no suffix: a page of the viewer's
    }
    for name, expected in types.items():
        assert far.get(f"/viewer/{name}").headers["content-type"] == expected, name
    settings = far.get("/viewer/app-config.js").text
    assert "routerBasename: '/viewer'" in settings and "/dicom-web" in settings


def test_compressed_and_kept(far: TestClient) -> None:
    url = "/viewer/app.bundle.0f6159c501addfe9.js"
    plain, packed = far.get(url), far.get(url, headers={"accept-encoding": "gzip, br"})
    assert packed.headers["content-encoding"] == "gzip" and packed.content == plain.content
    assert packed.headers["content-type"] == plain.headers["content-type"]
    assert packed.headers["etag"] != plain.headers["etag"] and packed.headers["vary"] == "Accept-Encoding"
    assert "immutable" in plain.headers["cache-control"]
    for name in ("app.bundle.css", "index.html", "app-config.js"):
        assert far.get(f"/viewer/{name}").headers["cache-control"] == "no-cache", name


@pytest.mark.parametrize(
    "path",
    ["none.js", "..%2f..%2fsphere.toml", "%2fetc%2fhosts.txt", "%00.js", pytest.param("a" * 300 + ".js", id="long")],
)
def test_what_is_not_the_viewers(far: TestClient, path: str) -> None:
    response = far.get(f"/viewer/{path}")
    assert (response.status_code, response.json()["detail"]) == (404, "the viewer has no such file")


def test_only_its_files_are_open(far: TestClient) -> None:
    assert far.get("/dicom-web/studies").status_code == 401
    assert far.get("/viewer/../dicom-web/studies").status_code == 401
    assert far.post("/viewer/index.html").status_code == 405


def test_none_is_installed(tmp_path: Path) -> None:
    settings = archive(tmp_path, web={"viewer_dir": str(tmp_path / "none")})
    with services_of(settings) as services:
        response = TestClient(make_app(settings, services), base_url="http://localhost", client=("127.0.0.1", 1)).get(
            "/viewer/viewer"
        )
    assert response.status_code == 404 and "make viewer" in response.json()["detail"]
