"""Listens for one plane: aiohttp's low-level server with this project's limits and its one form of error."""

from __future__ import annotations

import asyncio
import logging
import ssl
from contextlib import suppress
from functools import partial
from typing import cast

from aiohttp import StreamReader, web
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import ERROR, RequestHandler, RequestPayloadError, _ErrInfo

from sheratan_hub import log
from sheratan_hub.clock import Clock
from sheratan_hub.loops import Loop
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.web.auth import is_loopback
from sheratan_hub.web.body import BrokenBody
from sheratan_hub.web.connections import LOOK_MS, Bounds, Connections
from sheratan_hub.web.errors import problem
from sheratan_hub.web.plane import Plane
from sheratan_hub.web.request import Request
from sheratan_hub.web.tls import HANDSHAKE_SECONDS

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
    """One connection: aiohttp parses, its plane answers one request after the other.

    aiohttp's own loop starts a task for each request and makes objects that nothing here looks at: a third of what a
    small request cost. What the parser refuses gets 400 and one log line.
    """

    __slots__ = ("_connections", "_plane", "begun", "remote", "wire")

    def __init__(self, server: HubServer, plane: Plane, connections: Connections) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=0,  # `Connections` decides
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
        )
        # The parser holds back what comes behind so many requests, and may count one too many: then it waits for a
        # queue that is never full. One less is full in time.
        self._max_msg_queue_size -= 1
        self._plane, self._connections = plane, connections
        self.begun = False
        self.remote: str | None = None
        self.wire: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it; addresses of this machine do not count."""
        super().connection_made(transport)
        self.wire = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self.remote = str(peer[0]) if isinstance(peer, tuple) else None
        self._connections.came(self, None if is_loopback(self.remote) else self.remote)

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

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Read on, if reading was held up; aiohttp's readers ask for that after every piece, and all is parsed anew."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def write(self, data: bytes) -> None:
        """See `Wire.write`."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError("the client has gone")
        self.transport.write(data)

    async def drain(self) -> None:
        """See `Wire.drain`."""
        if self._paused:
            await self._drain_helper()

    async def start(self) -> None:
        """Answer one request after the other until the connection is to be closed. Cancelled when it is lost."""
        stays = True
        while stays and not self._force_close:
            if not self._messages:
                try:
                    self._waiter = self._loop.create_future()
                    await self._waiter
                finally:
                    self._waiter = None
            message, content = self._messages.popleft()
            if self._parser is not None:
                self._parser.message_consumed()
            if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
                self._resume_reading_if_drained()
            stays = await self._serve(message, content) and not self._close
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    async def _serve(self, message: RawRequestMessage | _ErrInfo, content: StreamReader) -> bool:
        """Answer one request; whether the connection stays open. No bug may leave it open, half answered."""
        self._request_in_progress = True
        try:
            if isinstance(message, _ErrInfo):
                return await self._refuse(message)
            request = Request(message, content, self)
            self._current_request = request  # type: ignore[assignment]  # it is only asked for `content` and `_cancel`
            answer = await self._plane(request)
            if not request.answered:
                await request.answer(answer)
            stays = answer.stays
        except ConnectionError:
            return False
        except BaseException as bug:
            self.force_close()
            if not isinstance(bug, Exception):
                raise
            logging.getLogger(f"sheratan.{self._plane.name}").exception("a request could not be answered")
            return False
        finally:
            self._current_request, self._request_in_progress = None, False
            if self._handler_waiter is not None:
                self._handler_waiter.set_result(None)
        over = content.is_eof() or await self._passed_over(content)
        if self._upgraded:
            self._stay_with_http()
        return over and stays

    async def _refuse(self, nonsense: _ErrInfo) -> bool:
        """Answer what never became a request."""
        plane = self._plane
        request = Request(ERROR, EMPTY_PAYLOAD, self)
        request.id = plane.request_id(request)
        log.request_id.set(request.id)
        what = type(nonsense.exc).__name__ if nonsense.exc else nonsense.status
        logging.getLogger(f"sheratan.{plane.name}").warning("a request could not be parsed: %s", what)
        response = problem(Refused(Code.BAD_REQUEST, "this is not a valid HTTP request"))
        response.force_close()
        await request.answer(response)
        return False

    def _stay_with_http(self) -> None:
        """An offer to speak another protocol was passed over: what came behind it is the next request."""
        if self._parser is not None and not self._messages:
            self._parser.set_upgraded(False)
            self._upgraded = False
            rest, self._message_tail = self._message_tail, b""
            if rest:
                self.data_received(rest)
            if self._buffer_paused:
                self._resume_reading_if_drained()

    async def _passed_over(self, content: StreamReader) -> bool:
        """Whether the rest of a body that nobody wanted came soon: who still sends may not read its answer."""
        with suppress(TimeoutError, BrokenBody, ConnectionError, RequestPayloadError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not content.is_eof():
                    await content.readany()
        return content.is_eof()


class HubServer(web.Server):
    """Makes a `Protocol` for each connection. A handler is cancelled when its client goes away."""

    def __init__(self, plane: Plane, connections: Connections) -> None:
        super().__init__(_nobody, handler_cancellation=True)
        self._made = partial(Protocol, self, plane, connections)

    def __call__(self) -> Protocol:
        """The protocol of a new connection."""
        return self._made()


async def _nobody(request: web.BaseRequest) -> web.StreamResponse:
    raise AssertionError("its connections answer themselves")
