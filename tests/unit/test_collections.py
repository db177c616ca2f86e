"""A part of the archive: whoever may see some collections or cohorts is answered as by an archive of these alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any, get_args

import orjson
import pyarrow as pa
import pytest
from click.testing import CliRunner
from deltalake import DeltaTable, QueryBuilder
from starlette.testclient import TestClient

from sphere.catalog.asof import snapshots_as_of
from sphere.catalog.cohorts import Cohorts
from sphere.catalog.grant import Grant
from sphere.catalog.queries import Queries, open_queries
from sphere.catalog.query import Query
from sphere.catalog.schema import Level
from sphere.catalog.service import QueryService
from sphere.catalog.tables import CatalogTables
from sphere.cli import main
from sphere.conf.errors import CatalogError, SettingsError
from sphere.conf.settings import Settings
from sphere.ingest.storage import open_storage
from sphere.scp.web.app import make_app
from sphere.scp.web.server import services_of
from sphere.scp.web.tokens import Tokens
from tests.support.catalog import Row, table_positions, write_catalog
from tests.support.extracted import extract
from tests.support.landing import archive, changed, land, new_member, slices, table_rows

pytestmark = pytest.mark.unit

COLLECTIONS = ("A", "B", "C")
XML = {"accept": 'multipart/related; type="application/dicom+xml"'}
ASKED: dict[Level, tuple[str, ...]] = {
    "PATIENT": ("PatientName", "PatientComments", "NumberOfPatientRelatedStudies", "NumberOfPatientRelatedSeries",
                "NumberOfPatientRelatedInstances"),
    "STUDY": ("PatientName", "StudyDate", "ModalitiesInStudy", "SOPClassesInStudy", "NumberOfStudyRelatedSeries",
              "NumberOfStudyRelatedInstances", "NumberOfPatientRelatedInstances", "PatientComments", "PixelSpacing"),
    "SERIES": ("Modality", "SeriesNumber", "NumberOfSeriesRelatedInstances", "PatientID", "InterpretationText"),
    "IMAGE": ("InstanceNumber", "ImageType", "PatientID", "ModalitiesInStudy", "NumberOfStudyRelatedInstances"),
}  # fmt: skip
MATCHES: dict[Level, tuple[dict[str, Any], ...]] = {
    "PATIENT": (
        {},
        {"NumberOfPatientRelatedStudies": 1},
        {"InterpretationText": "*other*"},
        {"PatientID": "P1", "StudyDate": "20250101"},
        {"Modality": "MR", "InstanceNumber": 2},
    ),
    "STUDY": (
        {},
        {"ModalitiesInStudy": "MR"},
        {"NumberOfStudyRelatedInstances": 1},
        {"PatientID": "P1"},
        {"Modality": "MR"},
        {"Modality": "CT", "InstanceNumber": 1},
    ),
    "SERIES": (
        {},
        {"Modality": "CT"},
        {"StudyInstanceUID": "9.1"},
        {"InterpretationText": "*other*"},
        {"InstanceNumber": 2},
    ),
    "IMAGE": ({}, {"InstanceNumber": 1}, {"StudyInstanceUID": "9.1"}, {"ModalitiesInStudy": "MR"}),
}


def pool(chance: random.Random) -> list[bytes]:
    """Instances of a few studies and patients, some of which come again with other bytes, or move."""
    made = []
    for study in range(3):
        patient = chance.choice(["P1", "P2", ""])
        for series in range(2):
            for data in slices(2, seed=10 * study + series, study=study):
                attributes: dict[str, Any] = {
                    "StudyInstanceUID": f"9.{study}",
                    "SeriesInstanceUID": f"9.{study}.{series}",
                    "PatientID": patient,
                    "Modality": chance.choice(["CT", "MR"]),
                    "StudyDate": chance.choice(["20240101", "20250101", ""]),
                    "PatientName": chance.choice(["Doe^A", "Doe^B"]),
                }
                made.append(changed(data, **attributes))
    again = [changed(data, InterpretationText="another") for data in chance.sample(made, 3)]
    moved = [changed(chance.choice(made), StudyInstanceUID="9.1", SeriesInstanceUID="9.1.9")]
    chance.shuffle(made)
    return [*made, *again, *moved]


def tagged(chance: random.Random, datas: list[bytes], start: int) -> Iterator[Any]:
    for number, data in enumerate(datas):
        names = tuple(chance.sample(COLLECTIONS, chance.choice([0, 1, 1, 2])))
        yield replace(new_member(data, second=start + number), collections=names)


def grants() -> list[Grant]:
    some = frozenset
    return [
        Grant(collections=some("A")),
        Grant(collections=some("BC")),
        Grant(studies=some(["9.1", "9.77"]), series=some(["9.0.1"])),
        Grant(collections=some("C"), studies=some(["9.2"]), patients=some(["P1"])),
        Grant(),
    ]


def is_granted(row: Row, grant: Grant) -> bool:
    """Written plainly."""
    tags = set(row["collections"] or ())
    named = row["StudyInstanceUID"] in grant.studies or row["SeriesInstanceUID"] in grant.series
    return bool(tags & grant.collections) or named or row["PatientID"] in grant.patients


def rerooted(settings: Settings, folder: Path, name: str) -> Settings:
    """The same bytes with tables of their own."""
    where = folder / name
    sections = settings.model_dump(mode="json")
    sections["archive"]["state_dir"] = str(where / "state")
    sections["catalog"]["root"] = (where / "catalog").as_uri()
    return Settings.model_validate(sections)


@pytest.fixture(scope="module", params=[(1, "keep-first"), (2, "replace")], ids=["keep-first", "replace"])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Settings]:
    """An archive, of which a third is catalogued, a third was catalogued after the first was asked for, and a third are
    recent arrivals; and the same with everything catalogued."""
    seed, policy = request.param
    chance, folder = random.Random(seed), tmp_path_factory.mktemp("collections")
    settings = archive(folder / "all", ingest={"on_conflict": policy}, archive={"ae_title": "TESTED"})
    datas = pool(chance)
    cut = len(datas) // 3
    for start in (0, cut, 2 * cut):
        some = datas[start : start + cut] if start < 2 * cut else datas[start:]
        land(settings, tagged(chance, some, start))
        if start < 2 * cut:
            extract(settings)
        with QueryService(settings) as service:
            for grant in grants()[:4:3]:  # these indexes are gone on from, the others made anew
                service.restricted(grant).count(Query.build("STUDY"))
    everything = rerooted(settings, folder, "everything")
    extract(everything)
    return settings, everything


def part_of(everything: Settings, folder: Path, grant: Grant) -> Settings:
    """An archive that catalogues nothing but what is granted."""
    part = rerooted(everything, folder, "part")
    rows = [row for row in table_rows(everything, "instances") if is_granted(row, grant)]
    write_catalog(part, rows, bundles=table_positions(everything))
    return part


def answers(queries: Queries, rows: list[Row]) -> dict[str, Any]:
    """Answers of every kind."""
    found: dict[str, Any] = {}
    for level in get_args(Level):
        for match in MATCHES[level]:
            query = Query.build(level, match, return_keys=ASKED[level])
            found[f"{level} {match}"] = [one.identifier().to_json_dict() for one in queries.find(query)]
            found[f"{level} {match} count"] = queries.count(query)
    found["places"] = list(queries.lookup_instances())
    for row in rows[::4]:
        uid = row["SOPInstanceUID"]
        found[uid] = list(queries.lookup_instances(sop=[uid]))
        found[f"{uid} header"] = list(queries.lookup_headers(study=row["StudyInstanceUID"], sop=uid))
    return found


@pytest.mark.parametrize("number", range(len(grants())))
def test_answers_are_those_of_an_archive_of_what_is_granted(
    mixed: tuple[Settings, Settings], tmp_path: Path, number: int
) -> None:
    settings, everything = mixed
    grant = grants()[number]
    rows = table_rows(everything, "instances")
    part = part_of(everything, tmp_path, grant)
    assert 0 <= sum(is_granted(row, grant) for row in rows) < len(rows)
    with QueryService(settings) as service, QueryService(part) as alone:
        seen = answers(service.restricted(grant), rows)
        assert seen == answers(alone, rows)
        assert service.count(Query.build("IMAGE")) == len(rows)  # whoever may see everything still does
    if number in (0, 2):
        files = settings.catalog.model_copy(update={"mode": "files", "scan_workers": 0})
        with open_queries(settings.model_copy(update={"catalog": files})) as queries:
            assert answers(queries.restricted(grant), rows) == seen


def test_journals_do_not_say_who_the_patients_are(mixed: tuple[Settings, Settings]) -> None:
    files = mixed[0].catalog.model_copy(update={"mode": "files", "scan_workers": 0})
    settings = mixed[0].model_copy(update={"catalog": files})
    with open_queries(settings) as queries, pytest.raises(CatalogError, match="patients"):
        queries.restricted(Grant(patients=frozenset(["P1"])))


def doors(rows: list[Row]) -> Iterator[str]:
    """Paths of everything that is offered, of what there is and of what there is not."""
    yield from ("/studies?count=true&includefield=all", "/series?count=true&limit=3", "/instances?count=true&limit=2")
    yield from (
        "/studies?ModalitiesInStudy=MR&fuzzymatching=true&PatientName=doe",
        "/studies?NumberOfStudyRelatedSeries=1",
    )
    for study in sorted({row["StudyInstanceUID"] for row in rows} | {"9.77"}):
        path = f"/studies/{study}"
        yield from (
            path,
            f"{path}/metadata",
            f"{path}/series",
            f"{path}/instances",
            f"{path}/thumbnail",
            f"{path}/rendered",
            f"{path}?accept=application/zip",
            f"{path}?accept=application/zip&dicomdir=true",
        )
    for row in rows[::2]:
        series = f"/studies/{row['StudyInstanceUID']}/series/{row['SeriesInstanceUID']}"
        path = f"{series}/instances/{row['SOPInstanceUID']}"
        yield from (f"{series}/instances", f"{series}/metadata")
        yield from (path, f"{path}/metadata", f"{path}/frames/1", f"{path}/rendered", f"{path}/thumbnail")
        yield f"{path}/bulkdata?offset={row['pixel_offset']}&length=8"
        uids = {"studyUID": "StudyInstanceUID", "seriesUID": "SeriesInstanceUID", "objectUID": "SOPInstanceUID"}
        yield "/../wado?requestType=WADO&" + "&".join(f"{name}={row[key]}" for name, key in uids.items())


def in_xml(path: str) -> bool:
    """Whether it is answered in XML as well."""
    return "metadata" in path or path.partition("?")[0].endswith(("/studies", "/series", "/instances"))


def told(client: TestClient, path: str, headers: dict[str, str]) -> Any:
    """What a response says, but for its boundary."""
    url = path.removeprefix("/..") if path.startswith("/..") else f"/dicom-web{path}"
    response = client.get(url, headers=headers)
    kind = response.headers.get("content-type", "")
    boundary = kind.partition("boundary=")[2].encode() or b"no boundary"
    names = ("etag", "warning", "link", "x-total-count", "content-length")
    more = {name: response.headers.get(name) for name in names}
    body = response.content.replace(boundary, b"BOUNDARY") if b"no " not in boundary else response.content
    return response.status_code, kind.partition("boundary=")[0], more, body


@pytest.mark.parametrize("mixed", [(2, "replace")], ids=["replace"], indirect=True)
def test_every_door_shows_the_part_alone(mixed: tuple[Settings, Settings], tmp_path: Path) -> None:
    settings, everything = mixed
    rows = table_rows(everything, "instances")
    storage = open_storage(settings.storage.root)
    Cohorts(storage).create("trial", "series", ["9.0.1"], "test")
    secret = Tokens(storage).create("anna", "researcher", None, collections=["A"], cohorts=["trial", "gone"])
    grant = Grant(collections=frozenset("A"), series=frozenset(["9.0.1"]))
    part = part_of(everything, tmp_path, grant)
    shown = {"authorization": f"Bearer {secret}"}
    statuses = set()
    with services_of(settings) as services, services_of(part) as alone:
        far = TestClient(make_app(settings, services), client=("10.0.0.5", 1), base_url="http://localhost")
        near = TestClient(make_app(part, alone), client=("127.0.0.1", 1), base_url="http://localhost")
        for path, form in chain(product(doors(rows), [{}]), product(filter(in_xml, doors(rows)), [XML])):
            near.get("/dicom-web" + path)  # what others asked for before is not shown to who may not see it
            seen, wanted = told(far, path, {**shown, **form}), told(near, path, form)
            assert seen == wanted, (path, form)
            statuses.add((seen[0], path.count("/")))
            assert not form or seen[0] != 200 or XML["accept"] in seen[1], path
        assert {status for status, _ in statuses} == {200, 204, 404}
        assert not any(status == 403 for status, _ in statuses)
        tag = next(told(near, path, {})[2]["etag"] for path in doors(rows) if told(near, path, {})[2]["etag"])
        hidden = next(row for row in rows if not is_granted(row, grant))
        url = f"/dicom-web/studies/{hidden['StudyInstanceUID']}/series/{hidden['SeriesInstanceUID']}/metadata"
        assert far.get(url, headers={**shown, "if-none-match": f"{tag}, *"}).status_code in (404, 304)
        assert far.get("/dicom-web/capabilities", headers=shown).status_code == 200


OFFERED_IN_PART = frozenset(
    ("/dicom-web", "/dicom-web/", "/dicom-web/capabilities", "/openapi.json", "/healthz", "/readyz")
)
"""Paths outside DICOMweb's searches and retrievals that a researcher may ask."""


