"""Who asks for much and reads nothing costs what the sockets hold, and no other waits for it (C-FIND, QIDO-RS)."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from sphere.catalog.answer import Match
from sphere.conf.settings import Settings
from sphere.scp.identifier import build_identifier
from sphere.scp.peers import CallingPolicy
from sphere.scp.upper import command
from sphere.scp.web.app import Services
from tests.faults.test_dimse_faults import STUDY_FIND, Served, study
from tests.support.landing import archive
from tests.support.ports import free_port
from tests.support.raw_peer import RawPeer, echo_rq, p_data, pdv
from tests.support.web import serving_web

pytestmark = pytest.mark.faults

COUNT = 40_000  # answers of 1 kB each
HELD = COUNT // 2  # more than sockets and pages hold
STILL_S = 1.0  # seconds without another answer after which none is expected


class Counted:
    """A catalog of COUNT studies that knows how many were taken from it."""

    def __init__(self) -> None:
        self.given = 0

    def find(self, query: Any, **_: Any) -> Iterator[Match]:
        for number in range(COUNT):
            self.given += 1
            yield study(f"1.2.{number}")

    def close(self) -> None:
        """Nothing is open."""

    def until_still(self) -> int:
        """How many were taken when nobody takes more."""
        since, seen = time.monotonic(), -1
        while self.given == 0 or time.monotonic() - since < STILL_S:
            if self.given != seen:
                since, seen = time.monotonic(), self.given
            time.sleep(0.01)
        return seen


def find_rq() -> bytes:
    """A C-FIND-RQ for every study, on context 1."""
    fields = {"AffectedSOPClassUID": STUDY_FIND, "CommandField": 0x20, "MessageID": 1, "Priority": 0,
              "CommandDataSetType": 0}  # fmt: skip
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = False, True
    write_dataset(out, build_identifier({}, "STUDY"))
    return p_data(pdv(1, 3, command.encode(fields))) + p_data(pdv(1, 2, out.getvalue()))


def test_c_find(tmp_path: Path, settings: Settings) -> None:
    catalog = Counted()
    settings = settings.model_copy(update={"dimse": settings.dimse.model_copy(update={"port": free_port()})})
    with Served(settings, CallingPolicy(()), catalog) as served:  # type: ignore[arg-type]
        slow, other = RawPeer.connect(served.port), RawPeer.connect(served.port)
        slow.associate(classes=(STUDY_FIND,))
        slow.send(find_rq())
        assert catalog.until_still() < HELD
        other.associate()
        other.send(echo_rq())
        assert other.response()["Status"] == 0
        other.release()
        assert catalog.given < HELD
        answers, last = 0, b""
        with slow.sock.makefile("rb", buffering=1 << 20) as stream:
            while True:
                kind, length = (head := stream.read(6))[0], int.from_bytes(head[2:], "big")
                last = stream.read(length)
                assert kind == 0x04
                if last[5] & 1:
                    answers += 1
                    if not command.decode(last[6 : 4 + int.from_bytes(last[:4], "big")])["Status"]:
                        break
        assert (answers, catalog.given) == (COUNT + 1, COUNT)
        slow.close()


def test_qido(tmp_path: Path) -> None:
    catalog = Counted()

    def counted(services: Services) -> Services:
        return replace(services, finder=catalog)  # type: ignore[arg-type]

    with (
        serving_web(archive(tmp_path, web={"idle_s": 60}), counted) as web,
        socket.create_connection(("127.0.0.1", web.port), timeout=60) as slow,
    ):
        slow.sendall(b"GET /dicom-web/studies HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert catalog.until_still() < HELD
        assert web.client.get(f"http://127.0.0.1:{web.port}/healthz").status_code == 200
        assert catalog.given < HELD
        with slow.makefile("rb") as stream:
            answer = stream.read()
    assert catalog.given == COUNT
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert len(json.loads(unchunked(body))) == COUNT


def unchunked(body: bytes) -> bytes:
    """The content of a chunked body (RFC 9112 7.1)."""
    stream, found = io.BytesIO(body), []
    while size := int(stream.readline(), 16):
        found.append(stream.read(size))
        stream.readline()
    return b"".join(found)
