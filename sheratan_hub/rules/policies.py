"""The versions of the policy: created, never changed, chained by their hashes; one of them is active."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from sheratan_hub.canonical import canonical
from sheratan_hub.rules.command import Code, Decision, Event, Refused, Scene
from sheratan_hub.rules.policy import Action, Ask, Judge, Policy, Verdict
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

if TYPE_CHECKING:
    from sheratan_hub.rules.nodes import Node

POINTER = Key("policy-active", "active")
START_HASH = "0" * 64


class Pointer(msgspec.Struct, frozen=True):
    """The newest version and the active one. Version 0, which allows all, is always there."""

    latest: int = 0
    latest_sha256: str = START_HASH
    active: int = 0
    active_sha256: str = ""
    activated_at: int = 0


class Snapshot(msgspec.Struct, frozen=True, omit_defaults=True):
    """One version. `sha256` is that of the canonical JSON of {"version", "prev_sha256", "policy"}."""

    version: int
    sha256: str
    prev_sha256: str
    created_at: int
    policy: Policy
    note: str = ""
    file: str = ""
    file_sha256: str = ""

    def proves_itself(self) -> bool:
        """Whether the hash is that of what it says."""
        return self.sha256 == snapshot_sha256(self.version, self.prev_sha256, self.policy)


class CreatePolicy(msgspec.Struct, frozen=True, gc=False):
    """Keep a policy as the next version; it is not active yet. `file` names where it was loaded from, if it was."""

    policy: Policy
    note: str = ""
    file: str = ""
    file_sha256: str = ""

    def wants(self, scene: Scene) -> Wants:
        """The pointer."""
        return Wants(keys={POINTER})

    def decide(self, view: View) -> Decision:
        """The answer is the `Snapshot`. Never refused."""
        held = view.row(*POINTER)
        pointer = pointer_of(held)
        version = pointer.latest + 1
        sha256 = snapshot_sha256(version, pointer.latest_sha256, self.policy)
        made = Snapshot(
            version, sha256, pointer.latest_sha256, view.now, self.policy, self.note, self.file, self.file_sha256
        )
        moved = _pointed(msgspec.structs.replace(pointer, latest=version, latest_sha256=sha256))
        event = Event(view.now, "policy.created", "client", meta={"version": version, "sha256": sha256})
        row = Row("policy", version_id(version), _encode(made))
        return Decision(
            made,
            new=(row,) if held else (row, moved),
            put=(moved,) if held else (),
            events=(event,),
        )


class ActivatePolicy(msgspec.Struct, frozen=True, gc=False):
    """Make a version the active one, if `active` still is. A repeat of what is true already changes nothing."""

    version: int
    active: int

    def wants(self, scene: Scene) -> Wants:
        """The pointer, and the version."""
        return Wants(keys={POINTER}, look={Key("policy", version_id(self.version))})

    def decide(self, view: View) -> Decision:
        """The answer is the `Pointer`. Refused: `policy_not_found`, `precondition_failed`."""
        held = view.row(*POINTER)
        pointer = pointer_of(held)
        row = view.look("policy", version_id(self.version))
        if self.version and row is None:
            raise Refused(Code.POLICY_NOT_FOUND, f"there is no policy version {self.version}")
        if pointer.active != self.active:
            text = f"version {pointer.active} is active, not {self.active}; look at it and decide again"
            raise Refused(Code.PRECONDITION_FAILED, text)
        if pointer.active == self.version:
            return Decision(pointer)
        sha256 = snapshot_of(row).sha256 if row else ""
        moved = msgspec.structs.replace(pointer, active=self.version, active_sha256=sha256, activated_at=view.now)
        meta = {"version": self.version, "sha256": sha256, "before": pointer.active}
        event = Event(view.now, "policy.activated", "client", meta=meta)
        written = _pointed(moved)
        return Decision(moved, new=() if held else (written,), put=(written,) if held else (), events=(event,))


def version_id(version: int) -> str:
    """The row id of a version: in the order of versions."""
    return f"{version:010d}"


def snapshot_of(row: Row) -> Snapshot:
    """The version kept in a row."""
    return _snapshot(row.doc)


def pointer_of(row: Row | None) -> Pointer:
    """What the pointer's row says."""
    return _pointer(row.doc) if row else Pointer()


def judge_of(snapshot: Snapshot | None) -> Judge:
    """What decides by that version; None: version 0."""
    return Judge(snapshot.policy, snapshot.version, snapshot.sha256) if snapshot else Judge()


def snapshot_sha256(version: int, prev_sha256: str, policy: Policy) -> str:
    """The hash of a version, which the next one carries."""
    text = canonical(_encode({"version": version, "prev_sha256": prev_sha256, "policy": policy}))
    return hashlib.sha256(text).hexdigest()


def denied(judge: Judge, ask: Ask, verdict: Verdict) -> Refused:
    """The refusal of what the active policy denies: it names the version and what in it decided."""
    who = f" by node {ask.node_id}" if ask.node_id else ""
    return Refused(
        Code.POLICY_DENIED,
        f"{ask.action}{who} is denied by policy version {judge.version} ({verdict.by})",
        reason=verdict.by,
        detail={"action": ask.action, "version": str(judge.version)},
    )


def refuse_denied(judge: Judge, ask: Ask) -> None:
    """Refused with `policy_denied` unless the policy allows it."""
    verdict = judge.decide(ask)
    if not verdict.allowed:
        raise denied(judge, ask, verdict)


def node_ask(
    action: Action, node_id: str | None, node: Node | None, kind: str | None = None, source: str | None = None
) -> Ask:
    """What a node asks to do; None for a node that was never heard of. No source (`""`) is none."""
    source = source or None
    if node is None:
        return Ask(action, node_id, kind=kind, source=source)
    return Ask(action, node_id, node.zone, frozenset(node.capabilities), node.attested.status, kind, source)


def submit_ask(kind: str, source: str, needs: Iterable[str]) -> Ask:
    """What a producer asks to do; its capabilities are those that the job needs."""
    return Ask("submit", capabilities=frozenset(needs), kind=kind, source=source or None)


def _pointed(pointer: Pointer) -> Row:
    return Row(POINTER.kind, POINTER.id, _encode(pointer))


_encode = msgspec.json.Encoder().encode
_snapshot = msgspec.json.Decoder(Snapshot).decode
_pointer = msgspec.json.Decoder(Pointer).decode
