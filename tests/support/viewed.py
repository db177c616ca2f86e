"""A CT whose every grey level is known, with a segmentation and a report of measurements of it."""

from __future__ import annotations

import io

import highdicom as hd
import numpy as np
import numpy.typing as npt
from highdicom.sr import coding
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from tests.support.landing import changed, slices

SIZE = 64  # rows and columns
WINDOW = 1024  # levels that are shown from black to white, above -1024 HU


def gradient_ct(n: int) -> list[bytes]:
    """`n` slices, brighter from left to right by 2 of 256 grey levels a column, and by 4 from slice to slice."""
    column = np.arange(SIZE, dtype="<u2")
    return [
        changed(
            data,
            PixelData=np.tile(column * 8 + number * 16, (SIZE, 1)).tobytes(),
            WindowCenter=WINDOW / 2 - 1024,
            WindowWidth=WINDOW,
        )
        for number, data in enumerate(slices(n, rows=SIZE, columns=SIZE, seed=24))
    ]


def grey(column: npt.ArrayLike, number: int) -> npt.NDArray[np.float64]:
    """What a column of a slice, the first of both 0, is shown as: 0 to 255 (PS3.3 C.11.2.1.2.1)."""
    value = np.asarray(column, dtype=float) * 8 + number * 16
    return ((value - (WINDOW / 2 - 0.5)) / (WINDOW - 1) + 0.5) * 255


def segmentation(images: list[bytes]) -> bytes:
    """A segment of the middle of every slice."""
    mask = np.zeros((len(images), SIZE, SIZE), dtype=bool)
    mask[:, 16:48, 16:48] = True
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label="Middle",
        segmented_property_category=codes.SCT.Organ,
        segmented_property_type=codes.SCT.Liver,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
    )
    return _file(
        hd.seg.Segmentation(
            source_images=[dcmread(io.BytesIO(data)) for data in images],
            pixel_array=mask,
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            series_instance_uid=generate_uid(entropy_srcs=["segmentation"]),
            series_number=100,
            sop_instance_uid=generate_uid(entropy_srcs=["segmentation", "1"]),
            instance_number=1,
            manufacturer="Invented",
            manufacturer_model_name="Test",
            software_versions="1",
            device_serial_number="1",
            transfer_syntax_uid=ExplicitVRLittleEndian,
            omit_empty_frames=False,
            series_description="Segmentation",
        )
    )


def report(images: list[bytes]) -> bytes:
    """A measurement report (PS3.16 TID 1500) with a length in the first slice."""
    datasets = [dcmread(io.BytesIO(data)) for data in images]
    line = hd.sr.ImageRegion(
        graphic_type=hd.sr.GraphicTypeValues.POLYLINE,
        graphic_data=np.array([(10.0, 32.0), (50.0, 32.0)]),
        source_image=hd.sr.SourceImageForRegion.from_source_image(datasets[0]),
    )
    length = hd.sr.Measurement(name=codes.SCT.Length, value=28.1, unit=codes.UCUM.Millimeter)
    group = hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=generate_uid(entropy_srcs=["line"]), identifier="Line"),
        referenced_region=line,
        finding_type=coding.CodedConcept("52988006", "SCT", "Lesion"),
        measurements=[length],
    )
    observer = hd.sr.ObserverContext(
        observer_type=codes.DCM.Person,
        observer_identifying_attributes=hd.sr.PersonObserverIdentifyingAttributes(name="Invented^Observer"),
    )
    content = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_person_context=observer),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=[group],
    )
    return _file(
        hd.sr.Comprehensive3DSR(
            evidence=datasets[:1],
            content=content[0],
            series_number=101,
            series_instance_uid=generate_uid(entropy_srcs=["report"]),
            sop_instance_uid=generate_uid(entropy_srcs=["report", "1"]),
            instance_number=1,
            manufacturer="Invented",
            series_description="Report",
        )
    )


def presentation(images: list[bytes]) -> bytes:
    """A Grayscale Softcopy Presentation State of the images (PS3.3 A.33.1)."""
    return _file(
        hd.pr.GrayscaleSoftcopyPresentationState(
            referenced_images=[dcmread(io.BytesIO(data)) for data in images],
            series_number=102,
            series_instance_uid=generate_uid(entropy_srcs=["presentation"]),
            sop_instance_uid=generate_uid(entropy_srcs=["presentation", "1"]),
            instance_number=1,
            manufacturer="Invented",
            manufacturer_model_name="Test",
            software_versions="1",
            device_serial_number="1",
            content_label="BRIGHT",
            presentation_lut_transformation=hd.PresentationLUTTransformation(presentation_lut_shape="IDENTITY"),
        )
    )


def key_objects(images: list[bytes]) -> bytes:
    """A Key Object Selection of the images (PS3.3 A.35.4)."""
    datasets = [dcmread(io.BytesIO(data)) for data in images]
    return _file(
        hd.ko.KeyObjectSelectionDocument(
            evidence=datasets,
            content=hd.ko.KeyObjectSelection(codes.DCM.OfInterest, referenced_objects=datasets),
            series_number=103,
            series_instance_uid=generate_uid(entropy_srcs=["key objects"]),
            sop_instance_uid=generate_uid(entropy_srcs=["key objects", "1"]),
            instance_number=1,
            manufacturer="Invented",
        )
    )


def _file(dataset: Dataset) -> bytes:
    with io.BytesIO() as buffer:
        dcmwrite(buffer, dataset, enforce_file_format=True)
        return buffer.getvalue()
