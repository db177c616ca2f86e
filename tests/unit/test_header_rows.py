"""Headers to record batches."""

from __future__ import annotations

from datetime import date, datetime, timezone

import pyarrow as pa
import pytest

from sphere.ingest.header import RowBuilder
from sphere.ingest.header.columns import COLUMNS
from sphere.ingest.records import MemberRecord
from tests.support.headers import element, header, instance, text

pytestmark = pytest.mark.unit

SCHEMA = pa.schema(
    [
        ("SOPInstanceUID", pa.string()),
        ("bundle", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("dataset_offset", pa.int64()),
        ("pixel_offset", pa.int64()),
        ("transfer_syntax_uid", pa.string()),
        ("sha256", pa.string()),
        ("received_at", pa.timestamp("us", "UTC")),
        ("source_aet", pa.string()),
        ("origin", pa.string()),
        ("header_warnings", pa.list_(pa.string())),
        *((column.keyword, column.arrow) for column in COLUMNS if column.keyword != "SOPInstanceUID"),
        ("dataset", pa.string()),
    ]
)
RECORD = MemberRecord(
    bundle="bundles/2024/01/01/x.tar",
    offset=512,
    length=900,
    dataset_offset=288,
    SOPInstanceUID="1.2.3.4",
    SOPClassUID="",
    StudyInstanceUID="1.2.3",
    SeriesInstanceUID="1.2.3.1",
    TransferSyntaxUID="1.2.840.10008.1.2.1",
    sha256="ab" * 32,
    received_at=datetime(2024, 1, 31, 10, 11, 12, 345678, tzinfo=timezone.utc),
    source_aet="CT1",
    origin="dimse:CT1@10.0.0.1",
)


def test_a_batch_has_the_schema_and_every_value():
    first = header(
        instance(
            text("StudyDate", "DA", "20240131"),
            text("SliceThickness", "DS", "1.5 "),
            text("ImageType", "CS", "ORIGINAL\\PRIMARY"),
            element("Rows", "US", b"\0\2"),
            element("PixelData", "OW", b"\0\0"),
        )
    )
    second = header(instance(text("SliceThickness", "DS", "thin"), text("PatientName", "PN", "Doe^Jane")))
    builder = RowBuilder(SCHEMA)
    builder.append(first, RECORD)
    builder.append(second, RECORD)
    assert (len(builder), builder.nbytes) == (2, len(first.dataset) + len(second.dataset))
    batch = builder.batch()
    assert batch.schema == SCHEMA
    batch.validate(full=True)
    rows = batch.to_pylist()
    assert {key: value for key, value in rows[0].items() if value is not None} == {
        "SOPInstanceUID": "1.2.3.4",
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.1",
        "StudyDate": date(2024, 1, 31),
        "SliceThickness": 1.5,
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "Rows": 512,
        "bundle": "bundles/2024/01/01/x.tar",
        "offset": 512,
        "length": 900,
        "dataset_offset": 288,
        "pixel_offset": first.pixel_offset,
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "sha256": "ab" * 32,
        "received_at": RECORD.received_at,
        "source_aet": "CT1",
        "origin": "dimse:CT1@10.0.0.1",
        "header_warnings": [],
        "dataset": first.dataset.decode(),
    }
    assert rows[1]["SliceThickness"] is None
    assert rows[1]["pixel_offset"] is None
    assert rows[1]["PatientName"] == "Doe^Jane"
    assert rows[1]["header_warnings"] == ["(0018,0050) SliceThickness: 1 of 1 values are not numbers"]


def test_a_builder_begins_anew_after_each_batch():
    builder = RowBuilder(SCHEMA)
    assert builder.batch().num_rows == 0
    for count in (3, 1):
        for _ in range(count):
            builder.append(header(instance()), RECORD)
        assert builder.batch().num_rows == count
        assert (len(builder), builder.nbytes) == (0, 0)


def test_a_batch_may_leave_out_what_says_nothing():
    builder = RowBuilder(SCHEMA, always=["PatientName"])
    builder.append(header(instance(text("SliceThickness", "DS", "1.5"))), RECORD)
    builder.append(header(instance(text("StudyDate", "DA", "20240131"))), RECORD)
    batch = builder.batch()
    said = [name for name in batch.schema.names if name[0].isupper()]
    assert said == [
        name
        for name in SCHEMA.names
        if name
        in {
            "SOPInstanceUID",
            "SOPClassUID",
            "StudyInstanceUID",
            "SeriesInstanceUID",
            "SliceThickness",
            "StudyDate",
            "PatientName",
        }
    ]
    assert {"bundle", "collections", "pixel_offset"} & set(SCHEMA.names) <= set(batch.schema.names)
    assert [(row["SliceThickness"], row["PatientName"]) for row in batch.to_pylist()] == [(1.5, None), (None, None)]


def test_columns_that_nobody_fills_are_refused():
    with pytest.raises(ValueError, match="no attribute and no fixed column: collection"):
        RowBuilder(pa.schema([("SOPInstanceUID", pa.string()), ("collection", pa.string())]))


def test_missing_transfer_syntax_is_null():
    builder = RowBuilder(pa.schema([("transfer_syntax_uid", pa.string())]))
    found = header(instance())
    builder.append(type(found)({}, b"{}", None, "", 0, []), RECORD)
    assert builder.batch().to_pylist() == [{"transfer_syntax_uid": None}]
