"""What stands before the server's routes: API key, body size, rate and concurrency. Plain ASGI."""

import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from jaxengine.serve.openai_api import error_body

type Scope = MutableMapping[str, Any]
type App = Callable[[Scope, Callable, Callable], Awaitable[None]]

OPEN_PATHS = frozenset({"/health"})
"""What a load balancer may ask without a key, and at any rate."""

MAX_CLIENTS = 10_000
"""Clients whose rate is remembered; beyond it, those who are idle are forgotten."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may do.

    Attributes:
      api_key: Asked for as `Authorization: Bearer ...`; None for no key.
      max_body_bytes: Longest request.
      max_requests: Most requests under way at once, of all clients.
      requests_per_minute: Of each client, by its address; None for no limit.
    """

    api_key: str | None = None
    max_body_bytes: int = 8 << 20
    max_requests: int = 1024
    requests_per_minute: int | None = None


class Guard:
    """Refuses a request, or lets it through to the routes."""

    def __init__(self, app: App, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._num_requests = 0
        self._buckets: dict[str, tuple[float, float]] = {}

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        """Handles one connection's request."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        refusal = self._refuse(scope)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        self._num_requests += 1
        try:
            await self._app(scope, _Counted(receive, self._limits.max_body_bytes), send)
        finally:
            self._num_requests -= 1

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        """Status and message, where the request goes no further."""
        limits = self._limits
        headers = {name.lower(): value for name, value in scope["headers"]}
        if limits.api_key is not None:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, limits.api_key.encode()):
                return 401, "The API key is missing or wrong; send it as `Authorization: Bearer`."
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.max_body_bytes:
            return 413, _too_large(limits.max_body_bytes)
        if self._num_requests >= limits.max_requests:
            return 429, f"{self._num_requests} requests are under way, which is the limit; wait."
        client = (scope.get("client") or ("",))[0]
        if not self._is_in_rate(client):
            rate = limits.requests_per_minute
            return 429, f"This client sent more than {rate} requests a minute; slow down."
        return None

    def _is_in_rate(self, client: str) -> bool:
        """A bucket for each client that fills by its rate and holds a minute's worth."""
        rate = self._limits.requests_per_minute
        if rate is None:
            return True
        now = time.monotonic()
        left, since = self._buckets.pop(client, (float(rate), now))
        left = min(rate, left + (now - since) * rate / 60)
        # Put back at the end: the first is the one that was idle longest.
        self._buckets[client] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > MAX_CLIENTS:
            del self._buckets[next(iter(self._buckets))]
        return left >= 1


class BodyTooLargeError(Exception):
    """A body that did not say its length went over the limit."""


class _Counted:
    """Receives a body, up to a limit."""

    def __init__(self, receive: Callable, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_bytes = 0

    async def __call__(self) -> Any:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise BodyTooLargeError(_too_large(self._max_bytes))
        return message


def _too_large(max_bytes: int) -> str:
    return f"The body is larger than {max_bytes:,} bytes; send a smaller one."


async def _answer(send: Callable, status: int, message: str) -> None:
    kinds = {401: "authentication_error", 413: "invalid_request_error", 429: "rate_limit_error"}
    body = json.dumps(error_body(message, kinds[status])).encode()
    headers = [(b"content-type", b"application/json")]
    headers += [(b"retry-after", b"1")] if status == 429 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
