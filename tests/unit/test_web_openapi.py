"""What schemathesis makes of /openapi.json: every operation is asked as it is described, and answers so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pydicom
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from sphere.ingest.header import identify
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.unit

FILE = Path(pydicom.__file__).parent / "data" / "test_files" / "CT_small.dcm"
PROBLEM = "application/problem+json"
EXAMPLES = 8  # of each operation and of each of the two ways
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


def the_known() -> dict[str, str]:
    """Parameters that name what is there."""
    data = FILE.read_bytes()
    one = identify(data, size=len(data))
    return {"study": one.StudyInstanceUID, "series": one.SeriesInstanceUID, "instance": one.SOPInstanceUID,
            "frames": "1", "studyUID": one.StudyInstanceUID, "seriesUID": one.SeriesInstanceUID,
            "objectUID": one.SOPInstanceUID, "requestType": "WADO", "uid": one.StudyInstanceUID}  # fmt: skip


def operations(web: Web, known: dict[str, str]) -> Iterator[Any]:
    """Those of the document, some of their parameters with the `known` values alone."""
    root = web.url.removesuffix("/dicom-web")
    document = web.client.get(f"{root}/openapi.json").json()
    for operation in (one for methods in document["paths"].values() for one in methods.values()):
        for parameter in operation["parameters"]:
            if parameter["name"] in known:
                parameter |= {"schema": {"const": known[parameter["name"]]}, "required": True}
    schema = schemathesis.openapi.from_dict(document, config=SchemathesisConfig.from_dict({}))
    schema.config.update(base_url=root)
    for result in schema.get_all_operations():
        yield result.ok()


def statuses_of(operation: Any, mode: GenerationMode = GenerationMode.POSITIVE) -> list[int]:
    """What the operation answers; fails where it is not what is described, an error of the server, or no problem."""
    found = []

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    def ask(case: Any) -> None:
        in_parts = str(case.media_type).startswith("multipart/related")
        headers = {"Content-Type": f"{case.media_type}; boundary=B"} if in_parts else {}
        response = case.call(headers=headers, timeout=30)
        found.append(response.status_code)
        checks = CHECKS if case.path == READY else [*CHECKS, not_a_server_error]
        case.validate_response(response, checks=checks)
        if PROBLEM in response.headers.get("content-type", []):
            assert response.json()["status"] == response.status_code
            assert response.json()["detail"]
        elif case.path != READY:
            assert response.status_code < 400 or response.status_code == 409  # STOW-RS tells of each instance

    with suppress(Unsatisfiable):  # all data are as they should be where nothing is described
        ask()
    return found


@pytest.mark.parametrize("there", [True, False])
def test_every_operation_answers_as_it_is_described(web: Web, there: bool) -> None:
    """With UIDs of what is there, and with any."""
    asked = {operation.label: statuses_of(operation) for operation in operations(web, the_known() if there else {})}
    assert len(asked) > 40 and all(asked.values())
    failed = {name for name, statuses in asked.items() if min(statuses) >= 400 and name.startswith("GET /dicom-web")}
    if there:
        assert all(name.endswith("/bulkdata") for name in failed), failed  # needs the place of a value


@pytest.mark.parametrize("there", [True, False])
def test_what_is_not_as_described_is_refused_or_stood(web: Web, there: bool) -> None:
    """Wrong types and values, and what is missing: never an error of the server, and nothing changes."""
    known = the_known() if there else {}
    before = web.get("/instances?count=true&includefield=all").content
    found = {one.label: statuses_of(one, GenerationMode.NEGATIVE) for one in operations(web, known)}
    wrong = {name: statuses for name, statuses in found.items() if "{" in name and statuses}
    assert len(wrong) > 25
    if not there:
        assert not {name for name, statuses in wrong.items() if min(statuses) < 400}
        assert {status for statuses in wrong.values() for status in statuses} <= {400, 403, 404}
    assert web.get("/instances?count=true&includefield=all").content == before
