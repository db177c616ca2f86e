"""What a hospital has, invented: patients, studies, series and instances, of any number, as columns of the catalog.

On average a study has 4 series and 25 instances; the same arguments give the same rows. Every column comes from numpy
and Arrow arrays at the level where it lives, and is spread over the instances by index: no row is made in Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sphere.catalog.schema import BY_KEYWORD, INSTANCE_FIELDS, TABLES
from tests.bench import people

BATCH_STUDIES = 8_000
"""Studies of one batch of extraction (200,000 instances, its default): rows are sorted by study within a batch."""
PER_BUNDLE = 500
"""Members of a sealed bundle: 256 MiB of CT slices."""
FIRST_DAY, DAYS = np.datetime64("2004-01-01"), 7305
LARGE_EVERY = 2_000
"""One study in so many has series of 500 instances: two of them make the study of 1,000 that the bench looks up."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Kind:
    """What one modality's studies are like: share of all, mean series a study and instances a series."""

    modality: str
    sop_class: str
    share: float
    series: float
    instances: float
    root: str
    constants: dict[str, Any]


_CROSS = {
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "PatientPosition": "HFS", "SliceThickness": 1.25,
    "ImageOrientationPatient": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], "PixelSpacing": [0.703125, 0.703125],
    "SpacingBetweenSlices": 1.25, "PositionReferenceIndicator": "SN",
}  # fmt: skip
_CT = {
    "KVP": 120.0, "DataCollectionDiameter": 500.0, "ReconstructionDiameter": 360.0, "DistanceSourceToDetector": 949.1,
    "DistanceSourceToPatient": 541.0, "GantryDetectorTilt": 0.0, "TableHeight": 154.0, "RotationDirection": "CW",
    "ExposureTime": 500, "XRayTubeCurrent": 280, "Exposure": 25, "FilterType": "BODY FILTER",
    "ConvolutionKernel": ["STANDARD"], "RescaleIntercept": -1024.0, "RescaleSlope": 1.0, "WindowCenter": [40.0, -600.0],
    "WindowWidth": [400.0, 1500.0], "Manufacturer": "SIEMENS", "ManufacturerModelName": "SOMATOM Definition AS+",
    "DeviceSerialNumber": "65123", "SoftwareVersions": ["syngo CT 2012B"],
}  # fmt: skip
_MR = {
    "ScanningSequence": ["SE"], "SequenceVariant": ["SK", "SP"], "ScanOptions": ["PFP"], "MRAcquisitionType": "2D",
    "RepetitionTime": 4500.0, "EchoTime": 102.0, "NumberOfAverages": 2.0, "ImagingFrequency": 63.67,
    "ImagedNucleus": "1H", "EchoNumbers": [1], "MagneticFieldStrength": 1.5, "NumberOfPhaseEncodingSteps": 250,
    "EchoTrainLength": 15, "PercentSampling": 80.0, "PixelBandwidth": 191.0, "FlipAngle": 150.0, "SAR": 0.9,
    "Manufacturer": "GE MEDICAL SYSTEMS", "ManufacturerModelName": "SIGNA Artist", "DeviceSerialNumber": "00334",
    "SoftwareVersions": ["29", "LX", "MR29.1"],
}  # fmt: skip
_XRAY = {
    "KVP": 85.0, "Exposure": 4, "ExposureTime": 11, "PatientOrientation": ["L", "F"], "ViewPosition": "PA",
    "PresentationIntentType": "FOR PRESENTATION", "Manufacturer": "Philips Medical Systems",
    "ManufacturerModelName": "DigitalDiagnost", "DeviceSerialNumber": "SN0077", "SoftwareVersions": ["2.1.3"],
}  # fmt: skip
_ULTRASOUND = {
    "ImageType": ["ORIGINAL", "PRIMARY", "", "0001"], "Manufacturer": "Canon", "ManufacturerModelName": "Aplio i800",
    "DeviceSerialNumber": "USN2113", "SoftwareVersions": ["V6.5"], "TransducerData": ["PVI-475BX"],
}  # fmt: skip

