"""The SPHERE API for annotations: files linked to studies, series and instances, and DICOM objects that refer there."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final
from urllib.parse import quote

import orjson
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sphere.catalog.annotations import (
    Annotations,
    Target,
    Version,
    level_named,
    locate,
)
from sphere.catalog.queries import Queries
from sphere.catalog.query import Query
from sphere.catalog.references import KINDS, references
from sphere.catalog.service import StoredInstance
from sphere.catalog.withdrawn import Withdrawn
from sphere.conf.errors import BadRequest, NotThere
from sphere.conf.uids import UID
from sphere.scp.web.archive import as_seen, not_modified
from sphere.scp.web.incoming import pieces, take_in
from sphere.scp.web.operations import PREFIX as DICOM_WEB
from sphere.scp.web.operations import Operation, parameter
from sphere.scp.web.problem import WebError
from sphere.scp.web.ranges import byte_range
from sphere.scp.web.streamed import Streamed
from sphere.scp.web.upload import ABOUT, FORM, Upload, number, who

PREFIX: Final = "/annotations"
ANY: Final = "*/*"
MAX_LIMIT: Final = 1000  # annotations of one answer
DICOM: Final = "application/dicom"
_ID = re.compile(r"[0-9a-f]{32}")
_TARGET: Final = ("uid", "level", "allow_unknown")
_TEXT: Final = {"type": "string"}
_NUMBER: Final = {"type": "integer", "minimum": 0}


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes ask."""

    annotations: Annotations
    catalog: Queries
    idle_s: float
    read_only: bool
    indexed: bool
    """Whether a patient is found without reading every header."""
    withdrawn: Withdrawn

    def change(self, request: Request, allowed: tuple[str, ...]) -> dict[str, str]:
        """The parameters of a request that changes something; raises WebError and BadRequest."""
        if self.read_only:
            raise WebError("this archive takes nothing over HTTP (web.read_only)", http=403)
        return _parameters(request, allowed)


def offered(service: Service) -> list[Operation]:
    """List, add, describe, download, a new version, delete."""

    async def add(request: Request) -> Response:
        return await _add(service, request)

    async def change(request: Request) -> Response:
        return await _change(service, request)

    one, tag = PREFIX + "/{annotation}", "annotations"
    about = tuple(parameter(name, _TEXT, text) for name, text in _SAID.items())
    kinds = (FORM, ANY)
    onto = parameter("onto", _NUMBER, "The version that is to be replaced; 409 where it is not the newest")
    listed = (
        parameter("uid", _TEXT, "Of a study, series or instance: what is linked to it or to something in it"),
        parameter("level", _TEXT, "study, series or instance"),
        parameter("type", _TEXT, "As it was given; of DICOM objects SEG, SR, PR or KO"),
        parameter("author", _TEXT, "As it was given"),
        parameter("limit", _NUMBER, f"At most so many, {MAX_LIMIT} by default and at most"),
        parameter("offset", _NUMBER, "Leave out so many"),
    )
    target = tuple(parameter(name, _TEXT, text) for name, text in _OF.items())
    version = (parameter("version", _NUMBER, "The newest by default"),)
    return [
        Operation("GET", PREFIX, _bound(service, _list), "List annotations", tag, parameters=listed, in_part=True),
        Operation("POST", PREFIX, add, "Link a file", tag, parameters=(*target, *about), consumes=kinds, status=201),
        Operation("GET", one, _bound(service, _describe), "An annotation and all its versions", tag, in_part=True),
        Operation("PUT", one, change, "A new version", tag, parameters=(*about, onto), consumes=kinds),
        Operation("DELETE", one, _bound(service, _delete), "Show it no more", tag, (), (onto,), status=204),
        Operation(
            "GET",
            one + "/file",
            _bound(service, _download),
            "Its bytes",
            tag,
            (ANY,),
            version,
            others=(206, 304),
            in_part=True,
        ),
    ]


_OF: Final[Mapping[str, str]] = {
    "uid": "Of the study, series or instance; required",
    "level": "study, series or instance; required for one that is not known",
    "allow_unknown": "true: whether or not the archive has it",
}
_SAID: Final[Mapping[str, str]] = {
    "type": "What kind of annotation it is",
    "author": "Whom it is by; who asks, by default",
    "name": "What the file is called",
    "description": "Free text",
    "sha256": "Its digest (hexadecimal); 400 where something else came",
}


def _bound(service: Service, answer: Callable[[Service, Request], Response]) -> Callable[[Request], Response]:
    def endpoint(request: Request) -> Response:
        return answer(service, request)

    return endpoint


