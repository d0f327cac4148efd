"""What a hub's signs tell of who calls it, and of time: wrong tokens, ports and proofs, old tokens, slowness."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sheratan_hub.clock import rfc3339
from sheratan_hub.rules.signs import Said, Signs, Told

MINUTE_MS, HOUR_MS = 60_000, 3_600_000

SLOW_COMMIT_MS = 100.0
"""A commit that takes this long on average makes everybody wait."""

SKEW_MS = 30_000

STRAGGLERS_SHOWN = 20


def _most(told: Sequence[Told]) -> int:
    """The most of these events that were told of within a minute."""
    best = total = first = 0
    for one in told:
        total += one.count
        while told[first].at <= one.at - MINUTE_MS:
            total -= told[first].count
            first += 1
        best = max(best, total)
    return best


def _recent(signs: Signs, event: str) -> list[Told]:
    """What the audit log tells of it, of the last hour."""
    return [one for one in signs.told if one.event == event and one.at > signs.now - HOUR_MS]


def _who(told: Iterable[Told]) -> list[str]:
    """Who did it most."""
    counts: dict[str, int] = {}
    for one in told:
        counts[one.who] = counts.get(one.who, 0) + one.count
    return sorted(counts, key=lambda who: (-counts[who], who))[:5]


BURSTS = {
    "AUTH_FAILURE": (
        "auth-burst",
        "{n} requests with a wrong token or without one came within a minute, most from {who}.",
        (
            "sheratan-hub audit search --event AUTH_FAILURE tells who and how; missing_token is a client without one.",
            "If it is yours, give it the token; else keep it out with a firewall. Valid tokens are not held up by it.",
        ),
    ),
    "PORT_MISMATCH": (
        "port-mismatch",
        "{n} requests came to the wrong port within a minute, most from {who}.",
        ("Nodes check in on the control plane, work is handed out on the data plane: exchange the two URLs there.",),
    ),
}


def bursts(signs: Signs) -> Iterator[Said]:
    """More events of a kind than there should be."""
    for event, (code, text, do) in BURSTS.items():
        told = _recent(signs, event)
        n, who = _most(told), _who(told)
        if n > signs.bursts.get(event, 20):
            evidence = {"event": event, "within_a_minute": n, "who": who, "last_at": rfc3339(told[-1].at)}
            yield code, text.format(n=n, who=who[0]), evidence, do, None


def integrity(signs: Signs) -> Iterator[Said]:
    """Results that did not match their proof."""
    told = _recent(signs, "RESULT_INTEGRITY_FAIL")
    if told:
        who, reasons = _who(told), sorted({one.reason for one in told})
        text = f"{sum(one.count for one in told)} results did not match their proof, most from {who[0]}."
        do = (
            "sha_mismatch: the result was changed on its way, or the worker computes another hash. "
            "sig_mismatch: its SHERATAN_RESULT_HMAC_KEY is another one.",
            "Drain that node until it is understood: sheratan-hub nodes drain ID.",
        )
        yield "integrity", text, {"who": who, "reasons": reasons}, do, None


def rotation(signs: Signs) -> Iterator[Said]:
    """A rotation under way, with nodes that would be locked out at its end."""
    turning = signs.turning
    if turning is None or not turning.stragglers:
        return
    n = len(turning.stragglers)
    when = f"at {rfc3339(turning.until)}" if turning.until else "when it is ended"
    who = ", ".join(turning.stragglers[:5]) + (" ..." if n > 5 else "")
    text = f"The token is being rotated, and {n} nodes still use the old one ({who}): they are locked out {when}."
    do = (
        "Give these nodes the new token; sheratan-hub tokens status shows who is left.",
        "If there is not the time, begin again with a later end: sheratan-hub tokens abandon, then tokens rotate.",
    )
    soon = bool(turning.until) and turning.until - signs.now < HOUR_MS
    evidence = {
        "stragglers": list(turning.stragglers[:STRAGGLERS_SHOWN]),
        "count": n,
        "until": rfc3339(turning.until) if turning.until else None,
    }
    yield "rotation-stragglers", text, evidence, do, "critical" if soon else None


def slow_commits(signs: Signs) -> Iterator[Said]:
    """Commits that take long."""
    if signs.commit_ms is not None and signs.commit_ms >= SLOW_COMMIT_MS:
        text = f"A commit takes {signs.commit_ms:.0f} ms on average: everybody waits for the disk."
        do = ("Look who else writes to the store's disk; move the store to a faster one, or use file://.",)
        yield "commit-latency", text, {"commit_ms": round(signs.commit_ms)}, do, None


def clocks(signs: Signs) -> Iterator[Said]:
    """Nodes whose clock is off."""
    off = [one for one in signs.nodes if abs(one.skew_ms) >= SKEW_MS and one.state == "ONLINE"]
    if off:
        worst = max(off, key=lambda one: abs(one.skew_ms))
        text = f"The clocks of {len(off)} nodes differ from the hub's, that of {worst.node_id} by"
        do = ("Let NTP set them. The hub goes by its own clock only; what suffers are their own logs and times.",)
        evidence = {"nodes": [one.node_id for one in off[:STRAGGLERS_SHOWN]]}
        yield "clock-skew", f"{text} {worst.skew_ms / 1000:.0f} s.", evidence, do, None


def failed_loops(signs: Signs) -> Iterator[Said]:
    """Background work that has failed."""
    if signs.failed_loops:
        text = f"Background work has failed since the start: {', '.join(sorted(signs.failed_loops))}."
        do = ("It is tried again each time; the logs tell why it failed.",)
        yield "loop-errors", text, {"errors": signs.failed_loops}, do, None
