"""Who may ask: the shared token in either header, and the Host header on loopback binds."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping

from aiohttp import hdrs

from sheratan_hub import config
from sheratan_hub.rules.command import Code, Refused

TOKEN_HEADER = "X-Sheratan-Token"  # noqa: S105 - a header's name


class Tokens:
    """Knows the shared token only as a salted digest; `salt` is drawn at the start."""

    def __init__(self, token: str, salt: str, required: bool = True) -> None:
        self._salt = salt.encode()
        self._digest = self._of(token)
        self.required = required

    def _of(self, token: str) -> bytes:
        return hashlib.blake2b(token.encode("utf-8", "surrogateescape"), key=self._salt, digest_size=32).digest()

    def check(self, headers: Mapping[str, str]) -> None:
        """Refused with `missing_token` or `invalid_token`. The comparison takes the same time for any token."""
        if not self.required:
            return
        given = given_token(headers)
        if given is None:
            raise Refused(Code.MISSING_TOKEN, "a token is needed: Authorization: Bearer ...", reason="missing_token")
        if not hmac.compare_digest(self._of(given), self._digest):
            raise Refused(Code.INVALID_TOKEN, "this token is not valid here", reason="invalid_token")


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


def _host_name(given: str) -> str:
    """The name of a Host header without its port, in lower case."""
    if given.startswith("["):
        return given.partition("]")[0].lower() + "]"
    return given.partition(":")[0].lower()