def _list(service: Service, request: Request) -> Response:
    asked = _parameters(request, ("uid", "level", "type", "author", "limit", "offset"))
    uid, level = asked.get("uid", ""), level_named(asked.get("level", ""))
    limit, offset = min(number(asked, "limit", MAX_LIMIT), MAX_LIMIT), number(asked, "offset", 0)
    kept = {name: asked.get(name, "") for name in ("type", "author")}
    catalog = as_seen(service.catalog, request)
    if catalog is service.catalog:
        asked_for: dict[str, Any] = {"uid": uid, "level": level, **kept}
        without: set[str] = set()
        if not _sees_all(request) and service.withdrawn.any():
            without = service.withdrawn.among(service.annotations.targets(**asked_for))
        found, total = service.annotations.find(**asked_for, without=without, limit=limit, offset=offset)
    else:
        found, total = _granted(service, catalog, uid, level=level, **kept)
        found = found[offset : offset + limit]
    rows = [_row(one) for one in found]
    if uid and not kept["author"]:
        objects = [
            row
            for row in _objects(catalog, uid, whole_patient=service.indexed)
            if not level or level_named(row["level"]) == level
        ]
        objects = [row for row in objects if not kept["type"] or row["type"] == kept["type"]]
        start = max(0, offset - total)
        rows += objects[start : start + limit - len(rows)]
        total += len(objects)
    request.state.found = len(rows)
    return JSONResponse(rows, headers={"X-Total-Count": str(total)})


def _granted(service: Service, catalog: Queries, uid: str, **kept: Any) -> tuple[list[Version], int]:
    """All that is linked to what the caller may see, of a study, series or instance."""
    if not uid:
        raise BadRequest("uid is required for the role researcher")
    found = [one for one in service.annotations.find(uid=uid, **kept)[0] if _is_seen(catalog, one)]
    return found, len(found)


def _is_seen(catalog: Queries, version: Version) -> bool:
    """Whether there is what it is linked to."""
    target = Target(version.level, version.StudyInstanceUID, version.SeriesInstanceUID, version.SOPInstanceUID)
    return locate(catalog, target.uid, target.level) is not None


def _sees_all(request: Request) -> bool:
    """Whether what is linked to what was deleted is shown: to those who may delete."""
    return getattr(request.state, "role", "") == "admin"


def _check(service: Service, request: Request, version: Version) -> Version:
    """The version, if the caller may see what it is linked to; raises NotThere."""
    catalog = as_seen(service.catalog, request)
    if catalog is not service.catalog:
        shown = _is_seen(catalog, version)
    else:
        shown = _sees_all(request) or not service.withdrawn.has(version)
    if not shown:
        raise NotThere(f"there is no annotation {version.id!r}")
    return version


def _checked_id(service: Service, request: Request) -> str:
    """The id in the path, of an annotation that the caller may see; raises NotThere."""
    return _check(service, request, service.annotations.history(_id(request))[0]).id


def _objects(catalog: Queries, uid: str, *, whole_patient: bool) -> Iterator[dict[str, Any]]:
    """The DICOM objects that refer to what has this UID, one row for each series that they refer to: those of its
    study, and of other studies of the patient, as reports and key objects name earlier examinations too."""
    if not UID.fullmatch(uid):
        return
    target = locate(catalog, uid, None)
    if target is None:
        return
    for study, series in sorted(_series_of_objects(catalog, target.StudyInstanceUID, whole_patient)):
        for instance, header in catalog.lookup_headers(study=study, series=series):
            if instance.SOPClassUID not in KINDS:
                continue
            for reference in references(orjson.loads(header)):
                if reference.is_of(uid):
                    yield _object_row(instance, reference.StudyInstanceUID, reference.SeriesInstanceUID,
                                      list(reference.instances))  # fmt: skip


def _series_of_objects(catalog: Queries, study: str, whole_patient: bool) -> set[tuple[str, str]]:
    """Study and Series Instance UIDs of such objects in the study, and in all else of its patient."""
    wanted = [{"StudyInstanceUID": study}]
    if whole_patient:
        asked = Query.build("STUDY", wanted[0], return_keys=["PatientID"])
        patients = {str(match.identifier().PatientID or "") for match in catalog.find(asked)} - {""}
        wanted += [{"PatientID": patient} for patient in sorted(patients)]
    queries = [Query.build("IMAGE", {**one, "SOPClassUID": list(KINDS)}) for one in wanted]
    matches = [match.identifier() for query in queries for match in catalog.find(query)]
    return {(str(match.StudyInstanceUID), str(match.SeriesInstanceUID)) for match in matches}


