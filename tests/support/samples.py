"""DICOM files for tests of services: the corpus where there is one, pydicom's packaged files, and small made ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from sphere.ingest.header import identify
from sphere.ingest.part10 import file_meta
from tests.conftest import CORPUS

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"


def sendable_files() -> list[Path]:
    """Real files that name an instance, one for each SOP Instance UID, in a stable order."""
    folders = [path for path in sorted(CORPUS.rglob("*")) if path.is_file()] if CORPUS.exists() else []
    packaged = sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"))
    chosen: dict[str, Path] = {}
    for path in [*packaged, *folders]:
        found = identify(path.read_bytes(), size=path.stat().st_size)
        if found.SOPInstanceUID and found.SOPClassUID and found.TransferSyntaxUID:
            chosen.setdefault(found.SOPInstanceUID, path)
    return list(chosen.values())


def make_instance(path: Path, *, transfer_syntax: str = ExplicitVRLittleEndian, **values: Any) -> Path:
    """A small instance in a Part 10 file, its data set in Explicit VR Little Endian whatever it is said to be."""
    dataset = Dataset()
    defaults: dict[str, Any] = {
        "SOPClassUID": CT_STORAGE, "SOPInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(), "PatientID": "T1", "PatientName": "Test^Made", "Modality": "CT",
    }  # fmt: skip
    for keyword, value in (defaults | values).items():
        setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dcmwrite(path, dataset, enforce_file_format=True)
    if transfer_syntax != ExplicitVRLittleEndian:
        meta = file_meta(
            sop_class_uid=dataset.SOPClassUID,
            sop_instance_uid=dataset.SOPInstanceUID,
            transfer_syntax_uid=transfer_syntax,
        )
        path.write_bytes(meta + dataset_of(path))
    return path


def dataset_of(path: Path) -> bytes:
    """The data set bytes of a file, whatever stands before them."""
    data = path.read_bytes()
    return data[identify(data, size=len(data)).dataset_offset :]
