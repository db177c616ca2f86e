"""QIDO-RS over a real socket: resources, keys, paging, media types, and what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest
from pydicom.datadict import keyword_for_tag

from sphere.catalog import index as index_module
from sphere.catalog.index_maker import IndexMaker
from sphere.catalog.query import Query
from sphere.catalog.schema import BY_KEYWORD, LEVELS, Level, level_of
from sphere.scp.web import search
from sphere.scp.web.accept import choose, parse
from sphere.scp.web.problem import WebError
from sphere.scp.web.search_request import parse_search
from tests.support.catalog import archive, instance, write_catalog
from tests.support.web import Web, serving_web
from tests.unit.test_query_service import ROWS

pytestmark = pytest.mark.unit

STUDY, SERIES, INSTANCE = "0020000D", "0020000E", "00080018"
XML = 'multipart/related; type="application/dicom+xml"'


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("web"))
    write_catalog(settings, ROWS)
    with serving_web(settings) as running:
        yield running


def found(web: Web, path: str, tag: str = STUDY) -> list[str]:
    response = web.get(path)
    assert response.status_code in (200, 204), response.text
    return [one[tag]["Value"][0] for one in response.json()] if response.content else []


@pytest.mark.parametrize(
    ("path", "tag", "count"),
    [
        ("/studies", STUDY, len({row["StudyInstanceUID"] for row in ROWS})),
        ("/series", SERIES, len({row["SeriesInstanceUID"] for row in ROWS})),
        ("/instances", INSTANCE, len(ROWS)),
        ("/studies/9.1/series", SERIES, 2),
        ("/studies/9.1/instances", INSTANCE, 4),
        ("/studies/9.1/series/9.1.1/instances", INSTANCE, 3),
    ],
)
def test_the_six_resources(web: Web, path: str, tag: str, count: int) -> None:
    uids = found(web, path, tag)
    assert len(uids) == len(set(uids)) == count
    assert uids == sorted(uids) or tag != STUDY


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("PatientID=P1", True),
        ("00100020=P1", True),
        ("PatientName=doe*", True),
        ("PatientName=Doe%5EJ%3Fhn", True),
        ("StudyDate=20240101", True),
        ("StudyDate=20231231-20240101", True),
        ("StudyDate=20240102-&PatientID=P1", False),
        ("StudyInstanceUID=9.1,9.77", True),
        ("StudyInstanceUID=9.1%5C9.77", True),
        ("StudyInstanceUID=9.77&StudyInstanceUID=9.1", True),
        ("ModalitiesInStudy=SR,XA&PatientID=P1", True),
        ("ProcedureCodeSequence.CodeValue=C2", True),
        ("00081032.00080100=C2&PatientID=P1", True),
        ("ProcedureCodeSequence.CodeValue=C1&ProcedureCodeSequence.CodeMeaning=meaning%20of%20C2", False),
        ("00091001=secret%201", True),
        ("AccessionNumber=A_B*", True),
        ("PatientWeight=70.50", True),
        ("StudyDescription=CHEST%20100%25", True),
    ],
)
def test_keys(web: Web, query: str, expected: bool) -> None:
    assert ("9.1" in found(web, f"/studies?{query}")) is expected


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/studies?NoSuchThing=1", "NoSuchThing"),
        ("/studies?PatientNam=1", "did you mean PatientName"),
        ("/studies?Modality=CT", "Modality is a key of SERIES"),
        ("/studies?StudyDate=2024-01-01", "StudyDate"),
        ("/studies?PatientID.CodeValue=1", "PatientID is no sequence"),
        ("/studies?PatientID=1&PatientID=2", "PatientID stands twice"),
        ("/studies?limit=-1", "limit must be"),
        ("/studies?limit=1&limit=2", "limit stands twice"),
        ("/studies?count=1", "count must be"),
        ("/studies?asOf=yesterday", "neither a version"),
        ("/studies?=0", "neither a DICOM keyword nor a tag"),
        ("/studies?includefield=All", "all is written in lower case"),
        ("/studies?fuzzymatching=True", "fuzzymatching must be true or false in lower case"),
        ("/studies?count=FALSE", "count must be true or false in lower case"),
        ("/instances?after=9.1%5C9.1.1", "after must be"),
        ("/studies?includefield=Nonsense", "Nonsense"),
        ("/series?RequestAttributesSequence=1", "RequestAttributesSequence is a sequence: it has no value"),
        (
            "/series?RequestAttributesSequence=1&RequestAttributesSequence.RequestedProcedureID=R1",
            "RequestAttributesSequence has a value beside it",
        ),
        ("/studies/9.1/series?StudyInstanceUID=9.2", "StudyInstanceUID is in the path"),
        ("/studies/..%2F..%2Fetc/series", "not a UID|no such resource"),
        ("/studies/9.1%00/series", "not a UID"),
        ("/studies?" + "&".join(f"includefield={n}" for n in range(201)), "at most 200"),
        ("/studies?" + ".".join(["ProcedureCodeSequence"] * 10) + "=1", "too many sequences"),
    ],
)
def test_what_is_refused(web: Web, path: str, says: str) -> None:
    response = web.get(path)
    assert response.status_code in (400, 404)
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == response.status_code
    assert re.search(says, body["detail"])


def test_defaults_and_includefield(web: Web) -> None:
    plain, *_ = web.get("/studies?StudyInstanceUID=9.1").json()
    assert plain["00080061"]["Value"] == ["CT", "SR"]
    assert plain["00100010"] == {"vr": "PN", "Value": [{"Alphabetic": "Doe^John"}]}
    assert plain["00201208"]["Value"] == [4]
    assert plain["00081190"]["Value"] == [f"{web.url}/studies/9.1"]
    assert "00081030" not in plain
    more, *_ = web.get(
        "/studies?StudyInstanceUID=9.1&includefield=StudyDescription,ProcedureCodeSequence.CodeValue"
    ).json()
    assert more["00081030"]["Value"] == ["CHEST 100%"]
    assert more["00081032"]["Value"] == [{"00080100": {"vr": "SH", "Value": [code]}} for code in ("C1", "C2")]
    every, *_ = web.get("/studies/9.1/instances?includefield=all&limit=1").json()
    assert every["00101030"]["Value"] == [70.5]
    assert every["00080008"]["Value"] == ["ORIGINAL", "PRIMARY", "AXIAL"]


def test_pages_and_counts(web: Web) -> None:
    everything = found(web, "/instances", INSTANCE)
    paged: list[str] = []
    url = f"{web.url}/instances?limit=3&count=true"
    while url:
        response = web.client.get(url)
        assert response.headers["x-total-count"] == str(len(everything))
        paged += [one[INSTANCE]["Value"][0] for one in response.json()]
        link = response.headers.get("link", "")
        assert ("Warning" in response.headers) is bool(link)
        url = link.partition(">")[0].lstrip("<")
    assert paged == everything
    assert web.get("/instances?offset=1000").status_code == 204
    response = web.get("/studies?limit=0&count=true")
    assert (response.status_code, response.headers["x-total-count"]) == (204, str(len(found(web, "/studies"))))


@pytest.mark.parametrize(
    ("path", "level", "wanted"),
    [
        ("/studies?StudyInstanceUID=9.1&", "StudyInstanceUID", {"StudyInstanceUID": "9.1"}),
        ("/studies?PatientID=P1&", "StudyInstanceUID", {"PatientID": "P1"}),
        ("/studies?PatientID=nobody&", "StudyInstanceUID", {"PatientID": "nobody"}),
        ("/series?Modality=CT&", "SeriesInstanceUID", {"Modality": "CT"}),
        ("/studies/9.1/series?Modality=SR&", "SeriesInstanceUID", {"StudyInstanceUID": "9.1", "Modality": "SR"}),
        ("/instances?PatientID=P1&", "SOPInstanceUID", {"PatientID": "P1"}),
        ("/studies/9.1/instances?", "SOPInstanceUID", {"StudyInstanceUID": "9.1"}),
    ],
)
def test_counts_with_keys(web: Web, path: str, level: str, wanted: dict[str, str]) -> None:
    """Of all that match, whatever the page; the number is that of the rows."""
    rows = [row for row in ROWS if all(row.get(name) == value for name, value in wanted.items())]
    total = len({row[level] for row in rows})
    for page in ("limit=1", "limit=1&offset=1", "limit=0", "limit=5000"):
        assert web.get(f"{path}count=true&{page}").headers["x-total-count"] == str(total), page
    assert total < len({row[level] for row in ROWS})


def test_pages_of_one_version(tmp_path: Path) -> None:
    settings = archive(tmp_path)
    write_catalog(settings, ROWS)
    with serving_web(settings) as web:
        first = web.get("/instances?limit=4&asOf=now")
        everything = found(web, "/instances", INSTANCE)
        write_catalog(settings, ROWS[:5])  # a later batch, with fewer of them
        got, url = first.json(), first.headers["link"].partition(">")[0].lstrip("<")
        while url:
            page = web.client.get(url)
            got += page.json()
            url = page.headers.get("link", "").partition(">")[0].lstrip("<")
        assert [one[INSTANCE]["Value"][0] for one in got] == everything
        assert len(found(web, "/instances?asOf=now", INSTANCE)) == 5


def test_now_is_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is found, its count and all pages: the Link has the version, and no index is looked for again."""
    settings = archive(tmp_path)
    write_catalog(settings, ROWS)
    asked = []
    make = IndexMaker.make
    monkeypatch.setattr(IndexMaker, "make", lambda self, as_of=None: asked.append(as_of) or make(self, as_of))

    def pages(web: Web) -> set[str]:
        """The versions that the Links name."""
        url, named = f"{web.url}/instances?limit=2&count=true&asOf=now", []
        while url:
            url = web.client.get(url).headers.get("link", "").partition(">")[0].lstrip("<")
            named += parse_qs(urlsplit(url).query).get("asOf", [])
        assert len(named) >= 2
        return set(named)

    with serving_web(settings) as web:
        assert pages(web) == pages(web) == {"0"}
        assert [one for one in asked if one is not None] == [0]
        write_catalog(settings, ROWS[:5])
        assert pages(web) == {"1"}
        assert [one for one in asked if one is not None] == [0, 1]
        shutil.rmtree(settings.catalog_root.removeprefix("file://"))
        write_catalog(settings, ROWS[:6])  # another catalog at that place
        assert pages(web) == {"0"}
    empty = archive(tmp_path / "empty")
    with serving_web(empty) as web:
        told = web.get("/instances?asOf=now")
        assert (told.status_code, told.json()["detail"]) == (
            404, "the catalog has no version as of now: nothing was extracted yet",
        )  # fmt: skip


