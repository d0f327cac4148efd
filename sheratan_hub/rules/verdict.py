"""What looks wrong with a hub, by its signs: the hub itself, its store, its disks, its audit log.

What keeps the queue from moving is judged in `verdict_queue.py`, who calls in `verdict_callers.py`. Each finding names
its evidence, what to do, and an entry of docs/runbook.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sheratan_hub.clock import rfc3339
from sheratan_hub.rules.signs import SEVERITIES, DiskSign, Finding, Said, Severity, Signs
from sheratan_hub.rules.verdict_callers import bursts, clocks, failed_loops, integrity, rotation, slow_commits
from sheratan_hub.rules.verdict_queue import (
    backpressure,
    dead_letters,
    mass_silence,
    queue,
    saturated,
    silent_nodes,
)

CODES: dict[str, tuple[Severity, str]] = {
    "hub-down": ("critical", "hub-down"),
    "disk-full": ("critical", "disk-full"),
    "store-damaged": ("critical", "store-damaged"),
    "store-down": ("critical", "store-down"),
    "audit-not-writable": ("critical", "audit-log-not-writable"),
    "audit-broken": ("critical", "audit-log-broken"),
    "mass-silence": ("critical", "mass-silence"),
    "paused": ("warning", "queue-stuck"),
    "no-capable-node": ("warning", "queue-stuck"),
    "nodes-silent": ("warning", "node-stale-or-dead"),
    "policy-denies": ("warning", "policy-denials"),
    "saturated": ("warning", "inflight-limit-reached"),
    "queue-stuck": ("critical", "queue-stuck"),
    "backpressure": ("warning", "queue-full"),
    "node-down": ("warning", "node-stale-or-dead"),
    "dead-letters": ("warning", "dead-letters-growing"),
    "auth-burst": ("warning", "auth-failures"),
    "port-mismatch": ("warning", "port-mismatch"),
    "integrity": ("warning", "integrity-failures"),
    "rotation-stragglers": ("warning", "rotation-with-stragglers"),
    "commit-latency": ("warning", "commits-slow"),
    "clock-skew": ("warning", "clock-skew"),
    "loop-errors": ("note", "background-work-fails"),
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
        checks = (
            "Compare the addresses with those that it was started with; sheratan-hub serve prints them.",
            "If they are right it hangs: end that process (SIGTERM, then SIGKILL) and start it again.",
        )
        text = f"The hub does not answer, but {signs.held_by} holds its store: it hangs, or listens elsewhere."
        yield "hub-down", text, evidence, checks, None
    elif not signs.began:
        do = ("Name the directory or the settings of the hub: --data-dir DIR, --config FILE.", start)
        yield "hub-down", "No hub answers, and none has ever run with this data directory.", evidence, do, None
    elif signs.killed is None:
        text = "The hub is down. Why it ended cannot be told: its audit log cannot be read by who runs this."
        yield "hub-down", text, evidence, (DISK_ADVICE["forbidden"], start), None
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
    do: tuple[str, ...]
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
            text = f"The store refuses: {store.not_writing}"
            do = ("Look at its disk and its log.", "Start the hub again once that is mended.")
            yield "store-down", text, {"store": store.not_writing}, do, None


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
    do: tuple[str, ...]
    if audit.trouble:
        text = f"The audit log cannot be written: {audit.trouble}. Unless [audit] required is off nothing is changed."
        do = (
            "Make it writable: room on its disk, rights of the file and of its directory. The hub goes on by itself.",
        )
        yield "audit-not-writable", text, {"trouble": audit.trouble}, do, None
    if audit.broken:
        text = f"The chain of the audit log is broken: {audit.broken}"
        do = (
            "sheratan-hub audit verify tells the first line that is wrong.",
            "Keep the files as they are: somebody has changed them, or a disk has.",
        )
        yield "audit-broken", text, {"broken": audit.broken}, do, None


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
    bursts,
    integrity,
    rotation,
    slow_commits,
    clocks,
    failed_loops,
)
