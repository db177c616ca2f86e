"""Annotations: files linked to studies, series and instances, over HTTP."""

from __future__ import annotations

import hashlib
from base64 import b64decode
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import orjson
import pydicom
import pytest
from click.testing import CliRunner
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from sphere.catalog.cohorts import Cohorts
from sphere.catalog.references import KINDS, references
from sphere.cli import main
from sphere.ingest.header import identify
from sphere.ingest.storage import open_storage
from sphere.scp.web.tokens import Tokens
from sphere.scp.web.upload import ABOUT
from tests.support.annotated import files
from tests.support.landing import archive, changed, land, new_member, slices
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

UNKNOWN = {"uid": "1.2.3.4.5", "level": "study", "allow_unknown": "true"}
SLICES = slices(2, seed=77)
FOUND = [identify(data, size=len(data)) for data in SLICES]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("web"), annotations={"limit_mib": 3}, web={"idle_s": 1})
    land(settings, [new_member(data) for data in SLICES])
    with serving_web(settings) as running:
        yield running


def url(web: Web, path: str = "") -> str:
    return f"http://127.0.0.1:{web.port}/annotations{path}"


def post(web: Web, data: Any = b"bytes", *, kind: str = "text/plain", **params: str) -> httpx.Response:
    return web.client.post(url(web), content=data, params=params or UNKNOWN, headers={"content-type": kind})


def test_a_file_of_any_type_comes_back_as_it_was(web: Web) -> None:
    data = bytes(range(256)) * 5000
    sha256 = hashlib.sha256(data).hexdigest()
    said = {
        "uid": FOUND[0].SeriesInstanceUID,
        "type": "mask",
        "author": "Dr A",
        "name": "ü\u202e/../mask.nii",
        "sha256": sha256,
    }
    made = post(web, data, kind="application/x-nifti", **said)
    assert made.status_code == 201, made.text
    row = made.json()
    assert (row["level"], row["StudyInstanceUID"], row["SeriesInstanceUID"], row["SOPInstanceUID"]) == (
        "series", FOUND[0].StudyInstanceUID, FOUND[0].SeriesInstanceUID, "",
    )  # fmt: skip
    assert (row["name"], row["type"], row["author"], row["made_by"]) == ("mask.nii", "mask", "Dr A", "local")
    assert (row["size"], row["sha256"], row["version"]) == (len(data), sha256, 1)
    got = web.client.get(f"http://127.0.0.1:{web.port}{row['href']}")
    assert got.content == data
    assert got.headers["content-type"] == "application/x-nifti"
    assert got.headers["content-disposition"].startswith("attachment;")
    assert got.headers["x-content-type-options"] == "nosniff"
    again = web.client.get(url(web, f"/{row['id']}/file"), headers={"if-none-match": got.headers["etag"]})
    assert again.status_code == 304
    assert web.client.get(f"http://127.0.0.1:{web.port}{made.headers['location']}").json()["versions"][0] == row


def test_a_form_gives_file_and_fields_in_any_order(web: Web) -> None:
    fields = {"uid": FOUND[1].SOPInstanceUID, "type": "note", "description": "zwei\nZeilen"}
    made = web.client.post(url(web), data=fields, files={"file": ("bericht ä.txt", b"text", "text/plain")})
    assert made.status_code == 201, made.text
    row = made.json()
    assert (row["level"], row["name"], row["media_type"]) == ("instance", "bericht ä.txt", "text/plain")
    assert row["description"] == "zwei\nZeilen"
    first = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\0\r\n--B\r\n'
    rest = b'Content-Disposition: form-data; name="uid"\r\n\r\n' + FOUND[0].StudyInstanceUID.encode() + b"\r\n--B--\r\n"
    made = web.client.post(url(web), content=first + rest, headers={"content-type": "multipart/form-data; boundary=B"})
    assert (made.status_code, made.json()["level"], made.json()["size"]) == (201, "study", 1)


