"""What schemathesis makes of /openapi.json: every operation is asked as it is described, and answers so."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from sphere.catalog.cohorts import Cohorts
from sphere.ingest.header import identify
from sphere.ingest.storage import open_storage
from sphere.scp.web.tokens import Tokens
from tests.support.examples import LONG, examples
from tests.support.extracted import extract
from tests.support.landing import archive, changed, land, new_member
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

FILE = Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm"
HIDDEN = "UNGRANTED-41"
PROBLEM = "application/problem+json"
EXAMPLES = 8  # of each operation, of each of the two ways and with each kind of UIDs, beside the plain one
ANNOTATION = "0" * 32
BURNED_IN = ("annotation", "query")  # of /rendered: no annotation, but what of the patient and the technique it shows
READY = "/readyz"  # 503 with a body of its own while no `sphere serve` runs, as it is described
CHECKS = [status_code_conformance, content_type_conformance]


@schemathesis.serializer("multipart/related")
def related(context: Any, value: Any) -> bytes:
    """One part of the type that the request has."""
    kind = context.case.media_type.split('"')[1] if '"' in context.case.media_type else "application/json"
    return f"--B\r\nContent-Type: {kind}\r\n\r\n".encode() + json.dumps(value).encode() + b"\r\n--B--\r\n"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    settings = archive(tmp_path_factory.mktemp("web"))
    land(settings, [new_member(FILE.read_bytes())])
    extract(settings)
    with serving_web(settings) as running:
        yield running


def the_other() -> bytes:
    """An instance of which nothing is to be told."""
    said = dict.fromkeys(("PatientID", "PatientName", "StudyDescription", "AccessionNumber", "StationName"), HIDDEN)
    uids = {"StudyInstanceUID": "2.25.41", "SeriesInstanceUID": "2.25.41.1", "SOPInstanceUID": "2.25.41.1.1"}
    return changed(FILE.read_bytes(), **said, **uids)


def the_known(data: bytes) -> dict[str, str]:
    """Parameters that name an instance, and an annotation of which each server knows what stands for it."""
    one = identify(data, size=len(data))
    return {"study": one.StudyInstanceUID, "series": one.SeriesInstanceUID, "instance": one.SOPInstanceUID,
            "frames": "1", "studyUID": one.StudyInstanceUID, "seriesUID": one.SeriesInstanceUID,
            "objectUID": one.SOPInstanceUID, "requestType": "WADO", "uid": one.StudyInstanceUID,
            "annotation": ANNOTATION}  # fmt: skip


KNOWN = {"granted": the_known(FILE.read_bytes()), "other": the_known(the_other()), "any": {}}
"""By whose they are, what the cases name."""


class Drawn:
    """Every operation, and cases of it, which are drawn once and asked of every server and by every role: drawing one
    takes longer than asking it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._cases: dict[tuple[str, GenerationMode], list[tuple[Any, list[Any]]]] = {}

    def cases(self, whose: str, mode: GenerationMode) -> list[tuple[Any, list[Any]]]:
        """EXAMPLES of each operation, some parameters with the values of KNOWN alone, the first with nothing else; none
        where there can be none, as all data are as they should be where nothing is described."""
        if (whose, mode) not in self._cases:
            several = self._cases[whose, mode] = []
            for one in self._operations(KNOWN[whose]):
                first = plain(one, KNOWN[whose]) if mode == GenerationMode.POSITIVE else []
                several.append((one, first + drawn(one, mode)))
        return self._cases[whose, mode]

    def _operations(self, known: dict[str, str]) -> Iterator[Any]:
        document = copy.deepcopy(self._document)
        for operation in (one for methods in document["paths"].values() for one in methods.values()):
            for parameter in operation["parameters"]:
                if parameter["name"] in known and (parameter["name"], parameter["in"]) != BURNED_IN:
                    parameter |= {"schema": {"const": known[parameter["name"]]}, "required": True}
        schema = schemathesis.openapi.from_dict(document, config=SchemathesisConfig.from_dict({}))
        schema.config.update(base_url="http://127.0.0.1")
        for result in schema.get_all_operations():
            yield result.ok()


