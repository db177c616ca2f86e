"""Errors as RFC 9457 problem bodies."""

from __future__ import annotations

from http import HTTPStatus

import orjson
from starlette.responses import Response

from sphere.conf.errors import SphereError

MEDIA_TYPE = "application/problem+json"
MAX_DETAIL = 500  # characters


class WebError(SphereError):
    """A request that cannot be answered as it stands; `http` is the status of the response.

    `retry_after`: seconds after which it may be asked again (RFC 9110 10.2.3); 0 says nothing.
    """

    http = 400
    retry_after = 0

    def __init__(self, message: str, *, http: int = 400, retry_after: int = 0) -> None:
        super().__init__(message)
        self.http, self.retry_after = http, retry_after


def problem(status: int, detail: str, *, close: bool = False) -> Response:
    """A response that says what is wrong; `close`: the connection ends with it, as its request was not read whole."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail[:MAX_DETAIL]}
    headers = {"Connection": "close"} if close else {}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="sphere"'
    return Response(orjson.dumps(body), status, headers, MEDIA_TYPE)