def test_a_part_of_a_file(web: Web) -> None:
    """RFC 9110 14, and what a client may hold (13.1)."""
    data = bytes(range(256)) * 8200  # more than is read at a time
    size = len(data)
    path = url(web, f"/{post(web, data).json()['id']}/file")
    whole = web.client.get(path)
    tag = whole.headers["etag"]
    assert whole.headers["accept-ranges"] == "bytes"

    def get(**headers: str) -> httpx.Response:
        return web.client.get(path, headers={name.replace("_", "-"): text for name, text in headers.items()})

    for asked, start, end in (
        ("0-0", 0, 1), ("5-1048600", 5, 1048601), (f"{size - 3}-", size - 3, size), ("-7", size - 7, size),
        (f"10-{10 * size}", 10, size), (f"-{10 * size}", 0, size),
    ):  # fmt: skip
        got = get(range=f"bytes={asked}")
        assert (got.status_code, got.content) == (206, data[start:end]), asked
        assert got.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert got.headers["content-length"] == str(end - start)
        assert got.headers["repr-digest"] == whole.headers["repr-digest"]
    for asked in (f"bytes={size}-", "bytes=9-5", "bytes=-0", "bytes=-", "bytes=1-2,5-6", "lines=1-2"):
        got = get(range=asked)
        assert (got.status_code, got.headers["content-range"]) == (416, f"bytes */{size}"), asked
        assert got.json()["detail"]
    assert get(range="bytes=1-2", if_range=tag).content == data[1:3]
    assert get(range="bytes=1-2", if_range='"another"').content == data
    assert get(range="bytes=1-2", if_none_match=tag).status_code == 304
    assert web.client.head(path, headers={"range": "bytes=1-2"}).status_code == 200
    for known in (tag, f"W/{tag}", f'"x", {tag}', f'"x",W/{tag} , "y"', "*"):
        got = get(if_none_match=known)
        assert (got.status_code, got.content, got.headers["etag"]) == (304, b"", tag), known
    for known in ('"x"', f'{tag[:-1]}x"', tag.strip('"'), 'W/"x"'):
        assert get(if_none_match=known).content == data, known
    lines = [("if-none-match", '"x"'), ("if-none-match", tag)]
    assert web.client.get(path, headers=lines).status_code == 304
    digest = b64decode(whole.headers["repr-digest"].removeprefix("sha-256=:").removesuffix(":"))
    assert digest == hashlib.sha256(data).digest()


@pytest.mark.parametrize("first", ["file", "onto"])
def test_the_version_to_be_replaced_may_be_said_after_the_file(web: Web, first: str) -> None:
    """A lost update otherwise: the other's version 2 would go unseen."""
    id = post(web, b"one").json()["id"]
    assert web.client.put(url(web, f"/{id}"), content=b"two").status_code == 200
    parts = {"file": ("m.txt", b"mine", "text/plain"), "onto": (None, b"1")}

    def put(onto: bytes) -> httpx.Response:
        parts["onto"] = (None, onto)
        ordered = [(name, parts[name]) for name in sorted(parts, key=lambda name: name != first)]
        return web.client.put(url(web, f"/{id}"), files=ordered)

    refused = put(b"1")
    assert (refused.status_code, refused.json()["detail"]) == (409, f"annotation {id} is at version 2, not 1")
    assert put(b"x").status_code == 400
    assert web.client.get(url(web, f"/{id}/file")).content == b"two"
    assert len(list(files(web.settings))) == len({path.name.lstrip(".") for path in files(web.settings)})
    assert put(b"2").json()["version"] == 3


def test_what_is_said_twice_is_refused(web: Web) -> None:
    for params, fields in (({**UNKNOWN, "type": "a"}, {"type": "b"}), (UNKNOWN, {"author": ["a", "b"]})):
        answer = web.client.post(url(web), params=params, data=fields, files={"file": ("a", b"a")})
        assert answer.status_code == 400
        assert "stands twice" in answer.json()["detail"]


def test_the_list_is_by_uid_level_type_and_author(web: Web) -> None:
    study = {"uid": "9.1", "level": "study", "allow_unknown": "true"}
    ids = [post(web, **study, type="a", author="x").json()["id"], post(web, **study, type="b", author="x").json()["id"]]
    ids.append(post(web, **{**study, "uid": "9.2", "level": "series"}, type="a", author="y").json()["id"])

    def listed(**params: str) -> list[str]:
        found = web.client.get(url(web), params=params)
        assert found.status_code == 200, found.text
        return [row["id"] for row in found.json()]

    assert listed(uid="9.1") == ids[:2]
    assert listed(uid="9.1", type="b") == ids[1:2]
    assert listed(author="x") == ids[:2]
    assert listed(author="y", level="series") == ids[2:]
    assert listed(author="y", level="study") == []
    page = web.client.get(url(web), params={"author": "x", "limit": 1, "offset": 1})
    assert [row["id"] for row in page.json()] == ids[1:2]
    assert page.headers["x-total-count"] == "2"
    assert listed(uid=FOUND[0].StudyInstanceUID)[:1] != [], "what is linked to a series is of its study"


