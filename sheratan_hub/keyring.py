"""The tokens that are in force, by salted digest: what the check of a request looks at. Follows the store's commits.

A token's value is never kept: neither here nor in the store.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from sheratan_hub.clock import Clock
from sheratan_hub.hub import Hub
from sheratan_hub.items import Committed
from sheratan_hub.rules.access import Access, ForgetAccess, Role, access_of
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.rules.tokens import (
    RING,
    MakeSalt,
    Retired,
    Ring,
    Said,
    Settle,
    Settled,
    Slot,
    Turn,
    retired_of,
    ring_of,
    token_id,
)
from sheratan_hub.storage import Row

log = logging.getLogger("sheratan.tokens")

KINDS = frozenset({"token", "retired", "access"})
"""The kinds of rows that tokens are kept in."""

TIDY_MS = 3_600_000
USES_MAX = 100_000


class Holder(msgspec.Struct, frozen=True, gc=False):
    """Whom a token stands for. `ends_at` (ms, 0: never) is when it is no longer accepted; `until`, for a token whose
    rotation is under way, when that ends. A node's token is good for `node_id` only."""

    id: str
    digest: bytes
    role: Role = "admin"
    slot: Literal["active", "old", "next", "retired", "access", "anybody"] = "active"
    ends_at: int = 0
    node_id: str | None = None
    until: int = 0


ANYBODY = Holder("", b"", slot="anybody")
"""Whoever comes, where no token is required."""


class Use(NamedTuple):
    """Which token a node last used, and when (ms)."""

    token_id: str
    at: int


class Keyring:
    """Every token that is, or was, in force. `open` it before the first request; it is an observer of commits.

    With a store that several hubs share, `load` is what a hint must call: it reads everything anew.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._salt = b""
        self._ring: Ring | None = None
        self._retired: dict[str, Retired] = {}
        self._access: dict[str, Access] = {}
        self._holders: dict[bytes, Holder] = {}
        self._uses: OrderedDict[str, Use] = OrderedDict()
        self._tidy_at = 0
        self.changed: Callable[[], None] = lambda: None
        """Called when what is in force has changed."""

    async def open(self, hub: Hub, token: str, next_token: str = "", until: int = 0) -> None:
        """Let settings and store agree, then load. Raises `Refused` when the store fails, or with `old_token`."""
        self._salt = str(await hub.execute(MakeSalt(self._clock.secret()))).encode()
        await self.hear(hub, token, next_token, until)
        await self.load(hub)

    async def hear(self, hub: Hub, token: str, next_token: str = "", until: int = 0) -> None:
        """Let what the settings say now and the store agree; what that changes counts at once. Raises as `open`."""
        said = Said(self.digest(token).hex(), self.digest(next_token).hex() if next_token else None, until)
        settled: Settled = await hub.execute(Settle(said if said.next else Said(said.active)))
        for warning in settled.warnings:
            log.warning("%s", warning)

    async def load(self, hub: Hub) -> None:
        """Read everything that the store has."""
        rows = await hub.fetch([RING])
        for kind in ("retired", "access"):
            after: str | None = None
            while True:
                page = await hub.page(kind, (), after, 1000)
                rows += page.rows
                after = page.next
                if after is None:
                    break
        self._retired, self._access = {}, {}
        for row in rows:
            self._take(row)
        self._index()
        self.changed()

    def committed(self, committed: Committed) -> None:
        """The observer: what a batch has changed of the tokens counts before its replies go out."""
        changes = committed.changes
        touched = [row for row in (*changes.new, *changes.put) if row.kind in KINDS]
        gone = [key.id for key in changes.gone if key.kind == "access"]
        for row in touched:
            self._take(row)
            if row.kind == "access":
                holder = _of_access(self._access[row.id])
                self._holders[holder.digest] = holder
        for access_id in gone:
            self._access.pop(access_id, None)
        if gone or any(row.kind != "access" for row in touched):
            self._index()
        if touched or gone:
            self.changed()

    def _take(self, row: Row) -> None:
        if row.key == RING:
            self._ring = ring_of(row)
        elif row.kind == "retired":
            self._retired[row.id] = retired_of(row)
        elif row.kind == "access":
            self._access[row.id] = access_of(row)

    def _index(self) -> None:
        holders = [_of_access(access) for access in self._access.values()]
        holders += [
            Holder(token_id(one.digest), bytes.fromhex(one.digest), slot="retired", ends_at=one.at or 1)
            for one in self._retired.values()
        ]
        if self._ring is not None:
            holders += _of_ring(self._ring)
        self._holders = {holder.digest: holder for holder in holders}

    def digest(self, token: str) -> bytes:
        """The salted digest of a token's value."""
        return hashlib.blake2b(token.encode("utf-8", "surrogateescape"), key=self._salt, digest_size=32).digest()

    def find(self, token: str) -> Holder | None:
        """Whom this token stands for, ended or not; None if it is unknown. Takes the same time for any token."""
        digest = self.digest(token)
        holder = self._holders.get(digest, ANYBODY)
        return holder if hmac.compare_digest(digest, holder.digest) else None

    def knows(self, token: str) -> bool:
        """Whether this value is, or was, one of the tokens."""
        return self.find(token) is not None

    @property
    def ring(self) -> Ring | None:
        """The shared tokens."""
        return self._ring

    @property
    def retired(self) -> list[Retired]:
        """The retired tokens, the last one first."""
        return sorted(self._retired.values(), key=lambda one: one.at, reverse=True)

    def used(self, node_id: str, holder: Holder) -> None:
        """Remember which token a node has used; of nodes that only pull, nothing else tells."""
        self._uses[node_id] = Use(holder.id, self._clock.now())
        self._uses.move_to_end(node_id)
        if len(self._uses) > USES_MAX:
            self._uses.popitem(last=False)

    @property
    def uses(self) -> dict[str, Use]:
        """Which token each node last used while a rotation was under way, since this hub's start."""
        return dict(self._uses)

    async def turn(self, hub: Hub) -> int | None:
        """The rotation clock's step: finish what is due; when the next deadline is. Once over all hubs."""
        now = self._clock.now()
        if hub.store.shared:
            await self.load(hub)
        if self._ring is not None and self._ring.over(now):
            await hub.execute_many([Turn()], urgent=True)
        if now >= self._tidy_at:
            self._tidy_at = now + TIDY_MS
            await hub.execute_many([ForgetAccess()], urgent=True)
        return self._ring.until if self._ring is not None and self._ring.until > now else None


def _of_ring(ring: Ring) -> list[Holder]:
    if ring.next is None:
        return [_of_slot(ring.active, "active")]
    old = _of_slot(ring.active, "old")
    return [
        msgspec.structs.replace(old, ends_at=ring.until, until=ring.until),
        _of_slot(ring.next, "next"),
    ]


def _of_slot(slot: Slot, name: Literal["active", "old", "next"]) -> Holder:
    return Holder(slot.id, bytes.fromhex(slot.digest), slot=name)


def _of_access(access: Access) -> Holder:
    digest = bytes.fromhex(access.digest)
    return Holder(access.id, digest, access.role, "access", access.expires_at, access.node_id)


def ended(holder: Holder) -> Refused:
    """The refusal of a token that was good once."""
    if holder.slot == "access":
        return Refused(Code.EXPIRED_TOKEN, f"the scoped token {holder.id} has expired", reason="old_token")
    return Refused(Code.OLD_TOKEN, "this token was replaced and is no longer valid", reason="old_token")
