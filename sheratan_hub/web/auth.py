"""Who may ask: a token in either header with the right for the route; and the headers Host and Origin."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from aiohttp import hdrs

from sheratan_hub import config
from sheratan_hub.clock import Clock
from sheratan_hub.keyring import ANYBODY, Holder, Keyring, ended
from sheratan_hub.rules.access import GRANTS, Right
from sheratan_hub.rules.command import Code, Refused

_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
TOKEN_HEADER = "X-Sheratan-Token"  # noqa: S105 - a header's name


class Tokens:
    """Checks the token of a request against the keyring."""

    def __init__(self, keyring: Keyring, clock: Clock, required: bool = True) -> None:
        self.keyring, self._clock = keyring, clock
        self.required = required

    def check(self, headers: Mapping[str, str], right: Right | None = "token") -> Holder:
        """Whose token it is. Refused: `missing_token`, `invalid_token`, `old_token`, `expired_token`, `forbidden_role`.

        With the right None any token that is in force will do. One look by salted digest, however many there are;
        the comparison takes the same time for any token.
        """
        if not self.required:
            return ANYBODY
        given = given_token(headers)
        if given is None:
            raise Refused(Code.MISSING_TOKEN, "a token is needed: Authorization: Bearer ...", reason="missing_token")
        holder = self.keyring.find(given)
        if holder is None:
            raise Refused(Code.INVALID_TOKEN, "this token is not valid here", reason="invalid_token")
        if holder.ends_at and holder.ends_at <= self._clock.now():
            raise ended(holder)
        if right is not None and right not in GRANTS[holder.role]:
            raise Refused(
                Code.FORBIDDEN_ROLE,
                f"this needs the right {right}, which the role {holder.role} has not",
                reason="invalid_token",
                detail={"access_id": holder.id, "role": holder.role, "right": right},
            )
        return holder

    def good(self, headers: Mapping[str, str]) -> bool:
        """Whether the request carries a token that is in force, whatever its role."""
        try:
            self.check(headers, None)
        except Refused:
            return False
        return True


def given_token(headers: Mapping[str, str]) -> str | None:
    """The token of a request: `Authorization: Bearer T`, else `X-Sheratan-Token: T`."""
    authorization = headers.get(hdrs.AUTHORIZATION)
    if authorization is not None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            return token.strip()
    return headers.get(TOKEN_HEADER) or None


def is_loopback(address: str | None) -> bool:
    """Whether an address or a host name means this machine only."""
    if address is None:
        return False
    return config.is_loopback(address.strip("[]").rstrip("."))


class HostCheck:
    """Which Host headers a listener takes: loopback names on a loopback bind, else the configured ones."""

    def __init__(self, bind: str, hosts: Collection[str] = ()) -> None:
        self._loopback = is_loopback(bind)
        self._hosts = frozenset(host.lower() for host in hosts)
        self._known: set[str] = set()

    def check(self, headers: Mapping[str, str]) -> None:
        """Refused with `foreign_host` or `foreign_origin`."""
        self._check_host(headers)
        if "Origin" in headers or "Sec-Fetch-Site" in headers:
            self._check_origin(headers)

    def _check_host(self, headers: Mapping[str, str]) -> None:
        """Refused with `foreign_host`: a page of another site must not reach a hub on loopback (DNS rebinding)."""
        given = headers.get(hdrs.HOST)
        if given is None or given in self._known:
            return
        name = _host_name(given)
        fine = name in self._hosts or (is_loopback(name) if self._loopback else not self._hosts)
        if not fine:
            raise Refused(Code.FOREIGN_HOST, "this Host header is not one that this hub answers to")
        if len(self._known) < 1000:
            self._known.add(given)

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """What a browser sends on behalf of a page of another site is refused; following a link here is not."""
        origin = headers.get(hdrs.ORIGIN)
        if sum(name.lower() == "origin" for name, _ in headers.items()) > 1:
            foreign = True  # a browser sends one
        elif origin is None:
            foreign = headers.get("Sec-Fetch-Site") == "cross-site" and headers.get("Sec-Fetch-Mode") != "navigate"
        else:
            scheme, _, place = origin.partition("://")
            name = _host_name(place) if scheme.lower() in ("http", "https") else ""
            same = name == _host_name(headers.get(hdrs.HOST, ""))
            foreign = not name or not (same or name in self._hosts or (self._loopback and is_loopback(name)))
        if foreign:
            raise Refused(Code.FOREIGN_ORIGIN, "pages of other sites may not ask this hub")


def _host_name(given: str) -> str:
    """The name of a Host header without its port, in lower case; empty for what is no name and port."""
    found = _HOST.fullmatch(given)
    return found[1].lower() if found else ""