def _object_row(instance: StoredInstance, study: str, series: str, referenced: list[str]) -> dict[str, Any]:
    place = f"/studies/{instance.StudyInstanceUID}/series/{instance.SeriesInstanceUID}"
    return {
        "id": instance.SOPInstanceUID,
        "level": "series" if series else "study",
        "StudyInstanceUID": study,
        "SeriesInstanceUID": series,
        "SOPInstanceUID": "",
        "instances": referenced,
        "type": KINDS[instance.SOPClassUID],
        "media_type": DICOM,
        "size": instance.length,
        "href": f"{DICOM_WEB}{place}/instances/{instance.SOPInstanceUID}",
    }


def _describe(service: Service, request: Request) -> Response:
    _parameters(request, ())
    versions = service.annotations.history(_id(request))
    _check(service, request, versions[0])
    request.state.found = 1
    state = "deleted" if versions[0].action == "delete" else "current"
    return JSONResponse({**_row(versions[0]), "state": state, "versions": [_row(one) for one in versions]})


def _download(service: Service, request: Request) -> Response:
    asked = _parameters(request, ("version",))
    wanted = number(asked, "version", 0) or None
    # first whether it may be seen at all: what versions it has tells that there is one
    version = service.annotations.version(_checked_id(service, request), wanted)
    tag = f'"{version.sha256[:32]}"'
    if known := not_modified(request, tag):
        return known
    part = byte_range(request, tag, version.size)
    start, end = part or (0, version.size)
    headers = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Content-Length": str(end - start),
        "Repr-Digest": f"sha-256=:{b64encode(bytes.fromhex(version.sha256)).decode()}:",  # RFC 9530: of all parts
        "Content-Disposition": _disposition(version.name),
        # what somebody uploaded must never run as a page of this archive
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox; default-src 'none'",
    }
    if part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{version.size}"
    request.state.found = 1
    return Streamed(service.annotations.read(version, part), 206 if part else 200, headers, version.media_type)


def _delete(service: Service, request: Request) -> Response:
    asked = service.change(request, ("onto",))
    onto = number(asked, "onto", 0) or None
    service.annotations.delete(_checked_id(service, request), made_by=who(request), onto=onto)
    request.state.found = 1
    return Response(status_code=204)


async def _add(service: Service, request: Request) -> Response:
    given = service.change(request, (*_TARGET, *ABOUT, "sha256"))
    upload = Upload(service, request, given, (*_TARGET, *ABOUT, "sha256"))
    if given.get("uid"):  # before gigabytes come for nothing
        await to_thread.run_sync(upload.target)
    version = await _taken(service, request, upload)
    return JSONResponse(_row(version), 201, {"Location": f"{PREFIX}/{version.id}"})


async def _change(service: Service, request: Request) -> Response:
    given = service.change(request, (*ABOUT, "sha256", "onto"))
    id = await to_thread.run_sync(_checked_id, service, request)
    upload = Upload(service, request, given, (*ABOUT, "sha256", "onto"), id=id)
    return JSONResponse(_row(await _taken(service, request, upload)))


async def _taken(service: Service, request: Request, upload: Upload) -> Version:
    """The version that a body becomes, durable; nothing of it is left where it is not right."""
    try:
        await take_in(pieces(request, service.idle_s), upload.feed)
        version = await to_thread.run_sync(upload.commit)
    finally:
        await to_thread.run_sync(upload.discard)
    request.state.found = 1
    return version


def _row(version: Version) -> dict[str, Any]:
    row = asdict(version)
    del row["path"]
    row["level"] = "instance" if version.level == "IMAGE" else version.level.lower()
    row["href"] = f"{PREFIX}/{version.id}/file?version={version.version}"
    return row


def _parameters(request: Request, allowed: tuple[str, ...]) -> dict[str, str]:
    """The parameters of the query; raises BadRequest for one that is not known or stands twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise BadRequest(f"unknown parameter {name[:40]!r}; known: {known}")
        if name in found:
            raise BadRequest(f"parameter {name} stands twice")
        found[name] = value
    return found


def _id(request: Request) -> str:
    id = str(request.path_params["annotation"])
    if not _ID.fullmatch(id):
        raise NotThere("there is no such annotation: an id is 32 hexadecimal digits")
    return id


def _disposition(name: str) -> str:
    """RFC 6266: a name in ASCII, and the very one."""
    plain = re.sub(r"[^ !#$&+.0-9A-Z^_a-z~-]", "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
