"""OHIF on studies of every kind that the list shows: transfer syntaxes, colour, frames, no Modality, no image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from playwright.sync_api import Page, expect

from sphere.ingest.header import identify
from tests.support.browser import NO_TOUR, WAIT_MS, require_viewer
from tests.support.landing import archive, changed, land, new_member
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.web

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "implicit VR": ("MR_small_implicit.dcm", {}),
    "big endian": ("MR_small_bigendian.dcm", {}),
    "deflated": ("image_dfl.dcm", {}),
    "RLE": ("MR_small_RLE.dcm", {}),
    "JPEG baseline": ("SC_rgb_jpeg_gdcm.dcm", {}),
    "JPEG extended": ("JPEG-lossy.dcm", {}),
    "JPEG-LS": ("MR_small_jpeg_ls_lossless.dcm", {}),
    "JPEG 2000 without loss": ("MR_small_jp2klossless.dcm", {}),
    "JPEG 2000, colour": ("examples_jpeg2k.dcm", {}),
    "RGB": ("examples_rgb_color.dcm", {}),
    "palette": ("examples_palette.dcm", {}),
    "frames": ("examples_ybr_color.dcm", {}),
    "no Modality": ("CT_small.dcm", {"Modality": ""}),
    "no Modality, secondary capture": ("SC_rgb_small_odd_jpeg.dcm", {"Modality": ""}),
}
WITHOUT_IMAGE = {  # file, and what is to be read there
    "plan": ("rtplan.dcm", "RTPLAN"),
    "report": ("reportsi.dcm", "Recording Observer's Organization Name"),
    "report with items that have no name": ("test-SR.dcm", "[COMPOSITE is not supported]"),
}
DRAWN = """() => Array.from(document.querySelectorAll('canvas.cornerstone-canvas')).some(canvas => {
  const all = canvas.getContext('2d', {willReadFrequently: true}).getImageData(0, 0, canvas.width, canvas.height).data;
  let bright = 0;
  for (let i = 0; i < all.length; i += 4) bright += Math.max(all[i], all[i + 1], all[i + 2]) > 40;
  return bright > all.length / 4 / 50;
})"""


def study(kind: str) -> str:
    """A study of its own for each kind, though files share one."""
    return f"1.2.3.4.{[*KINDS, *WITHOUT_IMAGE].index(kind) + 1}"


def file(kind: str) -> bytes:
    name, attributes = KINDS[kind] if kind in KINDS else (WITHOUT_IMAGE[kind][0], {})
    root = study(kind)
    uids = {"StudyInstanceUID": root, "SeriesInstanceUID": f"{root}.1", "SOPInstanceUID": f"{root}.1.1"}
    return changed((FILES / name).read_bytes(), **uids, **attributes)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    require_viewer()
    settings = archive(tmp_path_factory.mktemp("kinds"))
    files = [file(kind) for kind in (*KINDS, *WITHOUT_IMAGE)]
    assert {identify(data, size=len(data)).StudyInstanceUID for data in files} == {
        study(kind) for kind in (*KINDS, *WITHOUT_IMAGE)
    }
    land(settings, [new_member(data) for data in files])
    with serving_web(settings) as running:
        yield running


def opened(page: Page, web: Web, kind: str) -> Page:
    page.add_init_script(NO_TOUR)
    page.goto(f"http://127.0.0.1:{web.port}/viewer/viewer?StudyInstanceUIDs={study(kind)}")
    return page


def test_the_list_has_them_all(page: Page, web: Web) -> None:
    page.goto(f"http://127.0.0.1:{web.port}/")
    expect(page.locator("main tbody tr")).to_have_count(len(KINDS) + len(WITHOUT_IMAGE), timeout=WAIT_MS)


@pytest.mark.parametrize("kind", KINDS)
def test_its_image_is_drawn(page: Page, web: Web, kind: str) -> None:
    assert opened(page, web, kind).wait_for_function(DRAWN, polling=100).json_value()


@pytest.mark.parametrize("kind", WITHOUT_IMAGE)
def test_without_an_image_there_is_something_to_read(page: Page, web: Web, kind: str) -> None:
    expect(opened(page, web, kind).get_by_text(WITHOUT_IMAGE[kind][1]).first).to_be_visible(timeout=WAIT_MS)
