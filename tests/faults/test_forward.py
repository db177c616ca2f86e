"""Forwarding reaches a destination that was down, after the forwarder was killed; nothing is lost."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from pydicom import dcmread

from sphere import status
from sphere.conf.loading import from_dict
from sphere.jobs.forward_queue import entries
from sphere.jobs.tables import Tables
from tests.support.dicom_tools import running_orthanc, running_storescp
from tests.support.forwarder import catalogue, running_forwarder
from tests.support.landing import land, new_member, slices
from tests.support.ports import free_port
from tests.support.serving import ready, running_supervisor, send_signal

pytestmark = pytest.mark.faults


def until(condition: Callable[[], bool]) -> None:
    """Wait, for as long as a loaded machine may need."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_destination_that_is_down_and_a_forwarder_that_is_killed(tmp_path: Path) -> None:
    port = free_port()
    sections = {
        "peers": [{"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": port}],
        "forwards": [{"name": "ct", "to": "dest", "modality": "CT"}],
        "forwarding": {"every_s": 0.1, "retry_s": 0.2, "retry_max_s": 0.5},
    }
    settings = from_dict(sections, base=tmp_path / "archive")
    tables = Tables(settings)
    first, second = slices(3), slices(2, seed=5, study=5)

    with running_forwarder(settings) as forwarder:
        until(lambda: tables.open("forwards") is not None)
        catalogue(settings, land(settings, [new_member(data, second=n) for n, data in enumerate(first)]))
        until(lambda: any(entry.attempts for entry in entries(tables)))
        forwarder.kill()  # SIGKILL
    [state] = status.take(settings).forwards
    assert (state.sent, state.waiting, state.studies_waiting) == (0, 3, 1)
    assert "cannot connect" in state.last_error
    catalogue(settings, land(settings, [new_member(data, second=10 + n) for n, data in enumerate(second)]))
    received = tmp_path / "received"
    with running_storescp(received, port=port), running_forwarder(settings):
        until(lambda: [entry.state for entry in entries(tables)] == ["sent", "sent"])
        arrived = {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in received.iterdir()}
    assert arrived == {new_member(data).SOPInstanceUID for data in (*first, *second)}
    [state] = status.take(settings).forwards
    assert (state.sent, state.waiting, state.last_error) == (5, 0, "")
    assert "forward     ct to dest: 5 sent, 0 waiting" in str(status.take(settings))


def test_the_forwarder_of_serve_is_killed(tmp_path: Path) -> None:
    """`sphere serve` starts another one, and what came before and after is sent."""
    port = free_port()
    studies = [slices(3), slices(2, seed=5, study=5)]
    peer = {"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": port}
    often = {"every_s": 0.1, "retry_s": 0.2, "retry_max_s": 0.5}
    forwards = [{"name": "all", "to": "dest"}]
    with running_supervisor(tmp_path / "a", workers=1, peers=[peer], forwards=forwards, forwarding=often) as serving:
        settings = serving.settings
        tables = Tables(settings)
        until(lambda: tables.open("forwards") is not None)
        catalogue(settings, land(settings, [new_member(data, second=n) for n, data in enumerate(studies[0])]))
        until(lambda: any(entry.attempts for entry in entries(tables)))
        [forwarder] = [child for child in serving.state().children if child.name.startswith("forward")]
        send_signal(forwarder, signal.SIGKILL)
        serving.wait(lambda state: any(child.restarts for child in state.children) and ready(state))
        catalogue(settings, land(settings, [new_member(data, second=10 + n) for n, data in enumerate(studies[1])]))
        with running_storescp(tmp_path / "received", port=port):
            until(lambda: [entry.state for entry in entries(tables)] == ["sent", "sent"])
        assert serving.stop() == 0
    arrived = {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in (tmp_path / "received").iterdir()}
    assert arrived == {new_member(data).SOPInstanceUID for data in chain(*studies)}


def test_orthanc_gets_each_study_in_order_beside_a_destination_that_says_nothing(tmp_path: Path) -> None:
    """The forwarder is killed once Orthanc has something; who takes connections and is silent holds up nobody."""
    silent = socket.create_server(("127.0.0.1", 0))  # the kernel takes connections for it
    with silent, running_orthanc(tmp_path / "orthanc", {}) as orthanc:
        ports = {"a-silent": silent.getsockname()[1], "orthanc": orthanc.dicom_port}
        sections = {
            "peers": [
                {"name": name, "ae_title": "ORTHANC", "host": "127.0.0.1", "port": ports[name]} for name in ports
            ],
            "forwards": [{"name": f"to-{name}", "to": name} for name in ports],
            "forwarding": {"every_s": 0.1, "retry_s": 0.2, "retry_max_s": 0.5},
            "dimse": {"artim_s": 3600.0},  # seconds that an attempt at the silent one takes
        }
        settings = from_dict(sections, base=tmp_path / "archive")
        tables = Tables(settings)
        studies = [slices(8, study=1), slices(8, seed=5, study=5)]
        members = [new_member(data, second=n) for n, data in enumerate(chain(*zip(*studies, strict=True)))]
        with running_forwarder(settings) as forwarder:
            until(lambda: tables.open("forwards") is not None)
            catalogue(settings, land(settings, members))
            until(lambda: bool(orthanc.get("/instances")))
            forwarder.kill()  # SIGKILL
        with running_forwarder(settings):
            until(lambda: sorted(one.state for one in entries(tables)) == ["sent", "sent", "waiting", "waiting"])
        came = [
            orthanc.get(change["Path"])["MainDicomTags"]["SOPInstanceUID"]
            for change in orthanc.get("/changes?limit=1000")["Changes"]
            if change["ChangeType"] == "NewInstance"
        ]
    assert sorted(came) == sorted(member.SOPInstanceUID for member in members)
    for study in studies:
        wanted = [new_member(data).SOPInstanceUID for data in study]
        assert [uid for uid in came if uid in wanted] == wanted
    by_name = {state.forward: state for state in status.take(settings).forwards}
    assert (by_name["to-orthanc"].sent, by_name["to-orthanc"].waiting) == (16, 0)
    assert (by_name["to-a-silent"].sent, by_name["to-a-silent"].waiting) == (0, 16)
