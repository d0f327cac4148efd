"""What keeps the queue from moving, by a hub's signs: pauses, nodes that cannot or do not come, limits, failures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sheratan_hub.clock import rfc3339
from sheratan_hub.rules.signs import Said, Severity, Signs, Wait

STUCK_MS = 300_000
"""When the first job that may be leased has waited so long and nothing runs, the queue stands still."""

RECENT_MS = 600_000
MANY_DEAD = 10
"""So many jobs that failed for good within ten minutes are a warning; fewer a note."""

LONG_DEAD_MS = 86_400_000
"""A node that has been DEAD for longer was most likely taken away on purpose: a note."""

SHOWN = 20
SILENT = ("node_stale", "node_dead")


def mass_silence(signs: Signs) -> Iterator[Said]:
    """Most of the fleet fell silent at once."""
    fleet = signs.fleet
    if not fleet.braked(signs.now):
        return
    text = f"{fleet.silent} of {fleet.known} nodes fell silent at once: a fault of the network or of the hub's machine."
    do = (
        "Look at the network between the nodes and the hub first. Leases stay with their nodes until "
        f"{rfc3339(fleet.until)}, and the brake ends by itself.",
        "If the machines are truly gone: sheratan-hub nodes reap hands their jobs to others now.",
    )
    evidence = {"silent": fleet.silent, "known": fleet.known, "since": rfc3339(fleet.since)}
    yield "mass-silence", text, {**evidence, "until": rfc3339(fleet.until)}, do, None


def queue(signs: Signs) -> Iterator[Said]:
    """Why the oldest jobs wait: paused, nobody can, who could is silent, the policy, or nobody comes for them."""
    yield from _paused(signs)
    yield from _nobody_can(signs)
    yield from _silent(signs)
    yield from _denied(signs)
    stuck = signs.oldest_ms is not None and signs.oldest_ms >= STUCK_MS and not signs.count("job:running")
    if stuck and not signs.down:
        minutes = (signs.oldest_ms or 0) // 60_000
        reasons = sorted({reason for one in signs.waits for reason in one.reasons})
        text = f"The queue stands still: the oldest job waits for {minutes} minutes, and nothing runs."
        do = (
            "Do what the other findings say.",
            "If nodes are free (waits_its_turn), their workers do not pull: look at their logs and their --data-url.",
        )
        yield "queue-stuck", text, {"oldest_seconds": (signs.oldest_ms or 0) // 1000, "reasons": reasons}, do, None


def _paused(signs: Signs) -> Iterator[Said]:
    holding = [pause for pause in signs.pauses if pause.holds(signs.now)]
    if not holding:
        return
    what = "everything" if any(pause.kind is None for pause in holding) else _kinds(pause.kind for pause in holding)
    ends = "some do not end by themselves" if any(not pause.until for pause in holding) else "they end by themselves"
    kept = [one for one in signs.waits if "paused" in one.reasons]
    text = f"Paused: {what}. Nothing of that is handed out; {ends if len(holding) > 1 else _end(holding[0].until)}."
    evidence = {
        "kinds": [pause.kind for pause in holding[:SHOWN]],
        "until": [rfc3339(pause.until) if pause.until else None for pause in holding[:SHOWN]],
        "waiting": _ids(kept),
    }
    do = ("sheratan-hub queue show tells who is paused and why; sheratan-hub queue resume [KIND] ends it.",)
    yield "paused", text, evidence, do, None if kept else "note"


def _end(until: int) -> str:
    return f"it ends at {rfc3339(until)}" if until else "it does not end by itself"


def _nobody_can(signs: Signs) -> Iterator[Said]:
    waits = [one for one in signs.waits if "no_capable_node" in one.reasons]
    if not waits:
        return
    lacking = sorted({name for one in waits for name in one.lacking})
    known = sum(signs.count(f"node:{state}") for state in ("ONLINE", "STALE", "DEAD"))
    if not known and not lacking:
        why = "no node is known"
    elif lacking:
        why = f"no node offers {', '.join(lacking[:5])}"
    else:
        why = "no node asks for this kind, or offers all that is needed"
    text = f"No node can run jobs of {_kinds(one.kind for one in waits)}: {why}."
    do = (
        "Start a worker that can: sheratan-hub worker MODULE --capabilities "
        f"{','.join(lacking[:5]) or '...'} with a handler for it.",
        "sheratan-hub jobs explain ID tells for one job what keeps each node from it.",
    )
    evidence = {"jobs": _ids(waits), "kinds": sorted({one.kind for one in waits}), "lacking": lacking, "nodes": known}
    yield "no-capable-node", text, evidence, do, _by_age(signs, waits)


def _silent(signs: Signs) -> Iterator[Said]:
    """The nodes that could have the jobs are all silent."""
    waits = [one for one in signs.waits if set(one.reasons) & set(SILENT) and set(one.reasons) <= {*SILENT, "paused"}]
    if not waits:
        return
    online = signs.count("node:ONLINE")
    who = "All nodes that could run them are" if online else "All nodes are"
    text = f"{len(waits)} of the oldest jobs wait for nodes that are silent. {who} STALE or DEAD."
    do = (
        "Look whether the workers run, and whether they reach the control plane (sheratan-hub nodes list).",
        "If many fell silent at once, look at the network first.",
    )
    evidence = {"jobs": _ids(waits), **{state: signs.count(f"node:{state}") for state in ("ONLINE", "STALE", "DEAD")}}
    yield "nodes-silent", text, evidence, do, _by_age(signs, waits)


def _denied(signs: Signs) -> Iterator[Said]:
    waits = [one for one in signs.waits if "policy_denied" in one.reasons]
    if waits:
        text = f"The active policy keeps {len(waits)} of the oldest jobs from the nodes that could run them."
        do = ("sheratan-hub jobs explain ID names the rule; sheratan-hub policies plan FILE tries another policy.",)
        yield "policy-denies", text, {"jobs": _ids(waits)}, do, None


def saturated(signs: Signs) -> Iterator[Said]:
    """All leases that may be given are given, or every node that could is full."""
    running, most = signs.count("job:running"), signs.limits.max_inflight
    full = [one for one in signs.waits if {"node_full", "node_busy"} & set(one.reasons)]
    if running >= most and signs.count("job:pending"):
        text = f"Saturated: {running} of at most {most} leases are given, and jobs wait."
        do = ("Raise SHERATAN_MAX_INFLIGHT if the fleet can do more; else add nodes, or let producers slow down.",)
        yield "saturated", text, {"inflight": running, "limit": most}, do, None
    elif full:
        text = f"{len(full)} of the oldest jobs wait for nodes that are full or busy."
        do = ("Add nodes, or raise the workers' --concurrency.",)
        lasting = max(one.age_ms for one in full) >= STUCK_MS
        evidence = {"jobs": _ids(full), "inflight": running, "limit": most}
        yield "saturated", text, evidence, do, None if lasting else "note"


def backpressure(signs: Signs) -> Iterator[Said]:
    """The queue is full, or was a moment ago."""
    depth, most = signs.count("job:pending") + signs.count("job:quarantined"), signs.limits.max_depth
    drops = [one for one in signs.told if one.event == "BACKPRESSURE_DROP" and one.at > signs.now - RECENT_MS]
    if depth < most and not drops:
        return
    if depth >= most:
        text = f"The queue is full ({depth} of {most} jobs): submits are refused."
    else:
        text = f"The queue was full within the last ten minutes (now {depth} of {most} jobs): submits were refused."
    do = (
        "See why it is not emptied (the other findings); add workers.",
        "SHERATAN_MAX_QUEUE_DEPTH sets the limit; producers should wait as Retry-After tells them.",
    )
    evidence = {"depth": depth, "limit": most, "refused_lately": sum(one.count for one in drops)}
    yield "backpressure", text, evidence, do, None


def silent_nodes(signs: Signs) -> Iterator[Said]:
    """Nodes that are silent, while others are not."""
    silent = [one for one in signs.nodes if one.state in ("STALE", "DEAD")]
    n = signs.count("node:STALE") + signs.count("node:DEAD")
    if not max(n, len(silent)):
        return
    known = n + signs.count("node:ONLINE")
    names = ", ".join(one.node_id for one in silent[:5]) + (" ..." if len(silent) > 5 else "")
    text = f"{max(n, len(silent))} of {max(known, len(signs.nodes))} nodes are silent" + (
        f": {names}." if names else "."
    )
    do = (
        "Look whether these machines and their workers run.",
        "One that will not come back is forgotten by sheratan-hub nodes forget ID.",
    )
    severity: Severity | None = "note" if silent and all(one.silent_ms > LONG_DEAD_MS for one in silent) else None
    yield "node-down", text, {"nodes": [one.node_id for one in silent[:SHOWN]]}, do, severity


def dead_letters(signs: Signs) -> Iterator[Said]:
    """Jobs that failed for good."""
    dead, most = signs.count("job:failed"), signs.limits.dead_letters_max
    if not dead:
        return
    lately = [one for one in signs.told if one.event == "DLQ_ENQUEUE" and one.at > signs.now - RECENT_MS]
    n, reasons = sum(one.count for one in lately), sorted({one.reason for one in lately if one.reason})
    many = n >= MANY_DEAD or dead > most
    text = f"{dead} dead letter{'s' * (dead != 1)}" + (f"; {n} came within the last ten minutes" if n else "")
    text += f"; that is over the limit of {most}." if dead > most else "."
    do = (
        "sheratan-hub dlq list tells why each failed; mend the cause.",
        "Then sheratan-hub dlq redrive --kind KIND runs them again.",
    )
    evidence = {"dead_letters": dead, "lately": n, "reasons": reasons, "limit": most}
    yield "dead-letters", text, evidence, do, None if many else "note"


def _by_age(signs: Signs, waits: Sequence[Wait]) -> Severity | None:
    """Worse than usual once they have waited long and nothing runs."""
    stuck = max(one.age_ms for one in waits) >= STUCK_MS and not signs.count("job:running")
    return "critical" if stuck else None


def _ids(waits: Sequence[Wait]) -> list[str]:
    return [one.job_id for one in waits[:SHOWN]]


def _kinds(kinds: Iterable[str | None]) -> str:
    names = sorted({kind for kind in kinds if kind is not None})
    more = " ..." if len(names) > 5 else ""
    return f"kind{'s' if len(names) > 1 else ''} {', '.join(names[:5])}{more}"
