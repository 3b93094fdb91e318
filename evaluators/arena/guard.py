"""The door of the server: what a request may be before anything else looks at it.

Gradio serves more than this page needs: uploads, files by path, a proxy for addresses. None of it is reachable here, as
only what is listed is let through. Requests from other sites are refused by their Origin, and such that reach a
loopback server under a foreign name (a rebound domain) by their Host. With a password every request must carry it.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from evaluators.arena.votes import RATER

LARGEST = 16 * 1024  # bytes of a request's body: the largest that the page sends has a few hundred
LOOPBACK = ("127.0.0.1", "localhost", "::1")
RATER_NAMED: ContextVar[str | None] = ContextVar("RATER_NAMED", default=None)
"""The name under which the request at hand gave the password; None where none is asked for."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_NEEDED = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/(?:assets|static|svelte)/[A-Za-z0-9_./-]+"
    r"|/gradio_api/(?:component_server/?|heartbeat/[a-z0-9]+|theme\.css|app_id|startup-events)"
)
_HOST = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<six>[0-9A-Fa-f:.]+)\])(?::\d+)?")
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,  # nothing is fetched from elsewhere, whatever a prompt says
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application in front of another.

    Args:
        app: the one behind it.
        password: demanded of every request, by HTTP's basic scheme; None for none.
        hosts: names under which the server may be reached; None for any.
    """

    def __init__(self, app: App, *, password: str | None, hosts: tuple[str, ...] | None) -> None:
        self.app, self.password, self.hosts = app, password, hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a WebSocket is closed by the server when its application returns
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        body = await _body(receive, headers)
        if body is None:
            await _answer(send, 413, "The request is too large.")
            return
        rest = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            for message in rest:
                return message
            return await receive()  # says when the browser goes away

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message.get("headers", ())}
                extra = [
                    (name.encode(), value.encode()) for name, value in _HEADERS.items() if name.encode() not in own
                ]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        token = RATER_NAMED.set(self._rater(headers))
        try:
            await self.app(scope, replay, headed)
        finally:
            RATER_NAMED.reset(token)

    def _refused(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return 421, "This is not the name of this server."
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "Requests from other sites are refused."
        if self.password is not None and self._rater(headers) is None:
            return 401, "Your name and the password, please."
        path = scope["path"]
        if not _NEEDED.fullmatch(path) or ".." in path or scope["method"] not in ("GET", "HEAD", "POST"):
            return 404, "Not found."
        if scope["method"] == "POST" and path.rstrip("/") != "/gradio_api/component_server":
            return 405, "Not allowed."
        return None

    def _rater(self, headers: dict[str, str]) -> str | None:
        """The name in the request's credentials, where its password is right."""
        if self.password is None:
            return None
        scheme, _, packed = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            name, _, given = base64.b64decode(packed, validate=True).decode("utf-8").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        right = hmac.compare_digest(given.encode(), self.password.encode())
        return name if right and RATER.fullmatch(name) else None


def _name(host: str) -> str:
    """The name in a Host header, without its port and the brackets of an IPv6 address; empty where there is none."""
    match = _HOST.fullmatch(host)
    return (match["name"] or match["six"]).lower() if match else ""


async def _body(receive: Receive, headers: dict[str, str]) -> bytes | None:
    """The request's body; None where it is larger than `LARGEST`, whatever its headers say."""
    if int(headers["content-length"] if headers.get("content-length", "").isdecimal() else 0) > LARGEST:
        return None
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > LARGEST:
            return None
        parts.append(part)
        if message["type"] != "http.request" or not message.get("more_body"):
            return b"".join(parts)


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    headers += [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="mmalign arena", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
