"""What stands around an application that has no passwords: who is answered, how much is read, what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
import re

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip2x.tasks.serving.server import is_this_machine

MOST_JSON = 64 * 1024  # bytes of a request but for the picture


def page_policy(page: str) -> str:
    """A policy for contents by which only the page's own styles and script count, and nothing is loaded from elsewhere."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Guard:
    """Around everything: names of other machines refused, long JSON refused, headers set.

    Other sites' pages cannot read what is answered, nor can they send what is answered to: neither image/* nor
    application/json goes to another origin without being allowed. But a site can have its own name point to 127.0.0.1
    (DNS rebinding), and is then no other origin. So where only this machine can connect, only its own names are answered.
    Bound to another address, the server does not know its names.
    """

    def __init__(self, app: ASGIApp, *, only_this_machine: bool, policy: str):
        self.app, self.only_this_machine = app, only_this_machine
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it."""
        if scope["type"] != "http":
            return
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > MOST_JSON:
                raise HTTPException(413, f"the request has more than {MOST_JSON} bytes")
            return message

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        host = Headers(scope=scope).get("host", "")
        if self.only_this_machine and not is_this_machine(re.sub(r":\d*$", "", host)):
            sentence = f"this server answers to localhost and 127.0.0.1 only, not to {host[:100]!r}"
            await JSONResponse({"error": sentence}, 403)(scope, receive, guarded)
            return
        await self.app(scope, receive if scope["path"] == "/api/images" else bounded, guarded)