@pytest.mark.parametrize("anchored", [1000, 2])
def test_pages_stay_together_whatever_arrives_or_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anchored: int
) -> None:
    """Without asOf: what comes before the place of the next page, or goes from there, moves nothing."""
    monkeypatch.setattr(search, "ANCHORED", anchored)
    monkeypatch.setattr(index_module, "REFRESH_WAIT_S", 60.0)
    settings = archive(tmp_path)
    early = [instance(800 + number, StudyInstanceUID="1.1", SeriesInstanceUID=f"1.1.{number}") for number in range(5)]
    gone = ROWS[0]["SOPInstanceUID"]
    write_catalog(settings, ROWS)
    with serving_web(settings) as web:
        everything = found(web, "/instances", INSTANCE)
        got, url, page = [], f"{web.url}/instances?limit=4&offset=1", 0
        while url:
            response = web.client.get(url)
            got += [one[INSTANCE]["Value"][0] for one in response.json()]
            url = response.headers.get("link", "").partition(">")[0].lstrip("<")
            page += 1
            if page == 1:
                write_catalog(settings, [*early, *ROWS])
            elif page == 2:
                write_catalog(settings, [one for one in ROWS if one["SOPInstanceUID"] != gone])
        assert got == everything[1:]
        last = web.get("/instances?limit=3&count=true")
        assert last.headers["warning"].endswith(f'There are {len(ROWS) - 4} additional results that can be requested"')
        assert "offset" in last.headers["link"] or anchored > 3


