"""The oracle of crash runs: it knows only what clients were told, and finds what cannot be if the hub kept its word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tools.crash_case import Case, Found, Submit, Violation, Word
from tools.crash_history import FINAL, Exchange, History
from tools.crash_leases import deliveries, repeats, surely_lived, words

FENCED = frozenset({"lease_superseded", "lease_expired", "not_leased", "result_conflict"})
"""Codes that a word about a lease may be refused with."""

STAYS = ("status", "result", "error", "reason", "attempt", "failures", "losses", "finished_at")
"""What never changes of a finished job."""


def judge(history: History) -> list[Violation]:
    """Every broken promise that this history proves; none if it could be that of a hub that keeps all."""
    if not history.readings:
        return [Violation("no end", "the run came to no end, so what the hub holds was never read")]
    case = Case(history)
    return [violation for check in CHECKS for violation in check(case)]


def answers(case: Case) -> Found:
    """Every answer is one that these requests may get."""
    for exchange in case.history.exchanges:
        if exchange.status and not exchange.acknowledged and exchange.status not in (429, 503):
            code = (exchange.answer or {}).get("code")
            if not (exchange.status == 409 and code in FENCED):
                text = f"{exchange.method} {exchange.path} was answered {exchange.status} {code}"
                yield Violation("unexpected answer", text, *_named(exchange))
    for exchange, submits in case.batches:
        if exchange.acknowledged and len(exchange.answer["jobs"]) != len(submits):
            text = f"{len(exchange.answer['jobs'])} outcomes for {len(submits)} jobs"
            yield Violation("torn batch", text, tag=submits[0].tag)
    parts: list[Submit | Word] = [*(one for found in case.submits.values() for one in found), *case.words]
    for part in parts:
        code = part.told.get("code")
        if part.exchange.acknowledged and not part.acknowledged and code not in (*FENCED, "queue_full", "unavailable"):
            name = part.tag if isinstance(part, Submit) else part.job_id
            yield Violation("unexpected answer", f"an entry of a batch was answered {part.outcome}", tag=name)


def submits(case: Case) -> Found:
    """What was acknowledged is there, once; all answers to one key name one job; nothing else is there."""
    made: dict[str, list[str]] = defaultdict(list)
    for job_id, job in case.jobs.items():
        tag = tag_of(job)
        made[tag].append(job_id)
        asked = [one for one in case.submits.get(tag, ()) if one.possible]
        if not asked:
            yield Violation("unexpected job", "no submit that may have happened asked for it", job_id, tag)
        elif any(job[name] != asked[0].body[name] for name in ("kind", "params")):
            yield Violation("changed payload", f"kind {job['kind']}, params {job['params']}", job_id, tag)
        if job["status"] not in FINAL and case.history.readings[-1].drained:
            yield Violation("unfinished job", f"at the end it is {job['status']}", job_id, tag)
    for tag, ids in made.items():
        if len(ids) > 1:
            yield Violation("unexpected job", f"one submit made the jobs {', '.join(ids)}", ids[0], tag)
    for tag, asked in case.submits.items():
        named = sorted({str(one.told["job_id"]) for one in asked if one.acknowledged})
        if len(named) > 1:
            yield Violation("two jobs for one key", f"its answers name {', '.join(named)}", named[0], tag)
        for job_id in named:
            if job_id not in case.jobs:
                yield Violation("lost submit", "a submit was acknowledged, and the job is not there", job_id, tag)


def batches(case: Case) -> Found:
    """An atomic batch that was not answered is there as a whole, or not at all."""
    made = {tag_of(job) for job in case.jobs.values()}
    for exchange, asked in case.batches:
        if exchange.body.get("atomic") and exchange.unknown:
            alone = [one.tag for one in asked if sum(other.possible for other in case.submits[one.tag]) == 1]
            there = [tag for tag in alone if tag in made]
            if there and len(there) < len(alone):
                text = f"{len(there)} of {len(alone)} jobs of an atomic batch are there"
                yield Violation("torn batch", text, tag=there[0])


def results(case: Case) -> Found:
    """An acknowledged result is the job's end, exactly; every end was brought about by a worker."""
    said: dict[str, list[Word]] = defaultdict(list)
    for word in case.words:
        if word.possible:
            said[word.job_id].append(word)
    for job_id, about in said.items():
        job = case.jobs.get(job_id)
        if job is not None:
            for word in about:
                yield from _kept(case, job, word)
    for job_id, job in case.jobs.items():
        if job["status"] in FINAL and not _explained(case, job, said[job_id]):
            text = f"nobody made it {job['status']} with {job['reason']}, {job['result']}, {job['error']}"
            yield Violation("unexpected end", text, job_id)


def _kept(case: Case, job: dict[str, Any], word: Word) -> Found:
    """What an acknowledged end promises."""
    ends = word.what == "complete" or (word.what == "fail" and word.told.get("status") == "failed")
    if not (word.acknowledged and ends):
        return
    job_id, status = word.job_id, "completed" if word.what == "complete" else "failed"
    if job["status"] != status:
        yield Violation("lost result", f"acknowledged as {status}, and it is {job['status']}", job_id)
    name = "result" if word.what == "complete" else "error"
    if job["status"] == status and job[name] != word.body.get(name):
        yield Violation("changed result", f"acknowledged {word.body.get(name)}, and it is {job[name]}", job_id)
    delivery = next((one for one in case.deliveries.get(job_id, ()) if one.lease_id == word.lease_id), None)
    if delivery is not None and job["attempt"] > delivery.attempt:
        text = f"the result of attempt {delivery.attempt} was acknowledged, and there were {job['attempt']}"
        yield Violation("double delivery", text, job_id)


