"""DELETE over HTTP: from the moment it is answered no door of any process shows the instance, or takes it again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from sphere.archive import Archive
from sphere.catalog.tombstones import open_tombstones
from sphere.conf.errors import StorageError
from sphere.conf.settings import Settings
from sphere.ingest.header import identify
from sphere.ingest.journal import Landed
from sphere.ingest.storage import open_storage
from sphere.ingest.storage.local import LocalStorage
from sphere.scp.deleted import Deleted
from sphere.scp.web.app import make_app
from sphere.scp.web.server import services_of
from sphere.scp.web.tokens import Role, Tokens
from tests.support.audit_records import recorded
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

SLICES = slices(3, seed=41)
STUDY, SERIES, _ = (
    getattr(new_member(SLICES[0]), name) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
)
UIDS = [new_member(data).SOPInstanceUID for data in SLICES]
OFF = "nothing is deleted over HTTP unless the settings say web.delete = true"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Two instances that are catalogued, and one that has just arrived."""
    settings = archive(tmp_path, web={"delete": True})
    land(settings, [new_member(data) for data in SLICES[:2]])
    extract(settings)
    land(settings, [new_member(SLICES[2])])
    return settings


@pytest.fixture
def web(settings: Settings) -> Iterator[Web]:
    with serving_web(settings) as running:
        yield running


def delete(web: Web, path: str = f"/studies/{STUDY}", **params: str) -> httpx.Response:
    return web.client.delete(f"{web.url}{path}", params=params)


def at(uid: str = "") -> str:
    return f"/studies/{STUDY}/series/{SERIES}" + (f"/instances/{uid}" if uid else "")


def doors(web: Web, uid: str) -> dict[str, int]:
    """The status of each way to an instance."""
    paths = ["", "/metadata", "/frames/1", "/rendered", "/thumbnail", "?accept=application/zip"]
    found = {path: web.get(at(uid) + path, headers={"accept": "*/*"}).status_code for path in paths}
    wado = {"requestType": "WADO", "studyUID": STUDY, "seriesUID": SERIES, "objectUID": uid}
    found["/wado"] = web.client.get(f"http://127.0.0.1:{web.port}/wado", params=wado).status_code
    return found


def uids(response: httpx.Response) -> set[str]:
    """SOPInstanceUIDs of DICOM JSON."""
    return {one["00080018"]["Value"][0] for one in response.json()} if response.status_code == 200 else set()


def counts(web: Web, **params: str) -> list[int]:
    response = web.get("/studies", params={"includefield": "NumberOfStudyRelatedInstances", **params})
    return [one["00201208"]["Value"][0] for one in response.json()] if response.status_code == 200 else []


def members(settings: Settings) -> int:
    landed = Landed(open_storage(settings.storage.root), settings.archive.state_dir)
    return sum(len(landed.records(state.bundle, unpublished=True)[0]) for state in landed.bundles())


def store(web: Web, data: bytes) -> httpx.Response:
    content = b"--B\r\nContent-Type: application/dicom\r\n\r\n" + data + b"\r\n--B--\r\n"
    kind = 'multipart/related; type="application/dicom"; boundary=B'
    return web.client.post(f"{web.url}/studies", content=content, headers={"content-type": kind})