KINDS = (
    Kind("CT", "1.2.840.10008.5.1.4.1.1.2", 0.28, 5.0, 11.0, "1.3.12.2.1107.5.1.4.65123.", _CROSS | _CT),
    Kind("MR", "1.2.840.10008.5.1.4.1.1.4", 0.22, 8.0, 7.0, "1.2.840.113619.2.408.1448.", _CROSS | _MR),
    Kind("DX", "1.2.840.10008.5.1.4.1.1.1.1", 0.30, 1.6, 1.2, "1.3.46.670589.30.1.6.1.", _XRAY),
    Kind("US", "1.2.840.10008.5.1.4.1.1.6.1", 0.20, 2.0, 6.0, "1.2.392.200036.9116.6.13.", _ULTRASOUND),
)
"""Modalities of an invented hospital. The roots are those of devices in wide use: UIDs that share long beginnings."""

IMAGE_VALUES = {
    "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": 512, "Columns": 512, "BitsAllocated": 16,
    "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0, "InstitutionName": "Invented Hospital",
    "InstitutionAddress": "1 Invented Street", "InstitutionalDepartmentName": "Radiology", "AcquisitionNumber": 1,
    "LossyImageCompression": "00", "SpecificCharacterSet": ["ISO_IR 192"], "PatientAge": "063Y",
}  # fmt: skip


def _text(values: npt.ArrayLike) -> pa.Array:
    return pa.array(np.asarray(values)).cast(pa.string())


def _joined(*parts: pa.Array | str) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "")


def _padded(values: npt.ArrayLike, width: int) -> pa.Array:
    return pc.utf8_lpad(_text(values), width, "0")