def test_what_a_researcher_is_not_offered(tmp_path: Path) -> None:
    """Of all that the service describes: methods that change something, and what tells of the whole archive."""
    settings = archive(tmp_path, web={"delete": True})
    [data] = slices(1)
    land(settings, [new_member(data)])
    secret = Tokens(open_storage(settings.storage.root)).create("anna", "researcher", None, collections=["A"])
    shown = {"authorization": f"Bearer {secret}"}
    one = new_member(data)
    uids = {"study": one.StudyInstanceUID, "series": one.SeriesInstanceUID, "instance": one.SOPInstanceUID,
            "frames": "1", "frame": "1", "annotation": "0" * 32}  # fmt: skip
    refused: dict[str, int] = {}
    with services_of(settings) as services:
        far = TestClient(make_app(settings, services), client=("10.0.0.5", 1), base_url="http://localhost")
        for path, methods in far.get("/openapi.json").json()["paths"].items():
            for method in methods:
                response = far.request(method.upper(), path.format_map(uids), headers=shown)
                refused[f"{method.upper()} {path}"] = response.status_code
        assert far.get(f"/dicom-web/studies?StudyInstanceUID={one.StudyInstanceUID}").status_code == 401
        assert list(services.finder.lookup_instances(study=[one.StudyInstanceUID])), "nothing was deleted"
    assert len(refused) > 40
    for name, status in refused.items():
        method, path = name.split(" ")
        if method not in ("GET", "OPTIONS") or path.startswith(("/status", "/metrics")):
            assert status == 403, name
        elif path.startswith(("/dicom-web/", "/wado", "/annotations")) and path not in OFFERED_IN_PART:
            assert status in (204, 400, 403, 404), name  # nothing is granted of what there is
        else:
            assert path in OFFERED_IN_PART, name


