"""Listens for one plane: aiohttp's low-level server with this project's limits and its one form of error."""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import cast

from aiohttp import web
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from aiohttp.web_request import BaseRequest

from sheratan_hub import log
from sheratan_hub.clock import Clock
from sheratan_hub.loops import Loop
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.web.answer import REQUEST_ID
from sheratan_hub.web.auth import is_loopback
from sheratan_hub.web.body import BrokenBody
from sheratan_hub.web.connections import LOOK_MS, Bounds, Connections
from sheratan_hub.web.errors import problem
from sheratan_hub.web.plane import Plane
from sheratan_hub.web.tls import HANDSHAKE_SECONDS

KEEP_ALIVE_SECONDS = 86_400.0
"""aiohttp's own limit, which costs a timer for each connection, is out of the way: `Connections` decides."""

LINGER_SECONDS = 1.0
SHUTDOWN_SECONDS = 3.0


class Listener:
    """One plane on one address; with `tls` it speaks HTTPS."""

    def __init__(self, plane: Plane, clock: Clock, bounds: Bounds, tls: ssl.SSLContext | None = None) -> None:
        self._log = logging.getLogger(f"sheratan.{plane.name}")
        self._clock, self._tls, self.plane = clock, tls, plane
        self.connections = Connections(bounds)
        server = HubServer(plane, self.connections)
        self._runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=SHUTDOWN_SECONDS)
        self.loop = Loop(f"{plane.name} connections", self._look, clock, LOOK_MS)

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port (`port` 0 takes a free one). Raises `OSError` when it cannot."""
        await self._runner.setup()
        site = Site(self._runner, host, port, ssl_context=self._tls, backlog=1024)
        await site.start()
        bound = int(self._runner.addresses[0][1])
        self._log.info("listening", extra={"data": {"host": host, "port": bound}})
        return bound

    async def stop(self) -> None:
        """Stop listening, let running handlers answer, close the connections."""
        await self._runner.cleanup()

    async def _look(self) -> int | None:
        """Cut connections whose time is over."""
        self.connections.look(self._clock.now())
        return None


class Site(web.TCPSite):
    """Listens like its base, but does not wait a minute for the handshake of a silent client."""

    async def start(self) -> None:
        """Listen."""
        await web.BaseSite.start(self)
        self._server = await asyncio.get_running_loop().create_server(
            cast("HubServer", self._runner.server),
            self._host,
            self._port,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=None if self._ssl_context is None else HANDSHAKE_SECONDS,
        )


class Protocol(RequestHandler):
    """One connection. What the parser refuses gets 400 and one log line."""

    __slots__ = ("_connections", "begun", "wire")

    _connections: Connections
    begun: bool
    wire: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it; addresses of this machine do not count."""
        super().connection_made(transport)
        self.begun = False
        self.wire = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        address = peer[0] if isinstance(peer, tuple) else None
        self._connections.came(self, None if is_loopback(address) else address)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Count it no more."""
        self._connections.gone(self)
        super().connection_lost(exc)

    @property
    def busy(self) -> bool:
        """Whether a request of it is being answered."""
        return self._request_in_progress or bool(self._messages)

    @property
    def asked(self) -> int:
        """How many requests have come."""
        return self._request_count

    def data_received(self, data: bytes) -> None:
        """Take what came. A body that breaks off into nonsense ends its request; aiohttp would let it wait."""
        fresh = not self._request_count
        super().data_received(data)
        request = self._current_request
        self.begun = request is None and not self._messages
        if fresh and self._request_count:
            self._connections.asks(self)
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
        plane = self._manager.request_handler if self._manager else None
        name = "hub"
        if isinstance(plane, Plane):
            name, request[REQUEST_ID] = plane.name, plane.request_id(request)
            log.request_id.set(request[REQUEST_ID])
        what = type(exc).__name__ if exc else status
        logging.getLogger(f"sheratan.{name}").warning("a request could not be parsed: %s", what)
        response = problem(Refused(Code.BAD_REQUEST, "this is not a valid HTTP request"))
        response.force_close()
        return response


class HubServer(web.Server):
    """Makes a `Protocol` for each connection. A handler is cancelled when its client goes away."""

    def __init__(self, plane: Plane, connections: Connections) -> None:
        super().__init__(plane, handler_cancellation=True)
        self._counted = connections

    def __call__(self) -> Protocol:
        """The protocol of a new connection."""
        made = Protocol(
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            lingering_time=LINGER_SECONDS,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
        )
        made._connections = self._counted
        return made