def test_fuzzy_matching(web: Web) -> None:
    assert found(web, "/studies?fuzzymatching=true&PatientName=Jon%20Doe&AccessionNumber=A_B1") == ["9.1"]
    assert found(web, "/studies?fuzzymatching=false&PatientName=Jon%20Doe") == []


def test_empty_and_multiple_values(web: Web) -> None:
    assert "9.1" not in found(web, "/studies?emptyvaluematching=true&AccessionNumber=%22%22")
    assert len(found(web, "/studies?emptyvaluematching=true&AccessionNumber=%22%22")) > 0
    both = "/instances?multiplevaluematching=true&ImageType=PRIMARY%5CAXIAL"
    assert len(found(web, both, INSTANCE)) == len(found(web, "/instances?ImageType=AXIAL", INSTANCE)) > 0
    assert found(web, both + "%5CMISSING", INSTANCE) == []


def test_xml(web: Web) -> None:
    response = web.get("/studies?StudyInstanceUID=9.1", headers={"accept": XML})
    kind, _, boundary = response.headers["content-type"].partition("; boundary=")
    assert kind == XML
    head, _, rest = response.content.partition(b"\r\n\r\n")
    assert head == f"\r\n--{boundary}\r\nContent-Type: application/dicom+xml".encode()
    document = ElementTree.fromstring(rest.partition(f"\r\n--{boundary}--".encode())[0])
    space = "{http://dicom.nema.org/PS3.19/models/NativeDICOM}"
    named = {one.get("keyword"): one for one in document}
    assert named["PatientID"].findtext(f"{space}Value") == "P1"
    assert named["PatientName"].findtext(f"{space}PersonName/{space}Alphabetic/{space}FamilyName") == "Doe"
    assert [one.text for one in named["ModalitiesInStudy"]] == ["CT", "SR"]


