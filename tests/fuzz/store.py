"""Fuzz target of metadata that are to become an instance: DICOM JSON and the Native DICOM Model of STOW-RS."""

from __future__ import annotations

import tempfile
import tracemalloc
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from pydicom import dcmread
from pydicom.dataset import Dataset

from sphere.scp.upper.dataset import Budget
from sphere.scp.web import native_xml_in
from sphere.scp.web.bulk_in import BulkParts, Unusable
from sphere.scp.web.incoming import ArrivingBody, ArrivingFile
from sphere.scp.web.metadata_in import Described, Header, read_json
from sphere.scp.web.native_xml_in import read_xml
from sphere.scp.web.problem import WebError

MAX_GAPS: Final = 64  # so small that short inputs reach it
PER_BYTE: Final = 1024  # bytes of memory for one of metadata, of which most is a letter of its syntax
BASE: Final = 2 << 20  # bytes of memory for what is made once
PARTS: Final = (
    ("http://x/a/1", "application/octet-stream", b"12345678"),
    ("http://x/b/1", "application/octet-stream", b"87654321"),
    ("frames", "image/jpeg", b"\xff\xd8\xff\xd9"),
    ("frames", "image/jpeg", b"\xff\xd8\xff\xff\xd9"),
)
_NOT_WRITTEN: Final = ("00083002",)  # Available Transfer Syntax UID is of the web alone (PS3.18 10.4.1.2)


def metadata(data: bytes) -> None:
    """Each data set becomes a file with the very same elements, at every depth, or is refused; in bounded memory.

    The first byte says what the rest is, JSON (0) or XML (1); its next bit whether it has a Content-Location.
    """
    if not data:
        return
    text, read = data[1:], read_xml if data[0] % 2 else read_json
    budget = Budget(1 << 20)
    folder = Path(tempfile.gettempdir())
    bulk = BulkParts()
    for location, kind, content in PARTS:
        body = ArrivingBody(folder, budget)
        body.add(content)
        bulk.add(location, kind, body)
    described = Described(bulk, "http://x/b/metadata" if data[0] & 2 else "")
    traced = tracemalloc.is_tracing()
    if not traced:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        with patch.object(native_xml_in, "MAX_GAPS", MAX_GAPS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for header in read(text):
                _instance(described, header, folder, budget)
    except WebError as error:
        assert error.http in (400, 413)
    finally:
        most = tracemalloc.get_traced_memory()[1] - before
        if not traced:
            tracemalloc.stop()
    assert most <= BASE + PER_BYTE * len(data), f"{most} bytes of memory for {len(data)}"
    for body in bulk.bodies():
        body.discard()
    assert budget.free == 1 << 20, "memory is not given back"


def _instance(described: Described, header: Header, folder: Path, budget: Budget) -> None:
    file = ArrivingFile(lambda: ArrivingBody(folder, budget))
    try:
        described.write(header, file)
        stored = file.stored
        assert isinstance(stored, list) and file.is_part10 and file.TransferSyntaxUID
        _compare(header, dcmread(BytesIO(b"".join((file.preamble, *stored)))), 0)
    except Unusable as error:
        assert str(error)
    finally:
        file.dataset.discard()


def _compare(header: Mapping[str, Any], dataset: Dataset, depth: int) -> None:
    """The elements that were written are those of the metadata, in items too; but for group lengths (PS3.5 7.2)."""
    left_out = ("0000", "0002") if depth == 0 else ()
    told = {tag.upper() for tag in header if tag[:4] not in left_out and tag[4:] != "0000"}
    if depth == 0:
        told.difference_update(_NOT_WRITTEN)
    tags = (int(tag) for tag in dataset.keys())  # noqa: SIM118  elements are made of what is iterated
    assert {f"{tag:08X}" for tag in tags if tag & 0xFFFF} == told
    for tag, element in header.items():
        if tag.upper() in told and element["vr"] == "SQ":
            items = dataset[tag.upper()].value
            assert len(items) == len(element.get("Value") or [])
            for one, item in zip(element.get("Value") or [], items, strict=True):
                _compare(one or {}, item, depth + 1)