@pytest.mark.parametrize("mixed", [(2, "replace")], ids=["replace"], indirect=True)
def test_earlier_versions_show_the_part_alone(mixed: tuple[Settings, Settings], tmp_path: Path) -> None:
    """As `asOf` names them: what an archive says that catalogued nothing but what was granted of that version."""
    settings, everything = mixed
    storage, grant = open_storage(settings.storage.root), Grant(collections=frozenset("C"), series=frozenset(["9.0.1"]))
    Cohorts(storage).create("earlier", "series", ["9.0.1"], "test")
    secret = Tokens(storage).create("ben", "researcher", None, collections=["C"], cohorts=["earlier"])
    tables = CatalogTables(settings)
    versions, shown = sorted(tables.commits("bundles")), {"authorization": f"Bearer {secret}"}
    assert len(versions) > 1
    with services_of(settings) as services:
        far = TestClient(make_app(settings, services), client=("10.0.0.5", 1), base_url="http://localhost")
        for as_of in (*versions, "now"):
            version = versions[-1] if as_of == "now" else int(as_of)
            snapshot = snapshots_as_of(tables, ["instances"], version)["instances"]
            assert snapshot is not None
            table = DeltaTable(f"{settings.catalog_root}/instances", version=snapshot.version)
            rows = pa.table(QueryBuilder().register("rows", table).execute("SELECT * FROM rows")).to_pylist()
            granted = [row for row in rows if is_granted(row, grant)]
            assert 0 < len(granted) < len(rows)
            part = rerooted(settings, tmp_path, str(as_of))
            write_catalog(part, granted, bundles=table_positions(everything))
            with services_of(part) as alone:
                near = TestClient(make_app(part, alone), client=("127.0.0.1", 1), base_url="http://localhost")
                for path in ("/studies", "/series", "/instances", "/studies/9.0/series", "/instances?Modality=CT"):
                    url = f"{path}{'&' if '?' in path else '?'}limit=5000&count=true&includefield=all"
                    for form in ({}, XML) if as_of != "now" else ({},):  # of which an index is made for each request
                        seen, wanted = told(far, f"{url}&asOf={as_of}", {**shown, **form}), told(near, url, form)
                        assert seen == wanted, (url, as_of)
                        assert seen[0] == 200 or path == "/studies/9.0/series", url