def plain(operation: Any, known: dict[str, str]) -> list[Any]:
    """The case with nothing but what names something, where that is enough to ask it."""
    named = {(one.name, one.definition["in"]) for one in operation.iter_parameters()} - {BURNED_IN}
    if operation.method != "get" or any(where == "path" and name not in known for name, where in named):
        return []
    inside = {place: {name: known[name] for name, where in named if where == place and name in known}
              for place in ("path", "query")}  # fmt: skip
    return [operation.Case(path_parameters=inside["path"], query=inside["query"])]


def drawn(operation: Any, mode: GenerationMode) -> list[Any]:
    """The cases; always the same, but for `make test-long`."""
    found: list[Any] = []

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=examples(EXAMPLES), derandomize=not LONG, database=None, deadline=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    def draw(case: Any) -> None:
        if on_the_wire(case.query):
            found.append(case)

    with suppress(Unsatisfiable):
        draw()
    return found


def on_the_wire(query: dict[str, Any] | None) -> bool:
    """Whether a URL has each of the parameters: one of several values of which there are none it has not, so that what
    is wrong with it is not asked."""
    return all(value not in ([], {}) for value in (query or {}).values())


def test_no_values_are_not_in_a_url() -> None:
    """A parameter that is not described, without a value: what is left is asked as it should be."""
    query: dict[str, Any] = {"PatientID": "", "": []}
    url = requests.Request("GET", "http://127.0.0.1/studies/8/series", params=query).prepare().url
    assert url == "http://127.0.0.1/studies/8/series?PatientID="
    assert not on_the_wire(query)
    assert on_the_wire({"PatientID": "", "limit": ["", 0], "": ""})
    assert on_the_wire(None)


@pytest.fixture(scope="module")
def drawing(web: Web) -> Drawn:
    return Drawn(web.client.get(f"{root_of(web)}/openapi.json").json())


def root_of(web: Web) -> str:
    return web.url.removesuffix("/dicom-web")


def statuses_of(
    web: Web,
    cases: Iterable[Any],
    token: str = "",
    look: Callable[[Any], None] = lambda response: None,
    annotation: str = "",
) -> list[int]:
    """What the cases of an operation are answered, to who shows the token; fails where it is not what is described, an
    error of the server, or no problem. `look` is called with each response, `annotation` is the one that is known."""
    found = []
    shown = {"Authorization": f"Bearer {token}"} if token else {}
    with requests.Session() as session:
        for case in cases:
            in_parts = str(case.media_type).startswith("multipart/related")
            headers = {"Content-Type": f"{case.media_type}; boundary=B"} if in_parts else {}
            with known(case.path_parameters, annotation):
                response = case.call(base_url=root_of(web), session=session, headers=headers | shown, timeout=30)
            look(response)
            found.append(response.status_code)
            checks = CHECKS if case.path == READY else [*CHECKS, not_a_server_error]
            case.validate_response(response, checks=checks)
            if PROBLEM in response.headers.get("content-type", []):
                assert response.json()["status"] == response.status_code
                assert response.json()["detail"]
            elif case.path != READY:
                assert response.status_code < 400 or response.status_code == 409  # STOW-RS tells of each instance
    return found


@contextmanager
def known(parameters: dict[str, Any], annotation: str) -> Iterator[None]:
    """With an annotation that is there, where its place is asked for."""
    asked = parameters.get("annotation")
    if annotation and asked == ANNOTATION:
        parameters["annotation"] = annotation
    yield
    if asked is not None:
        parameters["annotation"] = asked


@pytest.mark.parametrize("there", [True, False])
def test_every_operation_answers_as_it_is_described(web: Web, drawing: Drawn, there: bool) -> None:
    """With UIDs of what is there, and with any."""
    several = drawing.cases("granted" if there else "any", GenerationMode.POSITIVE)
    asked = {operation.label: statuses_of(web, cases) for operation, cases in several}
    assert len(asked) > 40 and all(asked.values())
    failed = {name for name, statuses in asked.items() if min(statuses) >= 400 and name.startswith("GET /dicom-web")}
    if there:
        assert all(name.endswith("/bulkdata") for name in failed), failed  # needs the place of a value


