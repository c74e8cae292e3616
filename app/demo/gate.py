"""What stands before every request: who may come in, from where, how much they may send, and who
they are; and what a page may load."""

import base64
import hmac
import secrets
from http.cookies import CookieError, SimpleCookie

from vdit_sparse.app.demo.limits import Limits

COOKIE = "studio"
YEAR = 365 * 24 * 3600
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Scripts and fonts come from here alone; Gradio's own pages build code from text.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]


class Gate:
    """ASGI middleware. Answers 401 without the password, 413 for too much, and 403 under a name
    that is not the loopback's where the studio is bound to it (a page elsewhere could make a
    browser ask)."""

    def __init__(self, app, limits: Limits, auth: tuple[str, str] | None, loopback: bool):
        self.app, self.limits, self.loopback = app, limits, loopback
        self.auth = None if auth is None else base64.b64encode(":".join(auth).encode())

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        status = self.refusal(headers)
        if status is not None:
            await _answer(send, *status)
            return
        secret = secret_of(headers.get(b"cookie", b"").decode("latin-1"))
        scope["studio_secret"] = secret or secrets.token_urlsafe(24)
        new = secret is None
        counted = _Counted(receive, self.limits.body)
        try:
            await self.app(scope, counted, _marked(send, scope["studio_secret"] if new else None))
        except TooMuch:
            await _answer(send, 413, "Too much was sent.")

    def refusal(self, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """(status, words) for a request that may not come in, or None."""
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].strip("[]")
        if self.loopback and host not in LOOPBACK:
            return 403, "This studio answers to localhost only."
        if self.auth is not None:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"basic" or not hmac.compare_digest(given.strip(), self.auth):
                return 401, "This studio needs its user name and password."
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.body:
            return 413, f"At most {self.limits.body:,} bytes can be sent."
        return None


class TooMuch(Exception):
    """A body without a length went over the limit."""


class _Counted:
    """Receives a body, and raises TooMuch when it is longer than `most`."""

    def __init__(self, receive, most: int):
        self.receive, self.left = receive, most

    async def __call__(self) -> dict:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            raise TooMuch
        return message


def secret_of(cookies: str) -> str | None:
    """The user's secret in a Cookie header."""
    try:
        found = SimpleCookie(cookies).get(COOKIE)
    except CookieError:
        return None
    return found.value if found is not None and 20 <= len(found.value) <= 100 else None


def _marked(send, secret: str | None):
    """`send` with our headers, and a cookie for a new user."""
    added = list(HEADERS)
    if secret is not None:
        cookie = f"{COOKIE}={secret}; Path=/; Max-Age={YEAR}; HttpOnly; SameSite=Strict"
        added.append((b"set-cookie", cookie.encode()))

    async def marked(message: dict) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return marked


async def _answer(send, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="vdit-sparse studio", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})