def test_versions_stay_in_the_history(web: Web) -> None:
    id = post(web, b"first", **UNKNOWN, name="a.txt", type="t").json()["id"]
    changed_ = web.client.put(url(web, f"/{id}"), content=b"second", params={"onto": 1, "author": "B"})
    assert changed_.status_code == 200, changed_.text
    assert (changed_.json()["version"], changed_.json()["name"], changed_.json()["type"]) == (2, "a.txt", "t")
    late = web.client.put(url(web, f"/{id}"), content=b"third", params={"onto": 1})
    assert late.status_code == 409
    assert "at version 2" in late.json()["detail"]
    assert web.client.delete(url(web, f"/{id}"), params={"onto": 2}).status_code == 204
    assert web.client.get(url(web, f"/{id}/file")).status_code == 404
    assert [row["id"] for row in web.client.get(url(web), params={"limit": 1000}).json()].count(id) == 0
    told = web.client.get(url(web, f"/{id}")).json()
    assert told["state"] == "deleted"
    assert [(one["version"], one["action"]) for one in told["versions"]] == [(3, "delete"), (2, "put"), (1, "put")]
    assert web.client.get(url(web, f"/{id}/file"), params={"version": 1}).content == b"first"
    for gone in (web.client.delete(url(web, f"/{id}")), web.client.put(url(web, f"/{id}"), content=b"x")):
        assert gone.status_code == 404


@pytest.mark.parametrize(
    ("params", "kind", "data", "status", "told"),
    [
        ({"uid": "1.2.3.99"}, "text/plain", b"x", 404, "no study, series or instance"),
        ({"uid": FOUND[0].SeriesInstanceUID, "level": "study"}, "text/plain", b"x", 404, "no study"),
        ({"uid": "1.2.3.99", "allow_unknown": "true"}, "text/plain", b"x", 400, "level is required"),
        ({"uid": "1.2.3.99", "allow_unknown": "yes", "level": "study"}, "text/plain", b"x", 400, "true or false"),
        ({"uid": "1.2.3.99", "level": "patient"}, "text/plain", b"x", 400, "level is study, series or instance"),
        ({"uid": "../../etc"}, "text/plain", b"x", 400, "has to be a UID"),
        ({"uid": "1" * 65}, "text/plain", b"x", 400, "has to be a UID"),
        ({**UNKNOWN, "colour": "red"}, "text/plain", b"x", 400, "'colour'"),
        ({**UNKNOWN, "type": "a\0b"}, "text/plain", b"x", 400, "type has characters"),
        ({**UNKNOWN, "author": "x" * 201}, "text/plain", b"x", 400, "at most 200"),
        ({**UNKNOWN, "sha256": "0" * 64}, "text/plain", b"x", 400, "has the digest"),
        ({**UNKNOWN, "sha256": "x"}, "text/plain", b"x", 400, "64 hexadecimal"),
        (UNKNOWN, "text plain", b"x", 400, "not a media type"),
        (UNKNOWN, "text/plain", b"x" * (3 << 20) + b"x", 413, "at most 3 MiB"),
        (UNKNOWN, "multipart/form-data", b"x", 400, "boundary"),
        (UNKNOWN, "multipart/form-data; boundary=B", b"x" * (1 << 17), 400, "no part with its boundary"),
        (UNKNOWN, "multipart/form-data; boundary=B", b"--B\r\n\r\n\r\n--B--", 400, "has no name"),
        (UNKNOWN, "multipart/form-data; boundary=B", b"--B--", 400, "no part that is a file"),
        (UNKNOWN, "multipart/form-data; boundary=B",
         b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nhalf', 400, "before its closing"),
        (UNKNOWN, "multipart/form-data; boundary=B",
         b'--B\r\nContent-Disposition: form-data; name="kind"\r\n\r\nx\r\n--B--', 400, "unknown field 'kind'"),
        (UNKNOWN, "multipart/form-data; boundary=B",
         b'--B\r\nContent-Disposition: form-data; name="type"\r\n\r\n' + b"x" * 9000, 413, "at most 8192"),
        (UNKNOWN, "multipart/form-data; boundary=B",
         b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\n\r\n' * 2 + b"--B--", 400, "one file"),
    ],
    ids=map(str, count()),
)  # fmt: skip
def test_what_cannot_be_taken_is_told_and_leaves_nothing(
    web: Web, params: dict[str, str], kind: str, data: bytes, status: int, told: str
) -> None:
    before = files(web.settings)
    answer = post(web, data, kind=kind, **params)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert told in answer.json()["detail"]
    assert files(web.settings) == before


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("GET", "?level=patient", 400, "level is"),
        ("GET", "?limit=-1", 400, "limit is a number"),
        ("GET", "?nonsense=1", 400, "'nonsense'"),
        ("GET", "?uid=1&uid=2", 400, "stands twice"),
        ("GET", "/" + "0" * 32, 404, "there is no annotation"),
        ("GET", "/..%2f..%2fetc", 404, ""),
        ("GET", "/not-an-id/file", 404, "32 hexadecimal"),
        ("PUT", "/" + "0" * 32, 404, "there is no annotation"),
        ("DELETE", "/" + "0" * 32, 404, "there is no annotation"),
    ],
)
def test_what_is_not_there_is_told(web: Web, method: str, path: str, status: int, told: str) -> None:
    answer = web.client.request(method, url(web, path), content=b"x" if method == "PUT" else None)
    assert answer.status_code == status, answer.text
    assert told in answer.json()["detail"]