def _explained(case: Case, job: dict[str, Any], words: list[Word]) -> bool:
    if job["status"] == "completed":
        return any(word.what == "complete" and word.body.get("result") == job["result"] for word in words)
    fails = [word for word in words if word.what == "fail" and word.body.get("error") == job["error"]]
    if job["reason"] == "POISON":
        return bool(job["losses"] >= case.history.max_losses)
    if job["reason"] == "NOT_RETRYABLE":
        return any(word.body.get("retry") is False for word in fails)
    asked = case.submits.get(tag_of(job), [])
    most = min((one.body["max_retries"] for one in asked if "max_retries" in one.body), default=0)
    return job["reason"] == "RETRIES_EXHAUSTED" and bool(fails) and bool(job["failures"] > most)


def finals(case: Case) -> Found:
    """Whoever was once told a job's end is told the same ever after."""
    shown = (one for one in case.history.exchanges if one.acknowledged and one.method == "GET")
    told: list[tuple[str, dict[str, Any]]] = [(one.answer["job_id"], one.answer) for one in shown]
    for reading in case.history.readings:
        told += ((job["job_id"], job) for job in reading.jobs)
    for asked in case.submits.values():
        told += ((one.told["job_id"], one.told) for one in asked if one.acknowledged)
    for job_id, seen in told:
        job = case.jobs.get(job_id)
        if job is None:
            yield Violation("lost job", f"it was shown as {seen['status']}, and is not there", job_id)
        elif seen["status"] in FINAL:
            changed = [name for name in STAYS if name in seen and seen[name] != job[name]]
            if changed:
                text = ", ".join(f"{name} was {seen[name]} and is {job[name]}" for name in changed)
                yield Violation("changed result", f"after its end {text}", job_id)


def counts(case: Case) -> Found:
    """Acknowledged failures count; attempts, failures, losses and what ended otherwise add up."""
    for job_id, job in case.jobs.items():
        found = case.deliveries.get(job_id, [])
        low = high = ended = maybe = charged_twice = 0
        for one in found:
            fails = [word for word in one.words if word.what == "fail" and word.possible]
            low += any(word.acknowledged and not word.told.get("late") for word in fails)
            high += bool(fails)
            charged_twice += any(word.body.get("retry") is False for word in fails)
            given_back = [word for word in one.words if word.what == "release" and word.possible]
            ended += any(
                word.acknowledged and word.exchange.done < surely_lived(case, one, word) for word in given_back
            )
            ended += any(w.what == "complete" and w.acknowledged and not w.told.get("late") for w in one.words)
            maybe += bool(given_back) or any(word.what == "complete" and word.possible for word in one.words)
        if not low <= job["failures"] <= high:
            text = f"{job['failures']} failures, and between {low} and {high} were reported"
            yield Violation("failures miscounted", text, job_id)
        if job["status"] in FINAL:
            rest = job["attempt"] - job["failures"] - job["losses"]
            untold = job["attempt"] - len(found)
            if not ended - charged_twice <= rest <= maybe + untold:
                text = f"{job['attempt']} attempts, {job['failures']} failures, {job['losses']} losses"
                text += f", and between {ended} and {maybe + untold} ended otherwise"
                yield Violation("losses miscounted", text, job_id)


def counters(case: Case) -> Found:
    """The hub's own numbers are those of the jobs it lists, and of the keys it was given."""
    keyed = [one for asked in case.submits.values() for one in asked if one.key is not None]
    for reading in case.history.readings:
        past = [one for one in keyed if one.exchange.sent < reading.at]
        sure = len({one.key for one in past if one.acknowledged})
        maybe = len({one.key for one in past if one.possible})
        for name, status in (("queue_depth", "pending"), ("inflight_jobs", "running"), ("dlq_size", "failed")):
            listed = sum(job["status"] == status for job in reading.jobs)
            if reading.metrics[name] != listed:
                text = f"{name} is {reading.metrics[name]}, and {listed} jobs are {status}"
                yield Violation("wrong counter", text)
        if not sure <= reading.metrics["idempotency_store_size"] <= maybe:
            text = f"{reading.metrics['idempotency_store_size']} keys, and between {sure} and {maybe} were given"
            yield Violation("wrong counter", text)


def tag_of(job: dict[str, Any]) -> str:
    """The tag in the job's params, empty if they are not such as a run submits."""
    params = job["params"]
    return str(params.get("tag", "")) if isinstance(params, dict) else ""


def _named(exchange: Exchange) -> tuple[str, str]:
    """The job id and the tag that a request is about, where it is about one."""
    _, _, _, job_id, *_ = [*exchange.path.partition("?")[0].split("/"), "", ""]
    body = exchange.body if isinstance(exchange.body, dict) else {}
    return job_id if job_id != "pull" else "", str(body["params"]["tag"]) if "params" in body else ""


CHECKS: tuple[Callable[[Case], Found], ...] = (
    answers,
    submits,
    batches,
    results,
    finals,
    counts,
    deliveries,
    words,
    repeats,
    counters,
)
