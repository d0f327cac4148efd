"""Attestation as a signal: a baseline at first sight; claims that differ from it, or that change too often, are told.

Nothing is blocked by it. DRIFT: the last claim differs from the baseline. SPOOF_SUSPECT: its `capability_hash` has
changed too often in a short time. MISSING: the last heartbeat claimed nothing, which is no penalty.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sheratan_hub.rules.command import Limits

Status = Literal["OK", "DRIFT", "SPOOF_SUSPECT", "MISSING"]

HISTORY = 10
"""So many changes of what a node claims are remembered."""


class Claim(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a node says of itself in a heartbeat, with the time (ms) at which it was said."""

    build_id: str | None = None
    capability_hash: str | None = None
    runtime: str | None = None
    ts: int = 0

    def same(self, other: Claim) -> bool:
        """Whether it names the same build and capabilities; the runtime is shown only."""
        return self.build_id == other.build_id and self.capability_hash == other.capability_hash


class Attested(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a node's claims: the baseline, the last one, how often it came to differ.

    `flips`: when (ms) the capability hash changed, the last few. `history`: the last claims that were new.
    """

    status: Status = "MISSING"
    first_seen: Claim | None = None
    last_seen: Claim | None = None
    drift_count: int = 0
    spoof_count: int = 0
    flips: tuple[int, ...] = ()
    history: tuple[Claim, ...] = ()


def attest(known: Attested, claim: Claim | None, now: int, limits: Limits) -> Attested:
    """What is known after this heartbeat. No claim is no penalty: the baseline stays, the status is MISSING."""
    if claim is None:
        return known if known.status == "MISSING" else msgspec.structs.replace(known, status="MISSING")
    first, last = known.first_seen or claim, known.last_seen or claim
    changed = known.first_seen is None or not claim.same(last)
    if not changed and not known.flips:  # the usual case: as before
        return msgspec.structs.replace(known, status=_status(claim.same(first), False), last_seen=_at(claim, now))
    flips = _flips(known.flips, last, claim, now, limits)
    suspect = len(flips) >= limits.spoof_threshold
    status = _status(claim.same(first), suspect)
    return Attested(
        status,
        known.first_seen or _at(claim, now),
        _at(claim, now),
        known.drift_count + (last.same(first) and not claim.same(first)),
        known.spoof_count + (suspect and not (known.status == "SPOOF_SUSPECT" or _suspected(known, now, limits))),
        flips,
        (*known.history, _at(claim, now))[-HISTORY:] if changed else known.history,
    )


def accepted(known: Attested) -> Attested:
    """The last claim is the baseline from now on; what was counted stays counted."""
    return msgspec.structs.replace(known, status="OK", first_seen=known.last_seen, flips=())


def news(before: Attested, after: Attested) -> tuple[str, ...]:
    """What of a heartbeat's claim is worth an event: first seen, and each time it comes to differ or to be suspect."""
    found = []
    if before.first_seen is None and after.first_seen is not None:
        found.append("first_seen")
    if after.drift_count > before.drift_count:
        found.append("drift")
    if after.spoof_count > before.spoof_count:
        found.append("spoof_suspect")
    return tuple(found)


def _flips(flips: tuple[int, ...], last: Claim, claim: Claim, now: int, limits: Limits) -> tuple[int, ...]:
    """The changes of the capability hash in the window, this one included, no more than are needed."""
    recent = tuple(at for at in flips if at > now - limits.flip_window_ms)
    was, now_is = last.capability_hash, claim.capability_hash
    if was is not None and now_is is not None and was != now_is:
        recent = (*recent, now)
    return recent[-limits.spoof_threshold :]


def _suspected(known: Attested, now: int, limits: Limits) -> bool:
    """Whether it was suspect before this heartbeat, and still within the window."""
    return len([at for at in known.flips if at > now - limits.flip_window_ms]) >= limits.spoof_threshold


def _status(same: bool, suspect: bool) -> Status:
    if suspect:
        return "SPOOF_SUSPECT"
    return "OK" if same else "DRIFT"


def _at(claim: Claim, now: int) -> Claim:
    return Claim(claim.build_id, claim.capability_hash, claim.runtime, now)
