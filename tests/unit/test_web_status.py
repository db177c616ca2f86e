"""What the page asks of the archive's state, over a real socket: who may, what is counted, which errors are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from sphere.archive import Archive
from sphere.catalog.schema import TABLES
from sphere.children import _extract
from sphere.conf import logs, serving
from sphere.conf.errors import CatalogError
from sphere.ingest.bundle import NewMember
from sphere.ingest.storage import open_storage
from sphere.scp.web.app import make_app
from sphere.scp.web.landed import RECENT, STUDIES, Arrivals
from sphere.scp.web.server import services_of
from sphere.scp.web.tokens import Tokens
from tests.support.catalog import write_table
from tests.support.extracted import extract
from tests.support.landing import START, archive, changed, land, new_member, slices
from tests.support.ports import free_port
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit


def rejected(number: int) -> dict[str, Any]:
    received = {
        "received_at": START + timedelta(seconds=number),
        "source_aet": "MODALITY",
        "origin": "dimse:MODALITY@10.0.0.9",
    }
    place = {"bundle": "bundles/a.tar", "offset": number, "length": 10}
    return {**place, "reason": "NOT_DICOM", "detail": f"no data set {number}", **received}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    peers = ({"name": "ward", "ae_title": "WARD", "host": "127.0.0.1", "port": free_port()},)
    settings = archive(tmp_path_factory.mktemp("status"))
    settings = settings.model_copy(update={"peers": type(settings).model_validate({"peers": peers}).peers})
    land(settings, [new_member(one) for one in slices(3)])
    land(settings, [new_member(b"not DICOM" * 40, second=2), new_member(b"", second=1)])
    extract(settings)
    write_table(settings, TABLES["quarantine"], [rejected(number) for number in range(2)])
    with serving_web(settings) as running:
        yield running


def asked(web: Web, path: str, method: str = "GET") -> Any:
    response = web.client.request(method, f"http://127.0.0.1:{web.port}/status{path}")
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    return response.json()


def test_what_was_put_aside_has_its_reason(web: Web) -> None:
    found = asked(web, "/quarantine")
    assert found["total"] == sum(found["reasons"].values()) == len(found["members"]) == 2
    assert [one["detail"] for one in found["members"]] == ["no data set 1", "no data set 0"]
    assert all(one["reason"] in found["reasons"] and one["detail"] for one in found["members"])
    second = asked(web, "/quarantine?limit=1&offset=1")
    assert second["members"] == found["members"][1:]
    for wrong in ("limit=x", "limit=100000", "offset=-1"):
        assert web.client.get(f"http://127.0.0.1:{web.port}/status/quarantine?{wrong}").status_code == 400


def test_numbers_of_the_archive(web: Web) -> None:
    now, storage = asked(web, ""), asked(web, "/storage")
    assert (now["landed"], now["waiting"], now["archive"]) == (5, 0, "SPHERE")
    assert (storage["bundles"], storage["members"], storage["tables"]["instances"]) == (2, 5, 3)
    assert storage["disk"]["total"] > storage["disk"]["free"] > 0
    studies = asked(web, "/arrivals")
    assert sorted(one["instances"] for one in studies) == [2, 3]


def test_a_peer_is_asked_when_somebody_wants_it(web: Web) -> None:
    before = asked(web, "/peers")
    assert [(one["name"], one["at"], one["ms"]) for one in before] == [("ward", "", None)]
    after = asked(web, "/peers", "POST")
    assert after[0]["at"] and "WARD" in after[0]["error"]
    assert asked(web, "/peers") == after


def test_errors_of_every_process_are_listed(web: Web) -> None:
    file = web.settings.archive.state_dir / "log" / "receiver-1.log"
    logger, before = logging.getLogger("sphere.test"), list(logging.getLogger().handlers)
    logs.keep(file)
    try:
        logger.info("not this")
        logger.error("storage is full\nsecond line")
        logger.warning("nearly full")
    finally:
        for handler in set(logging.getLogger().handlers) - set(before):
            logging.getLogger().removeHandler(handler)
            handler.close()
    found = asked(web, "/errors")
    assert {(one["level"], one["process"], one["message"]) for one in found} == {
        ("ERROR", "receiver-1", "storage is full"),
        ("WARNING", "receiver-1", "nearly full"),
    }


def test_only_a_writer_sees_the_inside(web: Web) -> None:
    tokens = Tokens(open_storage(web.settings.storage.root))
    reader = tokens.create("r", "reader", None)
    writer = tokens.create("w", "writer", None)
    researcher = tokens.create("x", "researcher", None, collections=["A"])
    with services_of(web.settings) as services:
        client = TestClient(make_app(web.settings, services), client=("10.0.0.5", 4), base_url="http://pacs.example")
        assert client.get("/").status_code == client.get("/page/app.js").status_code == 200
        for path in ("", "/arrivals", "/quarantine", "/peers", "/storage", "/errors"):
            inside = path not in ("", "/arrivals")
            assert client.get(f"/status{path}").status_code == 401
            got = client.get(f"/status{path}", headers={"authorization": f"Bearer {reader}"})
            assert (got.status_code, got.headers["x-sphere-role"]) == (403 if inside else 200, "reader")
            got = client.get(f"/status{path}", headers={"authorization": f"Bearer {researcher}"})
            assert (got.status_code, got.headers["x-sphere-role"]) == (403, "researcher")
            got = client.get(f"/status{path}", headers={"authorization": f"Bearer {writer}"})
            assert (got.status_code, got.headers["x-sphere-role"]) == (200, "writer")
        assert client.post("/status/peers", headers={"authorization": f"Bearer {reader}"}).status_code == 403


def of_study(uid: str) -> NewMember:
    return new_member(changed(slices(1)[0], StudyInstanceUID=uid, SOPInstanceUID=f"{uid}.1"))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_arrivals_are_read_as_they_come(tmp_path: Path) -> None:
    settings, clock = archive(tmp_path), Clock()
    storage = open_storage(settings.storage.root)
    arrivals = Arrivals(storage, settings.archive.state_dir, clock=clock)
    assert arrivals.look().members == 0
    for number in range(RECENT + 2):
        land(
            settings,
            [new_member(changed(slices(1)[0], StudyInstanceUID=f"1.2.{number}", SOPInstanceUID=f"1.2.{number}.1"))],
        )
    assert arrivals.look().members == 0  # it was seen a moment ago
    clock.now += 100
    seen = arrivals.look()
    assert (seen.members, seen.bundles, seen.open) == (RECENT + 2, RECENT + 2, 0)
    assert [one.study for one in seen.studies] == [f"1.2.{number}" for number in range(RECENT + 1, 1, -1)]
    assert seen == Arrivals(storage, settings.archive.state_dir, clock=clock).look()
    land(settings, [of_study(f"1.3.{number}") for number in range(STUDIES + 1)])
    clock.now += 100
    seen = arrivals.look()
    assert (seen.members, len(seen.studies)) == (RECENT + 2 + STUDIES + 1, STUDIES)
    assert seen.studies[0].study == f"1.3.{STUDIES}"


@pytest.mark.parametrize("failing", [False, True])
def test_an_extraction_tells_how_far_it_is(tmp_path: Path, failing: bool) -> None:
    steps: list[serving.JobState | None] = []

    def run(on_step: Callable[..., None]) -> str:
        on_step("headers", 3, 10)
        steps.append(serving.read_job(tmp_path))
        if failing:
            raise CatalogError("no catalog")
        return "10 read"

    working = cast(Archive, SimpleNamespace(extract=run))
    if failing:
        with pytest.raises(CatalogError, match="no catalog"):
            _extract(working, tmp_path, Event(), Event())
    else:
        _extract(working, tmp_path, Event(), Event())
    assert steps[0] and (steps[0].step, steps[0].done, steps[0].total, steps[0].ended_at) == ("headers", 3, 10, "")
    ended = serving.read_job(tmp_path)
    assert ended and ended.ended_at
    assert (ended.outcome, ended.failed) == (("no catalog", True) if failing else ("10 read", False))