def test_what_cannot_be_given_is_406(web: Web) -> None:
    response = web.get("/studies", headers={"accept": "text/html, application/dicom+json;q=0"})
    assert response.status_code == 406
    assert "application/dicom+json" in response.json()["detail"]


@pytest.mark.parametrize("path", ["/studies/", "/studies/9.1/series/", "/nothing", "/nothing/"])
def test_what_is_no_resource(web: Web, path: str) -> None:
    answer = web.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    slash = ": a path has no slash at its end" if path.endswith("/") else ""
    assert answer.json()["detail"] == f"there is no such resource{slash}"


def test_an_earlier_catalog(web: Web) -> None:
    assert found(web, "/studies?asOf=0") == found(web, "/studies")
    assert web.get("/studies?asOf=7").status_code == 404
    assert found(web, "/studies?asOf=2999-01-01T00:00:00Z&AccessionNumber=A_B1") == ["9.1"]


def test_health_and_description(web: Web) -> None:
    root = web.url.removesuffix("/dicom-web")
    assert web.client.get(f"{root}/healthz").json() == {"status": "ok"}
    unready = web.client.get(f"{root}/readyz")
    assert (unready.status_code, unready.json()["not_ready"]) == (503, ["supervisor"])
    web.get("/studies?PatientID=NEVER-SHOWN")
    metrics = web.client.get(f"{root}/metrics").text
    assert 'sphere_http_requests_total{method="GET",route="/dicom-web/studies",status="204"}' in metrics
    assert "NEVER-SHOWN" not in metrics
    document = web.client.get(f"{root}/openapi.json").json()
    assert {"/dicom-web/studies", "/dicom-web/studies/{study}/series", "/healthz", "/openapi.json"} <= set(
        document["paths"]
    )


def test_capabilities(web: Web) -> None:
    document = ElementTree.fromstring(web.client.options(web.url).content)
    paths = {one.get("path") for one in document.iter("{http://wadl.dev.java.net/2009/02}resource")}
    assert {"dicom-web/studies", "dicom-web/studies/{study}/metadata", "wado"} <= paths
    assert web.get("/capabilities", headers={"accept": "application/json"}).json()["openapi"] == "3.1.0"


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("*/*", "a/b"),
        ("a/*;q=0.1, c/d", "c/d"),
        ("c/d;q=0.5, a/b;q=0.6", "a/b"),
        ('multipart/related; type="c/d"; transfer-syntax=*', "c/d"),
        ("multipart/related", "a/b"),
        ("*/*, a/b;q=0", "c/d"),
        ("a/*;q=0, */*", "c/d"),
        ("a/b;q=0.1, */*;q=0.9", "c/d"),
        ("a/*;q=0.9, a/b;q=0.1, */*;q=0.5", "c/d"),
        ("*/*;q=0.1, a/*;q=0.3, c/d;q=0.2", "a/b"),
        ("*/*, c/d", "a/b"),
        ("a/b;q=0.5, a/b;level=1, c/d;q=0.7", "a/b"),
        ("a/b;q=0, multipart/related; type=a/b, c/d;q=0.7", "a/b"),
        ("multipart/related; type=a/b; q=0.2, c/*;q=0.3", "c/d"),
    ],
)
def test_quality_values(accept: str, chosen: str) -> None:
    """The most specific range of each says what it weighs (RFC 9110 12.5.1)."""
    assert choose(parse(accept), ("a/b", "c/d")) == chosen


@pytest.mark.parametrize("accept", ["a/b;q=0, c/*;q=0, */*", "*/*;q=0", "*/*;q=0.000, a/b;q=0", "x/y"])
def test_nothing_is_wanted(accept: str) -> None:
    with pytest.raises(WebError, match="there are a/b, c/d") as raised:
        choose(parse(accept), ("a/b", "c/d"))
    assert raised.value.http == 406


@pytest.mark.parametrize("accept", ["no type", "a/b;q=x", "a/b;q=5", '"', "a/b;=1", "x", ",".join(["a/b"] * 51)])
def test_an_accept_header_that_cannot_be_read(accept: str) -> None:
    with pytest.raises(WebError, match="media type"):
        parse(accept)


