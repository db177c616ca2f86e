"""From stored pixels to grey levels or colours of a screen (PS3.3 C.11, PS3.18 8.3.5)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi

from sphere.scp.web.pixels import EXPLICIT, PixelReader, Pixels
from sphere.scp.web.problem import WebError

Function = Literal["linear", "linear-exact", "sigmoid"]
Array = npt.NDArray[Any]
MAX_SIDE: Final = 8192  # pixels of a viewport
SOURCE_BYTES: Final = 64  # of memory for a pixel of a frame while it is rendered, in float64 (measured: 18 to 51)
FITTED_BYTES: Final = 20  # for a pixel of what becomes of it, encoded (4 to 17)
_GROUPS: Final = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_NUMBER = r"-?[0-9]{1,9}(?:\.[0-9]{1,9})?"


@dataclass(frozen=True, slots=True)
class Look:
    """How an image is to be rendered: what the query parameters of a rendered resource ask for."""

    window: tuple[float, float, Function] | None = None
    viewport: tuple[int, int] | None = None
    region: tuple[int, int, int, int] | None = None  # of the source: left, top, width, height; negative: turned over
    quality: int = 90
    annotation: tuple[str, ...] = ()


def parse_look(given: Mapping[str, str], *, side: int = 0) -> Look:
    """The parameters of PS3.18 8.3.5.1; `side`: of the viewport where none is given. Raises WebError."""
    known = {"window", "viewport", "quality", "annotation", "iccprofile", "accept", "charset"}
    if strange := sorted(given.keys() - known):
        raise WebError(f"unknown parameter {strange[0][:100]!r}")
    if given.get("iccprofile", "no") != "no":
        raise WebError("iccprofile can be no only", http=406)
    viewport, region = _viewport(given.get("viewport", f"{side},{side}" if side else ""))
    annotation = tuple(filter(None, given.get("annotation", "").split(",")))
    if not set(annotation) <= {"patient", "technique"}:
        raise WebError("annotation can be patient, technique, or both")
    quality = given.get("quality", "90")
    if not re.fullmatch(r"[0-9]{1,3}", quality, re.ASCII) or not 1 <= int(quality) <= 100:
        raise WebError("quality must be a number from 1 to 100")
    return Look(_window(given.get("window", "")), viewport, region, int(quality), annotation)


def _window(text: str) -> tuple[float, float, Function] | None:
    if not text:
        return None
    found = re.fullmatch(rf"({_NUMBER}),({_NUMBER}),(linear|linear-exact|sigmoid)", text.lower(), re.ASCII)
    if not found or float(found[2]) <= 0 or (found[3] == "linear" and float(found[2]) < 1):
        raise WebError("window must be CENTER,WIDTH,FUNCTION with linear, linear-exact or sigmoid")
    function: Function = found[3]  # type: ignore[assignment]
    return float(found[1]), float(found[2]), function


def _viewport(text: str) -> tuple[tuple[int, int] | None, tuple[int, int, int, int] | None]:
    if not text:
        return None, None
    found = re.fullmatch(r"([0-9]{1,5}),([0-9]{1,5})(?:,(-?[0-9]*),(-?[0-9]*),(-?[0-9]*),(-?[0-9]*))?", text, re.ASCII)
    if not found or not (0 < int(found[1]) <= MAX_SIDE and 0 < int(found[2]) <= MAX_SIDE):
        raise WebError(f"viewport must be WIDTH,HEIGHT[,X,Y,WIDTH,HEIGHT], at most {MAX_SIDE} pixels a side")
    region = None
    if found[3] is not None:
        try:
            region = (int(found[3] or 0), int(found[4] or 0), int(found[5] or 0), int(found[6] or 0))
        except ValueError:
            raise WebError("viewport: the region is not of whole numbers") from None
    return (int(found[1]), int(found[2])), region


def render(reader: PixelReader, pixels: Pixels, frame: int, look: Look) -> Image.Image:
    """One frame (from 1) as an image of mode L or RGB; raises WebError (406) where it cannot be shown."""
    plain = reader.plain(pixels, frame)
    try:
        image = Image.fromarray(_levels(plain, pixels.header, frame, look))
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError, ArithmeticError) as error:
        raise WebError(f"the frame cannot be rendered ({type(error).__name__})", http=406) from None
    image = _fitted(image, look)
    if look.annotation:
        _annotate(image, pixels.header, look.annotation)
    return image


def _levels(plain: Dataset, header: Dataset, frame: int, look: Look) -> npt.NDArray[np.uint8]:
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = EXPLICIT  # type: ignore[assignment]
    values: Array = plain.pixel_array
    photometric = plain.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        coloured = apply_color_lut(values, header)
        return _scaled(coloured, 0, 65535 if coloured.dtype.itemsize > 1 else 255)
    if values.ndim == 3:  # in RGB: pydicom converts what is stored in YBR_FULL and YBR_FULL_422
        return _scaled(values, 0, 2 ** int(plain.BitsStored) - 1)
    attributes = frame_attributes(header, frame)
    grey = _grey(apply_modality_lut(values, attributes), attributes, look)
    return 255 - grey if photometric == "MONOCHROME1" else grey


def frame_attributes(header: Dataset, frame: int) -> Dataset:
    """The attributes that hold for a frame: those of functional groups (PS3.3 C.7.6.16) over those of the instance."""
    found = Dataset()
    found.file_meta = header.file_meta
    found.update(header)
    shared = header.get("SharedFunctionalGroupsSequence") or []
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*shared[:1], *own[frame - 1 : frame]):
        for name in _GROUPS:
            for item in (group.get(name) or [])[:1]:
                found.update(item)
    return found


def _grey(values: Array, attributes: Dataset, look: Look) -> npt.NDArray[np.uint8]:
    window = look.window
    if window is None and attributes.get("VOILUTSequence"):
        descriptor = attributes.VOILUTSequence[0].LUTDescriptor
        return _scaled(apply_voi(values, attributes), 0, 2 ** int(descriptor[2]) - 1)
    if window is None and attributes.get("WindowWidth") not in (None, ""):
        function = str(attributes.get("VOILUTFunction") or "LINEAR").lower().replace("_", "-")
        center, width = _first(attributes.WindowCenter), _first(attributes.WindowWidth)
        if width >= 1 or (width > 0 and function != "linear"):
            window = (center, width, function)  # type: ignore[assignment]
    if window is None:
        return _scaled(values, float(values.min()), float(values.max()))
    return _windowed(values.astype(np.float64), *window)


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, (list, tuple)) or hasattr(value, "append") else value)


def _windowed(x: Array, center: float, width: float, function: Function) -> npt.NDArray[np.uint8]:
    """The VOI functions of PS3.3 C.11.2.1.2 and C.11.2.1.3, onto 0 to 255."""
    if function == "sigmoid":
        y = 1 / (1 + np.exp(np.clip(-4 * (x - center) / width, -500, 500)))
    elif function == "linear-exact":
        y = (x - center) / width + 0.5
    elif width == 1:
        y = (x > center - 0.5).astype(np.float64)
    else:
        y = (x - (center - 0.5)) / (width - 1) + 0.5
    return np.rint(np.clip(y, 0, 1) * 255).astype(np.uint8)


def _scaled(values: Array, low: float, high: float) -> npt.NDArray[np.uint8]:
    span = (high - low) or 1.0
    return np.rint(np.clip((values.astype(np.float64) - low) / span, 0, 1) * 255).astype(np.uint8)


def source_size(header: Dataset) -> tuple[int, int]:
    """Columns and rows of a frame, as its header says; 1 where that says nothing."""
    try:
        return max(1, int(header.get("Columns") or 1)), max(1, int(header.get("Rows") or 1))
    except (TypeError, ValueError):
        return 1, 1


def fitted_size(width: int, height: int, look: Look) -> tuple[int, int]:
    """Columns and rows of what becomes of a frame of so many: its region, as large as the viewport lets it be (PS3.18
    8.3.5.1.3); raises WebError where the region is not of the frame."""
    if look.region:
        left, top, right, bottom = _box(width, height, look.region)
        width, height = right - left, bottom - top
    if look.viewport:
        scale = min(look.viewport[0] / width, look.viewport[1] / height)
        return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    return width, height


def needed(header: Dataset, look: Look) -> int:
    """Bytes of memory that a frame takes at most while it is rendered; raises WebError as `fitted_size`."""
    width, height = source_size(header)
    fitted_width, fitted_height = fitted_size(width, height, look)
    return SOURCE_BYTES * width * height + FITTED_BYTES * fitted_width * fitted_height


def _box(width: int, height: int, region: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a region; raises WebError where it is not of the image."""
    left, top, across, down = region
    right, bottom = left + abs(across or width - left), top + abs(down or height - top)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise WebError(f"viewport: the region is outside the {width} x {height} pixels of the image")
    return left, top, right, bottom


