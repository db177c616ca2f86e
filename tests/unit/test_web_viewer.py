"""The viewer's files: fetched and changed for their place, and served; what it shows is tested in tests/pages."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import platform
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
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
    '<script>window.PUBLIC_URL="/"</script><title>OHIF</title>'
    '<script defer src="/app.bundle.0f6159c501addfe9.js"></script>',
    "app.bundle.0f6159c501addfe9.js": "__webpack_require__.p = \"/\"; load('/dicom-microscopy-viewer/x.js');\n"
    "set({ webGlContextCount: 7, }); for (; i < ModalitiesInStudy.Value.length;) {}"
    "const { CodeValue } = ConceptNameCodeSequence;",
    "12.bundle.b4688cdbdd856b75.js": "nothing of its place",
    "app.bundle.css": "src: url(/a34f9d1faa5f3315.woff2)",
    "a34f9d1faa5f3315.woff2": "font",
    "37fa160cc3a47cfd.wasm": "code",
    "app-config.js": "theirs",
    "ort/ort.js": "left out",
    "app.js.map": "left out",
    "assets/one.png": "image",
    "manifest.json": '{"src": "/assets/one.png"}',
}
APP = "app.bundle.0f6159c501addfe9.js"
ESBUILD = """#!/bin/sh
for one in "$@"; do case $one in --outdir=*) out=${one#*=};; -*) ;; *) tr -d ' ' <"$one" >"$out/${one##*/}";; esac; done
touch "$out/app.bundle.0f6159c501addfe9.js.LEGAL.txt"
"""
NPM = """#!/bin/sh
for one in "$@"; do case $one in
@ohif*) cp '{folder}/viewer.tgz' .;; @esbuild*) cp '{folder}/esbuild.tgz' .;; esac; done
"""
Package = Callable[..., None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Have npm give a package with these files in `dist`, and a minifier that leaves out blanks; both are the pinned
    ones."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    def give(files: dict[str, str], *, esbuild: str = ESBUILD, start: tuple[str, ...] = ("12",)) -> None:
        named = {f"package/dist/{name}": text for name, text in files.items()}
        viewer_pin = packed(tmp_path / "viewer.tgz", {"package/LICENSE": "MIT"} | named)
        minifier_pin = packed(
            tmp_path / "esbuild.tgz", {"package/bin/esbuild": esbuild} if esbuild else {"package/x": ""}
        )
        script(tmp_path / "bin" / "npm", NPM.format(folder=tmp_path))
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        pins = {
            "viewer": {"package": "@ohif/app", "version": "3", "integrity": viewer_pin, "start": list(start)},
            "minifier": {"version": "1", "integrity": {"linux-x64": minifier_pin}},
        }
        monkeypatch.setattr(viewer, "pinned", lambda: pins)

    return give


def packed(path: Path, files: dict[str, str]) -> str:
    """Make a package; returns its digest as npm writes it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_it_is_made_for_its_place(tmp_path: Path, package: Package) -> None:
    package(DIST)
    target = tmp_path / "viewer"
    assert viewer.install(target) == viewer.Installed(new=True)
    app = (target / APP).read_text()
    assert app == (
        "__webpack_require__.p=\"/viewer/\";load('/viewer/dicom-microscopy-viewer/x.js');\nset({webGlContextCount:1,});"
        "for(;i<(ModalitiesInStudy.Value||[]).length;){}const{CodeValue}=ConceptNameCodeSequence||{};"
    )
    assert gzip.decompress((target / f"{APP}.gz").read_bytes()).decode() == app
    assert zstd((target / f"{APP}.zst").read_bytes()).decode() == app
    index = (target / "index.html").read_text()
    assert 'PUBLIC_URL="/viewer/"' in index and "service-worker" not in index
    assert '<link rel="preload" as="script" href="/viewer/12.bundle.b4688cdbdd856b75.js"><title>' in index
    assert (target / "12.bundle.b4688cdbdd856b75.js").read_text() == "nothingofitsplace"
    assert (target / "app.bundle.css").read_text() == "src: url(/viewer/a34f9d1faa5f3315.woff2)"
    assert (target / "manifest.json").read_text() == '{"src": "/viewer/assets/one.png"}'
    assert (target / "LICENSE").read_text() == "MIT" and (target / f"{APP}.LEGAL.txt").exists()
    assert not [path for path in ("ort", "app.js.map", "app-config.js") if (target / path).exists()]
    assert viewer.install(target) == viewer.Installed(new=False), "it was there"
    assert sorted(path.name for path in tmp_path.glob("*viewer")) == ["viewer"]


def zstd(data: bytes) -> bytes:
    return pa.input_stream(pa.py_buffer(data), compression="zstd").read()  # type: ignore[no-any-return]


FAILS = "#!/bin/sh\necho 'too old a system' >&2; exit 3\n"


