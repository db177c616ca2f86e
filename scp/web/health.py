"""/healthz, /readyz and /metrics: whether this process and the archive serve, and counts without patient data."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sphere.conf import serving
from sphere.conf.settings import Settings
from sphere.scp.web.operations import Operation
from sphere.scp.web.probe import probes
from sphere.scp.web.wire import sent_by

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of requests by route, never by what they ask for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("sphere_http_requests", "Requests answered", labels, registry=self.registry)
        self._sent = Counter("sphere_http_sent_bytes", "Bytes of response bodies", ("route",), registry=self.registry)
        self._seconds = Histogram("sphere_http_seconds", "Seconds to the end of a response", ("route",),
                                  registry=self.registry)  # fmt: skip
        self._restarts = Gauge("sphere_restarts", "Restarts of a child of sphere serve", ("child",),
                               registry=self.registry)  # fmt: skip
        self._up = Gauge("sphere_child_ready", "1 while a child serves", ("child",), registry=self.registry)
        self._bundles = Gauge("sphere_sealed_bundles", "Sealed bundles by what reading them back found", ("found",),
                              registry=self.registry)  # fmt: skip
        self._spool = Gauge("sphere_spool", "What waits in the spool, and what is damaged there", ("what",),
                            registry=self.registry)  # fmt: skip

    def answered(self, method: str, route: str, status: int, seconds: float, sent: int) -> None:
        """One request is over."""
        known = method if method in ("GET", "HEAD", "POST", "OPTIONS", "DELETE") else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._sent.labels(route).inc(sent)
        self._seconds.labels(route).observe(seconds)

    def expose(self, state: serving.ServeState | None, verified: serving.VerifyState | None) -> bytes:
        """Everything in Prometheus' text format."""
        if verified is not None:
            self._bundles.labels("good").set(verified.bundles)
            self._bundles.labels("damaged").set(verified.damaged)
            self._bundles.labels("waiting").set(verified.waiting)
        if state is not None and state.spool is not None:
            for what in ("bundles", "bytes", "damaged", "set_aside"):
                self._spool.labels(what).set(getattr(state.spool, what))
        for child in state.children if state else ():
            self._restarts.labels(child.name).set(child.restarts)
            self._up.labels(child.name).set(child.state == "ready")
        return generate_latest(self.registry)


class Measured:
    """ASGI middleware that counts what goes through."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, sent = time.monotonic(), 500, 0

        async def counted(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            sent += sent_by(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.answered(scope["method"], route, status, time.monotonic() - began, sent)


def offered(settings: Settings, metrics: Metrics) -> list[Operation]:
    """The three of them."""
    state_dir = settings.archive.state_dir
    needed, spared = probes(settings)

    async def healthz(request: Request) -> Response:  # on the event loop: no thread has to be free for it
        return JSONResponse({"status": "ok"})

    def readyz(request: Request) -> Response:
        state = serving.read(state_dir)
        missing = ["supervisor"] if state is None else state.not_ready
        away_now = [probe.name for probe in needed if probe.away()]
        missing = missing + (away_now or [needed[0].name] * (state is not None and state.refuses))
        body: dict[str, object] = {"status": "not ready" if missing else "ready", "not_ready": missing}
        if away := [probe.name for probe in spared if probe.away(wait=False)]:
            body["away"] = away
        if (verified := serving.read_verify(state_dir)) and verified.damaged:
            body["damaged_bundles"] = verified.damaged
        if state is not None and state.spool is not None and (damaged := state.spool.damaged + state.spool.set_aside):
            body["damaged_in_spool"] = damaged
        return JSONResponse(body, 503 if missing else 200)

    def expose(request: Request) -> Response:
        return Response(metrics.expose(serving.read(state_dir), serving.read_verify(state_dir)), media_type=TEXT_FORMAT)

    return [
        Operation("GET", "/healthz", healthz, "Whether this process answers", "service"),
        Operation(
            "GET", "/readyz", readyz, "Whether every part serves; 503 names those that do not", "service", others=(503,)
        ),
        Operation("GET", "/metrics", expose, "Counts in Prometheus' text format", "service", (TEXT_FORMAT,)),
    ]
