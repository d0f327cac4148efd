"""Scoped tokens: each with a role and an end, one row each; and what every role may do, as one table."""

from __future__ import annotations

from typing import Literal

import msgspec

from sheratan_hub.rules.command import Code, Decision, Event, Refused, Scene, due_wants
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

Role = Literal["admin", "node", "producer", "viewer"]

Right = Literal["public", "local", "metrics", "docs", "token", "admin", "work", "submit", "jobs", "read"]
"""What a route asks of its caller. `public` nothing; `local` loopback on the data plane; `metrics` as `/metrics` is
configured; `docs` any token, and on loopback none; `work` what nodes do, `submit` to hand jobs in, `jobs` to look at
jobs, `read` to look at the rest; `token`
everything else; `admin` the same, and loopback."""

TOKEN_RIGHTS: frozenset[Right] = frozenset({"token", "admin", "work", "submit", "jobs", "read"})
"""The rights that need a token."""

GRANTS: dict[Role, frozenset[Right]] = {
    "admin": TOKEN_RIGHTS | {"metrics", "docs"},
    "node": frozenset({"work", "docs"}),
    "producer": frozenset({"submit", "jobs", "docs"}),
    "viewer": frozenset({"jobs", "read", "metrics", "docs"}),
}
"""What each role may; the shared token has the role admin."""

KEPT_MS = 30 * 86_400_000
"""An expired token is remembered so long, to tell its holder why it is refused."""


class Access(msgspec.Struct, frozen=True, omit_defaults=True):
    """A scoped token. `expires_at` in ms, 0: never. `node_id`: the node that it is bound to."""

    id: str
    digest: str
    role: Role
    created_at: int
    expires_at: int = 0
    node_id: str | None = None
    name: str | None = None

    @property
    def row(self) -> Row:
        """The row it is kept as; it goes away some time after its end."""
        labels = (self.role, None, None, None, self.node_id)
        agenda = "access" if self.expires_at else None
        return Row(
            "access", self.id, _encode(self), labels, None, 0, agenda, self.expires_at + KEPT_MS if agenda else 0
        )


class Admit(msgspec.Struct, frozen=True, gc=False):
    """Make a scoped token that lasts for `expires_in_ms` (0: until it is revoked)."""

    id: str
    digest: str
    role: Role
    expires_in_ms: int = 0
    node_id: str | None = None
    name: str | None = None

    def wants(self, scene: Scene) -> Wants:
        """The row that must not be there."""
        return Wants(keys={Key("access", self.id)})

    def decide(self, view: View) -> Decision:
        """The answer is the `Access`. Refused with `invalid_field` when role and node do not fit."""
        if (self.role == "node") != (self.node_id is not None):
            raise Refused(Code.INVALID_FIELD, "node_id is for the role node, which needs it - at `$.node_id`")
        expires_at = view.now + self.expires_in_ms if self.expires_in_ms else 0
        made = Access(self.id, self.digest, self.role, view.now, expires_at, self.node_id, self.name)
        return Decision(made, new=(made.row,), events=(_event(made, "access.created", view.now),))


class Revoke(msgspec.Struct, frozen=True, gc=False):
    """Take a scoped token back, at once and for ever."""

    id: str

    def wants(self, scene: Scene) -> Wants:
        """Its row."""
        return Wants(keys={Key("access", self.id)})

    def decide(self, view: View) -> Decision:
        """The answer is the `Access`. Refused with `access_not_found`."""
        row = view.row("access", self.id)
        if row is None:
            raise Refused(Code.ACCESS_NOT_FOUND, f"there is no scoped token {self.id[:100]}")
        access = access_of(row)
        return Decision(access, gone=(row.key,), events=(_event(access, "access.revoked", view.now),))


class ForgetAccess(msgspec.Struct, frozen=True, gc=False):
    """Forget scoped tokens that have been expired for long."""

    limit: int = 500

    def wants(self, scene: Scene) -> Wants:
        """Those due by now."""
        return due_wants("access", scene.now, self.limit)

    def decide(self, view: View) -> Decision:
        """The answer is how many were forgotten."""
        gone = tuple(row.key for row in view.due("access"))
        return Decision(len(gone), gone=gone)


def access_of(row: Row) -> Access:
    """The scoped token kept in a row."""
    return _decode(row.doc)


def _event(access: Access, event: str, now: int) -> Event:
    meta = {"access_id": access.id, "role": access.role}
    if access.node_id is not None:
        meta["for_node"] = access.node_id
    return Event(now, event, "operator", meta=meta)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Access).decode
