"""A scan that finds nothing ends when nobody waits for it any more: over the service, C-FIND and QIDO-RS."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import duckdb
import pytest
from pydicom.uid import UID
from pynetdicom.pdu_primitives import SOPClassExtendedNegotiation

from sphere.catalog import interrupt, layers
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.conf.settings import Settings
from sphere.scp.identifier import build_identifier
from sphere.scp.peers import CallingPolicy
from tests.bench import hospital_catalog
from tests.faults.test_dimse_faults import Served, associated, hold_reactor
from tests.support.web import serving_web

pytestmark = pytest.mark.unit

IMAGE_FIND = UID("1.2.840.10008.5.1.4.1.2.2.1")
PATIENCE_S = 60.0
NOTHING = {"InstanceNumber": "999999", "EthnicGroup": "none"}
"""No instance has that number; that group is in `dataset` only, so every row would be looked at."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return hospital_catalog.kept(tmp_path_factory.mktemp("interrupt"), 60)[0]


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each instance of the files a million million times: a scan that takes days."""
    real = layers.instances_sql

    def many(*arguments: Any) -> str:
        number = 'CASE WHEN a.n + b.n >= 0 THEN x."InstanceNumber" END'  # else the key would be asked before the join
        times = "CROSS JOIN range(1000000) a(n) CROSS JOIN range(1000000) b(n)"
        return f'(SELECT x.* REPLACE ({number} AS "InstanceNumber") FROM {real(*arguments)} x {times})'

    with monkeypatch.context() as patch:
        patch.setattr(layers, "instances_sql", many)
        yield
    eventually(lambda: not interrupt._running)


def eventually(what: Callable[[], Any]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


class Wish:
    """Whether the answer is still wanted; remembers who asked, and that none did so beside another."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.asked: set[int] = set()
        self._alone = threading.Lock()

    def __call__(self) -> bool:
        assert self._alone.acquire(blocking=False)
        self.asked.add(threading.get_ident())
        self._alone.release()
        return self.over.is_set()


@pytest.mark.parametrize("what", ["find", "count"])
def test_of_the_service(settings: Settings, endless: None, what: str) -> None:
    query = Query.build("IMAGE", {"InstanceNumber": "999999"} if what == "count" else NOTHING)
    with QueryService(settings) as service:
        wish, answers = Wish(), list[Any]()

        def ask() -> None:
            answers.append(getattr(service, what)(query, cancelled=wish))
            if what == "find":
                answers.append(list(answers[0]))

        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: wish.asked - {asking.ident})
        assert asking.is_alive() and len(interrupt._running) == 1
        wish.over.set()
        asking.join(PATIENCE_S)
        assert not asking.is_alive() and answers[-1] in ([], 0)
        assert len(list(service.find(Query.build("STUDY", {"PatientName": "*"})))) == 60, "others are not concerned"


def test_that_it_was_an_error_of_another_kind(settings: Settings) -> None:
    """An interruption that nobody wished for does not look like an answer."""
    with QueryService(settings) as service, duckdb.connect() as db:
        with pytest.raises(ValueError, match="other"), interrupt.interrupted(db, Wish()):
            raise ValueError("other")
        assert service.count(Query.build("STUDY"), cancelled=Wish()) == 60
    assert not interrupt._running


def test_one_that_is_told_at_its_very_end_is_not_used_again() -> None:
    """What was interrupted is no cursor for the next query."""
    with duckdb.connect() as db:
        wish = Wish()
        wish.over.set()
        statement = interrupt._Statement(db, wish)
        with pytest.raises(duckdb.InterruptException, match="nobody waits"), statement:
            eventually(lambda: statement._interrupted)


def test_statements_that_are_short_have_no_thread(settings: Settings) -> None:
    wish = Wish()
    with QueryService(settings) as service:
        for _ in range(20):
            list(service.find(Query.build("STUDY", {"StudyTime": "08-09"}), cancelled=wish))
    assert wish.asked <= {threading.get_ident()}


@pytest.mark.parametrize("end", ["cancel", "abort"])
def test_over_an_association(settings: Settings, endless: None, end: str) -> None:
    with QueryService(settings) as service, Served(settings, CallingPolicy(()), service) as served:
        relational = SOPClassExtendedNegotiation()
        relational.sop_class_uid, relational.service_class_application_information = IMAGE_FIND, b"\x01"
        assoc = associated(served.port, IMAGE_FIND, ext_neg=[relational])
        hold_reactor(assoc)
        keys = build_identifier(NOTHING, "IMAGE")
        statuses: list[int | None] = []

        def ask() -> None:
            statuses.extend(status.get("Status") for status, _ in assoc.send_c_find(keys, IMAGE_FIND, msg_id=7))

        asking = threading.Thread(target=ask)
        asking.start()
        eventually(lambda: interrupt._running)
        if end == "cancel":
            assoc.send_c_cancel(7, query_model=IMAGE_FIND)
        else:
            assoc.dul.socket.socket.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        eventually(lambda: not interrupt._running)
        asking.join(PATIENCE_S)
        assert not asking.is_alive()
        assert statuses == ([0xFE00] if end == "cancel" else [None])
        (assoc.release if end == "cancel" else assoc.abort)()


@pytest.mark.parametrize("more", ["", "&count=true"])
def test_over_http(settings: Settings, endless: None, more: str) -> None:
    with QueryService(settings) as service, serving_web(settings, lambda same: replace(same, finder=service)) as web:
        query = "&".join(f"{name}={value}" for name, value in NOTHING.items())
        with socket.create_connection(("127.0.0.1", web.port)) as client:
            client.sendall(f"GET /dicom-web/instances?{query}{more} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            eventually(lambda: interrupt._running)
            time.sleep(interrupt.AFTER_S)
            assert interrupt._running, "as long as the client is there"
        eventually(lambda: not interrupt._running)
        assert web.get("/studies").status_code == 200