class Hospital:
    """The entities of `studies` studies, as arrays: one element a study, a series or (by batch) an instance."""

    def __init__(self, studies: int, seed: int = 1) -> None:
        self.studies, self.seed = studies, seed
        rng = np.random.default_rng(seed)
        self.kind: Ints = rng.choice(len(KINDS), studies, p=[kind.share for kind in KINDS])
        mean_series = np.array([kind.series for kind in KINDS])[self.kind]
        mean_series = mean_series * 4.0 / mean_series.mean()
        self.series_of: Ints = 1 + rng.poisson(np.maximum(0.0, mean_series - 1))
        self.first_series: Ints = np.concatenate([[0], np.cumsum(self.series_of)])
        self.study_of: Ints = np.repeat(np.arange(studies), self.series_of)
        self.instances_of = self._instances(rng)
        self.first_instance: Ints = np.concatenate([[0], np.cumsum(self.instances_of)])
        self.patients = max(1, int(studies / 2.7))
        self.patient: Ints = np.minimum(self.patients - 1, (self.patients * rng.random(studies) ** 1.3).astype(int))
        self.patient = rng.permutation(self.patients)[self.patient]
        self.day: Ints = np.sort((DAYS * rng.random(studies) ** 0.7).astype(np.int64))
        self.second: Ints = rng.integers(7 * 3600, 19 * 3600, studies)
        self.rows: Ints = rng.choice([256, 512, 1024], studies)
        self._noise: Ints = rng.integers(10**14, 10**15, studies)
        self._person = people.People(self.patients, seed)

    def _instances(self, rng: np.random.Generator) -> Ints:
        """Instances of each series: few or many, 25 a study on average, LARGE_EVERY-th studies large."""
        mean = np.array([kind.instances for kind in KINDS])[self.kind][self.study_of]
        drawn = mean * rng.lognormal(0, 0.8, len(mean))
        drawn *= 25 * self.studies / drawn.sum()
        counts: Ints = np.maximum(1, drawn.round().astype(np.int64))
        for study in self.large():
            first = self.first_series[study]
            counts[first : first + 2] = 500
        return counts

    def large(self) -> Ints:
        """The studies that have two series of 500 instances."""
        candidates: Ints = np.flatnonzero(self.series_of == 2)
        return candidates[:: max(1, LARGE_EVERY // 8)]

    @property
    def instances(self) -> int:
        """How many instances there are."""
        return int(self.first_instance[-1])

    @cached_property
    def bundles(self) -> pa.Array:
        """Names of all bundles, in the order of their members."""
        count = -(-self.instances // PER_BUNDLE)
        day = (1 + number * 28 * PER_BUNDLE // (self.instances + PER_BUNDLE) for number in range(count))
        return pa.array([f"bundles/2024/01/{at:02}/{self.seed}-{number:07}.tar" for number, at in enumerate(day)])

    @cached_property
    def study_uid(self) -> pa.Array:
        """Study Instance UIDs: the root of the device, then digits that look like a time and a counter."""
        roots = pa.array([kind.root for kind in KINDS]).take(pa.array(self.kind))
        return _joined(roots, _text(self._noise), ".", _text(np.arange(self.studies)))

    @cached_property
    def series_uid(self) -> pa.Array:
        """Series Instance UIDs."""
        return _joined(self.study_uid.take(pa.array(self.study_of)), ".", _text(self.series_number))

    @cached_property
    def series_number(self) -> Ints:
        """From 1 in each study."""
        return np.arange(len(self.study_of)) - self.first_series[self.study_of] + 1

    @cached_property
    def date(self) -> pa.Array:
        """Study Date; studies are in the order of their days."""
        return pa.array(FIRST_DAY + self.day.astype("timedelta64[D]"), pa.date32())

    @cached_property
    def patient_values(self) -> dict[str, pa.Array]:
        """Attributes of the patients, an element a patient."""
        return {
            "PatientID": _joined("P", _padded(np.arange(self.patients), 8)),
            "IssuerOfPatientID": pa.repeat(pa.scalar("INVENTED"), self.patients),
            "PatientName": self._person.names,
            "PatientBirthDate": self._person.birth_dates,
            "PatientSex": self._person.sexes,
        }

    @cached_property
    def study_values(self) -> dict[str, pa.Array]:
        """Attributes of the studies and of their patients, an element a study."""
        who = pa.array(self.patient)
        region = pa.array(people.REGIONS).take(pa.array(self._noise % len(people.REGIONS)))
        modality = pa.array([kind.modality for kind in KINDS]).take(pa.array(self.kind))
        time = _joined(*(_padded(part, 2) for part in _clock(self.second)))
        return {name: column.take(who) for name, column in self.patient_values.items()} | {
            "StudyInstanceUID": self.study_uid,
            "StudyDate": self.date,
            "StudyTime": time,
            "AccessionNumber": _joined("A", _padded((np.arange(self.studies) * 7919 + 17) % 10**9, 9)),
            "StudyID": _text(self._noise % 100_000),
            "StudyDescription": pc.binary_join_element_wise(modality, region, " "),
            "ReferringPhysicianName": self._person.names.take(pa.array(self._noise % min(400, self.patients))),
        }

    @cached_property
    def series_values(self) -> dict[str, pa.Array]:
        """Attributes of the series, an element a series."""
        study = pa.array(self.study_of)
        kind = pa.array(self.kind[self.study_of])
        region = pa.array(people.REGIONS).take(pa.array(self._noise[self.study_of] % len(people.REGIONS)))
        constants = {
            name: pa.array([one.constants.get(name) for one in KINDS], BY_KEYWORD[name].arrow).take(kind)
            for name in (*_OF_SERIES, "SoftwareVersions")
        }
        return constants | {
            "SeriesInstanceUID": self.series_uid,
            "Modality": pa.array([kind.modality for kind in KINDS]).take(kind),
            "SeriesNumber": pa.array(self.series_number),
            "SeriesDescription": _joined(region, " ", _text(self.series_number)),
            "SeriesDate": self.date.take(study),
            "SeriesTime": self.study_values["StudyTime"].take(study),
            "BodyPartExamined": pc.utf8_upper(region),
            "ProtocolName": region,
            "FrameOfReferenceUID": _joined(self.series_uid, ".0"),
            "StationName": _joined("ST", _text(self._noise[self.study_of] % 9)),
            "InstitutionName": pa.repeat(pa.scalar(IMAGE_VALUES["InstitutionName"]), len(kind)),
            "InstitutionAddress": pa.repeat(pa.scalar(IMAGE_VALUES["InstitutionAddress"]), len(kind)),
            "InstitutionalDepartmentName": pa.repeat(pa.scalar(IMAGE_VALUES["InstitutionalDepartmentName"]), len(kind)),
        }


_OF_SERIES = (
    "Manufacturer",
    "ManufacturerModelName",
    "DeviceSerialNumber",
    "PatientPosition",
    "PositionReferenceIndicator",
)


def _clock(seconds: Ints) -> tuple[Ints, Ints, Ints]:
    return seconds // 3600, seconds // 60 % 60, seconds % 60


@dataclass(frozen=True)
class Batch:
    """The instances of studies [first, last), in the order in which one batch of extraction writes them."""

    hospital: Hospital
    first: int
    last: int

    @cached_property
    def series(self) -> Ints:
        """The series of each instance; studies in the order of their UIDs."""
        h = self.hospital
        order = pc.sort_indices(h.study_uid.slice(self.first, self.last - self.first)).to_numpy() + self.first
        series = _ranges(h.first_series[order], h.series_of[order])
        uids = pa.table({"t": h.study_uid.take(pa.array(h.study_of[series])), "s": h.series_uid.take(pa.array(series))})
        series = series[pc.sort_indices(uids, [("t", "ascending"), ("s", "ascending")]).to_numpy()]
        return np.repeat(series, h.instances_of[series])

    @cached_property
    def number(self) -> Ints:
        """InstanceNumber, from 1 in each series."""
        starts = np.flatnonzero(np.diff(self.series, prepend=-1))
        return np.arange(len(self.series)) - np.repeat(starts, np.diff(starts, append=len(self.series))) + 1

    def columns(self, start: int, stop: int) -> pa.RecordBatch:
        """Rows [start, stop) of the batch, in all columns of `instances`."""
        schema = TABLES["instances"].schema
        series, number = self.series[start:stop], self.number[start:stop]
        typed = self._attributes(series, number)
        fixed = self._fixed(series, number)
        made = typed | fixed | {"dataset": _dataset(typed, series)}
        arrays = [
            as_type(made[field.name], field.type) if field.name in made else pa.nulls(stop - start, field.type)
            for field in schema
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _attributes(self, series: Ints, number: Ints) -> dict[str, pa.Array]:
        h = self.hospital
        study = h.study_of[series]
        kind = pa.array(h.kind[study])
        values = {name: column.take(pa.array(study)) for name, column in h.study_values.items()}
        values |= {name: column.take(pa.array(series)) for name, column in h.series_values.items()}
        names = dict.fromkeys(name for one in KINDS for name in one.constants)
        for name in (name for name in names if name not in values):
            values[name] = pa.array([one.constants.get(name) for one in KINDS], BY_KEYWORD[name].arrow).take(kind)
        for name, value in IMAGE_VALUES.items():
            values.setdefault(name, pa.array([value], BY_KEYWORD[name].arrow).take(pa.repeat(0, len(series))))
        location = pa.array(number * 1.25 - 400)
        position = pa.ListArray.from_arrays(
            pa.array(np.arange(len(number) + 1, dtype=np.int32) * 3),
            pa.array(np.column_stack([np.full(len(number), -180.0), np.full(len(number), -180.0), location]).ravel()),
        )
        return values | {
            "SOPInstanceUID": _joined(h.series_uid.take(pa.array(series)), ".", _text(number)),
            "SOPClassUID": pa.array([one.sop_class for one in KINDS]).take(kind),
            "InstanceNumber": pa.array(number),
            "ContentDate": h.date.take(pa.array(study)),
            "AcquisitionDate": h.date.take(pa.array(study)),
            "ContentTime": h.study_values["StudyTime"].take(pa.array(study)),
            "SliceLocation": location,
            "ImagePositionPatient": position,
        }

    def _fixed(self, series: Ints, number: Ints) -> dict[str, pa.Array]:
        """Where the bytes are: the instances of all studies one after the other, PER_BUNDLE in a bundle."""
        h = self.hospital
        place = h.first_instance[series] + number - 1
        length = 1_900 + 2 * h.rows[h.study_of[series]] ** 2
        bundle = h.bundles.take(pa.array(place // PER_BUNDLE))
        digest = _padded(place * 48_271 % (1 << 61), 64)
        return {
            "bundle": bundle,
            "offset": pa.array(512 + place % PER_BUNDLE * (2 << 20)),
            "length": pa.array(length),
            "dataset_offset": pa.array(np.full(len(place), 376)),
            "pixel_offset": pa.array(np.full(len(place), 1_900)),
            "transfer_syntax_uid": pa.repeat(pa.scalar("1.2.840.10008.1.2.1"), len(place)),
            "sha256": digest,
            "received_at": pa.array(received_us(h, series) + number * 40_000, INSTANCE_FIELDS["received_at"]),
            "source_aet": _joined("MOD", _text(h.kind[h.study_of[series]])),
            "origin": pa.repeat(pa.scalar("C-STORE"), len(place)),
        }


def received_us(h: Hospital, series: Ints) -> Ints:
    """When each series began to arrive, in microseconds since 1970: ten minutes one after the other."""
    study = h.study_of[series]
    days = (FIRST_DAY - np.datetime64("1970-01-01")).astype(int) + h.day[study]
    seconds: Ints = days * 86_400 + h.second[study] + h.series_number[series] * 600
    return seconds * 1_000_000


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """The numbers of [start, start + count) for each, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(starts - np.concatenate([[0], ends[:-1]]), counts)


def as_type(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    return column if column.type == wanted else column.cast(wanted)


_OF_INSTANCE = frozenset(("SOPInstanceUID", "InstanceNumber", "SliceLocation", "ImagePositionPatient"))


def _dataset(typed: dict[str, pa.Array], series: Ints) -> pa.Array:
    """The headers as DICOM JSON (PS3.18 Annex F): every typed attribute, and some sequences and private elements more.

    What a series has in common is written once for it, then taken for its instances.
    """
    _, firsts, which = np.unique(series, return_index=True, return_inverse=True)
    first, spread = pa.array(firsts), pa.array(which)
    parts: list[pa.Array | str] = ["{"]
    common: list[pa.Array] = []
    for tag, name in sorted((BY_KEYWORD[name].tag, name) for name in typed):
        vr = BY_KEYWORD[name].vr.replace("US or SS", "US")
        if name in _OF_INSTANCE:
            parts += [_joined("", *common).take(spread)] if common else []
            parts.append(_element(f"{tag:08X}", vr, typed[name]))
            common = []
        else:
            common.append(_element(f"{tag:08X}", vr, typed[name].take(first)))
    parts += [_joined("", *common).take(spread)] if common else []
    return _joined(*parts, _MORE, "}")


_MORE = (
    '"00090010":{"vr":"LO","Value":["INVENTED GEMS 01"]},"00091001":{"vr":"LO","Value":["reconstruction 4711"]},'
    '"00081032":{"vr":"SQ","Value":[{"00080100":{"vr":"SH","Value":["PROC77"]},"00080102":{"vr":"SH","Value":["99INV"]},'
    '"00080104":{"vr":"LO","Value":["An invented procedure"]}}]},"00400275":{"vr":"SQ","Value":[{"00400007":{"vr":"LO",'
    '"Value":["Step"]},"00400009":{"vr":"SH","Value":["4711"]},"00401001":{"vr":"SH","Value":["REQ1"]}}]}'
)


def _element(tag: str, vr: str, column: pa.Array) -> pa.Array:
    head = f'"{tag}":{{"vr":"{vr}","Value":['
    if pa.types.is_list(column.type):
        text = pc.binary_join(_values(vr, column.flatten(), column), ",")
    else:
        text = _value(vr, column)
    return pc.fill_null(pc.binary_join_element_wise(head, text, "]},", ""), "")


def _values(vr: str, flat: pa.Array, lists: pa.Array) -> pa.Array:
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, _value(vr, flat), mask=lists.is_null())


def _value(vr: str, column: pa.Array) -> pa.Array:
    if pa.types.is_date(column.type):
        column = pc.strftime(column, "%Y%m%d")
    if not pa.types.is_string(column.type):
        return column.cast(pa.string())
    if vr == "PN":
        return people.json_names(column)
    return pc.binary_join_element_wise('"', column, '"', "")


def patient_keys(h: Hospital) -> pa.Array:
    """What PATIENT_KEY_SQL computes, an element a patient."""
    return _joined("9:", h.patient_values["PatientID"], h.patient_values["IssuerOfPatientID"])