def _fitted(image: Image.Image, look: Look) -> Image.Image:
    """What `fitted_size` says, turned over where the size of its region is negative."""
    size = fitted_size(image.width, image.height, look)
    if look.region:
        image = image.crop(_box(image.width, image.height, look.region))
        image = ImageOps.mirror(image) if look.region[2] < 0 else image
        image = ImageOps.flip(image) if look.region[3] < 0 else image
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0) if size != image.size else image


def _annotate(image: Image.Image, header: Dataset, what: tuple[str, ...]) -> None:
    """Burn in what the viewer is to know (PS3.18 8.3.5.1.1)."""
    keywords = {
        "patient": ("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
        "technique": ("Modality", "StudyDate", "SeriesDescription", "SliceThickness", "KVP", "EchoTime"),
    }
    lines = [str(header.get(keyword) or "") for one in what for keyword in keywords[one]]
    text = "\n".join(filter(None, lines))
    shown = text.encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(image).multiline_text((4, 4), shown, fill=255 if image.mode == "L" else (255, 255, 255))


def encode(
    images: Iterable[Image.Image], media_type: str, look: Look, *, frame_ms: int = 100, moving: bool = False
) -> bytes:
    """PNG or JPEG of the first image, or a GIF, of all if it is `moving`: each is taken when the one before is in."""
    out, others = BytesIO(), iter(images)
    first = next(others)
    if media_type == "image/gif":
        first.save(out, "GIF", save_all=moving, append_images=others, duration=frame_ms, loop=0)
    elif media_type == "image/png":
        first.save(out, "PNG", compress_level=1)
    else:
        first.save(out, "JPEG", quality=look.quality)
    return out.getvalue()
