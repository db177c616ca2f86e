"""An annotation that was answered with 201 is on the disk, and a large one takes no more memory than a small one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.support.landing import archive
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

LARGE = 96 << 20
PARAMS = {"uid": "1.2.3.4.5", "level": "study", "allow_unknown": "true"}


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with serving_web(archive(tmp_path, annotations={"limit_mib": 100})) as running:
        yield running


def url(web: Web, path: str = "") -> str:
    return f"http://127.0.0.1:{web.port}/annotations{path}"


def post(web: Web, content: bytes | Iterator[bytes]) -> httpx.Response:
    return web.client.post(url(web), params=PARAMS, content=content, headers={"content-type": "text/plain"})


def test_each_sync_is_waited_for(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that refuses the first, the second, ... of what is synced: no 201, and nothing in halves is shown.

    What the thread of the audit syncs meanwhile fails as well, and is not counted.
    """
    refused, left = 0, 0
    plain = {name: getattr(os, name) for name in ("fdatasync", "fsync")}

    def failing(name: str, fd: int) -> None:
        nonlocal left
        if left == 0:
            raise OSError(errno.EIO, "the disk is broken")
        left -= threading.current_thread().name != "audit"
        plain[name](fd)

    while True:
        left = refused
        with monkeypatch.context() as broken:
            for name in plain:
                broken.setattr(os, name, lambda fd, name=name: failing(name, fd))
            answer = post(web, b"of a broken disk")
        if answer.status_code == 201:
            break
        assert (answer.status_code, answer.headers["content-type"]) == (507, "application/problem+json")
        refused += 1
    assert refused >= 2, "the bytes, and what tells of them"
    assert post(web, b"whole").status_code == 201
    rows = web.client.get(url(web)).json()
    assert {web.client.get(url(web, f"/{row['id']}/file")).content for row in rows} == {b"of a broken disk", b"whole"}
    assert len(rows) in (2, 3), "of the last sync, that of the journal, nobody knows what reached the disk"


def test_a_large_file_takes_no_more_memory_than_a_small_one(web: Web) -> None:
    process, most = psutil.Process(), 0
    post(web, b"small")
    before = process.memory_info().rss

    def content() -> Iterator[bytes]:
        nonlocal most
        for _ in range(LARGE >> 20):
            yield bytes(1 << 20)
            most = max(most, process.memory_info().rss)

    made = post(web, content())
    assert (made.status_code, made.json()["size"]) == (201, LARGE)
    received = 0
    with web.client.stream("GET", f"http://127.0.0.1:{web.port}{made.json()['href']}") as response:
        for chunk in response.iter_raw(1 << 20):
            received += len(chunk)
            most = max(most, process.memory_info().rss)
    assert received == LARGE
    assert most - before < LARGE // 3
