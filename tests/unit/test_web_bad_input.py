"""Every kind of bad input that the web has to stand: a right 4xx with a problem body, and nothing half stored.

More of each kind is tested where the code is: bodies of STOW-RS, annotations, searches, and heads.
"""

from __future__ import annotations

import functools
import gzip
import io
import select
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pydicom
import pytest

from sphere.ingest.header import identify
from sphere.scp.web import incoming, stow
from sphere.scp.web.accept import parse
from sphere.scp.web.problem import WebError
from tests.support.landing import archive, land, new_member
from tests.support.memory import peak
from tests.support.web import Web, serving_web, until_closed

pytestmark = pytest.mark.unit

FILE = (Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm").read_bytes()
FOUND = identify(FILE, size=len(FILE))
INSTANCE = (
    f"/dicom-web/studies/{FOUND.StudyInstanceUID}/series/{FOUND.SeriesInstanceUID}/instances/{FOUND.SOPInstanceUID}"
)
STOW, NOTES = "/dicom-web/studies", "/annotations?level=study&allow_unknown=true&uid="
XML, JSON, DICOM = "application/dicom+xml", "application/dicom+json", "application/dicom"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("web"), web={"idle_s": 1}, annotations={"limit_mib": 1})
    land(settings, [new_member(FILE)])
    with serving_web(settings) as running:  # what comes later takes memory of its own, and not that of libraries
        running.client.post(f"http://127.0.0.1:{running.port}{NOTES}1.2", content=b"x")
        yield running


def stored(settings_root: Path) -> dict[Path, int]:
    """Sizes of the files that hold what somebody sent; an open bundle has none before something landed in it."""
    kept = ("bundles", "annotations", "incoming", "spool")
    return {
        file: file.stat().st_size
        for file in sorted(settings_root.rglob("*"))
        if file.is_file() and set(file.relative_to(settings_root).parts) & set(kept)
    }


def part(kind: str, data: bytes) -> bytes:
    return f"--B\r\nContent-Type: {kind}\r\n\r\n".encode() + data + b"\r\n--B--\r\n"


def related(kind: str, boundary: str = "B") -> dict[str, str]:
    return {"content-type": f'multipart/related; type="{kind}"; boundary={boundary}'}


@functools.cache
def zipped(size: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.dcm", bytes(size))
    return out.getvalue()


SIZE = 64 << 20  # of what a bomb unfolds to
QUADRATIC = b'<!DOCTYPE x [<!ENTITY a "' + b"a" * 50_000 + b'">]><NativeDicomModel>' + b"&a;" * 50_000
OUTSIDE = b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]><NativeDicomModel>&e;</NativeDicomModel>'
PARAMETER = b'<!DOCTYPE x SYSTEM "http://127.0.0.1:1/x.dtd"><NativeDicomModel/>'
NUMBERED = '<DicomAttribute tag="{:08X}" vr="US"><Value number="65536">1</Value></DicomAttribute>'
SPARSE = f"<NativeDicomModel>{''.join(map(NUMBERED.format, range(2500)))}</NativeDicomModel>".encode()
NESTED = b"<NativeDicomModel>" + b'<DicomAttribute tag="00081140" vr="SQ"><Item number="1">' * 20_000