def test_cohorts_are_kept_by_name(tmp_path: Path) -> None:
    storage = open_storage(f"file:{tmp_path}/root")
    now = [0.0]
    cohorts = Cohorts(storage, clock=lambda: now[0])
    assert cohorts.grant(["A"], ["none"]) == Grant(collections=frozenset("A"))
    made = cohorts.create("lungs", "study", ["1.2", " 1.3 ", "1.2", ""], "a list")
    assert made.members == ("1.2", "1.3")
    now[0] = 3
    assert cohorts.grant([], ["lungs"]) == Grant(studies=frozenset(["1.2", "1.3"]))
    assert [one.name for one in cohorts.all()] == ["lungs"]
    assert orjson.loads(storage.read("access/cohorts/lungs.json"))["origin"] == "a list"
    for name, kind, members, text in (
        ("../x", "study", ["1"], "cannot name a cohort"),
        ("x", "study", ["a/b"], "is not a UID"),
        ("x", "patient", [" "], "nothing in the list"),
    ):
        with pytest.raises(SettingsError, match=text):
            cohorts.create(name, kind, members, "")  # type: ignore[arg-type]
    cohorts.delete("lungs")
    with pytest.raises(SettingsError, match="no cohort"):
        cohorts.delete("lungs")


def test_a_grant_has_one_name_of_its_own() -> None:
    assert len({grant.digest for grant in grants()}) == len(grants())
    one, other = Grant(studies=frozenset(["1.2"])), Grant(series=frozenset(["1.2"]))
    assert one.digest != other.digest and one.digest == Grant(studies=frozenset(["1.2"])).digest


def test_the_commands(tmp_path: Path) -> None:
    config = tmp_path / "sphere.toml"
    config.write_text('[storage]\nroot = "file:storage"\n')

    def call(*arguments: str, text: str = "") -> Any:
        return CliRunner().invoke(main, ["--config", str(config), *arguments], input=text)

    made = call("cohort", "create", "lungs", "-", text="StudyInstanceUID\n1.2\n1.3\n")
    assert (made.exit_code, made.output) == (0, "lungs: 2 of study\n")
    assert "lungs  2 of study" in call("cohort", "list").output
    token = ("token", "create", "--name", "anna", "--role")
    assert call(*token, "researcher", "--cohort", "lungs", "--collection", "A").exit_code == 0
    assert "sees A, sees lungs" in call("token", "list").output
    assert "no cohort" in call(*token, "researcher", "--cohort", "none").output
    assert "needs a collection" in call(*token, "researcher").output
    assert "needs a collection" in call(*token, "reader", "--collection", "A").output
    assert call("cohort", "delete", "lungs").exit_code == 0
