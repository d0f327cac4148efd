"""Attestation as a signal: a baseline at first sight, DRIFT when a later claim differs from it."""

from __future__ import annotations

from typing import Literal

import msgspec


class Claim(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a node says of itself in a heartbeat, with the time (ms) at which it was said."""

    build_id: str | None = None
    capability_hash: str | None = None
    runtime: str | None = None
    ts: int = 0


class Attested(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a node's claims: the baseline, the last one, how often it came to differ."""

    status: Literal["OK", "DRIFT", "SPOOF_SUSPECT", "MISSING"] = "MISSING"
    first_seen: Claim | None = None
    last_seen: Claim | None = None
    drift_count: int = 0
    spoof_count: int = 0


def attest(known: Attested, claim: Claim | None, now: int) -> Attested:
    """What is known after this heartbeat. No claim is no penalty: the baseline stays, the status is MISSING."""
    if claim is None:
        return msgspec.structs.replace(known, status="MISSING")
    claim = msgspec.structs.replace(claim, ts=now)
    first = known.first_seen or claim
    same = (claim.build_id, claim.capability_hash) == (first.build_id, first.capability_hash)
    newly = not same and known.status != "DRIFT"
    return msgspec.structs.replace(
        known,
        status="OK" if same else "DRIFT",
        first_seen=first,
        last_seen=claim,
        drift_count=known.drift_count + newly,
    )
