"""What a plane tells of itself: `GET /openapi.json` for programs, `GET /docs` for people. Each is made once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import hdrs

from sheratan_hub.config import Settings
from sheratan_hub.web.answer import JSON, Answer
from sheratan_hub.web.openapi import openapi
from sheratan_hub.web.page import POLICY, html

if TYPE_CHECKING:
    from sheratan_hub.web.plane import Call, Route

HTML = "text/html; charset=utf-8"
GUARDS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""What a browser is told to keep to: nothing from elsewhere, nothing to elsewhere, in nobody's frame."""


class Text:
    """Bytes that never change, with the tag by which a client asks whether they have."""

    def __init__(self, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self._body, self._kind = body, kind
        self.tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        self._headers = {hdrs.ETAG: self.tag, hdrs.CACHE_CONTROL: "private, no-cache", **headers}

    def answer(self, known: str | None) -> Answer:
        """The text; 304 for whoever has it already, as `If-None-Match` says."""
        tags = {tag.strip().removeprefix("W/") for tag in known.split(",")} if known else set()
        status = 304 if tags & {self.tag, "*"} else 200
        return Answer(status, self._body, self._kind, self._headers)


class Manual:
    """One plane's document and page, made when they are first asked for."""

    def __init__(self, plane: str, routes: Iterable[Route], settings: Settings, ports: Mapping[str, int]) -> None:
        self._made_of = (plane, routes, settings)
        self._scheme, self._ports = "https" if settings.tls.cert else "http", ports

    @cached_property
    def told(self) -> dict[str, Any]:
        """The OpenAPI document."""
        return openapi(*self._made_of)

    @cached_property
    def document(self) -> Text:
        """The same as JSON."""
        return Text(orjson.dumps(self.told), JSON, {"X-Content-Type-Options": "nosniff"})

    @cached_property
    def page(self) -> Text:
        """The same for people."""
        plane = self._made_of[0]
        return Text(html(self.told, f"{self._scheme}://127.0.0.1:{self._ports[plane]}").encode(), HTML, GUARDS)


async def document(call: Call) -> Answer:
    """GET /openapi.json: this plane's routes as an OpenAPI 3.1 document.

    It is made of the table that requests are dispatched by, so it tells what this hub does. Its `ETag` changes with it.
    """
    return _manual(call).document.answer(call.request.headers.get(hdrs.IF_NONE_MATCH))


async def page(call: Call) -> Answer:
    """GET /docs: this plane's routes as a page for people: what goes in, what comes out, and how to ask by curl."""
    return _manual(call).page.answer(call.request.headers.get(hdrs.IF_NONE_MATCH))


def _manual(call: Call) -> Manual:
    return call.services.manuals[call.plane]
