"""Retrieve from the catalog and from what landed since, at every level, without a gap and without doubles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from pydicom.uid import ExplicitVRLittleEndian
from pyspark.sql import SparkSession

from sphere.catalog.query import Model
from sphere.catalog.schema import Level
from sphere.jobs.extract import run
from sphere.scp import client
from sphere.scp.client import retrieve as retrieve_client
from sphere.scp.store import StoreAnswer, StoreRequest
from tests.support.receiver import Receiver, running_receiver
from tests.support.samples import CT_STORAGE, make_instance

pytestmark = [pytest.mark.spark, pytest.mark.faults]


class Kept:
    """What a C-GET brought."""

    def __init__(self) -> None:
        self.uids: list[str] = []

    def land(self, request: StoreRequest) -> StoreAnswer:
        assert request.TransferSyntaxUID == ExplicitVRLittleEndian
        self.uids.append(request.AffectedSOPInstanceUID)
        return StoreAnswer(0x0000)


def got(receiver: Receiver, level: Level, keys: Mapping[str, str], model: Model) -> list[str]:
    kept = Kept()
    *_, last = retrieve_client.get(
        receiver.peer, keys, settings=receiver.settings, store=kept, level=level, model=model, sop_classes=[CT_STORAGE]
    )
    assert (last.status, last.completed, last.failed) == (0x0000, len(kept.uids), 0)
    return sorted(kept.uids)


QUESTIONS: list[tuple[Model, Level, dict[str, str], list[str]]] = [
    ("PATIENT_ROOT", "PATIENT", {"PatientID": "A*"}, ["1.1.1.1", "1.1.1.2", "1.1.2.1", "1.2.1.1"]),
    ("PATIENT_ROOT", "PATIENT", {"PatientID": "AB"}, ["2.1.1.1"]),
    ("PATIENT_ROOT", "STUDY", {"PatientID": "A*", "StudyInstanceUID": "1.2"}, ["1.2.1.1"]),
    ("PATIENT_ROOT", "STUDY", {"PatientID": "AB", "StudyInstanceUID": "1.2"}, []),
    ("STUDY_ROOT", "STUDY", {"StudyInstanceUID": "1.1"}, ["1.1.1.1", "1.1.1.2", "1.1.2.1"]),
    ("STUDY_ROOT", "STUDY", {"StudyInstanceUID": "1.2\\2.1"}, ["1.2.1.1", "2.1.1.1"]),
    ("STUDY_ROOT", "STUDY", {"StudyInstanceUID": "9.9"}, []),
    ("STUDY_ROOT", "SERIES", {"StudyInstanceUID": "1.1", "SeriesInstanceUID": "1.1.1"}, ["1.1.1.1", "1.1.1.2"]),
    (
        "STUDY_ROOT", "IMAGE",
        {"StudyInstanceUID": "1.1", "SeriesInstanceUID": "1.1.1", "SOPInstanceUID": "1.1.1.2\\1.1.2.1"}, ["1.1.1.2"],
    ),
]  # fmt: skip


def test_the_catalog_and_what_landed_since_are_one(spark: SparkSession, tmp_path: Path) -> None:
    """Every question three times: nothing catalogued, one half, all. One instance lands twice."""
    uids = ["1.1.1.1", "1.1.1.2", "1.1.2.1", "1.2.1.1", "2.1.1.1"]
    files = [
        make_instance(
            tmp_path / f"{uid}.dcm", SOPInstanceUID=uid, StudyInstanceUID=uid[:3], SeriesInstanceUID=uid[:5],
            PatientID="AB" if uid.startswith("2") else "A*",
        )
        for uid in uids
    ]  # fmt: skip
    with running_receiver(tmp_path / "archive") as receiver:
        for landing in ([files[0], files[3]], files, []):
            if landing:
                assert all(one.stored for one in client.store(receiver.peer, landing, settings=receiver.settings))
            else:
                run(spark, receiver.settings)
            there = {one.SOPInstanceUID for one in receiver.members()}
            for model, level, keys, expected in QUESTIONS:
                assert got(receiver, level, keys, model) == [uid for uid in expected if uid in there], (level, keys)
            if len(there) < len(uids):
                run(spark, receiver.settings)