def test_no_door_of_any_process_shows_it(settings: Settings, web: Web) -> None:
    with serving_web(settings) as other:
        for one in (web, other):
            assert set(doors(one, UIDS[0]).values()) | set(doors(one, UIDS[2]).values()) == {200}
            assert counts(one) == [3]
            assert counts(one, asOf="0") == [2]
        for gone in (0, 2):
            assert delete(web, at(UIDS[gone])).status_code == 204
            for one in (web, other):
                assert set(doors(one, UIDS[gone]).values()) == {404}
        for one in (web, other):
            assert set(doors(one, UIDS[1]).values()) == {200}
            assert counts(one) == counts(one, asOf="0") == [1]
            for path in ("/instances", f"/studies/{STUDY}/metadata", f"{at()}/metadata", f"{at()}/instances"):
                assert uids(one.get(path, headers={"accept": "application/dicom+json"})) == {UIDS[1]}
            whole = one.get(f"/studies/{STUDY}", headers={"accept": 'multipart/related; type="application/dicom"'})
            assert whole.content.count(b"Content-Type: application/dicom") == 1
            with_zip = one.get(f"/studies/{STUDY}", params={"accept": "application/zip"}).content
            assert UIDS[1].encode() in with_zip
            assert UIDS[0].encode() not in with_zip
        assert delete(web, at(UIDS[0])).status_code == 404
        assert delete(web, f"/studies/{STUDY}").status_code == 204
        for one in (web, other):
            assert counts(one) == counts(one, asOf="0") == []
            assert one.get(f"/studies/{STUDY}").status_code == one.get(f"{at()}/rendered").status_code == 404
            assert one.client.get(f"http://127.0.0.1:{one.port}/annotations", params={"uid": STUDY}).json() == []


def test_a_tag_changes_with_what_is_there(settings: Settings, web: Web) -> None:
    """A 304 would hide what came, and show what is gone (RFC 9110 8.8.3)."""
    paths = {
        path: {"accept": "*/*"}
        for path in (f"/studies/{STUDY}", at(), f"/studies/{STUDY}/metadata", f"{at()}/metadata")
    }
    paths |= {f"/studies/{STUDY}?accept=application/zip{more}": {} for more in ("", "&dicomdir=true")}
    paths[f"/studies/{STUDY}/metadata?"] = {"accept": 'multipart/related; type="application/dicom+xml"'}

    def tags() -> dict[str, str]:
        return {path: web.get(path, headers=accept).headers["etag"] for path, accept in paths.items()}

    def again(known: dict[str, str]) -> set[int]:
        return {
            web.get(path, headers={**accept, "if-none-match": known[path]}).status_code
            for path, accept in paths.items()
        }

    seen = [tags()]
    assert again(seen[0]) == {304}
    assert store(web, slices(4, seed=41)[3]).status_code == 200
    for change in (None, UIDS[0], UIDS[2]):
        if change:
            assert delete(web, at(change)).status_code == 204
        assert again(seen[-1]) == {200}, "something else is there now"
        seen.append(tags())
        assert again(seen[-1]) == {304}
        for path in paths:
            assert len({one[path] for one in seen}) == len(seen), path
    assert open_tombstones(settings).restore([UIDS[0], UIDS[2]], by="test") == 2
    assert again(seen[1]) == {304}, "and the same again for the same"


def test_undone_it_is_shown_again(settings: Settings, web: Web) -> None:
    assert delete(web, at()).status_code == 204
    assert counts(web) == []
    graves = open_tombstones(settings)
    assert graves.restore(UIDS, by="test") == 3
    graves.close()
    assert counts(web) == [3]
    assert set(doors(web, UIDS[0]).values()) == {200}


