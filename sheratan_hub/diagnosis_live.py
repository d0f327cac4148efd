"""A diagnosis that a running hub makes of itself, a slice at a time, while it goes on serving."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec

from sheratan_hub import diagnosis, diagnosis_of
from sheratan_hub import diagnosis_files as files
from sheratan_hub.audit_check import AuditView
from sheratan_hub.bundle import Members
from sheratan_hub.clock import rfc3339
from sheratan_hub.config import Settings, store_url
from sheratan_hub.diagnosis import Bundle, Looking, Pace, Part
from sheratan_hub.hub import Hub
from sheratan_hub.keyring import Keyring
from sheratan_hub.loops import Loop
from sheratan_hub.metrics import Telling
from sheratan_hub.rules.command import Refused
from sheratan_hub.rules.signs import AuditSign, StoreSign, state_by
from sheratan_hub.storage_tools import sizes_of


class Inside(msgspec.Struct):
    """What only the process itself can see: its background loops, which planes listen; whether a bundle is made now."""

    loops: list[Loop] = []
    sockets: dict[str, Any] = {}
    making: bool = False


class Running(msgspec.Struct, frozen=True):
    """A running hub, as far as a diagnosis asks it."""

    hub: Hub
    settings: Settings
    environ: Mapping[str, str]
    keyring: Keyring
    audit: AuditView
    telling: Telling
    inside: Inside


async def of_hub(running: Running) -> Bundle:
    """The bundle of a hub, made by itself. Reads only; may take some seconds, most of which it sleeps."""
    settings, hub = running.settings, running.hub
    redactor = await asyncio.to_thread(files.secrets_of, settings, running.environ)
    members = Members(redactor)
    look = Looking(hub, settings, members, Pace(hub.clock), running.keyring.uses)
    parts: dict[str, Part] = {
        "about": partial(diagnosis.about, look, running.environ, "hub", {}),
        "logs": partial(diagnosis.logs, look),
        "audit": partial(_audit, look, running.audit),
        "store": partial(_store, look, running.telling),
        "health": partial(_health, look, running),
        "runtime": partial(_runtime, look, running.inside),
        "queue": partial(diagnosis_of.queue, look),
        "waiting": partial(diagnosis_of.waiting, look),
        "registry": partial(diagnosis_of.registry, look),
        "metrics": partial(diagnosis.metrics, look, running.telling),
    }
    return await diagnosis.make(parts, members, look.pace, hub.clock.now(), "hub")


async def _audit(look: Looking, view: AuditView) -> dict[str, Any]:
    """The end of the audit log, whether its chain holds as far as it is proved, whether it can be written."""
    refuses, proof = view.refuses, await view.proof()
    broken = proof.broken
    place = None if broken is None else f"{broken.file.rpartition('/')[2]}, line {broken.line}: {broken.text}"
    chain = {"complete": proof.complete, "from_seq": proof.began_at, "to_seq": proof.seq, "broken": place}
    trouble = view.trouble
    shown = {"chain": chain, "writable": trouble is None, "refuses_changes": refuses, "trouble": trouble}
    look.members.json("audit.json", look.redactor.names(shown))
    await look.pace.step()
    lines = await diagnosis.audit_lines(look, await asyncio.to_thread(files.audit_tail, look.logs))
    return {"audit": AuditSign(place or "", trouble or ""), **lines}


async def _store(look: Looking, telling: Telling) -> dict[str, Any]:
    """What the store is, how large, whether it answers and takes what is written. It is not checked: that reads all."""
    hub = look.hub
    answers, why = await _answers(hub)
    failing = hub.committer.failing
    sizes = await sizes_of(hub.store)
    told = {
        "url": look.redactor.name(files.shown_url(store_url(look.settings))),
        "sizes": None if sizes is None else {"store_bytes": sizes.store_bytes, "log_bytes": sizes.log_bytes},
        "answers": answers,
        "writes": not failing,
        "check": {
            "complete": False,
            "why": "a hub that runs does not read all of its store; sheratan-hub store check does",
        },
    }
    look.members.json("store.json", told)
    if not answers:
        text = look.redactor.name(why)
        return {
            "store": StoreSign("damaged", text) if state_by(why) == "damaged" else StoreSign("ok", not_writing=text)
        }
    sign = StoreSign("ok")
    if failing:
        failures = telling.values("control", None).get("sheratan_commit_failures_total", {})
        full = failures.get(("full",), 0) > 0
        text = "it has no room, or its disk is read-only" if full else "the last batch could not be written"
        sign = msgspec.structs.replace(sign, not_writing=text)
    return {"store": sign}


async def _answers(hub: Hub) -> tuple[bool, str]:
    try:
        await hub.counts("probe")
    except Refused as no:
        return False, no.text.removeprefix("the store cannot be read: ")
    return True, ""


async def _health(look: Looking, running: Running) -> dict[str, Any]:
    """The checks of `/health`, for both planes."""
    hub = look.hub
    answers, _ = await _answers(hub)
    checks = {
        "started": hub.ready or hub.waiting.closed,
        "not_draining": not hub.waiting.closed,
        "store": answers and not hub.committer.failing,
        "audit": not running.audit.refuses,
    }
    status = "ok" if all(checks.values()) else "degraded"
    planes = sorted(running.inside.sockets)
    look.members.json("health.json", {plane: {"answers": True, "status": status, "checks": checks} for plane in planes})
    return {}


async def _runtime(look: Looking, inside: Inside) -> dict[str, Any]:
    """The loops, the committer, connections and long polls, as they are now."""
    hub, committer = look.hub, look.hub.committer
    loops = {loop.name: {"errors": loop.errors} for loop in inside.loops}
    told = {
        "loops": loops,
        "committer": {
            "waiting": committer.waiting,
            "limit": look.settings.hub.max_waiting_commands,
            "failing": committer.failing,
            "since": rfc3339(committer.started_at),
            "lanes": len(committer.lanes),
            "policy_version": hub.judge.version,
        },
        "connections": {
            plane: {"open": len(one), "limit": one.bounds.most} for plane, one in sorted(inside.sockets.items())
        },
        "long_polls": len(hub.waiting),
    }
    look.members.json("runtime.json", told)
    return {"failed_loops": {loop.name: loop.errors for loop in inside.loops if loop.errors}}