def test_keys_of_a_search_are_those_of_the_query() -> None:
    pairs: list[Any] = [("ReferencedImageSequence.ReferencedSOPInstanceUID", "1.2"), ("limit", "5")]
    search = parse_search(pairs, "IMAGE", {"StudyInstanceUID": "9.1"})
    tests = {key.keyword: key for key in search.query.keys if key.nodes()}
    assert set(tests) == {"ReferencedImageSequence", "StudyInstanceUID"}
    assert search.limit == 5


@pytest.mark.parametrize("level", ["STUDY", "SERIES", "IMAGE"])
def test_every_attribute_is_a_key_by_keyword_and_by_tag(level: Level) -> None:
    """And asks what C-FIND asks by it."""
    asked = 0
    for keyword, column in BY_KEYWORD.items():
        if LEVELS.index(level_of(keyword) or "IMAGE") > LEVELS.index(level):
            continue
        value = {"DA": "20240101-", "TM": "10-", "DT": "2024", "UI": "1.2", "PN": "Doe*"}.get(column.vr, "7")
        by_keyword, by_tag = (parse_search([(name, value)], level, {}) for name in (keyword, f"{column.tag:08X}"))
        assert by_keyword == by_tag, keyword
        nodes = Query.build(level, {keyword: value}).predicate()
        assert nodes and by_keyword.query.predicate() == nodes, keyword
        asked += 1
    assert asked > {"STUDY": 20, "SERIES": 50, "IMAGE": 700}[level]


COMPUTED = frozenset(
    [
        "RetrieveURL",
        "InstanceAvailability",
        "ModalitiesInStudy",
        "SOPClassesInStudy",
        "NumberOfPatientRelatedStudies",
        "NumberOfPatientRelatedSeries",
        "NumberOfPatientRelatedInstances",
        "NumberOfStudyRelatedSeries",
        "NumberOfStudyRelatedInstances",
        "NumberOfSeriesRelatedInstances",
    ]
)


def test_includefield_all_is_every_column(web: Web) -> None:
    """At instances: what has a column, empty or not, what is computed (PS3.4 C.3.4), and nothing else."""
    for one in web.get("/instances?includefield=all").json():
        assert {keyword_for_tag(tag) for tag in one} == BY_KEYWORD.keys() | COMPUTED
    row = ROWS[0]
    [one] = web.get(f"/instances?SOPInstanceUID={row['SOPInstanceUID']}&includefield=all").json()
    for keyword, value in row.items():
        if keyword in BY_KEYWORD and value is not None and BY_KEYWORD[keyword].vr in ("UI", "CS", "LO", "IS"):
            assert one[f"{BY_KEYWORD[keyword].tag:08X}"]["Value"] == (value if isinstance(value, list) else [value])


def test_includefield_all_is_of_every_level(web: Web) -> None:
    study, *_ = web.get("/studies?StudyInstanceUID=9.1&includefield=all").json()
    assert study["00081030"]["Value"] == ["CHEST 100%"] and "00080060" not in study
    series, *_ = web.get("/studies/9.1/series?includefield=all").json()
    assert {"00080060", "0020000E", "00201209"} <= series.keys()
    [one, *_] = web.get("/series?includefield=all&StudyInstanceUID=9.1").json()
    assert {"00080060", "00081030", "00100020"} <= one.keys(), "and of those above it"


@pytest.mark.parametrize(
    "path",
    [
        "/studies",
        "/series",
        "/instances",
        "/studies/9.1/series",
        "/studies/9.1/instances",
        f"/studies/9.1/series/{ROWS[0]['SeriesInstanceUID']}/instances",
    ],
)
def test_xml_says_what_json_says(web: Web, path: str) -> None:
    objects = web.get(path).json()
    response = web.get(path, headers={"accept": XML})
    parts = response.content.split(f"\r\n--{response.headers['content-type'].partition('boundary=')[2]}".encode())
    documents = [ElementTree.fromstring(part.partition(b"\r\n\r\n")[2]) for part in parts[1:-1]]
    told = [{one.get("tag"): [value.text for value in one if value.tag.endswith("}Value")] for one in document}
            for document in documents]  # fmt: skip
    for one, other in zip(objects, told, strict=True):
        assert one.keys() == other.keys()
        plain = {tag: [str(v) for v in e.get("Value", [])] for tag, e in one.items() if e["vr"] not in ("PN", "SQ")}
        assert plain == {tag: other[tag] for tag in plain}
