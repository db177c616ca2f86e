"""Arrow data made without pandas, and queries that load none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sphere.catalog.arrow import empty, integers, numbers, strings
from sphere.conf.loading import load
from tests.support.extracted import extract
from tests.support.landing import archive, land, new_member, slices

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
TOLD = "import atexit; atexit.register(lambda: print([*{'pandas'} & set(sys.modules)], file=sys.stderr))"
ASK = """
import sys
from pathlib import Path
from sphere.catalog.query import Query
from sphere.catalog.service import QueryService
from sphere.conf.loading import from_dict

with QueryService(from_dict({"archive": {"ae_title": "TESTED"}}, base=Path(sys.argv[1]))) as service:
    for level, keys, told, count in (
        ("PATIENT", {"PatientName": "*"}, (), 12),
        ("STUDY", {"StudyDate": "19000101-"}, ("StudyDescription", "NumberOfStudyRelatedInstances"), 12),
        ("SERIES", {"Modality": "CT"}, ("ProtocolName",), 12),
        ("IMAGE", {"ContentDate": "19000101-"}, ("SOPInstanceUID", "ImageType"), 24),
    ):
        found = list(service.find(Query.build(level, keys, return_keys=told)))
        assert len(found) == count, (level, len(found))
    uids = [match.identifier().SOPInstanceUID for match in found]
    some = Query.build("IMAGE", {"SOPInstanceUID": chr(92).join(uids[::2])})
    assert len(list(service.find(some))) == 12
print(*({"pandas"} & set(sys.modules)))
"""


def test_a_query_loads_no_pandas(tmp_path: Path) -> None:
    """Neither where the index is made, nor where it is there, at any level."""
    settings = archive(tmp_path)
    land(settings, [new_member(data) for study in range(12) for data in slices(2, seed=study, study=study)])
    extract(settings)
    for _ in ("made", "there"):
        asked = subprocess.run(
            [sys.executable, "-c", ASK, str(tmp_path)], check=False, cwd=ROOT, capture_output=True, text=True
        )
        assert asked.returncode == 0, asked.stderr
        assert asked.stdout.split() == []


def test_the_program_finds_without_pandas(config: Path) -> None:
    settings = load(config, environ={})
    land(settings, [new_member(data) for data in slices(2, seed=1)])
    extract(settings)
    code = f"import sys; sys.argv[0] = 'sphere'; from sphere.cli import main; {TOLD}; main()"
    arguments = ["--config", str(config), "find", "--level", "IMAGE", "-k", "ContentTime=", "--format", "csv"]
    asked = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert (asked.returncode, len(asked.stdout.splitlines())) == (0, 3), asked.stderr
    assert asked.stderr == "[]\n"


def test_arrays_are_those_of_pyarrow() -> None:
    for texts in ([], [""], ["a", "", "Müller", "山田"], [None], [None, "a", "", None, *"bcdefgh", None]):
        assert strings(texts).equals(pa.array(texts, pa.string()))
    whole = np.arange(10, dtype=np.int64)
    for some in (whole, whole[:0], whole[1::2]):
        assert integers(some).equals(pa.array(some))
        for column in (pa.array(some), pa.chunked_array([some, some[:2]]), pa.chunked_array([], pa.int64())):
            assert numbers(column).tolist() == column.to_pylist()
    with pytest.raises(pa.ArrowTypeError, match="no nulls"):
        numbers(pa.array([1, None]))
    schema = pa.schema([("a", pa.string()), ("b", pa.list_(pa.int64()))])
    assert empty(schema).equals(schema.empty_table())
