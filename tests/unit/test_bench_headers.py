"""Headers of the invented hospital as the benchmark gives them to other servers."""

from __future__ import annotations

from io import BytesIO

import orjson
import pytest
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from tests.bench.hospital import Batch, Hospital
from tests.bench.query_servers import encoded

pytestmark = pytest.mark.unit


def test_headers_are_encoded_as_pydicom_reads_them() -> None:
    batch = Batch(Hospital(60), 0, 60)
    rows = batch.columns(0, len(batch.series))
    headers = [orjson.loads(text) for text in rows["dataset"].to_pylist()[::20]]
    assert {header["00080060"]["Value"][0] for header in headers} == {"CT", "MR", "DX", "US"}
    for header in headers:
        found = read_dataset(BytesIO(encoded(header)), is_implicit_VR=False, is_little_endian=True)
        assert found == Dataset.from_json(header)
