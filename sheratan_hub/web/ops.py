"""What operators and Prometheus ask of both planes: health, readiness, metrics."""

from __future__ import annotations

from typing import Any

from sheratan_hub import __version__
from sheratan_hub.rules.command import Code, Refused
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.errors import problem
from sheratan_hub.web.plane import Call
from sheratan_hub.web.render import reply


async def health(call: Call) -> Answer:
    """GET /health: how the hub is, for people. 200 while the process answers; `status` tells the rest."""
    checks = await _checks(call)
    status = "ok" if all(checks.values()) else "degraded"
    known = {"version": __version__} if call.is_local else {}
    return reply({"ok": True, "status": status, "plane": call.plane, **known, "checks": checks})


async def livez(call: Call) -> Answer:
    """GET /livez: whether the event loop turns. Never touches the store."""
    return reply({"ok": True, "plane": call.plane})


async def readyz(call: Call) -> Answer:
    """GET /readyz: whether it takes requests; 503 while starting, draining, or when the store fails."""
    checks = await _checks(call)
    shown: dict[str, Any] = {"checks": checks} if "verbose" in call.request.query else {}
    if all(checks.values()):
        return reply({"ok": True, "plane": call.plane, **shown})
    failing = ", ".join(name for name, good in checks.items() if not good)
    return problem(Refused(Code.UNAVAILABLE, f"not ready: {failing}", retry_after_ms=2000), **shown)


async def _checks(call: Call) -> dict[str, bool]:
    draining = call.hub.waiting.closed
    checks = {"started": call.hub.ready or draining, "not_draining": not draining, "store": await _store_answers(call)}
    if call.services.audit.refuses:
        checks["audit"] = False
    return checks


async def _store_answers(call: Call) -> bool:
    try:
        await call.hub.counts("probe")
    except Refused:
        return False
    return not call.hub.committer.failing


async def metrics(call: Call) -> Answer:
    """GET /metrics: Prometheus text or OpenMetrics, or the fleet's JSON when that is asked for."""
    telling = call.services.telling
    if _wants_json(call):
        return reply(await telling.json(call.plane))
    return Answer(200, *await telling.text(call.plane, call.request.headers.get("Accept", "")))


def _wants_json(call: Call) -> bool:
    accept = call.request.headers.get("Accept", "")
    return call.request.query.get("format") == "json" or accept.startswith("application/json")
