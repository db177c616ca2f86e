"""QIDO-RS: the search transaction (PS3.18 10.6) over the query service that answers C-FIND."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import chain, islice
from typing import Protocol
from urllib.parse import urlencode

import orjson
from starlette.requests import Request
from starlette.responses import Response

from sphere.catalog.asof import AsOf
from sphere.catalog.cancel import Cancelled, never
from sphere.catalog.queries import Queries
from sphere.catalog.query import Query
from sphere.catalog.schema import Level
from sphere.catalog.service import Match
from sphere.conf.errors import CatalogError
from sphere.scp.web.accept import accepted, choose
from sphere.scp.web.archive import as_seen
from sphere.scp.web.dicom_json import Element, as_object
from sphere.scp.web.multipart import Parts
from sphere.scp.web.native_xml import native_model
from sphere.scp.web.operations import PREFIX, Operation, parameter, root_of, service_root, uids
from sphere.scp.web.problem import WebError
from sphere.scp.web.search_request import Search, parse_search
from sphere.scp.web.streamed import Body, Streamed
from sphere.scp.web.wire import GONE

JSON, XML = "application/dicom+json", "application/dicom+xml"
PAGE = 200  # answers of a piece of a response
ANCHORED = 1000
"""Answers of a page with `limit` that wait until its head can name the place of the next page by the last of them; of a
larger page the rest is passed over by number."""
AGENT = "SPHERE"
NAMES = {"study": "StudyInstanceUID", "series": "SeriesInstanceUID", "instance": "SOPInstanceUID"}

_PATHS: dict[Level, tuple[str, ...]] = {
    "STUDY": ("StudyInstanceUID",),
    "SERIES": ("StudyInstanceUID", "SeriesInstanceUID"),
    "IMAGE": ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"),
}
_FOLDERS = ("studies", "series", "instances")


class Finder(Protocol):
    """What the query service does for us."""

    def find(self, query: Query, *, as_of: AsOf | None = None, cancelled: Cancelled = never) -> Iterator[Match]:
        """The matches, in the order of their unique keys, until `cancelled`; raises QueryError, CatalogError."""

    def count(self, query: Query, *, as_of: AsOf | None = None, cancelled: Cancelled = never) -> int:
        """How many match."""

    def newest(self) -> AsOf:
        """The version that is complete now; raises CatalogError."""


def offered(finder: Queries) -> list[Operation]:
    """The six resources of PS3.18 Table 10.6.1-1."""

    def resource(level: Level, path: str, summary: str) -> Operation:
        def search(request: Request) -> Response:
            scope = {NAMES[name]: uid for name, uid in uids(request).items()}
            return answer(as_seen(finder, request), request, level, scope)

        return Operation(
            "GET", PREFIX + path, search, summary, "QIDO-RS", (JSON, XML), _PARAMETERS, others=(204,), in_part=True
        )

    return [
        resource("STUDY", "/studies", "Search for studies"),
        resource("SERIES", "/studies/{study}/series", "Search for the series of a study"),
        resource("IMAGE", "/studies/{study}/instances", "Search for the instances of a study"),
        resource("IMAGE", "/studies/{study}/series/{series}/instances", "Search for the instances of a series"),
        resource("SERIES", "/series", "Search for series"),
        resource("IMAGE", "/instances", "Search for instances"),
    ]


def answer(finder: Finder, request: Request, level: Level, scope: dict[str, str]) -> Response:
    """Search, and answer with what was found, a page at a time."""
    media_type = choose(accepted(request), (JSON, XML, "application/json"))
    search = parse_search(request.query_params.multi_items(), level, scope)
    try:
        if search.now:  # once: what is found, its number and the next pages are of one version
            search = replace(search, as_of=finder.newest())
        return _answer(finder, request, search, media_type)
    except CatalogError as error:
        if search.as_of is not None or search.now:
            raise WebError(str(error), http=404) from None
        raise


def _answer(finder: Finder, request: Request, search: Search, media_type: str) -> Response:
    gone: Cancelled = request.scope.get("extensions", {}).get(GONE, never)
    passed, matches = _beyond(finder.find(search.query, as_of=search.as_of, cancelled=gone), search)
    chosen = islice(matches, search.limit)
    first = list(islice(chosen, PAGE if search.limit is None else min(search.limit, ANCHORED)))
    headers: list[tuple[str, str]] = []
    total = finder.count(search.query, as_of=search.as_of, cancelled=gone) if search.count else None
    if total is not None:
        headers.append(("X-Total-Count", str(total)))
    if search.limit and len(first) == min(search.limit, ANCHORED):
        total = finder.count(search.query, as_of=search.as_of, cancelled=gone) if total is None else total
        headers += _more(request, search, total - passed, first)
    request.state.found = len(first)
    if not first:
        response = Response(status_code=204)
    else:
        base = service_root(request)
        given = chain(first, _counted(request, chosen))
        objects = (as_object(one, retrieve_url(base, one)) for one in given)
        response = _response(objects, media_type, whole=len(first) < PAGE)
    for name, value in headers:
        response.headers.append(name, value)
    return response


def _counted(request: Request, matches: Iterator[Match]) -> Iterator[Match]:
    """The matches, each counted for the audit record when it is given."""
    for one in matches:
        request.state.found += 1
        yield one


def _beyond(matches: Iterator[Match], search: Search) -> tuple[int, Iterator[Match]]:
    """What is left when the answers up to `after` and the next `offset` ones were passed over, and how many these were.

    Passing over by place, not by number, is what makes pages stable: whatever arrives or goes between two of them,
    nothing that stays is given twice or left out.
    """
    passed = 0
    if search.after:
        for one in matches:
            if _place(one) > search.after:
                matches = chain([one], matches)
                break
            passed += 1
    for _ in islice(matches, search.offset):
        passed += 1
    return passed, matches


def _place(match: Match) -> tuple[str, ...]:
    """What orders the answers: unique keys from the study down."""
    uids = {key.keyword: match.columns.get(key.tag) for key in match.keys if key.keyword in _PATHS["IMAGE"]}
    return tuple(str(uids.get(keyword) or "") for keyword in _PATHS[match.level])


def _more(request: Request, search: Search, left: int, first: Sequence[Match]) -> list[tuple[str, str]]:
    """What tells that there are more answers than `limit` lets through (PS3.18 8.3.4.4).

    `left` answers are not passed over, of which `first` come in this page.
    """
    assert search.limit is not None
    left -= search.limit
    if left <= 0:
        return []
    rest = [pair for pair in request.query_params.multi_items() if pair[0] not in ("offset", "after", "asOf")]
    if search.as_of is not None:
        rest.append(("asOf", search.as_of.isoformat() if isinstance(search.as_of, datetime) else str(search.as_of)))
    rest.append(("after", "\\".join(_place(first[-1]))))
    if search.limit > len(first):
        rest.append(("offset", str(search.limit - len(first))))
    url = f"{root_of(request)}{request.url.path}?{urlencode(rest)}"
    text = f"There are {left} additional results that can be requested"
    return [("Warning", f'299 {AGENT} "{text}"'), ("Link", f'<{url}>; rel="next"')]


def retrieve_url(base: str, match: Match) -> str:
    """Where the entity can be retrieved (PS3.18 10.6.3.3)."""
    uids = {key.keyword: match.columns.get(key.tag) for key in match.keys if key.keyword in _PATHS["IMAGE"]}
    steps = [f"{folder}/{uids.get(keyword)}" for folder, keyword in zip(_FOLDERS, _PATHS[match.level], strict=False)]
    return "/".join([base, *steps])


def _response(objects: Iterator[dict[str, Element]], media_type: str, *, whole: bool) -> Response:
    if media_type == XML:
        parts = Parts(XML)
        return Streamed(parts.bodies(map(native_model, objects)), media_type=parts.media_type)
    if whole:
        return Response(orjson.dumps(list(objects)), media_type=media_type)
    return Streamed(_json_array(objects), media_type=media_type)


def _json_array(objects: Iterator[dict[str, Element]]) -> Body:
    opening = b"["
    while page := list(islice(objects, PAGE)):
        yield opening + orjson.dumps(page)[1:-1]
        opening = b","
    yield b"]"


_PARAMETERS = (
    parameter("limit", {"type": "integer", "minimum": 0}, "At most so many results."),
    parameter("offset", {"type": "integer", "minimum": 0}, "Results to pass over."),
    parameter("after", {"type": "string"}, "The place where the page before ended, as its Link says."),
    parameter("includefield", {"type": "string"}, "Attributes to return, separated by commas, or `all`."),
    parameter("fuzzymatching", {"type": "boolean"}, "Match person names that sound alike."),
    parameter("emptyvaluematching", {"type": "boolean"}, "A value of two quotes finds what has no value."),
    parameter("multiplevaluematching", {"type": "boolean"}, "Values separated by backslashes must all be there."),
    parameter("count", {"type": "boolean"}, "Tell the number of all matches in X-Total-Count."),
    parameter("asOf", {"type": "string"}, "A version of the catalog, a time, or now: what is complete then."),
    parameter("PatientID", {"type": "string"}, "So with every attribute: keyword, tag, or path with full stops."),
)
