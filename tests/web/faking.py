"""A scripted hub over real HTTP, and a clock that lets every sleep pass at once: for tests of the client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from sheratan_hub.clock import VirtualClock

Responder = Callable[[web.Request, Any], Awaitable[web.StreamResponse]]


class HastyClock(VirtualClock):
    """Time that passes only by sleeping, at once; the sleeps are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    async def sleep(self, ms: float) -> None:
        self.slept.append(ms)
        self._now += int(ms)
        await asyncio.sleep(0)


class Fake:
    """A server that answers each request with the next responder; the last one stays. Bodies are kept."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.requests: list[web.Request] = []
        self.script: list[Responder] = []
        self.server: TestServer

    async def answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw) if raw else None
        self.bodies.append(body)
        self.requests.append(request)
        respond = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return await respond(request, body)


def says(body: Any, status: int = 200, **headers: str) -> Responder:
    async def respond(_: web.Request, __: Any) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    return respond


def refuses(status: int, code: str, **headers: str) -> Responder:
    return says({"ok": False, "code": code, "status": status, "detail": f"because of {code}"}, status, **headers)


async def hangs_up(request: web.Request, _: Any) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def is_cut(request: web.Request, _: Any) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"ok": true, "job_')
    assert request.transport is not None
    request.transport.close()
    return response


async def takes_all(_: web.Request, body: Any) -> web.StreamResponse:
    outcomes = [{"ok": True, "job_id": job["idempotency_key"], "status": "accepted"} for job in body["jobs"]]
    return web.json_response({"ok": True, "jobs": outcomes})


ACCEPTED = says({"ok": True, "job_id": "j1", "status": "accepted"}, 201)
