"""The tar headers and journal lines that the receiver writes by hand, held against the standard library's."""

from __future__ import annotations

import tarfile
from dataclasses import asdict, replace
from datetime import datetime, timezone
from typing import Any

import orjson
import pytest

from sphere.ingest import tar
from sphere.ingest.records import MemberRecord

pytestmark = pytest.mark.unit

WHEN = datetime(2026, 11, 22, 7, 48, 26, 607849, tzinfo=timezone.utc)


def by_tarfile(name: str, length: int, fields: dict[str, Any]) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = length
    info.mtime = int(WHEN.timestamp())
    comment = orjson.dumps({"sphere": tar.FORMAT, **fields}, option=orjson.OPT_UTC_Z).decode()
    info.pax_headers = {"comment": comment}
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


@pytest.mark.parametrize("length", [0, 1, 39_206, 8**11 - 1, 8**11, 1 << 40])
@pytest.mark.parametrize("filling", [0, 1, 60, 66, 67, 68, 69, 70, 71, 400, 960, 970, 980, 100_000])
def test_member_header_is_what_tarfile_writes(length: int, filling: int) -> None:
    name = "1." * 31 + "22.dcm"
    fields = {"origin": "é" + "x" * filling, "received_at": WHEN}
    said = orjson.dumps(fields, option=orjson.OPT_UTC_Z)
    assert tar.member_header(name, length, WHEN, said) == by_tarfile(name, length, fields)


def test_a_journal_line_is_the_record_field_by_field() -> None:
    record = MemberRecord(
        bundle="bundles/b.tar", offset=1536, length=2, dataset_offset=0, SOPInstanceUID="1.2", SOPClassUID="",
        StudyInstanceUID="", SeriesInstanceUID="", TransferSyntaxUID="", sha256="0", received_at=WHEN, source_aet="é",
        origin="import:/a",
    )  # fmt: skip
    untagged = {name: value for name, value in asdict(record).items() if name != "collections"}
    assert record.to_json() == orjson.dumps(untagged, option=orjson.OPT_UTC_Z), "as journals of before have it"
    tagged = replace(record, collections=("trial", "é"))
    assert tagged.to_json() == orjson.dumps(asdict(tagged), option=orjson.OPT_UTC_Z)
    assert [MemberRecord.from_json(one.to_json()) for one in (record, tagged)] == [record, tagged]