def test_annotations_of_what_was_deleted_are_for_admins(settings: Settings, web: Web) -> None:
    """A study of which something is left keeps its own; what is shown again has its annotations again."""
    tokens = Tokens(open_storage(settings.storage.root))
    root = f"http://127.0.0.1:{web.port}/annotations"
    roles: tuple[Role, ...] = ("reader", "writer", "admin")
    who = {role: {"authorization": f"Bearer {tokens.create(role, role, None)}"} for role in roles}
    own = {"study": STUDY, "series": SERIES, "instance": UIDS[0], "other instance": UIDS[1], "not here": "1.9"}
    ids = {}
    for name, uid in own.items():
        level = "study" if name == "not here" else name.split()[-1]
        made = web.client.post(root, content=b"mask", params={"uid": uid, "allow_unknown": "true", "level": level})
        ids[name] = made.json()["id"]

    def shown(role: str) -> tuple[set[str], set[str]]:
        """What is listed, with its count, in one list and in those of each UID; and what is given by its id."""
        listed = set()
        for params in ({}, *({"uid": uid} for uid in own.values())):
            answer = web.client.get(root, params=params, headers=who[role])
            mine = {row["id"] for row in answer.json() if row["id"] in ids.values()}
            assert len(answer.json()) == int(answer.headers["x-total-count"]) >= len(mine)
            assert not params or mine <= listed
            listed |= mine
        given = set()
        for id in ids.values():
            statuses = {
                web.client.get(f"{root}/{id}{path}", headers=who[role]).status_code
                for path in ("", "/file", "/file?version=1")
            }
            assert statuses in ({200}, {404})
            given |= {id} if statuses == {200} else set()
        return listed, given

    def without(*names: str) -> tuple[set[str], set[str]]:
        left = {id for name, id in ids.items() if name not in names}
        return left, left

    assert shown("reader") == shown("writer") == shown("admin") == without()
    assert delete(web, at(UIDS[0])).status_code == 204
    assert shown("reader") == shown("writer") == without("instance")
    assert delete(web).status_code == 204
    gone = [name for name in own if name != "not here"]
    assert shown("reader") == shown("writer") == without(*gone)
    assert shown("admin") == without()
    for id in (ids["study"], ids["instance"]):
        told = [
            web.client.put(f"{root}/{id}", content=b"new", headers=who["writer"]),
            web.client.delete(f"{root}/{id}", headers=who["writer"]),
            web.client.get(f"{root}/{id}/file", params={"version": 99}, headers=who["writer"]),
        ]
        assert {(one.status_code, one.json()["detail"]) for one in told} == {(404, f"there is no annotation {id!r}")}
    assert web.client.put(f"{root}/{ids['series']}", content=b"new", headers=who["admin"]).status_code == 200
    assert web.services.tombstones.restore([UIDS[1]], by="test") == 1
    assert shown("reader") == without("instance")
    assert web.services.tombstones.restore([UIDS[0]], by="test") == 1
    assert shown("reader") == without()


def test_the_list_of_arrivals_shows_no_more_than_is_there(web: Web) -> None:
    def told(path: str) -> Any:
        return web.client.get(f"http://127.0.0.1:{web.port}/status/{path}").json()

    def arrived() -> list[tuple[str, int]]:
        return [(one["study"], one["instances"]) for one in told("arrivals")]

    assert (arrived(), told("storage")["deleted"]) == ([(STUDY, 3)], 0)
    for gone, left in ((0, [(STUDY, 2)]), (2, [(STUDY, 1)]), (1, [])):
        assert delete(web, at(UIDS[gone])).status_code == 204
        assert arrived() == left
    assert told("storage")["deleted"] == 3
    assert web.services.tombstones.restore(UIDS[1:], by="test") == 2
    assert (arrived(), told("storage")["deleted"]) == ([(STUDY, 2)], 1)


def test_what_comes_again_is_refused(settings: Settings, web: Web, tmp_path: Path) -> None:
    assert delete(web, at(UIDS[0])).status_code == 204
    before = members(settings)
    response = store(web, SLICES[0])
    assert response.status_code == 409
    [failed] = response.json()["00081198"]["Value"]
    assert failed["00081197"]["Value"] == [0x0124]
    file = tmp_path / "again.dcm"
    file.write_bytes(SLICES[0])
    with Archive(settings) as one:
        [imported] = list(one.import_files([file]))
    assert imported.record is None
    assert "deleted here" in imported.error
    assert members(settings) == before
    graves = open_tombstones(settings)
    graves.restore([UIDS[0]], by="test")
    graves.close()
    assert store(web, SLICES[0]).status_code == 200


def test_recorded_with_who_and_why(settings: Settings, web: Web) -> None:
    assert delete(web, reason="consent withdrawn").status_code == 204
    [tombstone, *others] = list(web.services.tombstones.find())
    assert (len(others), tombstone.by, tombstone.reason) == (2, "local", "consent withdrawn")
    [record] = recorded(web.services.journal, settings.archive.state_dir.parent / "storage", "DELETE")
    assert (record["path"], record["query"]) == (f"/dicom-web/studies/{STUDY}", "reason=consent+withdrawn")
    assert (record["status"], record["outcome"], record["entities"]) == (204, "done", 3)