@pytest.mark.parametrize(
    ("path", "headers", "body", "statuses"),
    [
        pytest.param(STOW, related("application/zip"), part("application/zip", zipped(SIZE)), (415,), id="zip-bomb"),
        pytest.param(STOW, related(DICOM), part(DICOM, zipped(SIZE)), (409,), id="zip-bomb-as-dicom"),
        pytest.param(STOW, {**related(DICOM), "content-encoding": "gzip"}, gzip.compress(bytes(SIZE)), (400, 415),
                     id="gzip-bomb"),
        pytest.param(STOW, related(XML), part(XML, QUADRATIC), (400,), id="entity-expansion"),
        pytest.param(STOW, related(XML), part(XML, SPARSE), (409,), id="numbers-far-apart"),
        pytest.param(STOW, related(XML), part(XML, OUTSIDE), (400,), id="external-entity"),
        pytest.param(STOW, related(XML), part(XML, PARAMETER), (400,), id="external-dtd"),
        pytest.param(STOW, related(XML), part(XML, NESTED), (400,), id="xml-nested"),
        pytest.param(STOW, related(JSON), part(JSON, b"[" * 100_000), (400,), id="json-nested"),
        pytest.param(STOW, related(DICOM, "OTHER"), part(DICOM, FILE), (400,), id="wrong-boundary"),
        pytest.param(STOW, related(DICOM, "B" * 500), part(DICOM, FILE), (400,), id="boundary-too-long"),
        pytest.param(STOW, {"content-type": f'multipart/related; type="{DICOM}"'}, part(DICOM, FILE), (400,),
                     id="no-boundary"),
        pytest.param(STOW + "/..%2F..%2Fetc", related(DICOM), part(DICOM, FILE), (400, 404), id="path-in-study"),
        pytest.param(STOW + "/1.2%00", related(DICOM), part(DICOM, FILE), (400, 404), id="nul-in-study"),
        pytest.param(NOTES + "..%2F..%2Fetc", {"content-type": "text/plain"}, b"x", (400,), id="path-in-uid"),
        pytest.param(NOTES + "1.2", {"content-type": "text/plain"}, bytes(3 << 20), (413,), id="too-large"),
        pytest.param(NOTES + "1.2", {"content-type": "multipart/form-data; boundary=OTHER"}, part(DICOM, b"x"), (400,),
                     id="wrong-boundary-of-form"),
    ],
)  # fmt: skip
def test_bodies(web: Web, path: str, headers: dict[str, str], body: bytes, statuses: tuple[int, ...]) -> None:
    root = web.settings.archive.state_dir.parent
    before, process = stored(root), psutil.Process()
    assert before  # of the instance that is there
    memory = process.memory_info().rss
    peak(process.pid, forget=True)
    answer = web.client.post(f"http://127.0.0.1:{web.port}{path}", headers=headers, content=body)
    assert answer.status_code in statuses, answer.text
    if answer.status_code == 409:  # STOW-RS: nothing stored, and why for each instance (PS3.18 Table 10.5.3-1)
        assert "00081199" not in answer.json() and answer.json()["00081198"]["Value"]
    else:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == answer.status_code and answer.json()["detail"]
    assert peak(process.pid) - memory < SIZE // 2 + len(body), "and at no time more"
    assert stored(root) == before


