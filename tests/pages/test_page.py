"""The page in a real Chromium: list, filters, thumbnails, headers, keys, dark and light, a phone, hostile values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from zipfile import ZipFile

import pytest
from playwright.sync_api import Page, expect
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from tests.support.browser import WAIT_MS
from tests.support.extracted import extract
from tests.support.landing import archive, changed, land, new_member, slices
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.web

HOSTILE = "<script>window.hit(1)</script><b>^Doe"
IMAGE = "<img src=x onerror=window.hit=1>KNEE"
OTHER = [changed(one, PatientName=HOSTILE, StudyDescription=IMAGE, PatientID="X1",
                 StudyInstanceUID="1.2.9", SeriesInstanceUID="1.2.9.1", Modality="MR", AccessionNumber="ACC-77",
                 SOPInstanceUID=f"1.2.9.1.{number}", StudyDate="20200102")
         for number, one in enumerate(slices(2, rows=32, columns=32))]  # fmt: skip
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("page"))
    first = slices(3, rows=32, columns=32)
    land(settings, [new_member(one) for one in (*first, *OTHER)])
    extract(settings)
    with serving_web(settings) as running:
        yield running


@pytest.fixture(scope="module")
def secrets(web: Web) -> dict[str, str]:
    """Tokens by role; made before any is checked, as servers know of a new one within seconds."""
    tokens = web.services.tokens
    researcher = tokens.create("study nurse", "researcher", None, collections=["TRIAL"])
    return {"researcher": researcher, "reader": tokens.create("ward", "reader", None)}


@pytest.fixture
def studies(page: Page, web: Web) -> Page:
    page.goto(f"http://127.0.0.1:{web.port}/")
    expect(page.locator("main tbody tr")).to_have_count(2)
    return page


def test_filters_answer_as_one_types(studies: Page) -> None:
    rows = studies.locator("main tbody tr")
    studies.get_by_label("Patient ID").fill("X1")
    expect(rows).to_have_count(1)
    studies.get_by_label("Patient ID").fill("nobody")
    expect(rows).to_have_count(0)
    studies.get_by_role("button", name="Clear").click()
    expect(rows).to_have_count(2)
    studies.get_by_label("Description").fill("knee")
    expect(rows).to_have_count(1)
    assert "StudyDescription=knee" in studies.url
    studies.reload()
    expect(rows).to_have_count(1)
    studies.get_by_label("From", exact=True).fill("2020-01-03")
    expect(rows).to_have_count(0)
    studies.get_by_label("From", exact=True).fill("2020-01-01")
    studies.get_by_label("To", exact=True).fill("2020-01-02")
    expect(rows).to_have_count(1)


@pytest.mark.parametrize(
    ("label", "typed"),
    [("Patient name", "^doe"), ("Modality", "mr"), ("Accession number", "C-7"), ("Description", "KNEE"),
     ("Patient ID", "X?")],
)  # fmt: skip
def test_each_filter_by_itself(studies: Page, label: str, typed: str) -> None:
    rows, field = studies.locator("main tbody tr"), studies.get_by_label(label, exact=True)
    field.fill(typed)
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("ACC-77")
    field.fill(f"{typed}none")
    expect(rows).to_have_count(0)
    field.fill("")
    expect(rows).to_have_count(2)


def test_ranges_of_dates_by_one_press(studies: Page) -> None:
    for name in ("Today", "7 days", "30 days"):
        studies.get_by_role("button", name=name).click()
        expect(studies.locator("main tbody tr")).to_have_count(0)
        studies.get_by_role("button", name="Any date").click()
        expect(studies.locator("main tbody tr")).to_have_count(2)


def test_values_are_text(studies: Page) -> None:
    studies.get_by_label("Patient ID").fill("X1")
    expect(studies.locator("main tbody tr")).to_have_count(1)
    expect(studies.locator("main tbody tr")).to_contain_text(HOSTILE)
    expect(studies.locator("main tbody tr")).to_contain_text(IMAGE)
    studies.locator("main tbody tr").click()
    expect(studies.locator("h1")).to_have_text(HOSTILE)
    studies.goto(f"{studies.url}/series/1.2.9.1/instance/1.2.9.1.0")
    expect(studies.locator(".header")).to_contain_text(HOSTILE)
    assert studies.locator("main b, main script, main img[src=x]").count() == 0
    assert studies.evaluate("window.hit") is None


def test_from_a_study_to_a_header_by_keys(studies: Page) -> None:
    studies.keyboard.press("/")
    expect(studies.get_by_label("Patient name")).to_be_focused()
    studies.keyboard.press("Escape")
    studies.keyboard.press("j")
    studies.keyboard.press("j")
    studies.keyboard.press("k")
    studies.keyboard.press("Enter")
    expect(studies.locator("a.up")).to_have_text("← Studies")
    expect(studies.locator(".card img")).to_have_count(1)
    studies.keyboard.press("j")
    studies.keyboard.press("Enter")
    expect(studies.locator("a.up")).to_have_text("← Study")
    pictures = studies.locator(".card img")
    expect(pictures).to_have_count(3)
    assert pictures.first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    studies.keyboard.press("j")
    studies.keyboard.press("Enter")
    expect(studies.locator(".two img")).to_be_visible()
    studies.keyboard.press("/")
    studies.keyboard.type("patient's name")
    expect(studies.locator(".header tr:visible")).to_have_count(1)
    studies.keyboard.press("Escape")
    for above in ("Series", "Study", "Studies"):
        expect(studies.locator("a.up")).to_have_text(f"← {above}")
        studies.keyboard.press("Escape")
    expect(studies.locator("h1")).to_have_text("Studies")
    studies.keyboard.press("?")
    expect(studies.locator("#help")).to_be_visible()


def test_dark_and_light(studies: Page) -> None:
    def back() -> str:
        return str(studies.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = back()
    studies.keyboard.press("t")
    assert back() != light
    studies.reload()
    expect(studies.locator("main tbody tr")).to_have_count(2)
    assert back() != light


def test_the_preference_of_the_system_is_followed(studies: Page) -> None:
    """Until somebody chooses here."""
    backs = []
    for scheme in ("dark", "light"):
        studies.emulate_media(color_scheme=cast(Any, scheme))
        studies.reload()
        expect(studies.locator("main tbody tr")).to_have_count(2)
        text, back = studies.evaluate("['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])")
        backs.append(tuple(sum(map(int, re.findall(r"\d+", one)[:3])) for one in (text, back)))
    (dark_text, dark_back), (light_text, light_back) = backs
    assert dark_text > dark_back and light_text < light_back
    studies.keyboard.press("t")
    studies.reload()
    expect(studies.locator("main tbody tr")).to_have_count(2)
    assert studies.evaluate("document.documentElement.dataset.theme") == "dark"


def test_on_a_phone_nothing_is_cut_off(studies: Page) -> None:
    studies.set_viewport_size({"width": 360, "height": 740})
    studies.reload()
    for above, target in (("", ""), ("← Studies", "main tbody tr"), ("← Study", ".card"), ("← Series", ".card")):
        if target:
            studies.locator(target).first.click()
            expect(studies.locator("a.up")).to_have_text(above)
        expect(studies.locator("main tbody tr, .card").first).to_be_visible()
        assert studies.evaluate("document.documentElement.scrollWidth") <= 360, above


@pytest.mark.parametrize(("name", "more"), [("Download ZIP", set()), ("ZIP with DICOMDIR", {"DICOMDIR"})])
def test_a_download(studies: Page, name: str, more: set[str]) -> None:
    """Of the study that is shown: each file as it was stored."""
    studies.locator("main tbody tr").filter(has_text="X1").click()
    with studies.expect_download() as started:
        studies.get_by_role("button", name=name).click()
    with ZipFile(started.value.path()) as file:
        assert {one.filename for one in file.infolist() if "/" not in one.filename} == more
        found = sorted(file.read(one) for one in file.namelist() if one not in more)
    assert found == sorted(OTHER)


def test_annotations_of_a_study(studies: Page, web: Web) -> None:
    """Files of the study and of all in it: what they are, and their bytes; names are text."""
    root, name = f"http://127.0.0.1:{web.port}/annotations", "<b onclick=hit>mask<b>.nii"
    said = {"name": name, "type": "<i>mask", "author": "Dr <u>A"}
    made = [web.client.post(root, content=bytes(1200), params={"uid": "1.2.9", **said}).json()]
    made.append(web.client.post(root, content=b"note", params={"uid": "1.2.9.1.0", "name": "note.txt"}).json())
    studies.locator("main tbody tr").filter(has_text="X1").click()
    section = studies.get_by_role("region", name="Annotations")
    expect(section.locator("h2")).to_have_text("2 annotations")
    lines = section.locator("tbody tr")
    expect(lines).to_have_count(2)
    for text in (name, "<i>mask", "Dr <u>A", "study", "1.2 kB"):
        expect(lines.first).to_contain_text(text)
    year = studies.evaluate("at => new Date(at).toLocaleString(undefined, {dateStyle: 'short'})", made[0]["at"])
    expect(lines.first).to_contain_text(year)
    expect(lines.last).to_contain_text("instance")
    assert section.locator("b, i, u").count() == 0
    with studies.expect_download() as started:
        lines.last.get_by_role("button", name="Download").click()
    assert (started.value.suggested_filename, started.value.path().read_bytes()) == ("note.txt", b"note")
    for one in made:
        assert web.client.delete(f"{root}/{one['id']}").status_code == 204
    studies.reload()
    expect(section.locator("h2")).to_have_text("0 annotations")
    expect(section.locator("table")).to_have_count(0)


def test_dicom_objects_among_the_annotations(page: Page, tmp_path: Path) -> None:
    """A report that refers to an image of the study is listed, and had as it was stored."""
    image = slices(1, rows=32, columns=32)[0]
    of = new_member(image)
    evidence, series, one = Dataset(), Dataset(), Dataset()
    one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = of.SOPClassUID, of.SOPInstanceUID
    series.SeriesInstanceUID, series.ReferencedSOPSequence = of.SeriesInstanceUID, [one]
    evidence.StudyInstanceUID, evidence.ReferencedSeriesSequence = of.StudyInstanceUID, [series]
    source = Path(get_testdata_file("reportsi.dcm") or "").read_bytes()
    said = {"StudyInstanceUID": of.StudyInstanceUID, "CurrentRequestedProcedureEvidenceSequence": [evidence]}
    report = changed(source, **said)
    settings = archive(tmp_path)
    land(settings, [of, new_member(report)])
    with serving_web(settings) as web:
        page.goto(f"http://127.0.0.1:{web.port}/#/study/{of.StudyInstanceUID}")
        lines = page.get_by_role("region", name="Annotations").locator("tbody tr")
        expect(lines).to_have_count(1)
        expect(lines).to_contain_text("SR")
        with page.expect_download() as started:
            lines.get_by_role("button", name="Download").click()
        assert started.value.suggested_filename.endswith(".dcm")
        assert started.value.path().read_bytes() == report


def test_the_state_of_the_archive(studies: Page, web: Web) -> None:
    expect(studies.locator("#live")).to_contain_text("5 instances")
    headings = ("Arrivals and jobs", "Quarantine", "Peers", "Storage", "Errors")
    for key, heading in enumerate(headings, start=2):
        studies.keyboard.press(str(key))
        expect(studies.locator("h1")).to_have_text(heading)
    studies.keyboard.press("2")
    expect(studies.locator("main table.list").first).to_contain_text(HOSTILE)
    land(web.settings, [new_member(one) for one in slices(2, seed=9, study=3)])
    expect(studies.locator("#live")).to_contain_text("7 instances · 2 waiting")
    expect(studies.locator("main tbody tr")).to_have_count(3)


def test_a_token_is_asked_for(page: Page, web: Web) -> None:
    """As for clients of other hosts: kept in the tab, and sent with every request."""
    settings = web.settings.model_copy(update={"web": web.settings.web.model_copy(update={"auth": "all"})})
    secret = web.services.tokens.create("page", "reader", None)
    with serving_web(settings) as closed:
        page.goto(f"http://127.0.0.1:{closed.port}/")
        field = page.locator("#token input")
        field.fill("sphere_wrong")
        field.press("Enter")
        expect(page.locator("#token .error")).to_contain_text("not")
        field.fill(secret)
        field.press("Enter")
        expect(page.locator("main tbody tr").first).to_be_visible()
        expect(page.locator("nav a:visible")).to_have_count(2)


def test_a_researcher_is_shown_the_view_that_answers(page: Page, web: Web, secrets: dict[str, str]) -> None:
    page.add_init_script(f"sessionStorage.setItem('sphere.token', '{secrets['researcher']}')")
    page.goto(f"http://127.0.0.1:{web.port}/")
    expect(page.locator("nav a:visible")).to_have_text(["Studies"])
    page.keyboard.press("2")
    page.keyboard.press("t")
    assert "arrivals" not in page.url
    expect(page.locator("h1")).to_have_text("Studies")


def test_views_are_those_of_the_role_once_it_is_known(page: Page, web: Web, secrets: dict[str, str]) -> None:
    """Though the first question about it is not answered."""
    page.add_init_script(f"sessionStorage.setItem('sphere.token', '{secrets['reader']}')")
    page.route("**/status", lambda route: route.abort(), times=1)
    page.goto(f"http://127.0.0.1:{web.port}/")
    expect(page.locator("#live")).to_contain_text("no answer")
    expect(page.locator("nav a:visible")).to_have_text(["Studies", "Arrivals"])