def test_what_cannot_be_deleted(web: Web) -> None:
    study = f"/studies/{STUDY}"
    for path, params, status, detail in (
        ("/studies/1.2.3", {}, 404, "there is no such study"),
        (f"{study}/series/1.2.3", {}, 404, "there is no such series"),
        (at("1.2.3"), {}, 404, "there is no such instance"),
        ("/studies/x", {}, 400, "study in the path is not a UID (PS3.5 9.1)"),
        (study, {"PatientID": "1"}, 400, "'PatientID' is no parameter of this request"),
        (study, {"reason": "a" * 1001}, 400, "reason has at most 1000 characters"),
        (study, {"reason": "a\0"}, 400, "reason has characters that cannot be shown"),
    ):
        response = delete(web, path, **params)
        assert (response.status_code, response.json()["detail"]) == (status, detail)
    assert counts(web) == [3]


def with_web(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update={"web": settings.web.model_copy(update=changes)})


def test_switched_off_by_default_and_where_read_only(settings: Settings) -> None:
    assert archive(settings.archive.state_dir).web.delete is False
    for changes, detail in (
        ({"delete": False}, OFF),
        ({"read_only": True}, "this archive takes nothing over HTTP (web.read_only)"),
    ):
        with serving_web(with_web(settings, **changes)) as web:
            response = delete(web)
            assert (response.status_code, response.json()["detail"]) == (403, detail)
            assert counts(web) == [3]


def test_only_an_admin_deletes(settings: Settings) -> None:
    tokens = Tokens(open_storage(settings.storage.root))
    roles: tuple[Role, ...] = ("researcher", "reader", "writer", "admin")
    seen = {"researcher": ("trial",)}
    made = [tokens.create(f"a {role}", role, None, collections=seen.get(role, ())) for role in roles]
    shown = [{"authorization": f"Bearer {secret}"} for secret in made]
    with services_of(settings) as services:
        far = TestClient(make_app(settings, services), client=("10.0.0.5", 40000), base_url="http://pacs.example")
        path = f"/dicom-web{at(UIDS[0])}"
        assert far.delete(path).status_code == 401
        assert [far.delete(path, headers=headers).status_code for headers in shown] == [403, 403, 403, 204]
        assert [one.by.rpartition(":")[2] for one in services.tombstones.find()] == ["a admin"]


def test_a_storage_that_refuses_deletes_nothing(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    create = LocalStorage.create

    def refuse(self: LocalStorage, path: str, attempt: int = 0) -> Any:
        if path.startswith("tombstones"):
            raise StorageError("the disk is full")
        return create(self, path, attempt)

    monkeypatch.setattr(LocalStorage, "create", refuse)
    response = delete(web)
    assert (response.status_code, response.json()["detail"]) == (507, "the disk is full")
    assert counts(web) == [3]


def test_described(web: Web) -> None:
    document = web.client.get(f"http://127.0.0.1:{web.port}/openapi.json").json()
    described = [path for path, methods in document["paths"].items() if "delete" in methods and "studies" in path]
    assert len(described) == 3
    assert b'<method name="DELETE" id="DELETE-dicom-web-studies-study">' in web.get("/capabilities").content


def test_what_arrives_is_let_in_where_the_storage_does_not_answer(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    graves = open_tombstones(settings)
    graves.delete([identify(SLICES[0], size=len(SLICES[0]))], by="test")
    graves.close()

    def refuse(*_: Any, **__: Any) -> Any:
        raise StorageError("it is away")

    spooled = settings.model_copy(update={"ingest": settings.ingest.model_copy(update={"durability": "spool"})})
    for one in (settings, spooled):
        assert Deleted(one).holds(UIDS[0])
        assert not Deleted(one).holds(UIDS[1])
        with monkeypatch.context() as patched:
            patched.setattr(LocalStorage, "walk", refuse)
            assert not Deleted(one).holds(UIDS[0])
