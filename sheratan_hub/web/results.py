"""The data plane's handlers of results: one, the fleet's, many; with the proof that each brings, and a pull after."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from sheratan_hub.canonical import Raw
from sheratan_hub.config import Settings
from sheratan_hub.items import Outcome
from sheratan_hub.rules.command import Code, Command, Refused
from sheratan_hub.rules.finish import Finish, Finished
from sheratan_hub.rules.integrity import Proof, check_result
from sheratan_hub.web.answer import Answer
from sheratan_hub.web.body import decode, refuse_long
from sheratan_hub.web.errors import entry
from sheratan_hub.web.forms import FleetResultForm, IntegrityForm, NamedReportForm, ReportForm, ResultForm, ResultsForm
from sheratan_hub.web.plane import Call
from sheratan_hub.web.pulls import deliver, pull_after, wait_ms
from sheratan_hub.web.render import reply


async def result(call: Call) -> Answer:
    """POST /api/jobs/{id}/result: end a lease with its result, and pull the next jobs if asked."""
    return await _one(call, call.params["id"], call.form, wait_ms(call.form.pull) if call.form.pull else 0)


async def fleet_result(call: Call) -> Answer:
    """POST /mesh/submit_result: end a lease with its result; without a lease_id the job's current lease counts."""
    return await _one(call, call.form.job_id, call.form, 0)


async def _one(call: Call, job_id: str, form: ResultForm | FleetResultForm, wait_ms: int) -> Answer:
    """A refused result is raised, and its pull does not happen."""
    command = _finish(call, job_id, form)
    if form.pull is None:
        return reply(finished(await call.hub.execute(command, call.from_node(form.node_id))))
    outcomes, done = await pull_after(call, [command], form.pull, wait_ms, "while_fine")
    return await deliver(call, done, **finished(outcomes[0]))


def read_results(body: bytes, doc: dict[str, Any], settings: Settings) -> ResultsForm:
    """The body of POST /api/results."""
    refuse_long(doc.get("results"), settings.limits.batch_jobs)
    return decode(body, ResultsForm)


async def results(call: Call) -> Answer:
    """POST /api/results: end several leases, each with an outcome of its own."""
    parsed = [_result_entry(call, bytes(raw)) for raw in call.form.results]
    commands: list[Command] = [one for one in parsed if not isinstance(one, Refused)]
    if call.form.pull is None:
        outcomes = await call.hub.execute_many(commands, call.origin, order="in_turn") if commands else []
        return reply({"ok": True, "results": _told(call, parsed, outcomes)})
    outcomes, done = await pull_after(call, commands, call.form.pull, wait_ms(call.form.pull))
    return await deliver(call, done, results=_told(call, parsed, outcomes))


def _told(call: Call, parsed: list[Finish | Refused], outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """One answer each, in order; `outcomes` are those of the commands among the parsed."""
    found = iter(outcomes)
    answers = [one if isinstance(one, Refused) else next(found) for one in parsed]
    return [_result_answer(call, one, raw) for one, raw in zip(answers, call.form.results, strict=True)]


def _result_entry(call: Call, raw: bytes) -> Finish | Refused:
    try:
        if len(raw) > call.settings.limits.body_bytes:
            raise Refused(Code.BODY_TOO_LARGE, f"this entry is larger than {call.settings.limits.body_bytes} bytes")
        form = decode(raw, NamedReportForm)
        return _finish(call, form.job_id, form, lease_needed=True)
    except Refused as no:
        return no


def _result_answer(call: Call, outcome: Any, raw: Raw) -> dict[str, Any]:
    if isinstance(outcome, Refused):
        call.refused(outcome, _node_named(bytes(raw)))
        return entry(outcome, call.settings.queue.backpressure_mode)
    if isinstance(outcome, BaseException):
        raise outcome
    return finished(outcome)


def _node_named(raw: bytes) -> str | None:
    try:
        return msgspec.json.decode(raw, type=_Named).node_id
    except msgspec.DecodeError:
        return None


class _Named(msgspec.Struct):
    node_id: str | None = None


def _finish(call: Call, job_id: str, form: ReportForm, *, lease_needed: bool = False) -> Finish:
    if form.lease_id is None and (lease_needed or call.params):
        raise Refused(Code.INVALID_FIELD, "Object missing required field `lease_id`")
    text, error = bytes(form.result), bytes(form.error)
    proven = _is_proven(call, job_id, form.ok, text, error, form.integrity)
    return Finish(
        job_id,
        form.ok,
        form.lease_id,
        form.node_id,
        text,
        error,
        form.retry,
        None if form.retry_after_seconds is None else int(form.retry_after_seconds * 1000),
        call.services.clock.jitter(),
        proven,
    )


def _is_proven(call: Call, job_id: str, ok: bool, text: bytes, error: bytes, given: IntegrityForm | None) -> bool:
    """Whether there was a proof, and it holds. Refused with `result_integrity_fail` if it does not, or is missing."""
    proof = Proof(given.mode, given.sha256, given.sig) if given is not None else None
    return check_result(job_id, ok, text, error, proof, call.services.demand)


def finished(done: Finished) -> dict[str, Any]:
    """What a verb that ends a lease is told."""
    answer: dict[str, Any] = {"ok": True, "job_id": done.job_id, "status": done.status}
    if done.late:
        answer["late"] = True
    if done.retry_in_ms:
        answer["retry_in_seconds"] = done.retry_in_ms / 1000
    return answer