@dataclass
class Parts:
    """An archive of which a researcher may see one of two patients; each has an annotation."""

    web: Web
    granted: dict[str, str]
    other: dict[str, str]
    tokens: dict[str, str]

    def secrets(self) -> list[bytes]:
        """What no answer to the researcher may have."""
        uids = [self.other[name] for name in ("study", "series", "instance", "annotation")]
        return [HIDDEN.encode(), *(uid.encode() for uid in uids)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    settings = archive(tmp_path_factory.mktemp("parts"))
    data, hidden = FILE.read_bytes(), the_other()
    land(settings, [new_member(data), new_member(hidden)])
    extract(settings)
    storage = open_storage(settings.storage.root)
    one, other = the_known(data), the_known(hidden)
    Cohorts(storage).create("mine", "study", [one["study"]], "test")
    tokens = Tokens(storage)
    made = {"reader": tokens.create("r", "reader", None)}
    made["researcher"] = tokens.create("s", "researcher", None, cohorts=["mine"])
    with serving_web(settings) as running:
        for known in (one, other):
            root = running.url.replace("/dicom-web", "/annotations")
            named = HIDDEN if known is other else "mine"
            answer = running.client.post(root, params={"uid": known["study"], "name": named}, content=named.encode())
            known["annotation"] = answer.json()["id"]
        yield Parts(running, one, other, made)


@pytest.mark.parametrize(
    ("role", "whose"),
    [("reader", "granted"), ("researcher", "granted"), ("researcher", "other"), ("researcher", "any")],
)
def test_every_operation_as_reader_and_researcher(parts: Parts, drawing: Drawn, role: str, whose: str) -> None:
    """As it is described, and nothing of what is not granted: with UIDs of it, of what is granted, and with any."""
    annotation = {"granted": parts.granted["annotation"], "other": parts.other["annotation"]}.get(whose, "")
    before = parts.web.get("/instances?count=true&includefield=all").content
    looked, answered = 0, 0

    def look(response: Any) -> None:
        nonlocal looked, answered
        looked += 1
        answered += response.status_code < 400
        if role == "researcher":
            told = response.content + repr(dict(response.headers)).encode()
            asked = response.request.url + repr(response.request.body)
            # a UID that was asked for may stand in what is said of it
            assert not [one for one in parts.secrets() if one in told and one.decode() not in asked], asked
            assert HIDDEN.encode() not in told, asked

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for operation, cases in drawing.cases(whose, mode):
            statuses = statuses_of(parts.web, cases, parts.tokens[role], look, annotation)
            name = operation.label
            if mode == GenerationMode.POSITIVE and not name.startswith("GET"):
                assert set(statuses) <= ({200} if name.startswith("OPTIONS") else {400, 403, 404}), name
            below = name.startswith(("GET /dicom-web/studies/{", "GET /wado", "GET /annotations/{"))
            if role == "researcher" and whose == "other" and below:
                assert min(statuses, default=404) >= 400 or set(statuses) <= {204, 400, 404}, (name, statuses)
    assert looked > 300
    assert answered > (50 if whose == "granted" else 20)
    assert parts.web.get("/instances?count=true&includefield=all").content == before


@pytest.mark.parametrize("there", [True, False])
def test_what_is_not_as_described_is_refused_or_stood(web: Web, drawing: Drawn, there: bool) -> None:
    """Wrong types and values, and what is missing: never an error of the server, and nothing changes."""
    before = web.get("/instances?count=true&includefield=all").content
    several = drawing.cases("granted" if there else "any", GenerationMode.NEGATIVE)
    found = {operation.label: statuses_of(web, cases) for operation, cases in several}
    wrong = {name: statuses for name, statuses in found.items() if "{" in name and statuses}
    assert len(wrong) > 25
    if not there:
        assert not {name for name, statuses in wrong.items() if min(statuses) < 400}
        assert {status for statuses in wrong.values() for status in statuses} <= {400, 403, 404}
    assert web.get("/instances?count=true&includefield=all").content == before
