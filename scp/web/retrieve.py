"""WADO-RS for whole instances (PS3.18 10.4): as they lie, or in another transfer syntax."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing

from pydicom.uid import UID
from starlette.requests import Request
from starlette.responses import Response

from sphere.catalog.service import StoredInstance
from sphere.conf.logs import hashed
from sphere.ingest.part10 import file_meta
from sphere.scp.retrieve.outbound import range_of, syntax_of
from sphere.scp.retrieve.read_ahead import Range
from sphere.scp.retrieve.transcode import CONVERTIBLE, TARGETS, NotConverted
from sphere.scp.web import zipped
from sphere.scp.web.accept import MediaRange, accepted
from sphere.scp.web.archive import Archive, etag, not_modified
from sphere.scp.web.multipart import Parts
from sphere.scp.web.operations import PREFIX, Operation
from sphere.scp.web.problem import WebError
from sphere.scp.web.streamed import Body, Streamed

log = logging.getLogger(__name__)

DICOM = "application/dicom"
EXPLICIT = TARGETS[0]


def offered(archive: Archive) -> list[Operation]:
    """The three of PS3.18 Table 10.4.1-1 that give whole instances."""

    def retrieve(request: Request) -> Response:
        if zipped.is_wanted(accepted(request)):
            return zipped.answer(archive, request)
        return answer(archive, request, archive.instances(request))

    paths = {"study": "/studies/{study}", "series": "/studies/{study}/series/{series}"}
    paths["instance"] = paths["series"] + "/instances/{instance}"
    types = (f'multipart/related; type="{DICOM}"', DICOM, zipped.ZIP)
    return [
        Operation(
            "GET",
            PREFIX + path,
            retrieve,
            f"Retrieve a {name}",
            "WADO-RS",
            types,
            (zipped.DICOMDIR,),
            others=(304,),
            in_part=True,
        )
        for name, path in paths.items()
    ]


def answer(archive: Archive, request: Request, instances: Sequence[StoredInstance]) -> Response:
    """The instances in one body."""
    ranges = accepted(request)
    single = len(instances) == 1 and _wants_single(ranges)
    wanted, refused = _wanted(ranges), _refused(ranges)
    sent = [(one, syntax) for one in instances if (syntax := route(one, wanted, refused))]
    request.state.found = len(sent)
    if not sent:
        stored = ", ".join(sorted({syntax_of(one) for one in instances}))
        raise WebError(f"not to be had as it is accepted; stored as {DICOM} in {stored}", http=406)
    tag = etag(instances, single, *(syntax for _, syntax in sent))
    if known := not_modified(request, tag):
        return known
    headers = {"ETag": tag}
    if all(syntax == syntax_of(one) for one, syntax in sent):
        headers["Content-Length"] = str(_length([one for one, _ in sent], single=single))
    elif len(instances) == 1:
        lenient = "" in wanted and syntax_of(instances[0]) not in refused
        return _one_converted(archive, *sent[0], headers, single=single, lenient=lenient)
    if len(sent) < len(instances):
        headers["Warning"] = f'299 SPHERE "{len(instances) - len(sent)} instances cannot be had as accepted"'
    status = 200 if len(sent) == len(instances) else 206  # PS3.18 Table 10.4.3-1
    if single:
        return Streamed(archive.pieces(_whole(sent[0][0])), status, headers, DICOM)
    parts = Parts(DICOM)
    return Streamed(_multipart(archive, sent, parts), status, headers, parts.media_type)


def single_instance(archive: Archive, request: Request, instance: StoredInstance, syntax: str) -> Response:
    """One instance as a file in a transfer syntax; raises WebError (406) where it cannot be had in it."""
    if route(instance, [syntax]) is None:
        raise WebError(f"not to be had in {syntax}; stored in {syntax_of(instance)}", http=406)
    headers = {"ETag": etag([instance], True, syntax)}
    if known := not_modified(request, headers["ETag"]):
        return known
    if syntax != syntax_of(instance):
        return _one_converted(archive, instance, syntax, headers, single=True, lenient=False)
    return Streamed(archive.pieces(_whole(instance)), 200, {**headers, "Content-Length": str(instance.length)}, DICOM)


def _one_converted(
    archive: Archive, instance: StoredInstance, syntax: str, headers: dict[str, str], *, single: bool, lenient: bool
) -> Response:
    """One instance in another syntax; 406 where it cannot be had, or as it lies where no syntax was asked for."""
    try:
        body = meta_of(instance, syntax) + archive.converted(instance, syntax)
    except NotConverted as error:
        if not lenient:
            raise WebError(f"{UID(syntax_of(instance)).name}: {error}", http=406) from None
        syntax = syntax_of(instance)
        body = archive.read(instance, 0, instance.length)
    if single:
        return Response(body, headers=headers, media_type=DICOM)
    parts = Parts(DICOM)
    return Response(parts.head(_type(syntax)) + body + parts.end, headers=headers, media_type=parts.media_type)


def _wants_single(ranges: Sequence[MediaRange]) -> bool:
    """Whether a body without parts is what is wanted."""
    named = [one for one in ranges if one.quality and one.type in (DICOM, "multipart/related", "application/*")]
    return bool(named) and named[0].type == DICOM


def _wanted(ranges: Sequence[MediaRange]) -> list[str]:
    """Transfer syntaxes by preference: "*" for any, "" where the range names none (PS3.18 8.7.3.5)."""
    wanted: list[str] = []
    for one in ranges:
        if one.quality and _kind(one).covers(DICOM):
            everything = one.type in ("*/*", "application/*")
            wanted.append(one.parameters.get("transfer-syntax", "*" if everything else ""))
    return wanted


def _refused(ranges: Sequence[MediaRange]) -> set[str]:
    """Transfer syntaxes that are named as not acceptable (RFC 9110 12.4.2), whatever other ranges cover them."""
    named = {
        one.parameters.get("transfer-syntax", "") for one in ranges if not one.quality and _kind(one).covers(DICOM)
    }
    return named - {"", "*"}


def _kind(one: MediaRange) -> MediaRange:
    """The range of the parts' type, where it is of a body of parts."""
    kind = one.parameters.get("type", DICOM) if one.type == "multipart/related" else one.type
    return MediaRange(kind.lower())


