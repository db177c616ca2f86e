"""Invented CT series with headers as real scanners write them, for the demonstration, the tests and the benchmarks.

The same arguments give the same bytes. Persons, places and identifiers are made up.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping
from datetime import date, timedelta

import numpy as np
from pydicom import Dataset, FileMetaDataset, dcmwrite
from pydicom.sequence import Sequence
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

_FAMILY = ("Abel", "Besson", "Costa", "Dvořák", "Eriksson", "Fournier", "Gómez", "Hansen", "Ivanova", "Jørgensen")
_GIVEN = ("Ada", "Bruno", "Chloé", "Dov", "Élise", "Farid", "Greta", "Hugo", "Inès", "Jonas")
_REGIONS = (("CHEST", "Thorax"), ("ABDOMEN", "Abdomen"), ("HEAD", "Head"), ("PELVIS", "Pelvis"))
_MADE = "1.2.826.0.1.3680043.8.498.99."  # root of generated UIDs
# Stand for the values that differ from slice to slice, at full length; none is part of another value.
_UID, _NUMBER, _LOCATION = "8" * 64, "-98765", "-7654.25"


def ct_series(
    n: int,
    *,
    rows: int = 512,
    columns: int = 512,
    seed: int = 0,
    study: int | None = None,
    patient: Mapping[str, str] | None = None,
) -> Iterator[bytes]:
    """`n` slices of one axial CT series as DICOM Part 10 files, `rows` by `columns` pixels of 16 bits.

    Each `seed` is another series; series of one `study` number share patient and study (by default each has its own).
    `patient` has attributes of the patient by keyword, in place of those that the study number gives.
    The header has 75 elements, four of them sequences with nested ones, and takes about 2 kB (PS3.3 A.3).
    """
    dataset = _slice(seed, seed if study is None else study, rows, columns)
    for keyword, value in (patient or {}).items():
        setattr(dataset, keyword, value)
    with io.BytesIO() as buffer:
        dcmwrite(buffer, dataset, enforce_file_format=True)
        template = buffer.getvalue()
    shapes = _Phantom(rows, columns, seed)
    for number in range(1, n + 1):
        values = (
            (_UID, generate_uid(_MADE, entropy_srcs=[f"{seed} {number}"]).ljust(64, "\0")[:64]),
            (_NUMBER, f"{number:6}"),
            (_LOCATION, f"{number * 1.25 - 400:8.2f}"),
        )
        head = template
        for placeholder, value in values:
            head = head.replace(placeholder.encode(), value.encode())
        yield head + shapes.slice(number, n)


class _Phantom:
    """Ellipses that change along the body axis, with noise: enough for a viewer to show something."""

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
        self._distance = np.hypot(x / 0.85, y / 0.6)
        self._inner = np.hypot((x - 0.3) / 0.25, y / 0.3)
        self._noise = np.random.default_rng(seed).normal(0, 12, (rows, columns)).astype("int16")

    def slice(self, number: int, n: int) -> bytes:
        """PixelData, element and all, of a slice."""
        width = 0.75 + 0.2 * np.sin(np.pi * number / n)
        image = np.where(self._distance < width, 40, -1000) + np.where(self._inner < width, -800, 0)
        pixels = (image + np.roll(self._noise, number, 1) + 1024).astype("<i2").tobytes()
        return bytes(b"\xe0\x7f\x10\x00OW\0\0" + len(pixels).to_bytes(4, "little") + pixels)


def _slice(seed: int, study: int, rows: int, columns: int) -> Dataset:
    """The header of any slice, placeholders where slices differ."""
    chance = random.Random(f"study {study}")
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(_UID)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 192"
    _patient(dataset, chance)
    _study(dataset, study, chance)
    _series(dataset, seed, chance)
    _acquisition(dataset, random.Random(f"series {seed}"))
    _image(dataset, rows, columns)
    return dataset


def _patient(dataset: Dataset, chance: random.Random) -> None:
    dataset.PatientName = f"{chance.choice(_FAMILY)}^{chance.choice(_GIVEN)}"
    dataset.PatientID = f"P{chance.randrange(10**7):07}"
    dataset.IssuerOfPatientID = "INVENTED"
    dataset.PatientBirthDate = f"{date(1930, 1, 1) + timedelta(days=chance.randrange(30000)):%Y%m%d}"
    dataset.PatientSex = chance.choice("FM")
    dataset.PatientAge = f"{chance.randrange(18, 95):03}Y"


def _study(dataset: Dataset, study: int, chance: random.Random) -> None:
    day = f"{date(2010, 1, 1) + timedelta(days=chance.randrange(5500)):%Y%m%d}"
    region, text = chance.choice(_REGIONS)
    dataset.StudyInstanceUID = generate_uid(_MADE, entropy_srcs=[f"study {study}"])
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = day
    dataset.StudyTime = f"{chance.randrange(7, 19):02}{chance.randrange(60):02}00"
    dataset.AccessionNumber = f"A{chance.randrange(10**9):09}"
    dataset.StudyID = str(chance.randrange(10**5))
    dataset.StudyDescription = f"CT {text}"
    dataset.ReferringPhysicianName = f"{chance.choice(_FAMILY)}^{chance.choice(_GIVEN)}^^Dr"
    dataset.InstitutionName = "Invented Hospital"
    dataset.BodyPartExamined = region
    dataset.ProcedureCodeSequence = Sequence([_code("CTPROC", "99SPHERE", f"CT of {text}")])
    referenced = Dataset()
    referenced.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"
    referenced.ReferencedSOPInstanceUID = generate_uid(_MADE, entropy_srcs=[f"step {study}"])
    dataset.ReferencedStudySequence = Sequence([referenced])
    request = Dataset()
    request.ScheduledProcedureStepDescription = f"CT {text}"
    request.ScheduledProcedureStepID = str(chance.randrange(10**5))
    request.ScheduledProtocolCodeSequence = Sequence([_code("CTPROT", "99SPHERE", "Protocol")])
    request.RequestedProcedureID = str(chance.randrange(10**5))
    dataset.RequestAttributesSequence = Sequence([request])


def _series(dataset: Dataset, seed: int, chance: random.Random) -> None:
    dataset.Modality = "CT"
    dataset.Manufacturer = "SPHERE"
    dataset.ManufacturerModelName = "Phantom 64"
    dataset.StationName = f"CT{chance.randrange(4)}"
    dataset.DeviceSerialNumber = "0001"
    dataset.SeriesInstanceUID = generate_uid(_MADE, entropy_srcs=[f"series {seed}"])
    dataset.FrameOfReferenceUID = generate_uid(_MADE, entropy_srcs=[f"frame {seed}"])
    dataset.SeriesTime = dataset.AcquisitionTime = f"{dataset.StudyTime}.{seed % 10**6:06}"
    dataset.SeriesNumber = str(seed % 1000)
    dataset.SeriesDescription = f"{dataset.BodyPartExamined.title()} 1.25"
    dataset.ProtocolName = dataset.SeriesDescription
    dataset.PatientPosition = "HFS"
    dataset.PositionReferenceIndicator = ""


def _acquisition(dataset: Dataset, chance: random.Random) -> None:
    dataset.AcquisitionNumber = "1"
    dataset.KVP = chance.choice(("100", "120"))
    dataset.SliceThickness = "1.25"
    dataset.DataCollectionDiameter = "500"
    dataset.ReconstructionDiameter = "360"
    dataset.DistanceSourceToDetector = "949.1"
    dataset.DistanceSourceToPatient = "541.0"
    dataset.GantryDetectorTilt = "0"
    dataset.TableHeight = f"{chance.uniform(120, 190):.1f}"
    dataset.RotationDirection = "CW"
    dataset.ExposureTime = "500"
    dataset.XRayTubeCurrent = str(chance.randrange(80, 500))
    dataset.Exposure = "25"
    dataset.FilterType = "BODY FILTER"
    dataset.ConvolutionKernel = "STANDARD"
    dataset.SpiralPitchFactor = 0.984375
    dataset.CTDIvol = chance.uniform(2, 20)
    dose = Dataset()
    dose.CTDIPhantomTypeCodeSequence = Sequence([_code("113691", "DCM", "IEC Body Dosimetry Phantom")])
    dataset.CTExposureSequence = Sequence([dose])


def _image(dataset: Dataset, rows: int, columns: int) -> None:
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = _UID
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ContentTime = dataset.AcquisitionTime
    dataset.InstanceNumber = _NUMBER
    dataset.ImagePositionPatient = ["-180", "-180", _LOCATION]
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    dataset.SliceLocation = _LOCATION
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows = rows
    dataset.Columns = columns
    dataset.PixelSpacing = [f"{360 / rows:.6f}", f"{360 / columns:.6f}"]
    dataset.BitsAllocated = 16
    dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.WindowCenter = ["40", "-600"]
    dataset.WindowWidth = ["400", "1500"]
    dataset.RescaleIntercept = "-1024"
    dataset.RescaleSlope = "1"


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue = value
    code.CodingSchemeDesignator = scheme
    code.CodeMeaning = meaning
    return code
