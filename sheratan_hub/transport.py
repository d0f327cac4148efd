"""One request to a hub, tried again until it is answered or patience runs out. aiohttp stops here.

The hub fences every verb, so any of them may be repeated blindly after a lost or cut answer.
"""

from __future__ import annotations

import io
import os
import ssl
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar, cast

import aiohttp
import msgspec
import orjson
from yarl import URL

from sheratan_hub.clock import Clock

Plane = Literal["control", "data"]
T = TypeVar("T")

JSON = {"Content-Type": "application/json"}

TOKEN_ENDED = frozenset({"missing_token", "invalid_token", "old_token", "expired_token"})
"""The refusals that another token may change."""

TRY_AGAIN = frozenset({429, 502, 503, 504})
CONNECT_SECONDS = 5.0
PIECE_BYTES = 512 * 1024


class HubRefused(Exception):
    """The hub said no. `code` is one of the stable codes of the wire contract (`http_<status>` if it gave none).

    `retry_after_seconds` is set when it said when to ask again.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        body: dict[str, Any] | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(f"{detail or 'the hub refused'} ({status} {code})")
        self.status = status
        self.code = code
        self.detail = detail
        self.body = body or {}
        self.retry_after_seconds = retry_after_seconds

    def again(self) -> HubRefused:
        """The same, to be raised by somebody else."""
        return HubRefused(self.status, self.code, self.detail, self.body, self.retry_after_seconds)


class HubUnreachable(Exception):
    """No answer that can be used came in time; whether the request was carried out is unknown."""

    def again(self) -> HubUnreachable:
        """The same, to be raised by somebody else."""
        return HubUnreachable(*self.args)


class TryAgain(Exception):
    """One try went wrong in a way that another may not: what to raise in the end, and when to try at the soonest."""

    def __init__(self, error: HubRefused | HubUnreachable, after_ms: float = 0) -> None:
        self.error = error
        self.after_ms = after_ms

    def again(self) -> TryAgain:
        """The same, to be raised by somebody else."""
        return TryAgain(self.error.again(), self.after_ms)


class Request(NamedTuple):
    """What is sent. `wait_seconds` is how long the hub may take on purpose (a long poll)."""

    plane: Plane
    method: str
    path: str
    body: bytes | None = None
    query: Mapping[str, str] = {}
    wait_seconds: float = 0
    headers: Mapping[str, str] = {}


class Transport:
    """A pool of connections to both planes of one hub. Its repr and its errors never show the token."""

    def __init__(
        self,
        urls: Mapping[Plane, str],
        token: str | None,
        clock: Clock,
        *,
        patience_seconds: float,
        backoff_base_ms: float,
        backoff_cap_ms: float,
        answer_seconds: float,
        connections: int,
        tls: ssl.SSLContext | None = None,
        token_file: str | None = None,
    ) -> None:
        self._tls = tls
        self._token_file = token_file
        self._urls = {plane: url.rstrip("/") for plane, url in urls.items()}
        self._headers = _headers(token)
        self.clock = clock
        self._patience_ms = patience_seconds * 1000
        self._base_ms = backoff_base_ms
        self._cap_ms = backoff_cap_ms
        self._answer_seconds = answer_seconds
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"Transport({self._urls['control']!r}, {self._urls['data']!r})"

    async def __aenter__(self) -> Transport:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, ssl=self._tls or True),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def reload_token(self) -> bool:
        """Read the token file again; whether it holds another token than the one in use. An unreadable one does not."""
        if self._token_file is None:
            return False
        try:
            token = Path(self._token_file).read_text("utf-8").strip()
            headers = _headers(token)
        except (OSError, ValueError):
            return False
        changed = bool(headers) and headers != self._headers
        if changed:
            self._headers = headers
        return changed

    def deadline(self) -> float:
        """When (ms) the patience of a call that begins now ends."""
        return self.clock.now() + self._patience_ms

    async def ask(self, request: Request, answer: type[T], until: float | None = None) -> T:
        """Send `request` until it is answered, decoded as `answer`; up to `until` (ms), else the usual patience.

        As `str` the answer is given as it stands.
        Raises HubRefused at once for a "no" that another try would not change, else, when patience has run
        out, HubRefused (429, 503 ...) or HubUnreachable.
        """
        return await self.patiently(partial(self.once, request, answer), until)

    async def patiently(self, attempt: Callable[[], Awaitable[T]], until: float | None = None) -> T:
        """What `attempt` returns, made again as long as it raises TryAgain and there is patience, or its error."""
        end = self.deadline() if until is None else until
        tries = 0
        while True:
            try:
                return await attempt()
            except TryAgain as failed:
                error, pause = failed.error, self.pause(tries, failed.after_ms)
            tries += 1
            if self.clock.now() + pause > end:
                raise error
            await self.clock.sleep(pause)
            if self._session is None:
                raise error

    def pause(self, tries: int, after_ms: float = 0) -> float:
        """How long (ms) to wait after `tries` + 1 failures: `after_ms`, and full jitter on a doubling bound."""
        bound = min(self._cap_ms, self._base_ms * 2.0 ** min(tries, 30))
        return after_ms + self.clock.jitter() * bound

    async def once(self, request: Request, answer: type[T]) -> T:
        """One try, and one more with the token that the file now holds, if the hub takes the old one no longer.

        Raises HubRefused, or TryAgain for what another try may change.
        """
        used = self._headers
        try:
            return await self._once(request, answer)
        except HubRefused as no:
            if no.code not in TOKEN_ENDED or not (self._headers is not used or self.reload_token()):
                raise
        return await self._once(request, answer)

    async def _once(self, request: Request, answer: type[T]) -> T:
        if self._session is None:
            raise RuntimeError("the client is used outside of `async with`")
        url = self._urls[request.plane] + request.path
        try:
            async with self._session.request(
                request.method,
                URL(url, encoded=True),
                params=dict(request.query),
                data=_data(request.body),
                headers={**self._headers, **(JSON if request.body is not None else {}), **request.headers},
                timeout=_timeout(request.wait_seconds + self._answer_seconds),
                allow_redirects=False,
            ) as response:
                return self._read(response, await response.read(), answer)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise TryAgain(HubUnreachable(f"no answer from {url}: {_cause(error)}")) from None

    def _read(self, response: aiohttp.ClientResponse, body: bytes, answer: type[T]) -> T:
        if response.status >= 300:
            raise self._refusal(response, body)
        if answer is str:
            return cast("T", body.decode("utf-8", "replace"))
        try:
            return msgspec.json.decode(body, type=answer)
        except msgspec.DecodeError as error:
            url = response.url.with_query(None)
            raise TryAgain(HubUnreachable(f"{url} answered what no hub answers: {error}")) from None

    def _refusal(self, response: aiohttp.ClientResponse, body: bytes) -> HubRefused | TryAgain:
        status, after = response.status, self._retry_after(response.headers.get("Retry-After"))
        problem = _problem(body)
        code, detail = problem.get("code"), problem.get("detail")
        error = HubRefused(
            status,
            code if isinstance(code, str) else f"http_{status}",
            detail if isinstance(detail, str) else response.reason or "",
            problem,
            after,
        )
        return TryAgain(error, (after or 0) * 1000) if status in TRY_AGAIN else error

    def _retry_after(self, text: str | None) -> float | None:
        """Seconds of a Retry-After header, which holds seconds or a date; None if there is none to read."""
        if text is None:
            return None
        try:
            return max(0.0, float(text))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - self.clock.now() / 1000)
        except ValueError:
            return None


def client_tls(ca: str | None = None, cert: str | None = None, key: str | None = None) -> ssl.SSLContext:
    """Trust `ca` (a PEM file; None: what the system trusts), and show `cert` with its `key` to hubs that ask.

    Raises OSError (ssl.SSLError is one) when a file will not do.
    """
    context = ssl.create_default_context(cafile=ca)
    if cert is not None:
        context.load_cert_chain(cert, key)
    return context


def _problem(body: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _data(body: bytes | None) -> bytes | io.BytesIO | None:
    """The body as aiohttp wants it: a large one as a file, which it sends in pieces."""
    return io.BytesIO(body) if body is not None and len(body) > PIECE_BYTES else body


def _cause(error: Exception) -> str:
    """What went wrong in a few words."""
    if isinstance(error, aiohttp.ClientConnectorError) and (error.errno or 0) > 0:
        return os.strerror(error.errno or 0)
    return str(error) or type(error).__name__


def _timeout(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)


def _headers(token: str | None) -> dict[str, str]:
    if not token:
        return {}
    if not token.isascii() or not token.isprintable() or token != token.strip():
        raise ValueError("the token holds characters that no HTTP header can carry")
    return {"Authorization": f"Bearer {token}"}
