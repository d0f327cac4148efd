"""Pauses: kinds (or all) that are not leased for a while; who pauses, who resumes, and how pauses end by themselves.

All of them stand in one row, which pulls look at and nobody else locks. Submitting goes on while paused.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from sheratan_hub.rules.command import Decision, Event, Scene, due_wants
from sheratan_hub.rules.nodes import Swept
from sheratan_hub.rules.view import View
from sheratan_hub.storage import Key, Row, Wants

PAUSES = Key("standing", "pauses")
"""The row that holds them."""

AGENDA = "pause"

LOOK_AHEAD_MS = 1000
"""The sweep also sees what ends this soon, so that it knows when the next one must run."""


class Pause(msgspec.Struct, frozen=True, array_like=True):
    """Jobs of `kind` (None: of any) are not leased from `since` until `until` (ms; 0: until they are resumed)."""

    kind: str | None
    since: int
    until: int = 0
    reason: str = ""

    def holds(self, now: int) -> bool:
        """Whether it has not ended."""
        return not self.until or now < self.until


class Pauses(msgspec.Struct, frozen=True, array_like=True):
    """All pauses, in the order they were made."""

    pauses: tuple[Pause, ...] = ()

    def of(self, kind: str, now: int) -> Pause | None:
        """The pause that keeps this kind from being leased."""
        for pause in self.pauses:
            if (pause.kind is None or pause.kind == kind) and pause.holds(now):
                return pause
        return None

    def of_all(self, now: int) -> Pause | None:
        """The pause that keeps everything from being leased."""
        return next((pause for pause in self.pauses if pause.kind is None and pause.holds(now)), None)

    def holding(self, now: int) -> Pauses:
        """Those that have not ended."""
        return Pauses(tuple(pause for pause in self.pauses if pause.holds(now)))


NONE = Pauses()


def pauses_of(row: Row | None) -> Pauses:
    """The pauses kept in the row."""
    return _read(row.doc) if row is not None else NONE


class PauseKind(msgspec.Struct, frozen=True, gc=False):
    """Pause a kind, or all (None), until a time (ms; 0: until resumed) or for so long. It replaces an older one."""

    kind: str | None
    until: int = 0
    for_ms: int = 0
    reason: str = ""

    def wants(self, scene: Scene) -> Wants:
        """The pauses."""
        return Wants(keys={PAUSES})

    def decide(self, view: View) -> Decision:
        """The answer is all pauses that hold now."""
        until = view.now + self.for_ms if self.for_ms else self.until
        before = pauses_of(view.row(*PAUSES)).holding(view.now).pauses
        kept = tuple(pause for pause in before if pause.kind != self.kind)
        return _written(
            view, Pauses((*kept, Pause(self.kind, view.now, until, self.reason))), "queue.paused", self.kind
        )


class ResumeKind(msgspec.Struct, frozen=True, gc=False):
    """End the pause of a kind; None ends every pause. Where nothing is paused nothing changes."""

    kind: str | None

    def wants(self, scene: Scene) -> Wants:
        """The pauses."""
        return Wants(keys={PAUSES})

    def decide(self, view: View) -> Decision:
        """The answer is what is still paused: a kind also is while all are."""
        before = pauses_of(view.row(*PAUSES)).holding(view.now).pauses
        kept = tuple(pause for pause in before if self.kind is not None and pause.kind != self.kind)
        return _written(view, Pauses(kept), "queue.resumed", self.kind)


class SweepPauses(msgspec.Struct, frozen=True, gc=False):
    """Forget the pauses that have ended, so that those who wait look again."""

    def wants(self, scene: Scene) -> Wants:
        """The row, if one of them has ended or soon will."""
        return due_wants(AGENDA, scene.now + LOOK_AHEAD_MS, 1)

    def decide(self, view: View) -> Decision:
        """The answer is `Swept`."""
        for row in view.due(AGENDA):
            if row.due_at > view.now:
                return Decision(Swept(0, row.due_at))
            before = pauses_of(row)
            kept = before.holding(view.now)
            ended = [pause for pause in before.pauses if pause not in kept.pauses]
            notes = tuple(Event(view.now, "queue.resumed", "hub", meta=_said(pause.kind)) for pause in ended)
            return Decision(Swept(1), put=(_row(kept),), notes=notes)
        return Decision(Swept(0))


def _written(view: View, pauses: Pauses, event: str, kind: str | None) -> Decision:
    row, there = _row(pauses), view.row(*PAUSES) is not None
    note = Event(view.now, event, "admin", meta=_said(kind))
    return Decision(pauses, new=() if there else (row,), put=(row,) if there else (), notes=(note,))


def _said(kind: str | None) -> dict[str, str]:
    return {} if kind is None else {"kind": kind}


def _row(pauses: Pauses) -> Row:
    ends = min((pause.until for pause in pauses.pauses if pause.until), default=0)
    return Row(PAUSES.kind, PAUSES.id, _encode(pauses), agenda=AGENDA if ends else None, due_at=ends)


_encode = msgspec.json.Encoder().encode
_read = lru_cache(16)(msgspec.json.Decoder(Pauses).decode)
