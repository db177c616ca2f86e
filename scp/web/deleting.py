"""DELETE of studies, series and instances: they are shown no more, and their bytes stay until compaction.

PS3.18 has no such transaction; the paths are those of its retrieve transaction (10.4). See
docs/decisions/0031-tombstones.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from sphere.catalog.annotations import MAX_TEXT, plain_text
from sphere.catalog.queries import Queries
from sphere.catalog.tombstones import Tombstones
from sphere.scp.web.operations import PREFIX, Operation, parameter, uids
from sphere.scp.web.problem import WebError

REASON: Final = "reason"


@dataclass(frozen=True, slots=True)
class Deleting:
    """What deleting takes; `allowed` is ``web.delete``, `read_only` is ``web.read_only``."""

    catalog: Queries
    tombstones: Tombstones
    allowed: bool
    read_only: bool


def offered(deleting: Deleting) -> list[Operation]:
    """Deleting a study, a series or an instance."""

    def delete(request: Request) -> Response:
        return _delete(deleting, request)

    paths = {"study": "/studies/{study}", "series": "/studies/{study}/series/{series}"}
    paths["instance"] = paths["series"] + "/instances/{instance}"
    asked = (parameter(REASON, {"type": "string", "maxLength": MAX_TEXT}, "Why, as the audit record is to have it"),)
    return [
        Operation("DELETE", PREFIX + path, delete, f"Show this {name} no more", "deletion", (), asked, status=204)
        for name, path in paths.items()
    ]


def _delete(deleting: Deleting, request: Request) -> Response:
    if deleting.read_only:
        raise WebError("this archive takes nothing over HTTP (web.read_only)", http=403)
    if not deleting.allowed:
        raise WebError("nothing is deleted over HTTP unless the settings say web.delete = true", http=403)
    unknown = sorted(set(request.query_params) - {REASON})
    if unknown:
        raise WebError(f"{unknown[0][:40]!r} is no parameter of this request")
    reason = plain_text(REASON, request.query_params.get(REASON, ""), limit=MAX_TEXT)
    named = uids(request)
    found = list(
        deleting.catalog.lookup_instances(
            study=[named["study"]],
            series=[named["series"]] if "series" in named else (),
            sop=[named["instance"]] if "instance" in named else (),
        )
    )
    if not found:
        raise WebError(f"there is no such {list(named)[-1]}", http=404)
    request.state.found = deleting.tombstones.delete(found, by=request.state.who, reason=reason)
    return Response(status_code=204)
