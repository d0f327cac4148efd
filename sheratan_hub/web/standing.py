"""The operators' handlers of what stands until it is changed: pauses, and rate limits of sources."""

from __future__ import annotations

from typing import Any

from sheratan_hub.clock import rfc3339
from sheratan_hub.rules.command import Code, Rate, Refused
from sheratan_hub.rules.limits import DropRate, Limited, SetRate, rate_of
from sheratan_hub.rules.pauses import Pause, PauseKind, Pauses, ResumeKind
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.forms import moment_ms
from sheratan_hub.web.plane import Call
from sheratan_hub.web.render import reply
from sheratan_hub.web.standing_forms import PauseForm, RateForm


async def pause(call: Call) -> Answer:
    """POST /admin/pause: stop leasing jobs of a kind, or of all, for a while."""
    form: PauseForm = call.form
    until = moment_ms("until", form.until) if form.until is not None else 0
    if form.until is not None and form.seconds is not None:
        raise Refused(Code.INVALID_FIELD, "give seconds or until, not both - at `$.until`")
    if form.until is not None and until <= call.services.clock.now():
        raise Refused(Code.INVALID_FIELD, "until has passed already - at `$.until`")
    for_ms = max(1, round(form.seconds * 1000)) if form.seconds is not None else 0
    call.done = {"paused": form.kind or "all"}
    done: Pauses = await call.hub.execute(PauseKind(form.kind, until, for_ms, form.reason or ""), call.origin)
    return reply({"ok": True, "pauses": pauses_answer(done.pauses)})


async def resume(call: Call) -> Answer:
    """POST /admin/resume: lease jobs of a kind, or of all, again."""
    call.done = {"resumed": call.form.kind or "all"}
    done: Pauses = await call.hub.execute(ResumeKind(call.form.kind), call.origin)
    return reply({"ok": True, "pauses": pauses_answer(done.pauses)})


def pauses_answer(pauses: tuple[Pause, ...]) -> list[dict[str, Any]]:
    """The pauses that hold, as operators see them."""
    return [
        {
            "kind": pause.kind,
            "since": rfc3339(pause.since),
            "until": rfc3339(pause.until) if pause.until else None,
            "reason": pause.reason or None,
        }
        for pause in pauses
    ]


async def rate_limit(call: Call) -> Answer:
    """GET /admin/rate-limits/{source}: the limit of a source, and how many of its jobs run."""
    source = _source(call)
    stored = call.hub.committer.standing.rates
    rate = rate_of(source, stored, call.hub.limits)
    call.done = {"source": source}
    if rate is None:
        raise Refused(Code.RATE_LIMIT_NOT_FOUND, f"source {source} has no rate limit")
    return reply(_limited(call, Limited(source, rate, source in stored)))


async def set_rate_limit(call: Call) -> Answer:
    """PUT /admin/rate-limits/{source}: limit a source, in the place of what is configured."""
    source = _source(call)
    form: RateForm = call.form
    call.done = {"source": source, "per_minute": form.per_minute, "concurrent": form.concurrent}
    done = await call.hub.execute(SetRate(source, Rate(form.per_minute, form.concurrent)), call.origin)
    return reply(_limited(call, done))


async def drop_rate_limit(call: Call) -> Answer:
    """DELETE /admin/rate-limits/{source}: forget a limit that was set; the configured one counts again."""
    source = _source(call)
    call.done = {"source": source, "dropped": True}
    return reply(_limited(call, await call.hub.execute(DropRate(source), call.origin)))


def _limited(call: Call, limited: Limited) -> dict[str, Any]:
    rate, source = limited.rate, limited.source
    return {
        "ok": True,
        "source": source,
        "per_minute": None if rate is None else rate.per_minute,
        "concurrent": None if rate is None else rate.concurrent,
        "origin": "stored" if limited.stored else "configured" if rate is not None else None,
        "running": call.hub.committer.standing.running(source),
        "throttled": source in call.hub.throttled,
    }


def _source(call: Call) -> str:
    source = call.params["source"]
    if len(source) > 200:
        raise Refused(Code.INVALID_FIELD, "a source has at most 200 characters")
    return source
