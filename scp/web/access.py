"""Who asks, and what they may: loopback, API tokens, bearer tokens of a provider; in front of every route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sphere.catalog.cohorts import Cohorts
from sphere.catalog.grant import Grant
from sphere.conf.errors import SphereError
from sphere.conf.settings import Web
from sphere.scp.web.browsers import is_foreign
from sphere.scp.web.local import is_local
from sphere.scp.web.oidc import Known, Oidc
from sphere.scp.web.problem import problem
from sphere.scp.web.tokens import PREFIX, ROLES, Role, Token, Tokens

OPEN: Final = frozenset(("/", "/healthz", "/readyz", "/openapi.json", "/viewer"))  # nothing in them is of patients
OPEN_BELOW: Final = ("/page/", "/viewer/")  # files of the pages: what they show, they ask for with a token
NEEDED: Final[dict[str, Role]] = {**dict.fromkeys(("GET", "HEAD", "OPTIONS"), "researcher"), "POST": "writer"}
"""The least role for a method; any other needs an admin. What a researcher may get, operations say (`in_part`)."""
ANNOTATING: Final = ("/annotations", frozenset(("PUT", "DELETE")))
"""Below this path these methods change what a writer adds, and keep what was before."""
LOCAL: Final = "local"  # who asks from this host without a token
CHECKS: Final = 8  # tokens of each kind that are checked at once
ROLE_TOLD: Final = "/status"  # answers below it, refusals too, say the role: the page shows what it may
MAX_TOKEN: Final = 16 << 10  # characters


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks; `role` None: known, and without a role here. A researcher sees `grant`, others everything."""

    who: str
    role: Role | None
    grant: Grant | None = None

    def may(self, method: str, path: str) -> bool:
        """Whether the role suffices."""
        return self.role is not None and ROLES.index(self.role) >= ROLES.index(needed(method, path))


def needed(method: str, path: str) -> Role:
    """The least role for a request."""
    if path.startswith(f"{ANNOTATING[0]}/") and method in ANNOTATING[1]:
        return "writer"
    return NEEDED.get(method, "admin")


class Access:
    """ASGI middleware: 401 for who is not known, 403 for who may not; the others go on with `state["who"]`, and with
    what they may see in `state["grant"]`."""

    def __init__(self, app: ASGIApp, settings: Web, tokens: Tokens, cohorts: Cohorts, oidc: Oidc | None) -> None:
        self._app, self._settings = app, settings
        self._tokens, self._cohorts, self._oidc = tokens, cohorts, oidc
        # threads of their own: a provider, or a storage, that does not answer holds up nobody else
        self._by_archive, self._by_provider = CapacityLimiter(CHECKS), CapacityLimiter(CHECKS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN or scope["path"].startswith(OPEN_BELOW):
            await self._app(scope, receive, send)
            return
        try:
            found = await self._principal(scope)
        except SphereError as error:
            await problem(503, f"who asks cannot be checked now: {error}", close=True)(scope, receive, send)
            return
        if found is None:
            text = "a token of this archive, or of its provider, is needed"
            await problem(401, text, close=True)(scope, receive, send)
            return
        scope.setdefault("state", {}).update(who=found.who, role=found.role or "", grant=found.grant)
        if scope["path"].startswith(ROLE_TOLD):
            send = _with_role(send, found.role or "")
        if found.who == LOCAL and is_foreign(scope):
            text = "a page of another origin may not ask without a token"
            await problem(403, text, close=True)(scope, receive, send)
            return
        if not found.may(scope["method"], scope["path"]):
            text = f"{scope['method']} needs the role {needed(scope['method'], scope['path'])}"
            await problem(403, text, close=True)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _principal(self, scope: Scope) -> Principal | None:
        headers = Headers(scope=scope)
        kind, _, secret = headers.get("authorization", "").partition(" ")
        if not kind:
            return Principal(LOCAL, "admin") if is_local(scope, self._settings) else None
        secret = secret.strip()
        if kind.lower() != "bearer" or not 0 < len(secret) <= MAX_TOKEN:
            return None
        limiter = self._by_archive if secret.startswith(PREFIX) else self._by_provider
        return await to_thread.run_sync(self._shown, secret, limiter=limiter)

    def _shown(self, secret: str) -> Principal | None:
        """Whose token it is; raises StorageError."""
        if secret.startswith(PREFIX):
            token = self._tokens.check(secret)
            return self._principal_of(f"token:{token.id}:{token.name}", token) if token else None
        known = self._oidc.check(secret) if self._oidc else None
        return self._principal_of(f"oidc:{known.subject}", known) if known else None

    def _principal_of(self, who: str, shown: Token | Known) -> Principal:
        if shown.role != "researcher":
            return Principal(who, shown.role)
        return Principal(who, shown.role, self._cohorts.grant(shown.collections, shown.cohorts))


def _with_role(send: Send, role: str) -> Send:
    """The same, with a header that tells who asks their role."""

    async def telling(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"x-sphere-role", role.encode())]}
        await send(message)

    return telling
