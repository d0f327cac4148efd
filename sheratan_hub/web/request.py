"""One HTTP request, as the gates and its handler see it. aiohttp's own takes longer to make than a submit to parse."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from aiohttp import StreamReader, hdrs
from aiohttp.http import HttpVersion, RawRequestMessage

if TYPE_CHECKING:
    from multidict import CIMultiDictProxy, MultiMapping

    from sheratan_hub.web.answer import Answer


class Wire(Protocol):
    """What a request needs of its connection."""

    @property
    def transport(self) -> asyncio.Transport | None:
        """None once the connection is lost."""
        ...

    @property
    def remote(self) -> str | None:
        """The peer's address, None if it has none."""
        ...

    def write(self, data: bytes) -> None:
        """Send it. Raises ConnectionError when the client has gone."""
        ...

    async def drain(self) -> None:
        """Wait until a slow reader has taken enough. Raises ConnectionError when the client has gone."""
        ...


class Request:
    """`raw_path` is the target as it came; `id` is set by its plane; `answered` once an answer was written."""

    __slots__ = ("_message", "answered", "content", "headers", "id", "method", "raw_path", "wire")

    def __init__(self, message: RawRequestMessage, content: StreamReader, wire: Wire) -> None:
        self._message, self.content, self.wire = message, content, wire
        self.method: str = message.method
        self.raw_path: str = message.path
        self.headers: CIMultiDictProxy[str] = message.headers
        self.id: str | None = None
        self.answered = False

    @property
    def version(self) -> HttpVersion:
        """Of HTTP."""
        return self._message.version

    @property
    def keeps_alive(self) -> bool:
        """Whether the client wants the connection to stay open."""
        return not self._message.should_close

    @property
    def query(self) -> MultiMapping[str]:
        """What stands behind the `?`, decoded."""
        return self._message.url.query

    @property
    def query_string(self) -> str:
        """The same as one text."""
        return self._message.url.query_string

    @property
    def content_length(self) -> int | None:
        """How long the body is, if the client has said so."""
        told = self.headers.get(hdrs.CONTENT_LENGTH)
        return None if told is None else int(told)

    @property
    def remote(self) -> str | None:
        """The peer's address."""
        return self.wire.remote

    @property
    def transport(self) -> asyncio.Transport | None:
        """None once the client has gone."""
        return self.wire.transport

    def _cancel(self, why: BaseException) -> None:
        """What aiohttp's protocol calls when the client has gone or the server ends: no more of the body comes."""
        self.content.set_exception(why)

    async def answer(self, answer: Answer) -> None:
        """Write the answer. Raises ConnectionError when the client has gone."""
        self.wire.write(answer.data(self))
        self.answered = True
        await self.wire.drain()
