"""Headers per second on one core: HeaderReader and RowBuilder, and in the same run pydicom with its JSON.

Run it with ``python -m tests.bench.bench_header``. Real headers are the CT and MR files of the corpus
(SPHERE_TEST_CORPUS), once in a fresh reader ("first pass": nothing is repeated but what a series repeats by itself) and
once more after that. Generated headers are those of CT series of 200 slices, 75 elements each, all instances different.
"""

from __future__ import annotations

import csv
import io
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from sphere.ingest.header import Header, HeaderReader, RowBuilder
from sphere.ingest.header.columns import COLUMNS
from sphere.ingest.records import MemberRecord

SLICES = 200
PREFIX = 16_384  # bytes given to the reader at first
BATCH = 1_000  # rows per record batch
REPEAT = 5  # measurements of which the best is reported

_STRINGS = ("bundle", "transfer_syntax_uid", "sha256", "source_aet", "origin", "dataset")
_LONGS = ("offset", "length", "dataset_offset", "pixel_offset")
SCHEMA = pa.schema(
    [(column.keyword, column.arrow) for column in COLUMNS]
    + [(name, pa.string()) for name in _STRINGS]
    + [(name, pa.int64()) for name in _LONGS]
    + [("received_at", pa.timestamp("us", "UTC")), ("header_warnings", pa.list_(pa.string()))]
)
RECORD = MemberRecord(
    bundle="bundles/2024/01/01/x.tar",
    offset=0,
    length=1,
    dataset_offset=300,
    SOPInstanceUID="1",
    SOPClassUID="1",
    StudyInstanceUID="1",
    SeriesInstanceUID="1",
    TransferSyntaxUID="1",
    sha256="0" * 64,
    received_at=datetime(2024, 1, 1, tzinfo=timezone.utc),
    source_aet="CT1",
    origin="dimse:CT1@10.0.0.1",
)


def ct_headers(count: int, *, seed: int = 1) -> Iterator[bytes]:
    """`count` Part 10 files of CT series, 75 elements and 2 bytes of pixels each."""
    random_ = random.Random(seed)
    for number in range(count):
        if number % SLICES == 0:
            series = _ct_series(random_)
        _ct_slice(series, number, random_)
        out = io.BytesIO()
        series.save_as(out, enforce_file_format=True)
        yield out.getvalue()


