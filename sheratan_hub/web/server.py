"""Listens for one plane: aiohttp's low-level server with this project's limits and its one form of error."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from aiohttp.web_request import BaseRequest

from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.web.body import BrokenBody
from sheratan_hub.web.errors import problem
from sheratan_hub.web.plane import Plane

KEEP_ALIVE_SECONDS = 75.0
LINGER_SECONDS = 1.0
SHUTDOWN_SECONDS = 3.0


class Listener:
    """One plane on one address."""

    def __init__(self, plane: Plane) -> None:
        self._log = logging.getLogger(f"sheratan.{plane.name}")
        self._runner = web.ServerRunner(HubServer(plane), handle_signals=False, shutdown_timeout=SHUTDOWN_SECONDS)

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port (`port` 0 takes a free one). Raises `OSError` when it cannot."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=1024)
        await site.start()
        bound = int(self._runner.addresses[0][1])
        self._log.info("listening", extra={"data": {"host": host, "port": bound}})
        return bound

    async def stop(self) -> None:
        """Stop listening, let running handlers answer, close the connections."""
        await self._runner.cleanup()


class Protocol(RequestHandler):
    """One connection. What the parser refuses gets 400 and one log line."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """Take what came. A body that breaks off into nonsense ends its request; aiohttp would let it wait."""
        super().data_received(data)
        request = self._current_request
        broken = bool(self._messages) and isinstance(self._messages[-1][0], _ErrInfo)
        if broken and request is not None and not request.content.is_eof() and request.content.exception() is None:
            request.content.set_exception(BrokenBody())

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what never became a request; nobody, when the client has gone; the rest is aiohttp's own matter."""
        if isinstance(exc, ConnectionError):
            raise exc
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer was sent already")
        plane = getattr(self._manager.request_handler, "name", "hub") if self._manager else "hub"
        what = type(exc).__name__ if exc else status
        logging.getLogger(f"sheratan.{plane}").warning("a request could not be parsed: %s", what)
        response = problem(Refused(Code.BAD_REQUEST, "this is not a valid HTTP request"))
        response.force_close()
        return response


class HubServer(web.Server):
    """Makes a `Protocol` for each connection. A handler is cancelled when its client goes away."""

    def __init__(self, plane: Plane) -> None:
        super().__init__(plane, handler_cancellation=True)

    def __call__(self) -> Protocol:
        """The protocol of a new connection."""
        return Protocol(
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            lingering_time=LINGER_SECONDS,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
        )
