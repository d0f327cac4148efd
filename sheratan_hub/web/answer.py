"""An answer: head and body in one write. aiohttp's `Response` spends five times as long on its headers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus

from aiohttp import HttpVersion10, hdrs
from aiohttp.helpers import rfc822_formatted_time

from sheratan_hub.web.request import Request

JSON = "application/json"
PROBLEM = "application/problem+json"
SERVER = "sheratan-hub"


class Answer:
    """Status, body, its media type, and headers beside the usual; `stays`: the connection may stay open after it."""

    __slots__ = ("body", "kind", "more", "status", "stays")

    def __init__(self, status: int, body: bytes, kind: str = JSON, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.body, self.kind = status, body, kind
        self.more = dict(headers) if headers else {}
        self.stays = True

    def force_close(self) -> None:
        """Close the connection after it."""
        self.stays = False

    def data(self, request: Request) -> bytes:
        """All of it, as this request is to get it."""
        more = self.more
        self.stays = self.stays and request.keeps_alive
        if not self.stays:
            more["Connection"] = "close"
        elif request.version == HttpVersion10:
            more["Connection"] = "keep-alive"
        lines = "".join([f"{name}: {value}\r\n" for name, value in more.items()]) if more else ""
        if request.id is not None:
            lines += f"X-Request-ID: {request.id}\r\n"
        start = _start(self.status, self.kind)
        head = f"{start}{len(self.body)}\r\nDate: {rfc822_formatted_time()}\r\n{lines}\r\n".encode()
        bare = request.method == hdrs.METH_HEAD or self.status == HTTPStatus.NOT_MODIFIED
        return head if bare else head + self.body


@lru_cache(256)
def _start(status: int, kind: str) -> str:
    reason = HTTPStatus(status).phrase
    return f"HTTP/1.1 {status} {reason}\r\nServer: {SERVER}\r\nContent-Type: {kind}\r\nContent-Length: "