@pytest.mark.parametrize(
    ("path", "statuses"),
    [
        ("/bulkdata?offset=1000&length=99999999999", (400, 404)),
        ("/bulkdata?offset=99999999999999999999&length=1", (400, 404)),
        ("/frames/99999999999999999999", (400, 404)),
        ("/frames/1,2,3", (404,)),
        ("/rendered?viewport=1,1,999999,999999,1,1", (400,)),
        ("/rendered?viewport=99999,99999", (400,)),
        ("/../../../../../../../etc/passwd", (404,)),
        ("/..%2f..%2f..%2fetc%2fpasswd", (400, 404)),
        ("%2f..%2f..%2fmetadata", (400, 404)),
        ("%00/metadata", (400,)),
    ],
)
def test_ranges_and_paths(web: Web, path: str, statuses: tuple[int, ...]) -> None:
    with socket.create_connection(("127.0.0.1", web.port)) as client:  # as it stands: httpx would shorten `..`
        client.sendall(f"GET {INSTANCE}{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = until_closed(client)
    assert int(answer.split()[1]) in statuses, answer
    assert b"application/problem+json" in answer


@pytest.mark.parametrize(
    "text", ["bytes=99999999-", "bytes=99999999-99999999999", "bytes=5-1", "bytes=-0", "lines=1-2"]
)
def test_ranges_of_bytes_beyond_the_end(web: Web, text: str) -> None:
    [header] = web.client.get(f"http://127.0.0.1:{web.port}{INSTANCE}/metadata").json()
    answer = web.client.get(header["7FE00010"]["BulkDataURI"], headers={"range": text})
    assert (answer.status_code, answer.headers["content-type"]) == (416, "application/problem+json")


@pytest.mark.parametrize("path", [STOW, NOTES + "1.2"])
@pytest.mark.parametrize("head", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_slow_bodies(web: Web, path: str, head: str) -> None:
    root = web.settings.archive.state_dir.parent
    before = stored(root)
    kind = related(DICOM)["content-type"] if path == STOW else "text/plain"
    with socket.create_connection(("127.0.0.1", web.port)) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n{head}\r\n\r\n".encode())
        client.sendall(b"10\r\n--B\r\nContent-Typ")
        answer = until_closed(client)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"application/problem+json" in answer
    assert stored(root) == before


@pytest.mark.parametrize("path", [STOW, NOTES + "1.2"])
def test_bodies_that_drip(web: Web, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something comes before each `idle_s` is over, and all of it never."""
    monkeypatch.setattr(incoming, "PATIENT_S", 1.5)
    root = web.settings.archive.state_dir.parent
    before = stored(root)
    kind = related(DICOM)["content-type"] if path == STOW else "text/plain"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", web.port)) as client:
        client.sendall(head.encode() + b"--B\r\nContent-Type: application/dicom\r\n\r\n")
        dripped = 0
        while not select.select([client], [], [], 0.2)[0]:
            client.sendall(b"x")
            dripped += 1
            assert dripped < 100, "nobody ends it"
        answer = until_closed(client)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the body comes too slowly" in answer
    assert stored(root) == before


def test_limits_of_parts_and_of_metadata(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stow, "MAX_PARTS", 3)
    monkeypatch.setattr(stow, "MAX_METADATA", 1 << 20)
    root = web.settings.archive.state_dir.parent
    before = stored(root)
    many = f"--B\r\nContent-Type: {DICOM}\r\n\r\nx\r\n".encode() * 4 + b"--B--\r\n"
    long = b"[" + b" " * (1 << 20) + b"]"
    for kind, body, says in (
        (DICOM, many, "3 parts"),
        (JSON, part(JSON, long), "1 MiB"),
        (XML, part(XML, long), "1 MiB"),
    ):
        answer = web.client.post(f"http://127.0.0.1:{web.port}{STOW}", headers=related(kind), content=body)
        assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")
        assert says in answer.json()["detail"]
    assert stored(root) == before


@pytest.mark.parametrize("path", [STOW, NOTES + "1.2", "/wado", INSTANCE + "/metadata"])
def test_floods_of_headers(web: Web, path: str) -> None:
    process = psutil.Process()
    memory = process.memory_info().rss
    peak(process.pid, forget=True)
    answers = 0
    for flood in (b"X: y\r\n" * 500, b"X: " + b"y" * 100_000 + b"\r\n", b"Cookie: a=b\r\n" * 20_000):
        with socket.create_connection(("127.0.0.1", web.port)) as client:
            try:
                client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + flood + b"\r\n")
                answer = until_closed(client)
            except (BrokenPipeError, ConnectionResetError):  # closed while we were still sending
                continue
        assert answer.startswith(b"HTTP/1.1 431 ") and b"application/problem+json" in answer
        answers += 1
    assert answers, "the first is short enough to be sent whole"
    assert peak(process.pid) - memory < SIZE // 4
    assert web.client.get(f"http://127.0.0.1:{web.port}/healthz").status_code == 200


@pytest.mark.parametrize(
    "text", ["a" + " " * 60_000 + '"', "a=" + " " * 60_000 + '"x', " " * 60_000 + '"'], ids=["name", "value", "nothing"]
)
def test_a_long_row_of_blanks_is_no_list_of_media_types(text: str) -> None:
    """Shared out between the blanks before and after a sign, it took as many steps as the square of its length."""
    with pytest.raises(WebError, match="cannot be read"):
        parse(text)
