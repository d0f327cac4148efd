"""The shared token: the active one, the next one with its deadline, and those that are retired for ever.

Rules see digests only. One row, the ring, holds both slots and what the settings said at the last start; each
retired token has a row of its own under its digest. design.md, "Control plane", Tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from sheratan_hub.rules.command import Code, Decision, Event, Refused, Scene, due_wants
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

SALT = Key("token", "salt")
RING = Key("token", "ring")


class Slot(msgspec.Struct, frozen=True):
    """A token that is in force: its digest as hex, and since when (ms) it stands in its slot."""

    digest: str
    since: int

    @property
    def id(self) -> str:
        """What people call it by."""
        return token_id(self.digest)


class Said(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the settings say: digests of the active and the next token, and the deadline (ms; 0: none)."""

    active: str
    next: str | None = None
    until: int = 0


class Ring(msgspec.Struct, frozen=True, omit_defaults=True):
    """The tokens in force. While there is a `next` both are accepted, up to `until` (ms; 0: until somebody ends it)."""

    active: Slot
    said: Said
    next: Slot | None = None
    until: int = 0
    begun_by: Literal["settings", "api"] = "settings"

    @property
    def row(self) -> Row:
        """The row it is kept as; somebody must look at it at the deadline."""
        turns = self.next is not None and self.until > 0
        return Row(*RING, _encode(self), agenda="rotate" if turns else None, due_at=self.until if turns else 0)

    def over(self, now: int) -> bool:
        """Whether the deadline has passed."""
        return self.next is not None and 0 < self.until <= now


class Retired(msgspec.Struct, frozen=True):
    """A token whose rotation has ended: when (ms), and the id of the one that took its place."""

    digest: str
    at: int
    successor: str

    @property
    def row(self) -> Row:
        """The row it is kept as, under its digest."""
        return Row("retired", self.digest, _encode(self))


class MakeSalt(msgspec.Struct, frozen=True, gc=False):
    """The salt of all digests, `salt` if there is none yet. The answer is the salt."""

    salt: str

    def wants(self, scene: Scene) -> Wants:
        """The row that keeps it."""
        return Wants(keys={SALT})

    def decide(self, view: View) -> Decision:
        """Written once in a store's life."""
        row = view.row(*SALT)
        if row is not None:
            return Decision(row.doc.decode())
        return Decision(self.salt, new=(Row(*SALT, self.salt.encode()),))


class Settled(msgspec.Struct, frozen=True, gc=False):
    """The ring after a start, and sentences for the operator."""

    ring: Ring
    warnings: tuple[str, ...] = ()


class Settle(msgspec.Struct, frozen=True, gc=False):
    """At the start: let the settings and the store agree on the tokens; the settings count where they are new.

    The table of cases stands in docs/protocol.md, "Tokens at a start".
    """

    said: Said

    def wants(self, scene: Scene) -> Wants:
        """The ring, and whether the settings name what is retired."""
        named = [digest for digest in (self.said.active, self.said.next) if digest]
        return Wants(keys={RING, *(Key("retired", digest) for digest in named)})

    def decide(self, view: View) -> Decision:
        """The answer is `Settled`. Refused with `old_token` when the settings newly name nothing but retired tokens."""
        row = view.row(*RING)
        named = [digest for digest in (self.said.active, self.said.next) if digest]
        gone = [digest for digest in named if view.row("retired", digest) is not None]
        before = _decode_ring(row.doc) if row is not None else None
        ring, ended, warnings = _heard(before, self.said, gone, view.now)
        began = ring.next is not None and (
            before is None or before.next is None or before.next.digest != ring.next.digest
        )
        retired = [] if ended is None else [ended]
        if ring.over(view.now):
            ring, ended = _turned(ring, view.now)
            retired.append(ended)
            began = False
        return Decision(
            Settled(ring, warnings),
            new=(*(one.row for one in retired), *(() if row is not None else (ring.row,))),
            put=(ring.row,) if row is not None and ring != before else (),
            events=(
                *(_finalized(one, view.now) for one in retired),
                *((_started(ring, view.now, "hub"),) if began else ()),
            ),
        )


def _heard(
    ring: Ring | None, said: Said, gone: Collection[str], now: int
) -> tuple[Ring, Retired | None, tuple[str, ...]]:
    """(the ring as the settings want it, the token that this retires at once, warnings)"""
    wanted = said.next if said.next != said.active and said.next not in gone else None
    if ring is None:
        slot = Slot(wanted, now) if wanted else None
        return Ring(Slot(said.active, now), said, slot, said.until if slot else 0), None, ()
    warnings = tuple(
        f"the settings name the token {token_id(digest)}, which is retired and stays so; "
        f"{ring.active.id} is the one in force"
        for digest in dict.fromkeys(gone)
    )
    if said == ring.said:
        return ring, None, warnings
    if said.active in gone and wanted is None:
        raise Refused(
            Code.OLD_TOKEN,
            f"the settings name no token but {token_id(said.active)}, which is retired and stays so. "
            f"Set SHERATAN_HUB_TOKEN_ACTIVE to the token that took its place ({ring.active.id}), or to a new one",
        )
    ended = None
    active = ring.active if said.active in gone else _active(ring, said, now)
    if ring.next is not None and active.digest == ring.next.digest and wanted != ring.active.digest:
        ended = Retired(ring.active.digest, now, active.id)
    return _with_next(msgspec.structs.replace(ring, active=active, said=said), ring, wanted, now), ended, warnings


