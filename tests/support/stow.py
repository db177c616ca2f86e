"""Bodies of STOW-RS requests, and what became of them."""

from __future__ import annotations

import io
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pydicom
from pydicom.dataset import Dataset

from sphere.ingest.header import identify
from sphere.ingest.journal import Landed
from sphere.ingest.storage import open_storage
from tests.support.landing import slices
from tests.support.web import Web

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
DICOM, JSON, XML = "application/dicom", "application/dicom+json", "application/dicom+xml"
AS_IT_IS = "application/dicom; transfer-syntax=*"
SEEDS = count(1000)
"""Of series that no test of this process has made yet."""


def body(*parts: tuple[str, bytes], boundary: str = "B", end: bool = True) -> bytes:
    """Parts of header lines and content."""
    whole = b"".join(f"\r\n--{boundary}\r\n{head}\r\n\r\n".encode() + data for head, data in parts)
    return whole + (f"\r\n--{boundary}--\r\n".encode() if end else b"")


def post(web: Web, content: Any, root: str = DICOM, *, path: str = "/studies", boundary: str = "B") -> httpx.Response:
    """POST of a multipart/related body to a path below /dicom-web."""
    kind = f'multipart/related; type="{root}"; boundary={boundary}'
    return web.client.post(f"{web.url}{path}", content=content, headers={"content-type": kind})


def files(*data: bytes) -> bytes:
    """The body with one part for each file."""
    return body(*((f"Content-Type: {DICOM}", one) for one in data))


def new(number: int = 1) -> list[bytes]:
    """Slices of a series that nobody has yet."""
    return slices(number, seed=next(SEEDS))


def where(data: bytes) -> str:
    """The path of an instance below /dicom-web."""
    one = identify(data, size=len(data))
    return f"/studies/{one.StudyInstanceUID}/series/{one.SeriesInstanceUID}/instances/{one.SOPInstanceUID}"


def landed(web: Web) -> int:
    """Members that are durable."""
    found = Landed(open_storage(web.settings.storage.root), web.settings.archive.state_dir)
    return sum(len(found.records(state.bundle, unpublished=True)[0]) for state in found.bundles())


def reasons(response: httpx.Response) -> list[int]:
    """Failure Reasons (0008,1197) of the instances that were not stored."""
    return [one["00081197"]["Value"][0] for one in response.json().get("00081198", {}).get("Value", [])]


def saved(dataset: Dataset) -> bytes:
    """A data set as a Part 10 file."""
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()
