"""What the parameters of rendered resources do, over WADO-RS and WADO-URI alike, and that each image has its tag."""

from __future__ import annotations

import io
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email import message_from_bytes
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageSequence

from sphere.ingest.header import identify
from sphere.scp.web import pixels as pixels_module
from sphere.scp.web import rendered
from sphere.scp.web.allowance import RETRY_AFTER_S, Allowance
from sphere.scp.web.pixels import PixelReader, Pixels
from sphere.scp.web.render import Look, encode, render
from tests.support.landing import archive, land, new_member
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

CT = pydicom.dcmread(Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm")
SIDE = 128
PNG, JPEG, GIF = ({"accept": kind} for kind in ("image/png", "image/jpeg", "image/gif"))


@dataclass(frozen=True)
class Moving:
    """An instance of three different frames, and where it is."""

    web: Web
    path: str
    uids: dict[str, str]

    def get(self, resource: str, headers: dict[str, str] = PNG) -> httpx.Response:
        response = self.web.get(f"{self.path}/{resource}", headers=headers)
        assert response.status_code == 200, response.text
        return response

    def levels(self, resource: str) -> Any:
        """The grey levels of a PNG."""
        return np.asarray(Image.open(io.BytesIO(self.get(resource).content))).astype(float)

    def uri(self, **asked: str) -> bytes:
        """WADO-URI."""
        params = {"requestType": "WADO", **self.uids, **asked}
        response = self.web.client.get(self.web.url.replace("/dicom-web", "/wado"), params=params)
        assert response.status_code == 200, response.text
        return response.content


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moving]:
    settings = archive(tmp_path_factory.mktemp("rendered"))
    pixels = CT.pixel_array
    CT.NumberOfFrames, CT.PixelData = 3, b"".join(one.tobytes() for one in (pixels, pixels[::-1], pixels[:, ::-1]))
    with io.BytesIO() as out:
        CT.save_as(out)
        data = out.getvalue()
    one = identify(data, size=len(data))
    land(settings, [new_member(data)])
    series = f"/studies/{one.StudyInstanceUID}/series/{one.SeriesInstanceUID}"
    uids = {"studyUID": one.StudyInstanceUID, "seriesUID": one.SeriesInstanceUID, "objectUID": one.SOPInstanceUID}
    with serving_web(settings) as web:
        yield Moving(web, f"{series}/instances/{one.SOPInstanceUID}", uids)


def test_a_sigmoid_window(moving: Moving) -> None:
    """PS3.3 C.11.2.1.3.1."""
    values = np.frombuffer(CT.PixelData[: SIDE * SIDE * 2], "<i2").reshape(SIDE, SIDE) - 1024.0
    expected = 255 / (1 + np.exp(-4 * (values - 40) / 400))
    assert np.abs(moving.levels("frames/1/rendered?window=40,400,sigmoid") - expected).max() <= 1


def test_quality_is_that_of_the_jpeg(moving: Moving) -> None:
    sizes = [len(moving.get(f"frames/1/rendered?quality={quality}", JPEG).content) for quality in (10, 50, 90)]
    assert sizes[0] * 2 < sizes[1] < sizes[2]
    assert len(moving.get("frames/1/rendered", JPEG).content) == sizes[2]
    for wrong in ("0", "101", "x", "-1"):
        assert moving.web.get(f"{moving.path}/rendered?quality={wrong}").status_code == 400


