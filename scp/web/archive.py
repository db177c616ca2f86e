"""What the retrieve transactions work with: which instances a URL names, and their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from starlette.requests import Request
from starlette.responses import Response

from sphere.catalog.queries import Queries
from sphere.catalog.service import StoredInstance
from sphere.ingest.storage.base import Readable
from sphere.scp.retrieve.outbound import Converter, range_of, syntax_of
from sphere.scp.retrieve.read_ahead import Range, ReadAhead
from sphere.scp.retrieve.transcode import NotConverted
from sphere.scp.retrieve.transcoder import MAX_SOURCE
from sphere.scp.web.known import KnownSeries
from sphere.scp.web.operations import grant_of, uids
from sphere.scp.web.problem import WebError

PIECE = 1 << 20  # bytes handed on at once


@dataclass(frozen=True, slots=True)
class Archive:
    """The catalog, the bytes, and what changes their transfer syntax."""

    catalog: Queries
    storage: Readable
    converter: Converter
    known: KnownSeries
    parts: MutableMapping[Queries, KnownSeries] = field(default_factory=WeakKeyDictionary)

    def of(self, request: Request) -> Archive:
        """The archive as the caller may see it: what is not granted is not there. Every handler asks this one."""
        catalog = as_seen(self.catalog, request)
        if catalog is self.catalog:
            return self
        return replace(self, catalog=catalog, known=self.parts.setdefault(catalog, KnownSeries(catalog)))

    def instances(self, request: Request) -> list[StoredInstance]:
        """Those of the study, series or instance in the path that the caller may see, each once; raises WebError (404)
        where there is none."""
        return self.of(request).located(**uids(request))

    def located(self, study: str, series: str = "", instance: str = "") -> list[StoredInstance]:
        """Those of a study, or of them those of a series or with a SOPInstanceUID; raises WebError (404)."""
        if instance:
            one = self.known.instance(study, series, instance)
            found = iter(() if one is None else (one,))
        else:
            found = self.catalog.lookup_instances(study=[study], series=[series] if series else [])
        instances = list({one.SOPInstanceUID: one for one in found}.values())
        if not instances:
            raise WebError(f"there is no such {'instance' if instance else 'series' if series else 'study'}", http=404)
        return instances

    def read(self, instance: StoredInstance, offset: int, length: int) -> bytes:
        """Bytes of the member, counted from its first one."""
        return self.storage.read(instance.bundle, instance.offset + offset, length)

    def bodies(self, ranges: Sequence[Range]) -> Generator[Iterator[memoryview], None, None]:
        """The bytes of each range in turn, in pieces; read by a thread of its own until closed."""
        with ReadAhead(self.storage, ranges) as reader:
            for _ in ranges:
                yield (part for whole in reader.next() for part in _cut(whole))

    def pieces(self, one: Range) -> Generator[memoryview, None, None]:
        """The bytes of one range."""
        for body in self.bodies([one]):
            yield from body

    def converted(self, instance: StoredInstance, target: str, pieces: Iterable[memoryview] | None = None) -> bytes:
        """The data set of an instance in another transfer syntax; raises NotConverted."""
        size = instance.length - instance.dataset_offset
        if size > MAX_SOURCE:
            raise NotConverted(f"too large to be converted ({size >> 20} MiB)")
        one = range_of(instance)
        data = self.storage.read(one.bundle, one.offset, one.length) if pieces is None else b"".join(pieces)
        return self.converter.convert(data, syntax_of(instance), target)


def as_seen(catalog: Queries, request: Request) -> Queries:
    """The catalog as the caller may see it."""
    grant = grant_of(request)
    return catalog if grant is None else catalog.restricted(grant)


def _cut(whole: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(whole), PIECE):
        yield whole[start : start + PIECE]


def etag(instances: Iterable[StoredInstance], *more: object) -> str:
    """A strong entity tag: the bytes of some instances, and what else a representation depends on."""
    digest = hashlib.sha256()
    for text in (*sorted(one.sha256 for one in instances), *map(str, more)):
        digest.update(f"{len(text)}:{text}".encode())
    return f'"{digest.hexdigest()[:32]}"'


def not_modified(request: Request, tag: str) -> Response | None:
    """304 where the client has this representation (RFC 9110 13.1.2)."""
    known = ",".join(request.headers.getlist("if-none-match"))
    if known and any(one.strip().removeprefix("W/") in (tag, "*") for one in known.split(",")):
        return Response(status_code=304, headers={"ETag": tag})
    return None
