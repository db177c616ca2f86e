"""The page's files and its policy, and studies as ZIP files with and without a DICOMDIR, over a real socket."""

from __future__ import annotations

import io
import re
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.fileset import FileSet

from sphere.catalog.service import StoredInstance
from sphere.ingest.header import identify
from sphere.scp.web import zipped
from sphere.scp.web.dicomdir import Entry, directory, record_type
from sphere.scp.web.page import FOLDER, PREFIX
from tests.support.dicom_tools import run_tool
from tests.support.extracted import extract
from tests.support.landing import archive, changed, land, new_member, slices
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

SLICES = slices(5)
STUDY = identify(SLICES[0], size=len(SLICES[0])).StudyInstanceUID
OTHER = [changed(one, SeriesInstanceUID="1.2.3.99", StudyInstanceUID=STUDY, SOPInstanceUID=f"1.2.3.99.{number}",
                 SeriesNumber=7, PatientName="Yamada^Tarou=山田^太郎", SpecificCharacterSet="ISO_IR 192")
         for number, one in enumerate(slices(2, seed=5))]  # fmt: skip
FILES = {identify(one, size=len(one)).SOPInstanceUID: one for one in (*SLICES, *OTHER)}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("page"))
    land(settings, [new_member(data) for data in FILES.values()])
    extract(settings)
    with serving_web(settings) as running:
        yield running


def test_the_page_runs_nothing_but_its_own_files(web: Web) -> None:
    root = f"http://127.0.0.1:{web.port}"
    page = web.client.get(f"{root}/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert not re.findall(r"<script(?![^>]*src)|style=|\son\w+=", page.text)
    for file in FOLDER.iterdir():
        got = web.client.get(f"{root}{PREFIX}{file.name}")
        assert (got.status_code, got.content) == (200, file.read_bytes()), file.name
        assert got.headers["content-security-policy"] == policy
        again = web.client.get(f"{root}{PREFIX}{file.name}", headers={"if-none-match": got.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert not re.search(r"innerHTML|insertAdjacentHTML|outerHTML|document\.write|eval\(", got.text), file.name
    assert web.client.get(f"{root}{PREFIX}dictionary.json").json()["00100010"] == "Patient's Name"
    for path in ("../app.py", "%2e%2e/app.py", "none.js", ""):
        assert web.client.get(f"{root}{PREFIX}{path}").status_code == 404


@pytest.mark.parametrize("ending", ["", "/series/1.2.3.99", "/series/1.2.3.99/instances/1.2.3.99.1"])
def test_a_zip_file_holds_what_was_stored(web: Web, ending: str) -> None:
    response = web.get(f"/studies/{STUDY}{ending}", headers={"accept": "application/zip"})
    assert response.headers["content-type"] == "application/zip"
    assert re.fullmatch(
        r'attachment; filename="(study|series|instance)-[0-9.]+\.zip"', response.headers["content-disposition"]
    )
    with zipfile.ZipFile(io.BytesIO(response.content)) as file:
        assert file.testzip() is None
        names = file.namelist()
        assert all(re.fullmatch(r"[0-9.]+/[0-9.]+\.dcm", name) for name in names)
        assert len(set(names)) == len(names) == {"": len(FILES), "/series/1.2.3.99": 2}.get(ending, 1)
        for name in names:
            assert file.read(name) == FILES[name.rpartition("/")[2].removesuffix(".dcm")]
    asked = web.get(
        f"/studies/{STUDY}{ending}?accept=application/zip", headers={"if-none-match": response.headers["etag"]}
    )
    assert (asked.status_code, asked.content) == (304, b"")


def test_a_dicomdir_lists_the_files_beside_it(web: Web, tmp_path: Path) -> None:
    response = web.get(f"/studies/{STUDY}?accept=application/zip&dicomdir=true")
    with zipfile.ZipFile(io.BytesIO(response.content)) as file:
        names = file.namelist()
        file.extractall(tmp_path)
    assert names[0] == "DICOMDIR"
    assert all(re.fullmatch(r"DICOM/SE\d{6}/IM\d{6}", name) for name in names[1:])
    found = FileSet(tmp_path / "DICOMDIR")
    assert {str(one.SOPInstanceUID): Path(one.path).read_bytes() for one in found} == FILES
    assert {str(one.PatientName) for one in found} >= {"Yamada^Tarou=山田^太郎"}
    dumped = run_tool("dcdirdmp", tmp_path / "DICOMDIR")
    assert dumped.returncode == 0, dumped.stdout
    verified = run_tool("dciodvfy", tmp_path / "DICOMDIR")
    problems = [line for line in verified.stdout.splitlines() if line.startswith("Error")]
    assert not problems, problems


def test_what_is_not_offered_is_refused(web: Web) -> None:
    zipped_ = {"accept": "application/zip"}
    assert web.get("/studies/9.9.9", headers=zipped_).status_code == 404
    assert web.get(f"/studies/{STUDY}?dicomdir=yes", headers=zipped_).status_code == 400
    preferred = web.get(
        f"/studies/{STUDY}", headers={"accept": 'application/zip;q=0.1, multipart/related; type="application/dicom"'}
    )
    assert preferred.headers["content-type"].startswith("multipart/related")


def stored(sop: str, series: str = "1.2") -> StoredInstance:
    return StoredInstance("1", series, sop, "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1", "b", 0, 1, 0, None, "")


def test_names_cannot_leave_the_folder() -> None:
    named = [
        name
        for name, _ in zipped.named_by_uid(
            [stored("../../x"), stored("1..2", ".."), stored("a\\b"), stored("a/b"), stored("1.2.3")]
        )
    ]
    assert named == ["1.2/uid-______x.dcm", "uid-__/1..2.dcm", "1.2/uid-a_b.dcm", "1.2/uid-a_b-4.dcm", "1.2/1.2.3.dcm"]


def test_a_large_study_takes_little_memory(web: Web) -> None:
    """Bytes that the response holds at once do not grow with the study."""
    archive_ = web.services.archive
    instances = archive_.located(STUDY)
    members = [(f"{number}.dcm", instances[number % len(instances)]) for number in range(2000)]
    tracemalloc.start()
    sent = sum(len(piece) for piece in zipped._zip(archive_, members))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sent > sum(one.length for _, one in members)
    assert peak < sent + (16 << 20)


def test_records_of_every_kind_can_be_read(tmp_path: Path) -> None:
    classes = [
        f"1.2.840.10008.5.1.4.1.1.{one}"
        for one in ("2", "88.11", "88.59", "11.1", "9.1.1", "481.2", "104.1", "66", "66.1", "67")
    ]
    entries = [
        Entry(StoredInstance("1", "1.2", f"1.2.{n}", uid, "1.2.840.10008.1.2.1", "b", 0, 1, 0, None, ""), {})
        for n, uid in enumerate(classes, start=1)
    ]
    data, names = directory(entries)
    records = pydicom.dcmread(io.BytesIO(data)).DirectoryRecordSequence
    assert [one.DirectoryRecordType for one in records[3:]] == [record_type(uid) for uid in classes]
    assert ["/".join(one.ReferencedFileID) for one in records[3:]] == names
    assert [one.InstanceNumber for one in records[3:]] == list(range(1, 11))
    assert pydicom.dcmread(io.BytesIO(directory([])[0])).DirectoryRecordSequence == []