def _active(ring: Ring, said: Said, now: int) -> Slot:
    return ring.active if said.active == ring.active.digest else Slot(said.active, now)


def _with_next(ring: Ring, before: Ring, wanted: str | None, now: int) -> Ring:
    """The ring with the next token that the settings want, or the one of a rotation that they did not begin."""
    kept = before.next if before.next is not None and before.next.digest != ring.active.digest else None
    if wanted is not None and wanted != ring.active.digest:
        same = kept is not None and kept.digest == wanted
        until = ring.said.until
        if same and before.begun_by == "api":
            until = until or before.until
        slot = kept if same else Slot(wanted, now)
        return msgspec.structs.replace(ring, next=slot, until=until, begun_by="settings")
    if kept is None or before.begun_by == "settings":
        return msgspec.structs.replace(ring, next=None, until=0, begun_by="settings")
    return msgspec.structs.replace(ring, next=kept)


class Rotate(msgspec.Struct, frozen=True, gc=False):
    """Begin a rotation to the token of `digest`, which ends at `until` (ms) or `in_ms` from now."""

    digest: str
    until: int = 0
    in_ms: int = 0

    def wants(self, scene: Scene) -> Wants:
        """The ring, and whether the token is retired."""
        return Wants(keys={RING, Key("retired", self.digest)})

    def decide(self, view: View) -> Decision:
        """The answer is (the ring, whether it is a repeat). Refused: `rotation_under_way`, `invalid_field`."""
        ring = _ring(view)
        if view.row("retired", self.digest) is not None:
            raise Refused(Code.INVALID_FIELD, "this token is retired and stays so - at `$.token`")
        if self.digest == ring.active.digest:
            raise Refused(Code.INVALID_FIELD, "this token is the active one already - at `$.token`")
        if ring.next is not None:
            if ring.next.digest == self.digest:
                return Decision((ring, True))
            raise Refused(Code.ROTATION_UNDER_WAY, f"a rotation to {ring.next.id} is under way; abandon it first")
        until = self.until or view.now + self.in_ms
        if until <= view.now:
            raise Refused(Code.INVALID_FIELD, "the rotation would end in the past - at `$.until`")
        begun = msgspec.structs.replace(ring, next=Slot(self.digest, view.now), until=until, begun_by="api")
        return Decision((begun, False), put=(begun.row,), events=(_started(begun, view.now, "operator"),))


class Abandon(msgspec.Struct, frozen=True, gc=False):
    """End the rotation under way as if it had never begun: the next token is no longer accepted."""

    def wants(self, scene: Scene) -> Wants:
        """The ring."""
        return Wants(keys={RING})

    def decide(self, view: View) -> Decision:
        """The answer is the ring. Refused with `no_rotation`, also when the deadline has passed."""
        ring = _ring(view)
        if ring.next is None or ring.over(view.now):
            raise Refused(Code.NO_ROTATION, "no rotation is under way")
        left = msgspec.structs.replace(ring, next=None, until=0, begun_by="settings")
        meta = {"reason": "rotation_abandoned", "active": ring.active.id, "next": ring.next.id}
        event = Event(view.now, "token.rotation_abandoned", "operator", meta=meta)
        return Decision(left, put=(left.row,), events=(event,))


class Turn(msgspec.Struct, frozen=True, gc=False):
    """The rotation clock: what is due is finished, once, whichever hub comes first."""

    def wants(self, scene: Scene) -> Wants:
        """The ring, if its deadline has passed."""
        return due_wants("rotate", scene.now, 1)

    def decide(self, view: View) -> Decision:
        """The answer is whether a rotation was finished."""
        for row in view.due("rotate"):
            ring = _decode_ring(row.doc)
            if ring.over(view.now):
                turned, ended = _turned(ring, view.now)
                return Decision(True, new=(ended.row,), put=(turned.row,), events=(_finalized(ended, view.now),))
        return Decision(False)


def _turned(ring: Ring, now: int) -> tuple[Ring, Retired]:
    """The next token is the active one, and the active one is retired. Only where there is a next one."""
    active = msgspec.structs.replace(ring.next or ring.active, since=now)
    left = msgspec.structs.replace(ring, active=active, next=None, until=0, begun_by="settings")
    return left, Retired(ring.active.digest, now, active.id)


def _started(ring: Ring, now: int, actor: str) -> Event:
    meta = {"active": ring.active.id, "next": ring.next.id if ring.next else None, "until": ring.until or None}
    return Event(now, "token.rotation_started", actor, meta=meta)


def _finalized(ended: Retired, now: int) -> Event:
    meta = {"active": ended.successor, "retired": token_id(ended.digest)}
    return Event(now, "token.rotation_finalized", "hub", meta=meta)


def _ring(view: View) -> Ring:
    row = view.row(*RING)
    if row is None:
        raise Refused(Code.NO_ROTATION, "this hub keeps no tokens")
    return _decode_ring(row.doc)


def token_id(digest: str) -> str:
    """What people call a token by: the start of its salted digest, which tells nothing of its value."""
    return f"t-{digest[:12]}"


def ring_of(row: Row) -> Ring:
    """The ring kept in a row."""
    return _decode_ring(row.doc)


def retired_of(row: Row) -> Retired:
    """The retired token kept in a row."""
    return _decode_retired(row.doc)


_encode = msgspec.json.Encoder().encode
_decode_ring = msgspec.json.Decoder(Ring).decode
_decode_retired = msgspec.json.Decoder(Retired).decode