@pytest.mark.parametrize(
    ("esbuild", "told"),
    [(FAILS, "esbuild ended with 3: too old a system"), ("", "no package/bin/esbuild"), ("\0", "esbuild did not run")],
    ids=["fails", "is not there", "is no program"],
)
def test_without_a_minifier_it_is_as_it_comes(tmp_path: Path, package: Package, esbuild: str, told: str) -> None:
    package(DIST, esbuild=esbuild)
    target = tmp_path / "viewer"
    done = viewer.install(target)
    assert done.new and told in done.plain
    assert "webGlContextCount: 1," in (target / APP).read_text()
    assert (target / "12.bundle.b4688cdbdd856b75.js").read_text() == "nothing of its place"
    package(DIST)
    assert viewer.install(target) == viewer.Installed(new=True), "it is tried again"
    assert "webGlContextCount:1," in (target / APP).read_text()


def test_where_no_minifier_is_had_nothing_is_fetched_again(
    tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package(DIST)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    viewer.main([str(tmp_path / "viewer")])
    (tmp_path / "viewer.tgz").unlink()
    assert viewer.install(tmp_path / "viewer") == viewer.Installed(False, "no esbuild is pinned for linux-riscv64")
    viewer.main([str(tmp_path / "viewer")])
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in told[::2]] == ["@ohif/app 3 is now", "@ohif/app 3 was already"]
    assert "not minified, so that a first visit takes longer: no esbuild is pinned" in told[1] and told[3] == told[1]


def test_another_pin_takes_its_place(tmp_path: Path, package: Package) -> None:
    target = tmp_path / "viewer"
    package(DIST)
    viewer.install(target)
    package(DIST | {"new.js": "2"})
    assert viewer.install(target).new and (target / "new.js").exists()


def test_what_cannot_be_had_is_said(tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    package({name: text for name, text in DIST.items() if name != "app.bundle.css"})
    with pytest.raises(ExternalMissing, match=r"no 'url\(/' in app.*another build than was tried"):
        viewer.install(tmp_path / "viewer")
    with pytest.raises(ExternalMissing, match="no chunk 77: another build than was tried"):
        package(DIST, start=("77",))
        viewer.install(tmp_path / "viewer")
    with pytest.raises(ExternalMissing, match=r"no '<title>' in index\.html"):
        package(DIST | {"index.html": DIST["index.html"].replace("<title>", "")})
        viewer.install(tmp_path / "viewer")
    package(DIST | {"../../outside": "x"})
    with pytest.raises(ExternalMissing, match="holds a file outside of itself"):
        viewer.install(tmp_path / "viewer")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.doc").touch()
    with pytest.raises(ExternalMissing, match="holds something else than a viewer"):
        viewer.install(tmp_path / "taken")
    package(DIST)
    viewer.pinned()["viewer"]["integrity"] = "sha512-another"
    with pytest.raises(ExternalMissing, match=r"viewer\.tgz: SHA-512 is .*another is pinned"):
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
    plain = far.get(url)
    seen = {plain.headers["etag"]}
    for taken, coding in (("gzip, br", "gzip"), ("gzip, br, zstd", "zstd"), ("zstd;q=0, gzip;q=0.5", "gzip")):
        with far.stream("GET", url, headers={"accept-encoding": taken}) as packed:
            data = b"".join(packed.iter_raw())
        assert packed.headers["content-encoding"] == coding and packed.headers["vary"] == "Accept-Encoding"
        assert (gzip.decompress if coding == "gzip" else zstd)(data) == plain.content
        assert packed.headers["content-type"] == plain.headers["content-type"]
        seen.add(packed.headers["etag"])
    assert len(seen) == 3, "an entity tag of its own for each coding"
    for taken in ("", "gzip;q=0, zstd;q=0.000", "*;q=0", "x-gzip"):
        assert "content-encoding" not in far.get(url, headers={"accept-encoding": taken}).headers, taken
    assert "immutable" in plain.headers["cache-control"]
    for name in ("app.bundle.css", "index.html", "app-config.js"):
        assert far.get(f"/viewer/{name}").headers["cache-control"] == "no-cache", name


def test_the_service_worker_is_of_one_build(tmp_path: Path, far: TestClient) -> None:
    """It names the scripts that the page names, whose names say what is in them, and nothing else."""
    worker = far.get("/viewer/service-worker.js")
    assert worker.headers["content-type"] == "text/javascript; charset=utf-8"
    assert worker.headers["cache-control"] == "no-cache"
    assert worker.headers["content-security-policy"] == "default-src 'none'; connect-src 'self'"
    [files] = re.findall("const FILES = (.*);", worker.text)
    assert json.loads(files) == [f"/viewer/{name}" for name in ("12.bundle.b4688cdbdd856b75.js", APP)]
    [build] = re.findall('const CACHE = "(viewer-[0-9a-f]{16})";', worker.text)
    assert far.get("/viewer/service-worker.js").text == worker.text
    for changed in (viewer.STAMP, "index.html"):
        with (tmp_path / "viewer" / changed).open("a") as file:
            file.write(" ")
        [other] = re.findall('const CACHE = "(.*)";', far.get("/viewer/service-worker.js").text)
        assert other != build
        build = other


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
        client = TestClient(make_app(settings, services), base_url="http://localhost", client=("127.0.0.1", 1))
        for path in ("/viewer/viewer", "/viewer/service-worker.js"):
            response = client.get(path)
            assert response.status_code == 404 and "make viewer" in response.json()["detail"]
