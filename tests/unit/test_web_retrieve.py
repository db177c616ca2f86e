"""WADO-RS and WADO-URI over a real socket: bytes as they were stored, headers, frames, values, and images."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from email import message_from_bytes
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]
import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from sphere.ingest.header import Identity, identify
from sphere.ingest.storage.base import Readable
from sphere.scp.web.app import Services
from sphere.scp.web.known import KnownSeries
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices
from tests.support.web import Web, serving_web, until_closed

pytestmark = pytest.mark.unit

AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
LOSSY = "1.2.840.10008.1.2.4.51"
FILES = Path(pydicom.__file__).parent / "data" / "test_files"


@dataclass
class Sample:
    """A stored file."""

    name: str
    data: bytes
    identity: Identity

    @property
    def study(self) -> str:
        return f"/studies/{self.identity.StudyInstanceUID}"

    @property
    def series(self) -> str:
        return f"{self.study}/series/{self.identity.SeriesInstanceUID}"

    @property
    def path(self) -> str:
        return f"{self.series}/instances/{self.identity.SOPInstanceUID}"

    def dataset(self) -> pydicom.Dataset:
        return pydicom.dcmread(io.BytesIO(self.data), force=True)


def samples() -> dict[str, Sample]:
    """Packaged real files, and a CT series of 12 slices."""
    found: dict[str, Sample] = {}
    known: set[str] = set()
    files = {file.name: file.read_bytes() for file in sorted(FILES.glob("*.dcm"))}
    files |= {f"slice-{number}": data for number, data in enumerate(slices(12))}
    for name, data in files.items():
        one = identify(data, size=len(data))
        if one.StudyInstanceUID and one.SeriesInstanceUID and one.SOPInstanceUID not in known | {""}:
            known.add(one.SOPInstanceUID)
            found[name] = Sample(name, data, one)
    return found


SAMPLES = samples()
WITH_PIXELS = ["CT_small.dcm", "MR_small.dcm", "examples_palette.dcm", "examples_rgb_color.dcm", "image_dfl.dcm",
               "ExplVR_BigEnd.dcm", "examples_jpeg2k.dcm", "SC_rgb_jpeg_gdcm.dcm", "693_J2KI.dcm",
               "SC_rgb_small_odd.dcm", "examples_ybr_color.dcm"]  # fmt: skip


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("web"))
    land(settings, [new_member(one.data) for one in SAMPLES.values()])
    extract(settings)
    with serving_web(settings) as running:
        yield running


def parts(response: httpx.Response) -> list[tuple[str, bytes]]:
    """(Content-Type, body) of each part."""
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    message = message_from_bytes(head + response.content)
    assert not message.defects, message.defects
    return [(str(one.get_content_type()), one.get_payload(decode=True)) for one in message.get_payload()]  # type: ignore[union-attr, misc]


def test_every_instance_comes_back_byte_for_byte(web: Web) -> None:
    for one in SAMPLES.values():
        response = web.get(one.path, headers={"accept": AS_STORED})
        assert response.status_code == 200, one.name
        assert one.data in response.content, one.name
        assert int(response.headers["content-length"]) == len(response.content)
        alone = web.get(one.path, headers={"accept": "application/dicom; transfer-syntax=*"})
        assert (alone.headers["content-type"], alone.content == one.data) == ("application/dicom", True), one.name


def test_a_series_and_a_study(web: Web) -> None:
    one = SAMPLES["slice-0"]
    for path in (one.series, one.study):
        response = web.get(path)
        assert response.content.count(b"\r\nContent-Type: application/dicom; transfer-syntax=") == 12
        assert all(SAMPLES[f"slice-{number}"].data in response.content for number in range(12))
        again = web.get(path, headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    head = web.client.head(f"{web.url}{one.study}")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("name", ["JPEG-lossy.dcm", "rtplan.dcm", "image_dfl.dcm", "ExplVR_BigEnd.dcm"])
def test_another_transfer_syntax(web: Web, name: str) -> None:
    one = SAMPLES[name]
    for accept in ("application/dicom", f"application/dicom; transfer-syntax={EXPLICIT}"):
        got = pydicom.dcmread(io.BytesIO(web.get(one.path, headers={"accept": accept}).content))
        assert got.file_meta.TransferSyntaxUID == EXPLICIT
        assert got.SOPInstanceUID == one.identity.SOPInstanceUID
        assert got.get("PatientID") == one.dataset().get("PatientID")


@pytest.mark.parametrize(
    ("accept", "given"),
    [
        (f"{{}}={EXPLICIT}; q=0.4, {{}}={LOSSY}; q=0.9", LOSSY),
        (f"{{}}={EXPLICIT}; q=0.9, {{}}={LOSSY}; q=0.4", EXPLICIT),
        (f"{{}}={LOSSY}; q=0, {{}}={EXPLICIT}; q=0.1", EXPLICIT),
        (f"{{}}=1.2.840.10008.1.2.4.90; q=1, {{}}={EXPLICIT}; q=0.2", EXPLICIT),
        (f"{{}}={EXPLICIT}; q=0", None),
    ],
)
def test_of_several_transfer_syntaxes_the_best_that_can_be_had(web: Web, accept: str, given: str | None) -> None:
    """By their quality values (RFC 9110 12.5.1, PS3.18 8.7.3.5), of one instance and in parts."""
    one = SAMPLES["JPEG-lossy.dcm"]
    for kind in ("application/dicom; transfer-syntax", 'multipart/related; type="application/dicom"; transfer-syntax'):
        response = web.get(one.path, headers={"accept": accept.replace("{}", kind)})
        assert response.status_code == (200 if given else 406), response.text
        if given:
            data = response.content if kind.startswith("application") else parts(response)[0][1]
            assert pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID == given
            assert given != LOSSY or data == one.data


@pytest.mark.parametrize("everything", ["*/*", "application/*; q=0.1", AS_STORED])
def test_a_transfer_syntax_that_is_refused_by_name_is_not_given(web: Web, everything: str) -> None:
    one = SAMPLES["JPEG-lossy.dcm"]
    for kind in ("application/dicom", 'multipart/related; type="application/dicom"'):
        response = web.get(one.path, headers={"accept": f"{kind}; transfer-syntax={LOSSY}; q=0, {everything}"})
        assert response.status_code == 200, response.text
        data = parts(response)[0][1]
        assert pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID == EXPLICIT
    both = f"application/dicom; transfer-syntax={EXPLICIT}; q=0, {kind}; transfer-syntax={IMPLICIT}; q=0"
    refused = f"{both}, {kind}; transfer-syntax={LOSSY}; q=0, {everything}"
    assert web.get(one.path, headers={"accept": refused}).status_code == 406


@pytest.mark.parametrize(
    ("path", "accept", "status"),
    [
        (SAMPLES["CT_small.dcm"].path, "application/dicom; transfer-syntax=1.2.840.10008.1.2.4.90", 406),
        (SAMPLES["CT_small.dcm"].path, "text/plain", 406),
        (SAMPLES["CT_small.dcm"].path + "/metadata", "image/png", 406),
        (SAMPLES["CT_small.dcm"].path + "/frames/1", "image/jpeg", 406),
        (SAMPLES["CT_small.dcm"].path + "/thumbnail", "image/*;q=0, */*", 406),
        (SAMPLES["rtplan.dcm"].path + "/frames/1", "*/*", 404),
        (SAMPLES["rtplan.dcm"].path + "/rendered", "*/*", 404),
        (SAMPLES["CT_small.dcm"].path + "/frames/2", "*/*", 404),
        (SAMPLES["CT_small.dcm"].path + "/frames/0", "*/*", 404),
        (SAMPLES["CT_small.dcm"].path + "/frames/x", "*/*", 400),
        (SAMPLES["CT_small.dcm"].path + "/rendered?window=1,2", "*/*", 400),
        (SAMPLES["CT_small.dcm"].path + "/rendered?viewport=0,0", "*/*", 400),
        (SAMPLES["CT_small.dcm"].path + "/rendered?viewport=10,10,0,0,9000,1", "*/*", 400),
        (SAMPLES["CT_small.dcm"].path + "/rendered?zoom=2", "*/*", 400),
        (SAMPLES["CT_small.dcm"].path + "/bulkdata?offset=0&length=10", "*/*", 404),
        (SAMPLES["CT_small.dcm"].path + "/bulkdata?offset=1000&length=99999999", "*/*", 404),
        (SAMPLES["CT_small.dcm"].path + "/bulkdata?offset=-1&length=1", "*/*", 400),
        (SAMPLES["CT_small.dcm"].path + "/bulkdata", "*/*", 400),
        ("/studies/1.2.3.4.5", "*/*", 404),
        (SAMPLES["CT_small.dcm"].study + "/series/1.2.3", "*/*", 404),
        (SAMPLES["CT_small.dcm"].series + "/instances/1.2.3/metadata", "*/*", 404),
    ],
)
def test_what_cannot_be_had(web: Web, path: str, accept: str, status: int) -> None:
    response = web.get(path, headers={"accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    assert response.json()["detail"]


class Closed(Readable):
    """A storage that nobody may ask."""

    url = "closed:"

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        raise AssertionError(f"{path} was opened")

    def size(self, path: str) -> int:
        raise AssertionError(path)

    def exists(self, path: str) -> bool:
        raise AssertionError(path)

    def walk(self, prefix: str = "", *, enter: Any = None) -> Iterator[Any]:
        raise AssertionError(prefix)


def test_metadata_comes_from_the_catalog_alone(web: Web) -> None:
    def closed(services: Services) -> Services:
        return replace(services, archive=replace(services.archive, storage=Closed()))

    with serving_web(web.settings, closed) as other:
        for name in ("CT_small.dcm", "slice-3", "test-SR.dcm"):
            for path in (SAMPLES[name].study, SAMPLES[name].series, SAMPLES[name].path):
                found = other.get(f"{path}/metadata").json()
                one = next(o for o in found if o["00080018"]["Value"] == [SAMPLES[name].identity.SOPInstanceUID])
                assert "7FE00010" not in one or one["7FE00010"]["BulkDataURI"].startswith(
                    f"{other.url}{SAMPLES[name].path}/"
                )
        assert len(found) == 1
        xml = other.get(f"{SAMPLES['slice-0'].series}/metadata", headers={"accept": "application/dicom+xml"})
        assert xml.content.count(b"<NativeDicomModel") == 12
        assert xml.content.count(b"<BulkData uri=") == 12


@pytest.mark.parametrize("name", ["CT_small.dcm", "image_dfl.dcm", "JPEG-lossy.dcm", "liver_1frame.dcm"])
def test_values_that_metadata_refer_to(web: Web, name: str) -> None:
    one = SAMPLES[name]
    [header] = web.get(f"{one.path}/metadata").json()
    uri = header["7FE00010"]["BulkDataURI"]
    whole = web.client.get(uri, headers={"accept": "application/octet-stream"})
    expected = one.dataset().PixelData
    assert whole.content[: len(expected)] == expected
    [(kind, body)] = parts(web.client.get(uri, headers={"accept": "multipart/related"}))
    assert (kind, body) == ("application/octet-stream", whole.content)
    some = web.client.get(uri, headers={"range": "bytes=10-19"})
    assert (some.status_code, some.content) == (206, whole.content[10:20])
    assert some.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    last = web.client.get(uri, headers={"range": "bytes=-5"})
    assert last.content == whole.content[-5:]
    beyond = web.client.get(uri, headers={"range": f"bytes={len(whole.content)}-"})
    assert beyond.status_code == 416


def referred(header: dict[str, Any], dataset: pydicom.Dataset) -> Iterator[tuple[str, Any]]:
    """(URI, element) of every value that a header refers to, in items too."""
    for tag, element in header.items():
        mine = dataset[int(tag, 16)]
        if "BulkDataURI" in element:
            yield element["BulkDataURI"], mine
        elif element["vr"] == "SQ":
            for item, own in zip(element.get("Value", []), mine.value, strict=True):
                yield from referred(item, own)


def test_every_value_that_metadata_refer_to_can_be_had(web: Web) -> None:
    """Of every file; not only pixel data, and in items of sequences too."""
    found: set[int] = set()
    for one in SAMPLES.values():
        [header] = web.get(f"{one.path}/metadata").json()
        dataset = pydicom.dcmread(io.BytesIO(one.data), force=True)
        for uri, element in referred(header, dataset):
            assert uri.startswith(f"{web.url}{one.path}/"), one.name
            got = web.client.get(uri, headers={"accept": "application/octet-stream"})
            assert got.status_code == 200, (one.name, str(element.tag), got.text)
            encapsulated = element.tag == 0x7FE00010 and dataset.file_meta.TransferSyntaxUID.is_encapsulated
            value = element.value if isinstance(element.value, bytes) else None
            if value is not None and not encapsulated:
                assert got.content[: len(value)] == value and len(got.content) - len(value) in (0, 1), one.name
            found.add(int(element.tag))
    assert 0x7FE00010 in found and len(found) > 1, found


@pytest.mark.parametrize("name", WITH_PIXELS)
def test_frames(web: Web, name: str) -> None:
    one = SAMPLES[name]
    dataset = one.dataset()
    [(kind, body)] = parts(web.get(f"{one.path}/frames/1"))
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        assert kind.startswith("image/")
        assert body == next(generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames", 1))))
    decoded = web.get(f"{one.path}/frames/1", headers={"accept": "application/octet-stream"}).content
    dataset.convert_pixel_data()
    reference = dataset.pixel_array
    reference = reference[0] if int(dataset.get("NumberOfFrames", 1)) > 1 else reference
    planar = dataset.get("PlanarConfiguration") == 1 and dataset.SamplesPerPixel > 1
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated or not planar:
        got = np.frombuffer(decoded, reference.dtype.newbyteorder("<"))[: reference.size].reshape(reference.shape)
        if not str(dataset.PhotometricInterpretation).startswith("YBR"):
            assert (got == reference).all()


def test_lists_of_frames(web: Web, tmp_path: Path) -> None:
    settings = archive(tmp_path)
    moving = pydicom.dcmread(io.BytesIO(SAMPLES["CT_small.dcm"].data))
    frame = moving.PixelData
    moving.NumberOfFrames, moving.PixelData = 3, frame + frame[::-1] + frame
    out = io.BytesIO()
    moving.save_as(out)
    one = Sample("moving", out.getvalue(), identify(out.getvalue(), size=len(out.getvalue())))
    land(settings, [new_member(one.data)])
    with serving_web(settings) as other:  # not extracted: a recent arrival
        bodies = [body for _, body in parts(other.get(f"{one.path}/frames/2,1"))]
        assert bodies == [frame[::-1], frame]
        image = Image.open(io.BytesIO(other.get(f"{one.path}/rendered").content))
        assert (image.format, getattr(image, "n_frames", 1)) == ("GIF", 3)
        single = other.get(f"{one.path}/rendered", headers={"accept": "image/png"})
        assert Image.open(io.BytesIO(single.content)).size == (128, 128)


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "examples_rgb_color.dcm", "693_J2KI.dcm"])
def test_rendered_pixels_are_those_of_pydicom(web: Web, name: str) -> None:
    response = web.get(f"{SAMPLES[name].path}/rendered", headers={"accept": "image/png"})
    got = np.asarray(Image.open(io.BytesIO(response.content))).astype(int)
    dataset = SAMPLES[name].dataset()
    values = dataset.pixel_array
    if values.ndim == 2:
        values = apply_voi_lut(apply_modality_lut(values, dataset), dataset).astype(float)
        windowed = dataset.get("WindowWidth") not in (None, "")
        low, high = _range_of_window(dataset) if windowed else (values.min(), values.max())
        values = (values - low) / (high - low) * 255
    assert np.abs(got - values).max() <= 1


def _range_of_window(dataset: pydicom.Dataset) -> tuple[float, float]:
    """What pydicom windows onto: the range that the stored bits can take, rescaled."""
    bits, slope = dataset.BitsStored, float(dataset.get("RescaleSlope", 1))
    low = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
    shift = float(dataset.get("RescaleIntercept", 0))
    return low * slope + shift, (low + 2**bits - 1) * slope + shift


def test_window_viewport_annotation_and_thumbnails(web: Web) -> None:
    one = SAMPLES["CT_small.dcm"]

    def image(query: str, accept: str = "image/png") -> Any:
        response = web.get(f"{one.path}/{query}", headers={"accept": accept})
        assert response.status_code == 200, response.text
        return np.asarray(Image.open(io.BytesIO(response.content))).astype(int)

    plain = one.dataset().pixel_array.astype(float) * 1 - 1024
    expected = np.clip((plain - (40 - 0.5)) / (400 - 1) + 0.5, 0, 1) * 255
    assert np.abs(image("rendered?window=40,400,linear") - expected).max() <= 1
    exact = np.clip((plain - 40) / 400 + 0.5, 0, 1) * 255
    assert np.abs(image("rendered?window=40,400,LINEAR-EXACT") - exact).max() <= 1
    assert image("rendered?viewport=64,32").shape == (32, 32)
    assert (image("rendered?viewport=128,128,0,0,-128,128") == image("rendered")[:, ::-1]).all()
    assert image("rendered?viewport=500,500,10,20,30,40").shape == (500, 375)
    assert (image("rendered?annotation=patient,technique") != image("rendered")).any()
    assert image("rendered?quality=10", "image/jpeg").shape == (128, 128)
    assert image("thumbnail?viewport=50,50").shape == (50, 50)
    for path in (SAMPLES["slice-0"].study, SAMPLES["slice-0"].series):
        assert web.get(f"{path}/thumbnail").headers["content-type"] == "image/jpeg"
        assert len(parts(web.get(f"{path}/rendered"))) == 12
    first = web.get(f"{one.path}/rendered")
    assert web.get(f"{one.path}/rendered", headers={"if-none-match": first.headers["etag"]}).status_code == 304


def test_wado_uri(web: Web) -> None:
    one = SAMPLES["CT_small.dcm"]
    root = web.url.removesuffix("/dicom-web")
    uids = {"studyUID": one.identity.StudyInstanceUID, "seriesUID": one.identity.SeriesInstanceUID,
            "objectUID": one.identity.SOPInstanceUID}  # fmt: skip

    def get(**more: str) -> httpx.Response:
        return web.client.get(f"{root}/wado", params={"requestType": "WADO", **uids, **more})

    assert get(contentType="application/dicom").content == one.data
    assert get().headers["content-type"] == "image/jpeg"
    small = get(contentType="image/png", rows="32", windowCenter="40", windowWidth="400", frameNumber="1")
    assert Image.open(io.BytesIO(small.content)).size == (32, 32)
    assert get(contentType="text/html").status_code == 406
    assert get(contentType="application/dicom", transferSyntax="1.2.840.10008.1.2.4.70").status_code == 406
    assert get(objectUID="../x").status_code == 400
    assert get(objectUID="1.2.3").status_code == 404
    assert get(requestType="RID").status_code == 400
    assert get(anonymize="yes").status_code == 406
    assert get(frameNumber="9", contentType="image/png").status_code == 404


def test_what_landed_a_moment_ago(web: Web) -> None:
    [data] = slices(1, seed=99)
    found = identify(data, size=len(data))
    land(web.settings, [new_member(data)])
    path = f"/studies/{found.StudyInstanceUID}/series/{found.SeriesInstanceUID}/instances/{found.SOPInstanceUID}"
    assert web.get(path, headers={"accept": "application/dicom"}).content == data
    assert len(web.get(f"{path}/metadata").json()) == 1


def test_a_client_of_others(web: Web) -> None:
    client = DICOMwebClient(web.url)
    one = SAMPLES["slice-0"]
    study, series = one.identity.StudyInstanceUID, one.identity.SeriesInstanceUID
    sop = one.identity.SOPInstanceUID
    assert len(client.search_for_studies(search_filters={"StudyInstanceUID": study}, fields=["StudyDescription"])) == 1
    assert len(client.search_for_series(study)) == len(client.search_for_series(study, limit=5)) == 1
    assert len(client.search_for_instances(study, series, limit=20)) == 12
    assert client.search_for_studies(search_filters={"PatientID": "NOBODY"}) == []
    assert len(client.retrieve_study(study)) == len(client.retrieve_series(study, series)) == 12
    assert sum(1 for _ in client.iter_series(study, series)) == 12
    got = client.retrieve_instance(study, series, sop)
    assert got.PixelData == one.dataset().PixelData
    assert len(client.retrieve_study_metadata(study)) == len(client.retrieve_series_metadata(study, series)) == 12
    metadata = client.retrieve_instance_metadata(study, series, sop)
    assert client.retrieve_bulkdata(metadata["7FE00010"]["BulkDataURI"]) == [one.dataset().PixelData]
    assert client.retrieve_instance_frames(study, series, sop, frame_numbers=[1]) == [one.dataset().PixelData]
    assert client.retrieve_instance_rendered(study, series, sop, media_types=("image/png",))[:4] == b"\x89PNG"
    assert (
        client.retrieve_instance_frames_rendered(study, series, sop, [1], media_types=("image/jpeg",))[:2]
        == b"\xff\xd8"
    )


def test_a_large_instance_takes_no_more_memory_than_a_small_one(web: Web, tmp_path: Path) -> None:
    """128 MiB through a server that holds some windows of 4 MiB."""
    settings = archive(tmp_path)
    large = pydicom.dcmread(io.BytesIO(SAMPLES["CT_small.dcm"].data))
    large.NumberOfFrames, large.PixelData = 4096, large.PixelData * 4096
    out = io.BytesIO()
    large.save_as(out)
    data = out.getvalue()
    del out, large
    found = identify(data, size=len(data))
    land(settings, [new_member(data)])
    size, process = len(data), psutil.Process()
    del data
    with serving_web(settings) as other:
        url = f"{other.url}/studies/{found.StudyInstanceUID}"
        before, most, received = process.memory_info().rss, 0, 0
        with other.client.stream("GET", url) as response:
            for chunk in response.iter_raw(1 << 20):
                received += len(chunk)
                most = max(most, process.memory_info().rss)
        assert received > size
        assert most - before < 64 << 20
    hasty = settings.model_copy(update={"web": settings.web.model_copy(update={"idle_s": 1})})
    # not by the server above: on a busy machine a client that does read may wait as long
    with serving_web(hasty) as other, socket.create_connection(("127.0.0.1", other.port)) as idle:
        path = f"/dicom-web/studies/{found.StudyInstanceUID}"
        idle.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())  # and reads nothing
        idle.settimeout(30)
        assert idle.recv(1, socket.MSG_PEEK), "the answer has begun"
        deadline = time.monotonic() + 30
        while _is_served(other.port, idle) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _is_served(other.port, idle), "a reader that stands still is broken off"
        assert len(until_closed(idle)) < size, "and never gets the rest"


def _is_served(port: int, client: socket.socket) -> bool:
    """Whether the server still holds its end of a connection."""
    ends = [(one.laddr, one.raddr) for one in psutil.Process().net_connections(kind="tcp4") if one.raddr]
    return any(mine.port == port and theirs.port == client.getsockname()[1] for mine, theirs in ends)


def test_instances_of_a_series_are_looked_up_together(web: Web) -> None:
    class Counting:
        def __init__(self) -> None:
            self.asked = 0

        def lookup_headers(self, **named: Any) -> Iterator[Any]:
            self.asked += 1
            return web.services.archive.catalog.lookup_headers(**named)

        def deletions(self) -> str:
            return deletions[0]

    deletions = [""]
    now, catalog = [0.0], Counting()
    known = KnownSeries(catalog, clock=lambda: now[0])
    ones = [SAMPLES[f"slice-{number}"].identity for number in range(12)]
    for one in ones:
        found = known.instance(one.StudyInstanceUID, one.SeriesInstanceUID, one.SOPInstanceUID)
        assert found is not None and found.SOPInstanceUID == one.SOPInstanceUID
        assert known.header(found).startswith("{")
    assert catalog.asked == 1
    assert known.instance(ones[0].StudyInstanceUID, ones[0].SeriesInstanceUID, "1.2.3") is None
    assert catalog.asked == 2  # what is not known may have arrived
    now[0] = 6
    known.instance(ones[0].StudyInstanceUID, ones[0].SeriesInstanceUID, ones[0].SOPInstanceUID)
    assert catalog.asked == 3
    deletions[0] = "one"
    known.instance(ones[0].StudyInstanceUID, ones[0].SeriesInstanceUID, ones[0].SOPInstanceUID)
    assert catalog.asked == 4