def test_a_body_that_breaks_off_leaves_nothing(web: Web) -> None:
    before = files(web.settings)

    def body() -> Iterator[bytes]:
        yield b"x" * 1000
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        post(web, body(), **UNKNOWN)
    web.client.get(url(web))  # the server has seen the end by now, or will without us
    assert [path for path in files(web.settings) if path not in before and not path.name.startswith(".")] == []


def test_read_only_and_roles(web: Web, tmp_path: Path) -> None:
    settings = archive(tmp_path)
    with serving_web(settings) as other:
        made = post(other).json()["id"]
    read_only = settings.model_copy(update={"web": settings.web.model_copy(update={"read_only": True})})
    with serving_web(read_only) as other:
        kept = files(settings)
        for method, path in (
            ("POST", "?level=study&uid=1.2&allow_unknown=true"),
            ("PUT", f"/{made}"),
            ("DELETE", f"/{made}"),
        ):
            answer = other.client.request(method, url(other, path), content=b"other bytes")
            assert (answer.status_code, "read_only" in answer.json()["detail"]) == (403, True), method
        assert other.client.get(url(other, f"/{made}/file")).content == b"bytes"
        assert files(settings) == kept
    operations = web.client.get(f"http://127.0.0.1:{web.port}/openapi.json").json()["paths"]
    assert set(operations["/annotations/{annotation}"]) == {"get", "put", "delete"}
    assert set(ABOUT) <= {one["name"] for one in operations["/annotations"]["post"]["parameters"]}


def test_dicom_objects_are_listed_as_annotations_of_what_they_refer_to(web: Web) -> None:
    uids = {"StudyInstanceUID": FOUND[0].StudyInstanceUID}
    source = Path(get_testdata_file("reportsi.dcm") or "")
    evidence = Dataset()
    evidence.StudyInstanceUID = FOUND[0].StudyInstanceUID
    series, one = Dataset(), Dataset()
    one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = FOUND[0].SOPClassUID, FOUND[0].SOPInstanceUID
    series.SeriesInstanceUID, series.ReferencedSOPSequence = FOUND[0].SeriesInstanceUID, [one]
    evidence.ReferencedSeriesSequence = [series]
    report = changed(source.read_bytes(), CurrentRequestedProcedureEvidenceSequence=[evidence], **uids)
    land(web.settings, [new_member(report)])
    for uid in (FOUND[0].StudyInstanceUID, FOUND[0].SeriesInstanceUID, FOUND[0].SOPInstanceUID):
        rows = web.client.get(url(web), params={"uid": uid, "type": "SR"}).json()
        assert [row["instances"] for row in rows] == [[FOUND[0].SOPInstanceUID]], uid
        assert web.client.get(f"http://127.0.0.1:{web.port}{rows[0]['href']}").status_code == 200
    assert web.client.get(url(web), params={"uid": FOUND[1].SOPInstanceUID, "type": "SR"}).json() == []


