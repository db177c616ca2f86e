"""WADO-RS rendered resources and thumbnails (PS3.18 10.4.1.1.3 and 10.4.1.1.4)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from sphere.catalog.service import StoredInstance
from sphere.conf.logs import hashed
from sphere.scp.web.accept import accepted, choose
from sphere.scp.web.archive import Archive, etag, not_modified
from sphere.scp.web.bulk import INSTANCE
from sphere.scp.web.frames import listed
from sphere.scp.web.multipart import Parts
from sphere.scp.web.operations import PREFIX, Operation, parameter
from sphere.scp.web.pixels import PixelReader, Pixels
from sphere.scp.web.problem import WebError
from sphere.scp.web.render import Look, encode, fitted_size, needed, parse_look, render, source_size
from sphere.scp.web.streamed import Body, Streamed

log = logging.getLogger(__name__)

Handler = Callable[[Archive, PixelReader, Request], Response]

JPEG, PNG, GIF = "image/jpeg", "image/png", "image/gif"
THUMBNAIL: Final = 128  # pixels of its longer side
MAX_MOVING: Final = 64 << 20  # pixels of all frames of a GIF
FRAME_MS: Final = 100  # where the header does not say how long a frame is shown
_PARAMETERS = (
    parameter("window", {"type": "string"}, "CENTER,WIDTH,FUNCTION; FUNCTION is linear, linear-exact or sigmoid."),
    parameter("viewport", {"type": "string"}, "WIDTH,HEIGHT, and X,Y,WIDTH,HEIGHT of a region of the image."),
    parameter("quality", {"type": "integer", "minimum": 1, "maximum": 100}, "Of a JPEG."),
    parameter("annotation", {"type": "string"}, "patient, technique, or both, burnt in."),
)


def offered(archive: Archive, reader: PixelReader) -> list[Operation]:
    """Rendered instances and frames, whole series and studies in parts, and a thumbnail of each."""
    study, series = PREFIX + "/studies/{study}", PREFIX + "/studies/{study}/series/{series}"
    in_parts = tuple(f'multipart/related; type="{kind}"' for kind in (JPEG, PNG))
    types_of: dict[Handler, tuple[str, ...]] = {
        _instance: (JPEG, PNG, GIF),
        _frame: (JPEG, PNG, GIF, *in_parts),
        _many: in_parts,
    }

    def operation(path: str, handler: Handler, what: str) -> Operation:
        def endpoint(request: Request) -> Response:
            return handler(archive, reader, request)

        types = types_of.get(handler, (JPEG, PNG))
        return Operation("GET", path, endpoint, what, "WADO-RS", types, _PARAMETERS, others=(304,), in_part=True)

    return [
        operation(INSTANCE + "/rendered", _instance, "An instance as an image; of many frames as a moving one"),
        operation(INSTANCE + "/frames/{frames}/rendered", _frame, "A frame as an image"),
        operation(study + "/rendered", _many, "Every image of a study, in parts"),
        operation(series + "/rendered", _many, "Every image of a series, in parts"),
        operation(study + "/thumbnail", _thumbnail, "A small image of a study"),
        operation(series + "/thumbnail", _thumbnail, "A small image of a series"),
        operation(INSTANCE + "/thumbnail", _thumbnail, "A small image of an instance"),
        operation(INSTANCE + "/frames/{frames}/thumbnail", _thumbnail, "A small image of a frame"),
    ]


def _look(request: Request, *, side: int = 0) -> Look:
    return parse_look(dict(request.query_params.multi_items()), side=side)


def _instance(archive: Archive, reader: PixelReader, request: Request) -> Response:
    pixels = reader.find(archive.instances(request)[0])
    order = (GIF, JPEG, PNG) if pixels.frames > 1 else (JPEG, PNG, GIF)
    media_type = choose(accepted(request), order)
    moving = pixels.frames if media_type == GIF else 1
    return _image(reader, pixels, request, media_type, range(1, moving + 1), _look(request))


def _frame(archive: Archive, reader: PixelReader, request: Request) -> Response:
    pixels = reader.find(archive.instances(request)[0])
    numbers = listed(str(request.path_params["frames"]), pixels.frames)
    media_type = choose(accepted(request), (JPEG, PNG, GIF))
    look = _look(request)
    if len(numbers) == 1 or media_type == GIF:
        return _image(reader, pixels, request, media_type, numbers, look)
    parts = Parts(media_type)

    def body() -> Body:
        for number in numbers:
            yield parts.head() + image(reader, pixels, [number], media_type, look, patient=True)
        yield parts.end

    return Streamed(body(), media_type=parts.media_type)


def _image(
    reader: PixelReader, pixels: Pixels, request: Request, media_type: str, numbers: Sequence[int], look: Look
) -> Response:
    tag = etag([pixels.instance], media_type, look, *numbers)
    if known := not_modified(request, tag):
        return known
    source = source_size(pixels.header)
    if len(numbers) > 1 and len(numbers) * max(map(math.prod, (source, fitted_size(*source, look)))) > MAX_MOVING:
        raise WebError("too many frames for one moving image: ask for some of them, or for a smaller one", http=406)
    request.state.found = 1
    return Response(image(reader, pixels, numbers, media_type, look), headers={"ETag": tag}, media_type=media_type)


def image(
    reader: PixelReader, pixels: Pixels, numbers: Sequence[int], media_type: str, look: Look, *, patient: bool = False
) -> bytes:
    """A frame, or several in a GIF, encoded within the memory that all renderings have: one frame is there at a time.

    Raises WebError: 406 where it cannot be shown, 503 where others have the memory, unless it is `patient`.
    """
    source = source_size(pixels.header)
    kept = len(numbers) * math.prod(fitted_size(*source, look))  # the encoder keeps a byte of each pixel of a GIF
    with reader.rendering.taking(needed(pixels.header, look) + kept, patient=patient):
        images = (render(reader, pixels, number, look) for number in numbers)
        return encode(images, media_type, look, frame_ms=_frame_ms(pixels), moving=len(numbers) > 1)


def _frame_ms(pixels: Pixels) -> int:
    """How long a frame is shown: by FrameTime or CineRate, within reason."""
    get: Callable[[str], Any] = pixels.header.get
    try:
        ms = float(get("FrameTime") or 0) or 1000 / float(get("CineRate") or get("RecommendedDisplayFrameRate") or 0)
    except (TypeError, ValueError, ZeroDivisionError):
        return FRAME_MS
    return int(min(max(ms, 20), 2000))


def _many(archive: Archive, reader: PixelReader, request: Request) -> Response:
    """Every instance that can be rendered; those that cannot are left out, as a report among images is."""
    media_type = choose(accepted(request), (JPEG, PNG))
    look = _look(request)
    instances = archive.instances(request)
    tag = etag(instances, media_type, look)
    if known := not_modified(request, tag):
        return known
    parts = Parts(media_type)

    def body() -> Body:
        for instance in instances:
            try:
                encoded = image(reader, reader.find(instance), [1], media_type, look, patient=True)
            except WebError as error:
                log.info("not rendered instance=%s: %s", hashed(instance.SOPInstanceUID), error)
                continue
            yield parts.head() + encoded
        yield parts.end

    request.state.found = len(instances)
    return Streamed(body(), 200, {"ETag": tag}, parts.media_type)


def _thumbnail(archive: Archive, reader: PixelReader, request: Request) -> Response:
    """The middle image of what is asked for, its middle frame where none is named."""
    media_type = choose(accepted(request), (JPEG, PNG))
    look = _look(request, side=THUMBNAIL)
    for instance in _from_the_middle(archive.instances(request)):
        try:
            pixels = reader.find(instance)
        except WebError:
            continue
        named = request.path_params.get("frames")
        numbers = listed(str(named), pixels.frames) if named else [(pixels.frames + 1) // 2]
        return _image(reader, pixels, request, media_type, numbers[:1], look)
    raise WebError("there is no image in it", http=404)


def _from_the_middle(instances: Sequence[StoredInstance]) -> list[StoredInstance]:
    middle = len(instances) // 2
    return [*instances[middle:], *reversed(instances[:middle])][:20]
