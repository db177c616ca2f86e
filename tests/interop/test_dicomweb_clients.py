"""The DICOMweb clients of others, every call that they have: that of npm, and that of PyPI."""

from __future__ import annotations

import inspect
import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from requests.exceptions import HTTPError

from tests.support.dicom_tools import RUN_S, require_tool
from tests.support.landing import archive, slices
from tests.support.npm import require_npm
from tests.support.web import Web, serving_web

pytestmark = pytest.mark.interop

SCRIPT = Path(__file__).parents[1] / "dcmjs" / "dicomweb.cjs"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with serving_web(archive(tmp_path / "archive", web={"delete": True})) as running:
        yield running


def test_every_call_of_npm(web: Web, tmp_path: Path) -> None:
    data = slices(3)
    files = [tmp_path / f"{number}.dcm" for number in range(len(data))]
    for path, one in zip(files, data, strict=True):
        path.write_bytes(one)
    command = [require_tool("node", "nodejs"), str(SCRIPT), str(require_npm()), web.url]
    asked = json.dumps([str(path) for path in files])
    run = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert run.returncode == 0, run.stderr
    told: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])  # the client prints what it does
    assert told["found"] == [1, 1, 3] and told["nothing"] == [] and told["metadata"] == [3, 3]
    assert told["modality"] == "CT" and told["missing"] == 404
    assert sorted(told["study"]) == sorted(told["series"]) == sorted(one.hex() for one in data)
    [one] = [one for one in data if pydicom.dcmread(io.BytesIO(one)).SOPInstanceUID == told["sop"]]
    assert told["instance"] == told["wado"] == one.hex()
    assert told["frames"] == told["bulk"] == [pydicom.dcmread(io.BytesIO(one)).PixelData.hex()]
    assert told["images"] == ["ffd8"] * 4
    assert told["said"] == [False, False]
    assert told["called"] == told["offered"] != []


def test_every_call_of_pypi(web: Web) -> None:
    client = DICOMwebClient(web.url)
    called: set[str] = set()

    def call(name: str, *arguments: Any, **named: Any) -> Any:
        called.add(name)
        result = getattr(client, name)(*arguments, **named)
        return list(result) if inspect.isgenerator(result) else result

    stored = [pydicom.dcmread(io.BytesIO(one)) for one in slices(3)]
    study, series, sop = stored[0].StudyInstanceUID, stored[0].SeriesInstanceUID, stored[0].SOPInstanceUID
    call("set_chunk_size", 1 << 16)
    call("set_http_retry_params", retry=False)
    assert len(call("store_instances", stored).ReferencedSOPSequence) == 3
    assert call("lookup_tag", "PatientID") == "00100020" and call("lookup_keyword", "00100020") == "PatientID"
    assert len(call("search_for_studies", search_filters={"StudyInstanceUID": study}, limit=1, fields=["StudyID"])) == 1
    assert len(call("search_for_series", study, fuzzymatching=True, offset=0)) == 1
    assert len(call("search_for_instances", study, series, limit=1, get_remaining=True)) == 3
    assert len(call("retrieve_study", study)) == len(call("iter_study", study)) == 3
    assert len(call("retrieve_series", study, series)) == len(call("iter_series", study, series)) == 3
    assert call("retrieve_instance", study, series, sop) == stored[0]
    assert len(call("retrieve_study_metadata", study)) == len(call("retrieve_series_metadata", study, series)) == 3
    metadata = call("retrieve_instance_metadata", study, series, sop)
    where = metadata["7FE00010"]["BulkDataURI"]
    pixels = stored[0].PixelData
    assert call("retrieve_bulkdata", where) == call("iter_bulkdata", where) == [pixels]
    frames = (study, series, sop, [1])
    assert call("retrieve_instance_frames", *frames) == call("iter_instance_frames", *frames) == [pixels]
    jpeg = {"media_types": ("image/jpeg",)}
    assert call("retrieve_instance_rendered", study, series, sop, **jpeg)[:2] == b"\xff\xd8"
    assert call("retrieve_instance_frames_rendered", *frames, **jpeg)[:2] == b"\xff\xd8"
    assert b"\xff\xd8" in call("retrieve_series_rendered", study, series, **jpeg)
    call("delete_instance", study, series, sop)
    assert len(call("search_for_instances", study, series)) == 2
    call("delete_series", study, series)
    with pytest.raises(HTTPError, match="404"):  # nothing of it is left
        call("delete_study", study)
    offered = {name for name, _ in inspect.getmembers(DICOMwebClient, inspect.isfunction) if not name.startswith("_")}
    assert called == offered
