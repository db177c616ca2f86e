"""C-MOVE and C-GET as pynetdicom asks: by Composite Instance Root (PS3.4 Annex Y), each level, and C-GET cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made when the module is loaded
    CompositeInstanceRootRetrieveGet,
    CompositeInstanceRootRetrieveMove,
    PatientRootQueryRetrieveInformationModelGet,
    PatientStudyOnlyQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelGet,
)

from sphere.scp import client
from tests.support.dicom_tools import running_storescp
from tests.support.ports import free_port
from tests.support.pynetdicom_user import hold_reactor
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import CT_STORAGE, make_instance

pytestmark = pytest.mark.interop

TOTAL = 12
ALL = [f"1.2.{series}.{number}" for series in (1, 2) for number in range(TOTAL // 2)]


@pytest.fixture(scope="module")
def destination() -> int:
    return free_port()


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory, destination: int) -> Iterator[Receiver]:
    """One patient, one study, two series."""
    base = tmp_path_factory.mktemp("archive")
    files = [
        make_instance(
            base / f"{uid}.dcm", PatientID="P", StudyInstanceUID="1.2", SeriesInstanceUID=uid[:5], SOPInstanceUID=uid
        )
        for uid in ALL
    ]
    peers = [{"name": "dest", "ae_title": "DEST", "host": "127.0.0.1", "port": destination}]
    with running_receiver(base / "a", {"peers": peers}) as running:
        assert all(result.stored for result in client.store(running.peer, files, settings=running.settings))
        yield running


def keys_of(level: str, **values: Any) -> Dataset:
    keys = Dataset()
    keys.QueryRetrieveLevel = level
    for keyword, value in values.items():
        setattr(keys, keyword, value)
    return keys


def got(receiver: Receiver, model: str, keys: Dataset, *, cancel_after: int = 0) -> tuple[Dataset, list[str]]:
    """The final response to a C-GET, and what came; C-CANCEL in the midst of sub-operation `cancel_after`."""
    came: list[str] = []

    def store(event: Any) -> int:
        came.append(str(event.request.AffectedSOPInstanceUID))
        if len(came) == cancel_after:
            event.assoc.send_c_cancel(1, query_model=model)
        return 0x0000

    ae = AE(ae_title="TEST")
    ae.dimse_timeout = 60
    ae.add_requested_context(model)
    ae.add_requested_context(CT_STORAGE, ExplicitVRLittleEndian)
    role = build_role(CT_STORAGE, scp_role=True)
    handlers = [(evt.EVT_C_STORE, store)]
    association = ae.associate("127.0.0.1", receiver.port, ext_neg=[role], evt_handlers=handlers)
    assert association.is_established
    hold_reactor(association)
    last = [status for status, _ in association.send_c_get(keys, model, msg_id=1)][-1]
    association.release()
    return last, came


@pytest.mark.parametrize(
    ("model", "keys", "expected"),
    [
        (PatientRootQueryRetrieveInformationModelGet, keys_of("PATIENT", PatientID="P"), ALL),
        (StudyRootQueryRetrieveInformationModelGet, keys_of("STUDY", StudyInstanceUID="1.2"), ALL),
        (
            PatientStudyOnlyQueryRetrieveInformationModelGet,
            keys_of("STUDY", PatientID="P", StudyInstanceUID="1.2"),
            ALL,
        ),
        (
            StudyRootQueryRetrieveInformationModelGet,
            keys_of("SERIES", StudyInstanceUID="1.2", SeriesInstanceUID=["1.2.1", "1.2.2"]),
            ALL,
        ),
        (
            StudyRootQueryRetrieveInformationModelGet,
            keys_of("IMAGE", StudyInstanceUID="1.2", SeriesInstanceUID="1.2.2", SOPInstanceUID="1.2.2.3"),
            ["1.2.2.3"],
        ),
        (
            CompositeInstanceRootRetrieveGet,
            keys_of("IMAGE", SOPInstanceUID=["1.2.2.1", "1.2.1.5"]),
            ["1.2.1.5", "1.2.2.1"],
        ),
    ],
    ids=["patient", "study", "patient and study only", "series", "image", "composite instance"],
)
def test_each_level_by_c_get(receiver: Receiver, model: str, keys: Dataset, expected: list[str]) -> None:
    last, came = got(receiver, model, keys)
    assert (last.Status, last.NumberOfCompletedSuboperations) == (0x0000, len(expected))
    assert (last.NumberOfFailedSuboperations, last.NumberOfWarningSuboperations) == (0, 0)
    assert sorted(came) == expected


@pytest.mark.parametrize(
    "keys",
    [
        keys_of("STUDY"),
        keys_of("SERIES", StudyInstanceUID="1.2"),
        keys_of("STUDY", StudyInstanceUID="1.2", StudyDate="20240101"),
        keys_of("FLOOR", StudyInstanceUID="1.2"),
    ],
    ids=["no study", "no series", "a key that is not unique", "no level"],
)
def test_identifiers_that_break_the_rules(receiver: Receiver, keys: Dataset) -> None:
    """PS3.4 C.4.3.1.3: identifier does not match SOP class; nothing is sent."""
    last, came = got(receiver, StudyRootQueryRetrieveInformationModelGet, keys)
    assert (last.Status, came) == (0xA900, [])


def test_composite_instance_root_by_c_move(receiver: Receiver, destination: int, tmp_path: Path) -> None:
    ae = AE(ae_title="TEST")
    ae.dimse_timeout = 60
    ae.add_requested_context(CompositeInstanceRootRetrieveMove)
    with running_storescp(tmp_path, port=destination):
        association = ae.associate("127.0.0.1", receiver.port)
        assert association.is_established
        hold_reactor(association)
        keys = keys_of("IMAGE", SOPInstanceUID=ALL[3:7])
        responses = [one for one, _ in association.send_c_move(keys, "DEST", CompositeInstanceRootRetrieveMove)]
        association.release()
    assert (responses[-1].Status, responses[-1].NumberOfCompletedSuboperations) == (0x0000, 4)
    assert len(list(tmp_path.iterdir())) == 4


def test_c_cancel_of_a_c_get(receiver: Receiver) -> None:
    """What was begun is finished, nothing else is (PS3.4 C.4.3.1.3.2); the archive answers as before afterwards."""
    model, keys = StudyRootQueryRetrieveInformationModelGet, keys_of("STUDY", StudyInstanceUID="1.2")
    last, came = got(receiver, model, keys, cancel_after=3)
    assert last.Status == 0xFE00
    assert last.NumberOfCompletedSuboperations == len(came) < TOTAL
    assert last.NumberOfCompletedSuboperations + last.NumberOfRemainingSuboperations == TOTAL
    last, came = got(receiver, model, keys)
    assert (last.Status, len(came)) == (0x0000, TOTAL)