def test_a_researcher_sees_what_is_linked_to_the_part_granted(web: Web) -> None:
    storage = open_storage(web.settings.storage.root)
    Cohorts(storage).create("mine", "series", [FOUND[0].SeriesInstanceUID], "test")
    secret = Tokens(storage).create("anna", "researcher", None, cohorts=["mine"])
    shown = {"authorization": f"Bearer {secret}"}
    seen = post(web, b"seen", uid=FOUND[0].SeriesInstanceUID).json()
    hidden = post(web, b"hidden", **{**UNKNOWN, "uid": "1.9"}).json()

    def get(path: str) -> httpx.Response:
        return web.client.get(url(web, path), headers=shown)

    listed = get(f"?uid={FOUND[0].StudyInstanceUID}&limit=1000")
    assert seen["id"] in [row["id"] for row in listed.json()]
    assert get("?uid=1.9").json() == []
    assert get("?uid=1.9").headers["x-total-count"] == "0"
    assert get("").status_code == 400
    assert get(f"/{seen['id']}/file").content == b"seen"
    gone = post(web, b"hidden", **{**UNKNOWN, "uid": "1.9"}).json()
    assert web.client.delete(url(web, f"/{gone['id']}")).status_code == 204
    for path in ("", "/file", "/file?version=1", "/file?version=99"):
        for one in (hidden["id"], gone["id"], "0" * 32):  # as if there were none, whatever is asked of it
            answer = get(f"/{one}{path}")
            assert (answer.status_code, answer.json()["detail"]) == (404, f"there is no annotation {one!r}")
    for method in ("POST", "PUT", "DELETE"):
        answer = web.client.request(method, url(web, f"/{seen['id']}" if method != "POST" else ""), headers=shown)
        assert answer.status_code == 403


def test_headers_that_refer_nowhere_or_wrongly() -> None:
    assert references({}) == []
    own = {"0020000D": {"vr": "UI", "Value": ["1.2"]}}
    broken = {"vr": "SQ", "Value": [None, 5, {"0020000E": {"vr": "UI", "Value": []}}]}
    assert [one.SeriesInstanceUID for one in references({**own, "00081115": broken})] == [""]
    for value in (None, 5, {"Value": None}, {"Value": [3]}):
        assert references({**own, "0040A375": value}) == []
    assert set(KINDS.values()) == {"SEG", "SR", "PR", "KO"}


def test_files_of_pydicom_that_refer(web: Web) -> None:
    liver = pydicom.dcmread(get_testdata_file("liver_1frame.dcm") or "", stop_before_pixels=True)
    [found] = references(orjson.loads(liver.to_json()))
    assert found.SeriesInstanceUID == liver.ReferencedSeriesSequence[0].SeriesInstanceUID
    assert found.is_of(liver.StudyInstanceUID)


@pytest.mark.parametrize("server", [True, False])
def test_the_command_line_does_the_same_here_and_there(web: Web, tmp_path: Path, server: bool) -> None:
    config = tmp_path / "sphere.toml"
    config.write_text(f'[storage]\nroot = "{web.settings.storage.root}"\n[archive]\nstate_dir = "state"\n')
    there = ["--server", f"http://127.0.0.1:{web.port}"] if server else []

    def call(*arguments: str | Path, status: int = 0) -> str:
        result = CliRunner().invoke(main, ["--config", str(config), "annotate", *there, *map(str, arguments)])
        assert result.exit_code == status, result.output
        return result.output.strip()

    file, out = tmp_path / "data.bin", tmp_path / "out.bin"
    file.write_bytes(bytes(range(256)) * 20)
    told = call("add", file, "--uid", "1.2.3.99", status=1)
    assert "no study, series or instance" in told
    id = call("add", file, "--uid", FOUND[0].SeriesInstanceUID, "--type", f"cli{server}", "--author", "me")
    [row] = orjson.loads(call("list", "--type", f"cli{server}", "--format", "json"))
    assert (row["id"], row["level"], row["name"], row["author"]) == (id, "series", "data.bin", "me")
    assert row["StudyInstanceUID"] == FOUND[0].StudyInstanceUID
    assert call("get", id, "-o", out).endswith("version 1, 5120 bytes")
    assert out.read_bytes() == file.read_bytes()
    file.write_bytes(b"two")
    assert call("version", id, file, "--onto", "1").endswith("version 2")
    assert "at version 2" in call("version", id, file, "--onto", "1", status=1)
    call("delete", id)
    assert orjson.loads(call("list", "--type", f"cli{server}", "--format", "json")) == []
    assert "deleted" in call("get", id, status=1)
    assert call("get", id, "--version", "2", "-o", out).endswith("3 bytes")
    assert out.read_bytes() == b"two"
    assert "no annotation" in call("get", "0" * 32, status=1)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["data.bin", "out.bin", "sphere.toml"]
