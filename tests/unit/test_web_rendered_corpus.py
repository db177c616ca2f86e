"""Rendered images of real files are those that pydicom makes of them, within one grey level."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing

from sphere.ingest.header import Identity, identify
from tests.support.landing import archive, land, new_member
from tests.support.web import serving_web

pytestmark = [
    pytest.mark.unit,
    pytest.mark.filterwarnings("ignore"),  # pydicom complains of the broken files
]

OF_EACH = 40  # images of one transfer syntax and photometric interpretation
MOST = 2 << 20  # samples of an image; larger ones show nothing else
LEAST = {"MONOCHROME1": 4, "MONOCHROME2": 60, "RGB": 10, "YBR_FULL": 4, "YBR_FULL_422": 3, "PALETTE COLOR": 3}
"""Of how many images the pixels are compared at least."""
CANNOT = {  # nobody here can decode them: 406
    "cornerstone3D/CTImage.dcm_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm",  # retired progressive JPEG
    "pydicom-data/liver_deflate.dcm",  # Deflated Image Frame Compression
    "pydicom-data/liver_rle.dcm",  # RLE of single bits, which PS3.5 G does not know
}
NOT_BY_PYDICOM = {"pydicom/JPEG-lossy.dcm"}  # 12 bits in JPEG Extended: decoded here, and by none of its decoders


def images(corpus: Path) -> dict[str, tuple[Identity, bytes, Dataset]]:
    """Files with pixel data that have their place in an archive, by name."""
    found: dict[str, tuple[Identity, bytes, Dataset]] = {}
    kinds: Counter[tuple[str, str]] = Counter()
    known: set[str] = set()
    for file in sorted(one for one in corpus.rglob("*") if one.is_file()):
        data = file.read_bytes()
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        if "PixelData" not in dataset or "TransferSyntaxUID" not in dataset.file_meta:  # pydicom needs both
            continue
        one = identify(data, size=len(data))
        kind = str(dataset.file_meta.TransferSyntaxUID), str(dataset.get("PhotometricInterpretation"))
        uids = (one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID)
        valid = all(pydicom.uid.UID(uid).is_valid for uid in uids) and uids[2] not in known
        if not valid or kinds[kind] == OF_EACH or dataset.Rows * dataset.Columns * dataset.SamplesPerPixel > MOST:
            continue
        known.add(uids[2])
        kinds[kind] += 1
        found[str(file.relative_to(corpus))] = (one, data, dataset)
    return found


def expected(dataset: Dataset) -> npt.NDArray[Any]:
    """The first frame as pydicom shows it, scaled to 0 to 255."""
    values = dataset.pixel_array
    values = values[0] if int(dataset.get("NumberOfFrames") or 1) > 1 else values
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        coloured = apply_color_lut(values, dataset)
        return coloured * (255 / np.iinfo(coloured.dtype).max)
    if values.ndim == 3:
        return values * (255 / (2**dataset.BitsStored - 1))
    grey = _grey(values, dataset) * 255
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def _grey(values: npt.NDArray[Any], dataset: Dataset) -> npt.NDArray[Any]:
    groups = [dataset.get(f"{whose}FunctionalGroupsSequence") or [] for whose in ("Shared", "PerFrame")]
    for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
        for item in (item for group in groups for one in group[:1] for item in one.get(name) or []):
            dataset.update(item)
    values = apply_modality_lut(values, dataset)
    if dataset.get("VOILUTSequence"):
        return apply_voi(values, dataset) / (2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    if dataset.get("WindowWidth"):
        low, high = _range_of_window(dataset)
        return (apply_windowing(values, dataset) - low) / (high - low)
    return (values - float(values.min())) / ((float(values.max()) - float(values.min())) or 1)


def _range_of_window(dataset: Dataset) -> tuple[float, float]:
    """What pydicom windows onto: the range that the stored bits can take, rescaled."""
    bits, slope = dataset.BitsStored, float(dataset.get("RescaleSlope", 1))
    low = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
    shift = float(dataset.get("RescaleIntercept", 0))
    return low * slope + shift, (low + 2**bits - 1) * slope + shift


def test_rendered_pixels_of_real_images_are_those_of_pydicom(corpus: Path, tmp_path: Path) -> None:
    found = images(corpus)
    settings = archive(tmp_path)
    land(settings, [new_member(data) for _, data, _ in found.values()])
    compared: Counter[str] = Counter()
    with serving_web(settings) as web:
        for name, (one, _, dataset) in found.items():
            series = f"/studies/{one.StudyInstanceUID}/series/{one.SeriesInstanceUID}"
            path = f"{series}/instances/{one.SOPInstanceUID}/frames/1/rendered"
            response = web.get(path, headers={"accept": "image/png"})
            assert (response.status_code == 406) is (name in CANNOT), (name, response.text[:200])
            if name in CANNOT | NOT_BY_PYDICOM:
                continue
            assert response.status_code == 200, (name, response.text)
            image = np.asarray(Image.open(io.BytesIO(response.content))).astype(float)
            assert np.abs(image - expected(dataset)).max() <= 1, name
            compared[str(dataset.PhotometricInterpretation)] += 1
    assert all(compared[kind] >= least for kind, least in LEAST.items()), compared