def _ct_series(random_: random.Random) -> Dataset:
    """What the slices of one series share: 66 elements."""
    study = f"1.2.826.0.1.3680043.10.1.{random_.randrange(10**12)}"
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    texts = {
        **{"SpecificCharacterSet": "ISO_IR 100", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"]},
        **{"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "StudyDate": "20240131", "SeriesDate": "20240131"},
        **{"AcquisitionDate": "20240131", "ContentDate": "20240131", "StudyTime": "101112.345000"},
        **{"SeriesTime": "101212.345000", "AccessionNumber": f"A{random_.randrange(10**7)}", "Modality": "CT"},
        **{"Manufacturer": "SIEMENS", "InstitutionName": "Hôpital Général"},
        **{"ReferringPhysicianName": "Doe^Jane", "StationName": "CT54321", "StudyDescription": "TDM thoracique"},
        **{"SeriesDescription": "Thorax 1.0 B70f", "InstitutionalDepartmentName": "Radiologie"},
        **{"PhysiciansOfRecord": "Doe^John", "OperatorsName": "Op^One"},
        **{"ManufacturerModelName": "SOMATOM Definition AS+", "PatientName": "Müller^Hélène"},
        **{"PatientID": str(random_.randrange(10**8)), "PatientBirthDate": "19500203", "PatientSex": "F"},
        **{"PatientAge": "073Y", "BodyPartExamined": "CHEST", "DeviceSerialNumber": "65432"},
        **{"SoftwareVersions": "syngo CT 2012B", "ProtocolName": "Thorax", "ScanOptions": "FAST"},
        **{"PatientPosition": "HFS", "StudyInstanceUID": study, "SeriesInstanceUID": f"{study}.1"},
        **{"FrameOfReferenceUID": f"{study}.2", "FilterType": "FLAT"},
        **{"ConvolutionKernel": ["B70f", "2"], "RotationDirection": "CW", "PhotometricInterpretation": "MONOCHROME2"},
        **{"RescaleType": "HU"},
    }
    numbers = {
        **{"SliceThickness": "1", "KVP": "120", "DataCollectionDiameter": "500", "ReconstructionDiameter": "350"},
        **{"DistanceSourceToDetector": "1085.6", "DistanceSourceToPatient": "595", "GantryDetectorTilt": "0"},
        **{"TableHeight": "142.5", "ExposureTime": "500", "Exposure": "68"},
        **{"FocalSpots": "1.2", "SeriesNumber": "4", "AcquisitionNumber": "2", "RescaleIntercept": "-1024"},
        **{"RescaleSlope": "1", "WindowCenter": ["-600", "50"], "WindowWidth": ["1200", "350"]},
        **{"PixelSpacing": ["0.68359375", "0.68359375"], "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"]},
        **{"SamplesPerPixel": 1, "Rows": 512, "Columns": 512, "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11},
        **{"PixelRepresentation": 0, "SmallestImagePixelValue": 0},
    }
    for keyword, value in (texts | numbers).items():
        setattr(ds, keyword, value)
    ds.PixelData = b"\0\0"
    return ds


def _ct_slice(ds: Dataset, number: int, random_: random.Random) -> None:
    """What is different in every slice."""
    place = number % SLICES
    ds.SOPInstanceUID = f"{ds.SeriesInstanceUID}.{number}"
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.AcquisitionTime = ds.ContentTime = f"1013{place % 60:02d}.{random_.randrange(10**6):06d}"
    ds.InstanceNumber = place + 1
    ds.ImagePositionPatient = ["-175", "-310.5", f"{-1200.5 + place:.1f}"]
    ds.SliceLocation = f"{-1200.5 + place:.1f}"
    ds.XRayTubeCurrent = random_.randrange(80, 400)
    ds.LargestImagePixelValue = random_.randrange(1000, 4000)


def rows(reader: HeaderReader, members: Sequence[bytes]) -> None:
    """Read all headers into record batches."""
    builder = RowBuilder(SCHEMA)
    for data in members:
        header = reader.read(data[:PREFIX], size=len(data), fetch=lambda o, n, data=data: data[o : o + n])
        assert isinstance(header, Header), header
        builder.append(header, RECORD)
        if len(builder) == BATCH:
            builder.batch()
    builder.batch()


def naive(members: Sequence[bytes]) -> None:
    """The same headers by pydicom alone."""
    for data in members:
        dcmread(io.BytesIO(data), stop_before_pixels=True, force=True).to_json()


def _measure(run: Callable[[], None], count: int) -> float:
    """Microseconds of processor time per header."""
    begin = time.process_time()
    run()
    return (time.process_time() - begin) / count * 1e6


def _report(name: str, micros: float, baseline: float) -> None:
    print(f"{name:58} {micros:8.1f} µs {1e6 / micros:8.0f}/s {baseline / micros:6.1f} x pydicom")


def _corpus() -> list[bytes]:
    folder = Path(os.environ.get("SPHERE_TEST_CORPUS") or Path(__file__).parents[2] / "../shared/data/dicom")
    if not (folder / "INDEX.csv").exists():
        return []
    with (folder / "INDEX.csv").open(newline="", encoding="utf-8") as index:
        names = [row["file"] for row in csv.DictReader(index) if row["modality"] in ("CT", "MR")]
    members = [(folder / name).read_bytes() for name in names]
    return [data for data in members if _usable(data)]


def _usable(data: bytes) -> bool:
    header = HeaderReader(max_header=1 << 26).read(data, size=len(data), fetch=lambda o, n: b"")
    if not isinstance(header, Header):
        return False
    try:
        naive([data])
    except (ValueError, TypeError):  # pydicom cannot make JSON of it
        return False
    return True


def _best(run: Callable[[], None], count: int) -> float:
    """The least of several measurements: other work on the machine only ever adds to one."""
    return min(_measure(run, count) for _ in range(REPEAT))


def main() -> None:
    """Print one line per measurement."""
    generated = list(ct_headers(4_000))
    baseline = _best(lambda: naive(generated[:200]), 200)
    _report("75-element CT headers, pydicom", baseline, baseline)
    fresh = _best(lambda: rows(HeaderReader(max_header=1 << 26), generated), len(generated))
    _report("75-element CT headers", fresh, baseline)
    if real := _corpus():
        name = f"{len(real)} CT and MR headers of the corpus"
        baseline = _best(lambda: naive(real), len(real))
        _report(f"{name}, pydicom", baseline, baseline)
        first = _best(lambda: rows(HeaderReader(max_header=1 << 26), real), len(real))
        _report(f"{name}, first pass", first, baseline)
        reader = HeaderReader(max_header=1 << 26)
        rows(reader, real)
        _report(f"{name}, again", _best(lambda: rows(reader, real * 4), 4 * len(real)), baseline)


if __name__ == "__main__":
    main()
