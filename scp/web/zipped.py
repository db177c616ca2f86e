"""Studies, series and instances as ZIP files, streamed, nothing compressed, with a DICOMDIR when asked (PS3.12 V)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from zipfile import ZipFile, ZipInfo

import orjson
from starlette.requests import Request
from starlette.responses import Response

from sphere.catalog.service import StoredInstance
from sphere.scp.retrieve.read_ahead import Range
from sphere.scp.web.accept import MediaRange
from sphere.scp.web.archive import Archive, etag, not_modified
from sphere.scp.web.dicomdir import TAGS, Entry, directory
from sphere.scp.web.operations import parameter, uids
from sphere.scp.web.problem import WebError
from sphere.scp.web.streamed import Body, Streamed

ZIP = "application/zip"
DICOMDIR = parameter("dicomdir", {"type": "boolean"}, "With application/zip: a File-set with its DICOMDIR (PS3.10 8).")
_MODE = 0o644 << 16  # rights of a file, where Unix tools look for them
_UNSAFE = re.compile(r"[^0-9A-Za-z-]")
_UID = re.compile(r"[0-9][0-9.]{0,63}")


def is_wanted(ranges: Iterable[MediaRange]) -> bool:
    """Whether a ZIP file is what is accepted first."""
    return next((one.type for one in ranges if one.quality), "") == ZIP


def answer(archive: Archive, request: Request) -> Response:
    """The instances that the path names, as they lie; raises WebError (404) where there is none."""
    text = request.query_params.get("dicomdir", "false")
    if text not in ("true", "false"):
        raise WebError("dicomdir must be true or false")
    archive, named = archive.of(request), uids(request)
    instances = archive.located(**named)
    request.state.found = len(instances)
    level = ("study", "series", "instance")[len(named) - 1]
    headers = {
        "ETag": etag(instances, ZIP, text),
        "Content-Disposition": f'attachment; filename="{level}-{named[level]}.zip"',
    }
    if known := not_modified(request, headers["ETag"]):
        return known
    if text == "true":
        entries = _entries(archive, named, instances)
        index, names = directory(entries)
        members = list(zip(names, (one.instance for one in entries), strict=True))
        return Streamed(_zip(archive, members, index), headers=headers, media_type=ZIP)
    return Streamed(_zip(archive, list(named_by_uid(instances))), headers=headers, media_type=ZIP)


def _entries(archive: Archive, named: dict[str, str], instances: Sequence[StoredInstance]) -> list[Entry]:
    """The instances, each with what a DICOMDIR tells of it."""
    wanted = {one.SOPInstanceUID: one for one in instances}
    found = archive.catalog.lookup_headers(
        study=named["study"], series=named.get("series", ""), sop=named.get("instance", "")
    )
    entries = []
    for one, text in found:
        if wanted.pop(one.SOPInstanceUID, None) is not None:
            header = orjson.loads(text)
            entries.append(Entry(one, {tag: header[tag] for tag in TAGS & header.keys()}))
    return entries


def named_by_uid(instances: Iterable[StoredInstance]) -> Iterator[tuple[str, StoredInstance]]:
    """(name in the ZIP file, instance): UIDs, which every file system takes; what is none in a header is made safe."""
    taken: set[str] = set()
    for number, one in enumerate(instances, start=1):
        name = f"{_safe(one.SeriesInstanceUID)}/{_safe(one.SOPInstanceUID)}"
        if name in taken:
            name = f"{name}-{number}"
        taken.add(name)
        yield f"{name}.dcm", one


def _safe(uid: str) -> str:
    return uid if _UID.fullmatch(uid) else f"uid-{_UNSAFE.sub('_', uid)[:64]}"


class _Sink:
    """What ZipFile writes to: pieces that wait to be sent. Without `tell` it takes us for a pipe."""

    def __init__(self) -> None:
        self._pieces: list[bytes | memoryview] = []

    def write(self, data: bytes | memoryview) -> int:
        self._pieces.append(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is held."""

    def take(self) -> list[bytes | memoryview]:
        taken, self._pieces = self._pieces, []
        return taken


def _zip(archive: Archive, members: Sequence[tuple[str, StoredInstance]], index: bytes | None = None) -> Body:
    """A ZIP file of the members, nothing compressed; one that cannot be read whole breaks the response off."""
    sink = _Sink()
    ranges = [Range(one.bundle, one.offset, one.length) for _, one in members]
    with closing(archive.bodies(ranges)) as bodies:
        file = ZipFile(sink, "w")
        if index is not None:
            file.writestr(_info("DICOMDIR", len(index)), index)
        for (name, instance), pieces in zip(members, bodies, strict=True):
            with file.open(_info(name, instance.length), "w") as member:
                for piece in pieces:
                    member.write(piece)
                    yield from sink.take()
        file.close()
    yield from sink.take()


def _info(name: str, size: int) -> ZipInfo:
    """A member; its size decides between ZIP and ZIP64."""
    info = ZipInfo(name)
    info.file_size, info.external_attr = size, _MODE
    return info