def route(instance: StoredInstance, wanted: Sequence[str], refused: Collection[str] = ()) -> str | None:
    """The transfer syntax in which an instance goes out; None where it cannot be had in any that is wanted.

    Where none is named it is Explicit VR Little Endian, if the instance can be had in it.
    """
    stored = syntax_of(instance)
    offered: list[str] = [stored, *(TARGETS if stored in CONVERTIBLE else ())]
    for syntax in wanted:
        if syntax == "*":
            choice = offered
        elif not syntax:
            choice = [EXPLICIT, stored] if EXPLICIT in offered else [stored]
        else:
            choice = [syntax] if syntax in offered else []
        for one in choice:
            if one not in refused:
                return one
    return None


_PROBE = Parts(DICOM)


def _length(instances: Sequence[StoredInstance], *, single: bool) -> int:
    if single:
        return instances[0].length
    heads = sum(len(_PROBE.head(_type(syntax_of(one)))) for one in instances)
    return heads + sum(one.length for one in instances) + len(_PROBE.end)


def _type(syntax: str) -> str:
    return f"{DICOM}; transfer-syntax={syntax}"


def _whole(instance: StoredInstance) -> Range:
    return Range(instance.bundle, instance.offset, instance.length)


def _multipart(archive: Archive, sent: Sequence[tuple[StoredInstance, str]], parts: Parts) -> Body:
    """Every instance as a part. What cannot be converted after all goes out as it lies: its head says how."""
    ranges = [_whole(one) if syntax == syntax_of(one) else range_of(one) for one, syntax in sent]
    with closing(archive.bodies(ranges)) as bodies:
        for (instance, syntax), pieces in zip(sent, bodies, strict=True):
            body = None if syntax == syntax_of(instance) else _converted(archive, instance, syntax, pieces)
            if body is not None:
                yield parts.head(_type(syntax)) + body
                continue
            yield parts.head(_type(syntax_of(instance)))
            yield from pieces if syntax == syntax_of(instance) else archive.pieces(_whole(instance))
        yield parts.end


def _converted(archive: Archive, instance: StoredInstance, syntax: str, pieces: Iterator[memoryview]) -> bytes | None:
    try:
        return meta_of(instance, syntax) + archive.converted(instance, syntax, pieces)
    except NotConverted as error:
        log.warning("not converted instance=%s: %s", hashed(instance.SOPInstanceUID), error)
        return None


def meta_of(instance: StoredInstance, syntax: str) -> bytes:
    """The File Meta Information of a converted instance."""
    return file_meta(
        sop_class_uid=instance.SOPClassUID, sop_instance_uid=instance.SOPInstanceUID, transfer_syntax_uid=syntax
    )
