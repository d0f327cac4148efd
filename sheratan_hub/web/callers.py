"""Where requests come from: the address behind trusted proxies, and refusals that slow down for an address that keeps
failing. A valid token never waits."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Collection

from sheratan_hub.clock import Clock
from sheratan_hub.web.request import Request

FORWARDED = ("X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Host", "X-Forwarded-Proto", "Via")
"""Headers by which proxies are known."""

WINDOW_MS = 60_000
STEP_MS = 100
STEP_FAILURES = 10
ADDRESSES_MAX = 10_000
HELD_MAX = 1000
HELD_PER_ADDRESS_MAX = 50

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Proxies:
    """The proxies of one plane whose word on a client's address counts."""

    def __init__(self, trusted: Collection[str] = ()) -> None:
        self._trusted = tuple(ipaddress.ip_network(one) for one in trusted)

    def client(self, request: Request) -> str | None:
        """The client's address: the peer's, or what trusted proxies say, from the right up to the first stranger."""
        peer = request.remote
        if not self._trusted or not self._trusts(peer):
            return peer
        return self._told(request)[0] or peer

    def hides(self, request: Request) -> bool:
        """Whether a proxy has brought it that nobody trusts, or that does not tell from where."""
        if not any(name in request.headers for name in FORWARDED):
            return False
        return not self._trusts(request.remote) or not self._told(request)[1]

    def _told(self, request: Request) -> tuple[str | None, bool]:
        """(the last address that trusted proxies tell, whether that is the client's: none before it is unreadable)"""
        found = None
        for header in reversed(request.headers.getall("X-Forwarded-For", ())):
            for entry in reversed(header.split(",")):
                address = _address(entry.strip())
                if address is None:
                    return found, False
                found = str(address)
                if not self._trusts(found):
                    return found, True
        return found, found is not None

    def _trusts(self, address: str | None) -> bool:
        found = _address(address or "")
        return found is not None and any(found in network for network in self._trusted)


NO_PROXIES = Proxies()
"""Nobody's word counts."""


def _address(text: str) -> Address | None:
    """An address as proxies write it, perhaps with a port; None if it is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class Failures:
    """How often each address has brought a bad token lately, and how long its next refusal has to wait.

    Bounded: the address that has been quiet longest is forgotten first, and no more than so many wait at once.
    """

    def __init__(self, clock: Clock, free: int, delay_ms: int) -> None:
        self._clock, self._free, self._delay_ms = clock, free, delay_ms
        self._counts: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._held: dict[str, int] = {}

    def adopt(self, free: int, delay_ms: int) -> None:
        """Other numbers count from now on."""
        self._free, self._delay_ms = free, delay_ms

    def __len__(self) -> int:
        return len(self._counts)

    async def refused(self, address: str | None) -> bool:
        """Wait as long as the refusal has to; whether the connection may stay open after it."""
        name = _network(address)
        delay = self._failed(name)
        if delay <= 0:
            return True
        held = self._held.get(name, 0)
        if held >= HELD_PER_ADDRESS_MAX or sum(self._held.values()) >= HELD_MAX:
            return False
        self._held[name] = held + 1
        try:
            await self._clock.sleep(delay)
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]
        return True

    def _failed(self, name: str) -> int:
        """Count one more; the delay (ms): none for the first of a minute, then a step more for each ten."""
        if not self._delay_ms:
            return 0
        now = self._clock.now()
        since, count = self._counts.get(name, (now, 0))
        if now - since > WINDOW_MS:
            since, count = now, count // 2 if now - since < 2 * WINDOW_MS else 0
        self._counts[name] = (since, count + 1)
        self._counts.move_to_end(name)
        if len(self._counts) > ADDRESSES_MAX:
            self._counts.popitem(last=False)
        beyond = count + 1 - self._free
        return min(self._delay_ms, STEP_MS * -(-beyond // STEP_FAILURES)) if beyond > 0 else 0


def _network(address: str | None) -> str:
    """What counts as one address: of IPv6 the first 64 bits."""
    found = _address(address or "")
    if isinstance(found, ipaddress.IPv6Address) and not found.is_loopback:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found or address)
