"""The ASGI application: routes, and what becomes of errors."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sphere.catalog.annotations import Annotations
from sphere.catalog.audit import AuditJournal
from sphere.catalog.cohorts import Cohorts
from sphere.catalog.overview import Overview
from sphere.catalog.queries import Queries
from sphere.catalog.tombstones import Tombstones
from sphere.catalog.withdrawn import Withdrawn
from sphere.conf.errors import SphereError
from sphere.conf.settings import Settings
from sphere.scp.upper.dataset import Budget
from sphere.scp.web import annotations as annotating
from sphere.scp.web import (
    bulk,
    capabilities,
    deleting,
    frames,
    health,
    metadata,
    operations,
    page,
    rendered,
    retrieve,
    search,
    status,
    stow,
    viewer,
    wado_uri,
)
from sphere.scp.web.access import Access
from sphere.scp.web.archive import Archive
from sphere.scp.web.audit import Audited
from sphere.scp.web.browsers import Sheltered
from sphere.scp.web.fair import Fair
from sphere.scp.web.landed import Arrivals
from sphere.scp.web.oidc import Oidc
from sphere.scp.web.pixels import PixelReader
from sphere.scp.web.problem import problem
from sphere.scp.web.proxies import Proxied, Trusted
from sphere.scp.web.stow import Store
from sphere.scp.web.tokens import Tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes ask."""

    finder: Queries
    archive: Archive
    store: Store
    tokens: Tokens
    cohorts: Cohorts
    journal: AuditJournal
    annotations: Annotations
    overview: Overview
    tombstones: Tombstones


def make_app(settings: Settings, services: Services) -> Starlette:
    """The application of one archive."""
    metrics = health.Metrics()
    offered = [*health.offered(settings, metrics), *search.offered(services.finder)]
    for module in (retrieve, metadata, bulk):
        offered += module.offered(services.archive)
    reader = PixelReader(services.archive)
    for module in (frames, rendered, wado_uri):
        offered += module.offered(services.archive, reader)
    landing = stow.Landing(
        services.store,
        settings.archive.state_dir / "incoming",
        Budget(settings.storage.memory_mib << 20),
        settings.web.idle_s,
        read_only=settings.web.read_only,
    )
    offered += stow.offered(landing)
    web = settings.web
    offered += deleting.offered(deleting.Deleting(services.finder, services.tombstones, web.delete, web.read_only))
    indexed = settings.catalog.mode == "delta"
    catalog = services.archive.catalog
    withdrawn = Withdrawn(services.tombstones, catalog)
    linked = annotating.Service(services.annotations, catalog, web.idle_s, web.read_only, indexed, withdrawn)
    offered += annotating.offered(linked)
    arrivals = Arrivals(services.archive.storage, settings.archive.state_dir)
    state = status.State(settings, arrivals, services.overview, services.finder, services.tombstones)
    offered += status.offered(state)
    offered += capabilities.offered(offered)
    offered.append(operations.openapi(offered))
    oidc = Oidc(settings.web) if settings.web.oidc_jwks else None
    app = Starlette(
        routes=[*operations.routes(offered), *page.routes(), *viewer.routes(settings.web)],
        middleware=[
            Middleware(Sheltered),
            Middleware(Proxied, trusted=Trusted(web.trusted_proxies)),
            Middleware(health.Measured, metrics=metrics),
            Middleware(Audited, journal=services.journal),
            Middleware(Answered),
            Middleware(Access, settings=settings.web, tokens=services.tokens, cohorts=services.cohorts, oidc=oidc),
            Middleware(Fair, most=settings.web.max_queries),
        ],
        exception_handlers={SphereError: _of_sphere, HTTPException: _of_http},
    )
    app.router.redirect_slashes = False
    app.state.public_url = web.public_url
    return app


class Answered:
    """ASGI middleware: a defect of ours is logged without what was asked for, and answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # noqa: BLE001  it must be answered, and not shown with what was asked
            frames = traceback.extract_tb(error.__traceback__)[:-4:-1]
            at = " < ".join(f"{frame.name}:{frame.lineno}" for frame in frames)
            log.error("request failed: %s at %s", type(error).__name__, at)
            if begun:
                raise Broken from None  # the connection has to end without the end of the response
            await problem(500, f"internal error ({type(error).__name__})")(scope, receive, send)


class Broken(Exception):
    """A response that was begun cannot be ended."""


async def _of_sphere(request: Request, error: Exception) -> Response:
    assert isinstance(error, SphereError)
    if error.http >= 500:
        log.error("request failed status=%d: %s", error.http, error)
    # more of the body may be on its way
    response = problem(error.http, str(error), close=request.method in ("POST", "PUT"))
    if retry_after := getattr(error, "retry_after", 0):
        response.headers["Retry-After"] = str(retry_after)
    return response


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = problem(error.status_code, _detail(request, error))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


def _detail(request: Request, error: HTTPException) -> str:
    """What is said; where no route has the path, that it may be there without a slash at its end."""
    if error.status_code != 404 or error.detail != HTTPStatus.NOT_FOUND.phrase:
        return str(error.detail)
    slash = ": a path has no slash at its end" if request.url.path.endswith("/") else ""
    return f"there is no such resource{slash}"