def test_each_annotation_is_burnt_in(moving: Moving) -> None:
    names = ("", "?annotation=patient", "?annotation=technique", "?annotation=patient,technique")
    plain, patient, technique, both = (moving.levels(f"frames/1/rendered{name}") for name in names)
    written = [plain != one for one in (patient, technique, both)]
    assert all(one.any() for one in written) and (written[0] != written[1]).any()
    assert written[2].sum() > max(written[0].sum(), written[1].sum())
    assert not written[0][SIDE * 3 // 4 :].any(), "no more than its corner"
    assert moving.web.get(f"{moving.path}/rendered?annotation=everything").status_code == 400


def test_a_moving_image_has_every_frame(moving: Moving) -> None:
    for resource, frames in (("rendered", (1, 2, 3)), ("frames/3,1/rendered", (3, 1))):
        film = Image.open(io.BytesIO(moving.get(resource, GIF).content))
        shown = [np.asarray(one.convert("L")).astype(float) for one in ImageSequence.Iterator(film)]
        assert len(shown) == len(frames)
        for image, frame in zip(shown, frames, strict=True):
            assert np.abs(image - moving.levels(f"frames/{frame}/rendered")).max() <= 1
    assert moving.get("rendered", {"accept": "*/*"}).headers["content-type"] == "image/gif"


def test_a_moving_image_is_bounded_by_what_it_becomes(moving: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a viewport nor the same frame again and again makes more of it than the limit; nothing is rendered."""
    rendered_frames: list[int] = []
    real = render

    def watched(reader: PixelReader, pixels: Pixels, frame: int, look: Look) -> Image.Image:
        rendered_frames.append(frame)
        return real(reader, pixels, frame, look)

    monkeypatch.setattr(rendered, "render", watched)
    many = ",".join(["1"] * 5000)
    for resource in ("frames/1,1/rendered?viewport=8192,8192", "rendered?viewport=8000,8000", f"frames/{many}/rendered",
                     "rendered?viewport=8000,8000,0,0,8,8"):  # fmt: skip
        response = moving.web.get(f"{moving.path}/{resource}", headers=GIF)
        assert (response.status_code, response.headers["content-type"]) == (406, "application/problem+json")
    assert not rendered_frames
    moving.get("frames/1,1,2/rendered?viewport=300,300", GIF)
    assert rendered_frames == [1, 1, 2]


def test_one_frame_of_a_moving_image_is_there_at_a_time(moving: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Image.Image]] = []
    real, most = render, 0

    def watched(reader: PixelReader, pixels: Pixels, frame: int, look: Look) -> Image.Image:
        nonlocal most
        image = real(reader, pixels, frame, look)
        made.append(weakref.ref(image))
        most = max(most, sum(one() is not None for one in made))
        return image

    monkeypatch.setattr(rendered, "render", watched)
    film = Image.open(io.BytesIO(moving.get(f"frames/{','.join(['1', '2', '3'] * 10)}/rendered", GIF).content))
    assert getattr(film, "n_frames", 1) == 30
    assert most <= 3


def test_renderings_share_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is not enough for two, one waits for the other; where it waits too long it is told to come again."""
    monkeypatch.setattr(pixels_module, "MAX_RENDERING", 1)
    settings = archive(tmp_path)
    with io.BytesIO() as out:
        CT.save_as(out)
        data = out.getvalue()
    land(settings, [new_member(data)])
    found = identify(data, size=len(data))
    path = f"/studies/{found.StudyInstanceUID}/series/{found.SeriesInstanceUID}/instances/{found.SOPInstanceUID}"
    under_way = most = 0
    real, lock = encode, threading.Lock()

    def watched(*arguments: Any, **named: Any) -> bytes:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        encoded = real(*arguments, **named)
        with lock:
            under_way -= 1
        return encoded

    monkeypatch.setattr(rendered, "encode", watched)
    series = path.rpartition("/instances")[0] + "/rendered"
    either = {"accept": 'image/png, multipart/related; type="image/png"'}
    with serving_web(settings) as web, ThreadPoolExecutor(8) as pool:
        asked = [f"{path}/frames/1/rendered", f"{path}/thumbnail", f"{path}/rendered", series]
        answers = list(pool.map(lambda one: web.get(one, headers=either), asked * 2))
        assert [one.status_code for one in answers] == [200] * 8
        assert most == 1
    monkeypatch.setattr(pixels_module, "Allowance", partial(Allowance, waiting=0))
    with serving_web(settings) as web:
        refused = web.get(f"{path}/frames/1/rendered", headers=PNG)
        assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
        assert int(refused.headers["retry-after"]) == RETRY_AFTER_S
        assert web.get(series, headers=either).content.count(b"image/png") == 1, "a response that has begun waits"


def test_frames_of_a_list_come_in_parts(moving: Moving) -> None:
    response = moving.get("frames/3,1/rendered", {"accept": 'multipart/related; type="image/png"'})
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    message = message_from_bytes(head + response.content)
    parts: list[Any] = list(message.get_payload())
    assert [one.get_payload(decode=True) for one in parts] == [
        moving.get(f"frames/{frame}/rendered").content for frame in (3, 1)
    ]


@pytest.mark.parametrize(
    ("uri", "resource"),
    [
        ({"windowCenter": "40", "windowWidth": "400"}, "frames/1/rendered?window=40,400,linear"),
        ({"frameNumber": "2"}, "frames/2/rendered"),
        ({"rows": "32", "columns": "64"}, "frames/1/rendered?viewport=64,32"),
        ({"annotation": "patient"}, "frames/1/rendered?annotation=patient"),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else "",
)
def test_uri_and_rs_give_one_image(moving: Moving, uri: dict[str, str], resource: str) -> None:
    assert moving.uri(contentType="image/png", **uri) == moving.get(resource).content
    assert moving.uri(contentType="image/png", **uri) != moving.uri(contentType="image/png")


def test_quality_of_uri(moving: Moving) -> None:
    assert moving.uri(imageQuality="10") == moving.get("frames/1/rendered?quality=10", JPEG).content


def test_thumbnails_are_small(moving: Moving) -> None:
    for resource in ("thumbnail", "frames/2/thumbnail"):
        assert moving.levels(resource).shape == (SIDE, SIDE)
        assert (moving.levels(resource) == moving.levels("frames/2/rendered")).all(), "the middle frame"
        assert moving.levels(f"{resource}?viewport=20,30").shape == (20, 20)


@pytest.mark.parametrize("resource", ["", "metadata", "frames/1", "rendered", "frames/1/rendered", "thumbnail"])
def test_every_resource_has_a_tag_and_can_be_asked_for_again(moving: Moving, resource: str) -> None:
    path = f"{moving.path}/{resource}".rstrip("/")
    first = moving.web.get(path, headers={"accept": "*/*"})
    tag = first.headers["etag"]
    for known in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        again = moving.web.get(path, headers={"accept": "*/*", "if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag), known
    assert moving.web.get(path, headers={"accept": "*/*", "if-none-match": '"other"'}).status_code == 200


def test_bulk_data_have_a_tag_too(moving: Moving) -> None:
    [header] = moving.web.get(f"{moving.path}/metadata").json()
    uri = header["7FE00010"]["BulkDataURI"]
    client, tags = moving.web.client, set()
    for accept in ("application/octet-stream", 'multipart/related; type="application/octet-stream"'):
        first = client.get(uri, headers={"accept": accept})
        tags.add(first.headers["etag"])
        again = client.get(uri, headers={"accept": accept, "if-none-match": first.headers["etag"]})
        assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    shorter = client.get(uri.replace("length=", "length=1&other="), headers={"accept": "application/octet-stream"})
    assert len(tags | {shorter.headers["etag"]}) == 3 and len(shorter.content) == 1


def test_a_tag_is_of_what_was_asked_for(moving: Moving) -> None:
    asked = ("rendered", "rendered?window=40,400,linear", "frames/2/rendered", "thumbnail")
    tags = {moving.get(resource).headers["etag"] for resource in asked}
    tags.add(moving.get("rendered", JPEG).headers["etag"])
    assert len(tags) == len(asked) + 1
