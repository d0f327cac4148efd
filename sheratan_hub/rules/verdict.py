"""What looks wrong with a hub, by its signs: the hub itself, its store, its disks, its audit log, its callers.

What keeps the queue from moving is judged in `verdict_queue.py`. Each finding names its evidence, what to do, and an
entry of docs/runbook.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sheratan_hub.clock import rfc3339
from sheratan_hub.rules.signs import SEVERITIES, DiskSign, Finding, Said, Severity, Signs, Told
from sheratan_hub.rules.verdict_queue import (
    backpressure,
    dead_letters,
    mass_silence,
    queue,
    saturated,
    silent_nodes,
)

MINUTE_MS, HOUR_MS = 60_000, 3_600_000

SLOW_COMMIT_MS = 100.0
"""A commit that takes this long on average makes everybody wait."""

SKEW_MS = 30_000

STRAGGLERS_SHOWN = 20

CODES: dict[str, tuple[Severity, str]] = {
    "hub-down": ("critical", "hub-down"),
    "disk-full": ("critical", "disk-full"),
    "store-damaged": ("critical", "store-damaged"),
    "audit-broken": ("critical", "audit-broken"),
    "mass-silence": ("critical", "mass-silence"),
    "paused": ("warning", "queue-stuck"),
    "no-capable-node": ("warning", "no-capable-node"),
    "nodes-silent": ("warning", "node-down"),
    "policy-denies": ("warning", "no-capable-node"),
    "saturated": ("warning", "saturated"),
    "queue-stuck": ("critical", "queue-stuck"),
    "backpressure": ("warning", "backpressure"),
    "node-down": ("warning", "node-down"),
    "dead-letters": ("warning", "dead-letters"),
    "auth-burst": ("warning", "auth-burst"),
    "port-mismatch": ("warning", "port-mismatch"),
    "integrity": ("warning", "integrity"),
    "rotation-stragglers": ("warning", "rotation-stragglers"),
    "commit-latency": ("warning", "commit-latency"),
    "clock-skew": ("warning", "clock-skew"),
    "loop-errors": ("note", "hub-down"),
}
"""Every code with its usual severity and its entry in docs/runbook.md; of equal severity causes come first."""


def verdict(signs: Signs) -> list[Finding]:
    """Everything that looks wrong, the worst first; empty: nothing."""
    found = [_finding(*one) for check in CHECKS for one in check(signs)]
    places = list(CODES)
    return sorted(found, key=lambda one: (SEVERITIES.index(one.severity), places.index(one.code)))


def wrong(findings: Iterable[Finding]) -> bool:
    """Whether any of them is more than a note."""
    return any(one.severity != "note" for one in findings)


def _finding(code: str, text: str, evidence: dict[str, Any], do: tuple[str, ...], severity: Severity | None) -> Finding:
    usual, anchor = CODES[code]
    return Finding(code, severity or usual, text, evidence, do, f"docs/runbook.md#{anchor}")


def _hub(signs: Signs) -> Iterator[Said]:
    """Planes that do not answer."""
    silent = [one for one in signs.planes if not one.answers]
    if not silent:
        return
    evidence: dict[str, Any] = {one.plane: f"{one.url}: {one.why}" for one in silent}
    start = "Start it: sheratan-hub serve, or systemctl start sheratan-hub. What it has acknowledged is in its store."
    if not signs.down:
        planes = " and ".join(one.plane for one in silent)
        do = ("Compare the addresses with those in hub.toml.", "Look at the end of its log; then start the hub again.")
        yield "hub-down", f"The {planes} plane does not answer, though the hub runs.", evidence, do, None
    elif signs.held_by:
        evidence["held_by"] = signs.held_by
        do = (
            "Compare the addresses with those that it was started with; sheratan-hub serve prints them.",
            "If they are right it hangs: end that process (SIGTERM, then SIGKILL) and start it again.",
        )
        text = f"The hub does not answer, but {signs.held_by} holds its store: it hangs, or listens elsewhere."
        yield "hub-down", text, evidence, do, None
    elif not signs.began:
        do = ("Name the directory or the settings of the hub: --data-dir DIR, --config FILE.", start)
        yield "hub-down", "No hub answers, and none has ever run with this data directory.", evidence, do, None
    elif signs.killed:
        why = "Find out why: the end of its log, and the system's journal (out of memory, a signal, a power cut)."
        at = rfc3339(signs.now)
        text = f"The hub is down: it was killed or has crashed. The last that its files tell of is of {at}."
        yield "hub-down", text, {**evidence, "last_sign_of_life": at}, (start, why), None
    else:
        at = rfc3339(signs.now)
        text = f"The hub is down: it was stopped (HUB_STOP). The last that its files tell of is of {at}."
        yield "hub-down", text, {**evidence, "last_sign_of_life": at}, (start,), None


STORE_ADVICE = {
    "damaged": (
        "Do not delete anything. sheratan-hub store check tells what is wrong with it.",
        "sheratan-hub store repair writes a mended copy, sheratan-hub store restore brings the last backup back.",
    ),
    "foreign": ("Look at store.url (SHERATAN_STORE_URL): it names a file of something else.",),
    "newer": ("Install the version of sheratan-hub that wrote it, or a later one.",),
    "missing": ("Look at store.url and hub.data_dir: the hub may have been started in another directory.",),
    "unknown": ("Look at the rights of its files, and try again.",),
}


def _store(signs: Signs) -> Iterator[Said]:
    """A store that cannot be read, or in which something does not fit."""
    store = signs.store
    if store.state != "ok" and store.text:
        severity: Severity | None = "warning" if store.state in ("missing", "unknown") else None
        text = f"The store cannot be read: {store.text}"
        yield "store-damaged", text, {"state": store.state}, STORE_ADVICE[store.state], severity
    if store.problems:
        text = f"The store can be read, but not all in it fits together: {store.problems[0]}"
        do = ("sheratan-hub store check tells all; sheratan-hub store repair writes a mended copy.",)
        yield "store-damaged", text, {"problems": list(store.problems)}, do, None
    if store.not_writing and not any(one.state in FULL for one in signs.disks):
        if "no room" in store.not_writing or "read-only" in store.not_writing:
            text = f"The store has no room to write: {store.not_writing}"
            do = ("Make room, or make it writable again; the hub goes on by itself.",)
            yield "disk-full", text, {"store": store.not_writing}, do, None
        else:
            text = f"The store refuses to be written: {store.not_writing}"
            do = ("Look at its disk and its log.", "Start the hub again once that is mended.")
            yield "store-damaged", text, {"store": store.not_writing}, do, None


FULL = ("full", "read-only", "forbidden")

DISK_TEXTS = {
    "full": "The disk of {path} is full: nothing can be written.",
    "read-only": "The disk of {path} is read-only: nothing can be written.",
    "forbidden": "{path} may not be written by the user who runs this.",
    "low": "The disk of {path} is nearly full.",
}
DISK_ADVICE = {
    "full": "Make room there. The hub refuses changes with 503 meanwhile and goes on by itself.",
    "read-only": "Mount it writable again (a disk with errors is often mounted read-only: look at dmesg).",
    "forbidden": "Run this as the hub's user, or give the directory back to it.",
    "low": "Make room, or keep less: [retention], [audit] keep_files.",
}


def _disks(signs: Signs) -> Iterator[Said]:
    """Directories that cannot be written, or not for long."""
    for state in (*FULL, "low"):
        disks: Sequence[DiskSign] = [one for one in signs.disks if one.state == state]
        if disks:
            paths = " and ".join(one.path for one in disks)
            evidence = {"paths": [one.path for one in disks], "state": state}
            severity: Severity | None = "warning" if state in ("low", "forbidden") else None
            yield "disk-full", DISK_TEXTS[state].format(path=paths), evidence, (DISK_ADVICE[state],), severity


def _audit(signs: Signs) -> Iterator[Said]:
    """An audit log that cannot be written, or whose chain is broken."""
    audit = signs.audit
    if audit.trouble:
        text = f"The audit log cannot be written: {audit.trouble}. Unless [audit] required is off nothing is changed."
        do = (
            "Make it writable: room on its disk, rights of the file and of its directory. The hub goes on by itself.",
        )
        yield "audit-broken", text, {"trouble": audit.trouble}, do, None
    if audit.broken:
        text = f"The chain of the audit log is broken: {audit.broken}"
        do = (
            "sheratan-hub audit verify tells the first line that is wrong.",
            "Keep the files as they are: somebody has changed them, or a disk has.",
        )
        yield "audit-broken", text, {"broken": audit.broken}, do, None


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


def _bursts(signs: Signs) -> Iterator[Said]:
    """More events of a kind than there should be."""
    for event, (code, text, do) in BURSTS.items():
        told = _recent(signs, event)
        n, who = _most(told), _who(told)
        if n > signs.bursts.get(event, 20):
            evidence = {"event": event, "within_a_minute": n, "who": who, "last_at": rfc3339(told[-1].at)}
            yield code, text.format(n=n, who=who[0]), evidence, do, None


def _integrity(signs: Signs) -> Iterator[Said]:
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


def _rotation(signs: Signs) -> Iterator[Said]:
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


def _commits(signs: Signs) -> Iterator[Said]:
    """Commits that take long."""
    if signs.commit_ms is not None and signs.commit_ms >= SLOW_COMMIT_MS:
        text = f"A commit takes {signs.commit_ms:.0f} ms on average: everybody waits for the disk."
        do = ("Look who else writes to the store's disk; move the store to a faster one, or use file://.",)
        yield "commit-latency", text, {"commit_ms": round(signs.commit_ms)}, do, None


def _clocks(signs: Signs) -> Iterator[Said]:
    """Nodes whose clock is off."""
    off = [one for one in signs.nodes if abs(one.skew_ms) >= SKEW_MS and one.state == "ONLINE"]
    if off:
        worst = max(off, key=lambda one: abs(one.skew_ms))
        text = f"The clocks of {len(off)} nodes differ from the hub's, that of {worst.node_id} by"
        do = ("Let NTP set them. The hub goes by its own clock only; what suffers are their own logs and times.",)
        evidence = {"nodes": [one.node_id for one in off[:STRAGGLERS_SHOWN]]}
        yield "clock-skew", f"{text} {worst.skew_ms / 1000:.0f} s.", evidence, do, None


def _loops(signs: Signs) -> Iterator[Said]:
    """Background work that has failed."""
    if signs.failed_loops:
        text = f"Background work has failed since the start: {', '.join(sorted(signs.failed_loops))}."
        do = ("It is tried again each time; the logs tell why it failed.",)
        yield "loop-errors", text, {"errors": signs.failed_loops}, do, None


CHECKS: tuple[Callable[[Signs], Iterator[Said]], ...] = (
    _hub,
    _disks,
    _store,
    _audit,
    mass_silence,
    queue,
    saturated,
    backpressure,
    silent_nodes,
    dead_letters,
    _bursts,
    _integrity,
    _rotation,
    _commits,
    _clocks,
    _loops,
)
