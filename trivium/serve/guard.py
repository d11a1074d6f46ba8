"""What stands between the network and the application: the key, the host, the origin, the headers."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trivium.serve.failures import RequestRefused, refusal_response
from trivium.serve.measures import Measures

PAGE = {"/": "index.html"} | {
    f"/{name}": name
    for name in ("page.css", "page.js", "settings.js", "words.js", "tree.js", "elements.js", "attachments.js")
}
OPEN_TO_ALL = {*PAGE, "/health"}
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "media-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Refuses who may not enter, and puts the security headers on everything that leaves."""

    def __init__(
        self,
        application: ASGIApp,
        *,
        key: str | None,
        local_only: bool,
        origins: Sequence[str],
        measures: Measures,
    ):
        self._application, self._local_only = application, local_only
        self._key = None if key is None else key.encode("utf-8")
        self._origins, self._measures = frozenset(origins), measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                leaving = MutableHeaders(raw=message["headers"])
                for name, value in HEADERS.items():
                    leaving.setdefault(name, value)
                if scope["path"] not in PAGE:
                    leaving.setdefault("Cache-Control", "no-store")
                route = scope.get("route")
                path = getattr(route, "path", "unknown")
                self._measures.count("trivium_requests_total", route=path, status=str(message["status"]))
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal_response(refusal)(scope, receive, dressed)
        else:
            await self._application(scope, receive, dressed)

    def _refusal(self, scope: Scope, headers: Headers) -> RequestRefused | None:
        host = headers.get("host", "")
        # A page elsewhere can point its own name at 127.0.0.1 and would then be of "the same origin".
        if self._local_only and _host_name(host) not in LOCAL_HOSTS:
            return RequestRefused("this server answers only to localhost", status=403, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and _address(origin) != host:
            problem = "requests from other web sites are not served; allow theirs with --allow-origin"
            return RequestRefused(problem, status=403, code="wrong_origin")
        preflight = scope["method"] == "OPTIONS" and origin is not None
        if self._key is None or scope["path"] in OPEN_TO_ALL or preflight:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            return None
        problem = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
        return RequestRefused(problem, status=401, code="invalid_api_key")


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _address(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
